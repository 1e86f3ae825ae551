"""A check of this machine in two minutes, without torch: nano's golden outputs recomputed here, and the step time.

The golden outputs come from the reference, so the differences printed are those to the reference.
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

from mlx_diffgemma import conditioning, nano
from mlx_diffgemma.cache import Cache
from mlx_diffgemma.convert import convert
from mlx_diffgemma.device import describe, exact_float32, memory_limit
from mlx_diffgemma.draws import Draws
from mlx_diffgemma.errors import NonFiniteLogitsError, UserError
from mlx_diffgemma.model import DiffusionGemma
from mlx_diffgemma.nano import golden
from mlx_diffgemma.policy import ReferencePolicy
from mlx_diffgemma.session import Loop, Session
from mlx_diffgemma.weights import load_model

FLOAT32_BOUND = 1e-3  # largest logit difference of a sound float32 backend; measured ones lie near 1e-5
AGREEMENT = 0.9  # share of positions whose most probable token is the reference's, in bfloat16 and quantised


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
class Diagnosis:
    machine: dict[str, str]
    memory_limit: int
    nano: str
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    def record(self) -> dict[str, object]:
        """For JSON, which has no word for what is no number: null."""
        return {**_without_nan(asdict(self)), "ok": self.ok}


def diagnose(repeats: int = 10) -> Diagnosis:
    """Recompute the golden outputs in every way of ``Check``; ``repeats`` steps are timed in each."""
    expected, checks = golden.load(), []
    if expected.model_sha256 != golden.sha256(nano.FOLDER / "model.safetensors"):
        raise UserError("nano's weights and golden outputs are of different versions; install mlx-diffgemma again.")
    exact_float32()
    for dtype in ("float32", "bfloat16"):
        checks.append(check(load_model(nano.FOLDER, dtype), expected, expected.original, dtype, repeats))
    with tempfile.TemporaryDirectory() as name:
        packed = load_model(convert(nano.NAME, Path(name) / "packed", quantize=True), "float32")
        checks.append(check(packed, expected, expected.quantised, "4bit", repeats))
    machine = {key: value for key, value in describe(mx.float32).items() if key != "dtype"}
    return Diagnosis(machine, memory_limit(), nano.VERSION, tuple(checks))


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
