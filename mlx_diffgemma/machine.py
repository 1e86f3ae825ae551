"""Checks whether MLX can run on this machine.  If not, one sentence says why and what to do.

``read_machine`` reads the facts of a machine, and ``fault`` judges them, so that tests can use the
values of any Mac.  This module does not need MLX, which may be missing.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from types import TracebackType

from mlx_diffgemma.errors import UserError

OLDEST_MACOS = (14, 0)  # the oldest version that MLX's wheels support
OLDEST_MLX = (0, 32, 4)  # on a Mac; pyproject.toml says why
DEVICE = "MLX_DIFFGEMMA_DEVICE"  # "cpu": compute on the CPU, even if there is a GPU
FORGED = (10, 16)  # the version that macOS 11 and later report to a Python built for older ones


@dataclass(frozen=True)
class Machine:
    """The facts that decide whether MLX runs: the values of ``platform``, sysctl and MLX itself.

    ``translated`` says whether Rosetta runs this Python on Apple silicon.  ``mlx`` is the installed
    version, or None.  ``metal`` says whether MLX finds a Metal GPU.  ``failure`` is the error of
    ``import mlx.core``.
    """

    system: str
    processor: str
    macos: str = ""
    translated: bool = False
    mlx: str | None = None
    metal: bool = False
    failure: str | None = None
    on_cpu: bool = False


class UnsupportedMachineError(UserError, ImportError):
    """MLX does not run here.  ``python`` and commands print the sentence without a traceback."""


def read_machine() -> Machine:
    """The machine on which this process runs."""
    failure, metal = None, False
    try:
        core = importlib.import_module("mlx.core")
        metal = bool(core.metal.is_available())
    except (ImportError, OSError, AttributeError) as error:
        failure = str(error)
    return Machine(
        platform.system(),
        platform.machine(),
        platform.mac_ver()[0],
        _translated(),
        _mlx_version(),
        metal,
        failure,
        os.environ.get(DEVICE) == "cpu",
    )


def fault(machine: Machine) -> str | None:
    """One sentence that says why MLX cannot run on ``machine`` and what to do; None if it can."""
    if machine.system == "Darwin":
        return _fault_of_mac(machine)
    if machine.failure:
        return f"MLX cannot be imported ({machine.failure}); install it again with `pip install --force-reinstall 'mlx[cpu]'`."
    return None


def _fault_of_mac(machine: Machine) -> str | None:
    if machine.translated:
        return (
            "This Python is built for Intel and runs under Rosetta, where MLX does not; install a Python for Apple silicon "
            "(arm64), from python.org or with `brew install python`, and make the environment again with it."
        )
    if machine.processor != "arm64":
        return (
            f"This Mac has an Intel processor ({machine.processor}), and MLX needs Apple silicon (M1 or later); use such a "
            "Mac, or Linux."
        )
    macos = _version(machine.macos)
    if macos and macos < OLDEST_MACOS and macos[:2] != FORGED:
        return (
            f"This is macOS {machine.macos}, and MLX needs {OLDEST_MACOS[0]} or later; update it in System Settings > "
            "General > Software Update."
        )
    upgrade = f"pip install --upgrade 'mlx>={'.'.join(map(str, OLDEST_MLX))}'"
    if machine.mlx is None:
        return f"MLX is not installed; install it with `{upgrade}`."
    if machine.failure:
        return f"MLX {machine.mlx} cannot be imported ({machine.failure}); install it again with `{upgrade} --force-reinstall`."
    if _version(machine.mlx) < OLDEST_MLX:
        return (
            f"MLX {machine.mlx} is too old: it computes wrong experts on M5, and {'.'.join(map(str, OLDEST_MLX))} is the first "
            f"without known faults; run `{upgrade}`."
        )
    if not machine.metal and not machine.on_cpu:
        return (
            f"MLX {machine.mlx} finds no Metal GPU, as its package lacks Metal or this is a virtual machine without a GPU; run "
            f"`pip install --force-reinstall mlx mlx-metal`, or set {DEVICE}=cpu for the CPU."
        )
    return None


def check_machine(machine: Machine | None = None) -> None:
    """Raise UserError with the sentence of ``fault``, if there is one.  Call it before loading."""
    if sentence := fault(read_machine() if machine is None else machine):
        raise UserError(sentence)


def import_mlx() -> None:
    """Import MLX and choose its device.

    Raises:
        UnsupportedMachineError: MLX cannot be imported.  It is shown without a traceback.
    """
    device = os.environ.get(DEVICE)
    machine = read_machine()
    sentence = fault(machine) if machine.failure else None
    if device not in (None, "", "cpu", "gpu"):
        sentence = f"{DEVICE} is {device!r}; set it to cpu or gpu, or leave it out."
    if sentence:
        sys.excepthook = _show_sentence
        raise UnsupportedMachineError(sentence)
    if device:
        core = importlib.import_module("mlx.core")
        core.set_default_device(getattr(core, device))


def _show_sentence(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if isinstance(error, UnsupportedMachineError):
        print(f"error: {error}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def _translated() -> bool:
    """Whether Rosetta runs this process.  Only Apple silicon has the sysctl name."""
    if platform.system() != "Darwin":
        return False
    try:
        done = subprocess.run(
            ["/usr/sbin/sysctl", "-n", "sysctl.proc_translated"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.stdout.strip() == "1"


def _mlx_version() -> str | None:
    try:
        return importlib.metadata.version("mlx")
    except importlib.metadata.PackageNotFoundError:
        return None


def _version(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: (0, 32, 4) of "0.32.4.dev20251101"."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in match[0].split(".")) if match else ()
