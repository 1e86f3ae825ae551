"""Text in which nothing is a control token, and conversations in which only the template's own
markers are.

What a user or a tool wrote may look like a marker: ``<|turn>``, ``<eos>``, ``<|tool_call>``. Each
such place is marked with private characters before the template is rendered, as transformers does
with ``sanitize_control_tokens``, and read as plain text afterwards. A conversation without such
places is rendered and read as it always was.
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

from mlx_diffgemma import templates
from mlx_diffgemma.errors import UserError

PRIVATE = range(0xF0000, 0xFFFFE)  # characters that no standard gives a meaning to
ESCAPE = "\\U000f"  # with which Python writes each of them in a list
# Fields of messages and of their parts whose values are names of the protocol.
FIELDS = ("role", "type")


@dataclass(frozen=True)
class Marks:
    """Characters that no input holds: they stand before and behind a control token, and where a
    text could become part of one.
    """

    begin: str
    end: str
    split: str

    @property
    def all(self) -> str:
        return self.begin + self.end + self.split

    @classmethod
    def unused(cls, texts: Sequence[str]) -> Marks:
        """Three characters that are in none of ``texts``, and are not written there as Python
        writes them in a list either.
        """
        wide = "".join(text for text in texts if not text.isascii() or ESCAPE in text)
        free = (
            chr(code)
            for code in PRIVATE
            if chr(code) not in wide and _escape(chr(code)) not in wide
        )
        return cls(next(free), next(free), next(free))

    def restored(self, text: str) -> str:
        """``text`` with marks as characters where a template has printed a list as Python does."""
        if ESCAPE in text:
            for mark in self.all:
                text = text.replace(_escape(mark), mark)
        return text


def _escape(character: str) -> str:
    return repr(character)[1:-1]


class Control:
    """The control tokens of a tokenizer, found in texts as the tokenizer finds them: the longest
    first, from left to right.

    A vocabulary may have thousands of them, so they are looked up by length, not tried in turn.
    """

    def __init__(self, ids: Mapping[str, int]) -> None:
        self.ids = dict(ids)
        self._first = re.compile(
            "[" + re.escape("".join(sorted({token[0] for token in ids}))) + "]" if ids else "(?!)"
        )
        self._sizes = sorted({len(token) for token in ids}, reverse=True)
        self._begun = {token[:size] for token in ids for size in range(1, len(token))}

    def places(self, text: str) -> Iterator[tuple[int, int]]:
        """Where control tokens begin and end."""
        place = 0
        while first := self._first.search(text, place):
            begin = first.start()
            fitting = (size for size in self._sizes if begin + size <= len(text))
            size = next((size for size in fitting if text[begin : begin + size] in self.ids), 0)
            if size:
                yield begin, begin + size
            place = begin + max(size, 1)

    def mark(self, text: str, marks: Marks) -> str:
        """``text`` with its control tokens marked, and its end if that begins a control token."""
        made: list[str] = []
        done = 0
        for begin, end in self.places(text):
            made += [text[done:begin], marks.begin, text[begin:end], marks.end]
            done = end
        rest = text[done:]
        stripped = rest.rstrip()
        if any(stripped[-size:] in self._begun for size in self._sizes_before(len(stripped))):
            rest = stripped + marks.split + rest[len(stripped) :]
        return "".join([*made, rest])

    def _sizes_before(self, length: int) -> range:
        """Lengths of the beginnings of control tokens that may end a text."""
        return range(1, min(length, max(self._sizes, default=1) - 1) + 1)

    def pieces(self, marked: str, marks: Marks) -> list[str | int]:
        """A text with marks as plain pieces, and the ids of those control tokens that no mark
        touches.
        """
        places = [place for place, character in enumerate(marked) if character not in marks.all]
        text = "".join(marked[place] for place in places)
        found: list[str | int] = []
        done = 0
        for begin, end in self.places(text):
            first, last = places[begin], places[end - 1]
            whole = last - first == end - 1 - begin
            if (
                not whole
                or marked[first - 1 : first] == marks.begin
                or marked[last + 1 : last + 2] == marks.end
            ):
                continue
            found += [text[done:begin], self.ids[text[begin:end]]]
            done = end
        return [piece for piece in (*found, text[done:]) if piece != ""]


_lock = threading.Lock()  # of both
_controls: weakref.WeakKeyDictionary[TokenizerWrapper, tuple[str | None, Control]] = (
    weakref.WeakKeyDictionary()
)
_literal: weakref.WeakKeyDictionary[TokenizerWrapper, Tokenizer] = weakref.WeakKeyDictionary()


def control_of(tokenizer: TokenizerWrapper, template: str | None = None) -> Control:
    """Its special tokens, and those other added tokens that the chat template writes, as in
    transformers.
    """
    with _lock:
        known = _controls.get(tokenizer)
        if known is None or known[0] != template:
            written = template_text(template) if template else ""
            ids = {
                token.content: id_
                for id_, token in tokenizer.added_tokens_decoder.items()
                if token.special or (token.content in written and not token.content.isspace())
            }
            known = _controls[tokenizer] = template, Control(ids)
        return known[1]


@functools.lru_cache(maxsize=8)
def template_text(template: str) -> str:
    """The texts that a template writes itself."""
    tree = templates.syntax(template)
    found = {node.data for node in tree.find_all(nodes.TemplateData)}
    found |= {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    return "\0".join(sorted(found))


def encode_literally(tokenizer: TokenizerWrapper, text: str) -> list[int]:
    """Ids of text in which nothing is a control token, whatever it looks like.

    Errors: TypeError for text that is not Unicode; UserError for a tokenizer that reads a control
    token in plain text.
    """
    control = control_of(tokenizer, _template(tokenizer))
    with _lock:
        literal = _literal.get(tokenizer)
        if literal is None:  # one of its own: the flag is the tokenizer's, which other threads use
            literal = _literal[tokenizer] = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
            literal.add_special_tokens(
                [
                    token
                    for token in tokenizer.added_tokens_decoder.values()
                    if token.content in control.ids
                ]
            )
            literal.encode_special_tokens = True
    ids = list(literal.encode(text, add_special_tokens=False).ids)
    if wrong := set(ids) & set(control.ids.values()):
        name = next(token for token, id_ in control.ids.items() if id_ in wrong)
        raise UserError(
            f"This tokenizer reads the control token {name!r} even in plain text; leave it out of the text."
        )
    return ids


def _template(tokenizer: TokenizerWrapper) -> str | None:
    template = getattr(tokenizer, "chat_template", None)
    return template if isinstance(template, str) else None


def encode_marked(
    tokenizer: TokenizerWrapper, control: Control, text: str, marks: Marks | None
) -> list[int]:
    """Ids of a rendered conversation: what is marked is plain text, the template's own markers are
    control tokens.
    """
    if marks is None or not any(mark in text for mark in marks.all):
        return list(tokenizer.encode(text, add_special_tokens=False))
    ids: list[int] = []
    for piece in control.pieces(text, marks):
        ids += [piece] if isinstance(piece, int) else encode_literally(tokenizer, piece)
    return ids


def plain_data(value: Any) -> Any:
    """``value`` made of JSON's own types alone, which is all that a template may see; anything else
    becomes its type's name.
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
    found = []
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, str):
            found.append(one)
        elif isinstance(one, dict):
            left += [*one, *one.values()]
        elif isinstance(one, list):
            left += one
    return found


def marked(value: Any, control: Control, marks: Marks, keys: bool = False) -> Any:
    """Plain data with the control tokens in its texts marked; with ``keys`` in the names of maps as
    well.
    """
    if isinstance(value, str):
        return control.mark(value, marks)
    if isinstance(value, dict):
        return {
            control.mark(name, marks) if keys else name: inner
            if name in FIELDS and isinstance(inner, str) and not any(control.places(inner))
            else marked(inner, control, marks, keys or name in ("arguments", "parameters"))
            for name, inner in value.items()
        }
    if isinstance(value, list):
        return [marked(inner, control, marks, keys) for inner in value]
    return value
