"""A check of this machine in half a minute, without torch: nano's golden outputs and answers made here, and the step time.

The golden outputs come from the reference, so the differences printed are those to the reference.  ``deep`` adds every
operation at the released model's shapes (``selfcheck``), which takes a minute on a GPU and several on a CPU.
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

from mlx_diffgemma import conditioning, nano, selfcheck
from mlx_diffgemma.cache import Cache
from mlx_diffgemma.convert import convert
from mlx_diffgemma.device import describe, exact_float32, memory_limit
from mlx_diffgemma.diagnosis import Way, ways
from mlx_diffgemma.draws import Draws
from mlx_diffgemma.errors import NonFiniteLogitsError, UserError
from mlx_diffgemma.machine import check_machine
from mlx_diffgemma.model import DiffusionGemma
from mlx_diffgemma.nano import golden
from mlx_diffgemma.policy import ReferencePolicy
from mlx_diffgemma.session import Loop, Session
from mlx_diffgemma.weights import load_model

FLOAT32_BOUND = 1e-3  # largest logit difference of a sound float32 backend; measured ones lie near 1e-5
AGREEMENT = 0.9  # share of positions whose most probable token is the reference's, in bfloat16 and quantised

NUMBERS = ("the numbers differ from the reference's; upgrade MLX and macOS, and run `mlx-diffgemma doctor --deep`, which names the "
           "operation.")
KERNEL = "MLX has no such operation here or failed in it; upgrade MLX with `pip install --upgrade mlx`, and macOS."
ANSWER = ("the answer is not the reference's; if the golden outputs above hold, this is a fault of this package: report the line; "
          "if not, see there first.")
OPERATION = "MLX computes this wrong on this machine; upgrade MLX and macOS, and report the line to MLX if that does not help."


@dataclass(frozen=True)
class Check:
    """Differences to the golden outputs: in float32, in bfloat16, and with 4-bit weights under float32 activations.

    The 4-bit weights are packed on this machine, so the quantiser is checked with the products.
    ``logits`` is the largest absolute difference, ``kl`` the mean KL divergence in nats and ``argmax`` the share of rows
    with the reference's most probable token, over all golden rows; ``trajectory`` counts the leading steps of the golden
    trajectory that came out the same, of ``trajectory_steps``.
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
    """One kind of operation of ``selfcheck``: how many checks, the ``worst`` error as a share of its bound, and those that
    failed."""

    name: str
    checks: int
    worst: float
    failed: tuple[selfcheck.Result, ...]

    @property
    def ok(self) -> bool:
        return not self.failed


@dataclass(frozen=True)
class Diagnosis:
    """``deep`` is empty where it was not asked for; ``seconds`` is the time of the whole."""

    machine: dict[str, str]
    memory_limit: int
    nano: str
    checks: tuple[Check, ...]
    ways: tuple[Way, ...]
    deep: tuple[Section, ...] = ()
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return (all(check.ok for check in self.checks) and all(way.ok for way in self.ways)
                and all(section.ok for section in self.deep))

    @property
    def advice(self) -> list[str]:
        """What to do about each failed check, the most likely cause first."""
        found = [f"{check.name}: {NUMBERS}" for check in self.checks if not check.ok]
        for way in self.ways:
            if not way.ok:
                found.append(f"{way.name}: {KERNEL if 'Error:' in way.note else ANSWER}")
        for section in self.deep:
            found += [f"{result.section}, {result.name}: {KERNEL if result.note else OPERATION}" for result in section.failed]
        return found

    def record(self) -> dict[str, object]:
        """For JSON, which has no word for what is no number: null."""
        return {**_without_nan(asdict(self)), "ok": self.ok, "advice": self.advice}


def diagnose(repeats: int = 10, deep: bool = False, progress: Callable[[str], None] = lambda _: None) -> Diagnosis:
    """Recompute the golden outputs in every way of ``Check`` and answer in every way of ``diagnosis``.

    Args:
        repeats: how many steps are timed in each dtype.
        deep: check the operations at the released shapes too.
        progress: called with the name of the next check.
    Errors: UserError where MLX does not run, or nano's files are of different versions.
    """
    check_machine()
    began = time.perf_counter()
    expected, checks, taken = golden.load(), list[Check](), list[Way]()
    if expected.model_sha256 != golden.sha256(nano.FOLDER / "model.safetensors"):
        raise UserError("nano's weights and golden outputs are of different versions; install mlx-diffgemma again.")
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
    return Diagnosis(machine, memory_limit(), nano.VERSION, tuple(checks), tuple(taken), sections,
                     round(time.perf_counter() - began, 1))


def _sections(progress: Callable[[str], None]) -> tuple[Section, ...]:
    results = selfcheck.run(progress=lambda name: progress(f"operations at the released shapes: {name}"))
    sections = []
    for name in selfcheck.SECTIONS:
        own = [result for result in results if result.section == name]
        shares = [result.error / result.bound for result in own if result.error is not None and result.bound]
        failed = tuple(result for result in own if not result.ok)
        sections.append(Section(name, len(own), max(shares, default=0.0), failed))
    return tuple(sections)


def check(model: DiffusionGemma, inputs: golden.Golden, expected: golden.Outputs, name: str, repeats: int) -> Check:
    """Run ``model`` on the golden inputs and compare."""
    cache, ids = Cache(model.config.text), mx.array(inputs.prompt)
    next_token = (model.encode([ids], [cache], logits="last").logits or [])[0]
    canvas = mx.array(inputs.canvas)[None]
    first = model.denoise(canvas, [cache]).logits
    soft = conditioning.dense(model, mx.array(inputs.scaled(model.config.text.vocab_size))[None])
    conditioned = model.denoise(canvas, [cache], soft).logits
    ours = np.concatenate([np.array(next_token), np.array(first[0, : golden.ROWS]),
                           np.array(conditioned[0, : golden.ROWS])])
    theirs = np.concatenate([expected.next_token[None], expected.first, expected.conditioned])
    largest = float(np.abs(ours - theirs).max())
    agreement = float((ours.argmax(-1) == theirs.argmax(-1)).mean())
    same = _same_steps(model, inputs.prompt, expected)
    times = [_seconds(lambda: mx.eval(model.denoise(canvas, [cache], soft).logits)) for _ in range(repeats + 2)][2:]
    steps = len(expected.argmax)
    ok = largest <= FLOAT32_BOUND and same == steps if name == "float32" else agreement >= AGREEMENT
    return Check(name, largest, _kl(theirs, ours), agreement, same, steps, 1000 * statistics.median(times), ok)


def _same_steps(model: DiffusionGemma, prompt: np.ndarray, expected: golden.Outputs) -> int:
    policy = ReferencePolicy.from_config(model.config.generation)
    session = Session(model, prompt.tolist(), policy, Draws(golden.SEED, model.config.text.vocab_size),
                      model.config.generation.eos_token_ids, max_tokens=1)
    loop, same = Loop(model, [session]), 0
    while loop.active:
        try:
            ((_, step),) = loop.advance()
        except NonFiniteLogitsError:  # the table shows it as a difference that is no number
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
    p, q = (x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)
            for x in (theirs.astype(np.float64), ours.astype(np.float64)))
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
