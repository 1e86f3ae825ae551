"""OpenAI's completions: ``POST /v1/completions``; with a suffix, the text between is filled in.

Source: the OpenAI API reference, completions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, StrictBool, field_validator, model_validator

from mlx_diffgemma.generation.options import PENALTIES, GenerationOptions
from mlx_diffgemma.serving.jobs.events import Piece, TokenLogprob
from mlx_diffgemma.serving.protocols.fields import Whole
from mlx_diffgemma.serving.protocols.openai import AnswerEnvelope
from mlx_diffgemma.serving.protocols.sampling import Sampling
from mlx_diffgemma.serving.tasks import AnswerTask, InfillTask


class CompletionRequest(Sampling):
    """The body of ``POST /v1/completions``.

    With a ``suffix``, the text between the prompt and the suffix is filled in.
    """

    prompt: str | Annotated[list[Whole], Field(min_length=1)] = Field(
        description="A text, or ids; or a list of one of them."
    )
    suffix: str | None = None
    instruction: str | None = Field(
        None,
        description="With a suffix: the user's message to which the whole text is the answer.",
    )
    min_tokens: Annotated[Whole, Field(ge=1)] | None = Field(
        None, description="With a suffix: the least number of tokens to fill in."
    )
    echo: StrictBool | None = None
    logprobs: Annotated[Whole, Field(ge=0, le=5)] | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def only_one(cls, prompt: Any) -> Any:
        """Take the prompt out of a list of one."""
        if not isinstance(prompt, list) or not prompt:
            return prompt
        if not all(isinstance(item, str | list) for item in prompt):
            return prompt
        if len(prompt) > 1:
            raise ValueError(
                f"{len(prompt)} prompts are not answered at once; send one request for each."
            )
        return prompt[0]

    @model_validator(mode="after")
    def check_together(self) -> CompletionRequest:
        if self.echo and self.logprobs is not None:
            raise ValueError(
                "logprobs: the prompt that echo repeats has none; leave one of them out."
            )
        if self.prompt == "" and not self.suffix:
            raise ValueError("prompt: should have at least 1 character, unless there is a suffix.")
        if self.suffix:
            self._check_infill()
            return self
        for name in ("instruction", "min_tokens"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name}: has no meaning without a suffix.")
        return self

    def _check_infill(self) -> None:
        if not isinstance(self.prompt, str):
            raise ValueError("suffix: takes a prompt that is a text, not ids.")
        useless = {
            "logprobs": (self.logprobs is not None, "they are those of a canvas"),
            "echo": (self.echo, "the text is known"),
            "canvas_length": (
                self.canvas_length is not None,
                "a canvas is as long as the text needs",
            ),
            "stream_options": (
                self.delivery.drafts,
                "of whose canvases include_drafts shows none",
            ),
        }
        for name, (is_sent, reason) in useless.items():
            if is_sent:
                raise ValueError(f"{name}: has no meaning beside a suffix, {reason}; leave it out.")
        for name in PENALTIES:
            if getattr(self, name) not in (None, getattr(GenerationOptions, name), {}):
                # The body has been read, so ``note`` would come too late.
                self._notes.append(f"{name}: has no effect beside a suffix.")
        if self.n not in (None, 1):
            raise ValueError(
                "n: a hole is filled once; send several requests with different seeds."
            )

    def task(self) -> AnswerTask | InfillTask:
        if self.suffix:
            return InfillTask(
                str(self.prompt),
                self.suffix,
                self.options(),
                self.instruction,
                self.min_tokens,
                self.max_tokens,
                self.stops,
            )
        return AnswerTask(
            self.prompt,
            self.options(),
            self.n or 1,
            self.stops,
            self.logprobs is not None,
            self.logprobs or 0,
            bool(self.echo),
        )

    def answer_format(self) -> CompletionEnvelope:
        return CompletionEnvelope(self.model)


class CompletionEnvelope(AnswerEnvelope):
    """Response bodies of completions."""

    kind = "text_completion"
    chunk_kind = "text_completion"
    prefix = "cmpl"

    def choice(self, index: int, pieces: Sequence[Piece], echo: str = "") -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        logprobs = [entry for piece in pieces for entry in piece.logprobs]
        return {
            "index": index,
            "finish_reason": pieces[-1].finish_reason if pieces else "stop",
            "text": echo + text,
            "logprobs": _logprobs(logprobs, len(echo)) if logprobs else None,
        }

    def delta(
        self,
        piece: Piece,
        calls: int = 0,  # noqa: ARG002
        length: int = 0,
        first: bool = False,  # noqa: ARG002
    ) -> dict[str, Any]:
        return {
            "index": piece.index,
            "finish_reason": piece.finish_reason,
            "text": piece.text,
            "logprobs": _logprobs(piece.logprobs, length) if piece.logprobs else None,
        }


def _logprobs(entries: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    """The log-probabilities of tokens.

    ``offset`` is the number of characters of the answer before these tokens.
    """
    offsets = list[int]()
    for entry in entries:
        offsets.append(offset)
        offset += len(entry.text)
    return {
        "tokens": [entry.text for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": [dict(entry.top) for entry in entries],
        "text_offset": offsets,
    }
