"""The thread that owns the model: jobs come in, their sessions share forwards, and each leaves when it is done.

A turn of the thread encodes one chunk of the prompts that are being read and takes one denoising step of all canvases, so that a
long prompt delays the others by a chunk at a time.  Sessions join at their own canvas border; a job that fails, or whose caller has
gone, gives up its rows at the next turn and takes no other with it.

    >>> engine = Engine(lambda: load("nano"))
    >>> engine.start()
    >>> engine.submit(job)
"""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_diffgemma import cost
from mlx_diffgemma.cache import Cache
from mlx_diffgemma.device import generation_memory, memory_limit
from mlx_diffgemma.errors import NonFiniteLogitsError
from mlx_diffgemma.model import DiffusionGemma
from mlx_diffgemma.prompt import keyed, next_chunk
from mlx_diffgemma.recipes import VISION
from mlx_diffgemma.serving.prefixes import Prefixes
from mlx_diffgemma.session import CanvasStep, Loop, Session, encode_chunk

log = logging.getLogger(__name__)
CLIENTS = 1000  # of which it is known when they were served last


class BusyError(RuntimeError):
    """The queue is full; ``retry_after`` seconds from now a place may be free."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"The server has as many requests waiting as it holds; try again in {retry_after} s.")
        self.retry_after = retry_after


class ClosedError(RuntimeError):
    """The server is shutting down, or the job was cancelled."""


class Job(ABC):
    """What one request asks of the model.  Everything but ``cancel`` is called on the engine's thread."""

    cancelled = False
    client = ""  # who asks, as far as shares of the rows are concerned
    scope = b""  # of the prefixes that it may find and leaves, see ``Prefixes``

    def cancel(self) -> None:
        """Nobody waits for it any longer.  May be called from any thread, and more than once."""
        self.cancelled = True

    @abstractmethod
    def rounds(self, model: DiffusionGemma) -> Iterator[Sequence[Session]]:
        """The sessions that are to be run to their ends next; finished ones only read.  None at all: it works itself, and goes on
        at the next turn.  A job may end a session by setting ``finished``."""

    def step(self, session: Session, step: CanvasStep) -> None:  # noqa: B027 (some look at no step)
        """One of its sessions took a denoising step."""

    @abstractmethod
    def done(self, error: Exception | None) -> None:
        """All rounds have been run, or there was an ``error``."""


@dataclass(eq=False)
class _Run:
    """A job on its way: its ``rounds`` once it has begun, the sessions that have no row yet, and how many are not finished."""

    job: Job
    rounds: Iterator[Sequence[Session]] | None = None
    todo: deque[Session] = field(default_factory=deque)
    open: int = 0
    began: float = 0.0
    fresh: set[int] = field(default_factory=set)  # ids of parked sessions whose caches may be kept for others


@dataclass(eq=False)
class _Row:
    run: _Run
    session: Session
    nbytes: int
    border: int = 0  # of its prompt, where what others share ends
    fresh: bool = False  # whether its beginning may be kept for others


@dataclass
class Figures:
    """What the engine has done since it began; read from other threads."""

    turns: int = 0
    steps: int = 0  # denoising steps, of all rows
    encoded: int = 0  # prompt tokens
    reused: int = 0  # prompt tokens that were in the cache
    rows: int = 0  # that are taken now
    waiting: int = 0  # jobs that have not begun
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    admitted: int = 0  # rows that were given
    seconds: float = 0.0  # from begin to end, of finished jobs


class Engine:
    """``load`` gives model and tokenizer; it is called on the engine's thread, to which all arrays belong: one that ``start``
    makes, or the one that calls ``run``.

    At most ``max_batch`` sessions run at once, fewer where memory does not hold them, and at most ``max_queue`` jobs wait.
    ``prefill_step_size``: positions of prompts that are encoded in a turn.  ``prefix_bytes``: of the caches that are kept for
    prompts to come, see ``Prefixes``.
    """

    def __init__(self, load: Callable[[], tuple[DiffusionGemma, TokenizerWrapper]], max_batch: int = 8, max_queue: int = 64,
                 prefill_step_size: int = 512, prefix_bytes: int = 2 * 2**30) -> None:
        self._load, self.max_batch, self.max_queue = load, max_batch, max_queue
        self.prefill_step_size, self._prefix_bytes = prefill_step_size, prefix_bytes
        self.model: DiffusionGemma
        self.tokenizer: TokenizerWrapper
        self.prefixes: Prefixes
        self.figures = Figures()
        self._changed = threading.Condition()
        self._queue: deque[_Run] = deque()  # jobs that want rows, those that have not begun among them
        self._reading: deque[_Row] = deque()
        self._rows: dict[int, _Row] = {}  # by id of the session
        self._closing, self._deadline = False, float("inf")
        self._longest_turn = 0.0  # seconds, of late
        self._served: dict[str, int] = {}  # when clients got their last rows, the latest CLIENTS of them
        self._thread: threading.Thread | None = None
        self._running = False

    def start(self) -> None:
        """Load the model on a thread of its own, which then works; returns when it is there.  Errors: whatever ``load`` raises."""
        ready, failure = threading.Event(), list[BaseException]()

        def run() -> None:
            try:
                self.run(ready.set)
            except BaseException as error:  # raised on the thread that waits
                failure.append(error)
                ready.set()

        self._thread = threading.Thread(target=run, name="engine", daemon=True)
        self._thread.start()
        ready.wait()
        if failure:
            raise failure[0]

    def run(self, ready: Callable[[], None]) -> None:
        """Load the model, call ``ready``, and work on this thread until closed.  Errors: whatever ``load`` raises."""
        self.model, self.tokenizer = self._load()
        weights = tree_flatten(self.model.parameters())
        # The tower stays unread until the first image: a gigabyte that a server of text never needs.
        mx.eval([array for name, array in weights if not name.startswith(VISION)])
        self.prefixes = Prefixes(Cache(self.model.config.text), self._prefix_bytes)
        self._room = memory_limit() - sum(array.nbytes for _, array in weights)
        self._loop = Loop(self.model, (), self.prefill_step_size)
        self._running = True
        ready()
        with generation_memory(partial(cost.held_bytes, self.model, self.max_batch)):
            while self._wait():
                self._turn()
        self._running = False

    def submit(self, job: Job, again: bool = False) -> None:
        """From any thread; ``again``: it belongs to a request that had its place.  Errors: BusyError when the queue is full,
        ClosedError behind ``close``."""
        with self._changed:
            self._check_open()
            displaced = None
            if not again and self._waiting() >= self.max_queue:
                displaced = self._displaced(job.client)
                if displaced is None:
                    raise BusyError(self._retry_after())
                self._queue.remove(displaced)
                self.figures.failed += 1
            self._queue.append(_Run(job))
            self.figures.waiting = self._waiting()
            self._changed.notify()
        if displaced is not None:
            self._tell(displaced, BusyError(self._retry_after()))

    def check_queue(self, more: int, client: str = "", own: int = 0) -> None:
        """Whether a job of ``client`` would find a place behind those that wait, and ``more`` to come, ``own`` of them its own.

        Where the queue is full, a client with less than half of it finds one all the same.  Errors: BusyError, and ClosedError
        behind ``close``.
        """
        with self._changed:
            self._check_open()
            own += sum(run.rounds is None and run.job.client == client for run in self._queue)
            waiting = self._waiting() + more
            if waiting >= self.max_queue and (own == waiting or 2 * own >= self.max_queue):
                raise BusyError(self._retry_after())

    def _displaced(self, client: str) -> _Run | None:
        """The job that gives its place in a full queue to one of ``client``: the latest of the client with most, where that has
        more than one more than this one."""
        waiting = [run for run in self._queue if run.rounds is None]
        counts = Counter(run.job.client for run in waiting)
        most = max(counts, key=counts.__getitem__, default=client)
        if counts[most] <= counts[client] + 1:
            return None
        return next(run for run in reversed(waiting) if run.job.client == most)

    def check_patience(self, waiting: int) -> None:
        """Errors: BusyError where so many ``waiting`` for a constraint to be compiled are as many as may wait, ClosedError behind
        ``close``."""
        with self._changed:
            self._check_open()
            if waiting >= self.max_queue:
                raise BusyError(self._retry_after())

    def _check_open(self) -> None:
        if self._closing:
            raise ClosedError("The server is shutting down.")

    def close(self, grace: float = 0.0) -> None:
        """Take no more jobs, tell those that wait, give those that run ``grace`` seconds, less if told again, and stop."""
        with self._changed:
            self._closing, self._deadline = True, min(self._deadline, time.monotonic() + grace)
            self._changed.notify()
        if self._thread:
            self._thread.join()

    @property
    def alive(self) -> bool:
        return self._running and not self._closing

    def _waiting(self) -> int:
        """How many jobs have not begun."""
        return sum(run.rounds is None for run in self._queue)

    def _retry_after(self) -> int:
        """Seconds until a place in the queue is likely free: what a job takes, over those that run side by side."""
        each = self.figures.seconds / self.figures.finished if self.figures.finished else 1.0
        return max(1, min(60, round(each / self.max_batch)))

    def _wait(self) -> bool:
        """Until there is something to do; whether there ever will be."""
        with self._changed:
            while not (self._closing or self._queue or self._rows):
                self._changed.wait()
            if not self._closing:
                return True
            waiting = [run for run in self._queue if run.rounds is None]
        for run in waiting:
            self._finish(run, ClosedError("The server is shutting down."))
        if not (self._queue or self._rows):
            return False
        if time.monotonic() + self._longest_turn > self._deadline:  # a further turn might not end in time
            self._drop_all(ClosedError("The server is shutting down."))
            return False
        return True

    def _turn(self) -> None:
        began = time.monotonic()
        try:
            self._drop_cancelled()
            self._admit()
            self._encode()
            for session, step in self._advance():
                self._deliver(session, step)
            self._share()
        except Exception as error:  # a bug or a device out of memory: those that run are lost, the server goes on
            log.exception("A turn of the engine failed; what ran is given up.")
            self._drop_all(error, running=True)
            mx.clear_cache()
        self._longest_turn = max(time.monotonic() - began, 0.9 * self._longest_turn)
        self.figures.turns += 1
        self.figures.rows = len(self._rows)

    def _drop_cancelled(self) -> None:
        with self._changed:
            runs = [*self._queue, *(row.run for row in self._rows.values())]
        for run in dict.fromkeys(run for run in runs if run.job.cancelled):
            self._finish(run, ClosedError("The request was cancelled."))

    def _drop_all(self, error: Exception, running: bool = False) -> None:
        """End every job, or those that are ``running``, with ``error``."""
        with self._changed:
            runs = [*(row.run for row in self._rows.values()), *(run for run in self._queue if run.rounds or not running)]
        for run in dict.fromkeys(runs):
            self._finish(run, error)
        self._reading.clear()
        self._rows.clear()
        self._loop = Loop(self.model, (), self.prefill_step_size)

    def _admit(self) -> None:
        """Give free rows to jobs in turn, one at a time."""
        worked = list[_Run]()
        while len(self._rows) < self.max_batch:
            with self._changed:
                if not self._queue:
                    break
                run = self._next_run()
            if not run.todo:
                if not self._begin(run):
                    continue
                if not run.todo:  # it has had its turn
                    worked.append(run)
                    continue
            row = self._row(run)
            if not self._fits(row):
                run.todo.appendleft(row.session)
                self._enqueue(run, first=True)
                break  # until others have left
            if run.todo:
                self._enqueue(run)
            self._note_served(run.job.client)
            self._place(row)
        for run in worked:
            self._enqueue(run)
        with self._changed:
            self.figures.waiting = self._waiting()

    def _next_run(self) -> _Run:
        """The first of the queue, of the client that has the fewest rows; of several such, the one that got its last row first."""
        held = Counter(row.run.job.client for row in self._rows.values())
        run = min(self._queue, key=lambda one: (held[one.job.client], self._served.get(one.job.client, 0)))
        self._queue.remove(run)
        return run

    def _note_served(self, client: str) -> None:
        self._served.pop(client, None)
        self._served[client] = self.figures.admitted = self.figures.admitted + 1
        while len(self._served) > CLIENTS:
            self._served.pop(next(iter(self._served)))

    def _fits(self, row: _Row) -> bool:
        """Whether memory holds it beside the others; prefixes make room."""
        needed = row.nbytes + sum(other.nbytes for other in self._rows.values())
        needed += sum(session.cache.nbytes for run in [row.run, *self._queue] for session in run.todo)  # those that were parked
        self.prefixes.shrink(max(0, self._room - needed))
        return not self._rows or needed <= self._room

    def _enqueue(self, run: _Run, first: bool = False) -> None:
        with self._changed:
            (self._queue.appendleft if first else self._queue.append)(run)

    def _begin(self, run: _Run) -> bool:
        """Ask a job for its next sessions; whether it goes on."""
        try:
            if run.rounds is None:
                run.began = time.perf_counter()
                run.rounds = run.job.rounds(self.model)
            sessions = next(run.rounds, None)
        except Exception as error:  # that of one request
            self._finish(run, error)
            return False
        if sessions is None:
            self._finish(run, None)
            return False
        run.todo.extend(sessions)
        run.open = len(run.todo)
        return True

    def _row(self, run: _Run) -> _Row:
        session, config = run.todo.popleft(), self.model.config
        needed = cost.run_bytes(config, 0, len(session.ids) + max(session.max_tokens, config.canvas_length), self.model.dtype.size)
        return _Row(run, session, needed)

    def _place(self, row: _Row) -> None:
        session = row.session
        self._rows[id(session)] = row
        if session.canvases:  # it was parked; what it committed last is encoded with its next step, as if it had not been
            row.fresh = id(session) in row.run.fresh
            self._read(row)
            return
        if not session.cache.length and not session.policy.drafter:
            row.fresh = True
            cache, row.border = self.prefixes.begin(keyed(session.ids, session.images), whole=not session.wants_next,
                                                     scope=row.run.job.scope)
            session.go_on(cache)
            self.figures.reused += cache.length
        if session.pending.size:
            session.reserve()
            self._reading.append(row)
        else:
            self._read(row)

    def _encode(self) -> None:
        """One chunk: of the prompt whose turn it is, and of as many others as it has room for."""
        taken, sizes, left = list[_Row](), list[int](), self.prefill_step_size
        while self._reading:
            row = self._reading[0]
            size = self._chunk(row)
            if taken and size > left:
                break
            taken.append(self._reading.popleft())
            sizes.append(size)
            left -= size
        if not taken:
            return
        encode_chunk(self.model, [row.session for row in taken], sizes)
        self.figures.encoded += sum(sizes)
        for row in taken:
            session = row.session
            if row.fresh and (not session.pending.size or session.cache.length in (row.border, session.repeated)):
                self.prefixes.keep(keyed(session.ids, session.images), session.cache, row.run.job.scope)
            if session.pending.size:
                self._reading.append(row)
            else:
                self._read(row)

    def _chunk(self, row: _Row) -> int:
        """How many positions of a prompt are encoded next: up to its border, and to where the next turn goes on, first."""
        session = row.session
        size = next_chunk(session.pending.size, session.cache.length, session.images, self.prefill_step_size)
        borders = [row.border]
        if row.fresh and self.prefixes.budget:
            borders.append(session.repeated)
        for border in sorted(borders):
            ahead = border - session.cache.length
            split = any(image.start < border < image.stop for image in session.images)
            if 1 < ahead < size and not split:
                return ahead
        return size

    def _read(self, row: _Row) -> None:
        """Its prompt is in the cache."""
        if row.session.finished:
            self._leave(row)
        else:
            self._loop.sessions.append(row.session)

    def _advance(self) -> list[tuple[Session, CanvasStep]]:
        while self._loop.active:
            try:
                return self._loop.advance()
            except NonFiniteLogitsError as error:
                if not error.sessions:
                    raise
                for session in error.sessions:
                    if row := self._rows.get(id(session)):
                        self._finish(row.run, error)
        return []

    def _deliver(self, session: Session, step: CanvasStep) -> None:
        row = self._rows.get(id(session))
        if row is None:  # its job failed at another of its sessions
            return
        self.figures.steps += 1
        try:
            row.run.job.step(session, step)
        except Exception as error:  # that of one request
            self._finish(row.run, error)
            return
        if session.finished:
            if row.fresh:
                self.prefixes.keep(keyed(session.ids, session.images), session.cache, row.run.job.scope)
            self._leave(row)

    def _share(self) -> None:
        """Where others wait for a row and none is free, a client with more than its share gives up those whose canvas was just
        committed; they go on when their turn comes."""
        with self._changed:
            waiting = {run.job.client for run in self._queue}
        if not waiting or len(self._rows) < self.max_batch:
            return
        held = Counter(row.run.job.client for row in self._rows.values())
        share = max(1, self.max_batch // len(waiting | held.keys()))
        wanted = sum(held[client] < share for client in waiting)
        between = {id(session) for session in self._loop.sessions if session.canvas is None and session.canvases}
        for row in list(self._rows.values()):
            client = row.run.job.client
            if wanted and held[client] > share and id(row.session) in between:
                self._park(row)
                held[client] -= 1
                wanted -= 1

    def _park(self, row: _Row) -> None:
        """Its session waits as one that has not begun, with what it has in its cache."""
        del self._rows[id(row.session)]
        self._loop.sessions = [session for session in self._loop.sessions if session is not row.session]
        row.run.todo.append(row.session)
        if row.fresh:
            row.run.fresh.add(id(row.session))
        with self._changed:
            if row.run not in self._queue:
                self._queue.append(row.run)

    def _leave(self, row: _Row) -> None:
        """A session is finished; with the last of its round the job goes on."""
        del self._rows[id(row.session)]
        self._loop.sessions = [session for session in self._loop.sessions if session is not row.session]
        row.run.open -= 1
        if not row.run.open and self._begin(row.run):
            self._enqueue(row.run, first=True)

    def _finish(self, run: _Run, error: Exception | None) -> None:
        """Free what the job has, and tell it."""
        rows = [row for row in self._rows.values() if row.run is run]
        for row in rows:
            del self._rows[id(row.session)]
        gone = {id(row.session) for row in rows}
        self._loop.sessions = [session for session in self._loop.sessions if id(session) not in gone]
        self._reading = deque(row for row in self._reading if row.run is not run)
        with self._changed:
            if run in self._queue:
                self._queue.remove(run)
        if error is None:
            self.figures.finished += 1
            self.figures.seconds += time.perf_counter() - run.began
        elif run.job.cancelled:
            self.figures.cancelled += 1
        else:
            self.figures.failed += 1
            log.warning("A request failed: %s", error)
        self._tell(run, error)

    @staticmethod
    def _tell(run: _Run, error: Exception | None) -> None:
        try:
            run.job.done(error)
        except Exception:  # whoever waited for it has gone
            log.exception("A job could not be told of its end.")
