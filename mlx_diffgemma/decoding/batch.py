"""Batches: jobs or sessions that the caller's own thread runs to their ends.

>>> for session, step in run(model, sessions, batch_size=8):
...     print(session.canvas_index, step.step)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from mlx_diffgemma.decoding.job import Job, Run, RunQueue
from mlx_diffgemma.decoding.prefill import PREFILL_STEP_SIZE
from mlx_diffgemma.decoding.records import CanvasStep
from mlx_diffgemma.decoding.scheduler import Scheduler, SchedulerLimits
from mlx_diffgemma.decoding.session import Session
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma


class BatchJob(Job):
    """A job whose error is raised where the batch is run."""

    error: Exception | None = None
    ended = False

    def done(self, error: Exception | None) -> None:
        self.error = error
        self.ended = True


class _SessionJob(BatchJob):
    """A job of one session.  ``steps`` collects the steps of all sessions of the batch."""

    def __init__(self, session: Session, steps: list[tuple[Session, CanvasStep]]) -> None:
        self.session = session
        self.steps = steps

    def rounds(self, model: DiffusionGemma) -> Iterator[Sequence[Session]]:  # noqa: ARG002
        yield [self.session]

    def step(self, session: Session, step: CanvasStep) -> None:
        self.steps.append((session, step))


def run_jobs(
    model: DiffusionGemma,
    jobs: Iterable[BatchJob],
    batch_size: int,
    prefill_step_size: int = PREFILL_STEP_SIZE,
) -> Iterator[None]:
    """Run ``jobs`` to their ends.

    Args:
        model: The model.
        jobs: The jobs.  One is taken from the iterable only when there is room.
        batch_size: The most sessions that run at once.
        prefill_step_size: How many prompt positions one forward encodes.

    Yields:
        None after each scheduler step.

    Raises:
        Exception: The error of the first job that failed.
    """
    queue = RunQueue()
    limits = SchedulerLimits(batch_size, prefill_step_size, prefix_bytes=0)
    scheduler = Scheduler(model, queue, limits)
    waiting = iter(jobs)
    running = list[BatchJob]()
    while True:
        while len(scheduler.slots) + len(queue) < batch_size:
            job = next(waiting, None)
            if job is None:
                break
            running.append(job)
            queue.append(Run(job))
        if not scheduler.has_work:
            return
        scheduler.step()
        for job in running:
            if job.error:
                raise job.error
        running = [job for job in running if not job.ended]
        yield


def run(
    model: DiffusionGemma,
    sessions: Iterable[Session],
    batch_size: int,
    prefill_step_size: int = PREFILL_STEP_SIZE,
) -> Iterator[tuple[Session, CanvasStep]]:
    """Run ``sessions`` to their ends, yielding every denoising step.

    Args:
        model: The model.
        sessions: The sessions.  One is taken from the iterable only when there is room.
        batch_size: The most that run at once.  The next one joins as soon as one has finished.
        prefill_step_size: How many prompt positions one forward encodes.

    Yields:
        A session and the record of its step.
    """
    steps = list[tuple[Session, CanvasStep]]()
    jobs = (_SessionJob(session, steps) for session in sessions)
    for _ in run_jobs(model, jobs, batch_size, prefill_step_size):
        yield from steps
        steps.clear()
