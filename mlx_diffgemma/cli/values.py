"""Values of options that are texts: JSON, schemas, variables of a template."""

from __future__ import annotations

from typing import Any

from mlx_diffgemma.bounded_json import parse_json
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.files import expand_path, read_text

TEMPLATE_CONFIG = "--chat-template-config"


def json_object(text: str | None, option: str) -> dict[str, Any]:
    """The value of an ``option`` that takes a JSON object; empty if the option was not given.

    Raises:
        UserError: the text is not a JSON object.
    """
    value = parse_json(text, option) if text else {}
    if not isinstance(value, dict):
        raise UserError(f"{option} must be a JSON object, such as '{{\"key\": 1}}', got {text}.")
    return value


def template_variables(text: str | None) -> tuple[dict[str, Any], bool]:
    """Read a --chat-template-config.

    Returns:
        (the variables without ``enable_thinking``, whether that one is set).

    Raises:
        UserError: the text is not a JSON object.
    """
    variables = json_object(text, TEMPLATE_CONFIG)
    thinks = variables.pop("enable_thinking", None) or False
    if not isinstance(thinks, bool):
        raise UserError(f"{TEMPLATE_CONFIG}: enable_thinking is true or false, got {thinks!r:.40}.")
    return variables, thinks


def constraints_of(
    json_schema: str | None, regex: str | None, choices: str | None
) -> dict[str, Any]:
    """The keywords of a constraint.

    Args:
        json_schema: a schema, or the name of its file.
        regex: a regular expression.
        choices: the allowed texts, separated by commas.

    Raises:
        UserError: the schema cannot be read.
    """
    return {
        "json_schema": None if json_schema is None else _schema_of(json_schema),
        "regex": regex,
        "choices": None if choices is None else [choice.strip() for choice in choices.split(",")],
    }


def _schema_of(given: str) -> str:
    """The text of a schema.  ``given`` is the text itself, or the name of its file."""
    if given.lstrip().startswith("{") or given.strip() in ("true", "false"):
        return given
    try:
        return read_text(expand_path(given))
    except UserError as error:
        raise UserError(f"The JSON schema: {error}") from None
