"""JSON with bounds on nesting and numbers, so that no text can exhaust its reader.

>>> parse_json('{"a": 1}', "the request")
{'a': 1}
"""

from __future__ import annotations

import json
import math
from typing import Any

from mlx_diffgemma.errors import UserError

NESTING = 100  # levels; the code that reads the value may be recursive
DIGITS = 400  # the most digits of a number; the largest float64 has 309
_TOO_DEEP = f"lists and objects are nested deeper than {NESTING} levels"


class JsonError(Exception):
    """A text that is not JSON, or that exceeds the bounds."""


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text.

    Raises:
        UserError: ``decode_json`` refuses it; the message names ``where`` and the line.
    """
    try:
        return decode_json(text)
    except JsonError as error:
        raise UserError(f"{where} is not valid JSON ({error}).") from None


def decode_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        JsonError: It is not JSON, is nested deeper than ``NESTING``, or holds a number that is not
            finite or has more than ``DIGITS`` digits.
    """
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text.rstrip("\n") else ""
        raise JsonError(f"{error.msg} in {line}column {error.colno}") from None
    except RecursionError:
        raise JsonError(_TOO_DEEP) from None
    if text.count("[") + text.count("{") > NESTING and _depth_exceeds(value, NESTING):
        raise JsonError(_TOO_DEEP)
    return value


def _integer(digits: str) -> int:
    if len(digits) > DIGITS:
        raise JsonError(f"a number has {len(digits):,} digits, at most {DIGITS} are read")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise JsonError(f"the number {digits[:20]} is out of range")
    return value


def _constant(name: str) -> float:
    raise JsonError(f"{name} is no number in JSON")


_DECODER = json.JSONDecoder(parse_int=_integer, parse_float=_float, parse_constant=_constant)


def _depth_exceeds(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner += item.values()
            elif isinstance(item, list):
                inner += item
        level = inner
    return any(isinstance(item, (dict, list)) for item in level)
