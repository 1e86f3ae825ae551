"""Answers every exception of a request with an error body, and logs refusals in one line."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import Request as HTTPRequest

from mlx_diffgemma.serving.errors import (
    ERROR_SCHEMA,
    STATUS,
    body_of_error,
    error_body,
    headers_of,
    status_of,
)
from mlx_diffgemma.serving.validation_errors import invalid_body

log = logging.getLogger(__name__)
LOGGED = 300  # the most characters of a message in the log
_SHAPE = {"application/json": {"schema": ERROR_SCHEMA}}
_MEANINGS = {
    400: "A field that cannot be honoured, named",
    401: "No valid key",
    404: "Unknown model",
    413: "Body too large",
    408: "The body did not arrive",
    429: "The queue is full",
    500: "The model failed",
    503: "Shutting down",
}
# For the OpenAPI document.
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": meaning, "content": _SHAPE} for status, meaning in _MEANINGS.items()
}


def add_error_handlers(app: FastAPI) -> None:
    app.exception_handler(RequestValidationError)(_invalid)
    app.exception_handler(HTTPException)(_refused)
    for kind in STATUS:
        app.exception_handler(kind)(_known)
    app.exception_handler(Exception)(_failed)


async def _invalid(http: HTTPRequest, error: RequestValidationError) -> JSONResponse:
    body = invalid_body(error)
    _log_refusal(http, 400, body)
    return JSONResponse(body, 400)


async def _refused(http: HTTPRequest, error: HTTPException) -> JSONResponse:
    messages = {
        404: f"There is nothing at {http.url.path}.",
        400: "The body is no JSON in UTF-8, or nested too deeply.",
        405: f"{http.url.path} is not for {http.method}.",
    }
    body = error_body(str(messages.get(error.status_code, error.detail)))
    _log_refusal(http, error.status_code, body)
    return JSONResponse(body, error.status_code, error.headers)


async def _known(http: HTTPRequest, error: Exception) -> JSONResponse:
    body = body_of_error(error)
    _log_refusal(http, status_of(error), body)
    return JSONResponse(body, status_of(error), headers_of(error))


async def _failed(http: HTTPRequest, error: Exception) -> JSONResponse:
    log.error("%s failed", http.url.path, exc_info=error)
    return JSONResponse(body_of_error(error), 500)


def _log_refusal(http: HTTPRequest, status: int, body: dict[str, Any]) -> None:
    """Log a refusal in one line, whatever the message holds."""
    error = body["error"]
    param = f" param {_line(error['param'])!r}:" if error["param"] else ""
    log.warning(
        "%s %s: %d%s %s",
        http.method,
        _line(http.url.path),
        status,
        param,
        _line(error["message"], LOGGED),
    )


def _line(text: str, most: int = 100) -> str:
    """Up to ``most`` characters of a text from a client, escaped so that none ends a line."""
    return ascii(text)[1:-1][:most]
