"""A server that really runs, asked by OpenAI's own client.  What does not depend on what is
answered is asked of ``quick_server``, whose steps take a tenth of nano's time.
"""

import itertools
import json
import re
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import httpx
import jsonschema
import openai
import pytest
from starlette.testclient import TestClient

from mlx_diffgemma import Hole, Question, chat_ids, decide, infill, nano, stream_generate
from mlx_diffgemma.cli.serve_options import host_names
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.serving.app import create_app
from mlx_diffgemma.serving.protocols.openai_chat import ChatRequest
from mlx_diffgemma.serving.settings import Settings
from mlx_diffgemma.text.variables import check_variables
from tests.serving.process import serving, until
from tests.variants import few

JSON = {"Content-Type": "application/json"}
STEPS, FULL = 3, 48  # of a canvas
LIMIT = 64  # of tokens, which are four canvases of the random model
ADD = [{"role": "user", "content": "Add 12 and 30."}]
STORY = [{"role": "user", "content": "Tell me a story about Leo the owl and a map."}]
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "required": ["city", "days"],
            "additionalProperties": False,
            "properties": {
                "city": {"type": "string", "maxLength": 9},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
        },
    },
}
TIME = {"type": "function", "function": {"name": "time"}}


def asking(client, **defaults):
    """Asks for few steps a canvas unless said otherwise: what comes of them is no story, but
    always the same.
    """

    def ask(messages=ADD, steps=STEPS, extra_body=None, **options):
        own = {
            "model": "nano",
            "messages": messages,
            "seed": 0,
            "extra_body": {"max_denoising_steps": steps, **(extra_body or {})},
        }
        return client.chat.completions.create(**{**own, **defaults, **options})

    return ask


@pytest.fixture
def nano_chat(client):
    """Asks nano."""
    return asking(client)


@pytest.fixture
def chat(quick_client):
    """Asks the random model, for four canvases unless said otherwise."""
    return asking(quick_client, max_tokens=LIMIT)


def answer(pair, messages=ADD, think=False, **options):
    """What generate says, in pieces."""
    ids = chat_ids(pair[1], messages, think=think)
    return list(stream_generate(*pair, ids, **{"seed": 0, "max_denoising_steps": STEPS, **options}))


class TestModels:
    def test_list_and_retrieve(self, client):
        assert [model.id for model in client.models.list()] == ["nano"]
        found = client.models.retrieve("nano")
        assert (found.object, found.context_length, found.vision) == ("model", 8192, False)
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("other")


class TestChat:
    def test_as_generate(self, nano_chat, nano_pair):
        response = nano_chat(STORY)
        own = answer(nano_pair, STORY)
        choice = response.choices[0]
        assert choice.message.content == "".join(part.text for part in own)
        assert (choice.message.role, choice.finish_reason, response.object) == (
            "assistant",
            "stop",
            "chat.completion",
        )
        assert response.usage.completion_tokens == own[-1].generation_tokens
        assert response.usage.prompt_tokens == own[-1].prompt_tokens
        assert response.usage.denoising_steps == sum(part.steps for part in own)
        assert response.usage.tokens_per_forward == pytest.approx(
            own[-1].tokens_per_forward, abs=0.01
        )
        assert response.seed == 0

    @pytest.mark.parametrize(
        "options",
        [
            {"temperature": 0},
            {"top_p": 0.95},
            {"max_tokens": 20},
            {"extra_body": {"preset": "fast"}},
            {"extra_body": {"max_denoising_steps": 2, "diffusion_sampler": "confidence-threshold"}},
        ],
    )
    def test_options_are_those_of_generate(self, chat, quick_pair, options):
        named = {"max_tokens": LIMIT, **options, **options.get("extra_body", {})}
        named.pop("extra_body", None)
        own = answer(quick_pair, STORY, **named)
        response = chat(STORY, **options)
        assert response.choices[0].message.content == "".join(part.text for part in own)
        assert response.choices[0].finish_reason == own[-1].finish_reason

    def test_the_usual_top_p_is_no_argmax(self, chat):
        greedy, drawn = (
            chat(STORY, max_tokens=30, **options).choices[0].message.content
            for options in ({"temperature": 0}, {"top_p": 0.95})
        )
        assert greedy != drawn

    def test_streamed_as_whole(self, chat):
        chunks = list(chat(STORY, stream=True, stream_options={"include_usage": True}))
        whole = chat(STORY)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == whole.choices[0].message.content
        assert [chunk.choices[0].delta.role for chunk in chunks if chunk.choices][:2] == [
            "assistant",
            None,
        ]
        ends = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
        assert ends == [None] * (len(ends) - 1) + [whole.choices[0].finish_reason]
        assert sum(chunk.usage is not None for chunk in chunks) == 1
        assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
        assert len({chunk.id for chunk in chunks}) == 1

    def test_no_usage_unless_asked_for(self, chat):
        assert all(chunk.usage is None for chunk in chat(stream=True))

    def test_seeds(self, chat):
        first, again, other = (chat(STORY, seed=seed, max_tokens=30) for seed in (5, 5, 6))
        assert (
            first.choices[0].message.content
            == again.choices[0].message.content
            != other.choices[0].message.content
        )
        fresh = chat(STORY, seed=None, max_tokens=30)
        assert (
            chat(STORY, seed=fresh.seed, max_tokens=30).choices[0].message.content
            == fresh.choices[0].message.content
        )

    @pytest.mark.parametrize("stream", [False, True])
    def test_several_choices(self, chat, stream):
        """Of several canvases, each behind a cache of its own."""
        alone = [
            chat(STORY, seed=seed, max_tokens=40).choices[0].message.content for seed in (3, 4)
        ]
        if stream:
            found = ["", ""]
            for chunk in chat(STORY, seed=3, n=2, max_tokens=40, stream=True):
                for choice in chunk.choices:
                    found[choice.index] += choice.delta.content or ""
        else:
            found = [
                choice.message.content for choice in chat(STORY, seed=3, n=2, max_tokens=40).choices
            ]
        assert found == alone

    @pytest.mark.parametrize("stream", [False, True])
    def test_stop(self, chat, quick_pair, stream):
        """At the first of them, also where it spans two canvases; the rest of the text is what it
        was.
        """
        whole = chat(STORY).choices[0].message.content
        pieces = [part.text for part in answer(quick_pair, STORY, max_tokens=LIMIT)]
        assert "".join(pieces) == whole
        borders = itertools.accumulate(map(len, pieces[:-1]))
        spanning = [whole[border - 3 : border + 3] for border in borders]
        spanning = next(text for text in spanning if "\N{REPLACEMENT CHARACTER}" not in text)
        for stops in ([whole[20:24], "never said"], spanning):
            cut = min(
                whole.find(stop)
                for stop in ([stops] if isinstance(stops, str) else stops)
                if stop in whole
            )
            response = chat(STORY, stop=stops, stream=stream)
            if stream:
                chunks = [chunk.choices[0] for chunk in response if chunk.choices]
                text, reason = (
                    "".join(chunk.delta.content or "" for chunk in chunks),
                    chunks[-1].finish_reason,
                )
            else:
                text, reason = (
                    response.choices[0].message.content,
                    response.choices[0].finish_reason,
                )
            assert (text, reason) == (whole[:cut], "stop")

    def test_length(self, chat):
        response = chat(STORY, max_tokens=None, max_completion_tokens=5)
        assert response.choices[0].finish_reason == "length"
        assert response.usage.completion_tokens == 5

    def test_neutral_values_are_accepted(self, nano_chat):
        response = nano_chat(
            frequency_penalty=0,
            presence_penalty=0.0,
            logit_bias={},
            user="u",
            store=False,
            metadata={"a": "b"},
            n=1,
            parallel_tool_calls=True,
            service_tier="auto",
            modalities=["text"],
            response_format={"type": "text"},
            reasoning_effort="none",
        )
        assert response.choices[0].message.content == "42"

    @pytest.mark.parametrize(
        "extra",
        [
            {"best_of": 1},
            {"tools": [], "tool_choice": "auto"},
            {"tools": [], "tool_choice": "none"},
            {"top_k": -1},
            {"top_k": 0},
            {"max_tokens": -1},
            {"max_completion_tokens": -1},
            {"stop": []},
        ],
    )
    def test_what_changes_nothing(self, nano_chat, extra):
        assert nano_chat(extra_body=extra).choices[0].message.content == "42"

    @pytest.mark.parametrize("stream", [False, True])
    def test_what_is_passed_over_is_told(self, nano_chat, stream):
        found = nano_chat(
            stream=stream,
            extra_body={"verbosity": "high", "colour": 1, "max_tokens": 100_000, "keep_alive": -1},
        )
        warnings = (
            next(chunk.warnings for chunk in found if hasattr(chunk, "warnings"))
            if stream
            else found.warnings
        )
        assert [warning.partition(":")[0] for warning in warnings] == [
            "verbosity",
            "colour",
            "max_tokens",
        ]

    def test_a_seed_of_minus_one_is_a_fresh_one(self, chat):
        assert len({chat(seed=-1, max_tokens=1).seed for _ in range(3)} - {-1}) == 3

    def test_messages_of_other_clients(self, chat, nano_chat):
        asked = {
            "role": "user",
            "content": [
                {"type": "text", "text": ADD[0]["content"], "cache_control": {"type": "ephemeral"}}
            ],
        }
        assert nano_chat([asked]).choices[0].message.content == "42"
        said = [
            {"role": "assistant", "content": text, **more}
            for text, more in (
                ("", {}),
                (None, {}),
                (None, {"tool_calls": []}),
                ("", {"reasoning_details": [{"text": "hm"}]}),
            )
        ]
        assert len({chat([*ADD, own, *ADD], max_tokens=1).usage.prompt_tokens for own in said}) == 1

    def test_no_limit_goes_before_that_of_the_server(self):
        body = {"model": "nano", "messages": ADD}
        for name in ("max_tokens", "max_completion_tokens"):
            assert {"max_tokens": 5} | ChatRequest(**body, **{name: -1}).options() == {
                "max_tokens": None
            }
            assert ChatRequest(**body, **{name: 7}).options() == {"max_tokens": 7}
        assert ChatRequest(**body, top_k=-1).options() == {"top_k": 0}

    def test_content_in_parts(self, nano_chat):
        assert (
            nano_chat([{"role": "user", "content": [{"type": "text", "text": "Add 12 and 30."}]}])
            .choices[0]
            .message.content
            == "42"
        )

    def test_thoughts_apart(self, nano_chat, nano_pair):
        own = answer(nano_pair, think=True, max_denoising_steps=FULL)
        message = nano_chat(reasoning_effort="high", steps=FULL).choices[0].message
        assert message.content == "".join(part.text for part in own) == "42"
        assert message.reasoning_content == "".join(part.thought for part in own).strip() != ""
        chunks = [
            chunk.choices[0].delta
            for chunk in nano_chat(reasoning_effort="low", stream=True, steps=FULL)
            if chunk.choices
        ]
        assert (
            "".join(getattr(delta, "reasoning_content", "") or "" for delta in chunks).strip()
            == message.reasoning_content
        )

    def test_thoughts_are_dropped_from_the_history(self, chat):
        history = [
            *ADD,
            {"role": "assistant", "content": "42"},
            {"role": "user", "content": "Add 1 and 2."},
        ]
        thought = [
            *ADD,
            {"role": "assistant", "content": "42", "reasoning_content": "I think"},
            history[-1],
        ]
        assert chat(history).usage.prompt_tokens == chat(thought).usage.prompt_tokens

    def test_a_conversation_goes_on_from_the_cache(self, chat):
        first = chat(STORY, seed=11)
        said = {"role": "assistant", "content": first.choices[0].message.content}
        second = chat([*STORY, said, {"role": "user", "content": "Add 12 and 30."}], seed=11)
        assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens


class TestLogprobs:
    def test_of_the_visible_tokens(self, nano_chat, nano_pair):
        response = nano_chat(STORY, logprobs=True, top_logprobs=3)
        found = response.choices[0].logprobs.content
        assert "".join(entry.token for entry in found) == response.choices[0].message.content
        own = [value for part in answer(nano_pair, STORY) for value in part.logprobs.tolist()][
            : len(found)
        ]
        assert [entry.logprob for entry in found] == pytest.approx(own, abs=1e-4)
        for entry in found:
            assert bytes(entry.bytes).decode() == entry.token
            assert [top.logprob for top in entry.top_logprobs] == sorted(
                (t.logprob for t in entry.top_logprobs), reverse=True
            )
            assert entry.top_logprobs[0].logprob == pytest.approx(entry.logprob, abs=1e-3)
            assert len(entry.top_logprobs) == 3

    def test_of_a_cut_text(self, nano_chat):
        response = nano_chat(STORY, logprobs=True, stop=" owl")
        text = response.choices[0].message.content
        assert (
            "".join(entry.token for entry in response.choices[0].logprobs.content)[: len(text)]
            == text
        )
        assert len(response.choices[0].logprobs.content) < 10

    def test_none(self, chat):
        assert chat().choices[0].logprobs is None


class TestStructure:
    @pytest.mark.parametrize("stream", [False, True])
    def test_a_schema_is_kept_to(self, chat, stream):
        asked = [{"role": "user", "content": "Anna is 31 years old and lives in Paris."}]
        for seed in range(3):
            response = chat(
                asked,
                seed=seed,
                stream=stream,
                max_tokens=64,
                response_format={
                    "type": "json_schema",
                    "json_schema": {"name": "person", "strict": True, "schema": PERSON},
                },
            )
            text = (
                "".join(chunk.choices[0].delta.content or "" for chunk in response if chunk.choices)
                if stream
                else response.choices[0].message.content
            )
            jsonschema.validate(json.loads(text), PERSON)

    def test_json_object(self, nano_chat, nano_pair):
        """As a schema that admits any object."""
        found = nano_chat(response_format={"type": "json_object"}, max_tokens=64)
        text = found.choices[0].message.content
        assert isinstance(json.loads(text), dict)
        parts = answer(nano_pair, max_tokens=64, json_schema={"type": "object"})
        assert text == "".join(part.text for part in parts)
        assert (found.choices[0].finish_reason, found.usage.completion_tokens) == (
            "stop",
            parts[-1].generation_tokens,
        )

    def test_expressions_and_choices(self, nano_chat):
        assert re.fullmatch(
            "[a-f]{4}", nano_chat(extra_body={"regex": "[a-f]{4}"}).choices[0].message.content
        )
        assert nano_chat(extra_body={"choices": ["41", "42"]}).choices[0].message.content == "42"


class TestTools:
    @pytest.mark.parametrize("stream", few([False, True], False))
    @pytest.mark.parametrize(
        "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
    )
    def test_a_call_that_must_be_is_valid(self, chat, stream, choice):
        response = chat(tools=[WEATHER, TIME], tool_choice=choice, stream=stream, max_tokens=64)
        if stream:
            chunks = [chunk.choices[0] for chunk in response if chunk.choices]
            calls = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
            reason = chunks[-1].finish_reason
        else:
            calls, reason = (
                response.choices[0].message.tool_calls,
                response.choices[0].finish_reason,
            )
            assert response.choices[0].message.content is None
        assert reason == "tool_calls"
        assert [call.type for call in calls] == ["function"]
        arguments = json.loads(calls[0].function.arguments)
        assert calls[0].function.name in ("weather", "time")
        if choice != "required" or calls[0].function.name == "weather":
            jsonschema.validate(arguments, WEATHER["function"]["parameters"])
        else:
            assert arguments == {}

    def test_an_answer_may_call_none(self, nano_chat):
        assert nano_chat(tools=[WEATHER]).choices[0].finish_reason == "stop"

    def test_without_a_choice_they_are_not_shown(self, chat):
        assert (
            chat(tools=[WEATHER], tool_choice="none").usage.prompt_tokens
            == chat().usage.prompt_tokens
        )
        assert chat(tools=[WEATHER]).usage.prompt_tokens > chat().usage.prompt_tokens

    def test_a_conversation_with_calls(self, chat):
        call = {
            "id": "c1",
            "type": "function",
            "function": {"name": "weather", "arguments": '{"city": "Rome", "days": 2}'},
        }
        response = chat(
            [
                *ADD,
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
            ],
            tools=[WEATHER],
        )
        assert response.usage.prompt_tokens > chat(tools=[WEATHER]).usage.prompt_tokens


class TestCompletions:
    def test_plain(self, quick_client, quick_pair):
        asked = dict(
            model="nano",
            prompt="Mia was a red",
            seed=0,
            max_tokens=20,
            extra_body={"max_denoising_steps": STEPS},
        )
        own = list(
            stream_generate(
                *quick_pair, "Mia was a red", seed=0, max_tokens=20, max_denoising_steps=STEPS
            )
        )
        response = quick_client.completions.create(**asked, logprobs=1)
        assert response.choices[0].text == "".join(part.text for part in own)
        assert "".join(response.choices[0].logprobs.tokens) == response.choices[0].text
        echoed = quick_client.completions.create(**asked, echo=True)
        assert echoed.choices[0].text == "Mia was a red" + response.choices[0].text
        streamed = quick_client.completions.create(**asked, stream=True, echo=True)
        assert (
            "".join(chunk.choices[0].text for chunk in streamed if chunk.choices)
            == echoed.choices[0].text
        )

    def test_ids(self, quick_client, quick_pair):
        ids = chat_ids(quick_pair[1], ADD)
        own = "".join(part.text for part in answer(quick_pair, max_tokens=20))
        for prompt in (ids, [ids]):
            response = quick_client.completions.create(
                model="nano",
                prompt=prompt,
                seed=0,
                max_tokens=20,
                extra_body={"max_denoising_steps": STEPS},
            )
            assert response.choices[0].text == own
        assert quick_client.completions.create(
            model="nano", prompt=["Mia"], max_tokens=2
        ).usage.completion_tokens

    @pytest.mark.parametrize("stream", [False, True])
    def test_suffix_fills_in(self, quick_client, quick_pair, stream):
        about = "Tell me a story about Mia the fox."
        own = infill(
            *quick_pair,
            ("Mia was a red ", ". Mia lived near the river."),
            about,
            seed=0,
            hole=Hole((1, 3)),
            max_denoising_steps=STEPS,
        )
        response = quick_client.completions.create(
            model="nano",
            prompt="Mia was a red ",
            suffix=". Mia lived near the river.",
            seed=0,
            max_tokens=3,
            stream=stream,
            stop=[],
            echo=False,
            extra_body={"instruction": about, "max_denoising_steps": STEPS},
        )
        text = (
            "".join(chunk.choices[0].text for chunk in response if chunk.choices)
            if stream
            else response.choices[0].text
        )
        assert text == own.fills[0].text

    @pytest.mark.parametrize("stream", [False, True])
    def test_suffix_as_editors_send_it(self, quick_client, stream):
        """An empty prompt, a stop, and a generous limit, which bounds the search but is no length."""
        asked = dict(
            model="nano",
            prompt="",
            suffix=" lived near the river.",
            seed=0,
            max_tokens=512,
            stop=["near", "\n"],
            stream=stream,
            frequency_penalty=0.5,
            extra_body={"max_denoising_steps": STEPS},
        )
        found = quick_client.completions.create(
            **asked, **({"stream_options": {"include_usage": True}} if stream else {})
        )
        if stream:
            chunks = list(found)
            text, usage = (
                "".join(chunk.choices[0].text for chunk in chunks if chunk.choices),
                chunks[-1].usage,
            )
            warnings = chunks[0].warnings
        else:
            text, usage, warnings = found.choices[0].text, found.usage, found.warnings
        assert "near" not in text
        assert usage.denoising_steps <= 8 * STEPS
        assert "frequency_penalty: has no effect beside a suffix." in warnings

    def test_suffix_under_a_constraint(self, quick_client):
        response = quick_client.completions.create(
            model="nano",
            prompt="Anna is ",
            suffix=" years old.",
            seed=0,
            max_tokens=4,
            extra_body={"regex": "[1-9][0-9]", "min_tokens": 1, "max_denoising_steps": STEPS},
        )
        assert re.fullmatch("[1-9][0-9]", response.choices[0].text)


class TestDecisions:
    def test_as_decide(self, server, nano_pair):
        questions = [
            {"question": "Which is larger?", "labels": ["12", "30"]},
            {"scale": [1, 3]},
            {},
        ]
        asked = [
            Question.choice(["12", "30"], "Which is larger?"),
            Question.scale(1, 3),
            Question.yes_no(),
        ]
        with pytest.warns():
            own = decide(*nano_pair, chat_ids(nano_pair[1], ADD), asked, reads=2, seed=3)
        response = httpx.post(
            f"{server}/v1/decisions",
            json={"model": "nano", "messages": ADD, "questions": questions, "reads": 2, "seed": 3},
            timeout=100,
        ).json()
        assert [found["label"] for found in response["decisions"]] == [
            decision.label for decision in own
        ]
        for found, decision in zip(response["decisions"], own):
            assert found["probabilities"] == pytest.approx(decision.probabilities, abs=1e-4)
            assert found["value"] == (
                decision.value
                if decision.value is None
                else pytest.approx(decision.value, abs=1e-4)
            )
        assert response["warnings"]


class TestDrafts:
    def test_official_clients_pass_over_them(self, nano_chat):
        chunks = list(
            nano_chat(
                STORY, stream=True, stream_options={"include_usage": True, "include_drafts": True}
            )
        )
        plain = list(nano_chat(STORY, stream=True))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == "".join(
            chunk.choices[0].delta.content or "" for chunk in plain if chunk.choices
        )
        frames = [chunk.diffusion for chunk in chunks if getattr(chunk, "diffusion", None)]
        assert len(frames) == chunks[-1].usage.denoising_steps
        assert all(not chunk.choices for chunk in chunks if getattr(chunk, "diffusion", None))
        committed = [frame for frame in frames if frame["reason"]]
        assert "".join("".join(frame["pieces"]) for frame in committed) == text
        assert not any(getattr(chunk, "diffusion", None) for chunk in plain)


HALF = "a\ud800b"


def called(arguments):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


REFUSED = [
    ({"model": "gpt-4"}, 404, "nano"),
    ({"messages": []}, 400, "messages"),
    ({"messages": "hello"}, 400, "messages"),
    ({"messages": [{"role": "king", "content": "x"}]}, 400, "role"),
    ({"messages": [{"role": "user"}]}, 400, "content"),
    ({"n": 0}, 400, "n"),
    ({"n": 1.5}, 400, "n"),
    ({"temperature": -1}, 400, "temperature"),
    ({"temperature": "hot"}, 400, "temperature"),
    ({"top_p": 0}, 400, "top_p"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"seed": "x"}, 400, "seed"),
    ({"stream": "yes"}, 400, "stream"),
    ({"stop": [""]}, 400, "stop"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
    ({"top_logprobs": 2}, 400, "logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs"),
    ({"functions": [{"name": "f"}]}, 400, "tools"),
    ({"tool_choice": "required"}, 400, "tool_choice"),
    ({"tools": [WEATHER, WEATHER]}, 400, "same name"),
    (
        {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "no"}}},
        400,
        "no",
    ),
    (
        {
            "tools": [
                {"type": "function", "function": {"name": "f", "parameters": {"type": "strange"}}}
            ]
        },
        400,
        "f",
    ),
    ({"tools": [WEATHER], "response_format": {"type": "json_object"}}, 400, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": "required", "max_tokens": 2}, 400, "max_tokens"),
    ({"response_format": {"type": "json_schema"}}, 400, "json_schema"),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "wrong"}},
            }
        },
        400,
        "schema",
    ),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"uniqueItems": True}},
            }
        },
        400,
        "uniqueItems",
    ),
    ({"response_format": {"type": "json_object"}, "regex": "a"}, 400, "regex"),
    ({"regex": "("}, 400, "("),
    (
        {"response_format": {"type": "json_object"}, "reasoning_effort": "high"},
        400,
        "reasoning_effort",
    ),
    ({"preset": "magic"}, 400, "preset"),
    ({"chat_template_kwargs": {"tools": []}}, 400, "tools"),
    (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "/etc/passwd"}}],
                }
            ]
        },
        400,
        "data URL",
    ),
    (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": "http://localhost/x.png"}}
                    ],
                }
            ]
        },
        400,
        "URL",
    ),
    ({"messages": [{"role": "user", "content": "word " * 9000}]}, 400, "context"),
    ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "y"}]}, 400, "'y'"),
    *(
        ({"chat_template_kwargs": {name: 1}}, 400, name)
        for name in (
            "return_assistant_tokens_mask",
            "self",
            "tokenizer_kwargs",
            "conversation",
            "bos_token",
            "raise_exception",
            "style",
        )
    ),
    *(
        ({"chat_template_kwargs": {"enable_thinking": value}}, 400, "enable_thinking")
        for value in ("false", 1, 0, [])
    ),
    *(
        (body, 400, next(iter(body)))
        for body in (
            {"messages": [{"role": "user", "content": HALF}]},
            {"messages": [{"role": "system", "content": HALF}, *ADD]},
            {"messages": [{"role": "user", "content": [{"type": "text", "text": HALF}]}]},
            {"stop": [HALF]},
            {"stop": HALF},
            {"regex": HALF},
            {"choices": [HALF]},
            {"model": HALF},
            {"tools": [{"type": "function", "function": {"name": "f", "description": HALF}}]},
            {"tools": [{"type": "function", "function": {"name": HALF}}]},
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {
                            "name": "f",
                            "parameters": {"type": "object", "properties": {HALF: {}}},
                        },
                    }
                ]
            },
            {
                "messages": [
                    *ADD,
                    called("{}"),
                    {"role": "tool", "tool_call_id": "1", "content": HALF},
                ]
            },
        )
    ),
    *(
        ({"tools": [TIME], "tool_choice": choice, **more}, 400, next(iter(more)))
        for choice in ("required", {"type": "function", "function": {"name": "time"}})
        for more in ({"stop": "x"}, {"stop": ["x"]}, {"logprobs": True})
    ),
    ({"parallel_tool_calls": 1}, 400, "parallel_tool_calls"),
    ({"top_k": -2}, 400, "top_k"),
    *(
        ({name: 2**31}, 400, name)
        for name in (
            "top_k",
            "stability_threshold",
            "max_denoising_steps",
            "plateau",
            "image_tokens",
        )
    ),
    ({"max_tokens": -2}, 400, "max_tokens"),
    ({"max_completion_tokens": 0}, 400, "max_completion_tokens"),
    ({"max_tokens": -1, "max_completion_tokens": 5}, 400, "max_completion_tokens"),
    ({HALF: 1}, 400, "half a character"),
]


class TestRefusals:
    @pytest.mark.parametrize(
        ("body", "status", "named"), REFUSED, ids=[json.dumps(body)[:50] for body, _, _ in REFUSED]
    )
    def test_what_cannot_be_honoured_is_named(self, server, body, status, named):
        content = json.dumps(
            {"model": "nano", "messages": ADD, **body}
        )  # as ASCII: httpx itself would not send half a character
        response = httpx.post(
            f"{server}/v1/chat/completions", content=content, headers=JSON, timeout=100
        )
        assert response.status_code == status, response.text
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert named in error["message"]

    @pytest.mark.parametrize(
        ("body", "param", "message"),
        [
            (
                {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
                "messages.0.content.0",
                "has the field 'text'",
            ),
            (
                {"messages": [{"role": "user", "content": [{"text": "x"}]}]},
                "messages.0.content.0.type",
                "required",
            ),
            ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "valid string"),
            (
                {"tool_choice": "any", "tools": [TIME]},
                "tool_choice",
                "'none', 'auto' or 'required'",
            ),
            (
                {"tool_choice": {"type": "function"}, "tools": [TIME]},
                "tool_choice.function",
                "required",
            ),
            ({"stop": ["a", ""]}, "stop.1", "at least 1 character"),
            ({"stop": ""}, "stop", "at least 1 character"),
            (
                {"tools": [{"type": "function", "function": {"name": "a b"}}]},
                "tools.0.function.name",
                "pattern",
            ),
            (
                {"chat_template_kwargs": {"enable_thinking": 1}},
                "chat_template_kwargs",
                "true or false",
            ),
            ({"prompt": ["a", "b"]}, "prompt", "one request for each"),
            ({"prompt": [[1], [2]]}, "prompt", "one request for each"),
            ({"prompt": [1, "a"]}, "prompt.1", "integer"),
            ({"prompt": [[1, "a"]]}, "prompt", "integer"),
            ({"prompt": [""]}, "prompt", "at least 1 character"),
            ({"prompt": []}, "prompt", "at least 1 item"),
            ({"prompt": 5}, "prompt", "valid string"),
        ],
    )
    def test_the_field_is_named(self, server, body, param, message):
        own = ("completions", {}) if "prompt" in body else ("chat/completions", {"messages": ADD})
        error = httpx.post(
            f"{server}/v1/{own[0]}", json={"model": "nano", **own[1], **body}, timeout=100
        ).json()["error"]
        assert error["param"] == param
        assert message in error["message"]
        assert "[" not in error["message"].partition("pattern")[0]

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"{",
            b'{"model": "nano"}',
            b"[]",
            b"null",
            b"5",
            b'"x"',
            b'{"model": "\xff"}',
            b"\x00",
            b"[" * 100_000,
            b'{"model": "nano", "messages": NaN}',
        ],
    )
    @pytest.mark.parametrize("route", ["chat/completions", "completions", "decisions"])
    def test_bodies_that_are_none(self, server, route, body):
        response = httpx.post(
            f"{server}/v1/{route}",
            content=body,
            headers={"Content-Type": "application/json"},
            timeout=100,
        )
        assert response.status_code == 400
        assert response.json()["error"]["message"]

    @pytest.mark.parametrize(
        ("content", "headers"),
        [
            (b'{"model": "nano"}', {}),
            (b'{"model": "nano"}', {"Content-Type": "text/plain"}),
            (b"[]", JSON),
            (b"", JSON),
            (b"5", JSON),
        ],
    )
    def test_a_body_that_is_no_object_hears_how_to_send_one(self, server, content, headers):
        response = httpx.post(
            f"{server}/v1/chat/completions", content=content, headers=headers, timeout=100
        )
        assert response.status_code == 400
        assert "Content-Type: application/json" in response.json()["error"]["message"]

    @pytest.mark.parametrize("told", [True, False])
    def test_a_body_that_is_too_large(self, server, told):
        body = b"x" * 100_000_000
        try:
            response = httpx.post(
                f"{server}/v1/chat/completions",
                content=body if told else iter([body[:700_000]] * 4),
                headers={"Content-Type": "application/json"},
                timeout=100,
            )
        except httpx.TransportError:  # the rest of it was not read
            assert told
        else:
            assert response.status_code == 413
            assert "1,000,000" in response.json()["error"]["message"]
        assert httpx.get(f"{server}/health").json()["status"] == "ok"

    def test_routes(self, server):
        for method, path, status in (
            ("GET", "/nothing", 404),
            ("GET", "/v1/chat/completions", 405),
            ("POST", "/v1/models", 405),
        ):
            response = httpx.request(method, server + path)
            assert response.status_code == status
            assert path in response.json()["error"]["message"]

    @pytest.mark.parametrize(
        ("body", "named"),
        [
            ({"suffix": "b", "n": 2}, "n"),
            ({"suffix": "b", "logprobs": 1}, "logprobs"),
            ({"instruction": "x"}, "suffix"),
            ({"prompt": ""}, "prompt"),
            ({"prompt": [10**9]}, "ids"),
            ({"prompt": ["a", "b"]}, "prompt"),
            ({"echo": True, "logprobs": 0}, "logprobs"),
            ({"echo": True, "logprobs": 2}, "logprobs"),
            ({"suffix": "b", "logprobs": 0}, "logprobs"),
            ({"suffix": "b", "echo": True}, "echo"),
            ({"suffix": "b", "canvas_length": 0}, "canvas_length"),
            (
                {"suffix": "b", "stream": True, "stream_options": {"include_drafts": True}},
                "include_drafts",
            ),
            ({"prompt": HALF}, "prompt"),
            ({"suffix": HALF}, "suffix"),
            ({"suffix": "b", "instruction": HALF}, "instruction"),
            ({"suffix": "b", "max_tokens": 2, "min_tokens": 5}, "min_tokens"),
            ({"suffix": "b", "regex": "x{99}"}, "constraint"),
        ],
    )
    def test_completions(self, server, body, named):
        content = json.dumps({"model": "nano", "prompt": "a", **body})
        response = httpx.post(
            f"{server}/v1/completions", content=content, headers=JSON, timeout=100
        )
        assert response.status_code == 400, response.text
        assert named in response.json()["error"]["message"]

    @pytest.mark.parametrize(
        ("body", "named"),
        [
            ({"questions": [{"question": HALF}]}, "questions"),
            ({"questions": []}, "questions"),
            ({"questions": [{"labels": ["a"]}]}, "label"),
            ({"questions": [{"labels": ["a", "a"]}]}, "'a'"),
            ({"questions": [{"labels": ["a", "b"], "scale": [1, 2]}]}, "scale"),
            ({"questions": [{"scale": [5, 1]}]}, "5"),
            ({"questions": [{}], "reads": 0}, "reads"),
        ],
    )
    def test_decisions(self, server, body, named):
        content = json.dumps({"model": "nano", "messages": ADD, **body})
        response = httpx.post(f"{server}/v1/decisions", content=content, headers=JSON, timeout=100)
        assert response.status_code == 400, response.text
        assert named in response.json()["error"]["message"]


class TestVariables:
    @pytest.mark.parametrize(
        "template",
        ["{{ messages }}{% if style %}{{ bos_token }}{% endif %}", "{% generation %}", {"a": "b"}],
    )
    def test_those_that_a_template_reads(self, template):
        tokenizer = Mock(
            chat_template=template, _chat_template=None, special_tokens_map={"bos_token": "<bos>"}
        )
        check_variables(tokenizer, ["style"])
        for name in ("messages", "self", "bos_token"):
            with pytest.raises(UserError, match=name):
                check_variables(tokenizer, [name])

    def test_others_are_told(self):
        tokenizer = Mock(chat_template="{{ style }}", _chat_template=None, special_tokens_map={})
        with pytest.raises(UserError, match="'size', only enable_thinking, style"):
            check_variables(tokenizer, ["style", "size"])


class TestService:
    def test_health_and_metrics(self, server, nano_chat):
        nano_chat()
        health = httpx.get(f"{server}/health").json()
        assert (health["status"], health["model"]) == ("ok", "nano")
        text = httpx.get(f"{server}/metrics").text
        figures = dict(
            line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")
        )
        assert (
            float(figures['diffgemma_requests_total{route="/v1/chat/completions",status="200"}'])
            >= 1
        )
        assert float(figures["diffgemma_completion_tokens_total"]) >= 3
        assert float(figures["diffgemma_prefix_bytes"]) > 0

    def test_the_page_is_whole(self, server):
        page = httpx.get(server)
        assert page.status_code == 200
        assert "default-src 'none'" in page.headers["content-security-policy"]
        for path in re.findall(r'(?:src|href)="([^"]+)"', page.text):
            assert httpx.get(f"{server}/{path}").status_code == 200, path

    @pytest.mark.parametrize("stream", [True, False])
    def test_who_hangs_up_frees_the_row(self, quick_server, stream):
        def rows():
            return httpx.get(f"{quick_server}/health").json()["rows"]

        # An answer that would take half a minute.
        long = {"regex": "[a-z]{1000}", "max_tokens": 1100, "max_denoising_steps": FULL}
        asked = {"model": "nano", "messages": STORY, "stream": stream, **long}
        body = json.dumps(asked).encode()
        url = httpx.URL(quick_server)
        head = (
            "POST /v1/chat/completions HTTP/1.1",
            f"Host: {url.host}",
            f"Content-Length: {len(body)}",
            "Content-Type: application/json",
        )
        with socket.create_connection((url.host, url.port), timeout=100) as connection:
            connection.sendall("\r\n".join([*head, "", ""]).encode() + body)
            if stream:
                assert connection.recv(1000)  # the answer has begun
            until(lambda: rows() == 1)
        until(lambda: rows() == 0, seconds=10)

    def test_names_of_this_machine_only(self, server):
        for name in ("evil.example", "evil.example:80", "localhost.evil.example", "[::2]", ""):
            answer = httpx.get(f"{server}/health", headers={"Host": name})
            assert answer.status_code == 400
            assert "--allowed-host" in answer.json()["error"]["message"]
        port = server.rsplit(":", 1)[1]
        for name in (f"localhost:{port}", "LocalHost", "127.0.0.1", f"[::1]:{port}"):
            assert httpx.get(f"{server}/health", headers={"Host": name}).status_code == 200

    @pytest.mark.parametrize("path", ["/", "/health", "/v1/models"])
    def test_head(self, server, path):
        answer = httpx.head(server + path)
        assert (answer.status_code, answer.content) == (200, b"")

    def test_no_other_origins(self, server):
        answer = httpx.options(
            f"{server}/v1/chat/completions",
            headers={"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"},
        )
        assert "access-control-allow-origin" not in answer.headers

    def test_the_document_knows_every_field(self, server):
        document = httpx.get(f"{server}/openapi.json").json()
        assert set(ChatRequest.model_fields) == set(
            document["components"]["schemas"]["ChatRequest"]["properties"]
        )
        operations = [
            own["operationId"] for path in document["paths"].values() for own in path.values()
        ]
        assert len(set(operations)) == len(operations)


def test_keys_origins_limits_and_a_full_queue():
    options = [
        "--model",
        nano.VISION,
        "--alias",
        "nano",
        "--api-key",
        "secret",
        "--allowed-origin",
        "http://app.example",
        "--max-prompt-tokens",
        "30",
        "--max-batch",
        "1",
        "--max-queue",
        "1",
        "--grace",
        "60",
        "--preset",
        "fast",
        "--allowed-host",
        "host.docker.internal",
        "--max-body",
        "3000",
        "--allow-image-files",
    ]
    with serving(*options) as (url, process):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0, timeout=100)
        for key in ("wrong", "secret2", "secre"):
            assert (
                httpx.get(
                    f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"}
                ).status_code
                == 401
            )
        for told in ("bearer secret", "BEARER  secret"):
            assert httpx.get(f"{url}/v1/models", headers={"Authorization": told}).status_code == 200
        assert (
            httpx.get(f"{url}/v1/models", headers={"Authorization": "Basic secret"}).status_code
            == 401
        )
        assert httpx.get(f"{url}/v1/models").json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(url).status_code == 200
        answered = client.chat.completions.create(model="nano", messages=ADD, max_tokens=1)
        assert answered.usage.completion_tokens == 1
        allowed = httpx.options(
            f"{url}/v1/models",
            headers={
                "Origin": "http://app.example",
                "Access-Control-Request-Method": "GET",
                "Access-Control-Request-Headers": "authorization,x-stainless-lang",
            },
        )
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "http://app.example"
        asked = httpx.get(
            f"{url}/health",
            headers={"Origin": "http://app.example", "Host": "Host.Docker.Internal:80"},
        )
        assert (asked.status_code, asked.headers["access-control-expose-headers"]) == (
            200,
            "Retry-After",
        )
        assert httpx.get(f"{url}/health", headers={"Host": "localhost"}).status_code == 200
        assert httpx.get(f"{url}/health", headers={"Host": "evil.example"}).status_code == 400
        with pytest.raises(openai.BadRequestError, match="30"):
            client.chat.completions.create(
                model="nano", messages=[{"role": "user", "content": "word " * 40}]
            )
        with pytest.raises(openai.APIStatusError, match="3,000") as large:
            client.chat.completions.create(
                model="nano", messages=[{"role": "user", "content": "a" * 4000}]
            )
        assert large.value.status_code == 413
        picture = {"type": "image_url", "image_url": {"url": "/no/such/picture.png"}}
        with pytest.raises(openai.BadRequestError, match="take at least 35 tokens"):
            client.chat.completions.create(
                model="nano", messages=[{"role": "user", "content": [picture]}]
            )
        long = {
            "model": "nano",
            "messages": ADD,
            "max_tokens": 1100,
            "extra_body": {"regex": "[a-z]{1000}"},
            "stream": True,
        }
        streams = [client.chat.completions.create(**long) for _ in range(1)]
        until(lambda: httpx.get(f"{url}/health").json()["rows"] == 1)
        streams.append(client.chat.completions.create(**long))
        with pytest.raises(openai.RateLimitError) as refused:
            client.chat.completions.create(**long)
        assert int(refused.value.response.headers["retry-after"]) >= 1
        # Told to stop, the server takes no more.  Told again, it gives up what runs, and says so
        # to everybody.
        process.send_signal(signal.SIGTERM)
        until(lambda: httpx.get(f"{url}/health").json()["status"] == "closing")
        assert httpx.get(f"{url}/health").status_code == 503
        with pytest.raises(openai.InternalServerError, match="shutting down") as closed:
            client.chat.completions.create(model="nano", messages=ADD)
        assert (closed.value.status_code, closed.value.code) == (503, "shutting_down")
        process.send_signal(signal.SIGTERM)
        for stream in streams:
            with pytest.raises(openai.APIError, match="shutting down"):
                list(stream)
        assert process.wait(60) == 0


def test_an_address_that_is_taken(capfd):
    from mlx_diffgemma.cli import main

    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["mlx-diffgemma", "serve", "--port", str(taken.getsockname()[1])])
        with pytest.raises(SystemExit) as left:
            main()
    assert left.value.code == 2
    assert "cannot listen" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--api-key", ""], "empty"),
        (["--api-key", " k"], "blanks"),
        (["--api-key", "k\n"], "blanks"),
        (["--allowed-host", "http://mac.local"], "mac.local"),
        (["--allowed-host", "mac.local:80"], "mac.local:80"),
        (["--allowed-host", ""], "''"),
    ],
)
def test_refused_at_the_start(capfd, options, said):
    from mlx_diffgemma.cli import main

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["mlx-diffgemma", "serve", "--port", "0", *options])
        with pytest.raises(SystemExit) as left:
            main()
    assert left.value.code == 2
    assert said in capfd.readouterr().err


@pytest.mark.parametrize(
    ("names", "status"), [(["*"], 200), ([], 200), (["MAC.local"], 200), (["localhost"], 400)]
)
def test_names_that_were_allowed(names, status):
    client = TestClient(create_app(Mock(), Settings("nano", allowed_hosts=names)))
    assert client.get("/", headers={"Host": "mac.local:80"}).status_code == status


def test_names_by_address():
    """None for any."""
    assert host_names(["localhost"], "127.0.0.2", []) == ["localhost"]
    assert host_names(["localhost"], "::1", ["mac.local"]) == ["localhost", "mac.local"]
    assert host_names(["localhost"], "0.0.0.0", []) == []
    assert host_names(["localhost"], "0.0.0.0", ["mac.local"]) == ["localhost", "mac.local"]


@pytest.mark.slow
def test_eight_at_once_answer_as_alone(client):
    """More than a hundred requests of mixed lengths; at most one may differ, at a rounding tie."""
    asked = [
        dict(messages=[{"role": "user", "content": text}], seed=seed, max_tokens=limit)
        for seed in range(4)
        for text, limit in (
            *[
                (f"Add {a} and {b}." + " Please." * (7 * (a % 3)), 64)
                for a, b in ((12, 30), (7, 5), (44, 13), (81, 9))
            ],
            *[
                (f"Tell me a story about {name}.", 150)
                for name in ("Leo the owl", "Mia the fox", "Dora the deer")
            ],
            *[
                (f"Sort these numbers: {numbers}", 100)
                for numbers in ("42 17 91", "5 3 8 1", "77 6")
            ],
            *[
                (f"Turn this into JSON: {text}", 64)
                for text in ("Anna is 31 years old.", "Ben lives in Rome.")
            ],
            *[
                (f"Say {word}." * repeats, 40)
                for word, repeats in (("yes", 1), ("no", 60), ("maybe", 200))
            ],
        )
    ]
    assert len(asked) >= 60

    def one(own):
        few = {
            "max_denoising_steps": 6
        }  # of a canvas: what would tip at a rounding tie does so at any step
        return (
            client.chat.completions.create(model="nano", extra_body=few, **own)
            .choices[0]
            .message.content
        )

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(one, [*asked, *asked]))
    alone = [one(own) for own in asked]
    assert len(together) >= 100
    assert sum(a != b for a, b in zip(together, [*alone, *alone])) <= 1
