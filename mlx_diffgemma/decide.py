"""Decisions: yes or no, one of several labels, a score on a scale, read off canvases that nothing is committed of.

The model is not asked to write.  What stands before the answer is pinned at the canvas's begin, behind it is noise, and one first
denoising step tells how probable each next token is.  A label of several tokens is a chain: its first token, then the second with
the first one pinned, and so on, one canvas for each begin that some label has.  The cache of the prompt is only read.

    >>> prompt = chat_ids(tokenizer, [{"role": "user", "content": "Is 12 greater than 30?"}])
    >>> (decision,) = decide(model, tokenizer, prompt, [Question.yes_no()])
    >>> decision.label, decision.probabilities["no"]
    ('no', 0.99)
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_diffgemma.cache import Cache
from mlx_diffgemma.cost import held_bytes
from mlx_diffgemma.device import generation_memory
from mlx_diffgemma.draws import Draws
from mlx_diffgemma.errors import NonFiniteLogitsError, UserError
from mlx_diffgemma.model import DiffusionGemma
from mlx_diffgemma.prompt import Medium, PlacedImage, place, prepare_media
from mlx_diffgemma.prompt_cache import PromptCache
from mlx_diffgemma.request import GenerationWarning, Prompt, check_room, prompt_ids, token_limit
from mlx_diffgemma.session import PREFILL_STEP_SIZE, Session, prefill
from mlx_diffgemma.tokenizer import encode_literally, turn_end

ANSWER, TEXT = "{answer}", "{text}"
PLAIN, ASKED = ANSWER, f"{TEXT}\n{ANSWER}"  # the templates of a question without a text and with one
MAX_STEPS = 101  # of a scale
LENGTH_STEP = 16  # a canvas has a multiple of so many positions
BATCH_ROWS = 1024  # canvas positions that share a forward
LEAST_MASS = 0.01  # of all labels together, below which a warning says so


@dataclass(frozen=True)
class Question:
    """What is to be decided: which of the ``labels``.

    A ``text`` is pinned at the begin of the canvas, so that a prompt is encoded once for many questions; without it the prompt
    itself is the question.  ``template`` tells how the two stand there, with ``{text}`` and ``{answer}``; what it has behind
    ``{answer}`` belongs to every label.  Empty: the label alone, or the text and the label on the next line.  ``values`` are
    what the labels count for in ``Decision.value``.

    Errors: UserError for fewer than two labels, empty or equal ones, and for a template without a place for what it must hold.
    """

    labels: tuple[str, ...]
    text: str = ""
    template: str = ""
    values: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.labels, str) or not all(isinstance(label, str) for label in self.labels):
            raise UserError(f"labels are texts in a list, got {self.labels!r}; give for example ['yes', 'no'].")
        object.__setattr__(self, "labels", tuple(self.labels))
        if len(self.labels) < 2:
            raise UserError(f"There is nothing to decide with {len(self.labels)} label(s); give at least two.")
        if not all(label.strip() for label in self.labels):
            raise UserError("A label is empty; give each at least one character.")
        if twice := next((label for place, label in enumerate(self.labels) if label in self.labels[:place]), None):
            raise UserError(f"The label {twice!r} is given twice; leave one of them out.")
        if self.values and len(self.values) != len(self.labels):
            raise UserError(f"values must have one entry a label: got {len(self.values)} for {len(self.labels)} labels.")
        if self.template and self.template.count(ANSWER) != 1:
            raise UserError(f"The template {self.template!r} must have one place for the answer; write {ANSWER} there.")
        if self.template and (TEXT in self.template) != bool(self.text):
            raise UserError(f"The template {self.template!r} has no place for the question's text; write {TEXT} there." if self.text
                            else f"The template {self.template!r} has a place for a text and the question none; give it a text.")

    @classmethod
    def yes_no(cls, text: str = "", yes: str = "yes", no: str = "no", template: str = "") -> Question:
        """Its value is the probability of ``yes``."""
        return cls((yes, no), text, template, (1.0, 0.0))

    @classmethod
    def scale(cls, low: int, high: int, text: str = "", template: str = "") -> Question:
        """The integers from ``low`` to ``high``; its value is the expected one.  Errors: UserError for none, or too many."""
        if not all(isinstance(end, int) and not isinstance(end, bool) for end in (low, high)):
            raise UserError(f"A scale goes from one integer to another, got {low!r} and {high!r}.")
        if low >= high:
            raise UserError(f"A scale goes upwards, got {low} to {high}; give the lower end first.")
        if high - low >= MAX_STEPS:
            raise UserError(f"The scale from {low} to {high} has {high - low + 1:,} steps, and at most {MAX_STEPS} are possible; "
                            "take a coarser one.")
        steps = range(low, high + 1)
        return cls(tuple(map(str, steps)), text, template, tuple(map(float, steps)))

    @classmethod
    def choice(cls, labels: Iterable[str], text: str = "", template: str = "") -> Question:
        """One of ``labels``; it has no value."""
        return cls(labels if isinstance(labels, str) else tuple(labels), text, template)  # type: ignore[arg-type]

    def written(self, label: str) -> str:
        """What stands at the canvas's begin when the answer is ``label``."""
        before, after = (self.template or (ASKED if self.text else PLAIN)).split(ANSWER)
        return before.replace(TEXT, self.text) + label + after.replace(TEXT, self.text)


@dataclass(frozen=True)
class Decision:
    """How probable each label is.

    ``mass`` is the probability that the model gave to all labels together before they were made to sum to 1, behind what they have
    in common: near 0 it would have written something else.
    """

    question: Question
    probabilities: dict[str, float]
    mass: float

    @property
    def label(self) -> str:
        """The most probable one."""
        return max(self.probabilities, key=lambda label: self.probabilities[label])

    @property
    def value(self) -> float | None:
        """The expected value of a scale, the probability of yes, None for a choice."""
        if not self.question.values:
            return None
        return sum(p * value for p, value in zip(self.probabilities.values(), self.question.values, strict=True))


@dataclass(frozen=True)
class Labels:
    """The ids of a question's labels, as they stand from the canvas's begin on.

    Errors: UserError for ids that are equal, or of which one begins another, as they could not be told apart.
    """

    ids: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if not prefix_free(self.ids):
            raise UserError("Two labels are the same tokens, or one begins the other; give labels that differ.")

    @cached_property
    def common(self) -> int:
        """How many ids all of them begin with.  They make no label more probable than another, and are not read."""
        pairs = zip(min(self.ids), max(self.ids), strict=False)
        return next(known for known, (a, b) in enumerate(pairs) if a != b)

    @cached_property
    def edges(self) -> dict[tuple[int, ...], list[int]]:
        """What may follow on each begin that some label has."""
        found: dict[tuple[int, ...], list[int]] = {}
        for ids in self.ids:
            for known in range(self.common, len(ids)):
                following = found.setdefault(ids[:known], [])
                if ids[known] not in following:
                    following.append(ids[known])
        return found

    @property
    def longest(self) -> int:
        return max(map(len, self.ids))


def decide(
    model: DiffusionGemma,
    tokenizer: TokenizerWrapper,
    prompt: Prompt,
    questions: Sequence[Question],
    *,
    reads: int = 1,
    seed: int = 0,
    canvas_length: int | None = None,
    images: Sequence[Medium] = (),
    image_tokens: int | None = None,
    prompt_cache: PromptCache | None = None,
    batch_rows: int = BATCH_ROWS,
) -> list[Decision]:
    """Decide each of the ``questions`` about ``prompt`` (text, or ids up to where the model's turn begins).

    ``reads`` canvases of noise are averaged, that of read r under ``seed`` + r.  ``canvas_length`` None: as short as the question
    allows, see ``canvas_for``.  ``images`` and ``prompt_cache`` as in ``stream_generate``.  Up to ``batch_rows`` positions of
    canvases share a forward, whatever the question; a decision does not depend on what runs beside it.

    Warns when a question's labels are nothing that the model would write.  Errors: UserError, before the model runs, for no
    questions, labels that are the same tokens or do not fit the canvas, ``reads`` below 1, and prompts that do not fit.
    """
    check_reads(reads, batch_rows)
    if isinstance(questions, str) or not isinstance(questions, Sequence) or not all(isinstance(q, Question) for q in questions):
        raise UserError("questions are a list of Question, even a single one; give for example [Question.yes_no()].")
    if not questions:
        raise UserError("There are no questions; give at least one.")
    labels = [label_ids(tokenizer, question) for question in questions]
    lengths = [canvas_for(model, own, canvas_length) for own in labels]
    ids, placed = place(prompt_ids(model, tokenizer, prompt), prepare_media(images, model.config, image_tokens),
                        model.config.image_tokens, tokenizer)
    token_limit(len(ids), None, max(lengths), model.config.text.max_position_embeddings)
    check_room(model, [len(ids)], patches=max((math.prod(image.image.grid) for image in placed), default=0))
    with generation_memory(partial(held_bytes, model)):
        cache = read_prompt(model, ids, placed, prompt_cache)
        read = read_labels(model, cache, labels, lengths, reads, seed, batch_rows)
    decisions = []
    for question, own in zip(questions, read, strict=True):
        decisions.append(decision_of(question, own))
        if warning := unlikely(decisions[-1]):
            warnings.warn(warning, GenerationWarning, stacklevel=2)
    return decisions


def unlikely(decision: Decision) -> str | None:
    """A warning where the labels are nothing that the model would write."""
    if decision.mass >= LEAST_MASS:
        return None
    question = decision.question
    about = f" to {question.text[:40]!r}" if question.text else ""
    return (f"The labels {', '.join(question.labels)[:60]} hold {decision.mass:.1g} of what the model would answer{about}; ask so "
            "that one of them is the answer, or pin by a template what comes before it.")


def decision_of(question: Question, logprobs: np.ndarray) -> Decision:
    """From what ``read_labels`` read of a question's labels."""
    shares = dict(zip(question.labels, average(logprobs).tolist(), strict=True))
    return Decision(question, shares, float(np.exp(logprobs).sum(axis=1).mean()))


def check_reads(reads: int, batch_rows: int = BATCH_ROWS) -> None:
    """Errors: UserError for none."""
    if reads < 1:
        raise UserError(f"reads must be at least 1, got {reads}.")
    if batch_rows < 1:
        raise UserError(f"batch_rows must be at least 1, got {batch_rows}.")


def label_ids(tokenizer: TokenizerWrapper, question: Question) -> Labels:
    """Each label behind what is pinned before it, in one piece, so that tokens are those of the whole text.

    Where one label begins another, as 1 begins 10, an end belongs to each: the end of the turn, if the template has no other.
    Errors: UserError naming labels that are the same tokens.
    """
    found: dict[tuple[int, ...], str] = {}
    texts = [question.written(label) for label in question.labels]
    for label, text in zip(question.labels, texts, strict=True):
        ids = tuple(encode_literally(tokenizer, text))
        if ids in found:
            raise UserError(f"The labels {found[ids]!r} and {label!r} are the same tokens; give labels that differ.")
        found[ids] = label
    # By text as well: Annas may be other tokens than those of Anna and more, and yet what begins with the latter may be Annas.
    if prefix_free(found) and prefix_free(texts):
        return Labels(tuple(found))
    return Labels(tuple((*ids, turn_end(tokenizer)) for ids in found))


def prefix_free(sequences: Iterable[tuple[int, ...]] | Iterable[str]) -> bool:
    """Whether none of them begins, or is, another one."""
    ordered: list[Any] = sorted(sequences)  # one that begins others stands right before one of these
    return all(later[: len(one)] != one for one, later in itertools.pairwise(ordered))


def canvas_for(model: DiffusionGemma, labels: Labels, canvas_length: int | None = None) -> int:
    """The length of a canvas for ``labels``: as asked for, or a multiple of 16, at most that of the checkpoint.

    Errors: UserError when they do not fit.
    """
    full = model.config.canvas_length
    if canvas_length is not None and not 1 <= canvas_length <= full:
        raise UserError(f"canvas_length {canvas_length} must lie between 1 and the {full} positions this checkpoint was made for.")
    length = min(full, -(-labels.longest // LENGTH_STEP) * LENGTH_STEP) if canvas_length is None else canvas_length
    if labels.longest > length:
        raise UserError(f"The longest label has {labels.longest} tokens with all that is pinned before it, and the canvas {length} "
                        f"positions; {'shorten it' if length == full else 'take a longer canvas'}.")
    return length


def read_prompt(model: DiffusionGemma, ids: Sequence[int], images: Sequence[PlacedImage] = (),
                prompt_cache: PromptCache | None = None) -> Cache:
    """The cache of a prompt, encoded as a generation would."""
    session = Session.reading(model, ids, prompt_cache=prompt_cache, images=images)
    prefill(model, [session], PREFILL_STEP_SIZE)
    session.encoded()
    return session.cache


def read_labels(model: DiffusionGemma, cache: Cache, questions: Sequence[Labels], lengths: Sequence[int], reads: int, seed: int,
                batch_rows: int = BATCH_ROWS) -> list[np.ndarray]:
    """For each question the log-probabilities [reads, labels] of its labels on canvases of its length behind ``cache``.

    float64 sums of float32 log-probabilities at temperature 1, without self-conditioning.  Errors: NonFiniteLogitsError.
    """
    reading = labels_in_turns(model, cache, questions, lengths, reads, seed, batch_rows)
    while True:
        try:
            next(reading)
        except StopIteration as end:
            found: list[np.ndarray] = end.value
            return found


def labels_in_turns(model: DiffusionGemma, cache: Cache, questions: Sequence[Labels], lengths: Sequence[int], reads: int, seed: int,
                    batch_rows: int = BATCH_ROWS) -> Generator[tuple[()], None, list[np.ndarray]]:
    """As ``read_labels``, but that it pauses behind each forward, so that others may have a turn."""
    draws = [Draws(seed + read, model.config.text.vocab_size) for read in range(reads)]
    noise = [draw.step(0, 0, 0, 0, max(lengths)).initial for draw in draws]
    canvases = [_Canvas(question, read, begin, np.concatenate((begin, noise[read][len(begin) : length])).astype(np.int32))
                for question, (labels, length) in enumerate(zip(questions, lengths, strict=True))
                for read in range(reads) for begin in labels.edges]
    known: dict[tuple[int, int, tuple[int, ...]], float] = {}  # by question, read and the ids up to the one that was asked about
    for batch in _batches(canvases, batch_rows):
        for canvas, row in zip(batch, _next_tokens(model, cache, batch, lambda c: questions[c.question].edges[c.begin]),
                               strict=True):
            for token, value in row.items():
                known[canvas.question, canvas.read, (*canvas.begin, token)] = value
        yield ()
    return [np.array([[sum(known[question, read, ids[:end]] for end in range(labels.common + 1, len(ids) + 1))
                       for ids in labels.ids] for read in range(reads)])
            for question, labels in enumerate(questions)]


def average(logprobs: np.ndarray) -> np.ndarray:
    """Shares [labels], summing to 1, of log-probabilities [reads, labels]: the mean over reads of each one's own shares."""
    odds = np.exp(logprobs - logprobs.max(axis=1, keepdims=True))
    shares: np.ndarray = (odds / odds.sum(axis=1, keepdims=True)).mean(axis=0)
    return shares


@dataclass(frozen=True)
class _Canvas:
    """One canvas ``ids`` [length] whose first positions are pinned to ``begin``."""

    question: int
    read: int
    begin: tuple[int, ...]
    ids: np.ndarray


def _batches(canvases: Sequence[_Canvas], rows: int) -> Iterable[list[_Canvas]]:
    """Runs of at most so many positions, or of a single canvas."""
    batch: list[_Canvas] = []
    for canvas in canvases:
        if batch and sum(other.ids.size for other in batch) + canvas.ids.size > rows:
            yield batch
            batch = []
        batch.append(canvas)
    yield batch


def _next_tokens(model: DiffusionGemma, cache: Cache, batch: Sequence[_Canvas], wanted: Callable[[_Canvas], Sequence[int]],
                 ) -> list[dict[int, float]]:
    """For each canvas the log-probabilities of the ``wanted`` tokens behind its begin."""
    lengths = [canvas.ids.size for canvas in batch]
    hidden = model.denoise(mx.array(np.concatenate([canvas.ids for canvas in batch])), [cache] * len(batch), lengths=lengths).hidden
    asked = (np.cumsum([0, *lengths[:-1]]) + [len(canvas.begin) for canvas in batch]).tolist()
    # The head runs on these positions alone.  Never on one: a single row takes other kernels and rounds differently.
    # So do fewer than 6 to 33 rows on Metal, by mode and chip: probabilities there depend on the batch in their last bits.
    logits = model.logits(hidden[mx.array([*asked, asked[-1]])])[: len(batch)]
    tokens = [list(wanted(canvas)) for canvas in batch]
    rows = np.repeat(np.arange(len(batch)), [len(own) for own in tokens])
    found = logits[mx.array(rows), mx.array(np.concatenate(tokens))] - mx.logsumexp(logits, axis=-1)[mx.array(rows)]
    if not mx.isfinite(found).all().item():
        raise NonFiniteLogitsError("The model returned NaN or infinity: the checkpoint is damaged or the dtype too narrow; try "
                                   "--dtype float32 and compare with `mlx-diffgemma doctor`.")
    values = iter(np.array(found).astype(float).tolist())
    return [{token: next(values) for token in own} for own in tokens]
