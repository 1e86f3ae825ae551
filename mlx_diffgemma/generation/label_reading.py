"""The log-probabilities of labels, from one denoising step of each canvas.

The probability of a label with several tokens follows from the chain rule: the first token, then
the second one with the first pinned, and so on.  There is one canvas for each prefix that some
label has.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_diffgemma.decoding.prefill import PREFILL_STEP_SIZE, prefill
from mlx_diffgemma.decoding.prompt_cache import PromptCache
from mlx_diffgemma.decoding.session import Session
from mlx_diffgemma.errors import NonFiniteLogitsError
from mlx_diffgemma.generation.labels import Labels
from mlx_diffgemma.media.prompt import ImageSpan
from mlx_diffgemma.model.cache import Cache
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.sampling.draws import Draws

BATCH_ROWS = 1024  # canvas positions that share a forward


def read_prompt(
    model: DiffusionGemma,
    ids: Sequence[int],
    images: Sequence[ImageSpan] = (),
    prompt_cache: PromptCache | None = None,
) -> Cache:
    """The cache of a prompt, encoded as it is for a generation.

    Args:
        model: The model.
        ids: The ids of the prompt.
        images: The images of the prompt.
        prompt_cache: Only the part of the prompt that it does not hold is encoded.
    """
    session = Session.reading(model, ids, prompt_cache=prompt_cache, images=images)
    prefill(model, [session], PREFILL_STEP_SIZE)
    session.encoded()
    return session.cache


def read_labels(
    model: DiffusionGemma,
    cache: Cache,
    questions: Sequence[Labels],
    lengths: Sequence[int],
    reads: int,
    seed: int,
    batch_rows: int = BATCH_ROWS,
) -> list[np.ndarray]:
    """Read the log-probabilities of the labels of each question.

    Args:
        model: The model.
        cache: The cache of the prompt.
        questions: The labels of each question.
        lengths: The length of the canvas of each question.
        reads: How many canvases of noise are read for each question.
        seed: Read r uses ``seed`` + r.
        batch_rows: The most canvas positions that share a forward.

    Returns:
        For each question, log-probabilities [reads, labels] in nats.  They are float64 sums of
        float32 values at temperature 1, without self-conditioning.

    Raises:
        NonFiniteLogitsError: The model returned NaN or infinity.
    """
    reading = labels_in_turns(model, cache, questions, lengths, reads, seed, batch_rows)
    while True:
        try:
            next(reading)
        except StopIteration as end:
            found: list[np.ndarray] = end.value
            return found


def labels_in_turns(
    model: DiffusionGemma,
    cache: Cache,
    questions: Sequence[Labels],
    lengths: Sequence[int],
    reads: int,
    seed: int,
    batch_rows: int = BATCH_ROWS,
) -> Generator[tuple[()], None, list[np.ndarray]]:
    """Do the same as ``read_labels``, but pause after each forward so that others have a turn.

    The arguments are those of ``read_labels``.
    """
    draws = [Draws(seed + read, model.config.text.vocab_size) for read in range(reads)]
    noise = [draw.step(0, 0, 0, 0, max(lengths)).initial for draw in draws]
    canvases = [
        _Canvas(
            question,
            read,
            begin,
            np.concatenate((begin, noise[read][len(begin) : length])).astype(np.int32),
        )
        for question, (labels, length) in enumerate(zip(questions, lengths, strict=True))
        for read in range(reads)
        for begin in labels.edges
    ]
    known: dict[
        tuple[int, int, tuple[int, ...]], float
    ] = {}  # keys: the question, the read, and the ids up to and including the token
    for batch in _batches(canvases, batch_rows):
        for canvas, row in zip(
            batch,
            _next_tokens(model, cache, batch, lambda c: questions[c.question].edges[c.begin]),
            strict=True,
        ):
            for token, value in row.items():
                known[canvas.question, canvas.read, (*canvas.begin, token)] = value
        yield ()
    return [
        np.array(
            [
                [
                    sum(
                        known[question, read, ids[:end]]
                        for end in range(labels.common + 1, len(ids) + 1)
                    )
                    for ids in labels.ids
                ]
                for read in range(reads)
            ]
        )
        for question, labels in enumerate(questions)
    ]


def average(logprobs: np.ndarray) -> np.ndarray:
    """Normalise log-probabilities [reads, labels] to probabilities in each read, and average these
    over the reads.  The result [labels] sums to 1.
    """
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
    """Split canvases into batches of at most ``rows`` positions, or of a single canvas."""
    batch: list[_Canvas] = []
    for canvas in canvases:
        if batch and sum(other.ids.size for other in batch) + canvas.ids.size > rows:
            yield batch
            batch = []
        batch.append(canvas)
    yield batch


def _next_tokens(
    model: DiffusionGemma,
    cache: Cache,
    batch: Sequence[_Canvas],
    wanted: Callable[[_Canvas], Sequence[int]],
) -> list[dict[int, float]]:
    """Read the log-probabilities of the next token after the pinned prefix of each canvas.

    Args:
        model: The model.
        cache: The cache of the prompt.
        batch: The canvases.
        wanted: The tokens to read, for a canvas.

    Returns:
        For each canvas, the log-probability of each of its tokens.
    """
    lengths = [canvas.ids.size for canvas in batch]
    hidden = model.denoise(
        mx.array(np.concatenate([canvas.ids for canvas in batch])),
        [cache] * len(batch),
        lengths=lengths,
    ).hidden
    asked = (np.cumsum([0, *lengths[:-1]]) + [len(canvas.begin) for canvas in batch]).tolist()
    # The head runs only on these positions, and never on a single one: a single row uses other
    # kernels and rounds differently.  On Metal, fewer than 6 to 33 rows (it depends on mode and
    # chip) do so too.  There the last bits of probabilities depend on the batch.
    logits = model.logits(hidden[mx.array([*asked, asked[-1]])])[: len(batch)]
    tokens = [list(wanted(canvas)) for canvas in batch]
    rows = np.repeat(np.arange(len(batch)), [len(own) for own in tokens])
    found = (
        logits[mx.array(rows), mx.array(np.concatenate(tokens))]
        - mx.logsumexp(logits, axis=-1)[mx.array(rows)]
    )
    if not mx.isfinite(found).all().item():
        raise NonFiniteLogitsError(
            "The model returned NaN or infinity: the checkpoint is damaged or the dtype too narrow; try "
            "--dtype float32 and compare with `mlx-diffgemma doctor`."
        )
    values = iter(np.array(found).astype(float).tolist())
    return [{token: next(values) for token in own} for own in tokens]
