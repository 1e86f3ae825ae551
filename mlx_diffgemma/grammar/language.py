"""What a text may be: sequences, choices and repeats of characters.  Knows no syntax, no bytes and no tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

LAST = 0x10FFFF
TOKEN = LAST + 1  # stands for the token <|"|>, which no character can be taken for
SURROGATES = (0xD800, 0xDFFF)  # halves of pairs, which no text in UTF-8 holds


@dataclass(frozen=True)
class Chars:
    """One character out of ``ranges`` of code points, (first, last), ascending and apart from each other."""

    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class Concat:
    """All ``parts``, one after the other."""

    parts: tuple[Language, ...]


@dataclass(frozen=True, eq=False)
class Choice:
    """One of ``parts``; of none: no text at all."""

    parts: tuple[Language, ...]


@dataclass(frozen=True, eq=False)
class Repeat:
    """``part`` at least ``low`` times and at most ``high``; None: without end."""

    part: Language
    low: int
    high: int | None


Language: TypeAlias = "Chars | Concat | Choice | Repeat"
EMPTY = Concat(())


def chars(ranges: Iterable[tuple[int, int]]) -> Chars:
    """The characters of ``ranges`` in any order, overlapping or not."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = merged[-1][0], max(merged[-1][1], last)
        else:
            merged.append((first, last))
    return Chars(tuple(merged))


def without(these: Chars, gone: Chars) -> Chars:
    """Those of ``these`` that are none of ``gone``."""
    left: list[tuple[int, int]] = []
    for first, last in these.ranges:
        for low, high in gone.ranges:
            if low > last or high < first:
                continue
            if low > first:
                left.append((first, low - 1))
            first = high + 1
        if first <= last:
            left.append((first, last))
    return Chars(tuple(left))


ANY = without(Chars(((0, LAST),)), Chars((SURROGATES,)))


def text(content: str) -> Language:
    """Exactly ``content``."""
    return concat([Chars(((ord(c), ord(c)),)) for c in content])


def concat(parts: Sequence[Language]) -> Language:
    return parts[0] if len(parts) == 1 else Concat(tuple(parts))


def choice(parts: Sequence[Language]) -> Language:
    return parts[0] if len(parts) == 1 else Choice(tuple(parts))


def optional(part: Language) -> Language:
    return Repeat(part, 0, 1)
