"""Texts without control tokens, and conversations in which only the template writes control tokens.

The text of a user or a tool may look like a marker: ``<|turn>``, ``<eos>``, ``<|tool_call>``.  Each
such place is marked with private characters before the template is rendered, as transformers does
with ``sanitize_control_tokens``, and read as plain text afterwards.  A conversation without such
places is rendered without marks.

    >>> encode_literally(tokenizer, "<|turn>")      # the ids of these seven characters
"""

from __future__ import annotations

import functools
import re
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import nodes
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import Tokenizer

from mlx_diffgemma.errors import UserError
from mlx_diffgemma.text import templates

PRIVATE = range(0xF0000, 0xFFFFE)  # characters to which no standard gives a meaning
ESCAPE = "\\U000f"  # how each of them begins in a list that Python prints
# The fields of messages and of their parts whose values are names of the protocol.
FIELDS = ("role", "type")


@dataclass(frozen=True)
class Marks:
    """Characters that no input holds.

    Args:
        begin: Comes before a control token.
        end: Comes after it.
        split: Comes where the end of a text could become part of a control token.
    """

    begin: str
    end: str
    split: str

    @property
    def all(self) -> str:
        return self.begin + self.end + self.split

    @classmethod
    def unused(cls, texts: Sequence[str]) -> Marks:
        """Choose three characters that are in none of ``texts``, nor in them as Python prints them
        in a list.
        """
        wide = "".join(text for text in texts if not text.isascii() or ESCAPE in text)
        free = (
            mark for mark in map(chr, PRIVATE) if mark not in wide and _escape(mark) not in wide
        )
        return cls(next(free), next(free), next(free))

    def restored(self, text: str) -> str:
        """``text`` with marks as characters again, where a template printed a list as Python does."""
        if ESCAPE in text:
            for mark in self.all:
                text = text.replace(_escape(mark), mark)
        return text


def _escape(character: str) -> str:
    return repr(character)[1:-1]


class Control:
    """The control tokens of a tokenizer.

    They are found in texts as the tokenizer finds them: from left to right, the longest first.  A
    vocabulary may have thousands of them, so they are looked up by length, not tried in turn.
    """

    def __init__(self, ids: Mapping[str, int]) -> None:
        self.ids = dict(ids)
        first = re.escape("".join(sorted({token[0] for token in ids})))
        self._first = re.compile(f"[{first}]" if ids else "(?!)")
        self._sizes = sorted({len(token) for token in ids}, reverse=True)
        self._begun = {token[:size] for token in ids for size in range(1, len(token))}

    def places(self, text: str) -> Iterator[tuple[int, int]]:
        """The start and end of each control token in ``text``."""
        place = 0
        while first := self._first.search(text, place):
            begin = first.start()
            fitting = (size for size in self._sizes if begin + size <= len(text))
            size = next((size for size in fitting if text[begin : begin + size] in self.ids), 0)
            if size:
                yield begin, begin + size
            place = begin + max(size, 1)

    def mark(self, text: str, marks: Marks) -> str:
        """``text`` with its control tokens marked, and its end where a control token may begin."""
        parts: list[str] = []
        done = 0
        for begin, end in self.places(text):
            parts += [text[done:begin], marks.begin, text[begin:end], marks.end]
            done = end
        rest = text[done:]
        stripped = rest.rstrip()
        if any(stripped[-size:] in self._begun for size in self._sizes_before(len(stripped))):
            rest = stripped + marks.split + rest[len(stripped) :]
        return "".join([*parts, rest])

    def _sizes_before(self, length: int) -> range:
        """The lengths of the beginnings of control tokens that may end a text."""
        return range(1, min(length, max(self._sizes, default=1) - 1) + 1)

    def pieces(self, marked: str, marks: Marks) -> list[str | int]:
        """Split a marked text into plain pieces and the ids of the control tokens that no mark
        touches.
        """
        places = [place for place, character in enumerate(marked) if character not in marks.all]
        text = "".join(marked[place] for place in places)
        pieces: list[str | int] = []
        done = 0
        for begin, end in self.places(text):
            first = places[begin]
            last = places[end - 1]
            has_marks_inside = last - first != end - 1 - begin
            has_mark_before = marked[first - 1 : first] == marks.begin
            has_mark_after = marked[last + 1 : last + 2] == marks.end
            if has_marks_inside or has_mark_before or has_mark_after:
                continue
            pieces += [text[done:begin], self.ids[text[begin:end]]]
            done = end
        return [piece for piece in (*pieces, text[done:]) if piece != ""]


_lock = threading.Lock()  # guards both
_controls: weakref.WeakKeyDictionary[TokenizerWrapper, tuple[str | None, Control]] = (
    weakref.WeakKeyDictionary()
)
_literal: weakref.WeakKeyDictionary[TokenizerWrapper, Tokenizer] = weakref.WeakKeyDictionary()


def control_of(tokenizer: TokenizerWrapper, template: str | None = None) -> Control:
    """The control tokens of a tokenizer, as in transformers.

    They are the special tokens, and the other added tokens that the chat template writes.
    """
    with _lock:
        cached = _controls.get(tokenizer)
        if cached is None or cached[0] != template:
            written = template_text(template) if template else ""
            ids = {}
            for id_, token in tokenizer.added_tokens_decoder.items():
                is_written = token.content in written and not token.content.isspace()
                if token.special or is_written:
                    ids[token.content] = id_
            cached = _controls[tokenizer] = (template, Control(ids))
        return cached[1]


@functools.lru_cache(maxsize=8)
def template_text(template: str) -> str:
    """The texts that a template writes itself."""
    tree = templates.syntax(template)
    texts = {node.data for node in tree.find_all(nodes.TemplateData)}
    texts |= {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    return "\0".join(sorted(texts))


def check_characters(text: str) -> str:
    """Check that a text has no half of a surrogate pair, which no tokenizer reads, and return it.

    Raises:
        UserError: It has one.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"The text is not valid Unicode: {text[error.start]!r} at position {error.start:,} is "
            "half a character (a surrogate without its other half).  Leave it out, or decode the "
            "file with its own encoding."
        ) from None
    return text


def encode_literally(tokenizer: TokenizerWrapper, text: str) -> list[int]:
    """The ids of a text, read as plain text even where it looks like a control token.

    Raises:
        UserError: The text has half of a surrogate pair, or the tokenizer reads a control token
            even in plain text.
    """
    check_characters(text)
    control = control_of(tokenizer, _template(tokenizer))
    with _lock:
        literal = _literal.get(tokenizer)
        if literal is None:  # a copy: other threads use the tokenizer itself without the flag
            literal = _literal[tokenizer] = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
            added = tokenizer.added_tokens_decoder.values()
            literal.add_special_tokens([token for token in added if token.content in control.ids])
            literal.encode_special_tokens = True
    ids = list(literal.encode(text, add_special_tokens=False).ids)
    if wrong := set(ids) & set(control.ids.values()):
        name = next(token for token, id_ in control.ids.items() if id_ in wrong)
        raise UserError(
            f"This tokenizer reads the control token {name!r} even in plain text; "
            "leave it out of the text."
        )
    return ids


def _template(tokenizer: TokenizerWrapper) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    return template if isinstance(template, str) else None


def encode_marked(
    tokenizer: TokenizerWrapper, control: Control, text: str, marks: Marks | None
) -> list[int]:
    """The ids of a rendered conversation.

    Args:
        tokenizer: The tokenizer.
        control: Its control tokens.
        text: The conversation.  Marked control tokens are plain text; those that the template wrote
            are control tokens.
        marks: The marks in the text, or None.
    """
    check_characters(text)
    if marks is None or not any(mark in text for mark in marks.all):
        return list(tokenizer.encode(text, add_special_tokens=False))
    ids: list[int] = []
    for piece in control.pieces(text, marks):
        ids += [piece] if isinstance(piece, int) else encode_literally(tokenizer, piece)
    return ids


def plain_data(value: Any) -> Any:
    """Convert ``value`` to JSON's own types, which are all that a template may see.

    Anything else becomes the name of its type.
    """
    if isinstance(value, bool) or value is None:
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value) if type(value) is not kind else value
    if isinstance(value, Mapping):
        return {plain_data(key): plain_data(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain_data(inner) for inner in value]
    return f"<{type(value).__name__}>"


def texts_of(value: Any) -> list[str]:
    """All texts in plain data, names of maps included."""
    texts = []
    left = [value]
    while left:
        inner = left.pop()
        if isinstance(inner, str):
            texts.append(inner)
        elif isinstance(inner, dict):
            left += [*inner, *inner.values()]
        elif isinstance(inner, list):
            left += inner
    return texts


def marked(value: Any, control: Control, marks: Marks, keys: bool = False) -> Any:
    """Plain data with the control tokens in its texts marked.

    Args:
        value: The data.
        control: The control tokens.
        marks: The marks.
        keys: Whether the names of maps are marked too.
    """
    if isinstance(value, str):
        return control.mark(value, marks)
    if isinstance(value, dict):
        result = {}
        for name, inner in value.items():
            is_field = name in FIELDS and isinstance(inner, str)
            if not is_field or any(control.places(inner)):
                mark_keys = keys or name in ("arguments", "parameters")
                inner = marked(inner, control, marks, mark_keys)
            result[control.mark(name, marks) if keys else name] = inner
        return result
    if isinstance(value, list):
        return [marked(inner, control, marks, keys) for inner in value]
    return value
