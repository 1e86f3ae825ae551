"""From one step's belief to the next step's self-conditioning signal: the mean embedding under it.

Dense takes the whole vocabulary, as the reference does.  Sparse takes the most probable tokens where they hold almost all
of the mass, which most positions of a canvas reach after a few steps; the other positions stay dense, each by itself.
Dense costs length x vocabulary x hidden multiply-adds, a covered position only KEPT x hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import mlx.core as mx

from mlx_diffgemma.model import DiffusionGemma
from mlx_diffgemma.sampler import largest

BUCKET = 32  # uncovered positions are taken in multiples of this, or in fewer powers of two, so that few shapes occur
SMALLEST = 8


class Bias(NamedTuple):
    """What constraints add to logits: ``values`` [rows, length, columns], and the column [vocabulary] of each token."""

    values: mx.array
    column_of: mx.array


@dataclass(frozen=True)
class Belief:
    """``logits`` [rows, length, vocabulary] and ``temperature`` [rows] of a step; for sparse self-conditioning ``kept`` ids
    [rows, length, KEPT], the mask ``uncovered`` [rows, length] of the positions they do not describe, and how many these are
    in each row.  ``bias`` is added to the logits, where they are looked at."""

    logits: mx.array
    temperature: mx.array
    kept: mx.array | None
    uncovered: mx.array | None
    counts: Sequence[int]
    exact: bool = True  # whether ``counts`` are these, or only not smaller
    bias: Bias | None = None

    def rows(self, indices: Sequence[int], length: int) -> Belief:
        """That of some rows, and of their first ``length`` positions."""
        if list(indices) == list(range(self.logits.shape[0])) and length == self.logits.shape[1]:
            return self
        chosen = mx.array(indices)
        logits, kept, uncovered = (None if a is None else a[chosen][:, :length] for a in (self.logits, self.kept, self.uncovered))
        bias = self.bias and self.bias._replace(values=self.bias.values[chosen][:, :length])
        return Belief(logits, self.temperature[chosen], kept, uncovered, [min(self.counts[i], length) for i in indices],
                      length == self.logits.shape[1], bias)

    def scaled(self, positions: mx.array | None = None) -> mx.array:
        """The scaled logits, with their bias, [rows, length, vocabulary]; or those of ``positions`` in all rows [n, vocabulary]."""
        logits, temperature = self.logits, self.temperature[:, None, None]
        if positions is not None:
            logits, temperature = logits.flatten(0, 1)[positions], self.temperature[positions // logits.shape[1]][:, None]
        if self.bias is None:
            return logits / temperature
        values = self.bias.values if positions is None else self.bias.values.flatten(0, 1)[positions]
        column_of = self.bias.column_of.reshape(*[1] * (values.ndim - 1), -1)
        return _scaled(logits, mx.take_along_axis(values, column_of, axis=-1), temperature)

    def top(self, row: int, count: int) -> tuple[mx.array, mx.array]:
        """(ids, log-probabilities) [length, count] of the most probable tokens of a row, the most probable first."""
        length = self.logits.shape[1]
        scaled = self.scaled(mx.arange(row * length, (row + 1) * length))
        ids = largest(scaled, min(count, scaled.shape[-1]))
        logprobs = mx.take_along_axis(scaled, ids, axis=-1) - mx.logsumexp(scaled, axis=-1, keepdims=True)
        order = mx.argsort(-logprobs, axis=-1)
        found = mx.take_along_axis(ids, order, axis=-1), mx.take_along_axis(logprobs, order, axis=-1)
        mx.eval(found)  # else they would hold the logits
        return found

    def scaled_kept(self) -> mx.array:
        """[rows, length, KEPT]"""
        logits, temperature = mx.take_along_axis(self.logits, self.kept, axis=-1), self.temperature[:, None, None]
        if self.bias is None:
            return logits / temperature
        return _scaled(logits, mx.take_along_axis(self.bias.values, self.bias.column_of[self.kept], axis=-1), temperature)


@partial(mx.compile, shapeless=True)
def _scaled(logits: mx.array, bias: mx.array, temperature: mx.array) -> mx.array:
    return (logits + bias) / temperature


def soft_embedding(model: DiffusionGemma, belief: Belief) -> mx.array:
    """The signal [rows, length, hidden]."""
    if belief.kept is None or belief.uncovered is None or (belief.exact and sum(belief.counts) == belief.uncovered.size):
        return dense(model, belief.scaled())
    soft = sparse(model, belief.scaled_kept(), belief.kept)
    count, flat = sum(belief.counts), belief.uncovered.flatten()
    if not count:
        return soft
    # The uncovered come first.  Metal sorts no booleans.
    taken = mx.argsort((~flat).astype(mx.uint8))[: min(flat.size, _bucket(count))]
    exact = dense(model, belief.scaled(taken))
    covered = soft.flatten(0, 1)
    # Covered positions that fill the bucket keep what they have, so that no row depends on another's count.
    rows = mx.where(flat[taken][:, None], exact, covered[taken])
    place = mx.put_along_axis(mx.arange(taken.size, taken.size + flat.size), taken, mx.arange(taken.size), axis=0)
    return mx.concatenate((rows, covered))[place].reshape(soft.shape)


def _bucket(count: int) -> int:
    if count > BUCKET // 2:
        return -(-count // BUCKET) * BUCKET
    return max(SMALLEST, 1 << (count - 1).bit_length())


def dense(model: DiffusionGemma, scaled: mx.array) -> mx.array:
    """Mean embedding [..., hidden] under the softmax of the temperature-scaled logits ``scaled`` [..., vocabulary].

    The reference rounds the scaled logits to the embedding dtype first; in bf16 that is decisive.
    """
    return model.soft_embed(mx.softmax(_rounded(model, scaled), axis=-1))


def sparse(model: DiffusionGemma, scaled: mx.array, kept: mx.array) -> mx.array:
    """Mean embedding [..., hidden] under the softmax of the scaled logits [..., n] of the ``kept`` tokens alone."""
    return model.soft_embed(mx.softmax(_rounded(model, scaled), axis=-1), kept)


def _rounded(model: DiffusionGemma, scaled: mx.array) -> mx.array:
    return scaled.astype(model.dtype).astype(mx.float32)
