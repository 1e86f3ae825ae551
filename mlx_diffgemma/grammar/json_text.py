"""The languages of JSON texts: strings, arrays, objects and single values.

Whitespace is at most one blank after each comma and colon.

    >>> json_value({"a": [1, 2]})      # the texts {"a":[1,2]}, {"a": [1, 2]} and so on
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from mlx_diffgemma.errors import UserError
from mlx_diffgemma.grammar import budget
from mlx_diffgemma.grammar.decimals import number
from mlx_diffgemma.grammar.language import (
    ANY,
    Chars,
    Choice,
    Concat,
    Language,
    Repeat,
    chars,
    choice,
    concat,
    optional,
    text,
    without,
)

SHORT = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
ESCAPED = chars([(0, 0x1F), (ord('"'), ord('"')), (ord("\\"), ord("\\"))])
BLANK = optional(text(" "))
COMMA = concat([text(","), BLANK])
COLON = concat([text(":"), BLANK])
QUOTE = text('"')


def json_value(value: Any) -> Language:
    """The language with exactly this value, compact or with a blank after each comma and colon.

    Raises:
        UserError: It holds a number that JSON cannot write.
    """
    budget.check()
    if isinstance(value, dict):
        begin, end = "{", "}"
        items = [concat([json_value(key), COLON, json_value(val)]) for key, val in value.items()]
    elif isinstance(value, list):
        begin, end = "[", "]"
        items = [json_value(item) for item in value]
    else:
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"The JSON schema lists {value}, which JSON cannot write.")
        return text(json.dumps(value, ensure_ascii=False))
    parts: list[Language] = []
    for item in items:
        parts += [COMMA, item]
    return concat([text(begin), *parts[1:], text(end)])


def quoted(language: Language) -> Language:
    """The texts of ``language`` as JSON writes them between quotes."""
    budget.check()
    if isinstance(language, Chars):
        return _escaped(language)
    if isinstance(language, Repeat):
        return Repeat(quoted(language.part), language.low, language.high)
    parts = tuple(quoted(part) for part in language.parts)
    return Concat(parts) if isinstance(language, Concat) else Choice(parts)


def _escaped(characters: Chars) -> Language:
    plain = without(characters, ESCAPED)
    parts: list[Language] = [plain] if plain.ranges else []
    for first, last in characters.ranges:
        for low, high in ESCAPED.ranges:
            for code in range(max(first, low), min(last, high) + 1):
                parts.append(text(SHORT.get(chr(code), f"\\u{code:04x}")))
    return choice(parts)


def json_string(low: int = 0, high: int | None = None) -> Language:
    """The language of JSON strings of ``low`` to ``high`` characters."""
    return concat([QUOTE, Repeat(quoted(ANY), low, high), QUOTE])


def json_array(first: Sequence[Language], rest: Language, low: int, high: int | None) -> Language:
    """The language of arrays that begin with the values ``first``, followed by any number of
    ``rest``.

    Args:
        first: The languages of the first values, by position.
        rest: The language of all further values.
        low: The fewest values.
        high: The most values, or None.
    """
    if high is not None and high < low:
        return Choice(())
    head = first[: high if high is not None else None]
    more_low = max(0, low - len(head))
    more_high = None if high is None else high - len(head)
    tail: Language = Repeat(concat([COMMA, rest]), more_low, more_high)
    if not head:
        if more_high == 0:
            return text("[]")
        further = Repeat(concat([COMMA, rest]), max(0, low - 1), None if high is None else high - 1)
        filled = concat([rest, further])
        return concat([text("["), filled if low else optional(filled), text("]")])
    for index in reversed(range(len(head))):
        item = concat([COMMA, head[index], tail]) if index else concat([head[index], tail])
        tail = item if index < low else optional(item)
    return concat([text("["), tail, text("]")])


def json_mapping(value: Language) -> Language:
    """The language of objects with any names and with values in ``value``."""
    member = concat([QUOTE, Repeat(quoted(ANY), 0, None), QUOTE, COLON, value])
    members = concat([member, Repeat(concat([COMMA, member]), 0, None)])
    return concat([text("{"), optional(members), text("}")])


def object_members(members: Sequence[tuple[Language, bool]], comma: Language) -> Language:
    """The members of an object and its closing brace.

    Args:
        members: Each member, and whether it is required.
        comma: The language between two members.
    """
    after: Language = text("}")  # what follows a member
    begin: Language = after  # what follows the opening brace
    for member, is_required in reversed(members):
        chosen_after = concat([comma, member, after])
        chosen_begin = concat([member, after])
        begin = chosen_begin if is_required else Choice((chosen_begin, begin))
        after = chosen_after if is_required else Choice((chosen_after, after))
    return begin


def any_value(depth: int) -> Language:
    """The language of any JSON value, nested at most ``depth`` deep."""
    values = [
        text("null"),
        text("true"),
        text("false"),
        number({}, False, ""),
        json_string(),
    ]
    if depth:
        values += [
            json_array([], any_value(depth - 1), 0, None),
            json_mapping(any_value(depth - 1)),
        ]
    return choice(values)
