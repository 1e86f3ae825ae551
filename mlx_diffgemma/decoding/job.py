"""The job of a request, its run in the scheduler, and the slots of its sessions."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from mlx_diffgemma.decoding.records import CanvasStep
from mlx_diffgemma.decoding.session import Session
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma


class ClosedError(RuntimeError):
    """The scheduler is shutting down, or the job was cancelled."""


class Job(ABC):
    """What one request asks of the model.

    The scheduler calls everything but ``cancel`` on its own thread.  ``client`` says who asks;
    clients share the slots.  ``scope`` is the part of the prefix cache that the job uses, see
    ``PrefixCache``.
    """

    cancelled = False
    client = ""
    scope = b""

    def cancel(self) -> None:
        """Mark the job as cancelled.  The method is thread-safe and idempotent."""
        self.cancelled = True

    @abstractmethod
    def rounds(self, model: DiffusionGemma) -> Iterator[Sequence[Session]]:
        """Yield the sessions to run next, round by round; all of a round end before the next.

        A session that is finished from the start only encodes its prompt.  A round without
        sessions means that the job did its work itself; it continues at the next scheduler step.
        A job may end a session by setting its ``finished``.
        """

    def step(self, session: Session, step: CanvasStep) -> None:  # noqa: B027 (optional)
        """Called after each denoising step of one of its sessions."""

    @abstractmethod
    def done(self, error: Exception | None) -> None:
        """Called once, after the last round or after an ``error``."""


class SlotState(Enum):
    """The state of a session in the scheduler."""

    WAITING = auto()  # has had no slot yet
    READING = auto()  # its prompt is being encoded
    READY = auto()  # takes denoising steps
    PARKED = auto()  # gave its slot to another client, and keeps its cache


@dataclass(eq=False)
class Slot:
    """A session of a run, and what the scheduler knows about it."""

    run: Run
    session: Session
    state: SlotState = SlotState.WAITING
    nbytes: int = 0  # the memory that its longest answer takes
    boundary: int = 0  # the end of the part of its prompt that others share
    last_step: int = -1  # the scheduler step in which it last took a denoising step
    shareable: bool = False  # whether its cache may be kept in the prefix cache


@dataclass(eq=False)
class Run:
    """A job in the scheduler.

    ``rounds`` is None until the job has begun.  ``todo`` holds the slots of its round that have no
    place in the batch.  ``unfinished`` is the number of sessions of its round that have not ended.
    """

    job: Job
    rounds: Iterator[Sequence[Session]] | None = None
    todo: deque[Slot] = field(default_factory=deque)
    unfinished: int = 0
    began: float = 0.0

    @property
    def has_begun(self) -> bool:
        return self.rounds is not None


class RunQueue:
    """The runs that need a slot, including those that have not begun.

    The queue is thread-safe.  Requests append runs on any thread, and the scheduler takes them on
    its own thread.  ``changed`` holds the lock.  A thread other than the scheduler's must notify it
    after an append.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self._runs: deque[Run] = deque()

    def __len__(self) -> int:
        return len(self._runs)

    def snapshot(self) -> list[Run]:
        with self.changed:
            return list(self._runs)

    def waiting(self) -> list[Run]:
        """The runs that have not begun."""
        return [run for run in self.snapshot() if not run.has_begun]

    def append(self, run: Run) -> None:
        with self.changed:
            self._runs.append(run)

    def append_left(self, run: Run) -> None:
        with self.changed:
            self._runs.appendleft(run)

    def discard(self, run: Run) -> None:
        """Remove ``run`` if it is in the queue."""
        with self.changed:
            if run in self._runs:
                self._runs.remove(run)

    def take(self, key: Callable[[Run], tuple[int, int]]) -> Run | None:
        """Remove the run with the smallest ``key``, the first one of equals; None if empty."""
        with self.changed:
            if not self._runs:
                return None
            run = min(self._runs, key=key)
            self._runs.remove(run)
            return run
