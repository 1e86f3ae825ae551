"""Tools and response formats, in the form of OpenAI's chat completions."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from mlx_diffgemma.serving.protocols.body import Strict, Values
from mlx_diffgemma.serving.protocols.fields import FUNCTION_NAME


class Function(Strict):
    # Arguments always match the parameters, with ``strict`` or without.
    NEUTRAL: ClassVar[Values] = {"strict": (False, True), "cache_control": "any"}

    name: Annotated[str, Field(pattern=FUNCTION_NAME)]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Strict):
    NEUTRAL: ClassVar[Values] = {"cache_control": "any"}

    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    name: str


class NamedTool(Strict):
    type: Literal["function"]
    function: NamedFunction


class JSONSchema(Strict):
    # The answer always matches the schema, with ``strict`` or without.
    NEUTRAL: ClassVar[Values] = {"strict": (False, True), "description": "any"}

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
        """The constraint as keywords of a generation."""
        if self.type == "text":
            return {}
        return {"json_schema": self.json_schema.schema_ if self.json_schema else {"type": "object"}}
