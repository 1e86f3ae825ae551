"""The events that a job reports while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias


@dataclass(frozen=True)
class TokenLogprob:
    """A token of the visible answer with its log-probability.

    ``top`` holds the most probable tokens at its position, with their log-probabilities.
    """

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """What a committed canvas added to choice ``index``.

    Attributes:
        index: the number of the choice.
        text: new visible text.
        thought: new text of a thought.
        calls: new tool calls, as {name, arguments}.
        logprobs: the tokens whose text is shown now.
        finish_reason: "stop", "length" or "tool_calls" in the last piece, None before.
    """

    index: int
    text: str = ""
    thought: str = ""
    calls: tuple[dict[str, Any], ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None


@dataclass(frozen=True)
class Usage:
    """What an answer cost.

    Attributes:
        prompt: tokens of the prompt.
        completion: tokens of the answer.
        reused: prompt tokens that were cached.
        steps: denoising steps.
        produced: tokens of the committed canvases.
        forwards: forwards of a canvas, which made the ``produced`` tokens.
    """

    prompt: int
    completion: int
    reused: int
    steps: int
    produced: int
    forwards: int

    def __add__(self, other: Usage) -> Usage:
        """Add the cost of further work for the same prompt."""
        return replace(
            self,
            completion=self.completion + other.completion,
            steps=self.steps + other.steps,
            produced=self.produced + other.produced,
            forwards=self.forwards + other.forwards,
        )


@dataclass(frozen=True)
class StepEvent:
    """A denoising step of choice ``index``, as ``trace`` records it."""

    index: int
    frame: dict[str, Any]


@dataclass(frozen=True)
class Ended:
    """The end of the job, with an ``error`` or without one."""

    error: Exception | None = None


Event: TypeAlias = "Piece | StepEvent | Ended"
Emit = Callable[[Event], None]
