"""How a canvas is seeded, accepted, renoised, stopped and certified: one frozen object.

The loop in :mod:`mlx_diffgemma.session` asks the policy and decides nothing itself.  ``ReferencePolicy`` is the
algorithm of transformers; other policies implement the same protocol.

| policy | batch | stream | ar mode |
|---|---|---|---|
| reference | yes | yes | no (ar mode takes no policy) |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from mlx_diffgemma.config import GenerationConfig
from mlx_diffgemma.draws import DrawSource
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.sampler import SamplerStep, StepNumbers, sample_step

MAX_TEMPERATURE = 2.0


class Policy(Protocol):
    """What the loop asks.  The rows of a batch have policies of one class, each with its own numbers."""

    @property
    def name(self) -> str: ...

    @property
    def max_steps(self) -> int: ...

    @property
    def stability(self) -> int:
        """How many argmax canvases of earlier steps the stop rule compares with."""

    @property
    def certificate(self) -> str:
        """The name of the rule under which a canvas stops before its last step."""

    @property
    def fuses_commit(self) -> bool:
        """Whether a finished canvas may be encoded together with the first step of the next one."""

    def seed(self, draws: DrawSource, canvas_index: int, retry: int, start: int, length: int) -> np.ndarray:
        """Ids [length] of a new canvas."""

    def schedule(self, step: int) -> float:
        """Temperature of step 0, 1, …"""

    @staticmethod
    def sample(policies: Sequence[Any], steps: Sequence[int], logits: mx.array, u: np.ndarray, renoise: np.ndarray,
               history: mx.array, eos_ids: mx.array) -> SamplerStep:
        """One sampler step of a batch whose rows stand at different ``steps``; shapes as in ``sample_step``."""


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
    name: str = "reference"
    certificate: str = "stable-and-confident"

    @classmethod
    def from_config(cls, config: GenerationConfig, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
                    coverage: float | None = None) -> ReferencePolicy:
        """Errors: UserError for numbers out of range."""
        return cls(max_steps=config.max_denoising_steps, entropy_bound=config.entropy_bound, t_min=config.t_min,
                   t_max=config.t_max, confidence_threshold=config.confidence_threshold,
                   stability=config.stability_threshold, temperature=temperature, top_k=top_k, top_p=top_p,
                   coverage=coverage)

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

    def seed(self, draws: DrawSource, canvas_index: int, retry: int, start: int, length: int) -> np.ndarray:
        return draws.step(canvas_index, retry, 0, start, length).initial

    def schedule(self, step: int) -> float:
        """Temperature of step 0, 1, …; the first is t_max, the last one step above t_min."""
        scale = self.temperature or 1.0
        remaining = (self.max_steps - step) / self.max_steps
        return scale * (self.t_min + (self.t_max - self.t_min) * remaining)

    @staticmethod
    def sample(policies: Sequence[ReferencePolicy], steps: Sequence[int], logits: mx.array, u: np.ndarray,
               renoise: np.ndarray, history: mx.array, eos_ids: mx.array) -> SamplerStep:
        top_k, top_p, coverage = ([getattr(p, name) for p in policies] for name in ("top_k", "top_p", "coverage"))
        numbers = StepNumbers(
            temperature=mx.array([p.schedule(step) for p, step in zip(policies, steps, strict=True)]),
            entropy_bound=mx.array([p.entropy_bound for p in policies]),
            confidence=mx.array([p.confidence_threshold for p in policies]),
            greedy=mx.array([p.temperature == 0 for p in policies]),
            top_k=mx.array(top_k) if any(top_k) else None,
            top_p=mx.array(top_p) if min(top_p) < 1 else None,
            # A dense row beside sparse ones: no position of it is covered.
            tail=mx.array([-1.0 if c is None else 1 - c for c in coverage]) if any(coverage) else None,
        )
        return sample_step(logits, mx.array(u), mx.array(renoise), history, numbers, eos_ids)


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
    if top_k < 0:
        raise UserError(f"top_k must be 0 (off) or more, got {top_k}.")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p must be above 0 and at most 1 (off), got {top_p}.")
