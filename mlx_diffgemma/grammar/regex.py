"""Regular expressions as Python's ``re.fullmatch`` understands them.

The expression is parsed by the standard library's own parser, and what a character class holds is asked of ``re`` itself, so
that the language is the one a user can check with ``re.fullmatch``.  What no automaton can do (references to groups, looking
ahead and behind, anchors within the text) is refused by name.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

try:
    from re import _parser as parser  # type: ignore[attr-defined]
except ImportError:  # Python 3.10
    import sre_parse as parser

from mlx_diffgemma.errors import UserError
from mlx_diffgemma.grammar.language import ANY, EMPTY, SURROGATES, Chars, Choice, Concat, Language, Repeat, chars

REFUSED = {
    "GROUPREF": "references to groups", "GROUPREF_EXISTS": "conditional groups", "ASSERT": "looking ahead or behind",
    "ASSERT_NOT": "looking ahead or behind", "ATOMIC_GROUP": "atomic groups", "POSSESSIVE_REPEAT": "possessive repeats",
}
NAMES = {"AT_BOUNDARY": r"\b", "AT_NON_BOUNDARY": r"\B", "AT_BEGINNING": "^", "AT_BEGINNING_STRING": r"\A", "AT_END": "$",
         "AT_END_STRING": r"\Z"}
CATEGORIES = {"CATEGORY_DIGIT": r"\d", "CATEGORY_NOT_DIGIT": r"\D", "CATEGORY_SPACE": r"\s", "CATEGORY_NOT_SPACE": r"\S",
              "CATEGORY_WORD": r"\w", "CATEGORY_NOT_WORD": r"\W"}
KEPT = re.IGNORECASE | re.ASCII | re.DOTALL  # the flags that decide what one character may be


def parse(pattern: str) -> Language:
    """The texts that ``re.fullmatch(pattern, text)`` accepts.  Errors: UserError for what is no expression or not supported."""
    if not isinstance(pattern, str):
        raise UserError(f"A regular expression is a text, got {type(pattern).__name__}.")
    try:
        parsed = parser.parse(pattern)
        return _sequence(list(parsed), parsed.state.flags, True, True, pattern)
    except (re.error, OverflowError) as error:
        raise UserError(f"{_shown(pattern)} is no regular expression: {error}.") from None
    except RecursionError:
        raise UserError(f"{_shown(pattern)} is nested too deeply; write it with fewer groups.") from None


def _shown(pattern: str) -> str:
    return f"The pattern {pattern if len(pattern) <= 60 else pattern[:57] + '...'!r}"


def _sequence(items: list[Any], flags: int, begins: bool, ends: bool, pattern: str) -> Language:
    """``begins`` and ``ends``: whether the text begins with the first and ends with the last of the items."""
    parts: list[Language] = []
    for place, (op, value) in enumerate(items):
        first = begins and all(str(before) == "AT" for before, _ in items[:place])
        last = ends and all(str(after) == "AT" for after, _ in items[place + 1 :])
        parts.append(_item(str(op), value, flags, first, last, pattern))
    return parts[0] if len(parts) == 1 else Concat(tuple(parts))


def _item(op: str, value: Any, flags: int, begins: bool, ends: bool, pattern: str) -> Language:
    if op == "LITERAL" and not flags & re.IGNORECASE:
        if SURROGATES[0] <= value <= SURROGATES[1]:
            raise UserError(f"{_shown(pattern)} holds half of a surrogate pair, which no text has.")
        return Chars(((value, value),))
    if op in ("LITERAL", "NOT_LITERAL", "IN"):
        negated = "^" if op == "NOT_LITERAL" else ""
        members = value if op == "IN" else [("LITERAL", value)]
        return _members(f"[{negated}{''.join(_member(str(kind), member) for kind, member in members)}]", flags & KEPT)
    if op == "ANY":
        return _members(".", flags & KEPT)
    if op == "BRANCH":
        return Choice(tuple(_sequence(list(branch), flags, begins, ends, pattern) for branch in value[1]))
    if op == "SUBPATTERN":
        _, added, removed, inner = value
        if added & (re.ASCII | re.UNICODE):  # of these two one holds
            flags &= ~(re.ASCII | re.UNICODE)
        return _sequence(list(inner), (flags | added) & ~removed, begins, ends, pattern)
    if op in ("MAX_REPEAT", "MIN_REPEAT"):
        low, high, inner = value
        # Of what is repeated only what runs once can stand at the text's ends.
        once = high == 1
        part = _sequence(list(inner), flags, begins and once, ends and once, pattern)
        return Repeat(part, low, None if high == parser.MAXREPEAT else high)
    if op == "AT":
        name = str(value)
        if (begins and name in ("AT_BEGINNING", "AT_BEGINNING_STRING")) or (ends and name in ("AT_END", "AT_END_STRING")):
            return EMPTY
        raise UserError(f"{_shown(pattern)} has {NAMES.get(name, name)} within the text, which a constraint cannot have; it always "
                        "holds for the whole text.")
    raise UserError(f"{_shown(pattern)} uses {REFUSED.get(op, op)}, which a constraint cannot have.")


def _member(kind: str, value: Any) -> str:
    if kind == "NEGATE":
        return "^"
    if kind == "CATEGORY":
        return CATEGORIES[str(value)]
    low, high = value if kind == "RANGE" else (value, value)
    return f"\\U{low:08x}-\\U{high:08x}"


@lru_cache(maxsize=512)
def _members(pattern: str, flags: int) -> Chars:
    """The characters that ``pattern``, a class of them, matches, asked of ``re`` about every one there is."""
    ranges = []
    for match in re.compile(f"(?:{pattern})+", flags).finditer(_every_character()):
        first, last = match.start(), match.end() - 1
        if first < SURROGATES[0]:
            ranges.append((first, min(last, SURROGATES[0] - 1)))
        if last >= SURROGATES[0]:
            gap = SURROGATES[1] + 1 - SURROGATES[0]
            ranges.append((max(first, SURROGATES[0]) + gap, last + gap))
    return chars(ranges)


@lru_cache(maxsize=1)
def _every_character() -> str:
    return "".join(chr(code) for low, high in ANY.ranges for code in range(low, high + 1))

