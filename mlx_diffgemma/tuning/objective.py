"""The published training objective, term by term.

One canvas an example lies somewhere in its answer.  Every position of it becomes a random token with probability t, t drawn
evenly for each example; the sequence is read causally as it is, and the canvas sees of it only what comes before.  In half of
the examples, a first pass without gradient gives the self-conditioning signal.  The loss is the cross-entropy over all
positions of the canvas, the end tokens that fill its tail included, plus the next-token cross-entropy of the causal mode.

Source: Google's fine-tuning recipe for DiffusionGemma; see docs/tuning.md for where others depart from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_diffgemma import conditioning
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.model import DiffusionGemma
from mlx_diffgemma.tuning.head import cross_entropy, in_parts


@dataclass(frozen=True)
class Objective:
    """The terms and their weights; 0 leaves a term out.

    ``canvas`` and ``causal`` weigh the two cross-entropies; ``self_conditioning`` is the probability of a first pass.  The
    share t of corrupted positions is drawn between ``least`` and ``most``.  ``mask_prompt`` leaves the prompt out of the causal
    term.
    """

    canvas: float = 1.0
    causal: float = 1.0
    self_conditioning: float = 0.5
    least: float = 1e-4
    most: float = 1.0
    mask_prompt: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.self_conditioning <= 1:
            raise UserError(f"The probability of self-conditioning must lie between 0 and 1, got {self.self_conditioning}.")
        if not 0 <= self.least < self.most <= 1:
            raise UserError(f"The share of corrupted positions must satisfy 0 <= least < most <= 1, got {self.least} and "
                            f"{self.most}.")
        if not min(self.canvas, self.causal) >= 0 or not self.canvas + self.causal > 0:
            raise UserError(f"The weights of the loss must not be negative nor all 0, got {self.canvas} and {self.causal}.")


@dataclass(frozen=True)
class Batch:
    """``sequences`` of ids whose answers begin at ``answers``; the canvas of each begins at ``starts``, holds ``clean`` and is
    shown as ``corrupted``, both [batch, length].  ``conditioned`` says which get a first pass."""

    sequences: Sequence[np.ndarray]
    answers: Sequence[int]
    starts: Sequence[int]
    clean: np.ndarray
    corrupted: np.ndarray
    conditioned: Sequence[bool]


def make_batch(sequences: Sequence[np.ndarray], answers: Sequence[int], length: int, vocabulary: int, end: int,
               objective: Objective, rng: np.random.Generator) -> Batch:
    """Place, fill and corrupt a canvas of ``length`` for each sequence; ``end`` fills what lies behind it.

    A canvas begins a whole number of canvases after the answer does, as in generation.
    """
    starts = [int(answer + length * rng.integers(max(1, -(-(ids.size - answer) // length))))
              for ids, answer in zip(sequences, answers, strict=True)]
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
    """Mean cross-entropies in nats; ``canvas_tokens`` and ``causal_tokens`` are what they were taken over."""

    canvas: mx.array
    causal: mx.array
    canvas_tokens: int
    causal_tokens: int

    def total(self, objective: Objective) -> mx.array:
        return objective.canvas * self.canvas + objective.causal * self.causal


def losses(model: DiffusionGemma, batch: Batch, objective: Objective, grad_checkpoint: bool = False) -> Losses:
    """The terms of ``batch`` under ``model``; both are differentiable."""
    # A canvas sees only what comes before it; the rest of its sequence is read for the causal term alone.
    ends = [ids.size if objective.causal else start for ids, start in zip(batch.sequences, batch.starts, strict=True)]
    sequences = [mx.array(ids[:end]) for ids, end in zip(batch.sequences, ends, strict=True)]
    corrupted = mx.array(batch.corrupted)
    soft = first_pass(model, batch, sequences, corrupted) if any(batch.conditioned) else None
    causal_rows, canvas_rows = model.learn(sequences, corrupted, batch.starts, soft, grad_checkpoint)
    canvas = cross_entropy(model, canvas_rows.reshape(batch.clean.size, -1), mx.array(batch.clean.flatten()))
    rows, targets = _next_tokens(batch, objective.mask_prompt)
    causal = mx.array(0.0)
    if objective.causal and rows.size:
        causal = cross_entropy(model, causal_rows[mx.array(rows)], mx.array(targets))
    return Losses(canvas, causal, batch.clean.size, rows.size)


def first_pass(model: DiffusionGemma, batch: Batch, sequences: Sequence[mx.array], corrupted: mx.array) -> mx.array:
    """The signal [batch, length, hidden], zero where none was drawn.

    No gradient flows into the first pass, but into the embedding table that its belief is multiplied with, as in the reference.
    """
    chosen = [row for row, wanted in enumerate(batch.conditioned) if wanted]
    # A canvas sees only what comes before it, so the rest of its sequence need not be read.
    prefixes = [sequences[row][: batch.starts[row]] for row in chosen]
    _, hidden = model.learn(prefixes, corrupted[mx.array(chosen)], [batch.starts[row] for row in chosen])
    rows = hidden.reshape(-1, hidden.shape[-1])
    parts = in_parts(model, rows, lambda _, rows: conditioning.dense(model, mx.stop_gradient(model.logits(rows))))
    signal = mx.concatenate(parts).reshape(hidden.shape)
    place = {row: index for index, row in enumerate(chosen)}
    none = mx.zeros(signal.shape[1:], dtype=signal.dtype)
    return mx.stack([signal[place[row]] if row in place else none for row in range(len(sequences))])


def _next_tokens(batch: Batch, mask_prompt: bool) -> tuple[np.ndarray, np.ndarray]:
    """Rows of all sequences that predict a next token, and that token."""
    rows, targets, first = [], [], 0
    for ids, answer in zip(batch.sequences, batch.answers, strict=True):
        places = np.arange(answer - 1 if mask_prompt else 0, ids.size - 1)
        rows.append(first + places)
        targets.append(ids[places + 1])
        first += ids.size
    return np.concatenate(rows), np.concatenate(targets)
