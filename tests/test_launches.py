"""Kernels that a GPU would start, counted in graphs at the released widths that are never
evaluated, and what K/V cost there.
"""

from dataclasses import replace

import launches
import mlx.core as mx
import pytest

from mlx_diffgemma.model import layers
from mlx_diffgemma.model.attention import Attention, Segment, rope_table
from mlx_diffgemma.model.cache import Cache
from mlx_diffgemma.model.config import released_config

# Of two layers, a sliding and a full one; each further sliding layer adds PER_LAYER.  A count that
# falls is a new limit.
LIMITS = {
    "forward and sampler": (202, 13),
    "step": (235, 20),
    "step with commit": (270, 22),
    "token left to right": (92, 3),
}
PER_LAYER = {"forward and sampler": 42, "token left to right": 33}


@pytest.fixture(scope="module")
def counts():
    with launches.as_on_metal():
        return [
            launches.our_counts(launches.lazy_model(launches.shortened(layers), "4bit"), 1200)
            for layers in (2, 3)
        ]


@pytest.mark.parametrize("name", LIMITS)
def test_no_more_kernels(counts, name):
    found, (kernels, casts) = counts[0][name], LIMITS[name]
    assert found.kernels <= kernels, found.primitives
    assert found.casts <= casts


@pytest.mark.parametrize("name", PER_LAYER)
def test_no_more_kernels_a_layer(counts, name):
    assert counts[1][name].kernels - counts[0][name].kernels <= PER_LAYER[name]


def rows(*shape, dtype=mx.bfloat16):
    made = mx.random.normal(shape).astype(dtype)
    mx.eval(made)
    return made


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32], ids=str)
@pytest.mark.parametrize(
    "name",
    ["gated_gelu", "add_scaled", "add_both", "add_and_scale", "three_scaled", "weigh", "turn"],
)
def test_each_is_one_kernel(name, dtype):
    x, weight, wide = rows(5, 16, dtype=dtype), rows(16, dtype=dtype), rows(5, 16, dtype=mx.float32)
    halves, weights = rows(5, 6, 2, 8, dtype=dtype), rows(6, 2, 8, dtype=mx.float32)
    table = rows(5, 1, 1, 8, dtype=mx.float32), rows(5, 1, 2, 8, dtype=mx.float32)
    heads = mx.arange(6)[:, None, None]
    mx.eval(heads)
    arguments = {
        "gated_gelu": (x, x),
        "add_scaled": (x, x, weight),
        "add_both": (x, weight, wide, weight),
        "add_and_scale": (x, wide, weight, weight[:1]),
        "three_scaled": (wide, weight, weight, weight, 0.5),
        "weigh": (x[:, None], wide[:, :1, None], x[:, :1, None]),
        "turn": (halves, halves[:, :, ::-1], weights, weights, heads, table, 4),
    }
    out = getattr(layers, name)(*arguments[name])
    found = launches.primitives(out if isinstance(out, tuple) else [out])
    assert (
        sum(number for primitive, number in found.items() if primitive not in launches.VIEWS) == 1
    ), found


def test_keys_and_values_are_cast_once(monkeypatch):
    """bfloat16 K/V of 16k positions in float32 stand in memory once, however many blocks the rows
    make.
    """
    config = released_config().text
    full = replace(next(layer for layer in config.layers if layer.window is None), head_dim=32)
    text = replace(config, layers=(full,), hidden_size=64, num_attention_heads=full.num_kv_heads)
    attention = Attention(text, full)
    attention.set_dtype(mx.bfloat16)
    context, length = 16_384, 10
    monkeypatch.setattr(
        layers, "SCORES", 2 * attention.heads * (context + length)
    )  # two rows a block
    cache = Cache(text)
    entries = mx.zeros((2, full.num_kv_heads, context, full.head_dim), dtype=mx.bfloat16)
    cache.add(0, entries)
    cache.advance(context)
    x, table = rows(length, 64), rope_table(mx.arange(context, context + length), full)
    mx.eval(attention.parameters(), cache.arrays, table)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(attention(x, table, [Segment(0, length, cache, canvas=True)], 0))
    once = 2 * entries.nbytes
    together = (
        entries.nbytes + once
    )  # in the cache's dtype with the canvas at the end, and in float32
    assert once < mx.get_peak_memory() - before < together + once / 4
