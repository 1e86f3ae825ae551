"""The routes that run the model.

To add a protocol, write a module with its body, an ``AnswerBody``, and its ``AnswerFormat``, and add
the body to ENDPOINTS.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fastapi import FastAPI
from fastapi.responses import Response
from starlette.requests import Request as HTTPRequest

from mlx_diffgemma.serving.amounts import check_tools
from mlx_diffgemma.serving.documentation import body_reference
from mlx_diffgemma.serving.error_handlers import ERRORS
from mlx_diffgemma.serving.handlers.answers import send_answer
from mlx_diffgemma.serving.handlers.decisions import send_decisions
from mlx_diffgemma.serving.handlers.infill import send_filling
from mlx_diffgemma.serving.protocols.answer_body import AnswerBody
from mlx_diffgemma.serving.protocols.decisions import DecisionRequest
from mlx_diffgemma.serving.protocols.openai_chat import ChatRequest
from mlx_diffgemma.serving.protocols.openai_completions import CompletionRequest
from mlx_diffgemma.serving.server import Server
from mlx_diffgemma.serving.tasks import InfillTask

# For each path: the name of the operation in the OpenAPI document, and the body.
ENDPOINTS: dict[str, tuple[str, type[AnswerBody] | type[DecisionRequest]]] = {
    "/v1/chat/completions": ("chat_completions", ChatRequest),
    "/v1/completions": ("completions", CompletionRequest),
    "/v1/decisions": ("decisions", DecisionRequest),
}


def add_generation(app: FastAPI, server: Server) -> None:
    for path, (name, kind) in ENDPOINTS.items():
        app.add_api_route(
            path,
            _endpoint(server, kind),
            name=name,
            methods=["POST"],
            responses=ERRORS,
            response_model=None,
            openapi_extra=body_reference(kind),
        )


def _endpoint(
    server: Server, kind: type[AnswerBody] | type[DecisionRequest]
) -> Callable[[HTTPRequest], Awaitable[Response]]:
    async def endpoint(http: HTTPRequest) -> Response:
        body = await server.intake.read(kind, http)
        server.models.check(body.model)
        if isinstance(body, DecisionRequest):
            return await send_decisions(server, http, body)
        task = body.task()
        if isinstance(task, InfillTask):
            return await send_filling(server, http, body, task)
        check_tools(task.tool_use.tools)
        return await send_answer(server, http, body, task)

    return endpoint
