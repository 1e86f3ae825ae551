"""Whole answers of nano for ``doctor``, through the ordinary loop.

Answers are made in every way that users take, and each is checked.  Every way answers the prompt of
the golden outputs, which has one right answer: the reference's.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_diffgemma import nano
from mlx_diffgemma.decoding.records import CanvasStep
from mlx_diffgemma.diagnostics import golden
from mlx_diffgemma.errors import GenerationWarning
from mlx_diffgemma.generation.generate import batch_generate, generate
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.text.tokenizer import chat_ids, load_tokenizer, user_message

DRAFTER = "nano-drafter"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "city": {"type": "string"},
    },
    "required": ["name", "age", "city"],
    "additionalProperties": False,
}
# This is harder than what nano was trained on: it takes ten steps and is unsure at many positions.
LONG = "Sort these numbers: 42 17 91 5 28 73 64 12"
OTHER = "What is 77 + 12?"
OTHER_ANSWER = "89"
MAX_TOKENS = 64
# In 16 bits, sparse self-conditioning may move the mean entropy of the first steps by this many
# nats.
ENTROPY_BOUND = 0.03


@dataclass(frozen=True)
class Way:
    """The result of one way to answer; ``note`` says what went wrong."""

    name: str
    ok: bool
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class Subject:
    """The inputs of every way: a model, its tokenizer, and the reference's outputs."""

    model: DiffusionGemma
    tokenizer: TokenizerWrapper
    inputs: golden.Golden
    exact: bool  # float32: every step is compared with the reference, not only the text

    @property
    def expected(self) -> str:
        """The reference's answer."""
        ids = self.inputs.original.argmax[-1].tolist()
        ends = self.model.config.generation.eos_token_ids
        stop = next((place for place, token in enumerate(ids) if token in ends), len(ids))
        text: str = self.tokenizer.decode(ids[:stop])
        return text

    def answer(self, **options: Any) -> str:
        return generate(
            self.model,
            self.tokenizer,
            self.inputs.prompt.tolist(),
            seed=golden.SEED,
            max_tokens=MAX_TOKENS,
            **options,
        )


def ways(model: DiffusionGemma, inputs: golden.Golden, dtype: str) -> list[Way]:
    """Run all ways.

    Args:
        model: The model.
        inputs: The golden outputs and their inputs.
        dtype: The dtype of the model; the names of the results end in it.
    """
    tokenizer = load_tokenizer(nano.FOLDER, model.config.generation.eos_token_ids)
    subject = Subject(model, tokenizer, inputs, dtype == "float32")
    return [_taken(f"{name}, {dtype}", way, subject) for name, way in WAYS.items()]


def _taken(name: str, way: Callable[[Subject], Iterator[str]], subject: Subject) -> Way:
    """Run one way.

    Its first complaint becomes the note.  An operation that MLX refuses counts as a complaint.

    Args:
        name: The name of the result.
        way: Yields complaints.
        subject: The inputs of the way.
    """
    began = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GenerationWarning)
            note = next(way(subject), "")
    except (
        RuntimeError,
        ValueError,
        AssertionError,
    ) as error:  # from MLX, or from an assertion of this package
        note = f"{type(error).__name__}: {error}"[:300]
    return Way(name, not note, round(time.perf_counter() - began, 3), note)


def canvases(subject: Subject) -> Iterator[str]:
    """Answer with the defaults: sparse self-conditioning and the default rules."""
    steps = list[CanvasStep]()
    yield from _unlike(subject.answer(on_step=steps.append), subject.expected)
    if not subject.exact:
        return
    for step, argmax in zip(steps, subject.inputs.original.argmax, strict=False):
        if not np.array_equal(np.array(step.argmax), argmax):
            yield f"step {step.step} has other tokens than the reference"


def long_trajectory(subject: Subject) -> Iterator[str]:
    """Compare sparse self-conditioning with dense over many steps."""
    ids = chat_ids(subject.tokenizer, [user_message(LONG)])
    runs = dict[str, list[CanvasStep]]()
    for kind in ("sparse", "dense"):
        runs[kind] = []
        generate(
            subject.model,
            subject.tokenizer,
            ids,
            seed=golden.SEED,
            max_tokens=MAX_TOKENS,
            self_conditioning=kind,
            on_step=runs[kind].append,
        )
    if len(runs["sparse"]) < 4:
        yield f"it ends after {len(runs['sparse'])} steps"
    for sparse, dense in zip(*runs.values(), strict=False):
        if subject.exact and not np.array_equal(np.array(sparse.argmax), np.array(dense.argmax)):
            yield f"sparse and dense self-conditioning differ at step {sparse.step}"
        if sparse.step < 3 and not abs(sparse.mean_entropy - dense.mean_entropy) <= ENTROPY_BOUND:
            yield f"the mean entropy of step {sparse.step} is {sparse.mean_entropy:.4f}, with dense {dense.mean_entropy:.4f}"


def together(subject: Subject) -> Iterator[str]:
    """Answer two prompts in one forward."""
    other = chat_ids(subject.tokenizer, [user_message(OTHER)])
    prompts = [subject.inputs.prompt.tolist(), other]
    answers = batch_generate(
        subject.model, subject.tokenizer, prompts, seed=golden.SEED, max_tokens=MAX_TOKENS
    )
    for answer, expected in zip(answers, (subject.expected, OTHER_ANSWER), strict=True):
        yield from _unlike(answer.text, expected)


def left_to_right(subject: Subject) -> Iterator[str]:
    yield from _unlike(subject.answer(mode="ar"), subject.expected)


def drafted_canvases(subject: Subject) -> Iterator[str]:
    yield from _unlike(subject.answer(draft_model=_drafter(subject)), subject.expected)


def drafted_left_to_right(subject: Subject) -> Iterator[str]:
    yield from _unlike(subject.answer(mode="ar", draft_model=_drafter(subject)), subject.expected)


def constrained(subject: Subject) -> Iterator[str]:
    """Answer under a JSON schema, and under an expression that the prompt does not ask for."""
    answer = subject.answer(json_schema=SCHEMA)
    if json.loads(answer) != json.loads(subject.expected):
        yield f"the answer is {answer!r}, expected {subject.expected!r}"
    ids = chat_ids(subject.tokenizer, [user_message(OTHER)])
    number = generate(
        subject.model,
        subject.tokenizer,
        ids,
        seed=golden.SEED,
        max_tokens=MAX_TOKENS,
        regex="n[0-9]{2}",
    )
    if not (len(number) == 3 and number[0] == "n" and number[1:].isdecimal()):
        yield f"the answer {number!r} does not match the expression n[0-9]{{2}}"


def _unlike(answer: str, expected: str) -> Iterator[str]:
    if answer != expected:
        yield f"the answer is {answer!r}, expected {expected!r}"


def _drafter(subject: Subject) -> Any:
    import drafter  # a package above this one

    return drafter.load_drafter(DRAFTER, subject.model, tokenizer=subject.tokenizer)


WAYS: dict[str, Callable[[Subject], Iterator[str]]] = {
    "canvases": canvases,
    "a long canvas": long_trajectory,
    "prompts together": together,
    "left to right": left_to_right,
    "canvases with a drafter": drafted_canvases,
    "left to right with a drafter": drafted_left_to_right,
    "constraints": constrained,
}
