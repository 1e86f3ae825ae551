"""Sends answers to a prompt, whole or as a stream."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator

from fastapi.responses import JSONResponse, Response
from starlette.requests import Request as HTTPRequest

from mlx_diffgemma.serving.formats import AnswerStream, Ending
from mlx_diffgemma.serving.handlers.streaming import streamed
from mlx_diffgemma.serving.jobs.answer import AnswerJob, prepare_choices
from mlx_diffgemma.serving.jobs.events import Piece, StepEvent
from mlx_diffgemma.serving.mailbox import Mailbox
from mlx_diffgemma.serving.protocols.answer_body import AnswerBody
from mlx_diffgemma.serving.running_answer import RunningAnswer
from mlx_diffgemma.serving.server import Server
from mlx_diffgemma.serving.tasks import AnswerTask, Delivery


async def send_answer(
    server: Server, http: HTTPRequest, body: AnswerBody, task: AnswerTask
) -> Response:
    """Answer a request.

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
    choices = await server.intake.prepared(
        http, is_heavy, prepare_choices, server.engine, server.settings, task
    )
    choices[0].warnings[:0] = body.notes
    job = AnswerJob(choices, mailbox.put, drafts=body.delivery.drafts)
    server.sign(job, body, http)
    answer = RunningAnswer(server.engine, server.preparation, server.metrics, job, mailbox)
    echo = _echo(server, task)
    answer_format = body.answer_format()
    answer.submit()  # before a stream begins, so that a full queue has its own status
    if body.delivery.stream:
        stream = answer_format.stream(len(choices), null_usage=body.delivery.usage)
        return streamed(stream, _events(answer, stream, body.delivery, echo))
    pieces: list[list[Piece]] = [[] for _ in choices]
    async with (
        mailbox.until_gone(http),
        contextlib.aclosing(answer.events()) as events,
    ):
        async for event in events:
            if isinstance(event, Piece):
                pieces[event.index].append(event)
    warnings = [warning for choice in choices for warning in choice.warnings]
    ending = Ending(choices[0].request.seed, warnings)
    return JSONResponse(answer_format.body(pieces, answer.usage, ending, echo))


def _echo(server: Server, task: AnswerTask) -> str:
    """The prompt, if the answer repeats it; otherwise an empty text."""
    if not task.echo:
        return ""
    if isinstance(task.prompt, str):
        return task.prompt
    return str(server.engine.tokenizer.decode(task.prompt))


async def _events(
    answer: RunningAnswer, stream: AnswerStream, delivery: Delivery, echo: str
) -> AsyncGenerator[str, None]:
    started = time.perf_counter()
    choices = answer.choices
    if echo:
        for index in range(len(choices)):
            yield stream.piece(Piece(index, echo), None)
    async with contextlib.aclosing(answer.events()) as events:
        async for event in events:
            if event is None:
                yield stream.silence()
            elif isinstance(event, StepEvent):
                yield stream.step(event, time.perf_counter() - started)
            elif isinstance(event, Piece):
                ending = None
                if event.finish_reason:
                    ending = Ending(choices[0].request.seed, choices[event.index].warnings)
                yield stream.piece(event, ending)
    if delivery.usage:
        yield stream.usage(answer.usage)
