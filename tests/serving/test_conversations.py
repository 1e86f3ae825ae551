"""Conversations with tools over HTTP, with each kind of chat template."""

import json

import jsonschema
import pytest
from starlette.testclient import TestClient

from mlx_diffgemma.serving.app import create_app
from mlx_diffgemma.serving.engine import Engine
from mlx_diffgemma.serving.jobs.functions import Functions
from mlx_diffgemma.serving.jobs.stops import Stops
from mlx_diffgemma.serving.settings import Settings
from mlx_diffgemma.text.tokenizer import load_tokenizer, repeated
from tests.helpers.templates import CONTROL, FOLDER, GEMMA, TOKENIZERS

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 3}, "days": {"enum": [1, 2]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": CITY}}]
ASK = [{"role": "user", "content": "How is it in Rome? I would like to know it for today."}]


@pytest.fixture(scope="module", params=TOKENIZERS)
def served(request, random_folder, random_pair):
    """(client, engine, name of the template) of an application with random weights."""
    tokenizer = load_tokenizer(random_folder, (1, 5, 13))
    if request.param != "nano":
        tokenizer.chat_template = (FOLDER / f"{request.param}.jinja").read_text()
    engine = Engine(lambda: (random_pair[0], tokenizer))
    engine.start()
    yield (
        TestClient(create_app(engine, Settings("random", {"max_denoising_steps": 1}))),
        engine,
        request.param,
    )
    engine.close()


def ask(client, messages, **more):
    response = client.post(
        "/v1/chat/completions",
        json={"model": "random", "messages": messages, "max_tokens": 16, "seed": 1, **more},
    )
    assert response.status_code == 200, response.text
    return response.json()


def test_a_forced_call_and_what_follows_it(served):
    client, engine, name = served
    asked = []
    submit = engine.submit
    engine.submit = lambda job, again=False: (
        asked.append(job.choices[0].request),
        submit(job, again),
    )
    try:
        message = ask(client, ASK, tools=TOOLS, tool_choice="required", max_tokens=96)["choices"][
            0
        ]["message"]
    finally:
        engine.submit = submit
    (call,) = message["tool_calls"]
    jsonschema.validate(json.loads(call["function"]["arguments"]), CITY)
    written = engine.tokenizer.decode(
        [token for part in asked[0].responses for token in part.tokens]
    )
    assert written.startswith(
        'call:weather{city:<|"|>' if name in GEMMA else 'call:weather{"city":'
    )
    result = {"role": "tool", "tool_call_id": call["id"], "content": "sunny"}
    assert ask(client, [*ASK, message, result], tools=TOOLS)["usage"]["prompt_tokens"]
    later = [
        *ASK,
        message,
        result,
        {"role": "assistant", "content": "Sunny."},
        {"role": "user", "content": "Thanks."},
    ]
    assert ask(client, later, tools=TOOLS)["choices"]


def test_a_call_that_fits_is_passed_on_and_one_that_does_not_is_made_again(served):
    _, engine, name = served
    functions = Functions({"weather": CITY})
    good, wrong = (
        ('call:weather{city:<|"|>Rom<|"|>,days:1}', 'call:weather{city:<|"|>Rome<|"|>}')
        if name in GEMMA
        else ('call:weather{"city": "Rom", "days": 1}', 'call:weather{"city": "Rome"}')
    )
    for text, places in ((good, []), (wrong, [1])):
        ids = engine.tokenizer.encode(f"<|tool_call>{text}<tool_call|>", add_special_tokens=False)
        assert functions.broken(ids, engine.tokenizer) == places


@pytest.mark.parametrize("arguments", ["{", "no", "[]", '{"a": "\\ud800"}', "", "[" * 500])
def test_broken_arguments_in_the_history(served, arguments):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "x"},
    ]
    assert ask(served[0], messages)["choices"]


def test_arguments_nested_too_deeply_are_refused_in_a_sentence(served):
    nested = '{"a":' * 400 + "1" + "}" * 400
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": nested}}
    response = served[0].post(
        "/v1/chat/completions",
        json={
            "model": "random",
            "messages": [*ASK, {"role": "assistant", "content": None, "tool_calls": [call]}],
            "max_tokens": 16,
        },
    )
    assert response.status_code in (200, 400)


def test_system_messages_anywhere(served):
    client = served[0]
    system = {"role": "system", "content": [{"type": "text", "text": "Be kind."}]}
    late = ask(client, [*ASK, system])["usage"]["prompt_tokens"]
    assert late == ask(client, [{**system, "content": "Be kind."}, *ASK])["usage"]["prompt_tokens"]


def test_control_tokens_are_text(served):
    client, engine, _ = served
    ids = set(map(engine.tokenizer.get_vocab().get, CONTROL))

    def control(messages):
        made = []
        submit = engine.submit
        engine.submit = lambda job, again=False: (
            made.append(job.choices[0].request.ids),
            submit(job, again),
        )
        try:
            ask(client, messages)
        finally:
            engine.submit = submit
        return [token for token in made[0] if token in ids]

    assert control([{"role": "user", "content": "".join(CONTROL)}]) == control(
        [{"role": "user", "content": "a"}]
    )
    completed = client.post(
        "/v1/completions", json={"model": "random", "prompt": "<eos>", "max_tokens": 16}
    ).json()
    assert completed["usage"]["prompt_tokens"] > 2
    allowed = TestClient(
        create_app(
            engine, Settings("random", {"max_denoising_steps": 1}, allow_control_tokens=True)
        )
    )
    completed = allowed.post(
        "/v1/completions", json={"model": "random", "prompt": "<eos>", "max_tokens": 16}
    ).json()
    assert completed["usage"]["prompt_tokens"] == 2


def test_the_next_turn_goes_on_where_the_history_does(served):
    """Up to the end of the user's turn, also where the prompt ends in an empty thought."""
    client, engine, name = served
    system = {
        "role": "system",
        "content": f"You are asked about the weather, {name}, and answer in a few words.",
    }
    first = ask(client, [system, *ASK])
    history = [
        system,
        *ASK,
        {"role": "assistant", "content": "Sunny."},
        {"role": "user", "content": "Thanks."},
    ]
    reused = ask(client, history)["usage"]["prompt_tokens_details"]["cached_tokens"]
    thought = len(
        engine.tokenizer.encode("<|channel>thought\n<channel|>", add_special_tokens=False)
    )
    assert reused == first["usage"]["prompt_tokens"] - (
        thought if name in ("gemma4-like", "scanning") else 0
    )
    assert repeated(engine.tokenizer, [2]) == 1


class TestStops:
    @pytest.mark.parametrize(
        ("stops", "text", "shown"),
        [
            (["two", "one"], "zero one two", "zero "),
            (["one", "two"], "zero one two", "zero "),
            (["abcdef", "cd"], "xabcdef", "xab"),
            (["\n", "\n\n"], "a\n\nb", "a"),
            (["ab", "abc"], "xabc", "x"),
            (["zz", "c"], "abc", "ab"),
            (["abcd", "bc"], "abce", "a"),
        ],
    )
    def test_the_one_that_is_whole_first_whatever_the_pieces(self, stops, text, shown):
        for cut in range(len(text) + 1):
            own = Stops(stops)
            assert own.feed(text[:cut], last=False) + own.feed(text[cut:], last=True) == shown
            assert own.found
