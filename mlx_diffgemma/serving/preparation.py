"""The threads that make jobs of requests: templates, tokens, images and, above all, constraints.

Most requests are prepared in milliseconds, and some constraints take a minute.  So there are two lanes: each request begins in the
quick one, and what is not ready after ``QUICK_SECONDS`` begins again in the patient one.  In both, clients take turns, and none
holds all threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from mlx_diffgemma.grammar.budget import MAX_SECONDS, TooLongError, limited

T = TypeVar("T")
QUICK_THREADS = 4
QUICK_SECONDS = 0.5
PATIENT_THREADS = 2


class Turns:
    """``places`` that clients take in turn, at most ``each`` of them one client at a time."""

    def __init__(self, places: int, each: int) -> None:
        self._free = places
        self._each = each
        self._taken = Counter[str]()
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    def __len__(self) -> int:
        """How many wait."""
        return sum(map(len, self._waiting.values()))

    async def take(self, client: str) -> None:
        """Wait for a place, which is to be given back."""
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append(turn)
        self._grant()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give_back(client)
            else:
                self._forget(client, turn)
            raise

    def give_back(self, client: str) -> None:
        self._free += 1
        self._taken[client] -= 1
        if not self._taken[client]:
            del self._taken[client]
        self._grant()

    def _grant(self) -> None:
        while self._free:
            client = next((one for one in self._waiting if self._taken[one] < self._each), None)
            if client is None:
                return
            turn = self._waiting[client].popleft()
            self._waiting.move_to_end(client)
            if not self._waiting[client]:
                del self._waiting[client]
            if turn.done():  # whoever waited has been cancelled
                continue
            self._free -= 1
            self._taken[client] += 1
            turn.set_result(None)

    def _forget(self, client: str, turn: asyncio.Future[None]) -> None:
        turns = self._waiting.get(client)
        if turns is not None and turn in turns:
            turns.remove(turn)
            if not turns:
                del self._waiting[client]


class Lane:
    """Some threads, each of whose tasks has ``seconds`` for the constraints in it."""

    def __init__(self, name: str, threads: int, each: int, seconds: float) -> None:
        self._seconds = seconds
        self._pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix=name)
        self.turns = Turns(threads, each)

    async def run(self, client: str, abandoned: Callable[[], bool], task: Callable[[], T]) -> T:
        """Errors: those of ``task``; TooLongError; AbandonedError once ``abandoned`` says so."""
        loop = asyncio.get_running_loop()
        await self.turns.take(client)
        future = self._pool.submit(self._limited, abandoned, task)
        # The place is free when the thread is, which may be later than nobody waits for it.
        future.add_done_callback(functools.partial(self._finished, loop, client))
        return await asyncio.wrap_future(future)

    def _limited(self, abandoned: Callable[[], bool], task: Callable[[], T]) -> T:
        with limited(self._seconds, abandoned):
            return task()

    def _finished(self, loop: asyncio.AbstractEventLoop, client: str, _: Future[Any]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(self.turns.give_back, client)


class Preparation:
    """``seconds``: of the compilation of one constraint."""

    def __init__(self, seconds: float = MAX_SECONDS) -> None:
        self.quick = Lane("prepare", QUICK_THREADS, QUICK_THREADS - 1, min(QUICK_SECONDS, seconds))
        self.patient = Lane("compile", PATIENT_THREADS, PATIENT_THREADS - 1, seconds)

    async def run(
        self,
        client: str,
        abandoned: Callable[[], bool],
        task: Callable[[], T],
        patiently: Callable[[], None] | None = None,
    ) -> T:
        """What ``task`` returns, which may be begun twice; ``patiently`` is called before it begins in the patient lane.

        Errors: as ``Lane.run``, and those of ``patiently``.
        """
        try:
            return await self.quick.run(client, abandoned, task)
        except TooLongError:
            if patiently is not None:
                patiently()
        return await self.patient.run(client, abandoned, task)
