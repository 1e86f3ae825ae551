"""Renders chat templates as transformers does, within bounds of time, work and memory.

A template is untrusted code that comes with a checkpoint.  It runs in Jinja's sandbox.  In addition
every loop, call, filter and operator counts against a budget, and a text or list that would be too
large is refused before it is made.

    >>> render(template, {"messages": [{"role": "user", "content": "Hello"}], "tools": None})
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mlx_diffgemma.errors import UserError
from mlx_diffgemma.text import budget
from mlx_diffgemma.text.budget import Budget, TemplateLimitError, rendering
from mlx_diffgemma.text.sandbox import Environment, Generation

LARGEST_SOURCE = 2**20  # characters of the template itself
FAILURES = (
    jinja2.TemplateError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    RuntimeError,
    TypeError,
    ValueError,
)


@functools.lru_cache(maxsize=8)
def compiled(source: str) -> jinja2.Template:
    """Compile a template.

    Raises:
        UserError: The template cannot be read; the message is one sentence.
    """
    if len(source) > LARGEST_SOURCE:
        raise UserError(
            f"The chat template has {len(source):,} characters, and at most {LARGEST_SOURCE:,} are "
            "read; take the model's own template."
        )
    try:
        return _environment().from_string(source)
    except (
        jinja2.TemplateError,
        RecursionError,
        ValueError,
        OverflowError,
        SyntaxError,
        MemoryError,
    ) as error:
        raise UserError(
            f"The chat template cannot be read ({reason(error)}); take the model's own template."
        ) from None


def syntax(source: str) -> nodes.Template:
    """The unchanged syntax tree of a template.

    Raises:
        UserError: The template cannot be read.
    """
    compiled(source)
    plain = ImmutableSandboxedEnvironment(extensions=[Generation, "jinja2.ext.loopcontrols"])
    tree: nodes.Template = plain.parse(source).set_environment(_environment())  # type: ignore[assignment]
    return tree  # Jinja computes its constants within the bounds of rendering


@functools.lru_cache(maxsize=1)
def _environment() -> Environment:
    return Environment()


def render(source: str, variables: Mapping[str, Any], marks: str = "") -> str:
    """Render a template.

    Args:
        source: The template.
        variables: The values of its variables.
        marks: The characters of ``literal.Marks``, which are kept even where the template writes
            JSON in ASCII.

    Returns:
        The text.

    Raises:
        UserError: Anything goes wrong in the template; the message is one sentence.
    """
    template = compiled(source)
    try:
        input_size = Budget().measure(variables)
    except TemplateLimitError:
        raise UserError(
            f"The conversation has more than {budget.LARGEST:,} characters; shorten it."
        ) from None
    try:
        with rendering(Budget(input_size), marks):
            return template.render(variables)
    except TemplateLimitError as error:
        raise UserError(
            f"The chat template was stopped: {error}; take the model's own template."
        ) from None
    except jinja2.exceptions.UndefinedError as error:
        raise UserError(
            f"The chat template needs what this conversation does not have: {reason(error)}."
        ) from None
    except FAILURES as error:
        kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
        raise UserError(
            f"The chat template refuses this conversation: {kind}{reason(error)}"
        ) from None


def reason(error: BaseException) -> str:
    """The first line of an error's text, cut after 300 characters."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
