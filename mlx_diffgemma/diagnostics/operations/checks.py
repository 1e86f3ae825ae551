"""The inputs of the operation checks, and how a result is compared with the expected one."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

# The largest error of a product that passes, relative to the largest value: in 16 bits, and in
# float32.
PRODUCT = 1.5e-2
EXACT_PRODUCT = 1e-3


@dataclass(frozen=True)
class Result:
    """The result of one check.

    Attributes:
        section: The kind of operation.
        name: What was checked.
        ok: Whether the check passed.
        error: The largest error, relative to the largest value of the reference.  None: the check
            measures no error.
        bound: The largest error that passes.
        note: What went wrong, where no error was measured.
    """

    section: str
    name: str
    ok: bool
    error: float | None = None
    bound: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Sizes:
    """The sizes of the inputs.  The host checks ``compared`` rows of a large result."""

    vocabulary: int = 262_144
    length: int = 256
    hidden: int = 2816
    inner: int = 2112
    expert_inner: int = 704
    experts: int = 128
    compared: int = 12
    # The last two are above 32,768 and no multiples of 64.
    expert_rows: tuple[int, ...] = (64, 2048, 16_384, 32_800, 40_002)
    # Numbers of rows on both sides of each change of MLX's kernels.
    product_rows: tuple[int, ...] = (1, 5, 8, 12, 33, 256)
    attention: tuple[tuple[int, int, tuple[tuple[int, int], ...]], ...] = (
        (256, 8, ((1, 1024), (2, 9), (8, 600), (256, 1279))),
        (512, 2, ((1, 700), (1, 4200), (8, 1200), (256, 1456))),
    )


RELEASED = Sizes()
# The CPU is slow and has one kernel for every number of rows: fewer rows are enough there.
ON_CPU = Sizes(expert_rows=(64, 330), product_rows=(1, 8, 33), compared=8)
SMALL = Sizes(
    vocabulary=5000,
    length=16,
    hidden=128,
    inner=96,
    expert_inner=64,
    experts=4,
    compared=16,
    expert_rows=(64, 130),
    product_rows=(1, 9),
    attention=((64, 4, ((1, 40), (9, 33))), (128, 2, ((1, 50),))),
)


class Checks:
    """What every section needs: sizes, dtype, random numbers and the two comparisons."""

    def __init__(self, sizes: Sizes, dtype: mx.Dtype, seed: int = 0):
        self.sizes = sizes
        self.dtype = dtype
        self.section = ""
        self.rng = np.random.default_rng(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> np.ndarray:
        return self.rng.standard_normal(shape, dtype=np.float32) * np.float32(scale)

    def array(self, *shape: int, scale: float = 1.0) -> mx.array:
        """Normal numbers in the compute dtype."""
        return mx.array(self.normal(*shape, scale=scale)).astype(self.dtype)

    def equal(self, name: str, computed: object, expected: object) -> Result:
        """Check that both arrays hold the same values."""
        left = np.asarray(computed)
        right = np.asarray(expected)
        if left.shape != right.shape:
            note = f"shape {left.shape} for {right.shape}"
            return Result(self.section, name, False, note=note)
        if not np.array_equal(left, right, equal_nan=left.dtype.kind == "f"):
            note = f"{np.mean(left != right):.1%} of the entries differ"
            return Result(self.section, name, False, note=note)
        return Result(self.section, name, True)

    def near(
        self, name: str, computed: mx.array | np.ndarray, expected: np.ndarray, bound: float
    ) -> Result:
        """Check that the largest difference is within ``bound``, relative to the largest value.

        Args:
            name: The name of the check.
            computed: The values of MLX.
            expected: The values of numpy, in float64.
            bound: The largest relative difference that passes.

        Returns:
            The result, with the error where the shapes agree.
        """
        host = float64(computed) if isinstance(computed, mx.array) else computed
        values = np.asarray(host, dtype=np.float64)
        if values.shape != expected.shape:
            note = f"shape {values.shape} for {expected.shape}"
            return Result(self.section, name, False, note=note)
        error = float(np.abs(values - expected).max() / max(1e-9, np.abs(expected).max()))
        return Result(self.section, name, bool(error <= bound), error, bound)

    @property
    def product_bound(self) -> float:
        return EXACT_PRODUCT if self.dtype == mx.float32 else PRODUCT

    @property
    def sum_bound(self) -> float:
        """The bound of a float32 sum over the vocabulary; the CPU backend adds the terms one by
        one.
        """
        return 1e-3 if self.dtype == mx.float32 else 1e-5

    def some(self, count: int) -> np.ndarray:
        """The indices of ``compared`` rows of ``count``, the first and the last among them."""
        chosen = np.linspace(0, count - 1, min(count, self.sizes.compared)).round().astype(int)
        rows: np.ndarray = np.unique(chosen)
        return rows


def float64(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)).astype(np.float64)
