"""Runs a job whose result is read at its end."""

from __future__ import annotations

import time

from starlette.requests import Request as HTTPRequest

from mlx_diffgemma.serving.jobs.decision import DecisionJob
from mlx_diffgemma.serving.jobs.infill import InfillJob
from mlx_diffgemma.serving.mailbox import Mailbox
from mlx_diffgemma.serving.server import Server


async def run(
    server: Server, http: HTTPRequest, job: InfillJob | DecisionJob, mailbox: Mailbox
) -> None:
    """Submit ``job``, wait for its end, and count it.

    Args:
        server: the server.
        http: the request; the job is cancelled when its client hangs up.
        job: what to run.
        mailbox: where the events of the job arrive.

    Raises:
        Exception: the error with which the job ended.
    """
    began = time.perf_counter()
    server.engine.submit(job)
    try:
        async with mailbox.until_gone(http):
            async for _ in mailbox.events():
                pass
    finally:
        job.cancel()
    server.metrics.count(job.usage, time.perf_counter() - began)
