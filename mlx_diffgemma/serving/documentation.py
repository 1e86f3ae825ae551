"""The OpenAPI document.  Bodies are read by ``bodies``, so FastAPI does not know their schemas."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

SCHEMAS = "#/components/schemas/"


def body_reference(kind: type[BaseModel]) -> dict[str, Any]:
    """The part of the document that describes the body of a route."""
    content = {"application/json": {"schema": {"$ref": SCHEMAS + kind.__name__}}}
    return {"requestBody": {"required": True, "content": content}}


def document(app: FastAPI, bodies: Iterable[type[BaseModel]]) -> dict[str, Any]:
    """The document of ``app`` with the schemas of ``bodies``.  It is made once."""
    if app.openapi_schema:
        return app.openapi_schema
    made = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes
    )
    schemas = made.setdefault("components", {}).setdefault("schemas", {})
    for kind in bodies:
        schema = kind.model_json_schema(ref_template=SCHEMAS + "{model}")
        schemas |= schema.pop("$defs", {})
        schemas[kind.__name__] = schema
    app.openapi_schema = made
    return made
