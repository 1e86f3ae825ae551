"""What the backbone and the vision tower are both made of: norm, rotation, gated activation, attention in blocks of rows.

Pure functions of tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial

import mlx.core as mx
import mlx.nn as nn

GELU_SLOPE = math.sqrt(2 / math.pi)
SCORES = 2**26  # attention scores that are held at once: 256 MB in float32


def rms_norm(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
    """``x / rms(x) * weight`` in float32 whatever the dtype of ``x``, which the result has again.

    Source: DiffusionGemmaRMSNorm (multiplies by the weight itself, not by one plus it).
    """
    scale = None if weight is None else weight.astype(mx.float32)
    return mx.fast.rms_norm(x.astype(mx.float32), scale, eps).astype(x.dtype)


class RMSNorm(nn.Module):
    def __init__(self, dims: int, eps: float):
        super().__init__()
        self.weight = mx.ones((dims,))
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        return rms_norm(x, self.weight, self.eps)


def apply_rope(x: mx.array, table: tuple[mx.array, mx.array]) -> mx.array:
    """Split-half rotation of [rows, heads, head_dim] in float32."""
    cos, sin = table
    first, second = mx.split(x.astype(mx.float32), 2, axis=-1)
    return mx.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1).astype(x.dtype)


@partial(mx.compile, shapeless=True)
def gated_gelu(gate: mx.array, up: mx.array) -> mx.array:
    """``gelu(gate) * up`` with the tanh form of GELU, rounded to the dtype of ``gate`` once, at the end.

    The cube as two products takes half the time of MLX's own, which raises to a power.  Not by the faster sigmoid: its
    vectorised exponential rounds by the place in the array, and rows of a batch would differ from the same rows alone.
    """
    x = gate.astype(mx.float32)
    return (0.5 * x * (1 + mx.tanh(GELU_SLOPE * (x + 0.044715 * x * x * x))) * up.astype(mx.float32)).astype(gate.dtype)


def rows_at_once(heads: int, width: int) -> int:
    """How many rows of queries to attend with in one block, when each sees up to ``width`` keys; never a row alone, which would
    take other kernels and round differently.  On Metal up to 8 rows do, so a last block that short rounds differently there."""
    return max(2, SCORES // (heads * width))


def attend_in_turn(parts: Iterable[tuple[mx.array, mx.array, mx.array, mx.array | str | None]]) -> mx.array:
    """Attention at scale 1 of blocks of rows, one block after the other: [1, heads, all rows, head size].

    ``parts`` are (queries, keys, values, mask).  MLX takes branches of a graph that do not depend on each other side by side and
    would hold the scores of all blocks at once; here each block waits for the one before.
    """
    done: list[mx.array] = []
    for queries, keys, values, mask in parts:
        if done:
            (queries,) = mx.depends([queries], [done[-1]])
        done.append(mx.fast.scaled_dot_product_attention(queries, keys, values, scale=1.0, mask=mask))
    return done[0] if len(done) == 1 else mx.concatenate(done, axis=2)
