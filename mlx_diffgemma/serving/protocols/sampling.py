"""Request fields that every generation has: sampling, limits, seeds, streams."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field, StrictBool, create_model, model_validator

from mlx_diffgemma.generation.option_fields import request_fields
from mlx_diffgemma.generation.options import GenerationOptions
from mlx_diffgemma.serving.protocols.answer_body import AnswerBody
from mlx_diffgemma.serving.protocols.body import Names, Strict, Values
from mlx_diffgemma.serving.protocols.fields import Length, Limit, Number, Seed, Text, Whole
from mlx_diffgemma.serving.tasks import Delivery

# Fields of other servers (llama.cpp, vLLM, Ollama, OpenRouter), with the values that change nothing
# here.
OTHER_SERVERS: Values = {
    "typical_p": (1,),
    "top_a": (0,),
    "tfs_z": (1,),
    "mirostat": (0,),
    "dry_multiplier": (0,),
    "xtc_probability": (0,),
    "dynatemp_range": (0,),
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "early_stopping": (False,),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "cache_prompt": "any",
    "keep_alive": "any",
    "usage": "any",
    "provider": "any",
    "transforms": ([],),
    "stream_reasoning": "any",
    "separate_reasoning": "any",
    "return_progress": (False,),
    "timings_per_token": (False,),
    "return_tokens": (False,),
    "return_token_ids": (False,),
}

# The meaning of -1 for these options.
OFF = {"top_k": 0, "max_tokens": None, "seed": None}


class StreamOptions(Strict):
    NEUTRAL: ClassVar[Values] = {"include_obfuscation": (False, True)}

    include_usage: StrictBool = False
    include_drafts: StrictBool = Field(
        False, description="Chunks without choices show each denoising step in the field diffusion."
    )


# Options of ``GenerationOptions`` that a request does not have as fields of their own.
NOT_FIELDS = {"json_schema", "mode", "num_draft_tokens", "prefill_step_size"}


def _option_fields() -> dict[str, Any]:
    """The options of a generation as fields of a request, by name.

    ``GenerationOptions`` itself refuses what is out of range.
    """
    described = request_fields(GenerationOptions, {int: Whole, float: Number})
    fields = dict[str, Any]()
    kinds = {"canvas_length": Length | None}  # "16" is a number
    for name, (kind, limits) in described.items():
        if name not in NOT_FIELDS:
            fields[name] = (kinds.get(name, kind), Field(None, description=limits["description"]))
    return fields


OPTION_FIELDS = _option_fields()
OptionsBody: Any = create_model("OptionsBody", __base__=AnswerBody, **OPTION_FIELDS)


class Sampling(OptionsBody):
    """Options of a generation.

    Fields that OpenAI does not have are named as in ``GenerationOptions`` and mean the same.
    """

    NEUTRAL: ClassVar[Values] = {
        "user": "any",
        "store": (False, True),
        "metadata": "any",
        "safety_identifier": "any",
        "prompt_cache_retention": "any",
        "service_tier": "any",
        "best_of": (1,),
        **OTHER_SERVERS,
    }
    RENAMED: ClassVar[Names] = {
        "repeat_penalty": "repetition_penalty",
        "guided_regex": "regex",
        "guided_choice": "choices",
    }

    temperature: Number | None = Field(
        None, description="1: the checkpoint's schedule; T scales it; 0: the most probable token."
    )
    top_k: Whole | None = Field(None, description="0 or -1: off.")
    logit_bias: dict[str, Number] | None = None
    seed: Seed | None = Field(
        None, description="Same seed, same text. Absent or -1: a fresh one, named in the response."
    )
    n: Annotated[Whole, Field(ge=1, le=16)] | None = Field(
        None, description="Choice i has the seed + i."
    )
    max_tokens: Limit | None = None
    image_tokens: Whole | None = OPTION_FIELDS["image_tokens"][1]
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    cache_salt: Annotated[str, Field(max_length=512)] | None = Field(
        None,
        description="Cached prompts are shared only among requests with the same salt and the same API key.",
    )
    prompt_cache_key: Annotated[str, Field(max_length=512)] | None = Field(
        None, description="As cache_salt, under OpenAI's name."
    )
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    regex: str | None = Field(
        None, description="The whole answer matches this regular expression (ECMA-262)."
    )
    choices: list[str] | None = Field(None, description="The answer is one of these texts.")

    @model_validator(mode="after")
    def check_stream(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: has no meaning without stream; leave it out.")
        return self

    @model_validator(mode="after")
    def check_constraints(self) -> Sampling:
        if len(self.constraints) > 1:
            raise ValueError(
                f"{' and '.join(self.constraints)}: each says what the answer must be; send one of them."
            )
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def constraints(self) -> dict[str, Any]:
        """The constraints of the answer, as keywords of a generation."""
        both = {"regex": self.regex, "choices": self.choices}
        return {name: value for name, value in both.items() if value is not None}

    def options(self) -> dict[str, Any]:
        """The keywords of ``GenerationOptions`` that the request gave."""
        sent = dict[str, Any]()
        for name in type(self).model_fields:
            value = getattr(self, name)
            if name in GenerationOptions.__dataclass_fields__ and value is not None:
                sent[name] = value
        sent |= self.constraints
        for name, off in OFF.items():
            if sent.get(name) == -1:
                sent[name] = off
        return sent

    @property
    def salts(self) -> tuple[str, str]:
        return self.cache_salt or "", self.prompt_cache_key or ""

    @property
    def delivery(self) -> Delivery:
        options = self.stream_options
        return Delivery(
            stream=bool(self.stream),
            usage=bool(options and options.include_usage),
            drafts=bool(options and options.include_drafts),
        )
