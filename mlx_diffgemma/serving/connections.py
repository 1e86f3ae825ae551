"""Bounds of open connections, in time and number.

uvicorn closes a connection that is idle after an answer.  It keeps a connection on which no request
arrives, or on which one arrives slowly.  Here the head of a request must arrive in
``HEAD_SECONDS``.  At most ``most`` connections are open.  A new one then closes the oldest idle
connection of the client with the most connections.
"""

from __future__ import annotations

import asyncio
import resource
from collections import Counter

from uvicorn.protocols.http.h11_impl import H11Protocol

# From the opening of a connection, or the end of an answer, to the end of a request's head.
HEAD_SECONDS = 20.0
MOST = 1000
FILES = 200  # the number of open files that are left for other uses


class Connection(H11Protocol):
    """A connection with these bounds."""

    most = MOST
    head_seconds = HEAD_SECONDS
    _overdue: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.most:
            self._make_room()
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_watching()
        super().connection_lost(exc)

    @property
    def idle(self) -> bool:
        """Whether no request is being answered, and none has arrived completely."""
        return self.cycle is None or self.cycle.response_complete

    def _watch_head(self) -> None:
        if self.transport.is_closing() or not self.idle:
            self._stop_watching()
        elif self._overdue is None:
            self._overdue = self.loop.call_later(self.head_seconds, self._close_if_idle)

    def _stop_watching(self) -> None:
        if self._overdue is not None:
            self._overdue.cancel()
            self._overdue = None

    def _close_if_idle(self) -> None:
        self._overdue = None
        if self.idle:
            self.transport.close()

    def _make_room(self) -> None:
        """Close an idle connection of the client with the most, or this one if none is idle."""
        idle = [
            other
            for other in self.connections
            if other is not self
            and isinstance(other, Connection)
            and other.idle
            and not other.transport.is_closing()
        ]
        counts = Counter(other.address for other in idle)
        # Timers were set when a connection became idle, so the one that ends first is the oldest.
        oldest = max(
            idle,
            key=lambda other: (counts[other.address], -other.overdue_at),
            default=self,
        )
        oldest.transport.abort()

    @property
    def address(self) -> str:
        return self.client[0] if self.client else ""

    @property
    def overdue_at(self) -> float:
        return self._overdue.when() if self._overdue is not None else 0.0


def protocol(most: int = MOST, head_seconds: float = HEAD_SECONDS) -> type[Connection]:
    """The class of connections for ``uvicorn.Config(http=...)``."""
    return type("Connection", (Connection,), {"most": most, "head_seconds": head_seconds})


def allowed_connections() -> int:
    """The number of connections that the limit of open files allows, after raising that limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST + FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return MOST if soft == resource.RLIM_INFINITY else max(16, min(MOST, soft - FILES))
