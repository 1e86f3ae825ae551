"""What bodies are taken for, without a model."""

import json
from unittest.mock import Mock

import pytest
from pydantic import ValidationError
from starlette.testclient import TestClient

from mlx_diffgemma.generation.length_search import QUICK, next_lengths
from mlx_diffgemma.generation.options import GenerationOptions
from mlx_diffgemma.serving.app import create_app
from mlx_diffgemma.serving.protocols.fields import STRICT
from mlx_diffgemma.serving.protocols.messages import Message
from mlx_diffgemma.serving.protocols.openai_chat import ChatRequest
from mlx_diffgemma.serving.protocols.openai_completions import CompletionRequest
from mlx_diffgemma.serving.settings import Settings

ADD = [{"role": "user", "content": "Add 12 and 30."}]


def client(**settings):
    """Of an application without an engine."""
    engine = Mock()
    engine.model.config = Mock(canvas_length=64, vision=None)
    engine.model.config.text.max_position_embeddings = 8192
    return TestClient(create_app(engine, Settings(**{"model": "nano", **settings})))


def chat(**fields):
    return ChatRequest.model_validate({"model": "nano", "messages": ADD, **fields})


@pytest.fixture
def strict():
    token = STRICT.set(True)
    yield
    STRICT.reset(token)


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
# What SDKs send back of an answer, field by field, and the message it means.
WRITTEN = {
    "openai parse()": (
        {
            "role": "assistant",
            "content": "42",
            "refusal": None,
            "annotations": None,
            "audio": None,
            "function_call": None,
            "tool_calls": None,
            "parsed": {"sum": 42},
        },
        {"role": "assistant", "content": "42"},
    ),
    "openai parsed call": (
        {
            "role": "assistant",
            "content": None,
            "parsed": None,
            "tool_calls": [
                {**CALL, "index": 0, "function": {**CALL["function"], "parsed_arguments": {"a": 1}}}
            ],
        },
        {"role": "assistant", "tool_calls": [CALL]},
    ),
    "litellm": (
        {
            "role": "assistant",
            "content": "42",
            "tool_calls": None,
            "function_call": None,
            "provider_specific_fields": {"refusal": None},
            "reasoning_content": "hm",
            "thinking_blocks": [{"type": "thinking", "thinking": "hm", "signature": "x"}],
            "images": [],
        },
        {"role": "assistant", "content": "42", "reasoning_content": "hm"},
    ),
    "responses": (
        {
            "type": "message",
            "id": "msg_1",
            "status": "completed",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "42", "annotations": [], "logprobs": None}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "42"}]},
    ),
    "responses input": (
        {
            "role": "user",
            "content": [
                {"type": "input_text", "text": "x"},
                {"type": "input_image", "image_url": "data:,", "detail": "auto"},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "x"},
                {"type": "image_url", "image_url": {"url": "data:,", "detail": "auto"}},
            ],
        },
    ),
    "thinking parts": (
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "x"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "reasoning", "text": "x"},
                {
                    "type": "text",
                    "text": "42",
                    "cache_control": {"type": "ephemeral"},
                    "citations": None,
                },
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "42"}]},
    ),
    "a refusal": (
        {"role": "assistant", "content": None, "refusal": "No."},
        {"role": "assistant", "content": "No."},
    ),
    "a refusal part": (
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        {"role": "assistant", "content": [{"type": "text", "text": "No."}]},
    ),
    "audio": (
        {
            "role": "assistant",
            "content": "42",
            "audio": {"id": "a"},
            "annotations": [{"type": "url_citation"}],
        },
        {"role": "assistant", "content": "42"},
    ),
    "a tool without a word": (
        {"role": "tool", "tool_call_id": "1", "content": None, "artifact": None, "name": "f"},
        {"role": "tool", "tool_call_id": "1", "content": ""},
    ),
    "cached": (
        {"role": "user", "content": "x", "cache_control": {"type": "ephemeral"}, "metadata": {}},
        {"role": "user", "content": "x"},
    ),
    "arguments as an object": (
        {
            "role": "assistant",
            "tool_calls": [{**CALL, "function": {"name": "f", "arguments": {"a": 1}}}],
        },
        {"role": "assistant", "tool_calls": [CALL]},
    ),
    "no arguments": (
        {
            "role": "assistant",
            "tool_calls": [{**CALL, "function": {"name": "f", "arguments": None}}],
        },
        {"role": "assistant", "tool_calls": [{**CALL, "function": {"name": "f", "arguments": ""}}]},
    ),
    "parts that are texts": (
        {"role": "user", "content": ["a", "b"]},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ),
    "an image as a text": (
        {"role": "user", "content": [{"type": "image_url", "image_url": "data:,"}]},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]},
    ),
}


class TestHistory:
    @pytest.mark.parametrize(("sent", "meant"), WRITTEN.values(), ids=list(WRITTEN))
    def test_what_sdks_write_back(self, sent, meant):
        body = chat(messages=[*ADD, sent])
        thoughts = {"reasoning_content", "reasoning"}  # which the chat template keeps or drops
        assert body.messages[1].model_dump(exclude=thoughts) == Message.model_validate(
            meant
        ).model_dump(exclude=thoughts)
        assert body.notes == []

    @pytest.mark.usefixtures("strict")
    def test_strictly_it_is_refused(self):
        for name in ("openai parse()", "litellm", "responses", "thinking parts", "cached"):
            with pytest.raises(ValidationError):
                Message.model_validate(WRITTEN[name][0])

    def test_parts_that_nobody_reads_are_refused(self):
        for kind in ("input_audio", "file", "video_url", "tool_use"):
            with pytest.raises(ValidationError):
                chat(messages=[{"role": "user", "content": [{"type": kind, kind: {}}]}])


NOTHING = [
    {"repeat_penalty": 1.0},
    {"enable_thinking": False},
    {"guided_json": None},
    {"guided_regex": None},
    {"skip_special_tokens": True},
    {"cache_prompt": True},
    {"keep_alive": "5m"},
    {"usage": {"include": True}},
    {"verbosity": "medium"},
    {"typical_p": 1.0},
    {"mirostat": 0},
    {"ignore_eos": False},
    {"length_penalty": 1.0},
    {"parallel_tool_calls": None},
    {"function_call": "auto"},
    {"prediction": None},
    {"service_tier": "auto"},
]


class TestOptions:
    @pytest.mark.parametrize("fields", NOTHING, ids=json.dumps)
    def test_what_changes_nothing_is_taken_without_a_word(self, fields):
        assert chat(**fields).notes == []
        assert GenerationOptions.from_keywords(chat(**fields).options()) == GenerationOptions()

    @pytest.mark.parametrize(
        ("fields", "named"),
        [
            ({"verbosity": "high"}, "verbosity"),
            ({"mirostat": 2}, "mirostat"),
            ({"mirostat": False}, "mirostat"),
            ({"use_beam_search": 0}, "use_beam_search"),
            ({"colour": "red"}, "colour"),
            ({"best_of": 3}, "best_of"),
            ({"skip_special_tokens": False}, "skip_special_tokens"),
            ({"prediction": {"type": "content"}}, "prediction"),
            ({"web_search_options": {}}, "web_search_options"),
            ({"stream": True, "stream_options": {"colour": 1}}, "colour"),
            ({"tools": [{"type": "function", "function": {"name": "f", "colour": 1}}]}, "colour"),
        ],
    )
    def test_the_rest_is_told(self, fields, named):
        notes = chat(**fields).notes
        assert [note.partition(":")[0] for note in notes] == [named]

    @pytest.mark.usefixtures("strict")
    @pytest.mark.parametrize(
        "fields",
        [
            {"verbosity": "high"},
            {"colour": None},
            {"best_of": 3},
            {"max_tokens": "16"},
            {"max_tokens": 16.0},
            {"enable_thinking": False},
        ],
    )
    def test_strictly_it_is_refused(self, fields):
        with pytest.raises(ValidationError):
            chat(**fields)

    def test_what_has_another_meaning_stays_refused(self):
        for fields in ({"functions": [{"name": "f"}]}, {"audio": {"voice": "x"}}):
            with pytest.raises(ValidationError, match="not supported"):
                chat(**fields)

    def test_every_field_may_be_null(self):
        names = [name for name in ChatRequest.model_fields if name not in ("model", "messages")]
        body = chat(
            **dict.fromkeys(
                [*names, *ChatRequest.NEUTRAL, *ChatRequest.REFUSED, *ChatRequest.RENAMED, "colour"]
            )
        )
        assert (body, body.notes) == (chat(), [])
        tool = {
            "type": "function",
            "function": {"name": "f", "description": None, "parameters": None, "strict": None},
        }
        assert (
            chat(tools=[tool], tool_choice=None).tools
            == chat(tools=[{"type": "function", "function": {"name": "f"}}]).tools
        )

    def test_null_in_a_schema_is_a_value(self):
        schema = {"type": "object", "properties": {"a": {"const": None}}}
        body = chat(tools=[{"type": "function", "function": {"name": "f", "parameters": schema}}])
        assert body.functions["f"].parameters == schema

    @pytest.mark.parametrize(("sent", "meant"), [("16", 16), (16.0, 16), ("16.0", 16), (16, 16)])
    @pytest.mark.parametrize(
        "name",
        [
            "max_tokens",
            "max_completion_tokens",
            "top_k",
            "seed",
            "max_denoising_steps",
            "canvas_length",
        ],
    )
    def test_numbers_as_texts(self, name, sent, meant):
        field = "max_tokens" if name == "max_completion_tokens" else name
        assert chat(**{name: sent}).options()[field] == meant

    @pytest.mark.parametrize("wrong", ["sixteen", "16.5", 16.5, True, [16], {}])
    @pytest.mark.parametrize("name", ["max_tokens", "top_k", "seed", "n"])
    def test_what_is_no_number_is_refused(self, name, wrong):
        with pytest.raises(ValidationError):
            chat(**{name: wrong})

    def test_names_of_other_servers(self):
        assert chat(guided_regex="a+").constraints == {"regex": "a+"}
        assert chat(guided_choice=["a"]).constraints == {"choices": ["a"]}
        assert chat(guided_json={"type": "null"}).constraints == {"json_schema": {"type": "null"}}
        assert chat(enable_thinking=True).thinks
        with pytest.raises(ValidationError, match="send one of them"):
            chat(guided_regex="a", regex="b")

    def test_a_completion_s_too(self):
        body = CompletionRequest.model_validate(
            {"model": "nano", "prompt": "a", "suffix": None, "logprobs": None, "colour": 1}
        )
        assert body.notes == ["colour: not known here; it was ignored."]


class TestFillingIn:
    def test_penalties_are_noted(self):
        given = {
            "model": "nano",
            "prompt": "a",
            "suffix": "b",
            "frequency_penalty": 0.5,
            "presence_penalty": 0,
            "logit_bias": {},
        }
        assert CompletionRequest.model_validate(given).notes == [
            "frequency_penalty: has no effect beside a suffix."
        ]

    def test_lengths_that_an_editor_waits_for(self):
        """The short ones first, then beside the best, eight in all, and none that begins too late."""
        lengths, scores = list(range(1, 65)), dict[int, float]()
        first = next_lengths(lengths, scores, QUICK)
        assert first == [1, 4, 16, 64]
        scores |= {length: -abs(length - 6) for length in first}
        assert next_lengths(lengths, scores, QUICK, seconds=QUICK.seconds + 0.1) == []
        then = next_lengths(lengths, scores, QUICK)
        assert set(then) < set(range(2, 16))
        scores |= {length: -abs(length - 6) for length in then}
        assert len(scores) == QUICK.most
        assert next_lengths(lengths, scores, QUICK) == []


class TestStrict:
    @pytest.mark.parametrize(
        ("body", "param", "message"),
        [
            ({"best": 1}, "best", "'best' is not known"),
            ({"best_of": 2}, "best_of", "best_of"),
            (
                {
                    "messages": [
                        {
                            "role": "user",
                            "content": [{"type": "text", "text": "x", "colour": "red"}],
                        }
                    ]
                },
                "messages.0.content.0.colour",
                "'colour' is not known",
            ),
            (
                {"messages": [{"role": "user", "content": [{"type": "text", "image": "x"}]}]},
                "messages.0.content.0.image",
                "not known",
            ),
        ],
    )
    def test_the_field_is_named(self, body, param, message):
        response = client(strict=True).post(
            "/v1/chat/completions", json={"model": "nano", "messages": ADD, **body}
        )
        assert response.status_code == 400
        assert response.json()["error"]["param"] == param
        assert message in response.json()["error"]["message"]


class TestNames:
    @pytest.mark.parametrize(
        ("name", "settings", "status"),
        [
            ("Org/Model", {}, 200),
            ("model", {}, 200),
            ("MODEL:latest", {}, 200),
            ("default", {}, 200),
            ("other", {}, 404),
            ("model:7b", {}, 404),
            ("gpt-4o", {"aliases": ["gpt-4o"]}, 200),
            ("GPT-4o:latest", {"aliases": ["gpt-4o"]}, 200),
            ("gpt-5", {"aliases": ["gpt-4o"]}, 404),
            ("gpt-5", {"any_model": True}, 200),
        ],
    )
    def test_forgiven(self, name, settings, status):
        assert client(model="Org/Model", **settings).get(f"/v1/models/{name}").status_code == status

    def test_aliases_are_listed(self):
        listed = client(aliases=["gpt-4o"]).get("/v1/models").json()
        assert [model["id"] for model in listed["data"]] == ["nano", "gpt-4o"]
