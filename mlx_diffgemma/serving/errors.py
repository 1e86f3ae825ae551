"""The errors of requests, as HTTP status, headers and body."""

from __future__ import annotations

from typing import Any

from mlx_diffgemma.decoding.job import ClosedError
from mlx_diffgemma.errors import ContextError, UserError
from mlx_diffgemma.grammar.budget import AbandonedError
from mlx_diffgemma.serving.engine import BusyError

ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


class GoneError(RuntimeError):
    """The client has closed the connection."""

    def __init__(self) -> None:
        super().__init__("The client has gone.")


class UnknownModelError(RuntimeError):
    """The request names a model that is not served."""


STATUS: dict[type[Exception], int] = {
    UserError: 400,
    UnknownModelError: 404,
    BusyError: 429,
    GoneError: 499,
    ClosedError: 503,
    AbandonedError: 503,
}


def status_of(error: Exception) -> int:
    return next((status for kind, status in STATUS.items() if isinstance(error, kind)), 500)


def headers_of(error: Exception) -> dict[str, str] | None:
    return {"Retry-After": str(error.retry_after)} if isinstance(error, BusyError) else None


def error_body(
    message: str,
    kind: str = "invalid_request_error",
    param: str | None = None,
    code: str | None = None,
) -> dict[str, Any]:
    """An error in OpenAI's form.

    Args:
        message: what is wrong and what to do.
        kind: OpenAI's ``type`` of the error.
        param: the path of the field that is wrong.
        code: a name of the error for programs.
    """
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def body_of_error(error: Exception) -> dict[str, Any]:
    status = status_of(error)
    if status == 500:  # only the log has the details of our own failures
        return error_body(
            "The server failed at this request; its log says more.",
            "server_error",
            code="internal_error",
        )
    kind = {429: "rate_limit_error", 503: "server_error"}.get(status, "invalid_request_error")
    code = {404: "model_not_found", 429: "queue_full", 503: "shutting_down"}.get(status)
    if isinstance(error, ContextError):
        code = "context_length_exceeded"
    return error_body(str(error), kind, code=code)
