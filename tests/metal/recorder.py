"""Records what this process puts into MLX's graphs, and refuses what Metal would refuse.

**What it sees.** Every primitive, when it is put into a graph: by functions and operators called
from Python, inside composite operations of MLX (``mx.random``, ``mx.linalg``), in layers and
optimisers of ``mlx.nn``, in gradients, and inside ``mx.compile`` while it traces. Of each it sees
the dtypes and, for quantised products, group size, bits and mode; the number of index arrays of
gathers and scatters; and the line of our code, from Python's stack. An operation is described to
Python once, so a known one costs one look-up in a set, under a microsecond.

It sees what is put into a graph, evaluated or not; what is never evaluated must have a kernel all
the same.

**What it cannot see.** Where MLX has a Metal primitive and no CPU primitive (``mx.fast``: norms,
RoPE, attention; ``mx.dequantize``) the graph on a CPU holds a composite; those functions are
wrapped in Python instead. Which of several kernels a product would take depends on shapes and on
the chip; the table therefore lists a dtype only where all of them have it. Threadgroup limits,
memory, wrong kernels and speed are only seen on a Mac (``mlx-diffgemma doctor --deep``). Processes
that tests start are not recorded.

**How.** ``hook.cpp`` is compiled with the compiler that MLX's own ``mx.compile`` needs on Linux,
against the headers in MLX's wheel, and loaded before ``mlx.core``: import this module first.
Elsewhere than on Linux it records nothing: a Mac has Metal itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from tests.metal import rules

ROOT = Path(__file__).parent.parent.parent
OURS = tuple(str(ROOT / package) + os.sep for package in ("mlx_diffgemma", "drafter"))
SOURCE = Path(__file__).with_name("hook.cpp")


class Recorder:
    """What was seen since the process began: ``seen`` descriptions, and ``faults`` that nobody took
    yet.
    """

    def __init__(self) -> None:
        self.seen: set[str] = set()
        self.faults: dict[str, None] = {}  # in order, each once
        self.running = False
        self._inside = threading.local()
        self._steps = 0
        self._on_cpu: dict[tuple[str, int], set[int]] = {}

    # -- reports of the hook

    def node(self, description: str) -> bool:
        """Whether to hear of this description again: another line may ask for a refused one."""
        self.seen.add(description)
        try:
            why = rules.fault(description)
        except (KeyError, ValueError) as error:  # the caller is C++, which could not pass it on
            why = f"tests/metal/rules.py cannot read this: {error!r}"
        if why is None:
            return False
        line = our_line()
        if line is not None:
            operation, dtype, inputs, details = description.split("|")
            found = f"{operation} ({', '.join(inputs.split())}) -> {dtype} {details}".strip()
            self.faults[f"{line}: {found}: {why}"] = None
        return True

    def cpu_stream(self) -> None:
        """An operation, or all that follow, is put on the CPU's stream: a wait for the GPU and back
        where it is in a step.
        """
        step = getattr(self._inside, "step", None)
        line = our_line()
        if step is None or line is None:
            return
        model, number = step
        steps = self._on_cpu.setdefault((line, model), set())
        steps.add(number)
        if len(steps) > 1:
            why = "an operation on the CPU stream in every step; do it once, or on the GPU"
            self.faults[f"{line}: {why}"] = None

    def call(self, operation: str, dtype: Any, *inputs: Any, **details: Any) -> None:
        """Report a function of which the CPU's graph does not hold the primitive."""
        names = " ".join(_name(t) for t in inputs)
        described = (
            f"{operation}|{_name(dtype)}|{names}|{' '.join(f'{k}={v}' for k, v in details.items())}"
        )
        if described not in self.seen or rules.fault(described):
            self.node(described)

    # -- for tests

    def take(self) -> list[str]:
        """The faults since the last call; forgets in which steps the CPU's stream was asked for."""
        faults = list(self.faults)
        self.faults.clear()
        self._on_cpu.clear()
        return faults

    @contextlib.contextmanager
    def planted(self) -> Iterator[list[str]]:
        """For faults put there on purpose: they are in the yielded list afterwards, and fail no
        test.
        """
        before = self.take()
        found: list[str] = []
        try:
            yield found
        finally:
            found += self.take()
            self.faults.update(dict.fromkeys(before))

    def step_of(self, cls: type, name: str, model: Callable[[Any], Any]) -> None:
        """Count calls of a method as steps of ``model(self)``; a call inside another is part of
        that step.
        """
        method = getattr(cls, name)

        @functools.wraps(method)
        def counted(owner: Any, *args: Any, **kwargs: Any) -> Any:
            if getattr(self._inside, "step", None) is not None:
                return method(owner, *args, **kwargs)
            self._steps += 1
            self._inside.step = (id(model(owner)), self._steps)
            try:
                return method(owner, *args, **kwargs)
            finally:
                self._inside.step = None

        setattr(cls, name, counted)


recorder = Recorder()


def our_line() -> str | None:
    """ "file:line" of the innermost frame in our packages, from the root of the repository; None
    where there is none.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(OURS):
            return f"{os.path.relpath(frame.f_code.co_filename, ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return None


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("mlx.core.").rstrip("_")


def _build() -> Path:
    """The compiled hook, made once per source and version of MLX."""
    spec = importlib.util.find_spec("mlx")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    mlx = Path(spec.submodule_search_locations[0])
    version = importlib.metadata.version("mlx")
    key = hashlib.sha256(SOURCE.read_bytes() + f"{mlx} {version}".encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"mlx-diffgemma-tests-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"hook-{key}.so"
    if library.exists():
        return library
    fresh = folder / f"hook-{key}-{os.getpid()}.so"
    command = [
        "g++",
        "-std=c++20",
        "-O2",
        "-shared",
        "-fPIC",
        f"-I{mlx / 'include'}",
        str(SOURCE),
        "-o",
        str(fresh),
        f"-L{mlx / 'lib'}",
        "-l:libmlx.so",
        f"-Wl,-rpath,{mlx / 'lib'}",
        "-Wl,--no-undefined",
    ]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(
            f"tests/metal/hook.cpp does not compile against MLX {version}: {ran.stderr}"
        )
    fresh.replace(library)
    return library


def start() -> None:
    """Load the hook, and see that it reports.

    Errors: RuntimeError when mlx.core was imported before, or when the hook does not compile or
    report.
    """
    if recorder.running or sys.platform != "linux":
        return
    if "mlx.core" in sys.modules:
        raise RuntimeError(
            "mlx.core was imported before tests/metal/recorder.py; import the recorder first."
        )
    library = ctypes.CDLL(str(_build()), mode=ctypes.RTLD_GLOBAL)
    import mlx.core as mx

    global _callbacks  # they must live as long as the library
    _callbacks = (
        ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p)(
            lambda text: int(recorder.node(text.decode()))
        ),
        ctypes.CFUNCTYPE(None)(recorder.cpu_stream),
    )
    library.start_reports(*_callbacks)
    mx.argsort(mx.array([True, False]))
    if "ArgSort|uint32|bool |" not in recorder.seen:
        raise RuntimeError(
            f"tests/metal/hook.cpp does not see what MLX {mx.__version__} puts into graphs."
        )
    recorder.seen.clear()
    _wrap_fast(mx)
    _wrap_streams(mx)
    recorder.running = True


_callbacks: tuple[Any, ...] = ()


def _wrap_fast(mx: Any) -> None:
    """Report functions that on a CPU are composites."""
    for name, operation in (("rms_norm", "RMSNorm"), ("layer_norm", "LayerNorm"), ("rope", "RoPE")):
        _before(mx.fast, name, functools.partial(_fast, operation))
    _before(mx.fast, "scaled_dot_product_attention", _attention)
    _before(mx, "dequantize", _dequantize)


def _fast(operation: str, x: Any, *_: Any, **__: Any) -> None:
    recorder.call(operation, x.dtype, x.dtype)


def _attention(q: Any, k: Any, v: Any, **_: Any) -> None:
    recorder.call(
        "ScaledDotProductAttention",
        q.dtype,
        q.dtype,
        k.dtype,
        v.dtype,
        queries=min(q.shape[2], 9),
        head=q.shape[-1],
        values=v.shape[-1],
    )


def _dequantize(w: Any, scales: Any, *given: Any, **named: Any) -> None:
    settings = (
        dict(
            zip(
                ("biases", "group_size", "bits", "mode", "global_scale", "dtype"),
                given,
                strict=False,
            )
        )
        | named
    )
    mode = settings.get("mode", "affine")
    group, bits = {"affine": (64, 4), "mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}[mode]
    dtype = settings.get("dtype") or (
        "bfloat16" if _name(scales.dtype) == "uint8" else scales.dtype
    )
    recorder.call(
        "Quantize",
        dtype,
        w.dtype,
        group=settings.get("group_size") or group,
        bits=settings.get("bits") or bits,
        mode=mode,
        dequantize=1,
    )


def _wrap_streams(mx: Any) -> None:
    """Report what puts more than one operation on the CPU."""

    def asked(device: Any = None) -> None:
        if isinstance(device, mx.DeviceType) and device == mx.cpu:
            recorder.cpu_stream()

    for name in ("stream", "new_stream", "default_stream", "set_default_device"):
        _before(mx, name, asked)


def _before(module: Any, name: str, report: Callable[..., None]) -> None:
    function = getattr(module, name)

    @functools.wraps(function)
    def reporting(*args: Any, **kwargs: Any) -> Any:
        report(*args, **kwargs)
        return function(*args, **kwargs)

    setattr(module, name, reporting)


start()
