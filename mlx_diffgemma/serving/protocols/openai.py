"""The common parts of OpenAI's response bodies, with additional fields of our own.

Source: the OpenAI API reference, chat completions, chunks, completions and models.
"""

from __future__ import annotations

import json
import secrets
import time
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from mlx_diffgemma import __version__
from mlx_diffgemma.serving.errors import body_of_error
from mlx_diffgemma.serving.formats import AnswerFormat, AnswerStream, Ending
from mlx_diffgemma.serving.jobs.events import Piece, StepEvent, Usage

DONE = "data: [DONE]\n\n"
SILENCE = ": still here\n\n"  # a comment, which clients skip


def event(body: dict[str, Any]) -> str:
    """A server-sent event."""
    # The JSON is ASCII, because some clients take other characters for the end of a line.
    return f"data: {json.dumps(body, allow_nan=False)}\n\n"


class Envelope:
    """The fields that all bodies and chunks of one answer share.

    ``kind`` is the ``object`` of a whole body.  ``prefix`` is the beginning of the id.
    """

    kind: ClassVar[str]
    prefix: ClassVar[str]

    def __init__(self, model: str) -> None:
        self.id = f"{self.prefix}-{secrets.token_hex(12)}"
        self._common = {
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": f"mlx-diffgemma-{__version__}",
        }

    def whole(self, usage: Usage, **more: Any) -> dict[str, Any]:
        """A whole body."""
        return {
            "id": self.id,
            "object": self.kind,
            **self._common,
            "usage": usage_body(usage),
            **more,
        }


class AnswerEnvelope(Envelope, AnswerFormat):
    """Bodies and chunks with choices.  ``chunk_kind`` is the ``object`` of a chunk."""

    chunk_kind: ClassVar[str]

    @abstractmethod
    def choice(self, index: int, pieces: Sequence[Piece], echo: str = "") -> dict[str, Any]:
        """A whole choice.

        Args:
            index: the number of the choice.
            pieces: all its pieces.
            echo: a text that is repeated before its text.
        """

    @abstractmethod
    def delta(
        self, piece: Piece, calls: int = 0, length: int = 0, first: bool = False
    ) -> dict[str, Any]:
        """A piece of a choice.

        Args:
            piece: the piece.
            calls: the number of calls in the pieces before it.
            length: the number of characters in the pieces before it.
            first: whether no piece came before it.
        """

    def chunk(self, choices: Sequence[dict[str, Any]] = (), **more: Any) -> dict[str, Any]:
        """A chunk of a stream.  Clients skip the fields ``more`` that they do not know."""
        return {
            "id": self.id,
            "object": self.chunk_kind,
            **self._common,
            "choices": list(choices),
            **more,
        }

    def body(
        self,
        choices: Sequence[Sequence[Piece]],
        usage: Usage,
        ending: Ending,
        echo: str = "",
    ) -> dict[str, Any]:
        bodies = [self.choice(index, pieces, echo) for index, pieces in enumerate(choices)]
        return self.whole(usage, choices=bodies, **_ending_fields(ending))

    def stream(self, choices: int, null_usage: bool) -> ChunkStream:
        return ChunkStream(self, choices, null_usage)


@dataclass
class _Progress:
    """What a stream has sent of one choice."""

    calls: int = 0
    length: int = 0  # characters
    has_begun: bool = False


class ChunkStream(AnswerStream):
    """A stream of chunks."""

    def __init__(self, envelope: AnswerEnvelope, choices: int, null_usage: bool) -> None:
        self._envelope = envelope
        self._common: dict[str, Any] = {"usage": None} if null_usage else {}
        self._progress = [_Progress() for _ in range(choices)]

    def piece(self, piece: Piece, ending: Ending | None) -> str:
        progress = self._progress[piece.index]
        delta = self._envelope.delta(piece, progress.calls, progress.length, not progress.has_begun)
        progress.has_begun = True
        progress.calls += len(piece.calls)
        progress.length += len(piece.text)
        fields = _ending_fields(ending) if ending else {}
        return event(self._envelope.chunk([delta], **fields, **self._common))

    def step(self, event_: StepEvent, seconds: float) -> str:
        frame = event_.frame | {"seconds": round(seconds, 4), "index": event_.index}
        return event(self._envelope.chunk(diffusion=frame, **self._common))

    def silence(self) -> str:
        return SILENCE

    def usage(self, usage: Usage) -> str:
        return event(self._envelope.chunk(usage=usage_body(usage)))

    def error(self, error: Exception) -> str:
        return event(body_of_error(error))

    def done(self) -> str:
        return DONE


def _ending_fields(ending: Ending) -> dict[str, Any]:
    unseen = ending.unseen_tokens
    fields: dict[str, Any] = {} if unseen is None else {"unseen_tokens": unseen}
    return {"seed": ending.seed, **fields, **warnings_field(ending.warnings)}


def warnings_field(warnings: Iterable[str]) -> dict[str, Any]:
    """A field of our own with the warnings for the caller, if there are any."""
    texts = list(warnings)
    return {"warnings": texts} if texts else {}


def usage_body(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.reused},
        "denoising_steps": usage.steps,
        "tokens_per_forward": round(usage.produced / usage.forwards, 2) if usage.forwards else 0.0,
    }


def call_body(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call."""
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {
            "name": call["name"],
            "arguments": json.dumps(call["arguments"], ensure_ascii=False),
        },
    }
