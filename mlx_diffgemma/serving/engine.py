"""The thread that owns the model: a scheduler, the queue in front of it, and its shutdown.

>>> engine = Engine(lambda: load("nano"))
>>> engine.start()
>>> engine.submit(job)
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_diffgemma.decoding.job import ClosedError, Job, Run, RunQueue
from mlx_diffgemma.decoding.scheduler import Scheduler, SchedulerLimits, Stats, tell
from mlx_diffgemma.device import generation_memory, return_memory
from mlx_diffgemma.estimate import cost
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.model.recipes import VISION
from mlx_diffgemma.serving.kept_threads import run_on_kept_thread

IDLE = 1.0  # seconds without work after which memory is given back to the system

log = logging.getLogger(__name__)


class BusyError(RuntimeError):
    """The queue is full.  A place may be free after ``retry_after`` seconds."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(
            f"The server has as many requests waiting as it holds; try again in {retry_after} s."
        )
        self.retry_after = retry_after


class Engine:
    """Runs jobs of a model that ``load`` returns.

    ``load`` is called on the engine's thread, to which all arrays belong: one that ``start``
    takes, or the one that calls ``run``.  At most ``max_queue`` jobs wait.  For the other
    parameters see ``SchedulerLimits``.
    """

    model: DiffusionGemma
    tokenizer: TokenizerWrapper
    scheduler: Scheduler

    def __init__(
        self,
        load: Callable[[], tuple[DiffusionGemma, TokenizerWrapper]],
        max_batch: int = 8,
        max_queue: int = 64,
        prefill_step_size: int = 512,
        prefix_bytes: int = 2 * 2**30,
    ) -> None:
        self.max_queue = max_queue
        self.limits = SchedulerLimits(max_batch, prefill_step_size, prefix_bytes)
        self.stats = Stats()
        self._load = load
        self._queue = RunQueue()
        self._changed = self._queue.changed
        self._ended: Future[None] | None = None  # done when the thread of `start` is free again
        self._running = False
        self._closing = False
        self._deadline = float("inf")

    def start(self) -> None:
        """Load the model and work on a kept thread; returns once the model is loaded.

        Raises:
            Exception: whatever ``load`` raises.
        """
        ready = threading.Event()
        self._ended = run_on_kept_thread(partial(self.run, ready.set), "engine")
        self._ended.add_done_callback(lambda _: ready.set())
        ready.wait()
        if self._ended.done():
            self._ended.result()
        # The thread must not need the interpreter once that has shut down.
        atexit.register(self.close)

    def run(self, ready: Callable[[], None]) -> None:
        """Load the model, call ``ready``, and work on this thread until ``close`` is called.

        Raises:
            Exception: whatever ``load`` raises.
        """
        self.model, self.tokenizer = self._load()
        weights = tree_flatten(self.model.parameters())
        # The vision tower is not read before the first image.  A server that only gets text never
        # needs this gigabyte.
        mx.eval([array for name, array in weights if not name.startswith(VISION)])
        self.scheduler = Scheduler(self.model, self._queue, self.limits, self.stats)
        self.scheduler.on_failure = lambda error: log.warning("A request failed: %s", error)
        self._running = True
        ready()
        with generation_memory(partial(cost.held_bytes, self.model, self.limits.max_batch)):
            while self._wait():
                self._step()
        self._running = False

    def _step(self) -> None:
        """Take one scheduler step.  If it fails, the running jobs end, and the engine continues."""
        try:
            self.scheduler.step()
        except Exception as error:  # a bug, or a device out of memory
            log.exception("A scheduler step failed; the jobs that were running are given up.")
            self.scheduler.drop_all(error, running=True)
            mx.clear_cache()

    def close(self, grace: float = 0.0) -> None:
        """Take no more jobs, end those that wait, and stop.

        Running jobs have ``grace`` seconds to finish.  A second call can only shorten them.
        """
        with self._changed:
            self._closing = True
            self._deadline = min(self._deadline, time.monotonic() + grace)
            self._changed.notify()
        if self._ended:
            wait([self._ended])
            atexit.unregister(self.close)

    @property
    def alive(self) -> bool:
        return self._running and not self._closing

    # The queue, from any thread

    def submit(self, job: Job, again: bool = False) -> None:
        """Queue a job.  ``again`` says that it belongs to a request that already had its place.

        Raises:
            BusyError: the queue is full.
            ClosedError: the engine is closing.
        """
        with self._changed:
            self._check_open()
            displaced = None
            if not again and self._waiting() >= self.max_queue:
                displaced = self._displaced(job.client)
                if displaced is None:
                    raise BusyError(self._retry_after())
                self._queue.discard(displaced)
                self.stats.failed += 1
            self._queue.append(Run(job))
            self.stats.waiting = self._waiting()
            self._changed.notify()
        if displaced is not None:
            tell(displaced, BusyError(self._retry_after()))

    def check_queue(self, more: int, client: str = "", own: int = 0) -> None:
        """Check that a job of ``client`` would find a place in the queue.

        Args:
            more: the number of requests that are being prepared and will be queued before it.
            client: who asks.  In a full queue, a client with less than half of it has a place.
            own: the requests of this client among ``more``.

        Raises:
            BusyError: there is no place.
            ClosedError: the engine is closing.
        """
        with self._changed:
            self._check_open()
            own += sum(run.job.client == client for run in self._queue.waiting())
            waiting = self._waiting() + more
            if waiting >= self.max_queue and (own == waiting or 2 * own >= self.max_queue):
                raise BusyError(self._retry_after())

    def check_patience(self, waiting: int) -> None:
        """Check that one more request may wait for a long preparation, in addition to ``waiting``.

        Raises:
            BusyError: the most requests that may wait are waiting already.
            ClosedError: the engine is closing.
        """
        with self._changed:
            self._check_open()
            if waiting >= self.max_queue:
                raise BusyError(self._retry_after())

    def _check_open(self) -> None:
        if self._closing:
            raise ClosedError("The server is shutting down.")

    def _waiting(self) -> int:
        """The number of jobs that have not begun."""
        return len(self._queue.waiting())

    def _displaced(self, client: str) -> Run | None:
        """The job that gives its place in a full queue to a job of ``client``.

        It is the latest job of the client with the most jobs, which must have at least two more.
        """
        waiting = self._queue.waiting()
        counts = Counter(run.job.client for run in waiting)
        most = max(counts, key=counts.__getitem__, default=client)
        if counts[most] <= counts[client] + 1:
            return None
        return next(run for run in reversed(waiting) if run.job.client == most)

    def _retry_after(self) -> int:
        """The seconds until a place in the queue is probably free: the time of a job per slot."""
        stats = self.stats
        seconds = stats.seconds / stats.finished if stats.finished else 1.0
        return max(1, min(60, round(seconds / self.limits.max_batch)))

    # The thread

    def _wait(self) -> bool:
        """Wait for work; False once the engine is to stop."""
        with self._changed:
            idle = not self._changed.wait_for(self._has_work, IDLE)
        if idle:
            return_memory()
        with self._changed:
            self._changed.wait_for(self._has_work)
        return not self._closing or self._closes_later()

    def _has_work(self) -> bool:
        return self._closing or self.scheduler.has_work

    def _closes_later(self) -> bool:
        """While closing, end the jobs that wait.  Returns whether another step fits before the
        deadline.
        """
        error = ClosedError("The server is shutting down.")
        for run in self._queue.waiting():
            self.scheduler.finish(run, error)
        if not self.scheduler.has_work:
            return False
        if time.monotonic() + self.scheduler.longest_step > self._deadline:
            self.scheduler.drop_all(error)
            return False
        return True
