"""The application: wires middleware, error handlers and routes around an engine.

>>> app = create_app(engine, Settings(model="nano"))
>>> uvicorn.run(app)
"""

from __future__ import annotations

import functools

from fastapi import FastAPI

from mlx_diffgemma.serving.documentation import document
from mlx_diffgemma.serving.engine import Engine
from mlx_diffgemma.serving.error_handlers import add_error_handlers
from mlx_diffgemma.serving.handlers.generation import ENDPOINTS, add_generation
from mlx_diffgemma.serving.handlers.page import add_page
from mlx_diffgemma.serving.handlers.status import add_status
from mlx_diffgemma.serving.middleware import add_middleware
from mlx_diffgemma.serving.server import Server
from mlx_diffgemma.serving.settings import Settings


def create_app(engine: Engine, settings: Settings) -> FastAPI:
    """The application in front of an ``engine`` that has been started.

    Its ``state.warm`` starts what the first request would otherwise wait for.  Its ``state.close``
    cancels what is being prepared.  Any thread may call it.
    """
    server = Server(engine, settings)
    app = FastAPI(
        title="mlx-diffgemma",
        description="DiffusionGemma over OpenAI's protocol.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.warm = server.warm
    app.state.close = server.close
    bodies = [kind for _, kind in ENDPOINTS.values()]
    app.openapi = functools.partial(document, app, bodies)  # type: ignore[method-assign]
    add_middleware(app, settings, server.metrics.count_request)
    add_error_handlers(app)
    add_generation(app, server)
    add_status(app, server)
    add_page(app)
    return app
