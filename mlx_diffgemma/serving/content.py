"""Reads the JSON value of a body from its bytes, within bounds.

A worker reads long bodies, so this module does not need a web framework.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Collection
from typing import Any

DEPTH = 100  # the most levels of lists and objects in a body
INFLATED_AT_ONCE = 1 << 20


class UnreadableError(ValueError):
    """A body that cannot be read.  ``status`` and ``detail`` are those of the HTTP response."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(status, detail)
        self.status, self.detail = status, detail


class NotJSONError(ValueError):
    """A body that is not JSON.  ``message`` says what is wrong at ``position``."""

    def __init__(self, position: int, message: str) -> None:
        super().__init__(position, message)
        self.position, self.message = position, message


def value_of(content: bytes, encoding: str, limit: int, ignored: Collection[str]) -> Any:
    """The value of a JSON body, b"" for an empty one.

    Args:
        content: the body as it was sent.
        encoding: its Content-Encoding; "identity" for none.
        limit: the most bytes after decompression.
        ignored: names of an object's fields that are dropped, whatever their values.

    Raises:
        UnreadableError: damaged or too large content, text that is not UTF-8, deep nesting.
        NotJSONError: anything else that is not JSON.
    """
    text = inflated(content, encoding, limit)
    if not text:
        return text
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise NotJSONError(error.pos, error.msg) from None
    except (ValueError, RecursionError):  # not UTF-8, or numbers with thousands of digits
        raise UnreadableError(400, "") from None
    if _is_deep(value):
        raise UnreadableError(400, "")
    if isinstance(value, dict):
        for name in ignored:
            value.pop(name, None)
    return value


def inflated(content: bytes, encoding: str, limit: int) -> bytes:
    """Decompress a body.

    Args:
        content: the body as it was sent.
        encoding: its Content-Encoding.
        limit: the most bytes after decompression.

    Raises:
        UnreadableError: an encoding other than gzip, damaged content, or more than ``limit`` bytes.
    """
    if encoding == "identity":
        return content
    if encoding not in ("gzip", "x-gzip"):
        raise UnreadableError(
            415, f"The body is encoded as {encoding!r:.60}; send it plain, or as gzip."
        )
    inflater = zlib.decompressobj(16 + zlib.MAX_WBITS)
    pieces = list[bytes]()
    size = 0
    try:
        while content and not inflater.eof:
            pieces.append(inflater.decompress(content, INFLATED_AT_ONCE))
            size += len(pieces[-1])
            if size > limit:
                raise UnreadableError(
                    413,
                    f"The body has more than the {limit:,} bytes that this server takes, once inflated; send "
                    "less, or raise --max-body.",
                )
            content = inflater.unconsumed_tail
    except zlib.error:
        raise UnreadableError(
            422, "The body is not the gzip that its Content-Encoding says; send it plain."
        ) from None
    if not inflater.eof:
        raise UnreadableError(422, "The gzip of the body is cut off; send all of it.")
    return b"".join(pieces)


def _is_deep(value: Any) -> bool:
    """Whether lists and objects nest more than DEPTH deep."""
    level = [value]
    for _ in range(DEPTH + 1):
        level = [
            inner
            for value in level
            if isinstance(value, dict | list)
            for inner in (value.values() if isinstance(value, dict) else value)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True
