"""Messages of a conversation, in the form of OpenAI's chat completions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from mlx_diffgemma.media.images import BUDGETS
from mlx_diffgemma.serving.protocols.body import Strict, Values
from mlx_diffgemma.serving.protocols.fields import FUNCTION_NAME, STRICT, Text

# Parts of an answer that are dropped from the history.
THOUGHTS = ("thinking", "redacted_thinking", "reasoning")
# Other names of a text part, and the field that holds the text.
TEXTS = {"output_text": "text", "input_text": "text", "refusal": "refusal"}


class ImageURL(Strict):
    url: Text
    detail: Literal["auto", "low", "high"] | None = Field(
        None, description="'low' is image_tokens 70, 'high' 1,120."
    )


class Part(Strict):
    """A piece of a message's content."""

    NEUTRAL: ClassVar[Values] = {
        "cache_control": "any"
    }  # common prefixes of prompts are cached without it
    HISTORY = True

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageURL | None = None

    @model_validator(mode="after")
    def check_value(self) -> Part:
        if getattr(self, self.type) is None or (
            self.text is not None and self.image_url is not None
        ):
            raise ValueError(
                f"content of the type {self.type!r} has the field {self.type!r} and no other."
            )
        return self


def _part(sent: Any) -> Any:
    """Turn a part from the form of other protocols and SDKs into our form."""
    if isinstance(sent, str):
        return {"type": "text", "text": sent}
    kind = sent.get("type") if isinstance(sent, dict) else None
    if isinstance(kind, str) and kind in TEXTS:
        return {"type": "text", "text": sent.get(TEXTS[kind])}
    if kind in ("image_url", "input_image") and isinstance(sent.get("image_url"), str):
        return {
            "type": "image_url",
            "image_url": {"url": sent["image_url"], "detail": sent.get("detail")},
        }
    return sent


class CalledFunction(Strict):
    HISTORY = True

    name: Annotated[str, Field(pattern=FUNCTION_NAME)]
    arguments: str = ""

    @field_validator("arguments", mode="before")
    @classmethod
    def as_text(cls, arguments: Any) -> Any:
        return (
            json.dumps(arguments) if isinstance(arguments, dict) and not STRICT.get() else arguments
        )


class ToolCall(Strict):
    NEUTRAL: ClassVar[Values] = {"index": "any"}
    HISTORY = True

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Strict):
    """A message of the conversation so far.

    Clients send back whatever a server or an SDK put into it.
    """

    NEUTRAL: ClassVar[Values] = {
        "name": "any",
        "refusal": (),
        "audio": (),
        "annotations": ([],),
        "function_call": (),
        "reasoning_details": "any",
    }
    HISTORY = True

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    # Thoughts between calls are kept if the chat template keeps them.
    reasoning_content: Any = None
    reasoning: Any = None

    @model_validator(mode="before")
    @classmethod
    def as_ours(cls, data: Any) -> Any:
        """Turn parts into our form, and a refusal into the text of the message."""
        if not isinstance(data, dict) or STRICT.get():
            return data
        content = data.get("content")
        if isinstance(content, list):
            content = [
                _part(sent)
                for sent in content
                if not (isinstance(sent, dict) and sent.get("type") in THOUGHTS)
            ]
        if content is None and isinstance(data.get("refusal"), str):
            content = data["refusal"]
        if content is None and data.get("role") == "tool":
            content = ""
        return {**data, "content": content}

    @model_validator(mode="after")
    def check_fields(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a message of the role {self.role!r} has content.")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls belong to messages of the assistant.")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise ValueError(
                "tool_call_id belongs to messages of a tool, and each of them has one."
            )
        return self


def image_tokens(messages: Sequence[Message], given: int | None) -> int | None:
    """The number of soft tokens of an image, from the ``detail`` of the images or from ``given``.

    Raises:
        ValueError: the images have different details, or a detail contradicts ``given``.
    """
    images = [
        part.image_url
        for message in messages
        if isinstance(message.content, list)
        for part in message.content
    ]
    details = {image.detail or "auto" for image in images if image is not None}
    if details <= {"auto"}:
        return given
    if len(details) > 1:
        raise ValueError(
            "detail: all images of a request are seen alike here; send the same with each."
        )
    budget = BUDGETS[0] if details == {"low"} else BUDGETS[-1]
    if given not in (None, budget):
        raise ValueError(f"detail: is image_tokens {budget} here; send one of them.")
    return budget
