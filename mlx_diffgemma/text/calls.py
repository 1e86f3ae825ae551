"""Parses tool calls as Gemma writes them, and as some templates do.

Gemma writes ``call:add{a:12,b:<|"|>x<|"|>}``, and some templates ``call:add{"a": 12, "b": "x"}``.
Two ``<|"|>`` tokens enclose a text without escapes.  The call arrives split at these tokens: every
second part is a text, and a text that only looks like the token cannot end it.

    >>> read_calls(["call:add{a:12,b:", "x", "}"])
    [{'name': 'add', 'arguments': {'a': 12, 'b': 'x'}}]
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

CHANNEL_START = "<|channel>"
CHANNEL_END = "<channel|>"
TOOL_START = "<|tool_call>"
TOOL_END = "<tool_call|>"
MARKERS = (CHANNEL_START, CHANNEL_END, TOOL_START, TOOL_END)
THOUGHT = "thought"  # the name of the channel of thoughts
QUOTE = '<|"|>'  # before and after a text in a call
DEEPEST = 64  # the deepest nesting of lists and maps
NAME = re.compile(r"\s*call:\s*([\w.-]+)\s*")
BARE = re.compile(r"[^:,{}\[\]\"\s](?:[^:,{}\[\]\"\n]*[^:,{}\[\]\"\s])?")  # a key without quotes
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?")
WORDS = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}
BLANK = re.compile(r"\s*")


def read_calls(parts: Sequence[str]) -> list[dict[str, Any]]:
    """Parse calls that follow one another.

    Args:
        parts: The pieces of the calls, split at the ``<|"|>`` tokens.

    Returns:
        {name, arguments} of each call.

    Raises:
        ValueError: The parts are not calls.
    """
    reader = _Reader(parts)
    calls = []
    while not reader.ended():
        calls.append({"name": reader.match(NAME)[1], "arguments": reader.map(0)})
    if not calls:
        raise ValueError("there is no call")
    return calls


class _Reader:
    """Reads the parts of a call; even parts hold syntax, odd parts are texts."""

    def __init__(self, parts: Sequence[str]) -> None:
        if len(parts) % 2 == 0:
            raise ValueError("a text has no end")
        self.parts = parts
        self.part = 0
        self.place = 0
        self._decoder = json.JSONDecoder()

    def ended(self) -> bool:
        self._blank()
        return self.part == len(self.parts) - 1 and self.place == len(self.parts[self.part])

    def match(self, pattern: re.Pattern[str]) -> re.Match[str]:
        found = pattern.match(self.parts[self.part], self.place)
        if not found:
            raise ValueError(f"unexpected text at {self.parts[self.part][self.place :][:20]!r}")
        self.place = found.end()
        return found

    def map(self, depth: int) -> dict[str, Any]:
        made: dict[str, Any] = {}
        self._take("{")
        if self._takes("}"):
            return made
        while True:
            name = self._key()
            self._take(":")
            made[name] = self._value(depth + 1)
            if self._takes("}"):
                return made
            self._take(",")

    def _list(self, depth: int) -> list[Any]:
        made: list[Any] = []
        self._take("[")
        if self._takes("]"):
            return made
        while True:
            made.append(self._value(depth + 1))
            if self._takes("]"):
                return made
            self._take(",")

    def _key(self) -> str:
        self._blank()
        if self._at_text():
            return self._text()
        if self._next() == '"':
            return str(self._json_text())
        return self.match(BARE)[0]

    def _value(self, depth: int) -> Any:
        if depth > DEEPEST:
            raise ValueError("the arguments are nested too deeply")
        self._blank()
        if self._at_text():
            return self._text()
        following = self._next()
        if following == "{":
            return self.map(depth)
        if following == "[":
            return self._list(depth)
        if following == '"':
            return self._json_text()
        for word, value in WORDS.items():
            if self.parts[self.part].startswith(word, self.place):
                self.place += len(word)
                return value
        number = self.match(NUMBER)[0]
        return json.loads(number)

    def _json_text(self) -> Any:
        value, self.place = self._decoder.raw_decode(self.parts[self.part], self.place)
        if re.search("[\ud800-\udfff]", value):
            raise ValueError("a text holds half a character")
        return value

    def _at_text(self) -> bool:
        """Whether a text between two ``<|"|>`` comes next."""
        return self.place == len(self.parts[self.part]) and self.part + 1 < len(self.parts)

    def _text(self) -> str:
        self.part += 2
        self.place = 0
        return self.parts[self.part - 1]

    def _next(self) -> str:
        return self.parts[self.part][self.place : self.place + 1]

    def _blank(self) -> None:
        self.match(BLANK)

    def _takes(self, character: str) -> bool:
        self._blank()
        if self._next() != character:
            return False
        self.place += 1
        return True

    def _take(self, character: str) -> None:
        if not self._takes(character):
            raise ValueError(
                f"{character!r} is missing at {self.parts[self.part][self.place :][:20]!r}"
            )
