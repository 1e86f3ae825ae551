"""What the backbone and the vision tower are both made of: norm, rotation, gated activation, attention in blocks of rows.

Pure functions of tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache, partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np

GELU_SLOPE = math.sqrt(2 / math.pi)
GELU_CUBE = 0.044715
VECTOR_ROWS = 8  # up to here Metal attends row by row
SCORES = 2**26  # attention scores that are held at once: 256 MB in float32


def rms_norm(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
    """``x / rms(x) * weight`` in the dtype of ``x``.

    MLX computes the norm itself in float32 whatever the dtype, and rounds before it multiplies by the weight.  Where more
    follows, the functions below take the norm without a weight and multiply in float32.
    Source: DiffusionGemmaRMSNorm (multiplies by the weight itself, not by one plus it).
    """
    return mx.fast.rms_norm(x, weight, eps)


class RMSNorm(nn.Module):
    def __init__(self, dims: int, eps: float):
        super().__init__()
        self.weight = mx.ones((dims,))
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        return rms_norm(x, self.weight, self.eps)


@partial(mx.compile, shapeless=True)
def add_scaled(x: mx.array, normed: mx.array, weight: mx.array) -> tuple[mx.array, mx.array]:
    """``x + normed * weight`` in the dtype of ``x``, and the same numbers in float32."""
    total = (x.astype(mx.float32) + normed.astype(mx.float32) * weight.astype(mx.float32)).astype(x.dtype)
    return total, total.astype(mx.float32)


@partial(mx.compile, shapeless=True)
def add_both(a: mx.array, weight_a: mx.array, b: mx.array, weight_b: mx.array) -> mx.array:
    """``a * weight_a + b * weight_b`` in float32."""
    return a.astype(mx.float32) * weight_a.astype(mx.float32) + b.astype(mx.float32) * weight_b.astype(mx.float32)


@partial(mx.compile, shapeless=True)
def add_and_scale(x: mx.array, normed: mx.array, weight: mx.array, scalar: mx.array) -> mx.array:
    """``(x + normed * weight) * scalar`` in the dtype of ``x``."""
    total = x.astype(mx.float32) + normed.astype(mx.float32) * weight.astype(mx.float32)
    return (total * scalar.astype(mx.float32)).astype(x.dtype)


@partial(mx.compile, shapeless=True)
def three_scaled(normed: mx.array, first: mx.array, second: mx.array, third: mx.array,
                 factor: float) -> tuple[mx.array, mx.array, mx.array]:
    """``normed`` times each of three weights, the last times ``factor`` too, in the dtype of the weights.

    MLX fuses only what one output depends on, so each output asks for the one before it in a choice that is never made.
    """
    always = mx.array(True)
    one = (normed * first.astype(mx.float32)).astype(first.dtype)
    two = mx.where(always, (normed * second.astype(mx.float32)).astype(first.dtype), one)
    three = mx.where(always, (normed * third.astype(mx.float32) * factor).astype(first.dtype), two)
    return one, two, three


@partial(mx.compile, shapeless=True)
def weigh(y: mx.array, weights: mx.array, scales: mx.array) -> mx.array:
    """Rows ``y`` [rows, n, hidden] times ``weights`` times ``scales`` [rows, n, 1], in float32."""
    return y.astype(mx.float32) * (weights * scales.astype(mx.float32))


@partial(mx.compile, shapeless=True)
def both_signs(x: mx.array) -> tuple[mx.array, mx.array]:
    """``x`` in float32, and its negative."""
    x = x.astype(mx.float32)
    return x, -x


@lru_cache
def rope_frequencies(theta: float, size: int) -> mx.array:
    """``theta ** -(2 i / size)`` for each pair i of a head of ``size``, [size / 2] float32.

    Made on the host, once for each shape of layer: one bit more or less in a power shows at long contexts, a GPU's power has
    such bits, and an operation on the CPU would make every forward wait.  The exponent is rounded to float32 as in the reference.
    """
    exponents = np.arange(0, size, 2).astype(np.float32) / np.float32(size)
    powers = np.power(np.float64(theta), exponents.astype(np.float64)).astype(np.float32)
    return mx.array(np.float32(1) / powers)


def apply_rope(x: mx.array, table: tuple[mx.array, mx.array]) -> mx.array:
    """Split-half rotation of [rows, heads, head_dim] in float32."""
    cos, sin = table
    first, second = mx.split(x.astype(mx.float32), 2, axis=-1)
    return mx.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1).astype(x.dtype)


@partial(mx.compile, shapeless=True)
def turn(x: mx.array, swapped: mx.array, weights: mx.array, swapped_weights: mx.array, head: mx.array,
         table: tuple[mx.array, mx.array], turned: int) -> tuple[mx.array, mx.array]:
    """Norm weights and rotation of all heads in one pass: in float32, and in the dtype of ``x``.

    Args:
        x: Normed rows [rows, heads, 2, head_dim / 2].
        swapped: The same with the two halves of each head exchanged.
        weights: Of the norms, in float32 [heads, 2, head_dim / 2].
        swapped_weights: The same with the halves exchanged.
        head: The number of each head, [heads, 1, 1].
        table: cos [rows, 1, 1, head_dim / 2] and (-sin, sin) [rows, 1, 2, head_dim / 2].
        turned: How many heads, the first, are turned.  The values after them are only weighted.
    """
    cos, sin = table
    scaled = x.astype(mx.float32) * weights
    rotated = scaled * cos + swapped.astype(mx.float32) * swapped_weights * sin
    wide = mx.where(head < turned, rotated, scaled)
    return wide, wide.astype(x.dtype)


@partial(mx.compile, shapeless=True)
def gated_gelu(gate: mx.array, up: mx.array) -> mx.array:
    """``gelu(gate) * up`` with the tanh form of GELU, rounded to the dtype of ``gate`` once, at the end.

    Written so that MLX fuses it into one kernel: at most eleven operations deep, and every broadcast of a scalar counts as one.
    The cube as two products takes half the time of MLX's own, which raises to a power.  Not by the faster sigmoid: its
    vectorised exponential rounds by the place in the array, and rows of a batch would differ from the same rows alone.
    """
    x = gate.astype(mx.float32)
    half = 0.5 * x * up.astype(mx.float32)
    inner = (mx.square(x) + 1 / GELU_CUBE) * (x * (GELU_SLOPE * GELU_CUBE))
    return (half * (1 + mx.tanh(inner))).astype(gate.dtype)


def rows_at_once(heads: int, width: int) -> int:
    """How many rows of queries to attend with in one block, when each sees up to ``width`` keys.

    Never a row alone: it would take other kernels and round differently.  On Metal more than that does, without an error: up to
    8 rows take the vector attention where the head size has one, and products of fewer than 6 to 33 rows, by chip and matrix,
    take the matrix-vector kernels.  A row in a small block may therefore differ there in the last bits from the same row in a
    large one.
    """
    return max(2, SCORES // (heads * width))


def is_fused(rows: int, heads: int, kv_heads: int, head_dim: int) -> bool:
    """Whether the GPU has one kernel for this attention, which keeps scores in float32 and reads K/V as they are.

    Source: has_fused_kernel and use_fallback of MLX's Metal backend.  Head size 512 has a kernel from 0.32.4 on, but only from
    some length on (``MLX_SDPA_D512_MIN_KL``), so it does not count here.
    """
    if mx.default_device() != mx.gpu:
        return False
    if rows <= VECTOR_ROWS:
        return head_dim in (64, 96, 128, 256) and rows * (heads // kv_heads) <= 32
    return head_dim in (64, 80, 128)


def attention(queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array | str | None) -> mx.array:
    """Attention at scale 1 with K/V of as many or of fewer heads, [1, heads, rows, head size].

    The same operations as MLX's own where it has no kernel, without the product with the scale.
    """
    heads, rows, head_dim = queries.shape[1:]
    kv_heads = keys.shape[1]
    if is_fused(rows, heads, kv_heads, head_dim):
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=1.0, mask=mask)
    if isinstance(mask, str):
        past = keys.shape[2] - rows
        mask = mx.arange(past, past + rows)[:, None] >= mx.arange(keys.shape[2])
    queries = queries.reshape(1, kv_heads, heads // kv_heads, rows, head_dim)
    scores = queries @ keys[:, :, None].swapaxes(-1, -2)
    if mask is not None:
        scores = mx.where(mask, scores, mx.finfo(scores.dtype).min)
    out = mx.softmax(scores, axis=-1, precise=True) @ values[:, :, None]
    return out.flatten(1, 2)


def attend_in_turn(parts: Iterable[tuple[mx.array, mx.array, mx.array, mx.array | str | None]]) -> mx.array:
    """Attention at scale 1 of blocks of rows, one block after the other: [1, heads, all rows, head size].

    ``parts`` are (queries, keys, values, mask).  MLX takes branches of a graph that do not depend on each other side by side and
    would hold the scores of all blocks at once; here each block waits for the one before.
    """
    done: list[mx.array] = []
    for queries, keys, values, mask in parts:
        if done:
            (queries,) = mx.depends([queries], [done[-1]])
        done.append(attention(queries, keys, values, mask))
    return done[0] if len(done) == 1 else mx.concatenate(done, axis=2)
