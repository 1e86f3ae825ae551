"""Threads for work that uses MLX.  They are reused, and never end.

MLX keeps the functions it compiled for each thread.  It frees them at the end of the thread, and
needs the interpreter for that.  ``threading.Thread.join`` returns before this point, so a thread
may end after the interpreter has shut down.  Then the process aborts, with "terminate called without
an active exception".  A thread that needs the interpreter at that time also aborts the process.  So
each thread is blocked before the interpreter ends.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue

MORE_THAN_A_PIPE_HOLDS = 2**20  # bytes


class _KeptThread:
    """A thread that runs one piece of work after another."""

    def __init__(self, name: str) -> None:
        self._work = SimpleQueue[tuple[Callable[[], object], Future[None]]]()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def submit(self, work: Callable[[], object]) -> Future[None]:
        done = Future[None]()
        self._work.put((work, done))
        return done

    def block(self) -> None:
        """Block the thread for ever, outside the interpreter; returns when it is blocked there.

        It writes to a pipe that nobody empties.  The first byte arrives from inside this write.
        """
        reader, writer = os.pipe()
        self.submit(partial(os.write, writer, bytes(MORE_THAN_A_PIPE_HOLDS)))
        os.read(reader, 1)

    def _run(self) -> None:
        while True:
            work, done = self._work.get()
            failure = None
            try:
                work()
            except BaseException as error:  # it is raised where the result is read
                failure = error
            with _lock:
                _idle.append(self)
            if failure is None:
                done.set_result(None)
            else:
                done.set_exception(failure)
            del work, done, failure  # what they hold is freed now, not at the next piece of work


_idle = list[_KeptThread]()
_lock = threading.Lock()


def run_on_kept_thread(work: Callable[[], None], name: str) -> Future[None]:
    """Run ``work`` on a thread that has no work, or on a new one called ``name``.

    Returns:
        A future that is done when ``work`` has returned, and raises what ``work`` raised.
    """
    with _lock:
        thread = _idle.pop() if _idle else None
    return (thread or _KeptThread(name)).submit(work)


@atexit.register
def _block_all() -> None:
    with _lock:
        for thread in _idle:
            thread.block()
