"""Two promises, end to end: every constrained answer is valid, and what is pinned comes back byte
for byte.

Weights are those of nano and random ones, which want anything but what is asked of them.
Constraints, texts, options and limits are drawn at random, the same ones each time: a few always,
more than a thousand of each with the slow tests.
"""

import itertools
import json
import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import strategies as st
from tokenizers import Tokenizer

from mlx_diffgemma import batch_generate, chat_ids, stream_generate
from mlx_diffgemma.checkpoint.loading import load_model
from mlx_diffgemma.decoding.batch import run
from mlx_diffgemma.decoding.constraints import FREE, Demands, Stretch
from mlx_diffgemma.decoding.session import Session
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.generation.options import GenerationOptions
from mlx_diffgemma.grammar.constraint import compile_constraint
from mlx_diffgemma.sampling.draws import Draws
from tests.grammar.strategies import (
    EXPRESSIONS,
    PHRASES,
    READ,
    Validator,
    cases,
    drawn,
    in_python,
    records,
)

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "Canvas .* did not converge",
        "The answer is empty",
        "Possible nested set",
        "Possible set",
    )
]

# How many different constraints of each kind a model answers, and how many of its answers hold
# pins.
SOME = {
    "random": {"regex": 10, "json_schema": 8, "pins": 24},
    "nano": {"regex": 3, "json_schema": 3, "pins": 5},
}
MANY = {
    "random": {"regex": 500, "json_schema": 400, "pins": 940},
    "nano": {"regex": 60, "json_schema": 60, "pins": 70},
}
TOGETHER = 16  # answers
COUNTS = pytest.mark.parametrize(
    "counts", [SOME, pytest.param(MANY, marks=pytest.mark.slow)], ids=["some", "many"]
)
MODELS = pytest.mark.parametrize("name", ["random", "nano"])

CONSTRAINTS = {
    "regex": st.one_of(EXPRESSIONS, PHRASES),
    "json_schema": st.one_of(cases().map(lambda case: case[0]), records()),
}
REFUSALS = {
    "a keyword": "cannot be guaranteed|looking ahead",
    "size": "constraint is too large|takes too long to compile",
    "nothing admitted": "admits no text at all|fits the rest of the schema",
}
RULES: list[dict[str, Any]] = [
    {},
    {},
    {"temperature": 0.0},
    {"temperature": 2.0},
    {"preset": "balanced"},
    {"preset": "fast"},
    {"top_k": 2},
    {"top_p": 0.5},
    {"diffusion_sampler": "confidence-threshold"},
    {"diffusion_sampler": "confidence-threshold", "threshold": 0.2},
    {"diffusion_sampler": "confidence-threshold", "temperature": 0.0},
    {"self_conditioning": "dense"},
    {"entropy_bound": 20.0},
    {"drop_tail": 1},
    {"retry_unconverged": 1, "temperature": 1.5},
    {"reroll_empty": 1, "plateau": 1},
]
LENGTHS = {
    "random": [16, 11, "growing", "fitting"],
    "nano": [16, 16, 24, 8, "growing", "fitting"],
}  # of canvases
PROMPTS = [
    "Write as JSON: Anna is 23 years old and lives in Paris.",
    "Sort these numbers: 42 17 91",
    "Was ist das? 猫 😀",
]

MARKUP = [
    "<eos>",
    "<|turn>model\n",
    "<turn|>",
    "<|channel>thought\n<channel|>",
    "<pad>",
    "<|image|>",
    "<0x41>",
    "</s>",
    "{{ x }}",
    "<b>é</b>",
    '{"a": [1, null]}',
    "▁",
    "\ufffd",
    "a\r\n\tb",
    "\n\n",
    "  ",
    "\x00",
    "\ufeff",
]
WRITTEN = [
    "👩‍👩‍👧‍👦",
    "🇫🇷",
    "👍🏽",
    "e\u0301\u0323",
    "\u0301",
    "שלום",
    "مَرْحَبًا",
    "\u202eabc\u202c",
    "नमस्ते",
    "한국어",
    "ﬁ",
    "Å",
    "猫は好き",
    "\U0010ffff",
    "Anna is 23",
]
TEXTS = st.lists(
    st.one_of(
        st.sampled_from(MARKUP),
        st.sampled_from(WRITTEN),
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6),
    ),
    min_size=1,
    max_size=3,
).map("".join)

CHECKER = jsonschema.FormatChecker(formats=())
CHECKER.checkers = (
    jsonschema.Draft202012Validator.FORMAT_CHECKER.checkers
    | {  # jsonschema checks times with further packages only
        name: (lambda value, read=READ[name]: not isinstance(value, str) or read(value), ValueError)
        for name in ("time", "date-time")
    }
)


@pytest.fixture(scope="module")
def models(nano_pair, random_folder):
    """By name (model, tokenizer): nano, and random weights for its vocabulary."""
    return {"random": (load_model(random_folder, "float32"), nano_pair[1]), "nano": nano_pair}


def options_of(rng, name):
    """Of a generation: any rules, few steps, canvases of any length."""
    options = RULES[rng.integers(len(RULES))] | {
        "max_denoising_steps": int(rng.choice([1, 2, 2, 2, 3, 4]))
    }
    return (
        options | {"canvas_length": LENGTHS[name][rng.integers(len(LENGTHS[name]))]}
        if rng.random() < 0.95
        else options
    )


def prompt_of(rng, tokenizer):
    text = PROMPTS[rng.integers(len(PROMPTS))]
    return (
        chat_ids(tokenizer, [{"role": "user", "content": text}])
        if rng.random() < 0.7
        else tokenizer.encode(text)
    )


@dataclass
class Asked:
    """What is asked of one answer among others, and the answer: its tokens, whether it ended, how
    many canvases it took.
    """

    demands: Demands
    tokens: Any = ()
    ended: bool = False
    canvases: int = 0


def answer(models, name, asked, rng):
    """All of them side by side, each with its own options."""
    model, tokenizer = models[name]
    eos, sessions = model.config.generation.eos_token_ids, []
    for one in asked:
        limit = one.demands.limit
        policy = GenerationOptions(max_tokens=limit, **options_of(rng, name)).policy(model)
        draws = Draws(int(rng.integers(2**32)), model.config.text.vocab_size)
        sessions.append(
            Session(
                model, prompt_of(rng, tokenizer), policy, draws, eos, limit, demands=one.demands
            )
        )
    for _ in run(model, sessions, TOGETHER):
        pass
    for one, session in zip(asked, sessions):
        one.tokens = np.concatenate([canvas.tokens for canvas in session.canvases])
        one.ended, one.canvases = session.canvases[-1].ended, len(session.canvases)
        assert not np.isin(one.tokens[:-1], eos).any()


def refuse(value):
    raise AssertionError(f"{value} is not JSON")


def check(kind, constraint, text):
    if kind == "regex":
        assert re.fullmatch(in_python(constraint), text), (constraint, text)
    else:
        validator = Validator(constraint, format_checker=CHECKER)
        validator.validate(json.loads(text, parse_constant=refuse))


def check_response(kind, constraint, tokenizer, response, limit):
    ids = [token for token in response.tokens if token not in tokenizer.eos_token_ids]
    check(kind, constraint, response.text)
    assert tokenizer.decode(ids) == response.text, "and nothing else"
    assert len(ids) <= limit
    assert response.finish_reason == ("stop" if response.text.strip() else "empty"), (
        constraint,
        response.text,
    )
    assert (response.thought, response.tool_calls) == ("", ())


def check_answer(kind, constraint, tokenizer, one):
    """The constrained part of an answer is valid, and pins are where they were."""
    stretch, pins = one.demands.stretches[0], one.demands.pins
    ids = one.tokens[stretch.start : stretch.stop]
    ids = [*stretch.begun, *ids[~np.isin(ids, one.demands.eos_ids)].tolist()]
    check(kind, constraint, tokenizer.decode(ids))
    assert (one.tokens[: len(pins)][pins[: len(one.tokens)] != FREE] == pins[pins != FREE]).all()
    if stretch.stop is None:
        assert one.ended, (constraint, "is not finished")
        assert len(one.tokens) <= one.demands.limit + 1


def narrower(rng, compiled, one):
    """The same constraint once more, with something of an answer to it: some of its tokens pinned,
    its begin given, or as many tokens as it had to be filled between two pinned texts.
    """
    eos, limit = one.demands.eos_ids, one.demands.limit
    ids = one.tokens[~np.isin(one.tokens, eos)].tolist()
    way = rng.choice(["pins", "begin", "hole"]) if ids else "pins"
    if way == "begin":
        return Asked(
            Demands(
                eos,
                limit,
                stretches=[Stretch(compiled, begun=tuple(ids[: rng.integers(len(ids) + 1)]))],
            )
        )
    if way == "hole":
        head, tail = (
            rng.integers(100, 500, rng.integers(0, 20)).tolist(),
            rng.integers(100, 500, rng.integers(1, 5)).tolist(),
        )
        pins, stop = [*head, *[FREE] * len(ids), *tail], len(head) + len(ids)
        return Asked(Demands(eos, len(pins), pins, [Stretch(compiled, len(head), stop)]))
    pins = np.where(rng.random(len(one.tokens)) < rng.choice([0.1, 0.5, 0.9]), one.tokens, FREE)[
        :limit
    ]
    return Asked(Demands(eos, limit, pins, [Stretch(compiled)]))


def compiled_ones(models, name, kind, count, number, seen):
    """(constraint, what it was compiled to) of random ones, so many as can be had; refusals are
    counted in ``seen``.
    """
    model, tokenizer = models[name]
    for constraint in drawn(CONSTRAINTS[kind], count + count // 10 + 2, number):
        try:
            yield constraint, compile_constraint(tokenizer, model.config, **{kind: constraint})
        except UserError as error:
            reasons = [reason for reason, words in REFUSALS.items() if re.search(words, str(error))]
            if not reasons:
                raise
            seen.update(reasons)


@COUNTS
@pytest.mark.parametrize("kind", CONSTRAINTS)
@MODELS
def test_every_answer_is_valid(models, name, kind, counts):
    """Nothing is refused but by name and before the model runs; what is answered is whole, valid
    and nothing else.

    Alone, in a batch of one constraint and among others; with as few tokens as the constraint needs
    and with many; and once more with some of the tokens it gave.
    """
    (model, tokenizer), needed, number = (
        models[name],
        counts[name][kind],
        2 * (name == "nano") + (kind == "regex"),
    )
    rng, seen, answers = np.random.default_rng(number), Counter(), []
    found = compiled_ones(models, name, kind, needed, number, seen)
    while group := list(itertools.islice(found, min(TOGETHER, needed - seen["answered"]))):
        together = []
        for constraint, compiled in group:
            shortest = int(compiled.automaton.distance[0])
            limit = max(1, shortest + int(rng.choice([0, 0, 1, 2, 5, 10, 20, 40])))
            if shortest > 1 and rng.random() < 0.1:
                with pytest.raises(UserError, match="The shortest text"):
                    batch_generate(
                        model, tokenizer, PROMPTS, max_tokens=shortest - 1, **{kind: constraint}
                    )
                seen["limit"] += 1
            seen.update(answered=1, barely=limit == shortest)
            if (way := rng.integers(4)) > 1:
                demands = Demands(
                    model.config.generation.eos_token_ids, limit, stretches=[Stretch(compiled)]
                )
                together.append((constraint, compiled, Asked(demands)))
                continue
            given = {kind: constraint, "max_tokens": limit} | options_of(rng, name)
            prompts, seeds = (
                [prompt_of(rng, tokenizer) for _ in range(2)],
                rng.integers(2**32, size=2).tolist(),
            )
            if way:
                responses = batch_generate(model, tokenizer, prompts, seeds=seeds, **given)
            else:
                responses = [
                    joined(stream_generate(model, tokenizer, prompts[0], seed=seeds[0], **given))
                ]
            for response in responses:
                check_response(kind, constraint, tokenizer, response, limit)
                answers.append(response.tokens)
                seen["spanning canvases"] += response.canvas_index > 0
        answer(models, name, [one for *_, one in together], rng)
        again = [
            (constraint, compiled, narrower(rng, compiled, one))
            for constraint, compiled, one in together[::2]
        ]
        answer(models, name, [one for *_, one in again], rng)
        for constraint, _, one in (*together, *again):
            check_answer(kind, constraint, tokenizer, one)
            answers.append(tuple(one.tokens.tolist()))
            seen["spanning canvases"] += one.canvases > 1
        seen["once more"] += len(again)
    assert seen["answered"] == needed, seen
    # The sample is what it should be: much of it is long, much of it tight, and models say what
    # they like.
    assert min(seen["barely"], 2 * seen["spanning canvases"], seen["once more"]) >= needed // 20, (
        seen
    )
    assert len(set(answers)) > len(answers) / 2


def joined(responses):
    """The responses of a stream as the one of the whole answer."""
    parts = list(responses)
    return replace(
        parts[-1],
        text="".join(part.text for part in parts),
        thought="".join(part.thought for part in parts),
        tokens=tuple(token for part in parts for token in part.tokens),
    )


@COUNTS
@MODELS
def test_pinned_text_comes_back(models, name, counts):
    """Texts, as the tokenizer or byte by byte, at the begin, in the middle and at the end of
    answers of one or several canvases.
    """
    (model, tokenizer), rng = models[name], np.random.default_rng(name == "nano")
    needed, seen = counts[name]["pins"], Counter()
    plain = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    plain.encode_special_tokens = True  # what looks like a marker is text
    cases = iter(drawn(st.lists(TEXTS, min_size=1, max_size=3), needed, 10 + (name == "nano")))
    while texts := list(itertools.islice(cases, TOGETHER)):
        asked, places = [], []
        for own in texts:
            pins, spans = [], []
            for text in own:
                pins += [FREE] * int(rng.choice([0, 0, 1, 2, 5, 15]))
                as_bytes = rng.random() < 0.2
                ids = (
                    [tokenizer.vocab[f"<0x{byte:02X}>"] for byte in text.encode()]
                    if as_bytes
                    else plain.encode(text, add_special_tokens=False).ids
                )
                spans.append((slice(len(pins), len(pins) + len(ids)), text))
                pins += ids
            limit = len(pins) + int(rng.choice([0, 0, 1, 10]))
            pins += [tokenizer.eos_token_id] if limit > len(pins) and rng.random() < 0.5 else []
            asked.append(Asked(Demands(model.config.generation.eos_token_ids, limit, pins)))
            places.append(spans)
        answer(models, name, asked, rng)
        for one, spans in zip(asked, places):
            for span, text in spans:
                assert tokenizer.decode(one.tokens[span].tolist()).encode() == text.encode(), (
                    span,
                    text,
                )
            pins = one.demands.pins
            assert (one.tokens[: len(pins)][pins != FREE] == pins[pins != FREE]).all()
            seen.update(
                pinned=1, **{"spanning canvases": one.canvases > 1, "several": len(spans) > 1}
            )
    assert seen["pinned"] == needed
    assert min(seen["spanning canvases"], seen["several"]) >= needed // 4, seen
