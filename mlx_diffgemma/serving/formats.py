"""The interface by which a protocol writes a whole answer, or the events of a stream."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_diffgemma.serving.jobs.events import Piece, StepEvent, Usage


@dataclass(frozen=True)
class Ending:
    """The fields at the end of an answer.

    ``unseen_tokens`` is the number for a hole whose text was shortened for the model, and None for
    other answers.
    """

    seed: int
    warnings: Sequence[str] = ()
    unseen_tokens: int | None = None


class AnswerStream(ABC):
    """The events of one streamed answer, as text."""

    media_type = "text/event-stream"

    @abstractmethod
    def piece(self, piece: Piece, ending: Ending | None) -> str:
        """A piece of a choice.  The last piece of each choice has an ``ending``."""

    @abstractmethod
    def step(self, event: StepEvent, seconds: float) -> str:
        """A denoising step, ``seconds`` after the answer began."""

    @abstractmethod
    def silence(self) -> str:
        """A text that keeps the connection open when nothing has come for a while."""

    @abstractmethod
    def usage(self, usage: Usage) -> str:
        """The usage, if the client asked for it."""

    @abstractmethod
    def error(self, error: Exception) -> str:
        """The error of an answer that failed after its status was sent."""

    @abstractmethod
    def done(self) -> str:
        """The end of the stream, also after an error."""


class AnswerFormat(ABC):
    """The answers of one protocol; one object for each request."""

    @abstractmethod
    def body(
        self,
        choices: Sequence[Sequence[Piece]],
        usage: Usage,
        ending: Ending,
        echo: str = "",
    ) -> dict[str, Any]:
        """A whole answer.

        Args:
            choices: the pieces of each choice.
            usage: what the answer cost.
            ending: the fields at its end.
            echo: the prompt, if the answer repeats it.
        """

    @abstractmethod
    def stream(self, choices: int, null_usage: bool) -> AnswerStream:
        """A stream of ``choices``.

        With ``null_usage``, the events before the usage have a usage of null.
        """
