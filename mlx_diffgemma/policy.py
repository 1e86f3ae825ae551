"""How a canvas is seeded, accepted, renoised, stopped, judged and certified: one frozen object.

The loop in :mod:`mlx_diffgemma.session` asks the policy and decides nothing itself.  ``ReferencePolicy`` is the
algorithm of transformers; the policies of :mod:`mlx_diffgemma.rules` change it by named rules.

| policy | batch | stream | ar mode |
|---|---|---|---|
| reference | yes | yes | no (ar mode takes no policy) |
| rules | yes | yes | no |
| confidence-threshold | yes | yes | no |
| drafted (:mod:`drafter.canvas`, around any of these) | yes | yes | no (drafts there are another protocol) |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from mlx_diffgemma.config import GenerationConfig
from mlx_diffgemma.drafting import CanvasDrafter
from mlx_diffgemma.draws import DrawSource
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.sampler import Before, Marginals, SamplerStep, StepNumbers, few_candidates, sample_step

MAX_TEMPERATURE = 2.0


@dataclass(frozen=True)
class Standing:
    """Where a canvas that began with ``length`` positions stands after a step, as the host knows it.

    ``stop`` is the flag of the device's stop rule.  ``entropies`` (mean, nats) and ``ends`` (position of the first end
    token in the argmax, or the canvas's length) have one entry for each step of this attempt, the last of this one.
    ``retry`` counts the attempts before.  ``drafted``: this attempt has guesses of a drafter in it, as ``drafts`` of those before
    had.  ``surprise``, where the policy consulted the causal mode about the argmax: the most, in nats, by which the
    log-probability of a token of the text, its end token included, given those before it, lies below its expectation, the
    negative entropy at that place.
    """

    canvas_index: int
    retry: int
    length: int
    stop: bool
    entropies: Sequence[float]
    ends: Sequence[int]
    drafted: bool = False
    drafts: int = 0
    surprise: float | None = None

    @property
    def steps(self) -> int:
        return len(self.entropies)


class Policy(Protocol):
    """What the loop asks.  Rows whose policies have one class are sampled together, each with its own numbers."""

    @property
    def name(self) -> str: ...

    @property
    def max_steps(self) -> int: ...

    @property
    def stability(self) -> int:
        """How many argmax canvases of earlier steps the stop rule compares with."""

    @property
    def fuses_commit(self) -> bool:
        """Whether a finished canvas may be encoded together with the first step of the next one."""

    @property
    def drafter(self) -> CanvasDrafter | None:
        """What guesses the first attempt at each canvas; None: it begins with what ``seed`` gives."""

    @property
    def surprise_limit(self) -> float | None:
        """Above which surprise in nats (see ``Standing``) a token is not believed; None: the causal mode is never asked."""

    @property
    def sampling(self) -> Policy:
        """The policy whose ``sample`` this one uses: itself, or what it wraps."""

    def canvas_length(self, canvas_index: int, remaining: int, full: int) -> int:
        """How long a canvas is, of at most ``full`` positions, when the answer may have ``remaining`` more tokens."""

    def seed(self, draws: DrawSource, canvas_index: int, retry: int, start: int, length: int) -> np.ndarray:
        """Ids [length] of a new canvas."""

    def schedule(self, step: int) -> float:
        """Temperature of step 0, 1, …"""

    @staticmethod
    def numbers(policies: Sequence[Any], steps: Sequence[int]) -> StepNumbers:
        """What the rules of a step depend on."""

    @staticmethod
    def sample(policies: Sequence[Any], steps: Sequence[int], positions: Sequence[int], logits: mx.array, u: np.ndarray,
               renoise: np.ndarray, before: Before, eos_ids: mx.array, forced: Marginals | None = None) -> SamplerStep:
        """One sampler step of a batch whose rows stand at different ``steps``; shapes and ``forced`` as in ``sample_step``.

        ``positions``: with how many free ones each canvas began, which may be other than are left of it.
        """

    def confident(self, standing: Standing) -> bool:
        """Whether the canvas could converge with this step as far as its entropy goes."""

    def consults(self, standing: Standing) -> bool:
        """Whether ``judge`` wants to know what the causal mode makes of the argmax."""

    def judge(self, standing: Standing) -> str | None:
        """Why the canvas ends with this step: "converged", "plateau", "max_steps", "watchdog" or "judge"; None while it goes on."""

    def certificate(self, standing: Standing) -> str:
        """The name of the rule under which a canvas has converged."""

    def rejects(self, standing: Standing, reason: str) -> bool:
        """Whether the canvas that ended is thrown away and tried again with other draws."""

    def keeps(self, standing: Standing, rows: int) -> int:
        """How many of the canvas's ``rows`` go on to the next step, from the first on."""


@dataclass(frozen=True)
class ReferencePolicy:
    """The reference sampler.  Bound and threshold in nats; ``temperature`` scales the schedule, 0 takes the argmax for the draw.

    ``coverage`` makes self-conditioning sparse: positions whose most probable tokens hold that much of the mass go on with
    these alone.  None is the reference, the whole vocabulary everywhere.
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

    @classmethod
    def from_config(cls, config: GenerationConfig, **own: Any) -> Any:
        """With the numbers of ``config`` but for the fields in ``own``.  Errors: UserError for numbers out of range."""
        return cls(**{"max_steps": config.max_denoising_steps, "entropy_bound": config.entropy_bound, "t_min": config.t_min,
                      "t_max": config.t_max, "confidence_threshold": config.confidence_threshold,
                      "stability": config.stability_threshold} | own)

    def __post_init__(self) -> None:
        check_sampling(self.temperature, self.top_k, self.top_p)
        for name, value, low in (("max_denoising_steps", self.max_steps, 1), ("stability_threshold", self.stability, 0)):
            if value < low:
                raise UserError(f"{name} must be at least {low}, got {value}.")
        for name, number in (("entropy_bound", self.entropy_bound), ("confidence_threshold", self.confidence_threshold)):
            if not number > 0:
                raise UserError(f"{name} must be above 0 nats, got {number}.")
        if self.coverage is not None:
            check_coverage(self.coverage)
        if not 0 <= self.t_min < self.t_max:
            raise UserError(f"t_min and t_max must satisfy 0 <= t_min < t_max, got {self.t_min} and {self.t_max}.")

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

    def seed(self, draws: DrawSource, canvas_index: int, retry: int, start: int, length: int) -> np.ndarray:
        return draws.step(canvas_index, retry, 0, start, length).initial

    @property
    def schedule_steps(self) -> int:
        """Over how many steps the temperature falls from t_max to t_min."""
        return self.max_steps

    def schedule(self, step: int) -> float:
        """Temperature of step 0, 1, …; the first is t_max, the last one step above t_min."""
        scale = self.temperature or 1.0
        remaining = max(0, self.schedule_steps - step) / self.schedule_steps
        return scale * (self.t_min + (self.t_max - self.t_min) * remaining)

    @classmethod
    def numbers(cls, policies: Sequence[Any], steps: Sequence[int]) -> StepNumbers:
        top_k, top_p, coverage = ([getattr(p, name) for p in policies] for name in ("top_k", "top_p", "coverage"))
        greedy = [p.temperature == 0 for p in policies]
        return StepNumbers(
            temperature=mx.array([p.schedule(step) for p, step in zip(policies, steps, strict=True)]),
            entropy_bound=mx.array([p.entropy_bound for p in policies]),
            confidence=mx.array([p.confidence_threshold for p in policies]),
            greedy=mx.array(greedy) if any(greedy) else None,
            top_k=mx.array(top_k) if any(top_k) else None,
            top_p=mx.array(top_p) if min(top_p) < 1 else None,
            few=few_candidates(top_k),
            # A dense row beside sparse ones: no position of it is covered.
            tail=mx.array([-1.0 if c is None else 1 - c for c in coverage]) if any(coverage) else None,
        )

    @classmethod
    def sample(cls, policies: Sequence[Any], steps: Sequence[int], positions: Sequence[int], logits: mx.array, u: np.ndarray,
               renoise: np.ndarray, before: Before, eos_ids: mx.array, forced: Marginals | None = None) -> SamplerStep:
        numbers = cls.numbers(policies, steps)
        if any(count != logits.shape[1] for count in positions):
            numbers = replace(numbers, positions=mx.array(positions, dtype=mx.float32))
        draws = None if all(p.temperature == 0 for p in policies) else mx.array(u)
        return sample_step(logits, draws, mx.array(renoise), before, numbers, eos_ids, forced)

    def confident(self, standing: Standing) -> bool:
        return standing.entropies[-1] < self.confidence_threshold

    def consults(self, standing: Standing) -> bool:
        return False

    def judge(self, standing: Standing) -> str | None:
        return "converged" if standing.stop else "max_steps" if standing.steps >= self.max_steps else None

    def certificate(self, standing: Standing) -> str:
        return "stable-and-confident" if self.stability else "confident"

    def rejects(self, standing: Standing, reason: str) -> bool:
        return False

    def keeps(self, standing: Standing, rows: int) -> int:
        return rows


def check_coverage(coverage: float) -> None:
    """Errors: UserError for a share that is none, or so close to 1 that float32 cannot tell."""
    if not 0 < coverage <= 1 - 1e-6:
        raise UserError(f"coverage must lie above 0 and at most at 0.999999, got {coverage}; for all of the mass take dense "
                        "self-conditioning.")


def check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    """Errors: UserError for sampling options out of range."""
    if not 0 <= temperature <= MAX_TEMPERATURE:
        raise UserError(f"temperature must lie between 0 and {MAX_TEMPERATURE:g}, got {temperature}; 1 is the checkpoint's "
                        "schedule and 0 takes the most probable token.")
    if not 0 <= top_k < 2**31:
        raise UserError(f"top_k must be 0 (off) or more, and below 2**31, got {top_k}.")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p must be above 0 and at most 1 (off), got {top_p}.")
