"""Sends the text of a hole, whole or as a stream."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator

from fastapi.responses import JSONResponse, Response
from starlette.requests import Request as HTTPRequest

from mlx_diffgemma.serving.formats import AnswerStream, Ending
from mlx_diffgemma.serving.handlers.running import run
from mlx_diffgemma.serving.handlers.streaming import streamed
from mlx_diffgemma.serving.jobs.infill import InfillJob, prepare_filling
from mlx_diffgemma.serving.mailbox import Mailbox
from mlx_diffgemma.serving.protocols.answer_body import AnswerBody
from mlx_diffgemma.serving.server import Server
from mlx_diffgemma.serving.tasks import InfillTask


async def send_filling(
    server: Server, http: HTTPRequest, body: AnswerBody, task: InfillTask
) -> Response:
    """Fill the hole of a request.

    Args:
        server: the server.
        http: the request.
        body: its body.
        task: what the body asks for.

    Raises:
        Exception: see ``errors.STATUS``.
    """
    mailbox = Mailbox()
    is_heavy = await server.intake.is_heavy(task, http)
    filling = await server.intake.prepared(
        http, is_heavy, prepare_filling, server.engine, server.settings, task
    )
    job = InfillJob(filling, mailbox.put)
    job.warnings += body.notes
    server.sign(job, body, http)
    answer_format = body.answer_format()
    if body.delivery.stream:
        server.engine.submit(job)  # before a stream begins, so that a full queue has its own status
        stream = answer_format.stream(1, null_usage=False)
        return streamed(stream, _events(server, body, task, job, mailbox, stream))
    await run(server, http, job, mailbox)
    piece = job.piece(task.stops)
    return JSONResponse(answer_format.body([[piece]], job.usage, _ending(job)))


def _ending(job: InfillJob) -> Ending:
    return Ending(job.filling.seed, job.warnings, job.filling.unseen)


async def _events(
    server: Server,
    body: AnswerBody,
    task: InfillTask,
    job: InfillJob,
    mailbox: Mailbox,
    stream: AnswerStream,
) -> AsyncGenerator[str, None]:
    began = time.perf_counter()
    try:
        async for _ in mailbox.events():
            yield stream.silence()
        server.metrics.count(job.usage, time.perf_counter() - began)
        yield stream.piece(job.piece(task.stops), _ending(job))
        if body.delivery.usage:
            yield stream.usage(job.usage)
    finally:
        job.cancel()
