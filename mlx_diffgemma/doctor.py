"""A check of this machine in two minutes, without torch: nano's golden outputs recomputed here, and the step time.

The golden outputs come from the reference, so the differences printed are those to the reference.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_diffgemma import conditioning, nano
from mlx_diffgemma.cache import Cache
from mlx_diffgemma.device import describe, exact_float32, memory_limit
from mlx_diffgemma.draws import Draws
from mlx_diffgemma.errors import NonFiniteLogitsError, UserError
from mlx_diffgemma.model import DiffusionGemma
from mlx_diffgemma.nano import golden
from mlx_diffgemma.policy import ReferencePolicy
from mlx_diffgemma.session import Loop, Session
from mlx_diffgemma.weights import load_model

FLOAT32_BOUND = 1e-3  # largest logit difference of a sound float32 backend; measured ones lie near 1e-5
BF16_AGREEMENT = 0.9  # share of positions whose most probable token is the reference's


@dataclass(frozen=True)
class DtypeCheck:
    """Differences to the golden outputs in one dtype.

    ``logits`` is the largest absolute difference, ``kl`` the mean KL divergence in nats and ``argmax`` the share of rows
    with the reference's most probable token, over all golden rows; ``trajectory`` counts the leading steps of the golden
    trajectory that came out the same, of ``trajectory_steps``.
    """

    dtype: str
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
    checks: tuple[DtypeCheck, ...]

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    def record(self) -> dict[str, object]:
        """For JSON, which has no word for what is no number: null."""
        return {**_without_nan(asdict(self)), "ok": self.ok}


def diagnose(repeats: int = 20) -> Diagnosis:
    """Recompute the golden outputs in float32 and bfloat16; ``repeats`` steps are timed in each."""
    expected, checks = golden.load(), []
    if expected.model_sha256 != golden.sha256(nano.FOLDER / "model.safetensors"):
        raise UserError("nano's weights and golden outputs are of different versions; install mlx-diffgemma again.")
    exact_float32()
    for dtype in ("float32", "bfloat16"):
        model = load_model(nano.FOLDER, dtype)
        checks.append(check(model, expected, dtype, repeats))
    machine = {key: value for key, value in describe(mx.float32).items() if key != "dtype"}
    return Diagnosis(machine, memory_limit(), nano.VERSION, tuple(checks))


def check(model: DiffusionGemma, expected: golden.Golden, dtype: str, repeats: int) -> DtypeCheck:
    """Run ``model`` on the golden inputs and compare."""
    cache, ids = Cache(model.config.text), mx.array(expected.prompt)
    next_token = (model.encode([ids], [cache], logits="last").logits or [])[0]
    canvas = mx.array(expected.canvas)[None]
    first = model.denoise(canvas, [cache]).logits
    soft = conditioning.dense(model, mx.array(expected.scaled(model.config.text.vocab_size))[None])
    conditioned = model.denoise(canvas, [cache], soft).logits
    ours = np.concatenate([np.array(next_token), np.array(first[0, : golden.ROWS]),
                           np.array(conditioned[0, : golden.ROWS])])
    theirs = np.concatenate([expected.next_token[None], expected.first, expected.conditioned])
    largest = float(np.abs(ours - theirs).max())
    agreement = float((ours.argmax(-1) == theirs.argmax(-1)).mean())
    same = _same_steps(model, expected)
    times = [_seconds(lambda: mx.eval(model.denoise(canvas, [cache], soft).logits)) for _ in range(repeats + 2)][2:]
    steps = len(expected.argmax)
    ok = largest <= FLOAT32_BOUND and same == steps if dtype == "float32" else agreement >= BF16_AGREEMENT
    return DtypeCheck(dtype, largest, _kl(theirs, ours), agreement, same, steps, 1000 * statistics.median(times), ok)


def _same_steps(model: DiffusionGemma, expected: golden.Golden) -> int:
    policy = ReferencePolicy.from_config(model.config.generation)
    session = Session(model, expected.prompt.tolist(), policy, Draws(golden.SEED, model.config.text.vocab_size),
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
