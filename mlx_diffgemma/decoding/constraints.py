"""What the canvases of one answer must hold: pins and constraints.

A pin is a fixed token at one position.  A constraint governs the text of a range of positions.

``Demands`` belongs to a session.  The session reports each canvas that it opens and commits.  The
logits of a step go through ``restrict``, which makes the pins certain.  The dynamic programme of a
constraint then replaces the marginals, the most probable text and the draw of each position by
those of the whole range (see :mod:`mlx_diffgemma.grammar.program`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from mlx_diffgemma.errors import UserError
from mlx_diffgemma.grammar.constraint import Constraint, Masses
from mlx_diffgemma.grammar.program import IMPOSSIBLE, Band, Span, solve
from mlx_diffgemma.sampling.sampler import Marginals, StepNumbers, independent
from mlx_diffgemma.sampling.self_conditioning import Bias

FREE = -1  # marks a position without a pin


@dataclass(frozen=True)
class Stretch:
    """A constraint on a range of the answer.

    Attributes:
        constraint: The constraint.
        start: The first position of the range in the answer.
        stop: The end of the range, which the text fills exactly.  None: the text ends with the
            answer.
        begun: The tokens of that text that come before the answer.
    """

    constraint: Constraint
    start: int = 0
    stop: int | None = None
    begun: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Part:
    """Positions of a canvas and the constraint that governs them, if any.

    Attributes:
        place: The positions.
        constraint: The constraint; None where nothing governs them.
        band: The states that the constraint's texts can reach at these positions.
        columns: The constraint's column for each column of the canvas.  None: they are the same.
    """

    place: slice
    constraint: Constraint | None = None
    band: Band | None = None
    columns: mx.array | None = None


class Demands:
    """The pins and constraints of one answer.  The answer cannot end before the last pin.

    Args:
        eos_ids: The tokens that end the answer.
        limit: The most tokens of the answer.
        pins: int [positions], the token at each position of the answer; FREE for no pin.  They may
            span several canvases.
        stretches: The constraints.  Their ranges do not overlap.

    Raises:
        UserError: The pins contradict a constraint or the limit, or the shortest text of a
            constraint exceeds the limit.
    """

    def __init__(
        self,
        eos_ids: Sequence[int],
        limit: int,
        pins: Sequence[int] | np.ndarray = (),
        stretches: Sequence[Stretch] = (),
    ) -> None:
        self.eos_ids, self.limit = tuple(eos_ids), limit
        self.pins = np.array(pins, dtype=np.int32).reshape(-1)
        bound = np.flatnonzero(self.pins != FREE)
        self.last_pin = int(bound[-1]) if bound.size else -1
        if self.last_pin >= limit:
            raise UserError(
                f"A pin stands at position {self.last_pin} of an answer of at most {limit} tokens; raise max_tokens or "
                "leave it out."
            )
        if np.isin(self.pins[: max(0, self.last_pin)], self.eos_ids).any():
            raise UserError(
                "An end token is pinned before the last pin; pins behind the end of an answer are no part of it."
            )
        self.stretches = sorted(stretches, key=lambda one: one.start)
        self._states: dict[int, int] = {}
        for one in self.stretches:
            state = one.constraint.automaton.advance(0, np.array(one.begun, dtype=np.int32))
            if state < 0:
                raise UserError(
                    "The constraint admits no text that begins with what was given as its begin; change one of them."
                )
            self._states[id(one)] = state
            shortest = int(one.constraint.automaton.distance[state])
            if one.stop is None and shortest > limit - one.start:
                raise UserError(
                    f"The shortest text that the constraint admits has {shortest} tokens, more than the "
                    f"{limit - one.start} allowed; raise max_tokens or widen the constraint."
                )
            if not Band(one.constraint.chain, self._span(one, one.start, 0)).possible:
                raise UserError(
                    "No text that the constraint admits fits between and under the pins; move them, or change the "
                    "number of tokens."
                )

    def open(self, start: int, length: int) -> None:
        """Begin a canvas of ``length`` positions at position ``start`` of the answer."""
        self.start = start
        self.pinned = np.full(length, FREE, dtype=np.int32)
        own = self.pins[start : start + length]
        self.pinned[: own.size] = own
        self._bound = mx.array(self.pinned) if (self.pinned != FREE).any() else None
        # The answer cannot end in the first ``unended`` positions.
        unended = min(max(0, self.last_pin - start), length)
        self._unended = mx.arange(length)[:, None] < unended if unended else None
        self._parts: list[_Part] = []
        at = 0
        for one in self.stretches:
            first = max(one.start, start) - start
            last = min(start + length if one.stop is None else one.stop, start + length) - start
            if first < last:
                band = Band(one.constraint.chain, self._span(one, start + first, last - first))
                assert band.possible, "what was possible at the begin stays so"
                self._parts += [
                    _Part(slice(at, first)),
                    _Part(slice(first, last), one.constraint, band),
                ]
                at = last
        self._parts = [
            part
            for part in (*self._parts, _Part(slice(at, length)))
            if part.place.start < part.place.stop
        ]
        self._join_columns()

    def _join_columns(self) -> None:
        """Set the columns of the canvas.  With several constraints, the tokens of one column are
        those that every constraint treats alike.
        """
        constraints = list(
            {
                id(part.constraint): part.constraint for part in self._parts if part.constraint
            }.values()
        )
        if len(constraints) < 2:
            self._column_of = constraints[0].columns if constraints else None
            return
        joint = np.zeros(1, dtype=np.int64)
        for one in constraints:
            _, tokens, joint = np.unique(
                joint * one.chain.columns + one.column_of, return_index=True, return_inverse=True
            )
        self._column_of = mx.array(joint.astype(np.int32))
        self._parts = [
            replace(part, columns=mx.array(part.constraint.column_of[tokens]))
            if part.constraint
            else part
            for part in self._parts
        ]

    def _span(self, one: Stretch, start: int, length: int) -> Span:
        """The span of positions of a constraint that is to be solved.

        Args:
            one: The constraint and its range.
            start: The position in the answer at which the span begins.
            length: The positions of the span; 0: it describes only what follows ``start``.
        """
        # It includes the pins of later canvases: this canvas must leave them possible.
        pinned, column_of = (
            self.pins[start : self.last_pin + 1 if one.stop is None else one.stop],
            one.constraint.column_of,
        )
        forced = (
            np.where(pinned == FREE, -1, column_of[np.maximum(pinned, 0)])
            if (pinned != FREE).any()
            else None
        )
        state = self._states[id(one)]
        if one.stop is None:
            return Span(
                state,
                length,
                self.limit - start,
                forced=forced,
                unended=max(0, self.last_pin - start),
            )
        return Span(state, length, closed=True, more=one.stop - start - length, forced=forced)

    @property
    def free(self) -> int:
        """How many positions of the canvas are not pinned."""
        return int((self.pinned == FREE).sum())

    def pin(self, canvas: mx.array) -> mx.array:
        """Return the ids [length] of ``canvas`` with the pinned tokens in their places."""
        return (
            canvas
            if self._bound is None
            else mx.where(self._bound != FREE, self._bound, canvas).astype(canvas.dtype)
        )

    @property
    def fixed(self) -> mx.array:
        """Mask [length] of the pins."""
        return mx.array(self.pinned != FREE)

    def restrict(self, logits: mx.array) -> mx.array:
        """Change ``logits`` [length, vocabulary] so that each pin is certain and no end token comes
        before the last pin.
        """
        tokens = mx.arange(logits.shape[-1])
        if self._unended is not None:
            ends = (tokens[:, None] == mx.array(self.eos_ids)).any(axis=-1)
            logits = mx.where(self._unended & ends, IMPOSSIBLE, logits)
        if self._bound is not None:
            bound = self._bound[:, None]
            logits = mx.where((bound != FREE) & (bound != tokens), IMPOSSIBLE, logits)
        return logits

    def masses(self, logits: mx.array, temperature: float) -> list[Masses | None]:
        """Return what each constraint needs of the restricted ``logits``, one entry for each part
        of the canvas.
        """
        return [
            part.constraint.masses(logits[part.place], temperature) if part.constraint else None
            for part in self._parts
        ]

    def force(
        self,
        logits: mx.array,
        masses: Sequence[Masses | None],
        u: np.ndarray,
        numbers: StepNumbers,
    ) -> tuple[Bias, Marginals]:
        """Compute the exact marginals under the constraints.

        Positions without a constraint keep their logits.  Their draws follow from ``u``, as they do
        without constraints.

        Args:
            logits: The restricted logits [length, vocabulary].
            masses: What ``masses`` returned for these logits.
            u: [length] the uniform numbers of the draw.
            numbers: The numbers of the step.

        Returns:
            (the bias that gives the logits the exact marginals; the marginals, with the most
            probable text and the drawn one).  Both have a batch dimension of 1.
        """
        values, found = list[mx.array | None](), list[Marginals]()
        for part, own in zip(self._parts, masses, strict=True):
            if part.band is None or part.constraint is None or own is None:
                values.append(None)
                found.append(
                    independent(logits[None, part.place], mx.array(u[part.place])[None], numbers)
                )
            else:
                solution = solve(part.band, *own.read(), u[part.place])
                bias, marginals = part.constraint.marginals(
                    logits[part.place], own, solution, numbers
                )
                values.append(bias if part.columns is None else bias[:, part.columns])
                found.append(marginals)
        width = max(own.shape[1] for own in values if own is not None)
        whole = mx.concatenate(
            [
                mx.zeros((part.place.stop - part.place.start, width)) if own is None else own
                for part, own in zip(self._parts, values, strict=True)
            ]
        )
        return (
            Bias(whole[None], self._column_of),
            Marginals(
                *(
                    None if own[0] is None else mx.concatenate(own, axis=1)
                    for own in zip(*found, strict=True)
                )
            ),
        )

    def commit(self, tokens: np.ndarray) -> bool:
        """Record the committed ``tokens`` of the canvas.

        Returns:
            Whether they end the answer without an end token.
        """
        done = False
        for one in self.stretches:
            last = (
                len(tokens) if one.stop is None else min(len(tokens), max(0, one.stop - self.start))
            )
            own = tokens[max(0, one.start - self.start) : last]
            own = own[~np.isin(own, self.eos_ids)]
            state = one.constraint.automaton.advance(self._states[id(one)], own)
            assert state >= 0, "a committed canvas is admitted by its constraint"
            self._states[id(one)] = state
            # At the limit there is no room for an end token.  Only complete texts get there.
            if one.stop is None and (
                one.constraint.automaton.ends[state] or self.start + len(tokens) >= self.limit
            ):
                done = done or self.start + len(tokens) > self.last_pin
        return done
