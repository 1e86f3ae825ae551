"""The policy of a canvas, a frozen object: how it is initialised, accepted, renoised and stopped.

The loop in :mod:`mlx_diffgemma.decoding.session` asks the policy and decides nothing itself.
``ReferencePolicy`` is the algorithm of transformers.  The policies of
:mod:`mlx_diffgemma.sampling.rules` change it by named rules.

| policy | batch | stream | ar mode |
|---|---|---|---|
| reference | yes | yes | no (ar mode takes no policy) |
| rules | yes | yes | no |
| confidence-threshold | yes | yes | no |
| drafted (:mod:`drafter.policy`, around any of these) | yes | yes | no (drafts there are another protocol) |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_diffgemma.errors import UserError
from mlx_diffgemma.model.generation_config import GenerationConfig
from mlx_diffgemma.sampling.draws import DrawSource
from mlx_diffgemma.sampling.penalties import Penalties
from mlx_diffgemma.sampling.protocols import CanvasDrafter, Policy
from mlx_diffgemma.sampling.sampler import (
    Before,
    Marginals,
    SamplerStep,
    StepNumbers,
    few_candidates,
    sample_step,
)
from mlx_diffgemma.sampling.stopping import Converged, MaxSteps, StopContext, StopRule, first_reason

MAX_TEMPERATURE = 2.0


@dataclass(frozen=True)
class ReferencePolicy:
    """The reference sampler.

    The entropy bound and the confidence threshold are in nats.  ``temperature`` scales the
    schedule; with 0 the argmax replaces the draw.

    ``coverage`` makes self-conditioning sparse: a position whose most probable tokens hold that
    share of the mass uses only these tokens.  None is the reference, which uses the whole
    vocabulary at every position.
    """

    max_steps: int
    entropy_bound: float
    t_min: float
    t_max: float
    confidence_threshold: float
    stability: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    coverage: float | None = None
    fuses_commit: bool = True
    min_p: float = 0.0
    penalties: Penalties | None = None

    @classmethod
    def from_config(cls, config: GenerationConfig, **own: Any) -> Any:
        """Make a policy with the numbers of ``config``, except for the fields in ``own``.

        Raises:
            UserError: A number is out of range.
        """
        return cls(
            **{
                "max_steps": config.max_denoising_steps,
                "entropy_bound": config.entropy_bound,
                "t_min": config.t_min,
                "t_max": config.t_max,
                "confidence_threshold": config.confidence_threshold,
                "stability": config.stability_threshold,
            }
            | own
        )

    def __post_init__(self) -> None:
        check_sampling(self.temperature, self.top_k, self.top_p, self.min_p)
        for name, value, low in (
            ("max_denoising_steps", self.max_steps, 1),
            ("stability_threshold", self.stability, 0),
        ):
            if value < low:
                raise UserError(f"{name} must be at least {low}, got {value}.")
        for name, number in (
            ("entropy_bound", self.entropy_bound),
            ("confidence_threshold", self.confidence_threshold),
        ):
            if not number > 0:
                raise UserError(f"{name} must be above 0 nats, got {number}.")
        if self.coverage is not None:
            check_coverage(self.coverage)
        if not 0 <= self.t_min < self.t_max:
            raise UserError(
                f"t_min and t_max must satisfy 0 <= t_min < t_max, got {self.t_min} and {self.t_max}."
            )

    @property
    def name(self) -> str:
        return "reference"

    @property
    def drafter(self) -> CanvasDrafter | None:
        return None

    @property
    def surprise_limit(self) -> float | None:
        return None

    @property
    def sampling(self) -> Policy:
        return self

    def canvas_length(self, canvas_index: int, remaining: int, full: int) -> int:
        return full

    def initial_canvas(
        self, draws: DrawSource, canvas_index: int, retry: int, start: int, length: int
    ) -> np.ndarray:
        return draws.step(canvas_index, retry, 0, start, length).initial

    @property
    def schedule_steps(self) -> int:
        """The number of steps in which the temperature falls from t_max to t_min."""
        return self.max_steps

    def schedule(self, step: int) -> float:
        """The temperature of step 0, 1, …  The first is t_max, the last is one step above t_min."""
        scale = self.temperature or 1.0
        remaining = max(0, self.schedule_steps - step) / self.schedule_steps
        return scale * (self.t_min + (self.t_max - self.t_min) * remaining)

    @classmethod
    def numbers(cls, policies: Sequence[Any], steps: Sequence[int]) -> StepNumbers:
        top_k, top_p, coverage = (
            [getattr(p, name) for p in policies] for name in ("top_k", "top_p", "coverage")
        )
        min_p = [p.min_p for p in policies]
        greedy = [p.temperature == 0 for p in policies]
        return StepNumbers(
            temperature=mx.array(
                [p.schedule(step) for p, step in zip(policies, steps, strict=True)]
            ),
            entropy_bound=mx.array([p.entropy_bound for p in policies]),
            confidence=mx.array([p.confidence_threshold for p in policies]),
            greedy=mx.array(greedy) if any(greedy) else None,
            top_k=mx.array(top_k) if any(top_k) else None,
            top_p=mx.array(top_p) if min(top_p) < 1 else None,
            min_p=mx.array(min_p) if any(min_p) else None,
            few=few_candidates(top_k),
            # In a dense row of a batch with sparse rows, no position is covered.
            tail=mx.array([-1.0 if c is None else 1 - c for c in coverage])
            if any(coverage)
            else None,
        )

    @classmethod
    def sample(
        cls,
        policies: Sequence[Any],
        steps: Sequence[int],
        positions: Sequence[int],
        logits: mx.array,
        u: np.ndarray,
        renoise: np.ndarray,
        before: Before,
        eos_ids: mx.array,
        forced: Marginals | None = None,
    ) -> SamplerStep:
        numbers = cls.numbers(policies, steps)
        if any(count != logits.shape[1] for count in positions):
            numbers = replace(numbers, positions=mx.array(positions, dtype=mx.float32))
        draws = None if all(p.temperature == 0 for p in policies) else mx.array(u)
        return sample_step(logits, draws, mx.array(renoise), before, numbers, eos_ids, forced)

    def is_confident(self, context: StopContext) -> bool:
        return context.entropies[-1] < self.confidence_threshold

    def needs_verification(self, context: StopContext) -> bool:
        return False

    @property
    def stop_rules(self) -> Sequence[StopRule]:
        """The rules that end an attempt, the first that applies before the others."""
        return (Converged(), MaxSteps(self.max_steps))

    def stop_reason(self, context: StopContext) -> str | None:
        return first_reason(self.stop_rules, context)

    def certificate(self, context: StopContext) -> str:
        return "stable-and-confident" if self.stability else "confident"

    def should_retry(self, context: StopContext, reason: str) -> bool:
        return False

    def trim_to(self, context: StopContext, rows: int) -> int:
        return rows


def check_coverage(coverage: float) -> None:
    """Raise UserError if ``coverage`` is not a share, or is too close to 1 for float32."""
    if not 0 < coverage <= 1 - 1e-6:
        raise UserError(
            f"coverage must lie above 0 and at most at 0.999999, got {coverage}; for all of the mass take dense "
            "self-conditioning."
        )


def check_sampling(temperature: float, top_k: int, top_p: float, min_p: float = 0.0) -> None:
    """Check the sampling options.

    Args:
        temperature: From 0 to MAX_TEMPERATURE; 0 takes the argmax.
        top_k: At least 0 and below 2**31; 0 is off.
        top_p: Above 0 and at most 1; 1 is off.
        min_p: At least 0 and at most 1; 0 is off.

    Raises:
        UserError: An option is out of range.
    """
    if not 0 <= temperature <= MAX_TEMPERATURE:
        raise UserError(
            f"temperature must lie between 0 and {MAX_TEMPERATURE:g}, got {temperature}; 1 is the checkpoint's "
            "schedule and 0 takes the most probable token."
        )
    if not 0 <= top_k < 2**31:
        raise UserError(f"top_k must be 0 (off) or more, and below 2**31, got {top_k}.")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p must be above 0 and at most 1 (off), got {top_p}.")
    if not 0 <= min_p <= 1:
        raise UserError(f"min_p must lie between 0 (off) and 1, got {min_p}.")
