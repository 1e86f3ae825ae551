"""What stands before the routes: the size of bodies, who may ask, and under which name."""

from __future__ import annotations

import hmac
import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from starlette.exceptions import HTTPException

from mlx_diffgemma.serving.protocol import STRICT
from mlx_diffgemma.serving.responses import error_body

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Scope]]
Send = Callable[[Scope], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]
OPEN = ("/", "/health")  # and what is under /page: what they show is no secret, and the page asks for the key


class BodyLimit:
    """Refuses bodies of more than ``limit`` bytes, by what they say of themselves or as soon as more has come."""

    def __init__(self, app: Application, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        told = dict(scope["headers"]).get(b"content-length", b"0")
        if told.isdigit() and int(told) > self.limit:
            await respond(send, 413, error_body(self._message))
            return
        came = 0

        async def counted() -> Scope:
            nonlocal came
            message = await receive()
            came += len(message.get("body", b""))
            if came > self.limit:
                raise HTTPException(413, self._message)
            return message

        await self.app(scope, counted, send)

    @property
    def _message(self) -> str:
        return f"The body has more than the {self.limit:,} bytes that this server takes; send less, or raise --max-body."


class KeyCheck:
    """Asks for ``Authorization: Bearer`` with the ``key``, compared in constant time."""

    def __init__(self, app: Application, key: str) -> None:
        self.app, self.wanted = app, key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        known = scope["type"] != "http" or scope["method"] == "OPTIONS" or path in OPEN or path.startswith("/page/")
        if known or self._right(dict(scope["headers"]).get(b"authorization", b"")):
            await self.app(scope, receive, send)
            return
        await respond(send, 401, error_body("The API key is missing or wrong; send 'Authorization: Bearer KEY'.",
                                            "authentication_error", code="invalid_api_key"), [(b"www-authenticate", b"Bearer")])

    def _right(self, told: bytes) -> bool:
        scheme, _, key = told.partition(b" ")
        return hmac.compare_digest(key.strip(), self.wanted) and scheme.lower() == b"bearer"


class HostCheck:
    """Refuses requests that call the server by none of its ``names``; else a page elsewhere could reach a server on this machine
    under a name of its own."""

    def __init__(self, app: Application, names: Iterable[str]) -> None:
        self.app, self.names = app, {name.strip("[]").lower() for name in names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (name := _host(scope)) in self.names:
            await self.app(scope, receive, send)
            return
        await respond(send, 400, error_body(f"This server is not known as {name!r:.100}; call it by another name, or start it with "
                                            "--allowed-host and this one.", code="unknown_host"))


def _host(scope: Scope) -> str:
    """By which a request calls the server, without brackets and port."""
    told = dict(scope["headers"]).get(b"host", b"").decode("latin-1").lower()
    return told[1:].partition("]")[0] if told.startswith("[") else told.partition(":")[0]


class Counted:
    """Tells ``count`` of each answer: its route, and its status."""

    def __init__(self, app: Application, count: Callable[[str, int], None]) -> None:
        self.app, self.count = app, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def seen(message: Scope) -> None:
            if message["type"] == "http.response.start":
                self.count(getattr(scope.get("route"), "path", "other"), message["status"])
            await send(message)

        await self.app(scope, receive, seen if scope["type"] == "http" else send)


class Strictness:
    """Sets for each request whether what is not known in its body is refused."""

    def __init__(self, app: Application, strict: bool) -> None:
        self.app, self.strict = app, strict

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        token = STRICT.set(self.strict)
        try:
            await self.app(scope, receive, send)
        finally:
            STRICT.reset(token)


async def respond(send: Send, status: int, body: dict[str, Any], headers: list[tuple[bytes, bytes]] | None = None) -> None:
    """Send ``body`` as JSON and close the connection, on which a rest of the request may stand."""
    content = json.dumps(body).encode()
    await send({"type": "http.response.start", "status": status, "headers": [
        (b"content-type", b"application/json"), (b"content-length", str(len(content)).encode()), (b"connection", b"close"),
        *(headers or [])]})
    await send({"type": "http.response.body", "body": content})
