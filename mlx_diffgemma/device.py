"""The machine: compute dtype, memory limits, and what a result says about where it was made.

Compute dtype is decided here and nowhere else.  On the CPU everything runs in float32 whatever the checkpoint holds,
since MLX's CPU backend has the grouped product in float32 only; on a GPU in the checkpoint's dtype; ``--dtype``
overrides both.
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx

from mlx_diffgemma.errors import UserError

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


def dtype_named(name: str) -> mx.Dtype:
    """Errors: UserError for an unknown name."""
    if name not in DTYPES:
        raise UserError(f"Unknown dtype {name!r}; use one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def compute_dtype(stored: mx.Dtype, override: str | None = None) -> mx.Dtype:
    """The dtype to run in, for a checkpoint that stores ``stored``."""
    if override is not None:
        return dtype_named(override)
    if mx.default_device() == mx.cpu:
        return mx.float32
    return stored if stored in DTYPES.values() else mx.bfloat16


def memory_limit() -> int:
    """Bytes a model may take: the GPU's recommended working set on a Mac, elsewhere the memory of the machine."""
    if mx.metal.is_available():
        return int(mx.device_info()["max_recommended_working_set_size"])
    if mx.cuda.is_available():
        return int(mx.device_info(mx.gpu).get("total_memory", 0)) or _physical_memory()
    return _physical_memory()


def check_memory(needed: int, what: str) -> None:
    """Errors: UserError when ``needed`` bytes exceed what this machine allows, before anything is loaded."""
    limit = memory_limit()
    if needed <= limit:
        return
    remedy = "take a conversion with fewer bits"
    if mx.metal.is_available():
        remedy += f", or on this Mac raise the limit with `sudo sysctl iogpu.wired_limit_mb={needed // 2**20 + 1024}`"
    raise UserError(f"{what} needs {needed / 1e9:.1f} GB, this machine allows {limit / 1e9:.1f} GB; {remedy}.")


@contextlib.contextmanager
def wired_memory() -> Iterator[None]:
    """Keep the model in the Mac GPU's wired memory for the time of a generation; nothing elsewhere."""
    if not mx.metal.is_available():
        yield
        return
    before = mx.set_wired_limit(memory_limit())
    try:
        yield
    finally:
        mx.synchronize()
        mx.set_wired_limit(before)


def describe(dtype: mx.Dtype) -> dict[str, str]:
    """What a recorded figure must say about the machine: device, dtype, BLAS, versions."""
    info = mx.device_info()
    return {
        "device": "gpu" if mx.default_device() == mx.gpu else "cpu",
        "chip": str(info.get("device_name", platform.processor())),
        "backend": "metal" if mx.metal.is_available() else "cuda" if mx.cuda.is_available() else "cpu",
        "dtype": str(dtype).removeprefix("mlx.core."),
        "blas": blas(),
        "mlx": mx.__version__,
        "os": platform.platform(),
        "python": platform.python_version(),
    }


def blas() -> str:
    """The BLAS behind MLX's CPU backend."""
    if platform.system() == "Darwin":
        return "Accelerate"
    preload = os.environ.get("LD_PRELOAD", "")
    return Path(preload).name if "blas" in preload.lower() else "reference (mlx wheel)"


def _physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
