"""What the engine is asked to do: answers, holes in texts, decisions; each tells what becomes of it by events.

A job is made on a thread of the server, where everything that can be refused is; its rounds run on the engine's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import jsonschema
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_diffgemma.cache import Cache
from mlx_diffgemma.decide import BATCH_ROWS, Decision, Labels, Question, decision_of, read_labels
from mlx_diffgemma.demands import Demands, Stretch
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.grammar.constraint import compile_named
from mlx_diffgemma.infill import Filling
from mlx_diffgemma.model import DiffusionGemma
from mlx_diffgemma.policy import Policy
from mlx_diffgemma.prompt import PlacedImage
from mlx_diffgemma.request import GenerationResponse, Request
from mlx_diffgemma.serving.engine import Job
from mlx_diffgemma.session import Canvas, CanvasStep, Session
from mlx_diffgemma.tokenizer import TOOL_END, TOOL_START, ResponseParser
from mlx_diffgemma.trace import Tracer

CALL = "call:"  # what stands before a function's name
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}  # what a function takes that says nothing of it


@dataclass(frozen=True)
class TokenLogprob:
    """A token of the visible answer, its log-probability, and the most probable ones at its position with theirs."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """What a canvas added to choice ``index``: ``text`` that can be shown, ``calls`` {name, arguments}, and at the end the
    ``finish_reason``: "stop", "length", "tool_calls"."""

    index: int
    text: str = ""
    thought: str = ""
    calls: tuple[dict[str, Any], ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None


@dataclass(frozen=True)
class Usage:
    """Tokens of the prompt and of the answers, how many of the former were ``reused``; denoising ``steps``, and ``forwards`` of the
    canvas for so many tokens ``produced``."""

    prompt: int
    completion: int
    reused: int
    steps: int
    produced: int
    forwards: int


@dataclass(frozen=True)
class Drafted:
    """A denoising step of choice ``index``, as ``trace`` records it."""

    index: int
    frame: dict[str, Any]


@dataclass(frozen=True)
class Ended:
    """The job is over, with an ``error`` or without."""

    error: Exception | None = None


Event: TypeAlias = "Piece | Drafted | Ended"
Emit = Callable[[Event], None]


class Stops:
    """Text as it comes, up to the first of some ``stops``; what may be the begin of one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops, self._held, self.found = tuple(stops), "", False

    def feed(self, text: str, last: bool) -> str:
        if self.found:
            return ""
        self._held += text
        places = [place for stop in self.stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.found = True
            return self._held[: min(places)]
        keep = 0 if last else max((size for stop in self.stops for size in range(1, len(stop)) if self._held.endswith(stop[:size])),
                                  default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown


class Choice:
    """One of the answers to a prompt: from committed canvases to pieces."""

    def __init__(self, index: int, request: Request, policy: Policy, tracer: Tracer, tokenizer: TokenizerWrapper,
                 functions: Functions | None = None, stops: Sequence[str] = (), logprobs: bool = False, top_logprobs: int = 0,
                 ) -> None:
        self.index, self.request, self.policy, self.tracer, self.functions = index, request, policy, tracer, functions
        self.stops, self.logprobs, self.top_logprobs = Stops(stops), logprobs, top_logprobs
        self.broken: list[str] = []  # texts of calls whose arguments are not what their function takes
        self.warnings: list[str] = []
        self._shown, self._called = ResponseParser(tokenizer), False
        self.session: Session
        request.warn = self.warnings.append

    def begin(self, model: DiffusionGemma, cache: Cache | None) -> Session:
        """Its session, behind a prompt that ``cache`` holds already."""
        self.session = self.request.session(model, self.policy, cache=cache)
        self.session.wants_top = self.top_logprobs
        self.request.begin()
        return self.session

    @property
    def tokens(self) -> int:
        """How many have come so far."""
        return self.request.responses[-1].generation_tokens if self.request.responses else 0

    def piece(self, step: CanvasStep) -> Piece:
        """What the canvas adds that was just committed by ``step``."""
        session, request = self.session, self.request
        request.prefill_seconds = session.prefill_seconds
        response = request.add_canvas(session.canvases[-1], session.finished)
        text = self.stops.feed(response.text, session.finished)
        reason = "stop" if response.finish_reason == "empty" else response.finish_reason
        if self.stops.found:
            session.finished, reason = True, "stop"
        calls = []
        for call in response.tool_calls:
            if self.functions is None or self.functions.fits(call):
                calls.append(call)
            else:
                self.broken.append(f"{call.get('name')}{json.dumps(call.get('arguments'))}")
        if reason and self.functions:
            self.broken += request.parser.malformed
        self._called = self._called or bool(calls)
        if reason == "length":
            self.broken = []  # the limit cut it off
        if reason == "stop" and self._called:
            reason = "tool_calls"
        # A call that is made again ends the answer.
        return Piece(self.index, text, response.thought, tuple(calls), self._logprobs(response, step, text),
                     None if self.broken else reason)

    def _logprobs(self, response: GenerationResponse, step: CanvasStep, text: str) -> tuple[TokenLogprob, ...]:
        """Of the tokens that ``text`` is made of."""
        if not self.logprobs:
            return ()
        shown = [place for place, token in enumerate(response.tokens) if self._shown.shows(token)]
        pieces = self.tracer.pieces([response.tokens[place] for place in shown])
        top = None if step.top is None else [np.array(own).tolist() for own in step.top]
        found, length = list[TokenLogprob](), 0
        for place, piece in zip(shown, pieces, strict=True):
            if self.stops.found and length >= len(text):
                break
            length += len(piece)
            best = () if top is None else tuple((self.tracer.pieces([token])[0], value)
                                                for token, value in zip(top[0][place], top[1][place], strict=True))
            found.append(TokenLogprob(piece, float(response.logprobs[place]), best))
        return tuple(found)


class Call(Choice):
    """A call of one of some functions and nothing else, whose arguments are what it takes by construction.

    The prompt ends where the model would begin the call, and the end of the call ends the answer.
    """

    def piece(self, step: CanvasStep) -> Piece:  # noqa: ARG002
        session = self.session
        response = self.request.add_canvas(session.canvases[-1], session.finished)
        if not session.finished:
            return Piece(self.index)
        tokens = [token for part in self.request.responses for token in part.tokens if token not in self.request.eos_ids]
        text = "".join(self.tracer.pieces(tokens))
        name, brace, arguments = text.removeprefix(CALL).partition("{")
        assert response.finish_reason != "length", "a constrained answer ends within the limit"
        return Piece(self.index, calls=({"name": name, "arguments": json.loads(brace + arguments)},), finish_reason="tool_calls")


class Functions:
    """What may be called: the parameters, JSON schemas, of each function by its name.

    Errors: UserError for parameters that are no schema, or not one of an object.
    """

    def __init__(self, parameters: Mapping[str, Mapping[str, Any] | None]) -> None:
        self.parameters = {name: dict(schema or NOTHING) for name, schema in parameters.items()}
        for name, schema in self.parameters.items():
            schema.setdefault("type", "object")
            if schema["type"] != "object":
                raise UserError(f"The parameters of the function {name!r} are the schema of an object, not of {schema['type']!r}.")
            try:
                jsonschema.Draft202012Validator.check_schema(schema)
            except jsonschema.SchemaError as error:
                raise UserError(f"The parameters of the function {name!r} are no JSON schema: {error.message}") from None

    def fits(self, call: Mapping[str, Any]) -> bool:
        """Whether {name, arguments} is one of them with what it takes."""
        schema = self.parameters.get(str(call.get("name")))
        if schema is None or not isinstance(call.get("arguments"), dict):
            return False
        return bool(jsonschema.Draft202012Validator(schema).is_valid(call["arguments"]))

    def request(self, model: DiffusionGemma, tokenizer: TokenizerWrapper, asked: Request) -> Request:
        """As ``asked``, but for a ``Call`` of one of them.  Errors: UserError for parameters that cannot be guaranteed."""
        begin, end = (tokenizer.get_vocab().get(marker) for marker in (TOOL_START, TOOL_END))
        if begin is None or end is None:
            raise UserError("This model has no tokens for calls of tools; leave the tools out.")
        constraint = compile_named(tokenizer, model.config, {CALL + name: schema for name, schema in self.parameters.items()}, end)
        ids = [*asked.ids, begin]
        return replace(asked, ids=ids, eos_ids=(end,), parser=ResponseParser(tokenizer), responses=[], warn=None,
                       demands=Demands((end,), asked.limit, stretches=[Stretch(constraint)]))


class AnswerJob(Job):
    """Answers to one prompt, with their denoising steps where ``drafts`` asks for them."""

    def __init__(self, choices: Sequence[Choice], emit: Emit, drafts: bool = False) -> None:
        self.choices, self._emit, self._drafts = list(choices), emit, drafts
        self._by_session: dict[int, Choice] = {}
        self.reused = 0  # tokens of the prompt that were in the cache

    def rounds(self, model: DiffusionGemma) -> Iterator[Sequence[Session]]:
        first, cache = self.choices[0], None
        if len(self.choices) > 1 and not first.policy.drafter:  # the prompt is read once for all
            reader = Session.reading(model, first.request.ids, images=first.request.images)
            yield [reader]
            cache, self.reused = reader.cache, reader.reused
        self._by_session = {id(choice.begin(model, cache and cache.copy())): choice for choice in self.choices}
        yield [choice.session for choice in self.choices]

    def step(self, session: Session, step: CanvasStep) -> None:
        choice = self._by_session[id(session)]
        if len(self.choices) == 1:
            self.reused = session.reused
        if self._drafts:
            self._emit(Drafted(choice.index, choice.tracer.frame(step)))
        if step.committed:
            self._emit(choice.piece(step))

    def done(self, error: Exception | None) -> None:
        self._emit(Ended(error))

    @property
    def usage(self) -> Usage:
        """Of all choices."""
        canvases = [canvas for choice in self.choices if self._by_session for canvas in choice.session.canvases]
        forwards = sum(canvas.steps + canvas.judged for canvas in canvases)
        return Usage(len(self.choices[0].request.ids), sum(choice.tokens for choice in self.choices), self.reused,
                     sum(canvas.steps for canvas in canvases), sum(len(canvas.tokens) for canvas in canvases), forwards)


class InfillJob(Job):
    """The holes of one text; ``filling`` holds the result."""

    def __init__(self, filling: Filling, emit: Emit) -> None:
        self.filling, self._emit, self._canvases = filling, emit, list[Canvas]()

    def rounds(self, model: DiffusionGemma) -> Iterator[Sequence[Session]]:  # noqa: ARG002
        return self.filling.rounds()

    def step(self, session: Session, step: CanvasStep) -> None:
        if step.committed:
            self._canvases.append(session.canvases[-1])

    def done(self, error: Exception | None) -> None:
        self._emit(Ended(error))

    @property
    def usage(self) -> Usage:
        """Of all that was tried; completion tokens are those that were filled in."""
        given = self.filling.begin + sum(map(len, self.filling.parts))
        return Usage(given, sum(len(fill.tokens) for fill in self.filling.fills), 0, sum(c.steps for c in self._canvases),
                     sum(len(c.tokens) for c in self._canvases), sum(c.steps for c in self._canvases))


class DecisionJob(Job):
    """Questions about one prompt, read off canvases behind it."""

    def __init__(self, ids: Sequence[int], images: Sequence[PlacedImage], questions: Sequence[Question], labels: Sequence[Labels],
                 lengths: Sequence[int], reads: int, seed: int, emit: Emit) -> None:
        self.ids, self._images, self._questions, self._labels, self._lengths = list(ids), images, questions, labels, lengths
        self._reads, self._seed, self._emit, self.reused = reads, seed, emit, 0
        self.decisions: list[Decision] = []

    def rounds(self, model: DiffusionGemma) -> Iterator[Sequence[Session]]:
        reader = Session.reading(model, self.ids, images=self._images)
        yield [reader]
        self.reused = reader.reused
        read = read_labels(model, reader.cache, self._labels, self._lengths, self._reads, self._seed, BATCH_ROWS)
        self.decisions = [decision_of(question, own) for question, own in zip(self._questions, read, strict=True)]

    def done(self, error: Exception | None) -> None:
        self._emit(Ended(error))

    @property
    def usage(self) -> Usage:
        return Usage(len(self.ids), 0, self.reused, 0, 0, 0)
