"""Answers to one prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from mlx_diffgemma.decoding.job import Job
from mlx_diffgemma.decoding.records import CanvasStep
from mlx_diffgemma.decoding.session import Session
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.generation.limits import check_room
from mlx_diffgemma.generation.options import GenerationOptions
from mlx_diffgemma.generation.request import Request
from mlx_diffgemma.generation.trace import Tracer
from mlx_diffgemma.media.prompt import Medium, prepare_media
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.sampling.protocols import Policy
from mlx_diffgemma.serving.conversation import template_messages
from mlx_diffgemma.serving.engine import Engine
from mlx_diffgemma.serving.jobs.choice import AnswerPlan, Call, Choice
from mlx_diffgemma.serving.jobs.events import Emit, Ended, StepEvent, Usage
from mlx_diffgemma.serving.jobs.functions import Functions
from mlx_diffgemma.serving.settings import Settings
from mlx_diffgemma.serving.tasks import AnswerTask, Conversation
from mlx_diffgemma.text.tokenizer import chat_ids, encode_prompt
from mlx_diffgemma.text.variables import check_variables


class AnswerJob(Job):
    """Writes ``choices``, all of them answers to the same prompt.

    ``drafts`` says whether to report every denoising step.  ``reused`` counts prompt tokens that
    were cached.
    """

    def __init__(self, choices: Sequence[Choice], emit: Emit, drafts: bool = False) -> None:
        self.choices = list(choices)
        self.reused = 0
        self._emit = emit
        self._drafts = drafts
        self._by_session: dict[int, Choice] = {}

    def rounds(self, model: DiffusionGemma) -> Iterator[Sequence[Session]]:
        first = self.choices[0]
        cache = None
        if len(self.choices) > 1 and not first.plan.policy.drafter:
            # The prompt is encoded once for all choices.
            reader = Session.reading(
                model,
                first.request.ids,
                images=first.request.images,
                repeated=first.request.repeated,
            )
            yield [reader]
            cache = reader.cache
            self.reused = reader.reused
        self._by_session = {
            id(choice.begin(model, cache and cache.copy())): choice for choice in self.choices
        }
        yield [choice.session for choice in self.choices]

    def step(self, session: Session, step: CanvasStep) -> None:
        choice = self._by_session[id(session)]
        if len(self.choices) == 1:
            self.reused = session.reused
        if self._drafts:
            self._emit(StepEvent(choice.index, choice.plan.tracer.frame(step)))
        if step.committed:
            self._emit(choice.piece(step))

    def done(self, error: Exception | None) -> None:
        self._emit(Ended(error))

    @property
    def usage(self) -> Usage:
        """The cost of all choices."""
        canvases = [
            canvas
            for choice in self.choices
            if self._by_session
            for canvas in choice.session.canvases
        ]
        return Usage(
            prompt=len(self.choices[0].request.ids),
            completion=sum(choice.generated for choice in self.choices),
            reused=self.reused,
            steps=sum(canvas.steps for canvas in canvases),
            produced=sum(len(canvas.tokens) for canvas in canvases),
            forwards=sum(canvas.steps + canvas.judged for canvas in canvases),
        )


def prepare_choices(engine: Engine, settings: Settings, task: AnswerTask) -> list[Choice]:
    """Make the choices of an answer, ready to run.

    Args:
        engine: the engine with the model.
        settings: the settings of the server.
        task: what the request asks for.

    Raises:
        UserError: the task cannot be done.
    """
    model = engine.model
    tokenizer = engine.tokenizer
    prompt, images = _prompt(engine, settings, task)
    functions = _functions(task)
    kind = Call if functions and task.tool_use.forced else Choice
    options = GenerationOptions.from_keywords(settings.defaults | dict(task.options))
    media = prepare_media(images, model.config, options.image_tokens)  # once for all choices

    def prepare(seed: int | None = None) -> Request:
        return Request.prepare(
            model,
            tokenizer,
            prompt,
            options,
            seed=seed,
            images=media,
            clamp=not settings.strict,
        )

    first = prepare()
    settings.check_prompt(len(first.ids))
    check_room(model, [len(first.ids)], 1, first.patches)
    plan = AnswerPlan(
        _policy(engine, settings, options, kind),
        Tracer(tokenizer, first.eos_ids),
        tokenizer,
        functions,
        task.stops,
        task.logprobs,
        task.top_logprobs,
        task.tool_use.one_call,
    )
    choices = []
    for index in range(task.n):
        request = prepare(first.seed + index) if index else first
        if kind is Call:
            assert functions is not None
            request = functions.request(model, tokenizer, request)
        choices.append(kind(index, request, plan))
    if options.max_tokens is not None and options.max_tokens > first.limit:
        choices[0].warnings.append(
            f"max_tokens: {options.max_tokens:,} exceed the context behind this prompt; the limit "
            f"is {first.limit:,}."
        )
    return choices


def _prompt(
    engine: Engine, settings: Settings, task: AnswerTask
) -> tuple[str | Sequence[int], Sequence[Medium]]:
    """The token ids and the images of a prompt.  A text without visible characters stays a text."""
    if isinstance(task.prompt, Conversation):
        return _conversation(engine, settings, task.prompt)
    if isinstance(task.prompt, str) and task.prompt.strip():
        literal = not settings.allow_control_tokens
        return encode_prompt(engine.tokenizer, task.prompt, literal=literal), ()
    return task.prompt, ()


def _conversation(
    engine: Engine, settings: Settings, conversation: Conversation
) -> tuple[Sequence[int], Sequence[Medium]]:
    messages, images = template_messages(
        conversation.messages, settings.allow_files, settings.allow_urls
    )
    tools = [
        {"type": "function", "function": function.model_dump(exclude_none=True)}
        for function in conversation.tool_use.callable.values()
    ]
    variables: dict[str, Any] = dict(conversation.variables)
    check_variables(engine.tokenizer, variables)
    try:
        ids = chat_ids(
            engine.tokenizer,
            messages,
            think=conversation.think,
            tools=tools or None,
            allow_control_tokens=settings.allow_control_tokens,
            **variables,
        )
    except (TypeError, AttributeError) as error:
        if not variables:
            raise
        raise UserError(
            f"chat_template_kwargs: the chat template cannot work with these ({error})."
        ) from None
    return ids, images


def _functions(task: AnswerTask) -> Functions | None:
    functions = task.tool_use.callable
    if not functions:
        return None
    return Functions({name: function.parameters for name, function in functions.items()})


def _policy(
    engine: Engine, settings: Settings, options: GenerationOptions, kind: type[Choice]
) -> Policy:
    """The policy of the options, with the draft model if it supports the request.

    Args:
        engine: the engine with the model.
        settings: the settings of the server.
        options: the options of the request.
        kind: the kind of its choices.
    """
    policy: Policy = options.policy(engine.model)
    if settings.draft is None or kind is not Choice:
        return policy
    if options.constraints or options.penalties:
        return policy
    return settings.draft.canvas(engine.model, policy)
