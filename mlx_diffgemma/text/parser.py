"""Parses the ids of an answer into thought, answer and tool calls, piece by piece.

>>> parser = ResponseParser(tokenizer)
>>> parser.feed(answer_ids).answer
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_diffgemma.text.calls import (
    CHANNEL_START,
    MARKERS,
    QUOTE,
    THOUGHT,
    TOOL_END,
    TOOL_START,
    read_calls,
)

REPLACEMENT = "\ufffd"  # the text that an incomplete character decodes to
BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # a token of one byte
LONGEST_RUN = 8  # the bytes before the end that show whether a character is incomplete


class TextStream:
    """Decodes ids piece by piece, without ever splitting a character."""

    def __init__(self, tokenizer: TokenizerWrapper, keep_markers: bool = False):
        self._decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=not keep_markers)
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context = 0  # ids before this are left out of decoding
        self._done = 0  # ids before this are in the text that was returned

    def feed(self, ids: Iterable[int]) -> str:
        """Decode more ids.  A last character that is incomplete is held back."""
        self._ids.extend(ids)
        return self._next(final=False)

    def finish(self) -> str:
        """Return the rest of the text."""
        return self._next(final=True)

    def _incomplete(self) -> bool:
        """Whether the last ids are the first bytes of a character, and not the character U+FFFD."""
        run = bytearray()
        by_bytes = "<0x00>" in self._tokenizer.get_vocab()
        for token in self._tokenizer.convert_ids_to_tokens(self._ids[-LONGEST_RUN:]):
            byte = BYTE.fullmatch(token or "")
            if byte:
                run.append(int(byte[1], 16))
            elif by_bytes:
                run = bytearray()
            else:  # a token may contain parts of characters
                return True
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(bytes(run))
        return bool(decoder.getstate()[0])

    def _next(self, final: bool) -> str:
        # Decoding starts a few ids earlier, because the text of a token may depend on the one
        # before it.
        before = self._decode(self._ids[self._context : self._done])
        text = self._decode(self._ids[self._context :])
        if text.endswith(REPLACEMENT) and not final and self._incomplete():
            return ""
        self._context = self._done
        self._done = len(self._ids)
        return text[len(before) :]


@dataclass(frozen=True)
class Delta:
    """The text that some ids added.

    Args:
        answer: Visible text.
        thought: Text of the thought.
        tool_calls: The tool calls that are complete, each {name, arguments}.
    """

    answer: str = ""
    thought: str = ""
    tool_calls: tuple[dict[str, Any], ...] = ()


class ResponseParser:
    """Parses the ids of an answer into thought, answer and tool calls.

    Markers are read as tokens before anything is decoded, so none can leak into a text and no text
    can forge one.  An empty thought block gives an empty thought.  A tool call that cannot be
    parsed is listed in ``malformed``.
    """

    def __init__(self, tokenizer: TokenizerWrapper):
        self._tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab()
        self._markers = {vocabulary[text]: text for text in MARKERS if text in vocabulary}
        self._quote = vocabulary.get(QUOTE)
        self._ends = set(tokenizer.eos_token_ids)
        self._state = "answer"
        self._stream = TextStream(tokenizer)
        self._header = ""
        self._tool = [""]  # the pieces of a call between its quotes
        self._out: dict[str, str] = {}
        self._calls: list[dict[str, Any]] = []
        self.malformed: list[str] = []

    def feed(self, ids: Iterable[int]) -> Delta:
        """Read more ids; end tokens add nothing."""
        self._begin()
        for token in ids:
            if token in self._markers:
                self._flush()
                self._switch(self._markers[token])
            elif token == self._quote and self._state == "tool":
                self._flush()
                self._stream = TextStream(self._tokenizer, keep_markers=True)
                self._tool.append("")
            elif token not in self._ends:
                self._take(self._stream.feed([token]))
        return Delta(self._out["answer"], self._out["thought"], tuple(self._calls))

    def shows(self, token: int) -> bool:
        """Read one more id, and return whether it is part of the visible answer."""
        self.feed([token])
        return self._state == "answer" and token not in self._markers and token not in self._ends

    def finish(self) -> Delta:
        """Return the text that was held back.  An unfinished call becomes malformed."""
        self._begin()
        self._flush()
        if self._state == "tool" and any(self._tool):
            self.malformed.append(QUOTE.join(self._tool))
        return Delta(self._out["answer"], self._out["thought"])

    def _begin(self) -> None:
        self._out = {"answer": "", "thought": ""}
        self._calls = []

    def _flush(self) -> None:
        self._take(self._stream.finish())

    def _switch(self, marker: str) -> None:
        if marker == TOOL_END and self._state == "tool":
            self._finish_tool()
        self._state = {CHANNEL_START: "header", TOOL_START: "tool"}.get(marker, "answer")
        self._stream = TextStream(self._tokenizer, keep_markers=self._state == "tool")
        self._header = ""
        self._tool = [""]

    def _take(self, text: str) -> None:
        if self._state == "tool":
            self._tool[-1] += text
        elif self._state == "header":
            self._header += text
            name, newline, rest = self._header.partition("\n")
            if newline:  # the text of any other channel is shown, so that nothing is lost
                self._state = "thought" if name.strip() == THOUGHT else "answer"
                self._out[self._state] += rest
        else:
            self._out[self._state] += text

    def _finish_tool(self) -> None:
        try:
            self._calls.extend(read_calls(self._tool))
        except ValueError:
            self.malformed.append(QUOTE.join(self._tool))
