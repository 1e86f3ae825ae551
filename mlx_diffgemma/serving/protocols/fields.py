"""Types of request fields, and whether a request is read strictly."""

from __future__ import annotations

import re
from contextvars import ContextVar
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

FUNCTION_NAME = r"^[A-Za-z0-9_.-]{1,64}$"
SURROGATE = re.compile("[\ud800-\udfff]")  # half of the pair that is one character in UTF-16
Number = Annotated[float, Field(allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]
# Whether unknown fields, and values without effect, are refused.
STRICT: ContextVar[bool] = ContextVar("strict", default=False)
# Notes about the body that is being read.
NOTES: ContextVar[list[str] | None] = ContextVar("notes", default=None)


def note(text: str) -> None:
    """Add a note about the body that is being read, for the ``warnings`` of the answer."""
    notes = NOTES.get()
    if notes is not None:
        notes.append(text)


def _whole(value: Any) -> Any:
    if isinstance(value, bool) or (STRICT.get() and not isinstance(value, int)):
        raise ValueError("Input should be a valid integer")
    return value


def _limit(tokens: int) -> int:
    if tokens == 0:
        raise ValueError("an answer has at least one token; -1 is no limit.")
    return tokens


Whole = Annotated[int, BeforeValidator(_whole)]  # also takes "16" and 16.0
Length = Annotated[Whole | str, Field(union_mode="left_to_right")]
Seed = Annotated[Whole, Field(ge=-(2**63), lt=2**63)]
Limit = Annotated[Whole, Field(ge=-1, description="-1: no limit."), AfterValidator(_limit)]


def has_surrogate(value: Any) -> bool:
    """Whether a text in ``value``, at any depth, has a surrogate.  No encoding can write one."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            if not item.isascii() and SURROGATE.search(item):
                return True
        elif isinstance(item, list):
            waiting += item
        elif isinstance(item, dict):
            waiting += [*item, *item.values()]
    return False
