"""API keys: which requests are allowed, and from which client they come."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from mlx_diffgemma.serving.asgi import Application, Receive, Scope, Send, respond
from mlx_diffgemma.serving.errors import error_body

# Paths that need no key, in addition to those under /page.  They show no secret, and the page asks
# for the key.
OPEN = ("/", "/health", "/favicon.ico")


class KeyCheck:
    """Requires one of ``keys``, as ``Authorization: Bearer`` or ``x-api-key``.

    Keys are compared in constant time.  If there are several, each is a client, see ``asker``.
    """

    def __init__(self, app: Application, keys: Sequence[str]) -> None:
        self.app, self.wanted = app, [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if (
            scope["type"] != "http"
            or scope["method"] == "OPTIONS"
            or path in OPEN
            or path.startswith("/page/")
        ):
            await self.app(scope, receive, send)
            return
        brought = key_of(scope)
        equal = [hmac.compare_digest(brought, wanted) for wanted in self.wanted]
        if any(equal):
            if len(equal) > 1:
                scope = {**scope, "asker": f"key {equal.index(True)}"}
            await self.app(scope, receive, send)
            return
        await respond(
            send,
            401,
            error_body(
                "The API key is missing or wrong; send 'Authorization: Bearer KEY' or "
                "'x-api-key: KEY'.",
                "authentication_error",
                code="invalid_api_key",
            ),
            [(b"www-authenticate", b"Bearer")],
        )


def asker(scope: Scope) -> str:
    """The client that asks: its key if the server has several keys, otherwise its address."""
    if "asker" in scope:
        return str(scope["asker"])
    return str(scope["client"][0]) if scope.get("client") else ""


def key_of(scope: Scope) -> bytes:
    """The API key of a request; empty if it has none."""
    headers = dict(scope["headers"])
    scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"").strip()
