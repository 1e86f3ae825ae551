"""What clients may send: OpenAI's request bodies, the fields of other servers that mean something here, and our own.

A field is honoured, or accepted because its value changes nothing, or refused by name; none is ignored.
Source: the OpenAI API reference, chat completions and completions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    StrictBool,
    field_validator,
    model_validator,
)

from mlx_diffgemma.images import BUDGETS
from mlx_diffgemma.options import GenerationOptions

NAME = r"^[A-Za-z0-9_.-]{1,64}$"  # of a function
HALF = re.compile("[\ud800-\udfff]")  # of a pair that UTF-16 writes one character with
Number = Annotated[float, Field(allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]
STRICT: ContextVar[bool] = ContextVar("strict", default=False)  # whether what is not known or has no effect is refused
NOTES: ContextVar[list[str] | None] = ContextVar("notes", default=None)  # of the body that is being read


def note(text: str) -> None:
    """For the ``warnings`` of the answer."""
    notes = NOTES.get()
    if notes is not None:
        notes.append(text)


def _whole(value: Any) -> Any:
    if isinstance(value, bool) or (STRICT.get() and not isinstance(value, int)):
        raise ValueError("Input should be a valid integer")
    return value


Whole = Annotated[int, BeforeValidator(_whole)]  # "16" and 16.0 as well
Length = Annotated[Whole | str, Field(union_mode="left_to_right")]
Seed = Annotated[Whole, Field(ge=-(2**63), lt=2**63)]


def _limit(tokens: int) -> int:
    if tokens == 0:
        raise ValueError("an answer has at least one token; -1 is no limit.")
    return tokens


Limit = Annotated[Whole, Field(ge=-1, description="-1: none."), AfterValidator(_limit)]


def broken(value: Any) -> bool:
    """Whether a text in it, however deep, holds a surrogate, which can be written in no encoding."""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, str):
            if not one.isascii() and HALF.search(one):
                return True
        elif isinstance(one, list):
            left += one
        elif isinstance(one, dict):
            left += [*one, *one.values()]
    return False


class Strict(BaseModel):
    """A part of a request.

    Null is absent.  What is not known here is dropped and noted (see ``Body.notes``), in the history of a conversation without a
    note; where STRICT is set it is refused.
    """

    model_config = ConfigDict(extra="forbid")

    # Fields that are accepted with these values, which change nothing; "any" accepts whatever is sent.
    NEUTRAL: ClassVar[dict[str, tuple[Any, ...] | str]] = {}
    REFUSED: ClassVar[dict[str, str]] = {}  # and why
    RENAMED: ClassVar[dict[str, str]] = {}  # other servers' names of our fields
    HISTORY: ClassVar[bool] = False

    @model_validator(mode="before")
    @classmethod
    def sift(cls, data: Any) -> Any:
        """Take out what changes nothing, and refuse what would and cannot be honoured."""
        if not isinstance(data, dict):
            return data
        strict = STRICT.get()
        kept = dict(data) if strict else {name: value for name, value in data.items() if value is not None}
        for name, why in cls.REFUSED.items():
            if kept.pop(name, None) is not None:
                raise ValueError(f"{name}: not supported, {why}.")
        for name, own in cls.RENAMED.items():
            if not strict and name in kept:
                if own in kept:
                    raise ValueError(f"{name}: is {own} here; send one of them.")
                kept[own] = kept.pop(name)
        known = {*cls.model_fields, *(field.alias for field in cls.model_fields.values() if field.alias)}
        for name in list(kept):
            if name in cls.NEUTRAL:
                cls._check_neutral(name, kept.pop(name))
            elif name not in known and not strict:
                del kept[name]
                if not cls.HISTORY:
                    note(f"{name}: not known here; it was ignored.")
        return kept

    @classmethod
    def _check_neutral(cls, name: str, value: Any) -> None:
        """Errors: ValueError, where STRICT is set, for a value that would change something."""
        allowed = cls.NEUTRAL[name]
        # By kind as well, since 0 == False.
        if allowed == "any" or value is None or any(value == own and isinstance(value, bool) == isinstance(own, bool)
                                                    for own in allowed):
            return
        if STRICT.get():
            instead = f" or send {' or '.join(map(repr, allowed))}" if allowed else ""
            raise ValueError(f"{name}: {value!r:.100} cannot be honoured; leave it out{instead}.")
        if not cls.HISTORY:
            note(f"{name}: {value!r:.100} has no effect here.")


class Body(Strict):
    """What is sent as a whole."""

    _notes: list[str] = PrivateAttr(default_factory=list)

    @property
    def notes(self) -> list[str]:
        """What of the request was passed over, for the ``warnings`` of the answer."""
        return list(dict.fromkeys(self._notes))

    @model_validator(mode="wrap")
    @classmethod
    def collect_notes(cls, data: Any, handler: ModelWrapValidatorHandler[Body]) -> Body:
        notes = list[str]()
        token = NOTES.set(notes)
        try:
            found = handler(data)
        finally:
            NOTES.reset(token)
        found._notes = notes
        return found

    @model_validator(mode="before")
    @classmethod
    def check_characters(cls, data: Any) -> Any:
        for name, value in data.items() if isinstance(data, dict) else ():
            if broken(name):
                raise ValueError(f"The field name {name!r:.100} holds half a character (a surrogate without its other half).")
            if broken(value):
                raise ValueError(f"{name}: holds half a character (a surrogate without its other half); send whole ones.")
        return data


# Fields of other servers (llama.cpp, vLLM, Ollama, OpenRouter), and the values of them that change nothing here.
OF_OTHERS: dict[str, tuple[Any, ...] | str] = {
    "typical_p": (1,), "top_a": (0,), "tfs_z": (1,), "mirostat": (0,), "dry_multiplier": (0,), "xtc_probability": (0,),
    "dynatemp_range": (0,), "length_penalty": (1,), "use_beam_search": (False,), "early_stopping": (False,), "ignore_eos": (False,),
    "include_stop_str_in_output": (False,), "skip_special_tokens": (True,), "spaces_between_special_tokens": (True,),
    "add_generation_prompt": (True,), "continue_final_message": (False,), "cache_prompt": "any", "keep_alive": "any",
    "usage": "any", "provider": "any", "transforms": ([],), "stream_reasoning": "any", "separate_reasoning": "any",
    "return_progress": (False,), "timings_per_token": (False,), "return_tokens": (False,), "return_token_ids": (False,),
}


class Sampling(Body):
    """Options of a generation; those that OpenAI does not have are named as in ``GenerationOptions`` and mean the same."""

    NEUTRAL = {
        "frequency_penalty": (0,), "presence_penalty": (0,), "repetition_penalty": (1,), "logit_bias": ({},), "min_p": (0,),
        "user": "any", "store": (False, True), "metadata": "any", "safety_identifier": "any", "prompt_cache_key": "any",
        "prompt_cache_retention": "any", "service_tier": "any", "best_of": (1,), **OF_OTHERS,
    }
    RENAMED = {"repeat_penalty": "repetition_penalty", "guided_regex": "regex", "guided_choice": "choices"}

    model: Text
    temperature: Number | None = Field(None, description="1: the checkpoint's schedule; T scales it; 0: the most probable token.")
    top_p: Number | None = None
    top_k: Whole | None = Field(None, description="0 or -1: off.")
    seed: Seed | None = Field(None, description="Same seed, same text. Absent or -1: a fresh one, told in the response.")
    n: Annotated[Whole, Field(ge=1, le=16)] | None = Field(None, description="Choice i has the seed + i.")
    max_tokens: Limit | None = None
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    max_denoising_steps: Whole | None = None
    entropy_bound: Number | None = None
    t_min: Number | None = None
    t_max: Number | None = None
    confidence_threshold: Number | None = None
    stability_threshold: Whole | None = None
    self_conditioning: str | None = None
    coverage: Number | None = None
    preset: str | None = None
    diffusion_sampler: str | None = None
    threshold: Number | None = None
    min_denoising_steps: Whole | None = None
    temperature_steps: Whole | None = None
    plateau: Whole | None = None
    drop_tail: Whole | None = None
    canvas_length: Length | None = None
    reroll_empty: Whole | None = None
    retry_unconverged: Whole | None = None
    image_tokens: Whole | None = None
    regex: str | None = Field(None, description="The whole answer matches this expression of ECMA-262.")
    choices: list[str] | None = Field(None, description="The answer is one of these texts.")

    @model_validator(mode="after")
    def check_stream(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: has no meaning without stream; leave it out.")
        return self

    @model_validator(mode="after")
    def check_constraints(self) -> Sampling:
        if len(self.constraints) > 1:
            raise ValueError(f"{' and '.join(self.constraints)}: each says what the answer must be; send one of them.")
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def constraints(self) -> dict[str, Any]:
        """What the answer must be, as keywords of a generation."""
        return {name: value for name, value in (("regex", self.regex), ("choices", self.choices)) if value is not None}

    def options(self) -> dict[str, Any]:
        """Those of ``GenerationOptions`` that were given."""
        known = GenerationOptions.__dataclass_fields__
        given = {name: getattr(self, name) for name in type(self).model_fields if name in known}
        given = {name: value for name, value in given.items() if value is not None} | self.constraints
        return given | {name: off for name, off in (("top_k", 0), ("max_tokens", None), ("seed", None)) if given.get(name) == -1}


class StreamOptions(Strict):
    NEUTRAL = {"include_obfuscation": (False, True)}

    include_usage: StrictBool = False
    include_drafts: StrictBool = Field(False, description="Chunks without choices show each denoising step in the field diffusion.")


class ImageURL(Strict):
    url: Text
    detail: Literal["auto", "low", "high"] | None = Field(None, description="'low' is image_tokens 70, 'high' 1,120.")


class Part(Strict):
    """A piece of a message's content."""

    NEUTRAL = {"cache_control": "any"}  # what prompts have in common is kept without being told
    HISTORY = True

    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageURL | None = None

    @model_validator(mode="after")
    def check_value(self) -> Part:
        if getattr(self, self.type) is None or (self.text is not None and self.image_url is not None):
            raise ValueError(f"content of the type {self.type!r} has the field {self.type!r} and no other.")
        return self


THOUGHTS = ("thinking", "redacted_thinking", "reasoning")  # parts of an answer that are dropped from the history
TEXTS = {"output_text": "text", "input_text": "text", "refusal": "refusal"}  # other names of text, and the field it is in


def _part(sent: Any) -> Any:
    """A part as other protocols, and other answers of the same, write it, as ours."""
    if isinstance(sent, str):
        return {"type": "text", "text": sent}
    kind = sent.get("type") if isinstance(sent, dict) else None
    if isinstance(kind, str) and kind in TEXTS:
        return {"type": "text", "text": sent.get(TEXTS[kind])}
    if kind in ("image_url", "input_image") and isinstance(sent.get("image_url"), str):
        return {"type": "image_url", "image_url": {"url": sent["image_url"], "detail": sent.get("detail")}}
    return sent


class CalledFunction(Strict):
    HISTORY = True

    name: Annotated[str, Field(pattern=NAME)]
    arguments: str = ""

    @field_validator("arguments", mode="before")
    @classmethod
    def as_text(cls, arguments: Any) -> Any:
        return json.dumps(arguments) if isinstance(arguments, dict) and not STRICT.get() else arguments


class ToolCall(Strict):
    NEUTRAL = {"index": "any"}
    HISTORY = True

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Strict):
    """One of the conversation so far; clients send back what any server, or they themselves, put into it."""

    NEUTRAL = {"name": "any", "refusal": (), "audio": (), "annotations": ([],), "function_call": (), "reasoning_details": "any"}
    HISTORY = True

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: Any = None  # thoughts between calls are kept where the chat template keeps them
    reasoning: Any = None

    @model_validator(mode="before")
    @classmethod
    def as_ours(cls, data: Any) -> Any:
        """Parts in our form, and a refusal as the text that the assistant said."""
        if not isinstance(data, dict) or STRICT.get():
            return data
        content = data.get("content")
        if isinstance(content, list):
            content = [_part(sent) for sent in content if not (isinstance(sent, dict) and sent.get("type") in THOUGHTS)]
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
            raise ValueError("tool_call_id belongs to messages of a tool, and each of them has one.")
        return self


def _image_tokens(messages: Sequence[Message], given: int | None) -> int | None:
    """Soft tokens of an image, by the ``detail`` of those in the messages where it says anything."""
    images = [part.image_url for message in messages if isinstance(message.content, list) for part in message.content]
    details = {image.detail or "auto" for image in images if image is not None}
    if details <= {"auto"}:
        return given
    if len(details) > 1:
        raise ValueError("detail: all images of a request are seen alike here; send the same with each.")
    told = BUDGETS[0] if details == {"low"} else BUDGETS[-1]
    if given not in (None, told):
        raise ValueError(f"detail: is image_tokens {told} here; send one of them.")
    return told


class Function(Strict):
    NEUTRAL = {"strict": (False, True), "cache_control": "any"}  # arguments always keep to the parameters

    name: Annotated[str, Field(pattern=NAME)]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Strict):
    NEUTRAL = {"cache_control": "any"}

    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    name: str


class NamedTool(Strict):
    type: Literal["function"]
    function: NamedFunction


class JSONSchema(Strict):
    NEUTRAL = {"strict": (False, True), "description": "any"}  # the answer always keeps to the schema

    name: str
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchema | None = None

    @model_validator(mode="after")
    def check_schema(self) -> ResponseFormat:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise ValueError("json_schema belongs to the type 'json_schema', which needs one.")
        return self

    @property
    def constraint(self) -> dict[str, Any]:
        """Keywords of a generation."""
        if self.type == "text":
            return {}
        return {"json_schema": self.json_schema.schema_ if self.json_schema else {"type": "object"}}


class ChatRequest(Sampling):
    """The body of ``POST /v1/chat/completions``."""

    NEUTRAL = {**Sampling.NEUTRAL, "modalities": (["text"],), "verbosity": ("medium",), "function_call": ("none", "auto"),
               "prediction": (), "web_search_options": ()}
    REFUSED = {"functions": "send tools", "audio": "the model writes text"}

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Limit | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: StrictBool | None = Field(None, description="False: the answer ends with its first call.")
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = Field(
        None, description="'none' or absent: no thought; whatever else: the model thinks first.")
    chat_template_kwargs: dict[str, Any] | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None

    @model_validator(mode="before")
    @classmethod
    def gather(cls, data: Any) -> Any:
        """Options of other servers that say by themselves what ours say within others."""
        if not isinstance(data, dict) or STRICT.get():
            return data
        kept = dict(data)
        thinks = kept.pop("enable_thinking", None)
        if thinks is not None:
            kept["chat_template_kwargs"] = {"enable_thinking": thinks} | (kept.get("chat_template_kwargs") or {})
        schema = kept.pop("guided_json", None)
        if schema is not None:
            if kept.get("response_format") is not None:
                raise ValueError("guided_json: is response_format here; send one of them.")
            kept["response_format"] = {"type": "json_schema", "json_schema": {"name": "guided_json", "schema": schema}}
        return kept

    @model_validator(mode="after")
    def check_together(self) -> ChatRequest:
        if not isinstance((self.chat_template_kwargs or {}).get("enable_thinking"), bool | None):
            raise ValueError("chat_template_kwargs: enable_thinking is true or false, and no text or number.")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError("max_completion_tokens: differs from max_tokens; send one of them.")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: has no meaning without logprobs.")
        if self.forced and not self.tools:
            raise ValueError("tool_choice: has no meaning without tools.")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in self.functions:
            raise ValueError(f"tool_choice: there is no tool {self.tool_choice.function.name!r} among the tools.")
        if len(self.functions) < len(self.tools or ()):
            raise ValueError("tools: two have the same name.")
        if self.constraints and self.called:
            raise ValueError("response_format: an answer that keeps to it cannot call tools; send tool_choice 'none'.")
        for name in ("stop", "logprobs") if self.forced else ():
            if getattr(self, name):
                raise ValueError(f"{name}: has no meaning where tool_choice makes the answer a call; leave one of them out.")
        self.image_tokens = _image_tokens(self.messages, self.image_tokens)
        if self.thinks and (self.constraints or self.forced):
            what = "tool_choice" if self.forced else "response_format"
            raise ValueError(f"{what}: leaves no place for a thought; send reasoning_effort 'none'.")
        return self

    @property
    def functions(self) -> dict[str, Function]:
        return {tool.function.name: tool.function for tool in self.tools or ()}

    @property
    def called(self) -> dict[str, Function]:
        """The functions that this answer may call."""
        if self.tool_choice == "none":
            return {}
        if isinstance(self.tool_choice, NamedTool):
            return {self.tool_choice.function.name: self.functions[self.tool_choice.function.name]}
        return self.functions

    @property
    def forced(self) -> bool:
        """Whether it must call one of them."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    @property
    def thinks(self) -> bool:
        given = (self.chat_template_kwargs or {}).get("enable_thinking")
        return self.reasoning_effort not in (None, "none") if given is None else bool(given)

    @property
    def constraints(self) -> dict[str, Any]:
        return (self.response_format.constraint if self.response_format else {}) | super().constraints

    def options(self) -> dict[str, Any]:
        limit = self.max_completion_tokens
        return super().options() | ({"max_tokens": None if limit == -1 else limit} if limit else {})


class CompletionRequest(Sampling):
    """The body of ``POST /v1/completions``.  With a ``suffix`` what stands between it and the prompt is filled in."""

    prompt: Text | Annotated[list[Whole], Field(min_length=1)] = Field(description="A text, or ids; or a list of one of them.")
    suffix: str | None = None
    instruction: str | None = Field(None, description="Beside a suffix: the user's message to which the whole text is the answer.")
    min_tokens: Annotated[Whole, Field(ge=1)] | None = Field(None, description="Beside a suffix: tokens to fill in at least.")
    echo: StrictBool | None = None
    logprobs: Annotated[Whole, Field(ge=0, le=5)] | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def only_one(cls, prompt: Any) -> Any:
        if not (isinstance(prompt, list) and prompt and all(isinstance(one, str | list) for one in prompt)):
            return prompt
        if len(prompt) > 1:
            raise ValueError(f"{len(prompt)} prompts are not answered at once; send one request for each.")
        return prompt[0]

    @model_validator(mode="after")
    def check_together(self) -> CompletionRequest:
        if self.echo and self.logprobs is not None:
            raise ValueError("logprobs: the prompt that echo repeats has none; leave one of them out.")
        if not self.suffix:
            for name in ("instruction", "min_tokens"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}: has no meaning without a suffix.")
            return self
        if not isinstance(self.prompt, str):
            raise ValueError("suffix: takes a prompt that is a text, not ids.")
        drafts = bool(self.stream_options and self.stream_options.include_drafts)
        for name, sent, why in (("logprobs", self.logprobs is not None, "they are those of a canvas"),
                                ("echo", self.echo, "the text is known"), ("stop", self.stop, "a hole has an end"),
                                ("canvas_length", self.canvas_length is not None, "a canvas is as long as the text needs"),
                                ("stream_options", drafts, "of whose canvases include_drafts shows none")):
            if sent:
                raise ValueError(f"{name}: has no meaning beside a suffix, {why}; leave it out.")
        if self.max_tokens == -1:
            raise ValueError("max_tokens: a hole has a limit; name it, or leave it out.")
        if self.n not in (None, 1):
            raise ValueError("n: a hole is filled once; send several requests with different seeds.")
        return self


class DecisionQuestion(Strict):
    """Yes or no without ``labels`` and ``scale``."""

    question: str = ""
    labels: list[str] | None = None
    scale: Annotated[list[Whole], Field(min_length=2, max_length=2)] | None = None
    template: str = ""

    @model_validator(mode="after")
    def check_together(self) -> DecisionQuestion:
        if self.labels is not None and self.scale is not None:
            raise ValueError("labels and scale each say what is to be decided; send one of them.")
        return self


class DecisionRequest(Body):
    """The body of ``POST /v1/decisions``."""

    NEUTRAL = {"user": "any", "metadata": "any", "store": (False, True)}

    model: Text
    messages: Annotated[list[Message], Field(min_length=1)]
    questions: Annotated[list[DecisionQuestion], Field(min_length=1, max_length=256)]
    reads: Annotated[Whole, Field(ge=1, le=64)] = 1
    seed: Seed = 0
    canvas_length: Whole | None = None
    image_tokens: Whole | None = None

    @model_validator(mode="after")
    def check_images(self) -> DecisionRequest:
        self.image_tokens = _image_tokens(self.messages, self.image_tokens)
        return self
