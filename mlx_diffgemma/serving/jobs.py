"""What the engine is asked to do: answers, holes in texts, decisions; each tells what becomes of it by events.

A job is made on a thread of the server, where everything that can be refused is; its rounds run on the engine's.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_diffgemma.cache import Cache
from mlx_diffgemma.decide import Decision, Labels, Question, decision_of, labels_in_turns
from mlx_diffgemma.demands import Demands, Stretch
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.grammar.budget import TooLongError
from mlx_diffgemma.grammar.checker import Checker, TooMuchWorkError
from mlx_diffgemma.grammar.constraint import compile_named
from mlx_diffgemma.infill import Filling
from mlx_diffgemma.model import DiffusionGemma
from mlx_diffgemma.policy import Policy
from mlx_diffgemma.prompt import PlacedImage
from mlx_diffgemma.request import GenerationResponse, Request, malformed_warning, token_limit
from mlx_diffgemma.serving.engine import Job
from mlx_diffgemma.session import Canvas, CanvasStep, Session
from mlx_diffgemma.tokenizer import TOOL_END, TOOL_START, ResponseParser, calls_as_json
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

    def __add__(self, other: Usage) -> Usage:
        """With what more was done for the same prompt."""
        return replace(self, completion=self.completion + other.completion, steps=self.steps + other.steps,
                       produced=self.produced + other.produced, forwards=self.forwards + other.forwards)


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
        # The one that is whole first ends the text, so that it does not matter in which pieces this comes.
        ends = [(place + len(stop), place) for stop in self.stops if (place := self._held.find(stop)) >= 0]
        if ends:
            self.found = True
            return self._held[: min(ends)[1]]
        keep = 0 if last else max((size for stop in self.stops for size in range(1, len(stop)) if self._held.endswith(stop[:size])),
                                  default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown


class Choice:
    """One of the answers to a prompt: from committed canvases to pieces.

    ``one_call``: the answer ends with its first call.  ``warnings`` are what the caller should see.
    """

    def __init__(self, index: int, request: Request, policy: Policy, tracer: Tracer, tokenizer: TokenizerWrapper,
                 functions: Functions | None = None, stops: Sequence[str] = (), logprobs: bool = False, top_logprobs: int = 0,
                 one_call: bool = False) -> None:
        self.index, self.request, self.policy, self.tracer, self.functions = index, request, policy, tracer, functions
        self.stops, self.logprobs, self.top_logprobs, self.one_call = Stops(stops), logprobs, top_logprobs, one_call
        self.broken: list[int] = []  # where calls begin that have to be made again, see ``Functions.broken``
        self.warnings: list[str] = []
        self.called = False
        self._tokenizer, self._shown = tokenizer, ResponseParser(tokenizer)
        self._waiting: deque[TokenLogprob] = deque()  # until all of their text has come
        self._length = self._told = 0  # characters of text, and of tokens whose log-probabilities have been told
        self.session: Session
        request.warn = self.warnings.append

    def begin(self, model: DiffusionGemma, cache: Cache | None) -> Session:
        """Its session, behind a prompt that ``cache`` holds already."""
        self.session = self.request.session(model, self.policy, cache=cache)
        self.session.wants_top = self.top_logprobs
        self.request.begin()
        return self.session

    @property
    def generated(self) -> int:
        """How many tokens have come so far."""
        return self.request.responses[-1].generation_tokens if self.request.responses else 0

    @property
    def tokens(self) -> list[int]:
        """Those that have come so far."""
        return [token for part in self.request.responses for token in part.tokens]

    def piece(self, step: CanvasStep) -> Piece:
        """What the canvas adds that was just committed by ``step``."""
        session, request = self.session, self.request
        request.prefill_seconds = session.prefill_seconds
        response = request.add_canvas(session.canvases[-1], session.finished)
        reason = "stop" if response.finish_reason == "empty" else response.finish_reason
        calls = [call for call in response.tool_calls if self.functions is None or self.functions.fits(call)]
        calls = calls[: 1 if self.one_call else None]
        self.called = self.called or bool(calls)
        if self.one_call and self.called:
            session.finished, reason = True, "stop"
        text = self.stops.feed(response.text, session.finished)
        if self.stops.found:
            session.finished, reason = True, "stop"
        elif reason == "stop" and self.functions and not (self.one_call and self.called):  # at the limit one may be cut off
            self.broken = self.functions.broken(self.tokens, self._tokenizer)[: 1 if self.one_call else None]
            if self.broken and request.parser.malformed:
                self.warnings.remove(malformed_warning(request.parser.malformed))
        if reason == "stop" and self.called:
            reason = "tool_calls"
        # A call that is made again ends the answer.
        return Piece(self.index, text, response.thought, tuple(calls), self._logprobs(response, step, text, bool(reason)),
                     None if self.broken else reason)

    def again(self, model: DiffusionGemma, begin: int, last: bool) -> Call:
        """In place of the call whose text began at ``begin`` of the answer; the ``last`` of them ends it.

        Errors: UserError where no call fits in the context, or in the limit of the answer.
        """
        assert self.functions is not None
        request = self.functions.again(model, self._tokenizer, self.request, self.tokens, begin)
        call = Call(self.index, request, self.policy, self.tracer, self._tokenizer)
        call.finish_reason, call.warnings = "tool_calls" if last else None, self.warnings
        request.warn = self.warnings.append
        return call

    def _logprobs(self, response: GenerationResponse, step: CanvasStep, text: str, last: bool) -> tuple[TokenLogprob, ...]:
        """Of the tokens whose text has come with ``text``; where a stop cut one, of that too."""
        if not self.logprobs:
            return ()
        shown = [place for place, token in enumerate(response.tokens) if self._shown.shows(token)]
        top = None if step.top is None else [np.array(own).tolist() for own in step.top]
        for place, piece in zip(shown, self.tracer.pieces([response.tokens[place] for place in shown]), strict=True):
            best = () if top is None else tuple((self.tracer.pieces([token])[0], value)
                                                for token, value in zip(top[0][place], top[1][place], strict=True))
            self._waiting.append(TokenLogprob(piece, float(response.logprobs[place]), best))
        self._length += len(text)
        found = list[TokenLogprob]()
        while self._waiting:
            end = self._told + len(self._waiting[0].text)
            if self._told >= self._length if self.stops.found else end > self._length and not last:
                break
            found.append(self._waiting.popleft())
            self._told = end
        return tuple(found)


class Call(Choice):
    """A call of one of some functions and nothing else, whose arguments are what it takes by construction.

    The prompt ends where the model would begin the call, and the end of the call ends the answer.
    """

    finish_reason: str | None = "tool_calls"

    def piece(self, step: CanvasStep) -> Piece:  # noqa: ARG002
        session = self.session
        response = self.request.add_canvas(session.canvases[-1], session.finished)
        if not session.finished:
            return Piece(self.index)
        assert response.finish_reason != "length", "a constrained answer ends within the limit"
        begin, end = Functions.markers(self._tokenizer)
        written = [token for token in self.tokens if token != end]
        calls = ResponseParser(self._tokenizer).feed([begin, *written, end]).tool_calls
        assert len(calls) == 1, "a constrained answer is a call"
        return Piece(self.index, calls=calls, finish_reason=self.finish_reason)


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
        self._checkers = {name: self._checker(name, schema) for name, schema in self.parameters.items()}

    @staticmethod
    def _checker(name: str, schema: Mapping[str, Any]) -> Checker:
        try:
            return Checker(schema)
        except TooLongError:
            raise
        except UserError as error:
            raise UserError(f"The parameters of the function {name!r} cannot be used: {error}") from None
        except RecursionError:
            raise UserError(f"The parameters of the function {name!r} are nested too deeply; write them with fewer "
                            "levels.") from None

    def fits(self, call: Mapping[str, Any]) -> bool:
        """Whether {name, arguments} is one of them with what it takes, by a bounded number of steps."""
        checker = self._checkers.get(str(call.get("name")))
        if checker is None or not isinstance(call.get("arguments"), dict):
            return False
        try:
            return checker.fits(call["arguments"])
        except TooMuchWorkError:  # it is made again under the schema, which then holds by construction
            return False

    def request(self, model: DiffusionGemma, tokenizer: TokenizerWrapper, asked: Request) -> Request:
        """As ``asked``, but for a ``Call`` of one of them.  Errors: UserError for parameters that cannot be guaranteed."""
        begin, _ = self.markers(tokenizer)
        return self._request(model, tokenizer, asked, [begin], list(self.parameters))

    def broken(self, tokens: Sequence[int], tokenizer: TokenizerWrapper) -> list[int]:
        """Where the texts of those calls begin in the ``tokens`` of an answer that cannot be read, or are not what a function
        takes."""
        parser, found, place = ResponseParser(tokenizer), list[int](), 0
        begin = tokenizer.get_vocab().get(TOOL_START)  # none: an answer holds no calls
        for behind, token in enumerate(tokens, 1):
            unread = len(parser.malformed)
            calls = parser.feed([token]).tool_calls
            if token == begin:
                place = behind
            elif len(parser.malformed) > unread or not all(map(self.fits, calls)):
                found.append(place)
        unread = len(parser.malformed)
        parser.finish()
        return [*found, place] if len(parser.malformed) > unread else found

    def again(self, model: DiffusionGemma, tokenizer: TokenizerWrapper, asked: Request, tokens: Sequence[int], begin: int,
              ) -> Request:
        """For a ``Call`` in place of the one whose text began at ``begin`` of the ``tokens`` answered to ``asked``: of the function
        it meant, if there is such a one, behind all that stood before."""
        meant = re.match(rf"\s*{CALL}\s*([\w.-]+)", tokenizer.decode(list(tokens[begin:])))
        return self._request(model, tokenizer, asked, tokens[:begin],
                             [meant[1]] if meant and meant[1] in self.parameters else list(self.parameters))

    def _request(self, model: DiffusionGemma, tokenizer: TokenizerWrapper, asked: Request, before: Sequence[int],
                 names: Sequence[str]) -> Request:
        """For a call of one of ``names`` behind the prompt and ``before``."""
        _, end = self.markers(tokenizer)
        constraint = compile_named(tokenizer, model.config, {CALL + name: self.parameters[name] for name in names}, end,
                                   as_json=calls_as_json(tokenizer))
        ids, text = [*asked.ids, *before], model.config.text
        limit = min(asked.limit, token_limit(len(ids), None, model.config.canvas_length, text.max_position_embeddings))
        return Request(ids, limit, asked.seed, ResponseParser(tokenizer), (end,), asked.opened, asked.images, asked.patches,
                       Demands((end,), limit, stretches=[Stretch(constraint)]))

    @staticmethod
    def markers(tokenizer: TokenizerWrapper) -> tuple[int, int]:
        begin, end = (tokenizer.get_vocab().get(marker) for marker in (TOOL_START, TOOL_END))
        if begin is None or end is None:
            raise UserError("This model has no tokens for calls of tools; leave the tools out.")
        return begin, end


class AnswerJob(Job):
    """Answers to one prompt, with their denoising steps where ``drafts`` asks for them."""

    def __init__(self, choices: Sequence[Choice], emit: Emit, drafts: bool = False) -> None:
        self.choices, self._emit, self._drafts = list(choices), emit, drafts
        self._by_session: dict[int, Choice] = {}
        self.reused = 0  # tokens of the prompt that were in the cache

    def rounds(self, model: DiffusionGemma) -> Iterator[Sequence[Session]]:
        first, cache = self.choices[0], None
        if len(self.choices) > 1 and not first.policy.drafter:  # the prompt is read once for all
            reader = Session.reading(model, first.request.ids, images=first.request.images,
                                     repeated=first.request.repeated)
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
        return Usage(len(self.choices[0].request.ids), sum(choice.generated for choice in self.choices), self.reused,
                     sum(canvas.steps for canvas in canvases), sum(len(canvas.tokens) for canvas in canvases), forwards)


class InfillJob(Job):
    """The holes of one text; ``filling`` holds the result."""

    def __init__(self, filling: Filling, emit: Emit) -> None:
        self.filling, self._emit, self._canvases = filling, emit, list[Canvas]()
        self.warnings: list[str] = []  # what the caller should see
        filling.warn = self.warnings.append

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
        read = yield from labels_in_turns(model, reader.cache, self._labels, self._lengths, self._reads, self._seed)
        self.decisions = [decision_of(question, own) for question, own in zip(self._questions, read, strict=True)]

    def done(self, error: Exception | None) -> None:
        self._emit(Ended(error))

    @property
    def usage(self) -> Usage:
        return Usage(len(self.ids), 0, self.reused, 0, 0, 0)
