"""The rules that end a canvas, try it again or shorten it: one frozen object a rule.

A policy holds a list of these rules.  Each rule sees only a ``StopContext``, the numbers that the
host read, so it can be tested with made-up numbers and combined with any other rule.

To add a rule: write the object here, give it a field of
:class:`mlx_diffgemma.sampling.rules.RulesPolicy`, and list it in ``stop_rules``, ``retry_rules`` or
``trim_rules`` there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

PARTS = 8  # canvases are shortened in eighths, so that few shapes occur


@dataclass(frozen=True)
class StopContext:
    """What the host knows of a canvas after a step.

    Attributes:
        canvas_index: The number of the canvas in its answer, from 0.
        retry: Attempts at this canvas before the current one.
        length: Positions with which the attempt started.
        stop: The flag of the device's stop rule.
        entropies: Mean entropy in nats of each step of this attempt.
        ends: Position of the first end token in the argmax of each step; the canvas's length where
            there is none.
        drafted: Whether this attempt contains a drafter's proposals.
        drafts: How many attempts before it did.
        surprise: Nats, if the policy asked for it: the maximum of (-log p - entropy) over the
            tokens of the argmax, its end token included.  Both are those of the causal mode, given
            the tokens before.
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


class StopRule(Protocol):
    """Returns the reason why an attempt ends, or None while the rule lets it continue."""

    def __call__(self, context: StopContext) -> str | None: ...


class RetryRule(Protocol):
    """Returns whether the canvas that ended for ``reason`` is discarded and tried again with other
    draws.
    """

    def __call__(self, context: StopContext, reason: str) -> bool: ...


class TrimRule(Protocol):
    """Returns how many of the canvas's first ``rows`` continue to the next step."""

    def __call__(self, context: StopContext, rows: int) -> int: ...


@dataclass(frozen=True)
class Converged:
    """The device's stop rule (stable and confident) holds, at ``min_steps`` or later."""

    min_steps: int = 1

    def __call__(self, context: StopContext) -> str | None:
        return "converged" if context.stop and context.steps >= self.min_steps else None


@dataclass(frozen=True)
class Plateau:
    """The lowest mean entropy is ``patience`` steps old."""

    patience: int

    def __call__(self, context: StopContext) -> str | None:
        lowest = min(range(context.steps), key=lambda step: context.entropies[step])
        return "plateau" if context.steps - 1 - lowest >= self.patience else None


@dataclass(frozen=True)
class MaxSteps:
    """The attempt has taken ``limit`` steps."""

    limit: int

    def __call__(self, context: StopContext) -> str | None:
        return "max_steps" if context.steps >= self.limit else None


@dataclass(frozen=True)
class RerollEmpty:
    """A first canvas that begins with the end token is tried again, ``times`` at most."""

    times: int

    def __call__(self, context: StopContext, reason: str) -> bool:  # noqa: ARG002
        empty = context.canvas_index == 0 and context.ends[-1] == 0
        return empty and context.retry < self.times


@dataclass(frozen=True)
class RetryUnconverged:
    """A canvas that ended without converging is tried again, ``times`` at most."""

    times: int

    def __call__(self, context: StopContext, reason: str) -> bool:
        return reason != "converged" and context.retry < self.times


@dataclass(frozen=True)
class DropTail:
    """Drop the positions after the first end token, once it has kept its place for ``steps`` steps.

    The canvas keeps a whole number of eighths of its length.
    """

    steps: int

    def __call__(self, context: StopContext, rows: int) -> int:
        last = context.ends[-self.steps :]
        if len(last) < self.steps or len(set(last)) != 1:
            return rows
        part = max(1, context.length // PARTS)
        return min(rows, -(-(last[0] + 1) // part) * part)


def first_reason(rules: Sequence[StopRule], context: StopContext) -> str | None:
    """The reason of the first rule that ends the attempt; None if no rule does."""
    for rule in rules:
        if reason := rule(context):
            return reason
    return None
