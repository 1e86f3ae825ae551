"""Languages: sequences, choices and repeats of characters, without any syntax, bytes or tokens.

>>> concat([text("a"), Repeat(ANY, 0, None)])      # all texts that begin with a
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

LAST = 0x10FFFF
TOKEN = LAST + 1  # stands for the token <|"|> and is equal to no character
SURROGATES = (0xD800, 0xDFFF)  # halves of pairs, which no text in UTF-8 has


@dataclass(frozen=True)
class Chars:
    """One character from ``ranges`` of code points (first, last), which ascend and do not touch."""

    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class Concat:
    """All ``parts``, one after the other."""

    parts: tuple[Language, ...]


@dataclass(frozen=True, eq=False)
class Choice:
    """One of ``parts``; without parts it admits no text at all."""

    parts: tuple[Language, ...]


@dataclass(frozen=True, eq=False)
class Repeat:
    """Between ``low`` and ``high`` repetitions of ``part``; None means no upper limit."""

    part: Language
    low: int
    high: int | None


Language: TypeAlias = "Chars | Concat | Choice | Repeat"
EMPTY = Concat(())


def chars(ranges: Iterable[tuple[int, int]]) -> Chars:
    """The characters of ``ranges``, which may overlap and have any order."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = merged[-1][0], max(merged[-1][1], last)
        else:
            merged.append((first, last))
    return Chars(tuple(merged))


def without(these: Chars, gone: Chars) -> Chars:
    """The characters of ``these`` that are not in ``gone``."""
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
    """The language with exactly the text ``content``."""
    return concat([Chars(((ord(c), ord(c)),)) for c in content])


def concat(parts: Sequence[Language]) -> Language:
    return parts[0] if len(parts) == 1 else Concat(tuple(parts))


def choice(parts: Sequence[Language]) -> Language:
    return parts[0] if len(parts) == 1 else Choice(tuple(parts))


def optional(part: Language) -> Language:
    return Repeat(part, 0, 1)
