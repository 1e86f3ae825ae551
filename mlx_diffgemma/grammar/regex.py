"""Parses regular expressions of ECMA-262.

These are the expressions of JavaScript with the flag ``u``, and of JSON Schema.
Constructs that no automaton can express (references to groups, looking ahead and behind, boundaries
of words, anchors within the text) are refused by name and position.  Besides the syntax of the flag
``u``, older syntax is read where its meaning is the same: escapes of punctuation that need none,
and brackets and braces that mean themselves.

    >>> parse("[0-9]+ apples?")
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import NoReturn, TypeAlias

from mlx_diffgemma.errors import UserError
from mlx_diffgemma.grammar import budget
from mlx_diffgemma.grammar.characters import (
    DIGIT,
    DOT,
    SPACE,
    WORD,
    complement,
    either_case,
    of_property,
)
from mlx_diffgemma.grammar.language import (
    ANY,
    EMPTY,
    SURROGATES,
    Chars,
    Choice,
    Language,
    Repeat,
    chars,
    choice,
    concat,
)

CLASSES = {"d": DIGIT, "w": WORD, "s": SPACE}
CONTROLS = {"t": 0x09, "n": 0x0A, "v": 0x0B, "f": 0x0C, "r": 0x0D}
HINTS = {
    "A": "; write ^",
    "Z": "; write $",
    "z": "; write $",
    "U": "; write \\u{…}",
    "Q": "",
    "a": "; write \\x07",
}
LARGEST = 10**9  # the largest count of a repeat; the limit on states applies long before
REPEATS = re.compile(r"\{([0-9]+)(,([0-9]*))?\}")
OPEN_REPEAT = re.compile(r"\{,[0-9]+\}")
GROUP_NAME = re.compile(r"<([^\W\d][\w$]*|\$[\w$]*)>")
MODIFIERS = re.compile(r"([ims]*)(?:-([ims]*))?:")
NOTHING = Choice(())
ANYTHING = Repeat(ANY, 0, None)
SOMETHING = Repeat(ANY, 1, None)
# The characters after "(?" in groups that are not supported.
GROUPS = (
    ("<=", "looking behind, (?<=…)"),
    ("<!", "looking behind, (?<!…)"),
    ("=", "looking ahead, (?=…)"),
    ("!", "looking ahead, (?!…)"),
    (">", "an atomic group, (?>…)"),
    ("(", "a conditional group, (?(…)…)"),
)


@dataclass(frozen=True)
class _Anchor:
    """The start of a text, or its end."""

    begin: bool
    at: int


@dataclass(frozen=True, eq=False)
class _Joined:
    parts: tuple[_Node, ...]


@dataclass(frozen=True, eq=False)
class _Either:
    parts: tuple[_Node, ...]


# _Joined and _Either contain an anchor.
_Node: TypeAlias = "Language | _Anchor | _Joined | _Either"


@dataclass(frozen=True)
class _Flags:
    ignore_case: bool = False
    lines: bool = False
    dot_all: bool = False


def parse(pattern: str, search: bool = False) -> Language:
    """The texts that ``pattern`` matches as a whole; with ``search``, the texts that contain a
    match.

    Raises:
        UserError: It is not an expression, or not supported.
    """
    if not isinstance(pattern, str):
        raise UserError(f"A regular expression is a text, got {type(pattern).__name__}.")
    try:
        node = _Parser(pattern).parsed()
        _check_anchors(node, True, True, pattern)
        if not search:
            return _language(node, True, True)
        if not isinstance(node, _Anchor | _Joined | _Either):
            return concat([ANYTHING, node, ANYTHING])
        return _options(
            [
                _language(node, True, True),
                _sequence([SOMETHING, _language(node, False, True)]),
                _sequence([_language(node, True, False), SOMETHING]),
                _sequence([SOMETHING, _language(node, False, False), SOMETHING]),
            ]
        )
    except RecursionError:
        raise UserError(
            f"{_shown(pattern)} is nested too deeply; write it with fewer groups."
        ) from None


def _shown(pattern: str) -> str:
    return f"The pattern {pattern if len(pattern) <= 60 else pattern[:57] + '...'!r}"


def _language(node: _Node, begins: bool, ends: bool) -> Language:
    """The texts that ``node`` matches.

    Args:
        node: A part of the expression.
        begins: Whether the text begins here.
        ends: Whether the text ends here.
    """
    if isinstance(node, _Anchor):
        return EMPTY if (begins if node.begin else ends) else NOTHING
    if isinstance(node, _Joined):
        return _sequence([_language(part, begins, ends) for part in node.parts])
    if isinstance(node, _Either):
        return _options([_language(part, begins, ends) for part in node.parts])
    return node


def _is_nothing(language: Language) -> bool:
    return isinstance(language, Choice) and not language.parts


def _sequence(parts: list[Language]) -> Language:
    return NOTHING if any(map(_is_nothing, parts)) else concat(parts)


def _options(parts: list[Language]) -> Language:
    return choice([part for part in parts if not _is_nothing(part)])


def _check_anchors(node: _Node, begins: bool, ends: bool, pattern: str) -> None:
    """Check that anchors are at the start or the end of the text.  Raises: UserError if not."""
    if isinstance(node, _Anchor) and not (begins if node.begin else ends):
        raise UserError(
            f"{_shown(pattern)} has {'^' if node.begin else '$'} within the text, at position "
            f"{node.at}, which a constraint cannot have; it belongs to the begin or the end of a "
            "text."
        )
    if isinstance(node, _Either):
        for part in node.parts:
            _check_anchors(part, begins, ends, pattern)
    if isinstance(node, _Joined):
        filled = [index for index, part in enumerate(node.parts) if not isinstance(part, _Anchor)]
        first = filled[0] if filled else len(node.parts)
        last = filled[-1] if filled else -1
        for index, part in enumerate(node.parts):
            _check_anchors(part, begins and index <= first, ends and index >= last, pattern)


class _Parser:
    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.at = 0
        self.names: set[str] = set()

    def parsed(self) -> _Node:
        node = self._alternatives(_Flags())
        if self.at < len(self.pattern):
            self._wrong("a ) that closes no group")
        return node

    def _wrong(self, what: str, at: int | None = None) -> NoReturn:
        where = self.at if at is None else at
        raise UserError(
            f"{_shown(self.pattern)} is no regular expression of ECMA-262: {what} "
            f"at position {where}."
        )

    def _refuse(self, what: str, at: int) -> NoReturn:
        raise UserError(
            f"{_shown(self.pattern)} uses {what} at position {at}, which a constraint cannot have."
        )

    def _next(self) -> str:
        """The next character, or an empty text at the end."""
        return self.pattern[self.at : self.at + 1]

    def _taken(self, text: str) -> bool:
        if not self.pattern.startswith(text, self.at):
            return False
        self.at += len(text)
        return True

    def _alternatives(self, flags: _Flags) -> _Node:
        parts = [self._terms(flags)]
        while self._taken("|"):
            parts.append(self._terms(flags))
        if len(parts) == 1:
            return parts[0]
        plain = [part for part in parts if not isinstance(part, _Anchor | _Joined | _Either)]
        return choice(plain) if len(plain) == len(parts) else _Either(tuple(parts))

    def _terms(self, flags: _Flags) -> _Node:
        parts: list[_Node] = []
        while self._next() not in ("", "|", ")"):
            budget.check()
            parts.append(self._term(flags))
        plain = [part for part in parts if not isinstance(part, _Anchor | _Joined | _Either)]
        if len(plain) == len(parts):
            return concat(plain)
        return parts[0] if len(parts) == 1 else _Joined(tuple(parts))

    def _term(self, flags: _Flags) -> _Node:
        at = self.at
        if self._next() in ("^", "$"):
            if flags.lines:
                self._refuse(f"{self._next()} for lines, with the flag m,", at)
            self.at += 1
            return _Anchor(self.pattern[at] == "^", at)
        atom = self._atom(flags)
        counts = self._counts()
        if counts is None:
            return atom
        if not isinstance(atom, _Anchor | _Joined | _Either):
            return Repeat(atom, *counts)
        if counts == (1, 1):
            return atom
        if counts == (0, 1):
            return _Either((atom, EMPTY))
        return self._refuse("a repeat of ^ or $", at)

    def _counts(self) -> tuple[int, int | None] | None:
        """The bounds of the repeat that follows, or None."""
        at = self.at
        simple: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}
        if self._next() in simple:
            counts = simple[self._next()]
            self.at += 1
        elif match := REPEATS.match(self.pattern, at):
            self.at = match.end()
            low = self._count(match[1], at)
            high: int | None = low
            if match[2] is not None:  # a comma
                high = self._count(match[3], at) if match[3] else None
            counts = (low, high)
            if high is not None and high < low:
                self._wrong("a repeat whose bounds are out of order", at)
        else:
            return None
        self._taken("?")  # a lazy repeat matches the same texts
        return counts

    def _count(self, digits: str, at: int) -> int:
        if len(digits) > 12 or int(digits) > LARGEST:
            self._refuse(f"a repeat of more than {LARGEST:,}", at)
        return int(digits)

    def _atom(self, flags: _Flags) -> _Node:
        at = self.at
        character = self._next()
        if character in ("*", "+", "?") or REPEATS.match(self.pattern, at):
            self._wrong("nothing to repeat")
        if OPEN_REPEAT.match(self.pattern, at):
            self._wrong("a repeat without its lower bound (write {0,…})")
        self.at += 1
        if character == "(":
            return self._group(flags, at)
        if character == "[":
            return self._set(flags, at)
        if character == ".":
            return ANY if flags.dot_all else DOT
        code = self._escape(at, False) if character == "\\" else ord(character)
        return self._characters(code, flags, at)

    def _characters(self, code: int | Chars, flags: _Flags, at: int) -> Chars:
        """The set of characters of a single character's code, or of a class."""
        if isinstance(code, int):
            self._check_half(code, at)
            code = Chars(((code, code),))
        return either_case(code) if flags.ignore_case else code

    def _check_half(self, code: int, at: int) -> None:
        if SURROGATES[0] <= code <= SURROGATES[1]:
            self._refuse("half of a surrogate pair, which no text has,", at)

    def _group(self, flags: _Flags, at: int) -> _Node:
        if self._taken("?"):
            flags = self._group_kind(flags, at)
        node = self._alternatives(flags)
        if not self._taken(")"):
            self._wrong("a group that is not closed", at)
        return node

    def _group_kind(self, flags: _Flags, at: int) -> _Flags:
        """The flags within a group, whose ``(?`` has been read."""
        if self._taken(":"):
            return flags
        for begin, what in GROUPS:
            if self.pattern.startswith(begin, self.at):
                self._refuse(what, at)
        if match := GROUP_NAME.match(self.pattern, self.at):
            if match[1] in self.names:
                self._wrong(f"a second group with the name {match[1]!r}", at)
            self.names.add(match[1])
            self.at = match.end()
            return flags
        if match := MODIFIERS.match(self.pattern, self.at):
            added = match[1]
            removed = match[2] or ""
            if len(set(added + removed)) < len(added + removed) or not (added or removed):
                self._wrong("flags of a group that are given twice, or none", at)
            self.at = match.end()
            names = {"i": "ignore_case", "m": "lines", "s": "dot_all"}
            return replace(flags, **{names[flag]: flag in added for flag in added + removed})
        hint = "; write (?<name>…)" if self._next() == "P" else ""
        if re.match(r"[aiLmsux]+\)", self.pattern[self.at : self.at + 9]):
            hint = "; flags are given to a group, as in (?i:…)"
        return self._wrong(f"a group of an unknown kind{hint}", at)

    def _set(self, flags: _Flags, at: int) -> Chars:
        negated = self._taken("^")
        ranges: list[tuple[int, int]] = []
        while not self._taken("]"):
            if not self._next():
                self._wrong("a set of characters that is not closed", at)
            budget.check()
            begin = self.at
            first = self._member()
            if self._next() == "-" and self.pattern[self.at + 1 : self.at + 2] not in ("", "]"):
                dash = self.at
                self.at += 1
                last = self._member()
                if isinstance(first, int) and isinstance(last, int):
                    if last < first:
                        self._wrong("a range whose ends are out of order", begin)
                    ranges.append((first, last))
                    continue
                self.at = dash  # next to a class, the dash means itself
            ranges += first.ranges if isinstance(first, Chars) else [(first, first)]
        members = chars(ranges)
        if flags.ignore_case:
            members = either_case(members)
        return complement(members) if negated else _without_halves(members)

    def _member(self) -> int | Chars:
        at = self.at
        character = self._next()
        self.at += 1
        code = self._escape(at, True) if character == "\\" else ord(character)
        if isinstance(code, int):
            self._check_half(code, at)
        return code

    def _escape(self, at: int, in_set: bool) -> int | Chars:
        """The character or class of an escape, whose backslash has been read."""
        character = self._next()
        self.at += 1
        if character.lower() in CLASSES:
            members = CLASSES[character.lower()]
            return members if character.islower() else complement(members)
        if character in ("p", "P"):
            return self._property(at, character == "P")
        if character in CONTROLS:
            return CONTROLS[character]
        if character == "b" and in_set:
            return 0x08
        if character == "-" or not (character.isalnum() or character == ""):
            return ord(character)
        if character == "0" and not self._next().isdigit():
            return 0
        if character == "x":
            return self._hexadecimal(2, at)
        if character == "u":
            return self._code(at)
        if character == "c" and re.match("[A-Za-z]", self._next()):
            self.at += 1
            return ord(self.pattern[self.at - 1]) % 32
        return self._no_escape(character, at, in_set)

    def _no_escape(self, character: str, at: int, in_set: bool) -> NoReturn:
        if character in ("b", "B") and not in_set:
            self._refuse(f"\\{character}, the boundary of a word,", at)
        if (character == "k" or character.isdigit()) and character != "0" and not in_set:
            self._refuse("a reference to a group", at)
        self._wrong(f"the escape \\{character}{HINTS.get(character, '')}", at)

    def _property(self, at: int, negated: bool) -> Chars:
        match = re.compile(r"\{([^{}]*)\}").match(self.pattern, self.at)
        members = of_property(match[1]) if match else None
        if match is None or members is None:
            self._wrong(
                f"a property {match[1] if match else ''!r:.60} that Unicode does not have", at
            )
        self.at = match.end()
        return complement(members) if negated else members

    def _code(self, at: int) -> int:
        r"""The code in \uXXXX, \u{X…}, or \uXXXX\uXXXX for a pair of surrogates."""
        if match := re.compile(r"\{([0-9A-Fa-f]+)\}").match(self.pattern, self.at):
            self.at = match.end()
            digits = match[1].lstrip("0")
            if len(digits) > 6 or int(digits or "0", 16) > 0x10FFFF:
                self._wrong("a character beyond \\u{10FFFF}", at)
            return int(digits or "0", 16)
        code = self._hexadecimal(4, at)
        low = re.compile(r"\\u([Dd][C-Fc-f][0-9A-Fa-f]{2})").match(self.pattern, self.at)
        if 0xD800 <= code <= 0xDBFF and low:
            self.at = low.end()
            return 0x10000 + (code - 0xD800) * 0x400 + int(low[1], 16) - 0xDC00
        return code

    def _hexadecimal(self, count: int, at: int) -> int:
        digits = self.pattern[self.at : self.at + count]
        if not re.fullmatch(f"[0-9A-Fa-f]{{{count}}}", digits):
            self._wrong(f"an escape without its {count} hexadecimal digits", at)
        self.at += count
        return int(digits, 16)


def _without_halves(characters: Chars) -> Chars:
    """``characters`` without surrogates, which no text can hold."""
    return complement(complement(characters))
