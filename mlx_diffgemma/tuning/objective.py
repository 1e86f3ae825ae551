"""The published training objective, term by term.

Each example has one canvas somewhere in its answer.  Each position of the canvas becomes a random
token with probability t, which is drawn uniformly for each example.  The causal mode reads the
sequence unchanged, and the canvas sees only what comes before it.  In half of the examples, a first
pass without gradient gives the self-conditioning signal.  The loss is the cross-entropy over all
positions of the canvas, including the end tokens that fill its tail, plus the next-token
cross-entropy of the causal mode.

Source: Google's fine-tuning recipe for DiffusionGemma; docs/tuning.md says where others depart from
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_diffgemma.errors import UserError
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.sampling import self_conditioning
from mlx_diffgemma.tuning.head import cross_entropy, in_parts


@dataclass(frozen=True)
class Objective:
    """The terms of the loss.

    Attributes:
        canvas: The weight of the canvas's cross-entropy; 0 leaves it out.
        causal: The weight of the causal cross-entropy; 0 leaves it out.
        self_conditioning: The probability of a first pass.
        least: The smallest share t of corrupted positions.
        most: The largest share t of corrupted positions.
        mask_prompt: Leave the prompt out of the causal term.
    """

    canvas: float = 1.0
    causal: float = 1.0
    self_conditioning: float = 0.5
    least: float = 1e-4
    most: float = 1.0
    mask_prompt: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.self_conditioning <= 1:
            raise UserError(
                f"The probability of self-conditioning must lie between 0 and 1, got {self.self_conditioning}."
            )
        if not 0 <= self.least < self.most <= 1:
            raise UserError(
                f"The share of corrupted positions must satisfy 0 <= least < most <= 1, got {self.least} and "
                f"{self.most}."
            )
        if not min(self.canvas, self.causal) >= 0 or not self.canvas + self.causal > 0:
            raise UserError(
                f"The weights of the loss must not be negative nor all 0, got {self.canvas} and {self.causal}."
            )


@dataclass(frozen=True)
class Batch:
    """Examples with their canvases.

    Attributes:
        sequences: The ids of each example.
        answers: Where each answer starts.
        starts: Where each canvas starts.
        clean: The ids [batch, length] of the canvases.
        corrupted: The ids [batch, length] that the model sees.
        conditioned: Which examples get a first pass.
    """

    sequences: Sequence[np.ndarray]
    answers: Sequence[int]
    starts: Sequence[int]
    clean: np.ndarray
    corrupted: np.ndarray
    conditioned: Sequence[bool]


def make_batch(
    sequences: Sequence[np.ndarray],
    answers: Sequence[int],
    length: int,
    vocabulary: int,
    end: int,
    objective: Objective,
    rng: np.random.Generator,
) -> Batch:
    """Place, fill and corrupt a canvas for each sequence.

    A canvas starts a whole number of canvases after its answer does, as in generation.

    Args:
        sequences: The ids of each example.
        answers: Where each answer starts.
        length: The positions of a canvas.
        vocabulary: Random tokens are below this id.
        end: The token that fills a canvas after the end of its sequence.
        objective: The shares of corrupted positions and of first passes.
        rng: Where the random numbers come from.

    Returns:
        The batch.
    """
    starts = [
        int(answer + length * rng.integers(max(1, -(-(ids.size - answer) // length))))
        for ids, answer in zip(sequences, answers, strict=True)
    ]
    clean = np.full((len(starts), length), end, dtype=np.int32)
    for row, (ids, start) in enumerate(zip(sequences, starts, strict=True)):
        piece = ids[start : start + length]
        clean[row, : piece.size] = piece
    level = objective.least + (objective.most - objective.least) * rng.random((len(starts), 1))
    noise = rng.integers(vocabulary, size=clean.shape, dtype=np.int32)
    corrupted = np.where(rng.random(clean.shape) < level, noise, clean)
    conditioned = [bool(draw < objective.self_conditioning) for draw in rng.random(len(starts))]
    return Batch(sequences, answers, starts, clean, corrupted, conditioned)


@dataclass(frozen=True)
class Losses:
    """Mean cross-entropies in nats, and the numbers of tokens they are means of."""

    canvas: mx.array
    causal: mx.array
    canvas_tokens: int
    causal_tokens: int

    def total(self, objective: Objective) -> mx.array:
        return objective.canvas * self.canvas + objective.causal * self.causal


def losses(
    model: DiffusionGemma, batch: Batch, objective: Objective, grad_checkpoint: bool = False
) -> Losses:
    """The terms of the loss; both are differentiable.

    Args:
        model: The model.
        batch: The examples.
        objective: The terms that are needed.
        grad_checkpoint: Compute layers twice and keep less for the gradient.

    Returns:
        Both terms.
    """
    # A canvas sees only what comes before it; the rest of its sequence is read for the causal term
    # alone.
    ends = [
        ids.size if objective.causal else start
        for ids, start in zip(batch.sequences, batch.starts, strict=True)
    ]
    sequences = [mx.array(ids[:end]) for ids, end in zip(batch.sequences, ends, strict=True)]
    corrupted = mx.array(batch.corrupted)
    soft = first_pass(model, batch, sequences, corrupted) if any(batch.conditioned) else None
    causal_rows, canvas_rows = model.training_forward(
        sequences, corrupted, batch.starts, soft, grad_checkpoint
    )
    canvas = cross_entropy(
        model, canvas_rows.reshape(batch.clean.size, -1), mx.array(batch.clean.flatten())
    )
    rows, targets = _next_tokens(batch, objective.mask_prompt)
    causal = mx.array(0.0)
    if objective.causal and rows.size:
        causal = cross_entropy(model, causal_rows[mx.array(rows)], mx.array(targets))
    return Losses(canvas, causal, batch.clean.size, rows.size)


def first_pass(
    model: DiffusionGemma, batch: Batch, sequences: Sequence[mx.array], corrupted: mx.array
) -> mx.array:
    """The self-conditioning signal of a first pass.

    No gradient flows into the first pass.  It does flow into the embedding table that its token
    distribution is multiplied with, as in the reference.

    Args:
        model: The model.
        batch: The examples.
        sequences: The ids of each example, as arrays.
        corrupted: The ids [batch, length] of the canvases.

    Returns:
        [batch, length, hidden], zero for examples without a first pass.
    """
    chosen = [row for row, wanted in enumerate(batch.conditioned) if wanted]
    # A canvas sees only what comes before it, so the rest of its sequence need not be read.
    prefixes = [sequences[row][: batch.starts[row]] for row in chosen]
    _, hidden = model.training_forward(
        prefixes, corrupted[mx.array(chosen)], [batch.starts[row] for row in chosen]
    )
    rows = hidden.reshape(-1, hidden.shape[-1])
    parts = in_parts(
        model,
        rows,
        lambda _, rows: self_conditioning.dense(model, mx.stop_gradient(model.logits(rows))),
    )
    signal = mx.concatenate(parts).reshape(hidden.shape)
    place = {row: index for index, row in enumerate(chosen)}
    none = mx.zeros(signal.shape[1:], dtype=signal.dtype)
    return mx.stack([signal[place[row]] if row in place else none for row in range(len(sequences))])


def _next_tokens(batch: Batch, mask_prompt: bool) -> tuple[np.ndarray, np.ndarray]:
    """Find the rows that predict a next token.

    Returns:
        (their indices among the rows of all sequences, the tokens that they predict)
    """
    rows = []
    targets = []
    first = 0
    for ids, answer in zip(batch.sequences, batch.answers, strict=True):
        places = np.arange(answer - 1 if mask_prompt else 0, ids.size - 1)
        rows.append(first + places)
        targets.append(ids[places + 1])
        first += ids.size
    return np.concatenate(rows), np.concatenate(targets)
