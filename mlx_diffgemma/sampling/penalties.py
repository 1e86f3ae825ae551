"""Penalties on tokens that the text already holds, and biases on single tokens.

They change the logits before anything else reads them.  With ``mode="ar"`` they mean the same as in
other implementations.  In a canvas the text to the left of a position is not final yet.  There the
penalties use the prompt, the committed answer, and the most probable tokens of the previous step.

- ``bias`` is added to the logits of single tokens.
- ``repetition`` divides the positive logits of tokens that the prompt or the text to the left
  holds, and multiplies their negative ones.
- ``presence`` is subtracted once if the answer to the left holds the token, and ``frequency`` once
  for each time that it does.

They are applied in this order.  End tokens are never counted, because after the end of an answer a
canvas holds only end tokens.

Sources: OpenAI's API reference for presence, frequency and bias; arXiv 1909.05858 and transformers
for repetition.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_diffgemma.errors import UserError

MOST_REPETITION = 10.0
MOST_PENALTY = 2.0
MOST_BIAS = 100.0


@dataclass(frozen=True)
class Penalties:
    """The penalties of a request.  ``bias``: pairs of a token id and what is added to its logit."""

    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0
    bias: tuple[tuple[int, float], ...] = ()

    @property
    def neutral(self) -> bool:
        return not self.bias and not self.repeats

    @property
    def repeats(self) -> bool:
        """Whether a penalty depends on the text."""
        return self.repetition != 1 or self.frequency != 0 or self.presence != 0

    def check_vocabulary(self, vocabulary: int) -> None:
        """Raise UserError if a token with a bias is not in the vocabulary."""
        for token, _ in self.bias:
            if token >= vocabulary:
                raise UserError(
                    f"logit_bias names the token {token}, and this model has those from 0 to {vocabulary - 1}."
                )

    def after(
        self, prompt: Sequence[int], answer: Sequence[int], eos_ids: Sequence[int], vocabulary: int
    ) -> Adjustment:
        """Compute the adjustment of the logits after ``prompt`` and ``answer``.

        Args:
            prompt: The ids of the prompt.
            answer: The ids of the answer so far.
            eos_ids: The end tokens, which are not counted.
            vocabulary: The size of the vocabulary.
        """
        ends = list(eos_ids)
        said = np.bincount(np.asarray(answer, dtype=np.int64), minlength=vocabulary)
        seen = said + np.bincount(np.asarray(prompt, dtype=np.int64), minlength=vocabulary) > 0
        said[ends] = 0
        seen[ends] = False
        bias = None
        if self.bias:
            dense = np.zeros(vocabulary, dtype=np.float32)
            for token, value in self.bias:
                dense[token] = value
            bias = mx.array(dense)
        return Adjustment(
            self, mx.array(said.astype(np.float32)), mx.array(seen), bias, mx.array(ends)
        )


@dataclass(frozen=True)
class Adjustment:
    """What penalties do to logits.

    ``counts`` says how often the answer holds each token, the mask ``seen`` which tokens the whole
    text holds, and ``bias`` what is added to each logit; all are [vocabulary].
    """

    penalties: Penalties
    counts: mx.array
    seen: mx.array
    bias: mx.array | None
    ends: mx.array

    def adjust(self, logits: mx.array, canvas: mx.array | None = None) -> mx.array:
        """Apply bias and penalties to ``logits`` [rows, vocabulary].

        ``canvas`` are the ids [rows] of the rows' own text, if it is known.
        """
        own = self.penalties
        if self.bias is not None:
            logits = logits + self.bias
        if not own.repeats:
            return logits
        counts, seen = self.counts, self.seen
        if canvas is not None:
            left = self._left(canvas, logits.shape[-1])
            counts = counts + left
            seen = seen | (left > 0)
        if own.repetition != 1:
            logits = mx.where(
                seen, mx.where(logits < 0, logits * own.repetition, logits / own.repetition), logits
            )
        return logits - own.presence * (counts > 0) - own.frequency * counts

    def _left(self, canvas: mx.array, vocabulary: int) -> mx.array:
        """How often ``canvas`` [rows] holds each token to the left of a row: [rows, vocabulary]."""
        rows, places = np.tril_indices(canvas.size, -1)
        counted = (canvas[:, None] != self.ends).all(axis=-1).astype(mx.float32)
        chosen = mx.array(places)
        left = mx.zeros((canvas.size, vocabulary))
        return left.at[mx.array(rows), canvas[chosen]].add(counted[chosen])


def penalties_of(
    repetition: float, frequency: float, presence: float, bias: Mapping[Any, Any] | None
) -> Penalties | None:
    """The penalties with these values, or None if all are neutral.

    Args:
        repetition: The repetition penalty; 1 is neutral.
        frequency: The frequency penalty; 0 is neutral.
        presence: The presence penalty; 0 is neutral.
        bias: Token ids and what is added to their logits.

    Raises:
        UserError: A value is out of range.
    """
    if not 0 < repetition <= MOST_REPETITION:
        raise UserError(
            f"repetition_penalty must be above 0 and at most {MOST_REPETITION:g}, got {repetition}; 1 is off."
        )
    for name, value in (("frequency_penalty", frequency), ("presence_penalty", presence)):
        if not -MOST_PENALTY <= value <= MOST_PENALTY:
            raise UserError(
                f"{name} must lie between -{MOST_PENALTY:g} and {MOST_PENALTY:g}, got {value}; 0 is off."
            )
    found = Penalties(repetition, frequency, presence, _pairs(bias))
    return None if found.neutral else found


def _pairs(bias: Any) -> tuple[tuple[int, float], ...]:
    """Return the pairs of ``bias``.  Raise UserError if it does not map token ids to numbers in
    range.
    """
    if bias is None:
        return ()
    if not isinstance(bias, Mapping):
        raise UserError(f"logit_bias maps token ids to numbers, got {type(bias).__name__}.")
    pairs = dict[int, float]()
    for token, value in bias.items():
        named = isinstance(token, str) and token.isascii() and token.isdecimal() and len(token) < 10
        if not named and (isinstance(token, bool) or not hasattr(token, "__index__")):
            raise UserError(
                f"logit_bias maps token ids to numbers, and {token!r:.40} is no token id."
            )
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not abs(value) <= MOST_BIAS
        ):
            raise UserError(
                f"logit_bias must lie between -{MOST_BIAS:g} and {MOST_BIAS:g}, got {value!r:.40} for token {token}."
            )
        if not 0 <= int(token) < 2**31:
            raise UserError(f"logit_bias maps token ids to numbers, and {token} is no token id.")
        if value:
            pairs[int(token)] = float(value)
    return tuple(sorted(pairs.items()))
