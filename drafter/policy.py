"""The policy of drafted canvases: how a canvas starts, and how it ends."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from mlx_diffgemma.sampling.draws import DrawSource
from mlx_diffgemma.sampling.protocols import CanvasDrafter, Policy
from mlx_diffgemma.sampling.sampler import SamplerStep, StepNumbers
from mlx_diffgemma.sampling.stopping import StopContext


@dataclass(frozen=True)
class DraftPolicy:
    """The policy ``base`` for canvases that start from drafts and are verified
    (``DraftRules.judge``).
    """

    base: Policy
    drafter: CanvasDrafter
    watchdog: int
    surprise_limit: float | None = None

    @property
    def name(self) -> str:
        return f"drafted {self.base.name}"

    @property
    def max_steps(self) -> int:
        return self.base.max_steps

    @property
    def stability(self) -> int:
        return self.base.stability

    @property
    def fuses_commit(self) -> bool:
        return False  # the next draft reads the hidden states of the commit

    @property
    def sampling(self) -> Policy:
        return self.base

    def canvas_length(self, canvas_index: int, remaining: int, full: int) -> int:
        return self.base.canvas_length(canvas_index, remaining, full)

    def initial_canvas(
        self, draws: DrawSource, canvas_index: int, retry: int, start: int, length: int
    ) -> np.ndarray:
        return self.base.initial_canvas(draws, canvas_index, retry, start, length)

    def schedule(self, step: int) -> float:
        return self.base.schedule(step)

    @staticmethod
    def numbers(*_: object) -> StepNumbers:
        raise TypeError("the policy underneath samples")

    @staticmethod
    def sample(*_: object) -> SamplerStep:
        raise TypeError("the policy underneath samples")

    def is_confident(self, context: StopContext) -> bool:
        return self.base.is_confident(context)

    def needs_verification(self, context: StopContext) -> bool:
        ends = self.is_confident(context) or self.base.stop_reason(context) is not None
        return ends and context.drafted and self.surprise_limit is not None

    def stop_reason(self, context: StopContext) -> str | None:
        reason = self.base.stop_reason(context)
        if self.surprise_limit is not None and context.surprise is not None:
            if context.surprise <= self.surprise_limit:
                return reason or ("converged" if self.is_confident(context) else None)
            reason = "judge" if reason else None
        if reason is None and context.drafted and context.steps >= self.watchdog:
            return "watchdog"
        return reason

    def certificate(self, context: StopContext) -> str:
        if self.surprise_limit is None or context.surprise is None:
            return self.base.certificate(context)
        if self.base.stop_reason(context) == "converged":
            return f"{self.base.certificate(context)}-and-causal"
        return "causal"

    def should_retry(self, context: StopContext, reason: str) -> bool:
        # The base policy does not count drafted attempts.
        before = replace(context, retry=context.retry - context.drafts)
        return reason in ("judge", "watchdog") or self.base.should_retry(before, reason)

    def trim_to(self, context: StopContext, rows: int) -> int:
        return self.base.trim_to(context, rows)
