"""Turns the bytes of a request into the model of its body: parses within bounds, and checks."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import TypeAdapter, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request as HTTPRequest

from mlx_diffgemma.grammar import elsewhere
from mlx_diffgemma.serving.content import NotJSONError, UnreadableError, inflated, value_of
from mlx_diffgemma.serving.protocols.body import Body
from mlx_diffgemma.serving.protocols.fields import STRICT

B = TypeVar("B", bound=Body)
AT_ONCE = 1 << 16  # bytes; longer bodies are parsed by a worker instead of on the event loop
HEAVY = 1 << 20  # bytes; longer bodies are parsed in the patient lane


class OffLoop(Protocol):
    """Runs a function on a thread.  Only a few functions that are ``is_heavy`` run at once."""

    def __call__(self, task: Callable[[], Any], is_heavy: bool, /) -> Awaitable[Any]: ...


async def read(http: HTTPRequest, kind: type[B], limit: int, off_loop: OffLoop) -> B:
    """Read the body of ``http``.

    Args:
        http: the request.
        kind: the model of the body.
        limit: the most bytes of the inflated body.
        off_loop: runs the parsing of long bodies.

    Raises:
        RequestValidationError: the body does not fit ``kind``.
        HTTPException: the body cannot be read.
    """
    content = await http.body()
    zipped = http.headers.get("content-encoding", "identity").strip().lower()
    media_type = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    is_json = media_type == "application/json" or media_type.endswith("+json")
    strict = STRICT.get()  # a context variable; other threads do not see its value

    def parsed() -> B:
        token = STRICT.set(strict)
        try:
            return _model(kind, content, zipped, limit, is_json)
        finally:
            STRICT.reset(token)

    if len(content) > AT_ONCE or zipped != "identity":
        body: B = await off_loop(parsed, len(content) > HEAVY)
        return body
    return parsed()


def _model(kind: type[B], content: bytes, zipped: str, limit: int, is_json: bool) -> B:
    ignored = [name for name, allowed in kind.NEUTRAL.items() if allowed == "any"]
    try:
        data = (
            elsewhere.run(value_of, content, zipped, limit, ignored)
            if is_json
            else inflated(content, zipped, limit)
        )
    except UnreadableError as error:
        raise HTTPException(error.status, error.detail) from None
    except NotJSONError as error:
        raise RequestValidationError(
            [
                {
                    "type": "json_invalid",
                    "loc": ("body", error.position),
                    "msg": "JSON decode error",
                    "input": {},
                    "ctx": {"error": error.message},
                }
            ]
        ) from None
    if data == b"":
        raise RequestValidationError(
            [{"type": "missing", "loc": ("body",), "msg": "Field required", "input": None}],
            body=None,
        )
    try:
        return TypeAdapter(kind).validate_python(data, from_attributes=True)
    except ValidationError as error:
        errors = [
            {**detail, "loc": ("body", *detail["loc"])}
            for detail in error.errors(include_url=False)
        ]
        raise RequestValidationError(errors, body=data) from None
