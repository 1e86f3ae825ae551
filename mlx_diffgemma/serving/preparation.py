"""The threads that turn requests into jobs: templates, tokens, images and constraints.

Most requests are prepared in milliseconds, but some constraints take a minute.  So there are two
lanes.  Each request begins in the quick lane.  If it is not ready after ``QUICK_SECONDS``, it
starts again in the patient lane.  In both lanes clients take turns, and no client holds all
threads.

These threads share Python's lock with the thread that runs the model.  A worker process does the
work that may take long in Python (parsing a long body, compiling a constraint), see ``workers``.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from mlx_diffgemma.grammar import elsewhere
from mlx_diffgemma.grammar.budget import MAX_SECONDS, TooLongError, limited
from mlx_diffgemma.serving.workers import Workers

T = TypeVar("T")
QUICK_THREADS = 4
QUICK_SECONDS = 0.5
PATIENT_THREADS = 2


class Turns:
    """A number of ``places`` that clients take in turn.  A client holds at most ``each``."""

    def __init__(self, places: int, each: int) -> None:
        self._free = places
        self._each = each
        self._taken = Counter[str]()
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    def __len__(self) -> int:
        """The number of requests that wait."""
        return sum(map(len, self._waiting.values()))

    async def take(self, client: str) -> None:
        """Wait for a place.  The caller must give it back."""
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
            client = next((name for name in self._waiting if self._taken[name] < self._each), None)
            if client is None:
                return
            turn = self._waiting[client].popleft()
            self._waiting.move_to_end(client)
            if not self._waiting[client]:
                del self._waiting[client]
            if turn.done():  # the task that waited has been cancelled
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
    """A pool of threads.  A task may take ``seconds``, and sends long work to ``workers``."""

    def __init__(
        self, name: str, threads: int, each: int, seconds: float, workers: Workers
    ) -> None:
        self._seconds = seconds
        self._pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix=name)
        self.turns = Turns(threads, each)
        self._workers = workers

    async def run(self, client: str, abandoned: Callable[[], bool], task: Callable[[], T]) -> T:
        """Run ``task`` when it is the turn of ``client``.

        Args:
            client: who asks.
            abandoned: returns True once nobody waits for the result.
            task: the work.

        Raises:
            TooLongError: the task takes longer than it may.
            AbandonedError: ``abandoned`` returns True meanwhile.
            Exception: whatever ``task`` raises.
        """
        loop = asyncio.get_running_loop()
        await self.turns.take(client)
        future = self._pool.submit(self._limited, abandoned, task)
        # The place is free when the thread is free.  That may be after the caller has gone.
        future.add_done_callback(functools.partial(self._finished, loop, client))
        return await asyncio.wrap_future(future)

    def _limited(self, abandoned: Callable[[], bool], task: Callable[[], T]) -> T:
        with limited(self._seconds, abandoned), elsewhere.sent_to(self._workers.run):
            return task()

    def _finished(self, loop: asyncio.AbstractEventLoop, client: str, _: Future[Any]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(self.turns.give_back, client)


class Preparation:
    """Both lanes.  One constraint may take ``seconds`` to compile."""

    def __init__(self, seconds: float = MAX_SECONDS) -> None:
        self.workers = Workers()
        self.quick = Lane(
            "prepare", QUICK_THREADS, QUICK_THREADS - 1, min(QUICK_SECONDS, seconds), self.workers
        )
        self.patient = Lane("compile", PATIENT_THREADS, PATIENT_THREADS - 1, seconds, self.workers)
        self._closed = threading.Event()

    def warm(self) -> None:
        """Start a worker, so that the first constraint does not wait for one."""
        self.workers.warm()

    def close(self) -> None:
        """Cancel everything that is being prepared.  Thread-safe."""
        self._closed.set()
        self.workers.close()

    async def run(
        self,
        client: str,
        abandoned: Callable[[], bool],
        task: Callable[[], T],
        patiently: Callable[[], None] | None = None,
        is_heavy: bool = False,
    ) -> T:
        """Run ``task`` in the quick lane, and again in the patient lane if it takes too long there.

        Args:
            client: who asks.
            abandoned: returns True once nobody waits for the result.
            task: the work; it may be started twice.
            patiently: called before the task starts in the patient lane.
            is_heavy: the task takes much memory, and starts in the patient lane.

        Raises:
            Exception: as ``Lane.run`` and ``patiently`` raise.
        """

        def given_up() -> bool:
            return abandoned() or self._closed.is_set()

        if not is_heavy:
            with contextlib.suppress(TooLongError):
                return await self.quick.run(client, given_up, task)
        if patiently is not None:
            patiently()
        return await self.patient.run(client, given_up, task)
