"""Other people's clients against a server that really runs: two turns, a loop of tools, a schema.

The model is tiny, so what it says matters less than that every message comes back and every shape
is right.
"""

import asyncio
import json

import pytest
from pydantic import BaseModel

pytestmark = pytest.mark.clients
ADD = "Add 12 and 30."


class Sum(BaseModel):
    total: int


def double(number: int) -> int:
    """Doubles a number."""
    return 2 * number


TOOL = {
    "type": "function",
    "function": {
        "name": "double",
        "description": "Doubles a number.",
        "parameters": {
            "type": "object",
            "properties": {"number": {"type": "integer", "minimum": 0, "maximum": 99}},
            "required": ["number"],
            "additionalProperties": False,
        },
    },
}


class TestOpenAI:
    @pytest.fixture
    def client(self, url):
        import openai

        return openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=100)

    def test_two_turns(self, client):
        """The message goes back as the client made it, of an answer as a whole and of a stream."""
        asked = [{"role": "user", "content": ADD}]
        first = (
            client.chat.completions.create(model="nano", messages=asked, temperature=0)
            .choices[0]
            .message
        )
        assert first.content == "42"
        with client.chat.completions.stream(
            model="nano", messages=[*asked, first, *asked], temperature=0
        ) as stream:
            second = stream.get_final_completion().choices[0].message
        third = client.chat.completions.create(
            model="nano", messages=[*asked, first, *asked, second, *asked], temperature=0
        )
        assert third.choices[0].message.content

    def test_tools(self, client):
        messages = [{"role": "user", "content": ADD}]
        first = client.chat.completions.parse(
            model="nano",
            messages=messages,
            tools=[{**TOOL, "function": {**TOOL["function"], "strict": True}}],
            max_tokens=64,
        )
        said = first.choices[0].message
        number = said.tool_calls[0].function.parsed_arguments["number"]
        messages += [
            said,
            {"role": "tool", "tool_call_id": said.tool_calls[0].id, "content": str(double(number))},
        ]
        last = client.chat.completions.create(
            model="nano", messages=messages, tools=[TOOL], max_tokens=64
        ).choices[0]
        assert (last.finish_reason in ("stop", "length"), last.message.tool_calls) == (True, None)

    def test_schema(self, client):
        asked = [{"role": "user", "content": ADD}]
        first = (
            client.chat.completions.parse(
                model="nano", messages=asked, response_format=Sum, max_tokens=64
            )
            .choices[0]
            .message
        )
        assert isinstance(first.parsed, Sum)
        again = client.chat.completions.parse(
            model="nano", messages=[*asked, first, *asked], response_format=Sum, max_tokens=64
        )
        assert isinstance(again.choices[0].message.parsed, Sum)


class TestLangChain:
    @pytest.fixture
    def model(self, url):
        from langchain_openai import ChatOpenAI

        return ChatOpenAI(
            model="nano",
            base_url=url,
            api_key="none",
            max_retries=0,
            timeout=100,
            max_tokens=64,
            top_p=0.95,
        )

    def test_two_turns(self, model):
        first = model.invoke([("user", ADD)])
        assert first.content
        parts = list(model.stream([("user", ADD), first, ("user", ADD)]))
        whole = sum(parts[1:], parts[0])
        assert (
            model.invoke(
                [("user", ADD), first, ("user", ADD), whole, ("user", ADD)]
            ).response_metadata["model_name"]
            == "nano"
        )

    def test_tools(self, model):
        from langchain_core.messages import HumanMessage
        from langchain_core.tools import tool

        able, own = model.bind_tools([TOOL]), tool(double)
        messages = [HumanMessage(ADD), able.invoke(ADD)]
        assert [call["name"] for call in messages[1].tool_calls] == ["double"]
        messages.append(own.invoke(messages[1].tool_calls[0]))
        assert not able.invoke(messages).tool_calls

    @pytest.mark.parametrize("method", ["json_schema", "function_calling"])
    def test_schema(self, model, method):
        assert isinstance(model.with_structured_output(Sum, method=method).invoke(ADD), Sum)


class TestLiteLLM:
    @pytest.fixture
    def ask(self, url):
        import litellm

        litellm.telemetry = False
        return lambda messages, **options: (
            litellm.completion(
                model="openai/nano",
                api_base=url,
                api_key="none",
                timeout=100,
                messages=messages,
                max_tokens=64,
                **options,
            )
            .choices[0]
            .message
        )

    def test_two_turns(self, ask):
        """The message itself, and all of its fields."""
        asked = {
            "role": "user",
            "content": [{"type": "text", "text": ADD, "cache_control": {"type": "ephemeral"}}],
        }
        first = ask([asked])
        assert first.content
        assert ask([asked, first, asked]).role == "assistant"
        assert ask([asked, first.model_dump(), asked]).role == "assistant"

    def test_tools(self, ask):
        messages = [{"role": "user", "content": ADD}]
        first = ask(messages, tools=[TOOL])
        call = first.tool_calls[0]
        result = double(json.loads(call.function.arguments)["number"])
        messages += [
            first,
            {"role": "tool", "tool_call_id": call.id, "name": "double", "content": str(result)},
        ]
        assert not ask(messages, tools=[TOOL]).tool_calls

    def test_schema(self, ask):
        assert Sum.model_validate_json(
            ask([{"role": "user", "content": ADD}], response_format=Sum).content
        )


class TestInstructor:
    @pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA"])
    def test_two_turns_of_schemas(self, url, mode):
        import instructor
        import openai

        client = instructor.from_openai(
            openai.OpenAI(base_url=url, api_key="none"), mode=instructor.Mode[mode]
        )
        asked = [{"role": "user", "content": ADD}]
        options = {"model": "nano", "response_model": Sum, "max_tokens": 64, "max_retries": 0}
        first, completion = client.chat.completions.create_with_completion(
            messages=asked, **options
        )
        said = completion.choices[0].message.model_dump()
        replies = [
            {"role": "tool", "tool_call_id": call["id"], "content": str(first.total)}
            for call in said["tool_calls"] or ()
        ]
        again = client.chat.completions.create(messages=[*asked, said, *replies, *asked], **options)
        assert isinstance(first, Sum)
        assert isinstance(again, Sum)


class TestPydanticAI:
    def agent(self, url, **options):
        from pydantic_ai import Agent
        from pydantic_ai.models.openai import OpenAIChatModel
        from pydantic_ai.providers.openai import OpenAIProvider

        model = OpenAIChatModel("nano", provider=OpenAIProvider(base_url=url, api_key="none"))
        ends = {
            "1": -100,
            "5": -100,
            "13": -100,
        }  # an answer without a word is refused by this client
        settings = {"max_tokens": 64, "seed": 0, "extra_body": {"logit_bias": ends}}
        return Agent(model, model_settings=settings, **options)

    def test_two_turns(self, url):
        agent = self.agent(url, system_prompt="Be brief.")
        first = agent.run_sync(ADD)
        second = agent.run_sync(ADD, message_history=first.all_messages())
        assert len(second.all_messages()) == 4

    def test_tools(self, url):
        agent = self.agent(url)
        agent.tool_plain(double)
        kinds = [
            part.part_kind
            for message in agent.run_sync(ADD).all_messages()
            for part in message.parts
        ]
        assert [kind for kind in kinds if kind.startswith("tool")] == ["tool-call", "tool-return"]

    def test_schema(self, url):
        from pydantic_ai import NativeOutput, ToolOutput

        for kind in (ToolOutput, NativeOutput):
            assert isinstance(self.agent(url, output_type=kind(Sum)).run_sync(ADD).output, Sum)


class TestAgents:
    def run(self, url, *turns, **options):
        import agents
        import openai

        client = openai.AsyncOpenAI(base_url=url, api_key="none")
        agent = agents.Agent(
            "a",
            instructions="Be brief.",
            model=agents.OpenAIChatCompletionsModel("nano", client),
            model_settings=agents.ModelSettings(max_tokens=64),
            **options,
        )

        async def talk():
            given, result = [], None
            for turn in turns:
                result = await agents.Runner.run(agent, [*given, {"role": "user", "content": turn}])
                given = result.to_input_list()
            return result

        return asyncio.run(talk())

    def test_two_turns(self, url):
        assert len(self.run(url, ADD, ADD).to_input_list()) == 4

    def test_tools(self, url):
        import agents

        kinds = [
            item.type for item in self.run(url, ADD, tools=[agents.function_tool(double)]).new_items
        ]
        assert kinds[:2] == ["tool_call_item", "tool_call_output_item"]
        assert set(kinds[2:]) <= {"message_output_item"}  # without a word it is no item

    def test_schema(self, url):
        assert isinstance(self.run(url, ADD, output_type=Sum).final_output, Sum)
