"""Small processes that do long Python work on what clients send.

On a thread, such work would share Python's lock with the thread that runs the model.  A worker has
its own lock and a lower priority than the model.  At its time limit it is asked to stop, and killed
if it does not.  So no work blocks the server, exceeds its time, or leaves memory in use.  A worker
does not import MLX and starts in a fraction of a second.
"""

from __future__ import annotations

import contextlib
import logging
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from mlx_diffgemma.grammar import budget
from mlx_diffgemma.grammar.tokens import Vocabulary
from mlx_diffgemma.serving import worker
from mlx_diffgemma.serving.frames import Kept, read, write

log = logging.getLogger(__name__)
T = TypeVar("T")
LOOK = 0.05  # seconds between two checks whether anybody still waits for the work
MARGIN = 0.25  # seconds past its limit after which a worker is killed
# A worker is killed if nobody has waited for it for this many seconds.  This is longer than MARGIN,
# since a worker may get no processor for a while, and a new one would have to start.
PATIENCE = 2.0
SPARE = 1  # workers that are kept without work


class WorkerError(RuntimeError):
    """A worker ended before its work did."""


class _Worker:
    """One process.  Only one thread at a time may call ``run``."""

    def __init__(self) -> None:
        program = str(Path(worker.__file__))
        self.process = subprocess.Popen(
            [sys.executable, program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            close_fds=False,  # no file is inherited anyway, and this avoids a fork
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._jobs, self._answers = self.process.stdin, self.process.stdout
        self._kept = list[Vocabulary]()  # what the process keeps, since every constraint needs it
        self.spent = False  # whether the process takes no more work

    def run(self, function: Callable[..., T], *given: Any) -> T:
        """Call ``function`` in the process.

        Raises:
            TooLongError: it takes longer than it may, see ``budget.limited``.
            AbandonedError: nobody waits for it any more.
            WorkerError: the process ended.
            Exception: whatever ``function`` raises.
        """
        budget.check()
        limit = budget.current() or budget.Limit(budget.MAX_SECONDS, float("inf"), lambda: False)
        try:
            self._send(function, given, limit)
            self._await(limit)
            done, answer, grown = read(cast(BinaryIO, self._answers))
        except (EOFError, OSError):
            self.end()
            budget.check()  # it may have been ended because the time is over
            raise WorkerError(
                f"The process that prepared the request ended with {self.process.returncode}."
            ) from None
        except BaseException:
            self.end()
            raise
        if grown:
            self.end()
        if done:
            return cast(T, answer)
        if isinstance(answer, budget.TooLongError):
            answer = budget.too_long_error(limit.seconds)
        raise answer

    def _send(self, function: Callable[..., Any], given: Any, limit: budget.Limit) -> None:
        sent = list[Any]()
        for own in given:
            if isinstance(own, Vocabulary):
                if not any(own is kept for kept in self._kept):
                    write(cast(BinaryIO, self._jobs), (own,))
                    self._kept.append(own)
                own = Kept(next(n for n, kept in enumerate(self._kept) if kept is own))
            sent.append(own)
        seconds = limit.deadline - time.monotonic()
        write(cast(BinaryIO, self._jobs), (function, sent, seconds))

    def _await(self, limit: budget.Limit) -> None:
        """Wait for an answer."""
        end = limit.deadline + MARGIN
        is_told = False
        with selectors.DefaultSelector() as selector:
            selector.register(self._answers, selectors.EVENT_READ)
            while not selector.select(LOOK):
                if not is_told and limit.abandoned():
                    self.process.send_signal(signal.SIGUSR1)
                    end = min(end, time.monotonic() + PATIENCE)
                    is_told = True
                if time.monotonic() > end:
                    raise (
                        budget.abandoned_error()
                        if is_told
                        else budget.too_long_error(limit.seconds)
                    )

    def end(self) -> None:
        self.spent = True
        with contextlib.suppress(OSError):
            self._jobs.close()
        self.process.kill()
        self.process.wait()
        self._answers.close()


class Workers:
    """A pool with as many workers as there is concurrent work.  SPARE idle ones are kept."""

    def __init__(self) -> None:
        self._idle: list[_Worker] = []
        self._working: set[_Worker] = set()
        self._lock = threading.Lock()
        self._closed = False

    def warm(self) -> None:
        """Start a worker, so that the first work does not wait for one."""
        self._give_back(_Worker())

    def run(self, function: Callable[..., T], /, *given: Any) -> T:
        """Call ``function`` in a worker.  Thread-safe.

        Raises:
            Exception: as ``_Worker.run`` raises.
        """
        worker = self._taken()
        with self._lock:
            self._working.add(worker)
        try:
            return worker.run(function, *given)
        finally:
            with self._lock:
                self._working.discard(worker)
            self._give_back(worker)

    def close(self) -> None:
        """End all workers, also those at work."""
        with self._lock:
            self._closed = True
            idle = self._idle
            working = list(self._working)
            self._idle = []
        for spare in idle:
            spare.end()
        for busy in working:  # the threads that use them notice it
            busy.process.kill()

    @property
    def processes(self) -> list[int]:
        """The process ids of the workers without work."""
        return [worker.process.pid for worker in self._idle]

    def _taken(self) -> _Worker:
        while True:
            with self._lock:
                idle = self._idle.pop() if self._idle else None
            if idle is None:
                return _Worker()
            if idle.process.poll() is None:
                return idle
            idle.end()  # another process has killed it

    def _give_back(self, worker: _Worker) -> None:
        with self._lock:
            kept = not self._closed and len(self._idle) < SPARE
            if kept and not worker.spent:
                self._idle.append(worker)
                return
        worker.end()
        if kept:
            self._give_back(_Worker())
