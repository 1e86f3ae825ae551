"""The machine: compute dtype, memory limits, and what a result says about where it was made.

Compute dtype is decided here and nowhere else.  On the CPU everything runs in float32 whatever the checkpoint holds,
since MLX's CPU backend has the grouped product in float32 only; on a GPU in the checkpoint's dtype; ``--dtype``
overrides both.
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx

from mlx_diffgemma.errors import UserError

WIRING = ("auto", "off")
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


def dtype_named(name: str) -> mx.Dtype:
    """Errors: UserError for an unknown name."""
    if name not in DTYPES:
        raise UserError(f"Unknown dtype {name!r}; use one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def on_cpu() -> bool:
    """Whether the dtype is chosen for MLX's CPU backend."""
    return bool(mx.default_device() == mx.cpu)


def compute_dtype(stored: mx.Dtype, override: str | None = None) -> mx.Dtype:
    """The dtype to run in, for a checkpoint that stores ``stored``."""
    if override is not None:
        return dtype_named(override)
    if on_cpu():
        return mx.float32
    return stored if stored in DTYPES.values() else mx.bfloat16


def memory_limit() -> int:
    """Bytes a model may take: the GPU's recommended working set on a Mac, elsewhere the memory of the machine."""
    if mx.metal.is_available():
        return int(mx.device_info(mx.gpu)["max_recommended_working_set_size"])
    if mx.cuda.is_available():
        return int(mx.device_info(mx.gpu).get("total_memory", 0)) or _physical_memory()
    return _physical_memory()


def check_memory(needed: int, what: str, remedy: str | Callable[[], str] = "take a conversion with fewer bits") -> None:
    """Errors: UserError when ``needed`` bytes exceed what this machine allows, before anything is loaded.

    A ``remedy`` that takes time to find is a function, which is called only then.
    """
    limit = memory_limit()
    if needed <= limit:
        return
    advice = remedy if isinstance(remedy, str) else remedy()
    if mx.metal.is_available() and needed < 0.9 * _physical_memory():
        advice += f", or on this Mac raise the limit with `sudo sysctl iogpu.wired_limit_mb={needed // 2**20 + 1024}`"
    raise UserError(f"{what} needs {needed / 1e9:.2f} GB, this machine allows {limit / 1e9:.2f} GB; {advice}.")


def wired_bytes(weights: int, working: int, limit: int, memory: int) -> int:
    """How much macOS is asked to keep within the GPU's reach, 0 for nothing.

    Wiring keeps a large model from being moved out, which makes steps many times slower; it gains a small one nothing, and
    has been tied to kernel panics of Macs that serve several requests (mlx#3186).

    Args:
        weights: bytes of the model.
        working: bytes of caches and logits beside it.
        limit: what macOS recommends for the GPU; MLX takes no more.
        memory: of the whole machine.
    """
    return min(limit, weights + working) if 2 * weights > memory else 0


@contextlib.contextmanager
def generation_memory(held: Callable[[], tuple[int, int]]) -> Iterator[None]:
    """For the time of a generation wire a large model on a Mac and bound MLX's cache of freed buffers.

    ``held`` gives the bytes of the weights, and of caches and logits.  Generations may overlap and end in any order: the first
    sets the limits, the last restores them.  Nothing is set elsewhere than on Metal.
    """
    if not mx.metal.is_available():
        yield
        return
    if _limits.running == 0:
        limit = memory_limit()
        wired = wired_bytes(*held(), limit, _physical_memory()) if _limits.wiring == "auto" else 0
        _limits.wired_before = mx.set_wired_limit(wired) if wired else None
        _limits.cache_before = mx.set_cache_limit(limit // 8)
    _limits.running += 1
    try:
        yield
    finally:
        _limits.running -= 1
        if _limits.running == 0:
            mx.synchronize()
            if _limits.wired_before is not None:
                mx.set_wired_limit(_limits.wired_before)
            mx.set_cache_limit(_limits.cache_before)


def set_wiring(mode: str) -> None:
    """Whether ``generation_memory`` wires large models in this process, "auto" or "off".  Errors: UserError for another word."""
    if mode not in WIRING:
        raise UserError(f"Unknown --wired {mode!r}; use one of {', '.join(WIRING)}.")
    _limits.wiring = mode


class _Limits:
    running = 0
    wiring = "auto"
    wired_before: int | None = None
    cache_before = 0


_limits = _Limits()


def claim_process() -> None:
    """Note that this process uses MLX, or refuse where its parent did: the threads and the GPU of MLX do not survive a fork.

    Errors: UserError in a fork of a process that has loaded a model, where MLX would wait for ever.
    """
    pid = os.getpid()
    if _process.owner is None:
        _process.owner = pid
    if _process.owner != pid:
        raise UserError(f"This process ({pid}) was forked from one that has loaded a model ({_process.owner}), and MLX does "
                        "not survive a fork; start it with multiprocessing's 'spawn' method, or fork before loading.")


class _Process:
    owner: int | None = None


_process = _Process()


def exact_float32() -> None:
    """Ask MLX for true float32 products where it would take TF32 (on M5 and CUDA: errors near 8e-4).

    MLX reads the variable at its first product on the GPU and keeps to it, so this counts from the first model that is
    loaded; a value that is set already stays.
    """
    os.environ.setdefault("MLX_ENABLE_TF32", "0")


def describe(dtype: mx.Dtype) -> dict[str, str]:
    """What a recorded figure must say about the machine: device, dtype, BLAS, versions."""
    info = mx.device_info()
    return {
        "device": "gpu" if mx.default_device() == mx.gpu else "cpu",
        "chip": str(info.get("device_name", platform.processor())),
        "backend": "metal" if mx.metal.is_available() else "cuda" if mx.cuda.is_available() else "cpu",
        "dtype": str(dtype).removeprefix("mlx.core."),
        "blas": blas(),
        "tf32": os.environ.get("MLX_ENABLE_TF32", "default"),
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
