"""Bounds of a request body in bytes and in time."""

from __future__ import annotations

import asyncio

from starlette.exceptions import HTTPException

from mlx_diffgemma.serving.asgi import Application, Receive, Scope, Send, respond
from mlx_diffgemma.serving.errors import error_body

BODY_SECONDS = 30.0  # the seconds in which a body must arrive
SLOWEST = 16_384  # a body has another second for each of this many bytes


class BodyLimit:
    """Refuses bodies that are too large or too slow.

    A body may have ``limit`` bytes.  The check uses Content-Length and the bytes that arrive.  A
    body may take ``seconds``, and a second more for each SLOWEST bytes.
    """

    def __init__(self, app: Application, limit: int, seconds: float = BODY_SECONDS) -> None:
        self.app = app
        self.limit = limit
        self.seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.limit:
            await respond(send, 413, error_body(self._message))
            return
        received = 0
        is_whole = False
        began = asyncio.get_running_loop().time()

        async def counted() -> Scope:
            nonlocal received, is_whole
            if is_whole:  # the application now waits for the client to hang up
                return await receive()
            left = began + self.seconds + received / SLOWEST - asyncio.get_running_loop().time()
            try:
                message = await asyncio.wait_for(receive(), max(left, 0.001))
            except asyncio.TimeoutError:
                raise HTTPException(
                    408,
                    f"The body did not come within {self.seconds:g} seconds; send it at once.",
                    {"Connection": "close"},
                ) from None
            received += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if received > self.limit:
                raise HTTPException(413, self._message)
            return message

        await self.app(scope, counted, send)

    @property
    def _message(self) -> str:
        return (
            f"The body has more than the {self.limit:,} bytes that this server takes; send less, "
            "or raise --max-body."
        )
