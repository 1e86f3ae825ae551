"""Machines on which MLX cannot run: one sentence with the cure, before anything else happens."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from mlx_diffgemma import machine
from mlx_diffgemma.checkpoint.loading import load_model
from mlx_diffgemma.diagnostics import doctor
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.machine import Machine, check_machine, fault, read_machine
from tests.helpers.command import WITHOUT_TORCH

MAC = Machine("Darwin", "arm64", "15.6.1", mlx="0.32.4", metal=True)
# What platform.machine(), platform.mac_ver()[0], sysctl.proc_translated and MLX say on each.
UNFIT = {
    "macOS 13": (
        replace(MAC, macos="13.7.2"),
        "This is macOS 13.7.2, and MLX needs 14 or later; update it",
    ),
    "macOS 13, no wheel": (
        replace(MAC, macos="13.7", mlx=None, failure="No module named 'mlx'"),
        "This is macOS 13.7, and",
    ),
    "Intel": (
        replace(MAC, processor="x86_64", mlx=None, failure="No module named 'mlx'", metal=False),
        "This Mac has an Intel processor (x86_64), and MLX needs Apple silicon (M1 or later)",
    ),
    "Rosetta": (
        replace(
            MAC,
            processor="x86_64",
            translated=True,
            macos="10.16",
            mlx=None,
            failure="No module named 'mlx'",
        ),
        "This Python is built for Intel and runs under Rosetta, where MLX does not; install a Python for Apple silicon",
    ),
    "old MLX": (
        replace(MAC, mlx="0.32.2"),
        "MLX 0.32.2 is too old: it computes wrong experts on M5, and 0.32.4 is the first",
    ),
    "older MLX": (replace(MAC, mlx="0.9.1"), "run `pip install --upgrade 'mlx>=0.32.4'`"),
    "no Metal": (
        replace(MAC, metal=False),
        "MLX 0.32.4 finds no Metal GPU, as its package lacks Metal or this is a virtual",
    ),
    "no MLX": (
        replace(MAC, mlx=None, failure="No module named 'mlx'", metal=False),
        "MLX is not installed; install it with `pip",
    ),
    "half a wheel": (
        replace(MAC, metal=False, failure="dlopen: Library not loaded: @rpath/libmlx.dylib"),
        "MLX 0.32.4 cannot be imported (dlopen: Library not loaded: @rpath/libmlx.dylib); install it again",
    ),
    "Linux without MLX": (
        Machine("Linux", "x86_64", failure="libmlx.so: cannot open"),
        "MLX cannot be imported (libmlx.so",
    ),
}
FIT = [
    MAC,
    replace(MAC, macos="26.2", mlx="0.32.5.dev20261101+abc"),
    replace(MAC, macos="14.0"),
    replace(MAC, mlx="0.40"),
    replace(MAC, macos="10.16"),
    replace(MAC, metal=False, on_cpu=True),
    Machine("Linux", "aarch64", mlx="0.32.2"),
]


@pytest.mark.parametrize("name", UNFIT)
def test_an_unfit_machine_is_told_so_in_a_sentence(name):
    unfit, says = UNFIT[name]
    sentence = fault(unfit)
    assert sentence.startswith(says) or says in sentence
    assert sentence.endswith(".")
    assert "\n" not in sentence
    with pytest.raises(UserError, match="MLX"):
        check_machine(unfit)


@pytest.mark.parametrize("fit", FIT, ids=str)
def test_a_fit_machine(fit):
    assert fault(fit) is None


def test_this_machine_is_fit():
    assert fault(read_machine()) is None


@pytest.mark.parametrize(
    "command",
    [lambda folder: load_model(folder), lambda folder: doctor.diagnose()],
    ids=["a command that loads a model", "doctor"],
)
def test_it_is_said_before_anything_is_computed(command, monkeypatch, tiny_folder):
    monkeypatch.setattr(machine, "read_machine", lambda: UNFIT["no Metal"][0])
    with pytest.raises(UserError, match="finds no Metal GPU"):
        command(tiny_folder)


def told(values, monkeypatch):
    """``read_machine`` on a Mac that gives these values."""
    monkeypatch.setattr(machine.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(machine.platform, "machine", lambda: values["machine"])
    monkeypatch.setattr(
        machine.platform, "mac_ver", lambda: (values["mac_ver"], ("", "", ""), values["machine"])
    )

    def sysctl(command, **_):
        assert command == ["/usr/sbin/sysctl", "-n", "sysctl.proc_translated"]
        out = values["translated"]  # None: "unknown oid", on Intel
        return subprocess.CompletedProcess(
            command, 1 if out is None else 0, "" if out is None else f"{out}\n", ""
        )

    monkeypatch.setattr(machine.subprocess, "run", sysctl)
    return read_machine()


def test_the_values_of_macs(monkeypatch):
    rosetta = told({"machine": "x86_64", "mac_ver": "10.16", "translated": 1}, monkeypatch)
    assert fault(rosetta).startswith("This Python is built for Intel")
    intel = told({"machine": "x86_64", "mac_ver": "12.7.6", "translated": None}, monkeypatch)
    assert fault(intel).startswith("This Mac has an Intel processor")
    native = told({"machine": "arm64", "mac_ver": "15.3", "translated": 0}, monkeypatch)
    assert (native.translated, native.macos, native.processor) == (False, "15.3", "arm64")
    monkeypatch.setattr(
        machine.subprocess, "run", lambda *_, **__: (_ for _ in ()).throw(OSError("no sysctl"))
    )
    assert not read_machine().translated


def run_without_mlx(tmp_path, *command):
    """A command where ``import mlx.core`` fails as a broken wheel does."""
    (tmp_path / "mlx").mkdir(exist_ok=True)
    (tmp_path / "mlx" / "__init__.py").touch()
    (tmp_path / "mlx" / "core.py").write_text(
        "raise ImportError('dlopen(core.so): no such file')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    "code", ["from mlx_diffgemma.cli import main; main(['doctor'])", "import mlx_diffgemma"]
)
def test_mlx_that_cannot_be_imported(tmp_path, code):
    done = run_without_mlx(tmp_path, "-c", code)
    assert done.returncode != 0
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: MLX cannot be imported (dlopen(core.so): no such file); install")


def test_the_device_of_the_environment():
    code = WITHOUT_TORCH + "import mlx_diffgemma, mlx.core as mx; print(mx.default_device())"
    for device, says in (
        ("cpu", "Device(cpu, 0)"),
        ("tpu", "error: MLX_DIFFGEMMA_DEVICE is 'tpu'; set it to cpu or gpu"),
    ):
        environment = {**os.environ, "MLX_DIFFGEMMA_DEVICE": device}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert says in done.stdout + done.stderr


def test_float32_is_not_tf32(monkeypatch, tiny_folder):
    """MLX reads the variable at its first product, which comes after loading; who has set it keeps
    it.
    """
    monkeypatch.delenv("MLX_ENABLE_TF32", raising=False)
    load_model(tiny_folder, "bfloat16")
    assert "MLX_ENABLE_TF32" not in os.environ
    load_model(tiny_folder, "float32")
    assert os.environ["MLX_ENABLE_TF32"] == "0"
    monkeypatch.setenv("MLX_ENABLE_TF32", "1")
    load_model(tiny_folder, "float32")
    assert os.environ["MLX_ENABLE_TF32"] == "1"
