"""From the bytes of a request to the model of its body: inflated and parsed within bounds."""

from __future__ import annotations

import json
import zlib
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, TypeAdapter, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request as HTTPRequest

B = TypeVar("B", bound=BaseModel)
AT_ONCE = 1 << 16  # bytes of a body that is parsed on the event loop; longer ones are parsed by a thread
DEPTH = 100  # of lists and objects in a body
INFLATED_AT_ONCE = 1 << 20


class OffLoop(Protocol):
    """Runs a function on a thread."""

    def __call__(self, task: Callable[[], Any], /) -> Awaitable[Any]: ...


async def read(http: HTTPRequest, kind: type[B], limit: int, off_loop: OffLoop) -> B:
    """The body of ``http`` as a ``kind``; ``limit``: bytes of it when it is inflated.

    Errors: RequestValidationError for what is no such body, HTTPException for what cannot be read.
    """
    content = await http.body()
    zipped = http.headers.get("content-encoding", "identity").strip().lower()
    media_type = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    is_json = media_type == "application/json" or media_type.endswith("+json")

    def parsed() -> B:
        return _model(kind, inflated(content, zipped, limit), is_json)

    if len(content) > AT_ONCE or zipped != "identity":
        found: B = await off_loop(parsed)
        return found
    return parsed()


def inflated(content: bytes, encoding: str, limit: int) -> bytes:
    """Errors: HTTPException for another ``encoding`` than gzip, damaged content, and more than ``limit`` bytes."""
    if encoding == "identity":
        return content
    if encoding not in ("gzip", "x-gzip"):
        raise HTTPException(415, f"The body is encoded as {encoding!r:.60}; send it plain, or as gzip.")
    inflater, pieces, size = zlib.decompressobj(16 + zlib.MAX_WBITS), list[bytes](), 0
    try:
        while content and not inflater.eof:
            pieces.append(inflater.decompress(content, INFLATED_AT_ONCE))
            size += len(pieces[-1])
            if size > limit:
                raise HTTPException(413, f"The body has more than the {limit:,} bytes that this server takes, once inflated; send "
                                         "less, or raise --max-body.")
            content = inflater.unconsumed_tail
    except zlib.error:
        raise HTTPException(422, "The body is not the gzip that its Content-Encoding says; send it plain.") from None
    if not inflater.eof:
        raise HTTPException(422, "The gzip of the body is cut off; send all of it.")
    return b"".join(pieces)


def _model(kind: type[B], content: bytes, is_json: bool) -> B:
    if not content:
        raise RequestValidationError([{"type": "missing", "loc": ("body",), "msg": "Field required", "input": None}], body=None)
    data: Any = _value(content) if is_json else content
    try:
        return TypeAdapter(kind).validate_python(data, from_attributes=True)
    except ValidationError as error:
        errors = [{**one, "loc": ("body", *one["loc"])} for one in error.errors(include_url=False)]
        raise RequestValidationError(errors, body=data) from None


def _value(content: bytes) -> Any:
    try:
        value = json.loads(content)
    except json.JSONDecodeError as error:
        raise RequestValidationError([{"type": "json_invalid", "loc": ("body", error.pos), "msg": "JSON decode error", "input": {},
                                       "ctx": {"error": error.msg}}], body=error.doc) from None
    except (ValueError, RecursionError):  # no UTF-8, numbers of thousands of digits
        raise HTTPException(400, "") from None
    if _is_deep(value):
        raise HTTPException(400, "")
    return value


def _is_deep(value: Any) -> bool:
    """Whether lists and objects nest more than DEPTH deep."""
    level = [value]
    for _ in range(DEPTH + 1):
        level = [inner for one in level if isinstance(one, dict | list)
                 for inner in (one.values() if isinstance(one, dict) else one) if isinstance(inner, dict | list)]
        if not level:
            return False
    return True
