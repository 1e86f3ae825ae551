"""Checks of products with packed weights and of grouped products of experts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np

from mlx_diffgemma.diagnostics.operations.checks import Checks, Result, float64

# (mode, bits, group size) of everything that recipes and published conversions use.
MODES = (
    ("affine", 4, 64),
    ("affine", 8, 64),
    ("affine", 4, 32),
    ("affine", 3, 64),
    ("affine", 2, 64),
    ("affine", 5, 64),
    ("affine", 6, 64),
    ("mxfp4", 4, 32),
    ("mxfp8", 8, 32),
    ("nvfp4", 4, 16),
)
EXPERT_MODES = (
    ("affine", 4, 64),
    ("affine", 4, 32),
    ("affine", 8, 32),
    ("mxfp4", 4, 32),
    ("nvfp4", 4, 16),
)


def packed_products(checks: Checks) -> Iterator[Result]:
    """Check packing, and both products with packed weights, for numbers of rows that use different
    kernels.
    """
    sizes = checks.sizes
    for mode, bits, group in MODES:
        name = f"{mode} {bits} bits, groups of {group}"
        options = {"group_size": group, "bits": bits, "mode": mode}
        weight = checks.array(sizes.expert_inner, sizes.hidden, scale=sizes.hidden**-0.5)
        packed = mx.quantize(weight, **options)
        dense = float64(mx.dequantize(*packed, **options))
        error = np.abs(dense - float64(weight)).max() / np.abs(float64(weight)).max()
        bound = _packing_bound(mode, bits)
        yield Result(checks.section, f"packing, {name}", bool(error < bound), float(error), bound)
        matrix, scales, biases = _parts(packed)
        for rows in sizes.product_rows:
            x = checks.array(rows, sizes.hidden)
            y = checks.array(rows, sizes.expert_inner)
            product = mx.quantized_matmul(x, matrix, scales, biases, transpose=True, **options)
            yield checks.near(
                f"product, {name}, {rows} rows", product, float64(x) @ dense.T, checks.product_bound
            )
            product = mx.quantized_matmul(y, matrix, scales, biases, transpose=False, **options)
            yield checks.near(
                f"mean embedding, {name}, {rows} rows",
                product,
                float64(y) @ dense,
                checks.product_bound,
            )


def _packing_bound(mode: str, bits: int) -> float:
    """The largest error of packing, relative to the largest weight."""
    if mode == "affine":
        return 2.5 / 2**bits
    return 0.06 if bits == 8 else 0.25


def _parts(packed: Sequence[mx.array]) -> tuple[mx.array, mx.array, mx.array | None]:
    """Name the results of ``mx.quantize``; only the affine mode has biases.

    Returns:
        (weight, scales, biases)
    """
    return packed[0], packed[1], packed[2] if len(packed) > 2 else None


def experts(checks: Checks) -> Iterator[Result]:
    """Check the grouped products, sorted and unsorted.

    The numbers of rows are below and above 32,768 and are no multiples of 64.
    """
    sizes = checks.sizes
    for rows in sizes.expert_rows:
        numbers = np.sort(checks.rng.integers(0, sizes.experts, rows)).astype(np.uint32)
        # A ragged number of rows shows in the last tile.
        ends = np.arange(max(0, rows - 70), rows)
        some = np.unique(np.concatenate((np.arange(0, rows, max(1, rows // 100)), ends)))
        for inputs, outputs in ((sizes.hidden, 64), (sizes.expert_inner, 96), (96, 128)):
            x = checks.array(rows, 1, inputs)
            weight = checks.array(sizes.experts, outputs, inputs, scale=inputs**-0.5)
            for ordered in (True, False) if rows <= 2048 else (True,):
                yield from _grouped_products(checks, x, weight, numbers, some, ordered)
            mx.clear_cache()


def _grouped_products(
    checks: Checks,
    x: mx.array,
    weight: mx.array,
    numbers: np.ndarray,
    some: np.ndarray,
    ordered: bool,
) -> Iterator[Result]:
    """Check the grouped product of one input, unpacked and in each packing that divides it.

    Args:
        checks: How results are compared.
        x: The input [rows, 1, inputs].
        weight: The matrices [experts, outputs, inputs].
        numbers: The expert [rows] of each row, ascending.
        some: The rows to compare.
        ordered: Whether MLX may rely on the order of ``numbers``.

    Yields:
        One result for each product.
    """
    rows, _, inputs = x.shape
    indices = mx.array(numbers)
    compared = mx.array(some)
    chosen = float64(x[compared])[:, 0]
    shape = f"{rows:,} rows of {inputs}"
    grouped = mx.gather_mm(x, weight.swapaxes(-1, -2), rhs_indices=indices, sorted_indices=ordered)
    yield checks.near(
        f"experts, sorted {ordered}, {shape}",
        float64(grouped[compared])[:, 0],
        _per_expert(chosen, weight, numbers[some]),
        checks.product_bound,
    )
    for mode, bits, group in EXPERT_MODES:
        if inputs % group:
            continue
        options = {"group_size": group, "bits": bits, "mode": mode}
        packed = mx.quantize(weight, **options)
        product = mx.gather_qmm(
            x,
            *_parts(packed),
            rhs_indices=indices,
            transpose=True,
            sorted_indices=ordered,
            **options,
        )
        name = f"packed experts, {mode} {bits} bits, groups of {group}, sorted {ordered}, {shape}"
        expected = _per_expert(chosen, mx.dequantize(*packed, **options), numbers[some])
        yield checks.near(name, float64(product[compared])[:, 0], expected, checks.product_bound)


def _per_expert(x: np.ndarray, weight: mx.array, numbers: np.ndarray) -> np.ndarray:
    """Multiply each row by its expert's matrix, in float64.

    Args:
        x: The rows [rows, inputs].
        weight: The matrices [experts, outputs, inputs].
        numbers: The expert [rows] of each row.

    Returns:
        [rows, outputs]
    """
    out = np.empty((len(x), weight.shape[1]))
    for expert in np.unique(numbers):
        rows = numbers == expert
        out[rows] = x[rows] @ float64(weight[int(expert)]).T
    return out
