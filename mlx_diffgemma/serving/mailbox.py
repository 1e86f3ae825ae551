"""Events from the engine's thread to the event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator

from starlette.requests import Request as HTTPRequest

from mlx_diffgemma.serving.errors import GoneError
from mlx_diffgemma.serving.jobs.events import Ended, Event

PATIENCE = 15.0  # seconds of silence after which a stream shows that it is still open


class Mailbox:
    """Takes events from any thread and gives them to one task of the event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events = asyncio.Queue[Event]()

    def put(self, event: Event) -> None:
        """Add an event.  Thread-safe."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads it any more
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def events(self) -> AsyncGenerator[Event | None, None]:
        """Yield events up to the end of a job, and None after each PATIENCE seconds of silence.

        Raises:
            Exception: the error with which the job ended.
        """
        while True:
            try:
                event = await asyncio.wait_for(self._events.get(), PATIENCE)
            except asyncio.TimeoutError:
                yield None
                continue
            if isinstance(event, Ended):
                break
            yield event
        if event.error is not None:
            raise event.error

    @contextlib.asynccontextmanager
    async def until_gone(self, http: HTTPRequest) -> AsyncGenerator[None, None]:
        """While it is open, events end with a GoneError when the client hangs up."""

        def put_gone(watching: asyncio.Task[None]) -> None:
            if not watching.cancelled():
                self.put(Ended(GoneError()))

        watching = asyncio.ensure_future(disconnected(http))
        watching.add_done_callback(put_gone)
        try:
            yield
        finally:
            watching.cancel()


async def disconnected(http: HTTPRequest) -> None:
    """Return when the client hangs up."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
