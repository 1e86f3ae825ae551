"""The names under which the server may be called."""

from __future__ import annotations

from collections.abc import Iterable

from mlx_diffgemma.serving.asgi import Application, Receive, Scope, Send, respond
from mlx_diffgemma.serving.errors import error_body


class HostCheck:
    """Refuses requests whose host name is not one of ``names``.

    Otherwise a foreign web page could reach a server on this machine by a name of its own (DNS
    rebinding).
    """

    def __init__(self, app: Application, names: Iterable[str]) -> None:
        self.app, self.names = app, {name.strip("[]").lower() for name in names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (name := _host(scope)) in self.names:
            await self.app(scope, receive, send)
            return
        await respond(
            send,
            400,
            error_body(
                f"This server is not known as {name!r:.100}; call it by another name, or start it with "
                "--allowed-host and this one.",
                code="unknown_host",
            ),
        )


def _host(scope: Scope) -> str:
    """The host name in a request, without brackets and port."""
    name = dict(scope["headers"]).get(b"host", b"").decode("latin-1").lower()
    return name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
