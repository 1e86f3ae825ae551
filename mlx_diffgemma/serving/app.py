"""The routes: from HTTP to jobs of the engine and back.

    >>> app = create_app(engine, Settings(model="nano"))
    >>> uvicorn.run(app)
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import hashlib
import logging
import operator
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.utils import get_openapi
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest

from mlx_diffgemma.decide import Question, canvas_for, label_ids, unlikely
from mlx_diffgemma.drafting import DraftModel
from mlx_diffgemma.errors import ContextError, UserError
from mlx_diffgemma.grammar.budget import MAX_SECONDS, AbandonedError
from mlx_diffgemma.infill import LENGTHS, QUICK, Filling, Hole, check_options
from mlx_diffgemma.options import PENALTIES, GenerationOptions
from mlx_diffgemma.policy import Policy
from mlx_diffgemma.prompt import place, prepare_media
from mlx_diffgemma.request import Request, check_room, fresh_seed, token_limit
from mlx_diffgemma.serving import amounts, bodies
from mlx_diffgemma.serving.conversation import check_variables, template_messages
from mlx_diffgemma.serving.engine import BusyError, ClosedError, Engine, Job
from mlx_diffgemma.serving.jobs import (
    AnswerJob,
    Call,
    Choice,
    DecisionJob,
    Drafted,
    Ended,
    Event,
    Functions,
    InfillJob,
    Piece,
    Stops,
    Usage,
)
from mlx_diffgemma.serving.limits import BodyLimit, Counted, HostCheck, KeyCheck, Paths, Strictness, key_of
from mlx_diffgemma.serving.metrics import Metrics
from mlx_diffgemma.serving.preparation import Preparation
from mlx_diffgemma.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    DecisionQuestion,
    DecisionRequest,
    Message,
    Sampling,
)
from mlx_diffgemma.serving.responses import DONE, Envelope, decision_body, error_body, event, model_body, usage_body, warned
from mlx_diffgemma.tokenizer import chat_ids, encode_prompt
from mlx_diffgemma.trace import PAGE, Tracer

log = logging.getLogger(__name__)
T = TypeVar("T")
B = TypeVar("B", bound=BaseModel)
PATIENCE = 15.0  # seconds of silence after which a stream says that it is still there
LOCAL = ("127.0.0.1", "localhost", "::1", "host.docker.internal")  # the last is this machine as containers on it know it
TOLD = 300  # characters of a message in the log
BODIES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/decisions": DecisionRequest,
}
POLICY = ("default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; base-uri 'none'; "
          "form-action 'none'; frame-ancestors 'none'")


@dataclass(frozen=True)
class Settings:
    """``model``: the name it is served under.  ``defaults``: options of generations that a request may override.  ``api_key``: what
    requests must bring.  ``allowed_origins``: of web pages that may ask, besides our own.  ``allowed_hosts``: names by which the
    server may be called, any if empty or one of them is ``*``.  ``max_body`` in bytes.  ``allow_files``, ``allow_urls``: whether
    images may be paths on this machine, and remote.  ``compile_seconds``: that one constraint may take.  ``strict``: fields that
    are not known or have no effect are refused.  ``aliases``: further names of the model; ``any_model``: it answers to every
    name."""

    model: str
    defaults: dict[str, Any] = field(default_factory=dict)
    api_key: str | None = None
    allowed_origins: Sequence[str] = ()
    allowed_hosts: Sequence[str] = ()
    max_body: int = 32 * 2**20
    max_prompt_tokens: int | None = None
    allow_files: bool = False
    allow_urls: bool = False
    draft: DraftModel | None = None
    compile_seconds: float = MAX_SECONDS
    allow_control_tokens: bool = False  # read what looks like a control token in what users write as one
    strict: bool = False
    aliases: Sequence[str] = ()
    any_model: bool = False


def create_app(engine: Engine, settings: Settings) -> FastAPI:
    """The application in front of an ``engine`` that has been started."""
    server = _Server(engine, settings)
    app = FastAPI(title="mlx-diffgemma", description="DiffusionGemma over OpenAI's protocol.", docs_url=None, redoc_url=None,
                  redirect_slashes=False)
    app.state.close = server.close
    app.openapi = functools.partial(_document, app)  # type: ignore[method-assign]
    app.add_middleware(Strictness, strict=settings.strict)
    app.add_middleware(BodyLimit, limit=settings.max_body)
    if settings.api_key is not None:
        app.add_middleware(KeyCheck, key=settings.api_key)
    if settings.allowed_origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(settings.allowed_origins), allow_methods=["GET", "HEAD", "POST"],
                           allow_headers=["*"], expose_headers=["Retry-After"], allow_private_network=True)
    if settings.allowed_hosts and "*" not in settings.allowed_hosts:
        app.add_middleware(HostCheck, names=settings.allowed_hosts)
    app.add_middleware(Counted, count=lambda route, status: server.metrics.requests.labels(route, str(status)).inc())
    app.add_middleware(Paths)

    @app.exception_handler(RequestValidationError)
    async def invalid(http: HTTPRequest, error: RequestValidationError) -> JSONResponse:
        body = _invalid_body(error)
        _log_refusal(http, 400, body)
        return JSONResponse(body, 400)

    @app.exception_handler(HTTPException)
    async def refused(http: HTTPRequest, error: HTTPException) -> JSONResponse:
        message = {404: f"There is nothing at {http.url.path}.", 400: "The body is no JSON in UTF-8, or nested too deeply.",
                   405: f"{http.url.path} is not for {http.method}."}.get(error.status_code, error.detail)
        body = error_body(str(message))
        _log_refusal(http, error.status_code, body)
        return JSONResponse(body, error.status_code, error.headers)

    @app.exception_handler(UserError)
    async def user_error(http: HTTPRequest, error: UserError) -> JSONResponse:
        body = _error_body(error)
        _log_refusal(http, _status(error), body)
        return JSONResponse(body, _status(error), _headers(error))

    for kind in (BusyError, ClosedError, AbandonedError, _GoneError, _UnknownModelError):
        app.exception_handler(kind)(user_error)

    @app.exception_handler(Exception)
    async def failed(http: HTTPRequest, error: Exception) -> JSONResponse:
        log.error("%s failed", http.url.path, exc_info=error)
        return JSONResponse(_error_body(error), 500)

    shape = {"application/json": {"schema": ERROR_SCHEMA}}
    errors: dict[int | str, dict[str, Any]] = {status: {"description": text, "content": shape} for status, text in (
        (400, "What cannot be honoured, named"), (401, "No valid key"), (404, "Unknown model"), (413, "Body too large"),
        (408, "The body did not come"), (429, "The queue is full"), (500, "The model failed"), (503, "Shutting down"))}

    @app.post("/v1/chat/completions", responses=errors, response_model=None, openapi_extra=_told(ChatRequest))
    async def chat_completions(http: HTTPRequest) -> Response:
        return await server.chat(await server.read(ChatRequest, http), http)

    @app.post("/v1/completions", responses=errors, response_model=None, openapi_extra=_told(CompletionRequest))
    async def completions(http: HTTPRequest) -> Response:
        return await server.complete(await server.read(CompletionRequest, http), http)

    @app.post("/v1/decisions", responses=errors, response_model=None, openapi_extra=_told(DecisionRequest))
    async def decisions(http: HTTPRequest) -> Response:
        return await server.decide(await server.read(DecisionRequest, http), http)

    @app.head("/v1/models", include_in_schema=False)
    @app.get("/v1/models", responses={401: errors[401]})
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": server.models}

    @app.get("/v1/models/{name:path}", responses={401: errors[401], 404: errors[404]})
    async def model(name: str) -> dict[str, Any]:
        server.check_model(name)
        return server.model

    @app.head("/health", include_in_schema=False)
    @app.get("/health", responses={503: errors[503]})
    async def health() -> Response:
        figures = engine.figures
        return JSONResponse({"status": "ok" if engine.alive else "closing", "model": settings.model, "rows": figures.rows,
                             "waiting": figures.waiting}, 200 if engine.alive else 503)

    @app.get("/metrics", responses={401: errors[401]})
    async def metrics() -> Response:
        return Response(server.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> Response:
        return Response(status_code=204, headers={"Cache-Control": "max-age=86400"})

    @app.head("/", include_in_schema=False)
    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(PAGE / "index.html", headers={"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff",
                                                          "Cache-Control": "no-cache"})

    app.mount("/page", StaticFiles(directory=PAGE))
    return app


def _told(kind: type[BaseModel]) -> dict[str, Any]:
    """What the document says of a route's body, which is read by ``bodies``."""
    reference = {"$ref": f"#/components/schemas/{kind.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": reference}}}}


def _document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, made once."""
    if not app.openapi_schema:
        made = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        schemas = made.setdefault("components", {}).setdefault("schemas", {})
        for kind in BODIES.values():
            own = kind.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas |= own.pop("$defs", {})
            schemas[kind.__name__] = own
        app.openapi_schema = made
    return app.openapi_schema


def _log_refusal(http: HTTPRequest, status: int, body: dict[str, Any]) -> None:
    """One line, whatever the message holds."""
    error = body["error"]
    param = f" param {_line(error['param'])!r}:" if error["param"] else ""
    log.warning("%s %s: %d%s %s", http.method, _line(http.url.path), status, param, _line(error["message"], TOLD))


def _line(text: str, most: int = 100) -> str:
    """So many characters of what a client may have sent, none of which begins a line."""
    return ascii(text)[1:-1][:most]


ERROR_SCHEMA = {"type": "object", "required": ["error"], "properties": {"error": {
    "type": "object", "required": ["message", "type", "param", "code"], "properties": {
        "message": {"type": "string"}, "type": {"type": "string"}, "param": {"type": ["string", "null"]},
        "code": {"type": ["string", "null"]}}}}}


class _GoneError(RuntimeError):
    """The client does not wait for its answer any longer."""


class _UnknownModelError(RuntimeError):
    pass


class _Server:
    """What the routes do."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine, self.settings = engine, settings
        self.metrics = Metrics(engine)
        config = engine.model.config
        self.model = model_body(settings.model, int(time.time()), context_length=config.text.max_position_embeddings,
                                canvas_length=config.canvas_length, vision=config.vision is not None)
        served = settings.model
        self.models = [self.model, *(self.model | {"id": name} for name in settings.aliases)]
        self._names = set(map(_plain, (served, served.rstrip("/").rsplit("/", 1)[-1], "default", *settings.aliases)))
        # Templates, tokens, images and constraints of requests; the engine's own thread is for the model.
        self._preparation = Preparation(settings.compile_seconds)
        self._preparing = Counter[str]()  # requests by client, those in the patient lane not counted
        self._most_tokens = settings.max_prompt_tokens or config.text.max_position_embeddings

    @functools.cached_property
    def _longest_token(self) -> int:
        return amounts.longest_token(self.engine.tokenizer)

    def close(self) -> None:
        """Give up what is being prepared; from any thread."""
        self._preparation.close()

    async def read(self, kind: type[B], http: HTTPRequest) -> B:
        """The body of a request.  Errors: as of ``bodies.read``, and _GoneError where the client hangs up meanwhile."""

        async def off_loop(task: Callable[[], B]) -> B:
            # With what is set for this request, see Strictness.
            run = functools.partial(contextvars.copy_context().run, task)
            return await self._preparation.run(_client(http), lambda: False, run)

        try:
            return await bodies.read(http, kind, self.settings.max_body, cast(bodies.OffLoop, off_loop))
        except ClientDisconnect:
            raise _GoneError("The client has gone.") from None

    async def _is_heavy(self, http: HTTPRequest, texts: Any, messages: Sequence[Message] = ()) -> bool:
        """Whether a prompt of these ``texts``, with the images of ``messages``, takes much memory.

        Errors: ContextError for more text than fits, UserError for more pixels than a request may bring.
        """
        count = amounts.characters([texts, messages])
        amounts.check_text(count, self._most_tokens, self._longest_token)
        pixels = 0
        if amounts.has_images(messages):
            task = functools.partial(amounts.check_pixels, messages)
            pixels = await self._preparation.run(_client(http), lambda: False, task)
        return count > amounts.HEAVY_CHARACTERS or pixels > amounts.HEAVY_PIXELS

    def _scope(self, body: Sampling | DecisionRequest, http: HTTPRequest) -> bytes:
        """Whose prefixes a request may find: those with the same key, and the same salt where there is one."""
        salts = [getattr(body, name, None) or "" for name in ("cache_salt", "prompt_cache_key")]
        told = repr((key_of(http.scope), *salts)).encode("utf-8", "surrogatepass")
        return hashlib.sha256(told).digest()

    def check_model(self, name: str) -> None:
        if not self.settings.any_model and _plain(name) not in self._names:
            raise _UnknownModelError(f"The model {name!r} is not served here; {self.settings.model!r} is. Call it so, or start the "
                                     "server with --alias and this name, or with --any-model.")

    async def _prepared(self, http: HTTPRequest, is_heavy: bool, prepare: Callable[..., T], *given: Any) -> T:
        """What becomes of a request before it is submitted; one that ``is_heavy`` waits where few run at once.

        Errors: BusyError where the queue has no place for it, _GoneError where the client hangs up meanwhile.
        """
        client = _client(http)
        self.engine.check_queue(self._preparing.total(), client, self._preparing[client])
        gone = threading.Event()
        task = functools.partial(prepare, *given)
        work = asyncio.ensure_future(self._counted(client, gone.is_set, task, is_heavy))
        watching = asyncio.ensure_future(_disconnected(http))
        try:
            await asyncio.wait({work, watching}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise _GoneError("The client has gone.")
            return work.result()
        finally:
            gone.set()
            work.cancel()
            watching.cancel()

    async def _counted(self, client: str, abandoned: Callable[[], bool], task: Callable[[], T], is_heavy: bool) -> T:
        """Among those that are being prepared; what takes long holds no place of the queue meanwhile."""
        counted = True

        def leave() -> None:
            nonlocal counted
            self._preparing[client] -= counted
            if not self._preparing[client]:
                del self._preparing[client]
            counted = False

        def wait_longer() -> None:
            leave()
            self.engine.check_patience(len(self._preparation.patient.turns))

        self._preparing[client] += 1
        try:
            return await self._preparation.run(client, abandoned, task, wait_longer, is_heavy)
        finally:
            leave()

    # Chat

    async def chat(self, body: ChatRequest, http: HTTPRequest) -> Response:
        self.check_model(body.model)
        box = _Mailbox()
        amounts.check_tools(body.tools or ())
        heavy = await self._is_heavy(http, (), body.messages)
        choices = await self._prepared(http, heavy, self._chat_choices, body)
        envelope = Envelope("chat.completion", body.model)
        return await self._answer(body, http, box, choices, envelope)

    def _chat_choices(self, body: ChatRequest) -> list[Choice]:
        tokenizer = self.engine.tokenizer
        messages, images = template_messages(body.messages, self.settings.allow_files, self.settings.allow_urls)
        tools = [{"type": "function", "function": function.model_dump(exclude_none=True)} for function in body.called.values()]
        template = {name: value for name, value in (body.chat_template_kwargs or {}).items() if name != "enable_thinking"}
        check_variables(tokenizer, template)
        try:
            ids = chat_ids(tokenizer, messages, think=body.thinks, tools=tools or None,
                           allow_control_tokens=self.settings.allow_control_tokens, **template)
        except (TypeError, AttributeError) as error:
            if not template:
                raise
            raise UserError(f"chat_template_kwargs: the chat template cannot work with these ({error}).") from None
        functions = Functions({name: own.parameters for name, own in body.called.items()}) if body.called else None
        kind = Call if functions and body.forced else Choice
        return self._choices(body, ids, images, functions, kind, bool(body.logprobs), body.top_logprobs or 0)

    # Completions

    async def complete(self, body: CompletionRequest, http: HTTPRequest) -> Response:
        self.check_model(body.model)
        box, envelope = _Mailbox(), Envelope("text_completion", body.model)
        if body.suffix:
            return await self._infill(body, http, box, envelope)
        heavy = await self._is_heavy(http, body.prompt)
        choices = await self._prepared(http, heavy, lambda: self._choices(body, self._prompt(body), (), None, Choice,
                                                                          body.logprobs is not None, body.logprobs or 0))
        echo = (body.prompt if isinstance(body.prompt, str) else self.engine.tokenizer.decode(body.prompt)) if body.echo else ""
        return await self._answer(body, http, box, choices, envelope, echo)

    def _prompt(self, body: CompletionRequest) -> str | Sequence[int]:
        """The ids of a prompt, in whose text nothing is a control token unless the server allows it; one without text stays."""
        if isinstance(body.prompt, str) and body.prompt.strip():
            return encode_prompt(self.engine.tokenizer, body.prompt, literal=not self.settings.allow_control_tokens)
        return body.prompt

    async def _infill(self, body: CompletionRequest, http: HTTPRequest, box: _Mailbox, envelope: Envelope) -> Response:
        heavy = await self._is_heavy(http, [body.prompt, body.suffix, body.instruction])
        filling = await self._prepared(http, heavy, self._filling, body)
        job = InfillJob(filling, box.put)
        job.client, job.scope = _client(http), self._scope(body, http)
        job.warnings += body.notes
        if body.stream:
            self.engine.submit(job)  # a full queue is told before a stream begins
            return StreamingResponse(self._infill_stream(body, job, box, envelope), media_type="text/event-stream",
                                     headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        began = time.perf_counter()
        await self._run(job, http, box)
        self._count(job.usage, began)
        piece, more = _filled(body, job)
        return JSONResponse(envelope.whole(job.usage, choices=[envelope.choice(0, [piece])], **more))

    async def _infill_stream(self, body: CompletionRequest, job: InfillJob, box: _Mailbox, envelope: Envelope,
                             ) -> AsyncGenerator[str, None]:
        began = time.perf_counter()
        try:
            async for _ in box.events():
                yield ": still here\n\n"
            self._count(job.usage, began)
            piece, more = _filled(body, job)
            yield event(envelope.chunk([envelope.delta(piece)], **more))
            if body.stream_options and body.stream_options.include_usage:
                yield event(envelope.chunk(usage=usage_body(job.usage)))
        except Exception as error:  # the status has been sent, so the stream itself has to tell
            if _status(error) == 500:
                log.error("A stream failed", exc_info=error)
            yield event(_error_body(error))
        finally:
            job.cancel()
        yield DONE

    def _filling(self, body: CompletionRequest) -> Filling:
        engine = self.engine
        given = self.settings.defaults | body.options()
        given.pop("max_tokens", None)  # the server's own is for answers
        limit = body.max_tokens if body.max_tokens and body.max_tokens > 0 else LENGTHS[1]
        constraint = {name: given.pop(name) for name in ("regex", "choices") if name in given}
        given = {name: value for name, value in given.items() if name not in PENALTIES}  # which are noted
        options = GenerationOptions.from_keywords(check_options(given))
        fewest = body.min_tokens or LENGTHS[0]
        if fewest <= limit:  # it is an upper limit: a hole longer than a canvas is for those who ask for one
            limit = max(fewest, min(limit, engine.model.config.canvas_length))
        if fewest > limit:
            raise UserError(f"min_tokens {fewest} exceeds max_tokens {limit}.")
        filling = Filling(engine.model, engine.tokenizer, [str(body.prompt), str(body.suffix)],
                          [Hole((fewest, limit), **constraint)], body.instruction, options.policy(engine.model),
                          engine.prefill_step_size, fresh_seed() if options.seed is None else options.seed, QUICK)
        self._check_prompt(filling.most)
        check_room(engine.model, [filling.most])
        return filling

    # Both

    def _choices(self, body: Sampling, prompt: Any, images: Sequence[Any], functions: Functions | None, kind: type[Choice],
                 logprobs: bool, top_logprobs: int) -> list[Choice]:
        engine = self.engine
        given = self.settings.defaults | body.options()
        options = GenerationOptions.from_keywords(given)
        clamp = not self.settings.strict
        asked = Request.prepare(engine.model, engine.tokenizer, prompt, options, images=images, clamp=clamp)
        self._check_prompt(len(asked.ids))
        check_room(engine.model, [len(asked.ids)], 1, asked.patches)
        policy: Policy = options.policy(engine.model)
        if self.settings.draft and kind is Choice and not options.constraints and not options.penalties:
            policy = self.settings.draft.canvas(engine.model, policy)
        tracer, found = Tracer(engine.tokenizer, asked.eos_ids), []
        for index in range(body.n or 1):
            request = asked
            if index:
                request = Request.prepare(engine.model, engine.tokenizer, prompt, options, seed=asked.seed + index, images=images,
                                          clamp=clamp)
            if kind is Call:
                assert functions is not None
                request = functions.request(engine.model, engine.tokenizer, request)
            found.append(kind(index, request, policy, tracer, engine.tokenizer, functions, body.stops, logprobs, top_logprobs,
                              one_call=isinstance(body, ChatRequest) and body.parallel_tool_calls is False))
        found[0].warnings += body.notes
        if options.max_tokens is not None and options.max_tokens > asked.limit:
            found[0].warnings.append(f"max_tokens: {options.max_tokens:,} exceed the context behind this prompt; the limit is "
                                     f"{asked.limit:,}.")
        return found

    def _check_prompt(self, length: int) -> None:
        most = self.settings.max_prompt_tokens
        if most is not None and length > most:
            raise ContextError(f"The prompt has {length:,} tokens, and this server takes {most:,}; shorten it.")

    async def _answer(self, body: Sampling, http: HTTPRequest, box: _Mailbox, choices: list[Choice], envelope: Envelope,
                      echo: str = "") -> Response:
        options = body.stream_options
        jobs = [AnswerJob(choices, box.put, drafts=bool(options and options.include_drafts))]
        jobs[0].client, jobs[0].scope = _client(http), self._scope(body, http)
        self.engine.submit(jobs[0])  # a full queue is told before a stream begins
        if body.stream:
            return StreamingResponse(self._stream(body, _client(http), jobs, box, envelope, echo), media_type="text/event-stream",
                                     headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        pieces: list[list[Piece]] = [[] for _ in choices]
        async with box.until_gone(http), contextlib.aclosing(self._events(_client(http), jobs, box)) as events:
            async for one in events:
                if isinstance(one, Piece):
                    pieces[one.index].append(one)
        whole = [envelope.choice(index, own, echo) for index, own in enumerate(pieces)]
        warnings = warned(warning for choice in choices for warning in choice.warnings)
        return JSONResponse(envelope.whole(_usage(jobs), choices=whole, seed=choices[0].request.seed, **warnings))

    async def _stream(self, body: Sampling, client: str, jobs: list[AnswerJob], box: _Mailbox, envelope: Envelope, echo: str,
                      ) -> AsyncGenerator[str, None]:
        choices = jobs[0].choices
        calls, lengths, began = [0] * len(choices), [0] * len(choices), [False] * len(choices)
        usage = bool(body.stream_options and body.stream_options.include_usage)
        none: dict[str, Any] = {"usage": None} if usage else {}
        started = time.perf_counter()
        try:
            if echo:
                for index in range(len(choices)):
                    yield event(envelope.chunk([envelope.delta(Piece(index, echo))], **none))
                    lengths[index] = len(echo)
            async with contextlib.aclosing(self._events(client, jobs, box)) as events:
                async for one in events:
                    if one is None:
                        yield ": still here\n\n"
                    elif isinstance(one, Drafted):
                        frame = one.frame | {"seconds": round(time.perf_counter() - started, 4), "index": one.index}
                        yield event(envelope.chunk(diffusion=frame, **none))
                    elif isinstance(one, Piece):
                        delta = envelope.delta(one, calls[one.index], lengths[one.index], not began[one.index])
                        began[one.index] = True
                        calls[one.index] += len(one.calls)
                        lengths[one.index] += len(one.text)
                        told = {"seed": choices[0].request.seed} | warned(choices[one.index].warnings) if one.finish_reason else {}
                        yield event(envelope.chunk([delta], **told, **none))
            if usage:  # a chunk without choices is only for those who asked for it
                yield event(envelope.chunk(usage=usage_body(_usage(jobs))))
        except Exception as error:  # the status has been sent, so the stream itself has to tell
            if _status(error) == 500:
                log.error("A stream failed", exc_info=error)
            yield event(_error_body(error))
        yield DONE

    async def _events(self, client: str, jobs: list[AnswerJob], box: _Mailbox) -> AsyncGenerator[Event | None, None]:
        """Pieces and drafts of the one of ``jobs`` that was submitted, and of the calls that have to be made again, whose jobs are
        added; None for silence."""
        began, first = time.perf_counter(), True
        gone = threading.Event()
        try:
            async for one in box.events():
                if first and isinstance(one, Piece):
                    first = False
                    self.metrics.first.observe(time.perf_counter() - began)
                yield one
            for choice, place in [(own, place) for own in jobs[0].choices for place in own.broken]:
                last = place == choice.broken[-1]
                try:
                    task = functools.partial(choice.again, self.engine.model, place, last)
                    again = await self._preparation.run(client, gone.is_set, task)
                except UserError as error:
                    choice.warnings.append(f"A call could not be made again: {error}")
                    if last:
                        yield Piece(choice.index, finish_reason="tool_calls" if choice.called else "stop")
                    continue
                choice.called = True
                jobs.append(AnswerJob([again], box.put))
                jobs[-1].client, jobs[-1].scope = jobs[0].client, jobs[0].scope
                self.engine.submit(jobs[-1], again=True)
                async for one in box.events():
                    yield one
            self._count(_usage(jobs), began)
        finally:
            gone.set()
            jobs[-1].cancel()

    async def _run(self, job: Job, http: HTTPRequest, box: _Mailbox) -> None:
        """Submit ``job`` and wait for its end."""
        self.engine.submit(job)
        try:
            async with box.until_gone(http):
                async for _ in box.events():
                    pass
        finally:
            job.cancel()

    def _count(self, usage: Usage, began: float) -> None:
        self.metrics.count(usage)
        self.metrics.seconds.observe(time.perf_counter() - began)

    # Decisions

    async def decide(self, body: DecisionRequest, http: HTTPRequest) -> Response:
        self.check_model(body.model)
        box = _Mailbox()
        heavy = await self._is_heavy(http, (), body.messages)
        job = await self._prepared(http, heavy, self._decision, body, box)
        job.client, job.scope = _client(http), self._scope(body, http)
        began = time.perf_counter()
        await self._run(job, http, box)
        self._count(job.usage, began)
        envelope = Envelope("decisions", body.model)
        return JSONResponse(envelope.whole(job.usage, decisions=[decision_body(own) for own in job.decisions],
                                           **warned([*body.notes, *filter(None, map(unlikely, job.decisions))])))

    def _decision(self, body: DecisionRequest, box: _Mailbox) -> DecisionJob:
        model, tokenizer = self.engine.model, self.engine.tokenizer
        messages, images = template_messages(body.messages, self.settings.allow_files, self.settings.allow_urls)
        questions = [_question(own) for own in body.questions]
        labels = [label_ids(tokenizer, question) for question in questions]
        lengths = [canvas_for(model, own, body.canvas_length) for own in labels]
        media = prepare_media(images, model.config, body.image_tokens)
        ids, placed = place(chat_ids(tokenizer, messages, allow_control_tokens=self.settings.allow_control_tokens), media,
                            model.config.image_tokens, tokenizer)
        token_limit(len(ids), None, max(lengths), model.config.text.max_position_embeddings)
        self._check_prompt(len(ids))
        check_room(model, [len(ids)])
        return DecisionJob(ids, placed, questions, labels, lengths, body.reads, body.seed, box.put)


class _Mailbox:
    """Events from the engine's thread to the event loop."""

    def __init__(self) -> None:
        self._loop, self._events = asyncio.get_running_loop(), asyncio.Queue[Event]()

    def put(self, one: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is there to be told
            self._loop.call_soon_threadsafe(self._events.put_nowait, one)

    async def events(self) -> AsyncGenerator[Event | None, None]:
        """Up to the end of a job, None after each PATIENCE seconds of silence.  Errors: what the job ended with."""
        while True:
            try:
                one = await asyncio.wait_for(self._events.get(), PATIENCE)
            except asyncio.TimeoutError:
                yield None
                continue
            if isinstance(one, Ended):
                break
            yield one
        if one.error is not None:
            raise one.error

    @contextlib.asynccontextmanager
    async def until_gone(self, http: HTTPRequest) -> AsyncGenerator[None, None]:
        """Within, events end with a _GoneError when the client hangs up."""
        watching = asyncio.ensure_future(_disconnected(http))
        watching.add_done_callback(lambda done: None if done.cancelled() else self.put(Ended(_GoneError("The client has gone."))))
        try:
            yield
        finally:
            watching.cancel()


def _client(http: HTTPRequest) -> str:
    """Who asks, as far as shares are concerned: the address, since all that know the server's key have the same."""
    return http.client.host if http.client else ""


async def _disconnected(http: HTTPRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _usage(jobs: Sequence[AnswerJob]) -> Usage:
    """Of an answer, with the calls that were made again for it."""
    return functools.reduce(operator.add, (job.usage for job in jobs))


def _filled(body: CompletionRequest, job: InfillJob) -> tuple[Piece, dict[str, Any]]:
    """(The text of the hole up to the first of the stops, what else its answer tells)."""
    filling = job.filling
    text = Stops(body.stops).feed(filling.fills[0].text, last=True)
    more = {"seed": filling.seed, "unseen_tokens": filling.unseen} | warned(job.warnings)
    return Piece(0, text, finish_reason="stop"), more


def _plain(name: str) -> str:
    """The name of a model as Ollama's clients and others would write it too: in any case, and with the tag ``latest``."""
    return name.casefold().removesuffix(":latest")


def _question(asked: DecisionQuestion) -> Question:
    if asked.scale is not None:
        return Question.scale(asked.scale[0], asked.scale[1], asked.question, asked.template)
    if asked.labels is not None:
        return Question.choice(asked.labels, asked.question, asked.template)
    return Question.yes_no(asked.question, template=asked.template)


def _status(error: Exception) -> int:
    known = ((UserError, 400), (_UnknownModelError, 404), (BusyError, 429), (_GoneError, 499), (ClosedError, 503),
             (AbandonedError, 503))
    return next((status for kind, status in known if isinstance(error, kind)), 500)


def _headers(error: Exception) -> dict[str, str] | None:
    return {"Retry-After": str(error.retry_after)} if isinstance(error, BusyError) else None


def _error_body(error: Exception) -> dict[str, Any]:
    status = _status(error)
    if status == 500:  # what went wrong inside is for the log
        return error_body("The server failed at this request; its log says more.", "server_error", code="internal_error")
    kind = {429: "rate_limit_error", 503: "server_error"}.get(status, "invalid_request_error")
    code = {404: "model_not_found", 429: "queue_full", 503: "shutting_down"}.get(status)
    return error_body(str(error), kind, code="context_length_exceeded" if isinstance(error, ContextError) else code)


def _path(error: dict[str, Any], body: Any) -> tuple[list[str], int | None]:
    """(Fields and indices that lead to an error, where in its ``loc`` the branch of a union is named)."""
    path, branch = list[str](), None
    for depth, part in enumerate(error["loc"][1:], 1):
        if part in (body if isinstance(body, dict) else range(len(body)) if isinstance(body, list) else ()):
            body = body[part]
        elif error["type"] != "missing" or depth < len(error["loc"]) - 1:
            branch = depth if branch is None else branch
            continue
        path.append(str(part))
    return path, branch


def _invalid_body(error: RequestValidationError) -> dict[str, Any]:
    """Of the first thing that is wrong; ``param`` is the path of the field."""
    found = error.errors()
    first = found[0]
    path, branch = _path(first, error.body)
    if branch is not None:  # every branch of the union tells what is wrong; the one that was followed furthest is meant
        union = [one for one in found if one["loc"][:branch] == first["loc"][:branch]]
        first = max(union, key=lambda one: (len(_path(one, error.body)[0]), len(one["loc"]), not one["type"].endswith("_type")))
        path, _ = _path(first, error.body)
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = f"The field {path[-1]!r} is not known here; leave it out."
    elif first["type"] == "json_invalid":
        path, message = [], f"The body is not valid JSON: {first.get('ctx', {}).get('error', message)}."
    elif not path and first["type"] in ("model_attributes_type", "missing"):
        message = "The body must be a JSON object, sent with the header Content-Type: application/json."
    elif first["type"] == "value_error" and (name := message.partition(":")[0]).isidentifier():
        path.append(name)
    where = ".".join(path)
    return error_body(f"{where}: {message}" if where and not message.startswith(path[-1]) else message, param=where or None)
