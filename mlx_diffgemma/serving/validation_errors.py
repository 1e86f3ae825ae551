"""The error body of a request that does not fit its schema: the first thing wrong, and its path."""

from __future__ import annotations

from typing import Any

from fastapi.exceptions import RequestValidationError

from mlx_diffgemma.serving.errors import error_body

Detail = dict[str, Any]  # one of pydantic's errors


def invalid_body(error: RequestValidationError) -> dict[str, Any]:
    """The error body; its ``param`` is the path of the field."""
    details = list(error.errors())
    detail = details[0]
    path, branch = _path(detail, error.body)
    if branch is not None:
        detail = _furthest(details, detail["loc"][:branch], error.body)
        path, _ = _path(detail, error.body)
    message = str(detail["msg"]).removeprefix("Value error, ")
    kind = detail["type"]
    if kind == "extra_forbidden":
        message = f"The field {path[-1]!r} is not known here; leave it out."
    elif kind == "json_invalid":
        path = []
        reason = detail.get("ctx", {}).get("error", message)
        message = f"The body is not valid JSON: {reason}."
    elif not path and kind in ("model_attributes_type", "missing"):
        message = (
            "The body must be a JSON object, sent with the header Content-Type: application/json."
        )
    elif kind == "value_error" and (name := message.partition(":")[0]).isidentifier():
        path.append(name)
    param = ".".join(path)
    if param and not message.startswith(path[-1]):
        message = f"{param}: {message}"
    return error_body(message, param=param or None)


def _furthest(details: list[Detail], union: tuple[Any, ...], body: Any) -> Detail:
    """The error of the branch of a union that the body probably means.

    It is the error with the longest path.

    Args:
        details: all errors; every branch of the union has its own.
        union: the path of the union.
        body: the body of the request.
    """
    branches = [detail for detail in details if detail["loc"][: len(union)] == union]

    def depth(detail: Detail) -> tuple[int, int, bool]:
        path, _ = _path(detail, body)
        return len(path), len(detail["loc"]), not detail["type"].endswith("_type")

    return max(branches, key=depth)


def _path(detail: Detail, body: Any) -> tuple[list[str], int | None]:
    """Find the path of an error.

    Returns:
        (the fields and indices that lead to it; the index in its ``loc`` that names the branch of a
        union, or None).
    """
    path = list[str]()
    branch: int | None = None
    for depth, part in enumerate(detail["loc"][1:], 1):
        if part in _keys(body):
            body = body[part]
        elif detail["type"] != "missing" or depth < len(detail["loc"]) - 1:
            branch = depth if branch is None else branch
            continue
        path.append(str(part))
    return path, branch


def _keys(body: Any) -> Any:
    if isinstance(body, dict):
        return body
    return range(len(body)) if isinstance(body, list) else ()
