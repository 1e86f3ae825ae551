"""The layers in front of the routes, and their order."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from mlx_diffgemma.serving.asgi import Application, Receive, Scope, Send
from mlx_diffgemma.serving.hosts import HostCheck
from mlx_diffgemma.serving.keys import KeyCheck
from mlx_diffgemma.serving.limits import BodyLimit
from mlx_diffgemma.serving.protocols.fields import STRICT
from mlx_diffgemma.serving.settings import Settings

# Routes that also work without /v1.
SHORT = ("/models", "/chat/completions", "/completions", "/decisions")


class Paths:
    """Makes the routes of /v1 work without it, and all routes work with a slash at the end."""

    def __init__(self, app: Application) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if scope["type"] == "http" and not path.startswith("/page"):
            path = path.rstrip("/") or "/"
            if any(path == short or path.startswith(f"{short}/") for short in SHORT):
                path = f"/v1{path}"
            if path != scope["path"]:
                scope = {**scope, "path": path, "raw_path": path.encode()}
        await self.app(scope, receive, send)


class Counted:
    """Calls ``count`` with the route and the status of each answer."""

    def __init__(self, app: Application, count: Callable[[str, int], None]) -> None:
        self.app, self.count = app, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def seen(message: Scope) -> None:
            if message["type"] == "http.response.start":
                self.count(getattr(scope.get("route"), "path", "other"), message["status"])
            await send(message)

        await self.app(scope, receive, seen if scope["type"] == "http" else send)


class Strictness:
    """Sets for each request whether unknown fields are refused."""

    def __init__(self, app: Application, strict: bool) -> None:
        self.app, self.strict = app, strict

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        token = STRICT.set(self.strict)
        try:
            await self.app(scope, receive, send)
        finally:
            STRICT.reset(token)


def add_middleware(app: FastAPI, settings: Settings, count: Callable[[str, int], None]) -> None:
    """Put the layers in front of the routes.  The layer that is added last sees a request first.

    Args:
        app: the application.
        settings: the settings of the server.
        count: called with the route and the status of each answer.
    """
    app.add_middleware(Strictness, strict=settings.strict)
    app.add_middleware(BodyLimit, limit=settings.max_body)
    if settings.api_keys:
        app.add_middleware(KeyCheck, keys=settings.api_keys)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.allowed_origins),
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
            allow_private_network=True,
        )
    if settings.allowed_hosts and "*" not in settings.allowed_hosts:
        app.add_middleware(HostCheck, names=settings.allowed_hosts)
    app.add_middleware(Counted, count=count)
    app.add_middleware(Paths)
