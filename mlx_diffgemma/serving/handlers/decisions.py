"""The endpoint for decisions, which returns probabilities of labels."""

from __future__ import annotations

from fastapi.responses import JSONResponse, Response
from starlette.requests import Request as HTTPRequest

from mlx_diffgemma.generation.questions import unlikely
from mlx_diffgemma.serving.handlers.running import run
from mlx_diffgemma.serving.jobs.decision import DecisionJob, prepare_decision
from mlx_diffgemma.serving.mailbox import Mailbox
from mlx_diffgemma.serving.protocols.decisions import DecisionRequest
from mlx_diffgemma.serving.server import Server


async def send_decisions(server: Server, http: HTTPRequest, body: DecisionRequest) -> Response:
    """Answer the questions of a request.

    Args:
        server: the server.
        http: the request.
        body: its body.

    Raises:
        Exception: see ``errors.STATUS``.
    """
    mailbox = Mailbox()
    task = body.task()
    is_heavy = await server.intake.is_heavy(task, http)
    plan = await server.intake.prepared(
        http, is_heavy, prepare_decision, server.engine, server.settings, task
    )
    job = DecisionJob(plan, mailbox.put)
    server.sign(job, body, http)
    envelope = body.envelope()
    await run(server, http, job, mailbox)
    unlikely_labels = filter(None, map(unlikely, job.decisions))
    warnings = [*body.notes, *unlikely_labels]
    return JSONResponse(envelope.body(job.decisions, job.usage, warnings))
