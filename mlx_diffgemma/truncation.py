"""The least weight that top_k, top_p and min_p leave in a distribution, found without sorting the vocabulary.

Each of the three keeps the tokens whose weight is at least some threshold, so all of them together keep those that reach the
highest of the three.  Tokens with equal weights are kept or dropped together:

- top_k: the largest threshold that at least k tokens reach (more than k where weights are equal, as in transformers);
- top_p: the largest threshold below which lies at most 1 - p of the total;
- min_p: that share of the largest weight.

Weights may have any total.  A threshold is searched by its bits, most significant first: for floats of one sign the order of
the bit patterns is the order of the numbers, so 31 comparisons find it exactly.  What a comparison needs, the count and the
sum of the weights below a threshold, is read off slices of the vocabulary that are sorted each for itself, which a GPU
does in one pass.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

SLICE = 2048  # tokens that are sorted together; Metal sorts up to 4,096 in one pass
BLOCK = 32  # tokens of a slice between two of its coarse marks
BITS = 31  # of a float32 without its sign


class Ranked:
    """Weights [..., vocabulary], none negative, sorted slice by slice so that what lies below a threshold is cheap to tell."""

    def __init__(self, weights: mx.array) -> None:
        missing = -weights.shape[-1] % SLICE
        if missing:  # filled up with what lies below no threshold
            weights = mx.pad(weights, [(0, 0)] * (weights.ndim - 1) + [(0, missing)], constant_values=mx.inf)
        rising = mx.sort(weights.reshape(*weights.shape[:-1], -1, SLICE), axis=-1)
        self.blocks = rising.reshape(*rising.shape[:-1], SLICE // BLOCK, BLOCK)
        self.marks = self.blocks[..., 0]
        self.sums = mx.cumsum(rising, axis=-1)

    def count(self, threshold: mx.array) -> mx.array:
        """[...] how many weights lie below the ``threshold`` [...]."""
        return self._counts(threshold).sum(axis=-1)

    def mass(self, threshold: mx.array) -> mx.array:
        """[...] the sum of the weights that lie below the ``threshold`` [...]."""
        counts = self._counts(threshold)
        sums = mx.take_along_axis(self.sums, mx.maximum(counts - 1, 0)[..., None], axis=-1)[..., 0]
        return mx.where(counts > 0, sums, 0.0).sum(axis=-1)

    def _counts(self, threshold: mx.array) -> mx.array:
        """[..., slices] how many weights of each slice lie below the ``threshold`` [...]."""
        threshold = threshold[..., None, None]
        full = mx.maximum((self.marks < threshold).sum(axis=-1) - 1, 0)  # blocks before that in which the last of them is
        last = mx.take_along_axis(self.blocks, full[..., None, None], axis=-2)[..., 0, :]
        return full * BLOCK + (last < threshold).sum(axis=-1)


def largest_threshold(below: Callable[[mx.array], mx.array], most: mx.array) -> mx.array:
    """[...] the largest threshold for which ``below`` is at most ``most`` [...].

    Args:
        below: a measure of the weights below thresholds [...]; 0 for the threshold 0.
        most: what may be dropped.
    """
    bits = mx.zeros(most.shape, dtype=mx.int32)
    for bit in reversed(range(BITS)):
        higher = bits + (1 << bit)
        bits = mx.where(below(higher.view(mx.float32)) <= most, higher, bits)
    return bits.view(mx.float32)


def of_all(weights: mx.array, total: mx.array, top_k: mx.array | None, top_p: mx.array | None) -> mx.array:
    """[batch, length] the least weight that top_k and top_p keep, for any k and p.

    Args:
        weights: [batch, length, vocabulary], none negative.
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


def of_candidates(candidates: mx.array, total: mx.array, top_k: mx.array, top_p: mx.array | None) -> mx.array:
    """As ``of_all``, from the largest weights alone ``candidates`` [batch, length, n], where 0 < top_k <= n."""
    falling = -mx.sort(-candidates, axis=-1)
    last = mx.clip(top_k.astype(mx.int32) - 1, 0, falling.shape[-1] - 1)[:, None, None]
    threshold = mx.take_along_axis(falling, mx.broadcast_to(last, (*total.shape, 1)), axis=-1)[..., 0]
    if top_p is None:
        return threshold
    share = top_p[:, None]
    held = mx.cumsum(falling, axis=-1) >= (share * total)[..., None]
    nucleus = mx.take_along_axis(falling, mx.argmax(held, axis=-1)[..., None], axis=-1)[..., 0]
    # A nucleus that is larger than the candidates is larger than the k most probable tokens too.
    return mx.maximum(threshold, mx.where(held.any(axis=-1) & (share < 1), nucleus, 0.0))
