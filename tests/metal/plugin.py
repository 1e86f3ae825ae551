"""Hooks of pytest: what Metal would refuse fails the test that ran it; ``--as-gpu`` takes a GPU's
choice of dtype.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.metal.recorder import recorder

# Processes of pytest-xdist send theirs here.
_elsewhere: set[str] = set()


def add_options(parser: pytest.Parser) -> None:
    group = parser.getgroup("metal")
    group.addoption(
        "--as-gpu",
        action="store_true",
        help="choose the compute dtype as on a GPU: the checkpoint's, in place of float32",
    )
    group.addoption(
        "--metal-record",
        metavar="FILE",
        type=Path,
        help="write every kind of operation that was seen, one a line",
    )


def watch(config: pytest.Config) -> None:
    """Take a GPU's choices, and count steps, so that an operation on the CPU's stream in every one
    of them is noticed; for a process that runs tests.
    """
    from mlx_diffgemma import device
    from mlx_diffgemma.decoding.autoregressive import CausalLoop
    from mlx_diffgemma.decoding.loop import Loop
    from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma

    if config.getoption("--as-gpu"):
        device.on_cpu = lambda: False
    if recorder.running:
        recorder.step_of(Loop, "advance", lambda loop: loop.model)
        recorder.step_of(CausalLoop, "advance", lambda loop: loop.model)
        recorder.step_of(DiffusionGemma, "encode", lambda model: model)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item):
    yield
    faults = recorder.take()
    if faults:
        pytest.fail("Metal would refuse this:\n" + "\n".join(faults), pytrace=False)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["metal"] = sorted(recorder.seen)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
    _elsewhere.update(getattr(node, "workeroutput", {}).get("metal", ()))


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    seen = recorder.seen | _elsewhere
    if recorder.running:
        terminalreporter.write_line(
            f"{len(seen)} kinds of operation were held against Metal's kernels"
        )
    if config.getoption("--metal-record"):
        config.getoption("--metal-record").write_text(
            "".join(f"{line}\n" for line in sorted(seen)), encoding="utf-8"
        )
