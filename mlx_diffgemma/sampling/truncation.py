"""Truncation of a distribution by top_k, top_p and min_p, without sorting the vocabulary.

Each of the three keeps the tokens whose weight is at least some threshold.  So together they keep
the tokens that reach the highest of the three thresholds.  Tokens with equal weights are kept or
dropped together.  The thresholds are:

- top_k: the largest threshold that at least k tokens reach (more than k if weights are equal, as in
  transformers);
- top_p: the largest threshold below which at most 1 - p of the total lies;
- min_p: the share min_p of the largest weight.

Weights may have any total.  The search finds a threshold bit by bit, most significant first.  For
floats of one sign, the order of the bit patterns is the order of the numbers, so 31 comparisons
find it exactly.  A comparison needs the count and the sum of the weights below a threshold.  Both
are read from slices of the vocabulary.  Each slice is sorted on its own, which a GPU does in one
pass.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

SLICE = 2048  # tokens that are sorted together; Metal sorts up to 4,096 in one pass
BLOCK = 32  # tokens of a slice between two of its coarse marks
BITS = 31  # the bits of a float32 without its sign


class Ranked:
    """Nonnegative weights [..., vocabulary], sorted slice by slice.

    So the count and the sum of the weights below a threshold are cheap to compute.
    """

    def __init__(self, weights: mx.array) -> None:
        missing = -weights.shape[-1] % SLICE
        if missing:  # padded with values that lie below no threshold
            weights = mx.pad(
                weights, [(0, 0)] * (weights.ndim - 1) + [(0, missing)], constant_values=mx.inf
            )
        rising = mx.sort(weights.reshape(*weights.shape[:-1], -1, SLICE), axis=-1)
        self.blocks = rising.reshape(*rising.shape[:-1], SLICE // BLOCK, BLOCK)
        self.marks = self.blocks[..., 0]
        self.sums = mx.cumsum(rising, axis=-1)

    def count(self, threshold: mx.array) -> mx.array:
        """The number [...] of weights below the ``threshold`` [...]."""
        return self._counts(threshold).sum(axis=-1)

    def mass(self, threshold: mx.array) -> mx.array:
        """The sum [...] of the weights below the ``threshold`` [...]."""
        counts = self._counts(threshold)
        sums = mx.take_along_axis(self.sums, mx.maximum(counts - 1, 0)[..., None], axis=-1)[..., 0]
        return mx.where(counts > 0, sums, 0.0).sum(axis=-1)

    def _counts(self, threshold: mx.array) -> mx.array:
        """The number [..., slices] of weights of each slice below the ``threshold`` [...]."""
        threshold = threshold[..., None, None]
        full = mx.maximum(
            (self.marks < threshold).sum(axis=-1) - 1, 0
        )  # blocks before the one that holds the last of them
        last = mx.take_along_axis(self.blocks, full[..., None, None], axis=-2)[..., 0, :]
        return full * BLOCK + (last < threshold).sum(axis=-1)


def largest_threshold(below: Callable[[mx.array], mx.array], most: mx.array) -> mx.array:
    """The largest threshold [...] for which ``below`` is at most ``most`` [...].

    Args:
        below: A measure of the weights below thresholds [...]; 0 for the threshold 0.
        most: The most that may be dropped.
    """
    bits = mx.zeros(most.shape, dtype=mx.int32)
    for bit in reversed(range(BITS)):
        higher = bits + (1 << bit)
        bits = mx.where(below(higher.view(mx.float32)) <= most, higher, bits)
    return bits.view(mx.float32)


def of_all(
    weights: mx.array, total: mx.array, top_k: mx.array | None, top_p: mx.array | None
) -> mx.array:
    """The least weight [batch, length] that top_k and top_p keep, for any k and p.

    Args:
        weights: [batch, length, vocabulary], nonnegative.
        total: [batch, length] their sums.
        top_k: [batch], 0 where it is off.
        top_p: [batch], 1 where it is off.
    """
    ranked = Ranked(weights)
    threshold = mx.zeros(total.shape)
    if top_k is not None:
        kept = mx.broadcast_to(top_k[:, None], total.shape)
        found = largest_threshold(ranked.count, mx.maximum(weights.shape[-1] - kept, 0))
        threshold = mx.maximum(threshold, mx.where(kept > 0, found, 0.0))
    if top_p is not None:
        share = top_p[:, None]
        found = largest_threshold(ranked.mass, (1 - share) * total)
        threshold = mx.maximum(threshold, mx.where(share < 1, found, 0.0))
    return threshold


def of_candidates(
    candidates: mx.array, total: mx.array, top_k: mx.array, top_p: mx.array | None
) -> mx.array:
    """The result of ``of_all``, computed from the largest weights only.

    Args:
        candidates: The largest weights [batch, length, n].
        total: The sums [batch, length] of all weights.
        top_k: [batch], with 0 < top_k <= n.
        top_p: [batch], 1 where it is off.
    """
    falling = -mx.sort(-candidates, axis=-1)
    last = mx.clip(top_k.astype(mx.int32) - 1, 0, falling.shape[-1] - 1)[:, None, None]
    threshold = mx.take_along_axis(falling, mx.broadcast_to(last, (*total.shape, 1)), axis=-1)[
        ..., 0
    ]
    if top_p is None:
        return threshold
    share = top_p[:, None]
    held = mx.cumsum(falling, axis=-1) >= (share * total)[..., None]
    nucleus = mx.take_along_axis(falling, mx.argmax(held, axis=-1)[..., None], axis=-1)[..., 0]
    # A nucleus that is larger than the candidates is also larger than the k most probable tokens.
    return mx.maximum(threshold, mx.where(held.any(axis=-1) & (share < 1), nucleus, 0.0))
