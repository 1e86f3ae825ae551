"""Drafted canvases: the drafter denoises a canvas first, and the target starts from the result.

The drafter makes several passes.  The first ones use the sampler of the base policy; the last one
reads the most probable canvas.  A guess enters the canvas where its confidence passes a gate; the
other positions keep their noise.  From there on sampler, schedule and stop rule are those of the
base policy.  Between the target's steps the drafter may guess again, from the result of the step.

The target trusts the ids on its canvas where it cannot check them.  Neither its stop rule nor the
gate notices that.  The causal mode does: it says how probable each token is without having seen it,
and its pass over a finished canvas has to run anyway.  It is the verifier.  A drafted canvas is
committed when the verifier rejects no token of it.  That may happen a step earlier than the stop
rule allows, or before any step where the drafter is sure of the whole canvas.  A rejected canvas
starts again, first from the text before the first rejected token, then from noise.

The start differs from the reference's, so the text may differ as well: a documented departure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from drafter.context import FeatureCaches
from drafter.model import DraftNetwork, weights_fingerprint
from drafter.rules import DraftRules
from mlx_diffgemma.decoding.sampling_groups import open_canvas, sampled_together
from mlx_diffgemma.decoding.verifier import text_of
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.model.attention import Segment
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.sampling.protocols import CanvasContext, Draft, Taps
from mlx_diffgemma.sampling.sampler import Before

OWN_STEPS = 2**32  # the drafter draws its random numbers under step numbers that no policy reaches
# The drafter takes no further pass once its confidences say that the text is right with this
# probability.
SURE = 0.9


class CanvasDraft(FeatureCaches):
    """Implements :class:`mlx_diffgemma.sampling.protocols.CanvasDrafter`."""

    def __init__(self, drafter: DraftNetwork, target: DiffusionGemma, rules: DraftRules):
        super().__init__(drafter, target)
        config = drafter.config
        if not (config.confidence and config.self_conditioning) or config.mask_token_id is not None:
            raise UserError(
                "This drafter was made for decoding left to right only: it has no confidence head, no "
                "self-conditioning or no noise; use it with mode 'ar'."
            )
        if any(layer.causal for layer in config.layers):
            raise UserError(
                "This drafter's layers are causal inside a block, which a canvas is not; use it with mode 'ar'."
            )
        if rules.refine and not config.refinement:
            raise UserError(
                "This drafter was not trained to refine between the target's steps; leave refine off."
            )
        self.rules = rules

    def __repr__(self) -> str:
        """A text that is the same for the same drafter and rules, because it names logs."""
        return f"CanvasDraft({self.rules}, {weights_fingerprint(self.drafter)})"

    @property
    def refines(self) -> bool:
        return self.rules.refine

    def seed(self, sessions: Sequence[CanvasContext]) -> list[Draft]:
        """Propose a canvas for each session."""
        drafts: dict[int, Draft] = {}
        active = list(sessions)
        x = self.head.embed(mx.concatenate([_canvas(session) for session in sessions]))
        # For each row, the head's index of the token accepted so far; -1 where there is none.
        accepted = mx.full((x.shape[0],), -1, dtype=mx.int32)
        for number in range(self.rules.passes):
            is_last = number == self.rules.passes - 1
            segments = _segments(active)
            logits, confidence = self._pass(x, segments)
            best = mx.argmax(logits, axis=-1)
            signal = self.head.mean_embedding(logits)
            mx.eval(best, confidence, signal)
            remaining = []
            for session, segment in zip(active, segments, strict=True):
                part = slice(segment.start, segment.stop)
                draft = self._draft(session, best[part], confidence[part], signal[part], number + 1)
                if is_last or self._text_probability(session, draft.ids, confidence[part]) >= SURE:
                    drafts[id(session)] = draft
                else:
                    remaining.append((session, part))
            if not remaining:
                break
            active = [session for session, _ in remaining]
            rows = mx.concatenate([mx.arange(part.start, part.stop) for _, part in remaining])
            renoise, accepted = self._sample(active, logits[rows], number, accepted[rows])
            # The last pass reads the most probable canvas: only a consistent canvas gets high
            # confidences.
            kept = best[rows] if number == self.rules.passes - 2 else accepted
            ids = mx.where(kept < 0, renoise, self.head.tokens(kept))
            x = self.drafter.condition(self.head.embed(ids), signal[rows])
        return [drafts[id(session)] for session in sessions]

    def _draft(
        self,
        session: CanvasContext,
        best: mx.array,
        confidence: mx.array,
        signal: mx.array,
        passes: int,
    ) -> Draft:
        """Make the draft of one canvas.

        Args:
            session: The session of the canvas.
            best: The head's index [rows] of the most probable token.
            confidence: The confidence [rows] of that token.
            signal: The self-conditioning signal [rows, hidden].
            passes: How many passes were made.

        Returns:
            The draft.
        """
        sure = confidence >= self.rules.gate
        ids = mx.where(sure, self.head.tokens(best), _canvas(session))
        rows = len(text_of(ids, session.eos_ids))
        whole = False
        if self.rules.trust is not None and sure[:rows].all().item():
            needed = self.rules.trust * rows / open_canvas(session).length
            whole = self._text_probability(session, ids, confidence) >= needed
        return Draft(ids, signal if self.rules.handoff else None, sure, passes, whole)

    def _text_probability(
        self, session: CanvasContext, ids: mx.array, confidence: mx.array
    ) -> float:
        """The probability that the whole text is right, if its positions are independent.

        Args:
            session: The session, whose end tokens end the text.
            ids: The ids [rows] of the canvas.
            confidence: The confidence [rows] of each.
        """
        rows = len(text_of(ids, session.eos_ids))
        return math.exp(mx.log(confidence[:rows]).sum().item())

    def refine(self, sessions: Sequence[CanvasContext], taps: Sequence[Taps]) -> list[Draft]:
        """Guess again at the positions that are not accepted, from the target's hidden states."""
        segments = _segments(sessions)
        ids = mx.concatenate([_canvas(session) for session in sessions])
        accepted = mx.concatenate([open_canvas(session).accepted for session in sessions])
        together = {layer: mx.concatenate([own[layer] for own in taps]) for layer in self.taps}
        logits, confidence = self._pass(
            self.drafter.refine(self.head.embed(ids), together), segments
        )
        sure = (confidence >= self.rules.gate) & ~accepted
        ids = mx.where(sure, self.head.tokens(mx.argmax(logits, axis=-1)), ids)
        mx.eval(ids, sure)
        return [Draft(ids[s.start : s.stop], None, sure[s.start : s.stop], 1) for s in segments]

    def _pass(self, x: mx.array, segments: Sequence[Segment]) -> tuple[mx.array, mx.array]:
        """Run one pass of the drafter.

        Returns:
            (logits [rows, tokens], confidence of the most probable tokens [rows])
        """
        hidden = self.drafter(x, segments)
        scores = self.drafter.confidence(hidden)[:, 0].astype(mx.float32)
        return self.head.logits(hidden), mx.sigmoid(scores)

    def _sample(
        self, sessions: Sequence[CanvasContext], logits: mx.array, number: int, accepted: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Take one step of the base policy's sampler.

        Args:
            sessions: The sessions, whose canvases follow each other in the rows.
            logits: [rows, tokens] of the drafter's pass.
            number: The number of that pass.
            accepted: The head's index [rows] of the token that is accepted so far, -1 for none.

        Returns:
            (ids [rows] for positions without an accepted token, the head's index [rows] of the
            accepted token or -1).
        """
        parts = {}
        for session, segment in zip(sessions, _segments(sessions), strict=True):
            parts[id(session)] = slice(segment.start, segment.stop)
        renoise: dict[int, mx.array] = {}
        chosen: dict[int, mx.array] = {}
        for group in sampled_together(sessions):
            length = _canvas(group[0]).size
            policies = [session.policy.sampling for session in group]
            draws = [
                s.draws.step(s.canvas_index, s.retry, OWN_STEPS + number, s.start, length)
                for s in group
            ]
            so_far = mx.stack([accepted[parts[id(session)]] for session in group])
            history = mx.zeros((len(group), 0, length), dtype=mx.int32)
            made = policies[0].sample(
                policies,
                [number * policy.max_steps // self.rules.passes for policy in policies],
                [length] * len(group),
                mx.stack([logits[parts[id(session)]] for session in group]),
                np.stack([numbers.u for numbers in draws]),
                np.full((len(group), length), -1, dtype=np.int32),
                Before(so_far, so_far >= 0, history),
                mx.array([-1]),
            )
            for row, session in enumerate(group):
                renoise[id(session)] = mx.array(draws[row].renoise)
                chosen[id(session)] = made.canvas[row]
        return (
            mx.concatenate([renoise[id(session)] for session in sessions]),
            mx.concatenate([chosen[id(session)] for session in sessions]),
        )


def _segments(sessions: Sequence[CanvasContext]) -> list[Segment]:
    """The canvases of the sessions, one after the other."""
    segments = []
    start = 0
    for session in sessions:
        cache: Any = session.draft
        stop = start + _canvas(session).size
        segments.append(Segment(start, stop, cache, canvas=True))
        start = stop
    return segments


def _canvas(session: CanvasContext) -> mx.array:
    return open_canvas(session).ids
