"""Drafted canvases: the drafter denoises a canvas before the target does, which begins from what came out and checks it.

The drafter takes some passes of its own: the first ones with the sampler of the policy underneath, the last one looks at the most
probable canvas.  Its guesses enter the canvas where its confidence passes a gate, the other positions stay the noise they would
have been.  From there sampler, schedule and stop rule are those of the policy underneath.  Between the target's steps the drafter
may guess again, from what the step made of the canvas.

The target believes what stands on its canvas where it cannot check it, and its stop rule does not see that; nor does the gate,
which has the drafter's own word only.  The causal mode does, as it tells how probable each token is without having seen it, and
its pass over a finished canvas has to run anyway: it is the *judge*.  A drafted canvas is committed when no token of it surprises
that mode, and it may be committed by that a step earlier than the stop rule allows, or before any step where the drafter is sure
of all of it.  What fails begins anew, first from what stands before the surprise, then from noise.

The start differs from the reference's, and with it, now and then, the text: a named departure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from drafter.context import Reader
from drafter.model import Drafter, weights_fingerprint
from mlx_diffgemma.drafting import CanvasDrafter, Draft, Taps
from mlx_diffgemma.draws import DrawSource
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.judge import text_of
from mlx_diffgemma.model import DiffusionGemma, Segment
from mlx_diffgemma.policy import Policy, Standing
from mlx_diffgemma.sampler import Before, SamplerStep, StepNumbers
from mlx_diffgemma.session import Session, sampled_together

OWN_STEPS = 2**32  # the drafter draws under step numbers that no policy reaches
SURE = 0.9  # a draft whose text is right with this probability, by its confidences, takes no further pass


@dataclass(frozen=True)
class DraftRules:
    """How drafts are made and used.

    - ``gate``: the confidence from which a guess enters the canvas.  Above 1 none does.
    - ``passes``: of the drafter at most, each from what the one before left; it takes no more when it is sure of all of the text.
    - ``handoff``: the drafter's most probable tokens are the first step's self-conditioning signal.
    - ``refine``: the drafter guesses again after each of the target's steps, at the positions that are not accepted.
    - ``judge``: the surprise in nats above which a token of a drafted canvas is not believed, None: there is no judge.  A
      token surprises by what its causal log-probability lies below the expected one, the negative entropy.
    - ``trust``: the judge is asked before any step of the target where all of the text is right, by the confidences, with at least
      this probability times the text's share of the canvas, which is what the pass costs.  A draft that does not surprise it is
      committed; of another one what stands before the first surprise is left.  None: it is not asked before a step.
    - ``watchdog``: a drafted canvas that has not ended after this many steps begins anew from noise.
    """

    gate: float = 0.01
    passes: int = 2
    handoff: bool = False
    refine: bool = False
    judge: float | None = 1.0
    trust: float | None = 0.1
    watchdog: int = 24

    def __post_init__(self) -> None:
        for name in ("gate", "judge", "trust"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise UserError(f"{name} must be above 0, got {value}.")
        for name in ("passes", "watchdog"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}.")

    @classmethod
    def parse(cls, text: str) -> DraftRules:
        """From ``gate=0.95,passes=3,judge=off``.  Errors: UserError for a rule or value that is none."""
        kinds: dict[str, Any] = {"gate": float, "passes": int, "handoff": _switch, "refine": _switch,
                                 "judge": _number_or_off, "trust": _number_or_off, "watchdog": int}
        given: dict[str, Any] = {}
        for part in filter(None, text.split(",")):
            name, _, value = (piece.strip() for piece in part.partition("="))
            if name not in kinds:
                raise UserError(f"Unknown draft rule {name!r}; known are {', '.join(kinds)}.")
            try:
                given[name] = kinds[name](value)
            except ValueError:
                right = {_switch: "on or off", _number_or_off: "a number or off"}.get(kinds[name], "a number")
                raise UserError(f"The draft rule {name} cannot be {value!r}; give {right}.") from None
        return cls(**given)


def _switch(value: str) -> bool:
    if value not in ("on", "off"):
        raise ValueError(value)
    return value == "on"


def _number_or_off(value: str) -> float | None:
    return None if value == "off" else float(value)


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
        if rules.refine and not config.refinement:
            raise UserError("This drafter was not trained to refine between the target's steps; leave refine off.")
        self.rules = rules

    def __repr__(self) -> str:
        """The same for the same drafter and rules: it names logs."""
        return f"CanvasDraft({self.rules}, {weights_fingerprint(self.drafter)})"

    @property
    def refines(self) -> bool:
        return self.rules.refine

    def seed(self, sessions: Sequence[Session]) -> list[Draft]:
        found: dict[int, Draft] = {}
        going, x = list(sessions), self.borrowed.embed(mx.concatenate([_canvas(session) for session in sessions]))
        left = mx.full((x.shape[0],), -1, dtype=mx.int32)  # the places in the head of what is accepted so far
        for number in range(self.rules.passes):
            segments, last = _segments(going), number == self.rules.passes - 1
            logits, confidence = self._pass(x, segments)
            places, belief = mx.argmax(logits, axis=-1), self.borrowed.belief(logits)
            mx.eval(places, confidence, belief)
            on = []
            for session, s in zip(going, segments, strict=True):
                own = slice(s.start, s.stop)
                draft = self._draft(session, places[own], confidence[own], belief[own], number + 1)
                if last or self._right(session, draft.ids, confidence[own]) >= SURE:
                    found[id(session)] = draft
                else:
                    on.append((session, own))
            if not on:
                break
            rows = mx.concatenate([mx.arange(own.start, own.stop) for _, own in on])
            going, logits, belief, left = [session for session, _ in on], logits[rows], belief[rows], left[rows]
            renoise, left = self._sample(going, logits, number, left)
            # The last pass looks at the most probable canvas: what holds together there is sure.
            kept = places[rows] if number == self.rules.passes - 2 else left
            x = self.drafter.condition(self.borrowed.embed(mx.where(kept < 0, renoise, self.borrowed.tokens(kept))), belief)
        return [found[id(session)] for session in sessions]

    def _draft(self, session: Session, places: mx.array, confidence: mx.array, belief: mx.array, passes: int) -> Draft:
        """What a pass comes to for one canvas; arguments [rows]."""
        sure = confidence >= self.rules.gate
        ids = mx.where(sure, self.borrowed.tokens(places), _canvas(session))
        rows, whole = len(text_of(ids, session.eos_ids)), False
        if self.rules.trust is not None and sure[:rows].all().item():
            whole = self._right(session, ids, confidence) >= self.rules.trust * rows / session.length
        return Draft(ids, belief if self.rules.handoff else None, sure, passes, whole)

    def _right(self, session: Session, ids: mx.array, confidence: mx.array) -> float:
        """The probability that all of the text in ``ids`` is right, were its places independent."""
        return math.exp(mx.log(confidence[: len(text_of(ids, session.eos_ids))]).sum().item())

    def refine(self, sessions: Sequence[Session], taps: Sequence[Taps]) -> list[Draft]:
        segments = _segments(sessions)
        ids = mx.concatenate([_canvas(session) for session in sessions])
        accepted = mx.concatenate([session.accepted for session in sessions])
        together = {layer: mx.concatenate([own[layer] for own in taps]) for layer in self.taps}
        logits, confidence = self._pass(self.drafter.refine(self.borrowed.embed(ids), together), segments)
        sure = (confidence >= self.rules.gate) & ~accepted
        ids = mx.where(sure, self.borrowed.tokens(mx.argmax(logits, axis=-1)), ids)
        mx.eval(ids, sure)
        return [Draft(ids[s.start : s.stop], None, sure[s.start : s.stop], 1) for s in segments]

    def _pass(self, x: mx.array, segments: Sequence[Segment]) -> tuple[mx.array, mx.array]:
        """(logits [rows, tokens], confidence of the most probable ones [rows])."""
        hidden = self.drafter(x, segments)
        return self.borrowed.logits(hidden), mx.sigmoid(self.drafter.confidence(hidden)[:, 0].astype(mx.float32))

    def _sample(self, sessions: Sequence[Session], logits: mx.array, number: int, left: mx.array) -> tuple[mx.array, mx.array]:
        """One step of the sampler underneath on the ``logits`` [rows, tokens] of pass ``number``: (ids to put where nothing is
        accepted, the places in the head of what is, -1 elsewhere)."""
        rows = {id(session): slice(s.start, s.stop) for session, s in zip(sessions, _segments(sessions), strict=True)}
        renoise, found = dict[int, mx.array](), dict[int, mx.array]()
        for group in sampled_together(sessions):
            length, policies = _canvas(group[0]).size, [session.policy.sampling for session in group]
            draws = [s.draws.step(s.canvas_index, s.retry, OWN_STEPS + number, s.start, length) for s in group]
            own = [rows[id(session)] for session in group]
            before = Before(mx.stack([left[part] for part in own]), mx.stack([left[part] >= 0 for part in own]),
                            mx.zeros((len(group), 0, length), dtype=mx.int32))
            steps = [number * policy.max_steps // self.rules.passes for policy in policies]
            made = policies[0].sample(policies, steps, [length] * len(group), mx.stack([logits[part] for part in own]),
                                      np.stack([d.u for d in draws]), np.full((len(group), length), -1, dtype=np.int32), before,
                                      mx.array([-1]))
            for row, session in enumerate(group):
                renoise[id(session)], found[id(session)] = mx.array(draws[row].renoise), made.canvas[row]
        return (mx.concatenate([renoise[id(session)] for session in sessions]),
                mx.concatenate([found[id(session)] for session in sessions]))


@dataclass(frozen=True)
class DraftPolicy:
    """``base``, whose canvases begin from drafts, and are judged (``DraftRules.judge``)."""

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

    def seed(self, draws: DrawSource, canvas_index: int, retry: int, start: int, length: int) -> np.ndarray:
        return self.base.seed(draws, canvas_index, retry, start, length)

    def schedule(self, step: int) -> float:
        return self.base.schedule(step)

    @staticmethod
    def numbers(*_: object) -> StepNumbers:
        raise TypeError("the policy underneath samples")

    @staticmethod
    def sample(*_: object) -> SamplerStep:
        raise TypeError("the policy underneath samples")

    def confident(self, standing: Standing) -> bool:
        return self.base.confident(standing)

    def consults(self, standing: Standing) -> bool:
        ends = self.confident(standing) or self.base.judge(standing) is not None
        return ends and standing.drafted and self.surprise_limit is not None

    def judge(self, standing: Standing) -> str | None:
        reason = self.base.judge(standing)
        if self.surprise_limit is not None and standing.surprise is not None:
            if standing.surprise <= self.surprise_limit:
                return reason or ("converged" if self.confident(standing) else None)
            reason = "judge" if reason else None
        return "watchdog" if reason is None and standing.drafted and standing.steps >= self.watchdog else reason

    def certificate(self, standing: Standing) -> str:
        if self.surprise_limit is None or standing.surprise is None:
            return self.base.certificate(standing)
        return f"{self.base.certificate(standing)}-and-causal" if self.base.judge(standing) == "converged" else "causal"

    def rejects(self, standing: Standing, reason: str) -> bool:
        # The drafted attempts are more than the policy underneath counts.
        before = replace(standing, retry=standing.retry - standing.drafts)
        return reason in ("judge", "watchdog") or self.base.rejects(before, reason)

    def keeps(self, standing: Standing, rows: int) -> int:
        return self.base.keeps(standing, rows)


def _segments(sessions: Sequence[Session]) -> list[Segment]:
    segments, start = [], 0
    for session in sessions:
        cache: Any = session.draft
        segments.append(Segment(start, start + _canvas(session).size, cache, canvas=True))
        start += _canvas(session).size
    return segments


def _canvas(session: Session) -> mx.array:
    assert session.canvas is not None, "a canvas is open"
    return session.canvas
