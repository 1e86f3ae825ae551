"""Connections that neither wait for ever nor take each other's place.

uvicorn closes a connection that is idle after an answer.  One on which no request comes, or only
slowly, it keeps; here it has ``HEAD_SECONDS``.  At most ``most`` connections are open: for a new one
the oldest idle one of the client with the most connections is closed.
"""

from __future__ import annotations

import asyncio
import resource
from collections import Counter

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 20.0  # from the opening of a connection, or the end of an answer, to the end of a request's head
MOST = 1000
FILES = 200  # that are left for other uses


class Connection(H11Protocol):
    """See the module."""

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
        """Whether no request is being answered, nor has come whole."""
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
        """Close an idle connection of the client that has most; where none is idle, this one."""
        others = [one for one in self.connections if one is not self and isinstance(one, Connection)]
        idle = [one for one in others if one.idle and not one.transport.is_closing()]
        counts = Counter(one.address for one in idle)
        # Timers were set when a connection became idle, so the one that ends first is the oldest.
        oldest = max(
            idle,
            key=lambda one: (counts[one.address], -one.overdue_at),
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
    """As many as the limit of open files leaves room for, which is raised as far as it may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST + FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return MOST if soft == resource.RLIM_INFINITY else max(16, min(MOST, soft - FILES))
