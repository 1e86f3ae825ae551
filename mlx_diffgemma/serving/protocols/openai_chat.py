"""OpenAI's chat completions: ``POST /v1/chat/completions``.

Source: the OpenAI API reference, chat completions and chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, StrictBool, model_validator

from mlx_diffgemma.serving.jobs.events import Piece, TokenLogprob
from mlx_diffgemma.serving.protocols.body import Names, Values
from mlx_diffgemma.serving.protocols.fields import STRICT, Limit, Whole
from mlx_diffgemma.serving.protocols.messages import Message, image_tokens
from mlx_diffgemma.serving.protocols.openai import AnswerEnvelope, call_body
from mlx_diffgemma.serving.protocols.sampling import Sampling
from mlx_diffgemma.serving.protocols.tools import Function, NamedTool, ResponseFormat, Tool
from mlx_diffgemma.serving.tasks import AnswerTask, Conversation, ToolUse


class ChatRequest(Sampling):
    """The body of ``POST /v1/chat/completions``."""

    NEUTRAL: ClassVar[Values] = {
        **Sampling.NEUTRAL,
        "modalities": (["text"],),
        "verbosity": ("medium",),
        "function_call": ("none", "auto"),
        "prediction": (),
        "web_search_options": (),
    }
    REFUSED: ClassVar[Names] = {"functions": "send tools", "audio": "the model writes text"}

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Limit | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: StrictBool | None = Field(
        None, description="False: the answer ends with its first call."
    )
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = Field(
        None, description="'none' or absent: no thought. Any other value: the model thinks first."
    )
    chat_template_kwargs: dict[str, Any] | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None

    @model_validator(mode="before")
    @classmethod
    def gather(cls, data: Any) -> Any:
        """Turn options of other servers into the fields of ours that hold them."""
        if not isinstance(data, dict) or STRICT.get():
            return data
        kept = dict(data)
        thinks = kept.pop("enable_thinking", None)
        if thinks is not None:
            variables = kept.get("chat_template_kwargs") or {}
            kept["chat_template_kwargs"] = {"enable_thinking": thinks} | variables
        schema = kept.pop("guided_json", None)
        if schema is not None:
            if kept.get("response_format") is not None:
                raise ValueError("guided_json: is response_format here; send one of them.")
            kept["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "guided_json", "schema": schema},
            }
        return kept

    @model_validator(mode="after")
    def check_together(self) -> ChatRequest:
        if not isinstance((self.chat_template_kwargs or {}).get("enable_thinking"), bool | None):
            raise ValueError(
                "chat_template_kwargs: enable_thinking is true or false, and no text or number."
            )
        if self.max_tokens is not None and self.max_completion_tokens not in (
            None,
            self.max_tokens,
        ):
            raise ValueError("max_completion_tokens: differs from max_tokens; send one of them.")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: has no meaning without logprobs.")
        self._check_tools()
        self.image_tokens = image_tokens(self.messages, self.image_tokens)
        if self.thinks and (self.constraints or self.forced):
            what = "tool_choice" if self.forced else "response_format"
            raise ValueError(
                f"{what}: leaves no place for a thought; send reasoning_effort 'none'."
            )
        return self

    def _check_tools(self) -> None:
        if self.forced and not self.tools:
            raise ValueError("tool_choice: has no meaning without tools.")
        if isinstance(self.tool_choice, NamedTool):
            name = self.tool_choice.function.name
            if name not in self.functions:
                raise ValueError(f"tool_choice: there is no tool {name!r} among the tools.")
        if len(self.functions) < len(self.tools or ()):
            raise ValueError("tools: two have the same name.")
        if self.constraints and self.called:
            raise ValueError(
                "response_format: an answer that keeps to it cannot call tools; send tool_choice "
                "'none'."
            )
        for name in ("stop", "logprobs") if self.forced else ():
            if getattr(self, name):
                raise ValueError(
                    f"{name}: has no meaning where tool_choice makes the answer a call; leave one "
                    "of them out."
                )

    @property
    def functions(self) -> dict[str, Function]:
        return {tool.function.name: tool.function for tool in self.tools or ()}

    @property
    def called(self) -> dict[str, Function]:
        """The functions that this answer may call."""
        if self.tool_choice == "none":
            return {}
        if isinstance(self.tool_choice, NamedTool):
            name = self.tool_choice.function.name
            return {name: self.functions[name]}
        return self.functions

    @property
    def forced(self) -> bool:
        """Whether the answer must be a call."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    @property
    def thinks(self) -> bool:
        enabled = (self.chat_template_kwargs or {}).get("enable_thinking")
        return self.reasoning_effort not in (None, "none") if enabled is None else bool(enabled)

    @property
    def constraints(self) -> dict[str, Any]:
        constraint = self.response_format.constraint if self.response_format else {}
        return constraint | super().constraints

    def options(self) -> dict[str, Any]:
        options = super().options()
        if self.max_completion_tokens:
            limit = self.max_completion_tokens
            options["max_tokens"] = None if limit == -1 else limit
        return options

    def task(self) -> AnswerTask:
        tool_use = ToolUse(
            self.tools or (), self.called, self.forced, self.parallel_tool_calls is False
        )
        variables = dict(self.chat_template_kwargs or {})
        variables.pop("enable_thinking", None)
        return AnswerTask(
            Conversation(self.messages, self.thinks, tool_use, variables),
            self.options(),
            self.n or 1,
            self.stops,
            bool(self.logprobs),
            self.top_logprobs or 0,
        )

    def answer_format(self) -> ChatEnvelope:
        return ChatEnvelope(self.model)


class ChatEnvelope(AnswerEnvelope):
    """Response bodies of chat completions."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    prefix = "chatcmpl"

    def choice(self, index: int, pieces: Sequence[Piece], echo: str = "") -> dict[str, Any]:  # noqa: ARG002
        text = "".join(piece.text for piece in pieces)
        calls = [call for piece in pieces for call in piece.calls]
        logprobs = [entry for piece in pieces for entry in piece.logprobs]
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if calls and not text.strip() else text,
            "refusal": None,
        }
        if thought := "".join(piece.thought for piece in pieces).strip():
            message["reasoning_content"] = thought
        if calls:
            message["tool_calls"] = [call_body(call) for call in calls]
        return {
            "index": index,
            "finish_reason": pieces[-1].finish_reason if pieces else "stop",
            "message": message,
            "logprobs": _logprobs(logprobs) if logprobs else None,
        }

    def delta(
        self,
        piece: Piece,
        calls: int = 0,
        length: int = 0,  # noqa: ARG002
        first: bool = False,
    ) -> dict[str, Any]:
        delta: dict[str, Any] = {"role": "assistant"} if first else {}
        if piece.text or first:
            delta["content"] = piece.text
        if piece.thought:
            delta["reasoning_content"] = piece.thought
        if piece.calls:
            delta["tool_calls"] = [
                {"index": number, **call_body(call)}
                for number, call in enumerate(piece.calls, calls)
            ]
        return {
            "index": piece.index,
            "finish_reason": piece.finish_reason,
            "delta": delta,
            "logprobs": _logprobs(piece.logprobs) if piece.logprobs else None,
        }


def _logprobs(entries: Sequence[TokenLogprob]) -> dict[str, Any]:
    content = []
    for entry in entries:
        top = [_logprob(text, value) for text, value in entry.top]
        content.append(_logprob(entry.text, entry.logprob) | {"top_logprobs": top})
    return {"content": content, "refusal": None}


def _logprob(text: str, value: float) -> dict[str, Any]:
    return {
        "token": text,
        "logprob": value,
        "bytes": list(text.encode("utf-8", "surrogatepass")),
    }
