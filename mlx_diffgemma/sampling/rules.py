"""Named rules that change the reference algorithm, and the presets made of them.

All are off by default.

What each costs and gains is measured in docs/speed.md (``python bench/rules.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from mlx_diffgemma.errors import UserError
from mlx_diffgemma.sampling.policy import ReferencePolicy
from mlx_diffgemma.sampling.sampler import StepNumbers
from mlx_diffgemma.sampling.stopping import (
    PARTS,
    Converged,
    DropTail,
    MaxSteps,
    Plateau,
    RerollEmpty,
    RetryRule,
    RetryUnconverged,
    StopContext,
    StopRule,
    TrimRule,
)

LENGTHS = ("growing", "fitting")


@dataclass(frozen=True)
class RulesPolicy(ReferencePolicy):
    """The reference sampler with rules of its own; every default is the reference.

    - ``min_steps``: a canvas does not converge before this step.  With ``stability`` 0 the stop
      rule uses only the mean entropy.
    - ``temperature_steps``: the temperature falls over this many steps instead of ``max_steps``.
      So a cap on the steps does not change the temperatures.
    - ``plateau``: a canvas ends without converging when its lowest mean entropy is this many steps
      old.  0 is off.
    - ``drop_tail``: once the first end token has kept its position in the argmax for this many
      steps, the positions after it leave the canvas, in eighths.  They count as certain in the mean
      entropy.  0 is off.
    - ``length``: the length of a canvas.  It is a number, or "fitting": what the answer may still
      have, in eighths of the full canvas, or "growing": a quarter of the full canvas, then twice as
      long as the one before.
    - ``reroll_empty``: how often a first canvas that begins with the end token is tried again.
    - ``retry_unconverged``: how often a canvas that did not converge is tried again.  After the
      last attempt, the attempt with the lowest mean entropy is committed.
    """

    min_steps: int = 1
    temperature_steps: int | None = None
    plateau: int = 0
    drop_tail: int = 0
    length: int | str | None = None
    reroll_empty: int = 0
    retry_unconverged: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value, low in (
            ("min_denoising_steps", self.min_steps, 1),
            ("temperature_steps", self.schedule_steps, 1),
            ("plateau", self.plateau, 0),
            ("drop_tail", self.drop_tail, 0),
            ("reroll_empty", self.reroll_empty, 0),
            ("retry_unconverged", self.retry_unconverged, 0),
            (
                "canvas_length",
                1 if self.length is None or isinstance(self.length, str) else self.length,
                1,
            ),
        ):
            if isinstance(value, float) or not hasattr(value, "__index__") or value < low:
                raise UserError(f"{name} must be a whole number of at least {low}, got {value!r}.")
        if not self.t_min and self.schedule_steps < self.max_steps:
            raise UserError(
                f"With t_min 0 the temperature would reach 0 after {self.schedule_steps} of {self.max_steps} steps; "
                "give a t_min above 0."
            )
        if self.min_steps > self.max_steps:
            raise UserError(
                f"min_denoising_steps {self.min_steps} exceeds max_denoising_steps {self.max_steps}."
            )
        if isinstance(self.length, str) and self.length not in LENGTHS:
            raise UserError(
                f"canvas_length must be a number or one of {', '.join(LENGTHS)}, got {self.length!r}."
            )

    @property
    def name(self) -> str:
        return "rules"

    @property
    def schedule_steps(self) -> int:
        return self.max_steps if self.temperature_steps is None else self.temperature_steps

    def canvas_length(self, canvas_index: int, remaining: int, full: int) -> int:
        if self.length is not None and not isinstance(self.length, str):
            return min(int(self.length), full)
        part = max(1, full // PARTS)
        if self.length == "growing":
            return min(full, max(1, full // 4) << canvas_index)
        if self.length == "fitting":
            return min(full, -(-remaining // part) * part)
        return full

    def is_confident(self, context: StopContext) -> bool:
        return super().is_confident(context) and context.steps >= self.min_steps

    @property
    def stop_rules(self) -> Sequence[StopRule]:
        plateau = [Plateau(self.plateau)] if self.plateau else []
        return (Converged(self.min_steps), *plateau, MaxSteps(self.max_steps))

    @property
    def retry_rules(self) -> Sequence[RetryRule]:
        """The rules that try a canvas again; one that applies is enough."""
        return (RerollEmpty(self.reroll_empty), RetryUnconverged(self.retry_unconverged))

    @property
    def trim_rules(self) -> Sequence[TrimRule]:
        """The rules that shorten a canvas, one after the other."""
        return (DropTail(self.drop_tail),) if self.drop_tail else ()

    def should_retry(self, context: StopContext, reason: str) -> bool:
        return any(rule(context, reason) for rule in self.retry_rules)

    def trim_to(self, context: StopContext, rows: int) -> int:
        for rule in self.trim_rules:
            rows = rule(context, rows)
        return rows


@dataclass(frozen=True)
class ConfidencePolicy(RulesPolicy):
    """Accepts a position permanently when its token reaches the probability ``threshold``.

    This replaces the entropy bound.  Each step accepts at least one position.  The canvas also
    converges when all positions are accepted.  Source: mlx-vlm's default sampler.
    """

    threshold: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.threshold <= 1:
            raise UserError(f"threshold must be above 0 and at most 1, got {self.threshold}.")

    @property
    def name(self) -> str:
        return "confidence-threshold"

    def certificate(self, context: StopContext) -> str:
        return "confident-or-all-accepted"

    @classmethod
    def numbers(cls, policies: Sequence[Any], steps: Sequence[int]) -> StepNumbers:
        return replace(
            super().numbers(policies, steps), threshold=mx.array([p.threshold for p in policies])
        )


SAMPLERS = ("entropy-bound", "confidence-threshold")

# Options of a generation that a preset sets; what they cost on nano is in docs/speed.md.
PRESETS: dict[str, dict[str, Any]] = {
    "reference": {},
    "balanced": {"stability_threshold": 0},
    "fast": {"stability_threshold": 0, "t_max": 0.6, "drop_tail": 1, "coverage": 0.999},
}
