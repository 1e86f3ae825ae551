import json
from types import SimpleNamespace

import jsonschema
import mlx.core as mx
import pytest
from starlette.testclient import TestClient

from mlx_diffgemma.decoding.records import CanvasStep
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.serving.app import create_app
from mlx_diffgemma.serving.engine import Engine
from mlx_diffgemma.serving.jobs.functions import Functions
from mlx_diffgemma.serving.jobs.stops import Stops
from mlx_diffgemma.serving.settings import Settings
from mlx_diffgemma.text.calls import TOOL_END, TOOL_START

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 5}},
    "required": ["city"],
    "additionalProperties": False,
}


TOOLS = [
    {"type": "function", "function": own}
    for own in ({"name": "weather", "parameters": CITY}, {"name": "time"})
]


class TestStops:
    @pytest.mark.parametrize(
        ("pieces", "shown"),
        [
            (["one two", " three"], ["one two", " three"]),
            (["one STOP two"], ["one "]),
            (["one ST", "OP two"], ["one ", ""]),
            (["one ST", "AR"], ["one ", "STAR"]),
            (["one S"], ["one S"]),
            (["a", "b", "END", "c"], ["a", "b", "", ""]),
            (["one STOP", "and more"], ["one ", ""]),
            (["STENDOP"], ["ST"]),
            (["one END two STOP"], ["one "]),
        ],
    )
    def test_up_to_the_first(self, pieces, shown):
        stops = Stops(["STOP", "END"])
        found = [
            stops.feed(piece, last=place == len(pieces) - 1) for place, piece in enumerate(pieces)
        ]
        assert found == shown
        assert stops.found == ("STOP" in "".join(pieces) or "END" in "".join(pieces))

    def test_none(self):
        assert Stops(()).feed("text", last=False) == "text"


class TestFunctions:
    def test_what_fits(self):
        functions = Functions({"weather": CITY, "time": None})
        assert functions.fits({"name": "weather", "arguments": {"city": "Rome"}})
        assert functions.fits({"name": "time", "arguments": {}})
        for name, arguments in (
            ("weather", {}),
            ("weather", {"city": 5}),
            ("weather", "Rome"),
            ("time", {"a": 1}),
            ("other", {}),
        ):
            assert not functions.fits({"name": name, "arguments": arguments})

    def test_an_answer_in_tokens_that_know_no_calls_has_none_to_make_again(self):
        tokenizer = SimpleNamespace(
            get_vocab=dict, eos_token_ids={1}, decode=lambda ids, **_: "a" * len(ids)
        )
        assert Functions({"weather": CITY}).broken([5, 6, 1], tokenizer) == []

    @pytest.mark.parametrize("schema", [{"type": "array"}, {"properties": 5}, {"type": "objct"}])
    def test_what_is_no_schema_of_an_object(self, schema):
        with pytest.raises(UserError, match="'f'"):
            Functions({"f": schema})


@pytest.fixture(scope="module")
def served(knowing_pair):
    """(client of an application with a quick model, its engine, a function that commits given texts in place
    of the next canvases: cut to their length, or ended).
    """
    engine = Engine(lambda: knowing_pair)
    engine.start()
    real = engine.scheduler._loop.record

    def script(*texts):
        left = list(texts)

        def record(session, row, outcome, flags, belief):
            if not left:
                return real(session, row, outcome, flags, belief)
            ids = engine.tokenizer.encode(left.pop(0), add_special_tokens=False)[
                : session.canvas.length
            ]
            size = len(ids)
            ids += [engine.model.config.generation.eos_token_ids[0]] * (
                session.canvas.length - size
            )
            argmax = mx.array(ids, dtype=mx.int32)
            session.observe(True, 0.0, size)
            return CanvasStep(
                session.canvas_index,
                0,
                0,
                1,
                argmax,
                argmax,
                outcome.accepted[row],
                outcome.entropy[row],
                outcome.logprob[row],
                0.0,
                "converged",
            )

        engine.scheduler._loop.record = record

    yield TestClient(create_app(engine, Settings("nano"))), engine, script
    engine.close()


def asked(client, **more):
    tools = [{"type": "function", "function": {"name": "weather", "parameters": CITY}}]
    return client.post(
        "/v1/chat/completions",
        json={
            "model": "nano",
            "messages": [{"role": "user", "content": "How is it in Rome?"}],
            "tools": tools,
            "max_tokens": 40,
            **more,
        },
    )


class TestCalls:
    def test_one_that_fits_is_passed_on(self, served):
        client, _, script = served
        script(f'Let me see.{TOOL_START}call:weather{{"city": "Rome"}}{TOOL_END}')
        choice = asked(client).json()["choices"][0]
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] == "Let me see."
        assert [
            json.loads(call["function"]["arguments"]) for call in choice["message"]["tool_calls"]
        ] == [{"city": "Rome"}]

    @pytest.mark.parametrize(
        "call",
        [
            'call:weather{"city": 5}',
            'call:weather{"city": "Rome"',
            "call:wether{}",
            "weather in Rome",
        ],
    )
    @pytest.mark.parametrize("stream", [False, True])
    def test_one_that_does_not_is_made_again(self, served, call, stream):
        client, _, script = served
        script(f"Let me see.{TOOL_START}{call}{TOOL_END}")
        response = asked(client, stream=stream, max_denoising_steps=2)
        if stream:
            chunks = [
                json.loads(line[6:])
                for line in response.text.splitlines()
                if line.startswith("data: {")
            ]
            choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
            calls = [found for choice in choices for found in choice["delta"].get("tool_calls", ())]
            reasons = [choice["finish_reason"] for choice in choices]
            assert reasons == [None] * (len(reasons) - 1) + ["tool_calls"]
        else:
            choice = response.json()["choices"][0]
            calls = choice["message"]["tool_calls"]
            assert choice["finish_reason"] == "tool_calls"
        assert [found["function"]["name"] for found in calls] == ["weather"]
        jsonschema.validate(json.loads(calls[0]["function"]["arguments"]), CITY)

    def test_no_tools_no_calls_again(self, served):
        client, _, script = served
        script(f"Hm.{TOOL_START}call:strange{TOOL_END}")
        response = asked(client, tools=None)
        assert response.json()["choices"][0]["message"]["content"] == "Hm."
        assert response.json()["warnings"]

    def test_it_is_made_again_behind_what_stood_before_it_under_its_own_function(self, served):
        client, engine, script = served
        script(
            f'Two.{TOOL_START}call:time{{}}{TOOL_END}{TOOL_START}call:weather{{"city": 5}}{TOOL_END}'
        )
        asked_of, submit, most = [], engine.submit, engine.max_queue

        def noted(job, again=False):
            asked_of.append(job.choices[0].request)
            submit(job, again)
            engine.max_queue = 0  # what is made again belongs to a request that had its place

        engine.submit = noted
        try:
            response = asked(client, tools=TOOLS, max_denoising_steps=2).json()
        finally:
            engine.submit, engine.max_queue = submit, most
        calls = response["choices"][0]["message"]["tool_calls"]
        assert [call["function"]["name"] for call in calls] == ["time", "weather"]
        assert response["choices"][0]["finish_reason"] == "tool_calls"
        first, second = asked_of
        behind = engine.tokenizer.decode(second.ids[len(first.ids) :])
        assert second.ids[: len(first.ids)] == first.ids
        assert behind.startswith("Two.")
        assert behind.endswith(TOOL_START)
        assert behind.count(TOOL_START) == 2
        assert "parsed" not in str(response.get("warnings"))
        counted = len(first.responses[0].tokens) + len(second.responses[0].tokens)
        assert response["usage"]["completion_tokens"] == counted, "both count"
        assert response["usage"]["denoising_steps"] == sum(
            part.steps for own in asked_of for part in own.responses
        )

    def test_each_of_several(self, served):
        client, _, script = served
        script(
            "".join(f'{TOOL_START}call:weather{{"city": {number}}}{TOOL_END}' for number in (5, 6))
        )
        choice = asked(client, max_denoising_steps=2).json()["choices"][0]
        assert len(choice["message"]["tool_calls"]) == 2

    def test_where_no_call_fits_the_rest_is_the_answer(self, served):
        """Nothing of what the first answer took is left out of what the second may have."""
        client, _, script = served
        script(f'Let me see.{TOOL_START}call:weather{{"city": 5}}{TOOL_END}')
        response = asked(client, max_tokens=28, max_denoising_steps=2).json()
        assert response["choices"][0]["finish_reason"] == "tool_calls"
        long = {**CITY, "properties": {"city": {"type": "string", "minLength": 400}}}
        tools = [{"type": "function", "function": {"name": "weather", "parameters": long}}]
        script(f'Let me see.{TOOL_START}call:weather{{"city": 5}}{TOOL_END}')
        response = asked(client, tools=tools, max_tokens=28).json()
        assert response["choices"][0]["finish_reason"] == "stop"
        assert response["choices"][0]["message"]["content"] == "Let me see."
        assert "could not be made again" in response["warnings"][0]

    def test_only_one_where_only_one_is_wanted(self, served):
        client, _, script = served
        both = "".join(
            f'{TOOL_START}call:weather{{"city": "{city}"}}{TOOL_END}' for city in ("Rome", "Oslo")
        )
        for wanted, names in (
            (False, ["Rome"]),
            (True, ["Rome", "Oslo"]),
            (None, ["Rome", "Oslo"]),
        ):
            script(both)
            choice = asked(client, parallel_tool_calls=wanted, max_tokens=60).json()["choices"][0]
            found = [
                json.loads(call["function"]["arguments"])["city"]
                for call in choice["message"]["tool_calls"]
            ]
            assert (found, choice["finish_reason"]) == (names, "tool_calls")
        script(both.split(TOOL_END)[0] + TOOL_END + " word" * 80, both)  # on canvases of their own
        response = asked(client, parallel_tool_calls=False, max_tokens=120).json()
        assert len(response["choices"][0]["message"]["tool_calls"]) == 1
        assert response["usage"]["completion_tokens"] <= 64, "nothing more was written"
        script()
        script(both.replace('"Rome"', "5").replace('"Oslo"', "6"))
        again = asked(client, parallel_tool_calls=False, max_denoising_steps=2).json()["choices"][
            0
        ]["message"]["tool_calls"]
        assert len(again) == 1


def test_a_stop_ends_the_answer(served):
    client, _, script = served
    script("one two STOP" + " word" * 80)
    body = {
        "model": "nano",
        "messages": [{"role": "user", "content": "Say one."}],
        "stop": ["STOP"],
        "max_tokens": 200,
    }
    response = client.post("/v1/chat/completions", json=body).json()
    choice = response["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("one two ", "stop")
    assert response["usage"]["completion_tokens"] <= 64, "nothing more was written"


class TestLogprobs:
    def test_they_come_with_their_text(self, served):
        """What may be the begin of a stop is held back over the border of a canvas, and its tokens
        with it.
        """
        client, engine, script = served
        canvas = "word " * 80
        first = engine.tokenizer.decode(
            engine.tokenizer.encode(canvas, add_special_tokens=False)[:64]
        )
        assert first.endswith("word")
        for behind, rest in ((" STOP here", None), (" goes on", "word goes on")):
            script(canvas, behind)
            body = {
                "model": "nano",
                "messages": [{"role": "user", "content": "Say word."}],
                "stop": "word STOP",
                "logprobs": True,
            }
            response = client.post(
                "/v1/chat/completions", json={**body, "stream": True, "max_tokens": 100}
            )
            chunks = [
                json.loads(line[6:])
                for line in response.text.splitlines()
                if line.startswith("data: {")
            ]
            told, text = [""], ""
            for choice in (chunk["choices"][0] for chunk in chunks):
                text += choice["delta"].get("content", "")
                told += [own["token"] for own in (choice["logprobs"] or {"content": ()})["content"]]
                assert text.startswith("".join(told[:-1])), "a stop may have cut the last one"
                assert text.startswith("".join(told)) or rest is None
            assert text == first.removesuffix("word") + (rest or "")
            assert "".join(told).startswith(text)


def test_a_hole_that_did_not_converge_is_told_of(served):
    client, engine, _ = served
    hole = {
        "model": "nano",
        "prompt": "Mia was a red ",
        "suffix": ". Mia lived near the river.",
        "seed": 1,
        "min_tokens": 6,
        "max_tokens": 6,
        "max_denoising_steps": 1,
    }
    assert "did not converge" in client.post("/v1/completions", json=hole).json()["warnings"][0]
    # The server's own limit is for answers, not for holes.
    limited = TestClient(
        create_app(engine, Settings("nano", {"max_tokens": 2, "max_denoising_steps": 1}))
    )
    found = limited.post(
        "/v1/completions", json={**hole, "max_tokens": None, "max_denoising_steps": None}
    ).json()
    assert 6 <= found["usage"]["completion_tokens"] <= 16


def test_a_stream_has_an_empty_chunk_only_for_who_asked(served):
    client, _, script = served
    body = {
        "model": "nano",
        "messages": [{"role": "user", "content": "Add 12 and 30."}],
        "stream": True,
        "max_denoising_steps": 1,
        "max_tokens": 100,
    }
    for options, empty in ((None, 0), ({"include_usage": True}, 1)):
        script("猫 " * 80)
        text = client.post("/v1/chat/completions", json={**body, "stream_options": options}).text
        chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        assert sum(not chunk["choices"] for chunk in chunks) == empty
        (end,) = [
            chunk for chunk in chunks if chunk["choices"] and chunk["choices"][0]["finish_reason"]
        ]
        assert isinstance(end["seed"], int)
        assert "猫" in chunks[0]["choices"][0]["delta"]["content"]
        assert "did not converge" in end["warnings"][0]
        assert text.isascii()


def test_what_waits_to_be_prepared_counts(served, monkeypatch):
    client, engine, _ = served
    monkeypatch.setattr(
        "mlx_diffgemma.serving.jobs.answer.chat_ids", None
    )  # the work of preparing is not even begun
    full = engine.max_queue
    engine.max_queue = 0
    try:
        assert asked(client).status_code == 429
    finally:
        engine.max_queue = full
