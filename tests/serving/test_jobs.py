import json

import jsonschema
import mlx.core as mx
import pytest
from starlette.testclient import TestClient

from mlx_diffgemma import load
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.serving.app import Settings, create_app
from mlx_diffgemma.serving.engine import Engine
from mlx_diffgemma.serving.jobs import Functions, Stops
from mlx_diffgemma.session import CanvasStep
from mlx_diffgemma.tokenizer import TOOL_END, TOOL_START

CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 5}}, "required": ["city"],
        "additionalProperties": False}


class TestStops:
    @pytest.mark.parametrize(("pieces", "shown"), [
        (["one two", " three"], ["one two", " three"]), (["one STOP two"], ["one "]), (["one ST", "OP two"], ["one ", ""]),
        (["one ST", "AR"], ["one ", "STAR"]), (["one S"], ["one S"]), (["a", "b", "END", "c"], ["a", "b", "", ""]),
        (["one STOP", "and more"], ["one ", ""]), (["STENDOP"], ["ST"])])
    def test_up_to_the_first(self, pieces, shown):
        stops = Stops(["STOP", "END"])
        found = [stops.feed(piece, last=place == len(pieces) - 1) for place, piece in enumerate(pieces)]
        assert found == shown
        assert stops.found == ("STOP" in "".join(pieces) or "END" in "".join(pieces))

    def test_none(self):
        assert Stops(()).feed("text", last=False) == "text"


class TestFunctions:
    def test_what_fits(self):
        functions = Functions({"weather": CITY, "time": None})
        assert functions.fits({"name": "weather", "arguments": {"city": "Rome"}})
        assert functions.fits({"name": "time", "arguments": {}})
        for name, arguments in (("weather", {}), ("weather", {"city": 5}), ("weather", "Rome"), ("time", {"a": 1}), ("other", {})):
            assert not functions.fits({"name": name, "arguments": arguments})

    @pytest.mark.parametrize("schema", [{"type": "array"}, {"properties": 5}, {"type": "objct"}])
    def test_what_is_no_schema_of_an_object(self, schema):
        with pytest.raises(UserError, match="'f'"):
            Functions({"f": schema})


@pytest.fixture(scope="module")
def served():
    """(client of an application with nano, its engine, a function that commits given texts in place of the next canvases)."""
    engine = Engine(lambda: load("nano"))
    engine.start()
    real = engine._loop._record

    def script(*texts):
        left = list(texts)

        def record(session, row, outcome, flags, belief):
            if not left:
                return real(session, row, outcome, flags, belief)
            text = engine.tokenizer.encode(left.pop(0), add_special_tokens=False)
            ids = [*text, engine.model.config.generation.eos_token_ids[0]]
            argmax = mx.array(ids + [0] * (session.length - len(ids)), dtype=mx.int32)
            session.read(True, 0.0, len(ids) - 1)
            return CanvasStep(session.canvas_index, 0, 0, 1, argmax, argmax, outcome.accepted[row], outcome.entropy[row],
                              outcome.logprob[row], 0.0, "converged")

        engine._loop._record = record

    yield TestClient(create_app(engine, Settings("nano"))), engine, script
    engine.close()


def asked(client, **more):
    tools = [{"type": "function", "function": {"name": "weather", "parameters": CITY}}]
    return client.post("/v1/chat/completions", json={
        "model": "nano", "messages": [{"role": "user", "content": "How is it in Rome?"}], "tools": tools, "max_tokens": 40, **more})


class TestCalls:
    def test_one_that_fits_is_passed_on(self, served):
        client, _, script = served
        script(f'Let me see.{TOOL_START}call:weather{{"city": "Rome"}}{TOOL_END}')
        choice = asked(client).json()["choices"][0]
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] == "Let me see."
        assert [json.loads(call["function"]["arguments"]) for call in choice["message"]["tool_calls"]] == [{"city": "Rome"}]

    @pytest.mark.parametrize("call", ['call:weather{"city": 5}', 'call:weather{"city": "Rome"', "call:wether{}", "weather in Rome"])
    @pytest.mark.parametrize("stream", [False, True])
    def test_one_that_does_not_is_made_again(self, served, call, stream):
        client, _, script = served
        script(f"Let me see.{TOOL_START}{call}{TOOL_END}")
        response = asked(client, stream=stream, max_denoising_steps=2)
        if stream:
            chunks = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
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
