"""The self-check of operations: sound here, and each kind of fault is named by the section it
belongs to.
"""

import dataclasses

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma.diagnostics.operations import layers as checked_layers
from mlx_diffgemma.diagnostics.operations.checks import RELEASED, SMALL, Checks
from mlx_diffgemma.diagnostics.selfcheck import SECTIONS, run, run_section
from mlx_diffgemma.model import attention, layers
from mlx_diffgemma.sampling import sampler


def failed(section, sizes=SMALL):
    return [
        result.name
        for result in run_section(section, SECTIONS[section], Checks(sizes, mx.float32))
        if not result.ok
    ]


def test_this_machine_computes_right():
    results = run(SMALL)
    assert [result for result in results if not result.ok] == []
    assert {result.section for result in results} == set(SECTIONS)
    assert len(results) > 150
    # Errors far below their bounds on this backend: none of the bounds is at its edge.
    assert all(result.error < 0.8 * result.bound for result in results if result.bound)


def test_the_released_sizes_are_the_released_models():
    text = model_config().text
    assert (RELEASED.vocabulary, RELEASED.hidden, RELEASED.inner) == (
        text.vocab_size,
        text.hidden_size,
        text.intermediate_size,
    )
    assert (RELEASED.expert_inner, RELEASED.experts) == (
        text.moe_intermediate_size,
        text.num_experts,
    )
    heads = {(layer.head_dim, layer.num_kv_heads) for layer in text.layers}
    assert {(size, kv) for size, kv, _ in RELEASED.attention} == heads
    assert text.num_attention_heads == 16
    assert {32_800, 40_002} <= set(RELEASED.expert_rows), "above 32,768 and no multiples of 64"


def model_config():
    from mlx_diffgemma.model.config import released_config

    return released_config()


def wrong(monkeypatch, module, name, change):
    """``module.name`` whose results are changed."""
    right = getattr(module, name)
    monkeypatch.setattr(
        module, name, lambda *args, **kwargs: change(right(*args, **kwargs), *args, **kwargs)
    )


def missing_kernel(*_, **__):
    raise RuntimeError(
        "[metal::Device] Unable to load kernel carg_block_sort_bool_uint32_bn256_tn4"
    )


# (section, where, name, what becomes of its result, part of the name of a check that must fail)
FAULTS = {
    "the last of equals": (
        "ordering",
        mx,
        "argmax",
        lambda out, *a, **k: out + 1,
        "argmax takes the first of equals",
    ),
    "an unstable sort": (
        "ordering",
        mx,
        "argsort",
        lambda out, *a, **k: out[..., ::-1],
        "argsort is stable",
    ),
    "a sort that loses entries": (
        "ordering",
        mx,
        "sort",
        lambda out, *a, **k: out.at[..., 70].multiply(0),
        "sort of the vocabulary",
    ),
    "NaN that becomes a number": (
        "ordering",
        mx,
        "isfinite",
        lambda out, *a: mx.ones_like(out),
        "isfinite sees NaN",
    ),
    "maximum that drops NaN": (
        "ordering",
        mx,
        "maximum",
        lambda out, *a: mx.where(mx.isnan(out), 0.0, out),
        "maximum passes NaN",
    ),
    "a selection that misses one": (
        "sampling",
        sampler,
        "largest",
        lambda out, *a: out.at[..., 0].multiply(0),
        "the 64 largest",
    ),
    "a softmax off by a little": (
        "sampling",
        mx,
        "softmax",
        lambda out, *a, **k: out * 1.01,
        "softmax over the vocabulary",
    ),
    "a logarithm that is off": (
        "sampling",
        mx,
        "logsumexp",
        lambda out, *a, **k: out * 1.01,
        "logsumexp",
    ),
    "a draw one token on": (
        "sampling",
        sampler,
        "inverse_cdf",
        lambda out, *a: out + 1,
        "interval holds u",
    ),
    "one position too many": (
        "sampling",
        sampler,
        "accept",
        lambda out, *a: mx.ones_like(out),
        "within the entropy bound",
    ),
    "another expert": (
        "sampling",
        mx,
        "argpartition",
        lambda out, *a, **k: mx.where(out == 1, 2, out),
        "the router's experts",
    ),
    "a scatter that adds": (
        "sampling",
        mx,
        "put_along_axis",
        lambda out, *a, **k: out + 1,
        "put_along_axis",
    ),
    "another activation": (
        "elementwise",
        checked_layers,
        "gated_gelu",
        lambda out, *a: out * 1.01,
        "gated GELU in float32",
    ),
    "a norm off by a little": (
        "elementwise",
        checked_layers,
        "rms_norm",
        lambda out, *a: out * 1.00001,
        "norm in float32",
    ),
    "fast trigonometry": (
        "elementwise",
        checked_layers,
        "rope_table",
        lambda out, *a: (out[0] * 1.001, out[1]),
        "angles of heads of 512, to position 4,095",
    ),
    "a position that is off by one": (
        "elementwise",
        checked_layers,
        "rope_table",
        lambda out, positions, layer: attention.rope_table(positions + 1, layer),
        "angles of heads of 256",
    ),
    "a rotation the other way": (
        "elementwise",
        checked_layers,
        "apply_rope",
        lambda out, x, table: layers.apply_rope(x, (table[0], -table[1])),
        "rotation of heads of 256",
    ),
    "a mask that is ignored": (
        "attention",
        checked_layers,
        "attend_in_turn",
        lambda out, parts: layers.attend_in_turn([(*part[:3], None) for part in parts]),
        "mask: a mask",
    ),
    "a product with packed weights": (
        "packed products",
        mx,
        "quantized_matmul",
        lambda out, *a, **k: out * 1.01,
        "product, affine 4",
    ),
    "packing that loses a group": (
        "packed products",
        mx,
        "dequantize",
        lambda out, *a, **k: out.at[:, :16].multiply(0),
        "packing,",
    ),
    "the last tile of a ragged number of rows": (
        "experts",
        mx,
        "gather_qmm",
        lambda out, *a, **k: out.at[-2:].multiply(0.5),
        "packed experts, mxfp4 4 bits, groups of 32, sorted True, 130 rows",
    ),
    "grouped products": (
        "experts",
        mx,
        "gather_mm",
        lambda out, *a, **k: out.at[-1:].multiply(0),
        "experts, sorted True, 130 rows",
    ),
    "a write beside its place": (
        "cache writes",
        mx,
        "slice_update",
        lambda out, *a, **k: mx.roll(out, 1, axis=2),
        "cache writes in",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named(name, monkeypatch):
    section, module, function, change, says = FAULTS[name]
    wrong(monkeypatch, module, function, change)
    assert [found for found in failed(section) if says in found]


@pytest.mark.parametrize("section", SECTIONS)
def test_an_operation_without_a_kernel_is_a_failed_check(section, monkeypatch):
    for module, names in (
        (mx, ("argmax", "softmax", "quantize", "gather_mm", "slice_update")),
        (checked_layers, ("gated_gelu",)),
        (mx.fast, ("scaled_dot_product_attention",)),
    ):
        for function in names:
            monkeypatch.setattr(module, function, missing_kernel)
    (found,) = [
        result
        for result in run_section(section, SECTIONS[section], Checks(SMALL, mx.float32))
        if result.note
    ]
    assert not found.ok
    assert "Unable to load kernel" in found.note


def test_infinite_results_fail():
    checks = Checks(SMALL, mx.float32)
    for value in (np.nan, np.inf):
        assert not checks.near("x", np.array([1.0, value]), np.array([1.0, 2.0]), 0.5).ok
    assert not checks.near("x", np.ones(2), np.ones(3), 0.5).ok
    assert not checks.equal("x", np.ones(2), np.ones(3)).ok


def test_some_rows_hold_the_first_and_the_last():
    checks = Checks(dataclasses.replace(SMALL, compared=5), mx.float32)
    assert checks.some(256)[[0, -1]].tolist() == [0, 255]
    assert len(checks.some(256)) == 5
    assert checks.some(3).tolist() == [0, 1, 2]
