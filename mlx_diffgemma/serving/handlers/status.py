"""The served models, the health of the server, and its metrics."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response

from mlx_diffgemma.serving.error_handlers import ERRORS
from mlx_diffgemma.serving.server import Server


def add_status(app: FastAPI, server: Server) -> None:
    @app.head("/v1/models", include_in_schema=False)
    @app.get("/v1/models", responses={401: ERRORS[401]})
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": server.models.all}

    @app.get("/v1/models/{name:path}", responses={401: ERRORS[401], 404: ERRORS[404]})
    async def model(name: str) -> dict[str, Any]:
        server.models.check(name)
        return server.models.first

    @app.head("/health", include_in_schema=False)
    @app.get("/health", responses={503: ERRORS[503]})
    async def health() -> Response:
        alive = server.engine.alive
        stats = server.engine.stats
        body = {
            "status": "ok" if alive else "closing",
            "model": server.settings.model,
            "rows": stats.rows,
            "waiting": stats.waiting,
        }
        return JSONResponse(body, 200 if alive else 503)

    @app.get("/metrics", responses={401: ERRORS[401]})
    async def metrics() -> Response:
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4")
