"""Self-conditioning: the mean embedding under the distribution of one step, as input of the next.

The dense form uses the whole vocabulary, as the reference does.  The sparse form uses the most
probable tokens of a position if they hold almost all of the mass.  Most positions of a canvas get
there after a few steps; each other position stays dense.  The dense form costs length x vocabulary
x hidden multiply-adds, and a covered position costs only KEPT x hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import mlx.core as mx

from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.sampling.sampler import largest

# The number of uncovered positions is rounded up so that few shapes occur: to a multiple of this,
# or to a power of two if it is at most half of this.
BUCKET = 32
SMALLEST = 8


class Bias(NamedTuple):
    """What constraints add to logits: ``values`` [rows, length, columns], and the column
    [vocabulary] of each token.
    """

    values: mx.array
    column_of: mx.array


@dataclass(frozen=True)
class Belief:
    """The distribution of a step.

    Attributes:
        logits: [rows, length, vocabulary].
        temperature: [rows].
        kept: The ids [rows, length, KEPT] of the most probable tokens; None for dense
            self-conditioning.
        uncovered: Mask [rows, length] of the positions that ``kept`` does not describe.
        counts: The number of uncovered positions of each row.
        exact: Whether ``counts`` are exact, and not only upper bounds.
        bias: What constraints add to the logits before they are used.
    """

    logits: mx.array
    temperature: mx.array
    kept: mx.array | None
    uncovered: mx.array | None
    counts: Sequence[int]
    exact: bool = True
    bias: Bias | None = None

    def rows(self, indices: Sequence[int], length: int) -> Belief:
        """Select the rows ``indices`` and their first ``length`` positions."""
        if list(indices) == list(range(self.logits.shape[0])) and length == self.logits.shape[1]:
            return self
        chosen = mx.array(indices)
        logits, kept, uncovered = (
            None if a is None else a[chosen][:, :length]
            for a in (self.logits, self.kept, self.uncovered)
        )
        bias = self.bias and self.bias._replace(values=self.bias.values[chosen][:, :length])
        return Belief(
            logits,
            self.temperature[chosen],
            kept,
            uncovered,
            [min(self.counts[i], length) for i in indices],
            length == self.logits.shape[1],
            bias,
        )

    def scaled(self, positions: mx.array | None = None) -> mx.array:
        """The logits with their bias, divided by the temperature: [rows, length, vocabulary].

        With ``positions``, only those of all rows: [n, vocabulary].
        """
        logits, temperature = self.logits, self.temperature[:, None, None]
        if positions is not None:
            logits, temperature = (
                logits.flatten(0, 1)[positions],
                self.temperature[positions // logits.shape[1]][:, None],
            )
        if self.bias is None:
            return logits / temperature
        values = (
            self.bias.values if positions is None else self.bias.values.flatten(0, 1)[positions]
        )
        column_of = self.bias.column_of.reshape(*[1] * (values.ndim - 1), -1)
        return _scaled(logits, mx.take_along_axis(values, column_of, axis=-1), temperature)

    def top(self, row: int, count: int) -> tuple[mx.array, mx.array]:
        """The ids and log-probabilities [length, count] of the most probable tokens of a row, the
        most probable first.
        """
        length = self.logits.shape[1]
        scaled = self.scaled(mx.arange(row * length, (row + 1) * length))
        ids = largest(scaled, min(count, scaled.shape[-1]))
        logprobs = mx.take_along_axis(scaled, ids, axis=-1) - mx.logsumexp(
            scaled, axis=-1, keepdims=True
        )
        order = mx.argsort(-logprobs, axis=-1)
        found = (
            mx.take_along_axis(ids, order, axis=-1),
            mx.take_along_axis(logprobs, order, axis=-1),
        )
        mx.eval(found)  # otherwise they would keep the logits alive
        return found

    def scaled_kept(self) -> mx.array:
        """The scaled logits of the kept tokens [rows, length, KEPT]."""
        logits, temperature = (
            mx.take_along_axis(self.logits, self.kept, axis=-1),
            self.temperature[:, None, None],
        )
        if self.bias is None:
            return logits / temperature
        return _scaled(
            logits,
            mx.take_along_axis(self.bias.values, self.bias.column_of[self.kept], axis=-1),
            temperature,
        )


@partial(mx.compile, shapeless=True)
def _scaled(logits: mx.array, bias: mx.array, temperature: mx.array) -> mx.array:
    return (logits + bias) / temperature


def soft_embedding(model: DiffusionGemma, belief: Belief) -> mx.array:
    """The self-conditioning signal [rows, length, hidden]."""
    if (
        belief.kept is None
        or belief.uncovered is None
        or (belief.exact and sum(belief.counts) == belief.uncovered.size)
    ):
        return dense(model, belief.scaled())
    soft = sparse(model, belief.scaled_kept(), belief.kept)
    count, flat = sum(belief.counts), belief.uncovered.flatten()
    if not count:
        return soft
    # The uncovered positions come first.  Metal cannot sort booleans, so their bytes are sorted.
    taken = mx.argsort((~flat).view(mx.uint8))[: min(flat.size, _bucket(count))]
    exact = dense(model, belief.scaled(taken))
    covered = soft.flatten(0, 1)
    # Covered positions that fill the bucket keep their sparse value, so that no row depends on the
    # count of another.
    rows = mx.where(flat[taken][:, None], exact, covered[taken])
    order = mx.arange(taken.size, taken.size + flat.size)
    place = mx.put_along_axis(order, taken, mx.arange(taken.size), axis=0)
    return mx.concatenate((rows, covered))[place].reshape(soft.shape)


def _bucket(count: int) -> int:
    if count > BUCKET // 2:
        return -(-count // BUCKET) * BUCKET
    return max(SMALLEST, 1 << (count - 1).bit_length())


def dense(model: DiffusionGemma, scaled: mx.array) -> mx.array:
    """Mean embedding [..., hidden] under the softmax of the temperature-scaled logits ``scaled``
    [..., vocabulary].

    The reference rounds the scaled logits to the embedding dtype first; in bf16 this matters.
    """
    return model.soft_embed(mx.softmax(_rounded(model, scaled), axis=-1))


def sparse(model: DiffusionGemma, scaled: mx.array, kept: mx.array) -> mx.array:
    """Mean embedding [..., hidden] under the softmax over some tokens only.

    Args:
        model: The model with the embedding.
        scaled: The scaled logits [..., n] of the tokens.
        kept: The ids [..., n] of the tokens.
    """
    return model.soft_embed(mx.softmax(_rounded(model, scaled), axis=-1), kept)


def _rounded(model: DiffusionGemma, scaled: mx.array) -> mx.array:
    return scaled.astype(model.dtype).astype(mx.float32)
