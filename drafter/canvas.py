"""Drafted canvases: the drafter guesses a canvas before its first step, the target denoises it as ever.

A guess enters the canvas only where the drafter's own confidence says that it will be committed; every other position stays the
noise it would have been, because the target believes what stands on its canvas where it cannot check it.  Sampler, schedule and
stop rule are those of the policy underneath, so what is committed is the target's own argmax under its own certificate.  The
start differs from the reference's, and with it, now and then, the text: a named departure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from drafter.context import Reader
from drafter.model import Drafter
from mlx_diffgemma.drafting import CanvasDrafter, Draft
from mlx_diffgemma.draws import DrawSource
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.model import DiffusionGemma, Segment
from mlx_diffgemma.policy import Policy, Standing
from mlx_diffgemma.sampler import SamplerStep
from mlx_diffgemma.session import Session


@dataclass(frozen=True)
class DraftRules:
    """How drafts are made and used.

    - ``gate``: the confidence from which a guess enters the canvas.  Above 1 none does.
    - ``passes``: of the drafter, each from what the one before guessed.
    - ``handoff``: the drafter's most probable tokens are the first step's self-conditioning signal.
    - ``watchdog``: a drafted canvas that has not ended after this many steps begins anew from noise.
    """

    gate: float = 0.97
    passes: int = 2
    handoff: bool = False
    watchdog: int = 24

    def __post_init__(self) -> None:
        if not self.gate > 0:
            raise UserError(f"gate must be above 0, got {self.gate}.")
        for name in ("passes", "watchdog"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}.")


class CanvasDraft(Reader):
    """Implements :class:`mlx_diffgemma.drafting.CanvasDrafter`."""

    def __init__(self, drafter: Drafter, target: DiffusionGemma, rules: DraftRules):
        super().__init__(drafter, target)
        config = drafter.config
        if not (config.confidence and config.self_conditioning) or config.mask_token_id is not None:
            raise UserError("This drafter was made for decoding left to right only: it has no confidence head, no "
                            "self-conditioning or no noise; use it with mode 'ar'.")
        if any(layer.causal for layer in config.layers):
            raise UserError("This drafter's layers are causal inside a block, which a canvas is not; use it with mode 'ar'.")
        self.rules = rules

    def seed(self, sessions: Sequence[Session]) -> list[Draft]:
        noise = mx.concatenate([_canvas(session) for session in sessions])
        segments, start = [], 0
        for session in sessions:
            cache: Any = session.draft
            segments.append(Segment(start, start + _canvas(session).size, cache, canvas=True))
            start += _canvas(session).size
        ids, x = noise, self.borrowed.embed(noise)
        for number in range(self.rules.passes):
            hidden = self.drafter(x, segments)
            logits = self.borrowed.logits(hidden)
            belief = self.borrowed.belief(logits)
            sure = mx.sigmoid(self.drafter.confidence(hidden)[:, 0].astype(mx.float32)) >= self.rules.gate
            ids = mx.where(sure, self.borrowed.tokens(mx.argmax(logits, axis=-1)), noise)
            if number + 1 < self.rules.passes:
                x = self.drafter.condition(self.borrowed.embed(ids), belief)
        mx.eval(ids, sure, belief)
        return [Draft(ids[s.start : s.stop], belief[s.start : s.stop] if self.rules.handoff else None, sure[s.start : s.stop])
                for s in segments]


@dataclass(frozen=True)
class DraftPolicy:
    """``base``, whose canvases begin from drafts."""

    base: Policy
    drafter: CanvasDrafter
    watchdog: int

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
    def certificate(self) -> str:
        return self.base.certificate

    @property
    def fuses_commit(self) -> bool:
        return False  # the next draft reads the hidden states of the commit

    @property
    def sampling(self) -> Policy:
        return self.base

    def canvas_length(self, canvas_index: int, remaining: int, full: int) -> int:
        return self.base.canvas_length(canvas_index, remaining, full)

    def seed(self, draws: DrawSource, canvas_index: int, retry: int, start: int, length: int) -> np.ndarray:
        return self.base.seed(draws, canvas_index, retry, start, length)

    def schedule(self, step: int) -> float:
        return self.base.schedule(step)

    @staticmethod
    def sample(*_: object) -> SamplerStep:
        raise TypeError("the policy underneath samples")

    def judge(self, standing: Standing) -> str | None:
        reason = self.base.judge(standing)
        return "watchdog" if reason is None and standing.drafted and standing.steps >= self.watchdog else reason

    def rejects(self, standing: Standing, reason: str) -> bool:
        # The drafted attempt is one more than the policy underneath counts.
        before = replace(standing, retry=max(0, standing.retry - 1))
        return reason == "watchdog" or self.base.rejects(before, reason)

    def keeps(self, standing: Standing, rows: int) -> int:
        return self.base.keeps(standing, rows)


def _canvas(session: Session) -> mx.array:
    assert session.canvas is not None, "a canvas is open"
    return session.canvas
