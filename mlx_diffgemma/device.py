"""The machine: compute dtype, memory limits, and its description for recorded results.

Only this module decides the compute dtype.  On the CPU it is always float32, since MLX's CPU
backend has the grouped product only in float32.  On a GPU it is the checkpoint's dtype.
``--dtype`` overrides both.
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx

from mlx_diffgemma.errors import UserError
from mlx_diffgemma.heap import trim_heap

WIRING = ("auto", "off")
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


def dtype_named(name: str) -> mx.Dtype:
    """The dtype with this name.  Raises UserError for an unknown name."""
    if name not in DTYPES:
        raise UserError(f"Unknown dtype {name!r}; use one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def on_cpu() -> bool:
    """Whether the dtype is chosen for MLX's CPU backend."""
    return bool(mx.default_device() == mx.cpu)


def compute_dtype(stored: mx.Dtype, override: str | None = None) -> mx.Dtype:
    """The compute dtype for a checkpoint that stores ``stored``."""
    if override is not None:
        return dtype_named(override)
    if on_cpu():
        return mx.float32
    return stored if stored in DTYPES.values() else mx.bfloat16


def memory_limit() -> int:
    """The bytes that a model may take.

    On a Mac it is the recommended working set of the GPU; elsewhere, the memory of the machine.
    """
    if mx.metal.is_available():
        return int(mx.device_info(mx.gpu)["max_recommended_working_set_size"])
    if mx.cuda.is_available():
        return int(mx.device_info(mx.gpu).get("total_memory", 0)) or _physical_memory()
    return _physical_memory()


def check_memory(
    needed: int, what: str, remedy: str | Callable[[], str] = "take a conversion with fewer bits"
) -> None:
    """Check, before anything is loaded, that this machine has enough memory.

    Args:
        needed: The bytes that are needed.
        what: What needs them, for the message.
        remedy: What the user can do, or a function that finds it.  The function is called only if
            memory is too small.

    Raises:
        UserError: ``needed`` exceeds what this machine allows.
    """
    limit = memory_limit()
    if needed <= limit:
        return
    advice = remedy if isinstance(remedy, str) else remedy()
    if mx.metal.is_available() and needed < 0.9 * _physical_memory():
        advice += f", or on this Mac raise the limit with `sudo sysctl iogpu.wired_limit_mb={needed // 2**20 + 1024}`"
    raise UserError(
        f"{what} needs {needed / 1e9:.2f} GB, this machine allows {limit / 1e9:.2f} GB; {advice}."
    )


def wired_bytes(weights: int, working: int, limit: int, memory: int) -> int:
    """How many bytes macOS is asked to wire, that is, to keep resident for the GPU; 0 for none.

    Wiring keeps macOS from moving a large model out of memory, which makes steps many times slower.
    A small model gains nothing from it, and wiring has been linked to kernel panics of Macs that
    serve several requests (mlx#3186).

    Args:
        weights: The bytes of the model.
        working: The bytes of caches and logits in addition to the model.
        limit: The bytes that macOS recommends for the GPU; MLX wires no more.
        memory: The bytes of the whole machine.
    """
    return min(limit, weights + working) if 2 * weights > memory else 0


@contextlib.contextmanager
def generation_memory(held: Callable[[], tuple[int, int]]) -> Iterator[None]:
    """During a generation, wire a large model and bound MLX's cache of freed buffers.

    ``held`` returns the bytes of the weights, and those of caches and logits.  Generations may
    overlap and end in any order: the first sets the limits, and the last restores them.  Without
    Metal nothing is set.
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
    """Set whether ``generation_memory`` wires large models in this process: "auto" or "off".

    Raises:
        UserError: ``mode`` is another word.
    """
    if mode not in WIRING:
        raise UserError(f"Unknown --wired {mode!r}; use one of {', '.join(WIRING)}.")
    _limits.wiring = mode


def return_memory() -> None:
    """Return freed memory to the system: MLX's cached buffers and the C heap."""
    mx.clear_cache()
    trim_heap()


class _Limits:
    running = 0
    wiring = "auto"
    wired_before: int | None = None
    cache_before = 0


_limits = _Limits()


def claim_process() -> None:
    """Record that this process uses MLX, unless its parent already does.

    MLX's threads and GPU state do not survive a fork.

    Raises:
        UserError: The process is a fork of one that has loaded a model.  MLX would wait for ever.
    """
    pid = os.getpid()
    if _process.owner is None:
        _process.owner = pid
    if _process.owner != pid:
        raise UserError(
            f"This process ({pid}) was forked from one that has loaded a model ({_process.owner}), and MLX does "
            "not survive a fork; start it with multiprocessing's 'spawn' method, or fork before loading."
        )


class _Process:
    owner: int | None = None


_process = _Process()


def exact_float32() -> None:
    """Ask MLX for true float32 products, not TF32 (on M5 and CUDA, TF32 has errors near 8e-4).

    MLX reads the environment variable once, at its first product on the GPU, so this applies from
    the first model that is loaded.  A variable that is already set is not changed.
    """
    os.environ.setdefault("MLX_ENABLE_TF32", "0")


def describe(dtype: mx.Dtype) -> dict[str, str]:
    """The description of the machine for a recorded figure: device, dtype, BLAS and versions."""
    info = mx.device_info()
    return {
        "device": "gpu" if mx.default_device() == mx.gpu else "cpu",
        "chip": str(info.get("device_name", platform.processor())),
        "backend": "metal"
        if mx.metal.is_available()
        else "cuda"
        if mx.cuda.is_available()
        else "cpu",
        "dtype": str(dtype).removeprefix("mlx.core."),
        "blas": blas(),
        "tf32": os.environ.get("MLX_ENABLE_TF32", "default"),
        "mlx": mx.__version__,
        "os": platform.platform(),
        "python": platform.python_version(),
    }


def blas() -> str:
    """The BLAS library that MLX's CPU backend uses."""
    if platform.system() == "Darwin":
        return "Accelerate"
    preload = os.environ.get("LD_PRELOAD", "")
    return Path(preload).name if "blas" in preload.lower() else "reference (mlx wheel)"


def _physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
