"""The operations that the backbone, the vision tower and the drafter share.

They are norm, rotation, gated activation, and attention in blocks of rows.  Everything here is a
pure function of tensors, apart from the module :class:`RMSNorm`.
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
VECTOR_ROWS = 8  # up to this many rows, Metal attends row by row
SCORES = 2**26  # attention scores that are held at once: 256 MB in float32


def rms_norm(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
    """``x / rms(x) * weight`` in the dtype of ``x``.

    MLX computes the norm itself in float32 for every dtype, and rounds before it multiplies by the
    weight.  Where more operations follow, the functions below take the norm without a weight and
    multiply in float32.  Source: DiffusionGemmaRMSNorm, which multiplies by the weight itself, not
    by one plus the weight.
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
    total = x.astype(mx.float32) + normed.astype(mx.float32) * weight.astype(mx.float32)
    total = total.astype(x.dtype)
    return total, total.astype(mx.float32)


@partial(mx.compile, shapeless=True)
def add_both(a: mx.array, weight_a: mx.array, b: mx.array, weight_b: mx.array) -> mx.array:
    """``a * weight_a + b * weight_b`` in float32."""
    weighted_a = a.astype(mx.float32) * weight_a.astype(mx.float32)
    weighted_b = b.astype(mx.float32) * weight_b.astype(mx.float32)
    return weighted_a + weighted_b


@partial(mx.compile, shapeless=True)
def add_and_scale(x: mx.array, normed: mx.array, weight: mx.array, scalar: mx.array) -> mx.array:
    """``(x + normed * weight) * scalar`` in the dtype of ``x``."""
    total = x.astype(mx.float32) + normed.astype(mx.float32) * weight.astype(mx.float32)
    return (total * scalar.astype(mx.float32)).astype(x.dtype)


@partial(mx.compile, shapeless=True)
def three_scaled(
    normed: mx.array, first: mx.array, second: mx.array, third: mx.array, factor: float
) -> tuple[mx.array, mx.array, mx.array]:
    """Multiply ``normed`` by each of three weights, in the dtype of the weights.

    The third product is also multiplied by ``factor``.  MLX fuses only what one output depends on.
    Each output therefore depends on the one before it, through a choice that never takes it.
    """
    always = mx.array(True)
    by_first = (normed * first.astype(mx.float32)).astype(first.dtype)
    by_second = (normed * second.astype(mx.float32)).astype(first.dtype)
    by_second = mx.where(always, by_second, by_first)
    by_third = (normed * third.astype(mx.float32) * factor).astype(first.dtype)
    by_third = mx.where(always, by_third, by_second)
    return by_first, by_second, by_third


@partial(mx.compile, shapeless=True)
def weigh(y: mx.array, weights: mx.array, scales: mx.array) -> mx.array:
    """Multiply rows ``y`` [rows, n, hidden] by ``weights`` and ``scales`` [rows, n, 1], in float32."""
    return y.astype(mx.float32) * (weights * scales.astype(mx.float32))


@partial(mx.compile, shapeless=True)
def both_signs(x: mx.array) -> tuple[mx.array, mx.array]:
    """``x`` in float32, and its negative."""
    x = x.astype(mx.float32)
    return x, -x


@lru_cache
def rope_frequencies(theta: float, size: int) -> mx.array:
    """``theta ** -(2 i / size)`` for each pair i of a head of ``size``, [size / 2] float32.

    It is computed on the host, once for each shape of layer.  One wrong bit in a power shows at
    long contexts, and a GPU's power has such bits; an operation on the CPU would make every forward
    wait. The exponent is rounded to float32 as in the reference.
    """
    exponents = np.arange(0, size, 2).astype(np.float32) / np.float32(size)
    powers = np.power(np.float64(theta), exponents.astype(np.float64)).astype(np.float32)
    return mx.array(np.float32(1) / powers)


def apply_rope(x: mx.array, table: tuple[mx.array, mx.array]) -> mx.array:
    """Split-half rotation of [rows, heads, head_dim] in float32."""
    cos, sin = table
    first, second = mx.split(x.astype(mx.float32), 2, axis=-1)
    return mx.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1).astype(
        x.dtype
    )


@partial(mx.compile, shapeless=True)
def turn(
    x: mx.array,
    swapped: mx.array,
    weights: mx.array,
    swapped_weights: mx.array,
    head: mx.array,
    table: tuple[mx.array, mx.array],
    turned: int,
) -> tuple[mx.array, mx.array]:
    """Apply the norm weights and the rotation to all heads in one pass.

    Args:
        x: Normed rows [rows, heads, 2, head_dim / 2].
        swapped: The same with the two halves of each head exchanged.
        weights: The norm weights in float32 [heads, 2, head_dim / 2].
        swapped_weights: The same with the halves exchanged.
        head: The number of each head, [heads, 1, 1].
        table: cos [rows, 1, 1, head_dim / 2] and (-sin, sin) [rows, 1, 2, head_dim / 2].
        turned: How many heads, from the first, are turned.  The rest, the values, are only
            weighted.

    Returns:
        The result in float32, and the same in the dtype of ``x``.
    """
    cos, sin = table
    scaled = x.astype(mx.float32) * weights
    rotated = scaled * cos + swapped.astype(mx.float32) * swapped_weights * sin
    wide = mx.where(head < turned, rotated, scaled)
    return wide, wide.astype(x.dtype)


@partial(mx.compile, shapeless=True)
def gated_gelu(gate: mx.array, up: mx.array) -> mx.array:
    """``gelu(gate) * up`` with the tanh form of GELU, rounded once, at the end, to the dtype of
    ``gate``.

    MLX fuses it into one kernel: it is at most eleven operations deep, and every broadcast of a
    scalar counts as one.  The cube is two products, which take half the time of MLX's own form with
    a power. The faster sigmoid is not used: its vectorised exponential rounds by the place in the
    array, and rows of a batch would differ from the same rows alone.
    """
    x = gate.astype(mx.float32)
    half = 0.5 * x * up.astype(mx.float32)
    inner = (mx.square(x) + 1 / GELU_CUBE) * (x * (GELU_SLOPE * GELU_CUBE))
    return (half * (1 + mx.tanh(inner))).astype(gate.dtype)


@partial(mx.compile, shapeless=True)
def soft_cap(logits: mx.array, cap: mx.array) -> mx.array:
    """``cap * tanh(logits / cap)`` in float32, in one pass over the vocabulary.

    An overflow becomes NaN; the cap alone would turn it into a confident token.
    """
    logits = logits.astype(mx.float32)
    return mx.where(mx.isfinite(logits), mx.tanh(logits / cap) * cap, mx.nan)


def rows_at_once(heads: int, width: int) -> int:
    """How many rows of queries attend in one block, when each sees up to ``width`` keys.

    A block never has one row: a single row would use other kernels and round differently.  On Metal
    small blocks round differently too.  Up to 8 rows use the vector attention where the head size
    has one. Products of fewer than 6 to 33 rows, by chip and matrix, use the matrix-vector kernels.
    On Metal a row in a small block may therefore differ in the last bits from the same row in a
    large one.
    """
    return max(2, SCORES // (heads * width))


def is_fused(rows: int, heads: int, kv_heads: int, head_dim: int) -> bool:
    """Whether the GPU has one kernel for this attention.

    Such a kernel keeps its scores in float32 and reads K/V in their own dtype.

    Source: has_fused_kernel and use_fallback of MLX's Metal backend.  Head size 512 has a kernel
    from version 0.32.4, but only from a certain length (``MLX_SDPA_D512_MIN_KL``), so it does not
    count here.

    Args:
        rows: The rows of queries.
        heads: The query heads.
        kv_heads: The KV heads.
        head_dim: The head size.
    """
    if mx.default_device() != mx.gpu:
        return False
    if rows <= VECTOR_ROWS:
        return head_dim in (64, 96, 128, 256) and rows * (heads // kv_heads) <= 32
    return head_dim in (64, 80, 128)


def attention(
    queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array | str | None
) -> mx.array:
    """Attention at scale 1; the operations of MLX's own fallback, without the product with the scale.

    Args:
        queries: [1, heads, rows, head size]
        keys: [1, KV heads, keys, head size]; the heads are a multiple of the KV heads.
        values: The same shape as ``keys``.
        mask: None, ``"causal"``, or a boolean array [rows, keys], True where a key is seen.

    Returns:
        [1, heads, rows, head size]
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


def attend_in_turn(
    parts: Iterable[tuple[mx.array, mx.array, mx.array, mx.array | str | None]],
) -> mx.array:
    """Attention at scale 1 for blocks of rows, one block after the other.

    MLX may evaluate independent branches of a graph side by side, and would then hold the scores of
    all blocks at once.  Here each block waits for the one before.

    Args:
        parts: (queries, keys, values, mask) of each block.

    Returns:
        [1, heads, rows of all blocks, head size]
    """
    done: list[mx.array] = []
    for queries, keys, values, mask in parts:
        if done:
            (queries,) = mx.depends([queries], [done[-1]])
        done.append(attention(queries, keys, values, mask))
    return done[0] if len(done) == 1 else mx.concatenate(done, axis=2)
