"""Checks of the operations of a layer: activation, norm, rotation, attention, cache writes."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from mlx_diffgemma.diagnostics.operations.checks import Checks, Result, float64
from mlx_diffgemma.model.attention import rope_table
from mlx_diffgemma.model.config import LayerConfig, released_config
from mlx_diffgemma.model.layers import apply_rope, attend_in_turn, gated_gelu, rms_norm


def elementwise(checks: Checks) -> Iterator[Result]:
    """Check activation, norm and rotation, in each dtype."""
    sizes = checks.sizes
    for dtype in (mx.float32, mx.bfloat16, mx.float16):
        name = str(dtype).removeprefix("mlx.core.")
        bound = 2e-6 if dtype == mx.float32 else 5e-3
        gate = mx.array(checks.normal(64, sizes.inner, scale=3.0)).astype(dtype)
        up = mx.array(checks.normal(64, sizes.inner, scale=3.0)).astype(dtype)
        x = float64(gate)
        gelu = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) * float64(up)
        yield checks.near(f"gated GELU in {name}", gated_gelu(gate, up), gelu, bound)
        rows = mx.array(checks.normal(64, sizes.hidden)).astype(dtype)
        weight = mx.array(checks.normal(sizes.hidden)).astype(dtype)
        host = float64(rows)
        normed = host / np.sqrt((host**2).mean(axis=-1, keepdims=True) + 1e-6)
        scaled = normed * float64(weight)
        yield checks.near(f"norm in {name}", rms_norm(rows, weight, 1e-6), scaled, bound)
        unscaled = rms_norm(rows, None, 1e-6)
        yield checks.near(f"norm without weight in {name}", unscaled, normed, bound)
    for layer in sorted(set(released_config().text.layers), key=lambda layer: layer.head_dim):
        yield from _rotation(checks, layer)


def _rotation(checks: Checks, layer: LayerConfig) -> Iterator[Result]:
    """Check the table of angles, and the rotation by one of them."""
    name = f"heads of {layer.head_dim}"
    half = layer.head_dim // 2
    positions = np.array([0, 1, 4095, 65_537, 262_143])
    pairs = np.arange(half)
    exponents = (2 * pairs).astype(np.float32) / np.float32(layer.head_dim)
    power = np.power(layer.rope_theta, exponents.astype(np.float64))
    inverse = np.float32(1) / power.astype(np.float32)
    frequencies = np.where(pairs < layer.rotated, inverse, np.float32(0)).astype(np.float32)
    # The angle is a product of float32 numbers in the reference too.
    angles = (positions.astype(np.float32)[:, None] * frequencies).astype(np.float64)
    cos, sin = (
        np.array(part).reshape(len(positions), -1)[:, -half:]
        for part in rope_table(mx.array(positions), layer)
    )
    table = np.stack((cos, sin), axis=1)
    expected = np.stack((np.cos(angles), np.sin(angles)), axis=1)
    # A frequency whose last bit is wrong turns position 4,095 by 5e-4 and position 262,143 by 3e-2.
    yield checks.near(f"angles of {name}, to position 4,095", table[:3], expected[:3], 5e-4)
    yield checks.near(f"angles of {name}, to position 262,143", table, expected, 4e-2)
    x = checks.normal(len(positions), 2, layer.head_dim)
    first, second = np.split(x.astype(np.float64), 2, axis=-1)
    cos64, sin64 = (part[:, None].astype(np.float64) for part in (cos, sin))
    turned = np.concatenate(
        (first * cos64 - second * sin64, second * cos64 + first * sin64), axis=-1
    )
    rotated = apply_rope(mx.array(x), (mx.array(cos)[:, None], mx.array(sin)[:, None]))
    yield checks.near(f"rotation of {name}", rotated, turned, 2e-6)


def attention(checks: Checks) -> Iterator[Result]:
    """Check attention in float32.  Few rows use MLX's vector kernels, many rows its matrix kernels."""
    for size, kv_heads, cases in checks.sizes.attention:
        for rows, keys in cases:
            q, k, v = (
                mx.array(checks.normal(1, heads, count, size, scale=0.3))
                for heads, count in ((16, rows), (kv_heads, keys), (kv_heads, keys))
            )
            some = checks.some(rows)
            for kind in ("none", "causal", "a mask"):
                seen = checks.rng.random((rows, keys)) > 0.3
                mask = {
                    "none": None,
                    "causal": "causal" if rows > 1 else None,
                    "a mask": mx.array(seen),
                }[kind]
                if kind == "causal":
                    seen = np.arange(keys)[None] <= np.arange(rows)[:, None] + keys - rows
                expected = _attention(q, k, v, None if kind == "none" else seen, some)
                computed = np.array(attend_in_turn([(q, k, v, mask)]))[0][:, some]
                name = f"attention, heads of {size}, {rows} rows, {keys} keys, mask: {kind}"
                yield checks.near(name, computed, expected, 2e-3)


def _attention(
    q: mx.array, k: mx.array, v: mx.array, seen: np.ndarray | None, some: np.ndarray
) -> np.ndarray:
    """Attention in float64 at scale 1.

    Args:
        q: Queries [1, heads, rows, size].
        k: Keys [1, KV heads, keys, size].
        v: Values, as the keys.
        seen: [rows, keys], True where a row sees a key.  None: everywhere.
        some: The rows to compute.

    Returns:
        [heads, some, size].
    """
    keys = float64(k)[0]
    values = float64(v)[0]
    heads = q.shape[1]
    size = q.shape[3]
    # Query heads that share a key head count as further rows of it.
    shared = heads // k.shape[1] * len(some)
    queries = np.array(q)[0][:, some].astype(np.float64).reshape(-1, shared, size)
    scores = queries @ keys.transpose(0, 2, 1)
    if seen is not None:
        visible = np.broadcast_to(seen[some], (heads, len(some), seen.shape[1]))
        scores = np.where(visible.reshape(scores.shape), scores, -1e30)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    out: np.ndarray = weights / weights.sum(axis=-1, keepdims=True) @ values
    return out.reshape(heads, len(some), size)


def cache_writes(checks: Checks) -> Iterator[Result]:
    """Check writes at a position of arrays that have room left."""
    size = checks.sizes.attention[-1][0]
    for dtype in (mx.float32, mx.bfloat16):
        room = mx.zeros((1, 2, 2048, size), dtype=dtype)
        new = mx.array(checks.normal(1, 2, 256, size)).astype(dtype)
        mx.eval(room, new)
        expected = np.zeros(room.shape)
        for start in (0, 300, 1792):
            room = mx.slice_update(room, new, mx.array([start]), axes=[2])
            expected[:, :, start : start + 256] = float64(new)
        name = f"cache writes in {str(dtype).removeprefix('mlx.core.')}"
        yield checks.equal(name, float64(room), expected)
