"""Named rules that change the reference algorithm, and the presets made of them.  All are off unless asked for.

What each costs and gains is measured in docs/speed.md (``python bench/rules.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from mlx_diffgemma.errors import UserError
from mlx_diffgemma.policy import ReferencePolicy, Standing
from mlx_diffgemma.sampler import StepNumbers

PARTS = 8  # a canvas is shortened in eighths, so that few shapes occur
LENGTHS = ("growing", "fitting")


@dataclass(frozen=True)
class RulesPolicy(ReferencePolicy):
    """The reference sampler with rules of its own; every default is the reference.

    - ``min_steps``: a canvas does not converge before.  With ``stability`` 0 the stop looks at the mean entropy alone.
    - ``temperature_steps``: the temperature falls over this many steps in place of ``max_steps``, so that a cap on the steps
      leaves the temperatures as they were.
    - ``plateau``: a canvas ends, unconverged, when its lowest mean entropy is this many steps old; 0 is off.
    - ``drop_tail``: when the first end token has stood at one place in the argmax for this many steps, the positions after
      it leave the canvas, in eighths.  They count as certain in the mean entropy.  0 is off.
    - ``length``: of a canvas.  A number; "fitting": what the answer may still have, in eighths of the full canvas; "growing": a
      quarter of the full canvas, then twice as long as the one before.
    - ``reroll_empty``: how often a first canvas that begins with the end token is tried again.
    - ``retry_unconverged``: how often a canvas that did not converge is tried again.  After the last attempt the one with the
      lowest mean entropy is committed.
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
            ("min_denoising_steps", self.min_steps, 1), ("temperature_steps", self.schedule_steps, 1),
            ("plateau", self.plateau, 0), ("drop_tail", self.drop_tail, 0), ("reroll_empty", self.reroll_empty, 0),
            ("retry_unconverged", self.retry_unconverged, 0),
            ("canvas_length", 1 if self.length is None or isinstance(self.length, str) else self.length, 1),
        ):
            if isinstance(value, float) or not hasattr(value, "__index__") or value < low:
                raise UserError(f"{name} must be a whole number of at least {low}, got {value!r}.")
        if not self.t_min and self.schedule_steps < self.max_steps:
            raise UserError(f"With t_min 0 the temperature would reach 0 after {self.schedule_steps} of {self.max_steps} steps; "
                            "give a t_min above 0.")
        if self.min_steps > self.max_steps:
            raise UserError(f"min_denoising_steps {self.min_steps} exceeds max_denoising_steps {self.max_steps}.")
        if isinstance(self.length, str) and self.length not in LENGTHS:
            raise UserError(f"canvas_length must be a number or one of {', '.join(LENGTHS)}, got {self.length!r}.")

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

    def confident(self, standing: Standing) -> bool:
        return super().confident(standing) and standing.steps >= self.min_steps

    def judge(self, standing: Standing) -> str | None:
        if standing.stop and standing.steps >= self.min_steps:
            return "converged"
        lowest = min(range(standing.steps), key=lambda step: standing.entropies[step])
        if self.plateau and standing.steps - 1 - lowest >= self.plateau:
            return "plateau"
        return "max_steps" if standing.steps >= self.max_steps else None

    def rejects(self, standing: Standing, reason: str) -> bool:
        empty = standing.canvas_index == 0 and standing.ends[-1] == 0
        return (empty and standing.retry < self.reroll_empty) or (reason != "converged" and standing.retry < self.retry_unconverged)

    def keeps(self, standing: Standing, rows: int) -> int:
        last = standing.ends[-self.drop_tail :] if self.drop_tail else ()
        if len(last) < self.drop_tail or len(set(last)) != 1:
            return rows
        part = max(1, standing.length // PARTS)
        return min(rows, -(-(last[0] + 1) // part) * part)


@dataclass(frozen=True)
class ConfidencePolicy(RulesPolicy):
    """Accepts a position for good when its token has the probability ``threshold``, in place of the entropy bound.

    At least one position a step.  The canvas also converges when all are accepted.  Source: mlx-vlm's default sampler.
    """

    threshold: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.threshold <= 1:
            raise UserError(f"threshold must be above 0 and at most 1, got {self.threshold}.")

    @property
    def name(self) -> str:
        return "confidence-threshold"

    def certificate(self, standing: Standing) -> str:
        return "confident-or-all-accepted"

    @classmethod
    def numbers(cls, policies: Sequence[Any], steps: Sequence[int]) -> StepNumbers:
        return replace(super().numbers(policies, steps), threshold=mx.array([p.threshold for p in policies]))


SAMPLERS = ("entropy-bound", "confidence-threshold")

# Options of a generation that a preset sets; what they cost on nano is in docs/speed.md.
PRESETS: dict[str, dict[str, Any]] = {
    "reference": {},
    "balanced": {"stability_threshold": 0},
    "fast": {"stability_threshold": 0, "t_max": 0.6, "drop_tail": 1, "coverage": 0.999},
}
