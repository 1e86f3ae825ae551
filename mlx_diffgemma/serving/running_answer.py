"""The events of an answer while it is written: those of its job, and of calls made again."""

from __future__ import annotations

import functools
import operator
import threading
import time
from collections.abc import AsyncGenerator

from mlx_diffgemma.errors import UserError
from mlx_diffgemma.serving.engine import Engine
from mlx_diffgemma.serving.jobs.answer import AnswerJob
from mlx_diffgemma.serving.jobs.choice import Choice
from mlx_diffgemma.serving.jobs.events import Event, Piece, Usage
from mlx_diffgemma.serving.mailbox import Mailbox
from mlx_diffgemma.serving.metrics import Metrics
from mlx_diffgemma.serving.preparation import Preparation


class RunningAnswer:
    """Runs ``job``, whose events go to ``mailbox``, and then a job for each of its broken calls."""

    def __init__(
        self,
        engine: Engine,
        preparation: Preparation,
        metrics: Metrics,
        job: AnswerJob,
        mailbox: Mailbox,
    ) -> None:
        self.choices = job.choices
        self._engine = engine
        self._preparation = preparation
        self._metrics = metrics
        self._mailbox = mailbox
        self._jobs = [job]

    @property
    def usage(self) -> Usage:
        """The cost of the answer, with the calls that were made again."""
        return functools.reduce(operator.add, (job.usage for job in self._jobs))

    def submit(self) -> None:
        """Queue the job.

        Raises:
            BusyError: the queue is full.
            ClosedError: the server is shutting down.
        """
        self._engine.submit(self._jobs[0])

    async def events(self) -> AsyncGenerator[Event | None, None]:
        """Yield pieces and denoising steps, and None for silence.

        Raises:
            Exception: the error with which a job ended.
        """
        began = time.perf_counter()
        is_first = True
        gone = threading.Event()
        try:
            async for event in self._mailbox.events():
                if is_first and isinstance(event, Piece):
                    is_first = False
                    self._metrics.first.observe(time.perf_counter() - began)
                yield event
            for choice in self.choices:
                for start in choice.broken:
                    async for event in self._call_again(choice, start, gone):
                        yield event
            self._metrics.count(self.usage, time.perf_counter() - began)
        finally:
            gone.set()
            self._jobs[-1].cancel()

    async def _call_again(
        self, choice: Choice, start: int, gone: threading.Event
    ) -> AsyncGenerator[Event | None, None]:
        """Make one broken call of ``choice`` again.

        Args:
            choice: whose call it is.
            start: where the call begins in the answer, one of ``choice.broken``.
            gone: set once nobody waits for the answer.
        """
        first = self._jobs[0]
        is_last = start == choice.broken[-1]
        task = functools.partial(choice.again, self._engine.model, start, is_last)
        try:
            call = await self._preparation.run(first.client, gone.is_set, task)
        except UserError as error:
            choice.warnings.append(f"A call could not be made again: {error}")
            if is_last:
                reason = "tool_calls" if choice.called else "stop"
                yield Piece(choice.index, finish_reason=reason)
            return
        choice.called = True
        job = AnswerJob([call], self._mailbox.put)
        job.client = first.client
        job.scope = first.scope
        self._jobs.append(job)
        self._engine.submit(job, again=True)
        async for event in self._mailbox.events():
            yield event
