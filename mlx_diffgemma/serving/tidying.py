"""Returns free memory to the system after requests that took much of it."""

from __future__ import annotations

import asyncio

from mlx_diffgemma.heap import trim_heap

# Seconds from a large request to the return of its memory, so that one return serves several.
# A return takes a few milliseconds, and taking the memory again a few more.
TIDY_SECONDS = 1.0


class Tidying:
    """Returns memory once for all requests within TIDY_SECONDS."""

    _timer: asyncio.TimerHandle | None = None

    def soon(self) -> None:
        """Note that something large is freed now, or will be soon."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(TIDY_SECONDS, self._tidy)

    def _tidy(self) -> None:
        self._timer = None
        asyncio.get_running_loop().run_in_executor(None, trim_heap)
