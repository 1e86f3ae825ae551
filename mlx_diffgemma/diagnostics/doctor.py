"""A check of this machine in half a minute, without torch.

It recomputes nano's golden outputs, makes answers and times steps.  The golden outputs come from
the reference, so the printed differences are differences to the reference.  ``deep`` adds every
operation at the released model's shapes (``selfcheck``), which takes a minute on a GPU and several
on a CPU.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_diffgemma import nano
from mlx_diffgemma.checkpoint.convert import convert
from mlx_diffgemma.checkpoint.loading import load_model
from mlx_diffgemma.decoding.loop import Loop
from mlx_diffgemma.decoding.session import Session
from mlx_diffgemma.device import describe, exact_float32, memory_limit
from mlx_diffgemma.diagnostics import golden, selfcheck
from mlx_diffgemma.diagnostics.diagnosis import Way, ways
from mlx_diffgemma.diagnostics.operations.checks import Result
from mlx_diffgemma.errors import NonFiniteLogitsError, UserError
from mlx_diffgemma.machine import check_machine
from mlx_diffgemma.model.cache import Cache
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.sampling import self_conditioning
from mlx_diffgemma.sampling.draws import Draws
from mlx_diffgemma.sampling.policy import ReferencePolicy

FLOAT32_BOUND = (
    1e-3  # the largest logit difference of a sound float32 backend; measured ones are near 1e-5
)
# The share of positions that must agree with the reference in the most probable token, in bfloat16
# and quantised.
AGREEMENT = 0.9

NUMBERS = (
    "the numbers differ from the reference's; upgrade MLX and macOS, and run `mlx-diffgemma doctor --deep`, which names the "
    "operation."
)
KERNEL = "MLX has no such operation here or failed in it; upgrade MLX with `pip install --upgrade mlx`, and macOS."
ANSWER = (
    "the answer is not the reference's; if the golden outputs above hold, this is a fault of this package: report the line; "
    "if not, see there first."
)
OPERATION = "MLX computes this wrong on this machine; upgrade MLX and macOS, and report the line to MLX if that does not help."


@dataclass(frozen=True)
class Check:
    """Differences to the golden outputs.

    They are taken in float32, in bfloat16, and with 4-bit weights under float32 activations.  The
    4-bit weights are packed on this machine, so the quantiser is checked together with the
    products.

    Attributes:
        name: What was run.
        logits: The largest absolute difference of a logit, over all golden rows.
        kl: The mean KL divergence in nats.
        argmax: The share of rows with the reference's most probable token.
        trajectory: How many steps of the golden trajectory are equal, up to the first that differs.
        trajectory_steps: The steps of the golden trajectory.
        milliseconds_per_step: The time of a step.
        ok: Whether the differences are within their bounds.
    """

    name: str
    logits: float
    kl: float
    argmax: float
    trajectory: int
    trajectory_steps: int
    milliseconds_per_step: float
    ok: bool


@dataclass(frozen=True)
class Section:
    """One kind of operation of ``selfcheck``.

    ``checks`` is the number of checks, ``worst`` the largest error as a share of its bound, and
    ``failed`` the results of the checks that failed.
    """

    name: str
    checks: int
    worst: float
    failed: tuple[Result, ...]

    @property
    def ok(self) -> bool:
        return not self.failed


@dataclass(frozen=True)
class Diagnosis:
    """All results; ``deep`` is empty unless it was asked for, and ``seconds`` is the total time."""

    machine: dict[str, str]
    memory_limit: int
    nano: str
    checks: tuple[Check, ...]
    ways: tuple[Way, ...]
    deep: tuple[Section, ...] = ()
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return (
            all(check.ok for check in self.checks)
            and all(way.ok for way in self.ways)
            and all(section.ok for section in self.deep)
        )

    @property
    def advice(self) -> list[str]:
        """What to do about each failed check, the most likely cause first."""
        found = [f"{check.name}: {NUMBERS}" for check in self.checks if not check.ok]
        for way in self.ways:
            if not way.ok:
                found.append(f"{way.name}: {KERNEL if 'Error:' in way.note else ANSWER}")
        for section in self.deep:
            found += [
                f"{result.section}, {result.name}: {KERNEL if result.note else OPERATION}"
                for result in section.failed
            ]
        return found

    def record(self) -> dict[str, object]:
        """The diagnosis for JSON, with null in place of NaN."""
        return {**_without_nan(asdict(self)), "ok": self.ok, "advice": self.advice}


def diagnose(
    repeats: int = 10, deep: bool = False, progress: Callable[[str], None] = lambda _: None
) -> Diagnosis:
    """Recompute the golden outputs as ``Check`` says, and answer in every way of ``diagnosis``.

    Args:
        repeats: How many steps are timed in each dtype.
        deep: Check the operations at the released shapes too.
        progress: Called with the name of the next check.

    Raises:
        UserError: MLX does not run, or nano's files are of different versions.
    """
    check_machine()
    began = time.perf_counter()
    expected = golden.load()
    checks = list[Check]()
    taken = list[Way]()
    if expected.model_sha256 != golden.sha256(nano.FOLDER / "model.safetensors"):
        raise UserError(
            "nano's weights and golden outputs are of different versions; install mlx-diffgemma again."
        )
    exact_float32()
    for dtype in ("float32", "bfloat16"):
        progress(f"nano's golden outputs and answers in {dtype}")
        model = load_model(nano.FOLDER, dtype)
        checks.append(check(model, expected, expected.original, dtype, repeats))
        taken += ways(model, expected, dtype)
    progress("nano's golden outputs in 4 bits")
    with tempfile.TemporaryDirectory() as name:
        packed = load_model(convert(nano.NAME, Path(name) / "packed", quantize=True), "float32")
        checks.append(check(packed, expected, expected.quantised, "4bit", repeats))
    machine = {key: value for key, value in describe(mx.float32).items() if key != "dtype"}
    sections = _sections(progress) if deep else ()
    return Diagnosis(
        machine,
        memory_limit(),
        nano.VERSION,
        tuple(checks),
        tuple(taken),
        sections,
        round(time.perf_counter() - began, 1),
    )


def _sections(progress: Callable[[str], None]) -> tuple[Section, ...]:
    results = selfcheck.run(
        progress=lambda name: progress(f"operations at the released shapes: {name}")
    )
    sections = []
    for name in selfcheck.SECTIONS:
        own = [result for result in results if result.section == name]
        shares = [
            result.error / result.bound
            for result in own
            if result.error is not None and result.bound
        ]
        failed = tuple(result for result in own if not result.ok)
        sections.append(Section(name, len(own), max(shares, default=0.0), failed))
    return tuple(sections)


def check(
    model: DiffusionGemma, inputs: golden.Golden, expected: golden.Outputs, name: str, repeats: int
) -> Check:
    """Run ``model`` on the golden inputs and compare.

    Args:
        model: The model.
        inputs: The golden inputs.
        expected: The outputs of the reference.
        name: The name of the result.
        repeats: How many steps are timed.
    """
    cache = Cache(model.config.text)
    ids = mx.array(inputs.prompt)
    next_token = (model.encode([ids], [cache], logits="last").logits or [])[0]
    canvas = mx.array(inputs.canvas)[None]
    first = model.denoise(canvas, [cache]).logits
    soft = self_conditioning.dense(
        model, mx.array(inputs.scaled(model.config.text.vocab_size))[None]
    )
    conditioned = model.denoise(canvas, [cache], soft).logits
    ours = np.concatenate(
        [
            np.array(next_token),
            np.array(first[0, : golden.ROWS]),
            np.array(conditioned[0, : golden.ROWS]),
        ]
    )
    theirs = np.concatenate([expected.next_token[None], expected.first, expected.conditioned])
    largest = float(np.abs(ours - theirs).max())
    agreement = float((ours.argmax(-1) == theirs.argmax(-1)).mean())
    same = _same_steps(model, inputs.prompt, expected)
    times = [
        _seconds(lambda: mx.eval(model.denoise(canvas, [cache], soft).logits))
        for _ in range(repeats + 2)
    ][2:]
    steps = len(expected.argmax)
    ok = largest <= FLOAT32_BOUND and same == steps if name == "float32" else agreement >= AGREEMENT
    return Check(
        name,
        largest,
        _kl(theirs, ours),
        agreement,
        same,
        steps,
        1000 * statistics.median(times),
        ok,
    )


def _same_steps(model: DiffusionGemma, prompt: np.ndarray, expected: golden.Outputs) -> int:
    policy = ReferencePolicy.from_config(model.config.generation)
    session = Session(
        model,
        prompt.tolist(),
        policy,
        Draws(golden.SEED, model.config.text.vocab_size),
        model.config.generation.eos_token_ids,
        max_tokens=1,
    )
    loop = Loop(model, [session])
    same = 0
    while loop.active:
        try:
            ((_, step),) = loop.advance()
        except NonFiniteLogitsError:  # the table shows NaN as the difference
            break
        if step.step >= len(expected.argmax) or not (
            np.array_equal(np.array(step.argmax), expected.argmax[step.step])
            and np.array_equal(np.array(step.accepted), expected.accepted[step.step])
        ):
            break
        same += 1
    return same


def _kl(theirs: np.ndarray, ours: np.ndarray) -> float:
    """Mean KL(theirs || ours) of the rows' softmax, in nats."""
    p, q = (
        x
        - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - x.max(-1, keepdims=True)
        for x in (theirs.astype(np.float64), ours.astype(np.float64))
    )
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began
