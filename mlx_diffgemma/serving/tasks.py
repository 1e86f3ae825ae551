"""The tasks that a request asks for, independent of its protocol.

A protocol turns a request body into one of these tasks.  The job modules turn a task into a job.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from mlx_diffgemma.serving.protocols.messages import Message
from mlx_diffgemma.serving.protocols.tools import Function, Tool


@dataclass(frozen=True)
class Delivery:
    """How an answer is sent.

    Attributes:
        stream: whether it is sent as events, while it is written.
        usage: whether a stream ends with the usage.
        drafts: whether a stream shows every denoising step.
    """

    stream: bool = False
    usage: bool = False
    drafts: bool = False


@dataclass(frozen=True)
class ToolUse:
    """The tools of a request.

    Attributes:
        tools: all tools that were sent.
        callable: the functions among them that this answer may call, by name.
        forced: whether the answer must be a call.
        one_call: whether the answer ends with its first call.
    """

    tools: Sequence[Tool] = ()
    callable: Mapping[str, Function] = field(default_factory=dict)
    forced: bool = False
    one_call: bool = False


@dataclass(frozen=True)
class Conversation:
    """A prompt made of messages.

    ``think`` says whether the model thinks first.  ``variables`` are further variables of the chat
    template.
    """

    messages: Sequence[Message]
    think: bool = False
    tool_use: ToolUse = ToolUse()
    variables: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AnswerTask:
    """Answers to one prompt: a conversation, a text, or token ids.

    ``options`` are the keywords of ``GenerationOptions`` that the request gave.  ``top_logprobs``
    is the number of alternatives per token.  With ``echo`` the answer begins with the prompt.
    """

    prompt: Conversation | str | list[int]
    options: Mapping[str, Any]
    n: int = 1
    stops: Sequence[str] = ()
    logprobs: bool = False
    top_logprobs: int = 0
    echo: bool = False

    @property
    def tool_use(self) -> ToolUse:
        return self.prompt.tool_use if isinstance(self.prompt, Conversation) else ToolUse()


@dataclass(frozen=True)
class InfillTask:
    """The text between ``before`` and ``after``.

    ``instruction`` is the user's message to which the whole text is the answer.  ``options`` are as
    in an ``AnswerTask``.  ``min_tokens`` and ``max_tokens`` bound the hole; None for the defaults.
    """

    before: str
    after: str
    options: Mapping[str, Any]
    instruction: str | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None
    stops: Sequence[str] = ()


@dataclass(frozen=True)
class QuestionTask:
    """A question; yes or no without ``labels`` and ``scale``."""

    text: str = ""
    labels: Sequence[str] | None = None
    scale: Sequence[int] | None = None
    template: str = ""


@dataclass(frozen=True)
class DecisionTask:
    """Questions about a conversation.  ``reads`` is the number of canvases that are averaged."""

    messages: Sequence[Message]
    questions: Sequence[QuestionTask]
    reads: int = 1
    seed: int = 0
    canvas_length: int | None = None
    image_tokens: int | None = None


Task: TypeAlias = "AnswerTask | InfillTask | DecisionTask"
