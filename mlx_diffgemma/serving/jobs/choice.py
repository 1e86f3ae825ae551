"""One answer to a prompt: turns committed canvases into pieces of text, thought and tool calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_diffgemma.decoding.records import CanvasStep
from mlx_diffgemma.decoding.session import Session
from mlx_diffgemma.generation.request import Request, malformed_warning
from mlx_diffgemma.generation.response import GenerationResponse
from mlx_diffgemma.generation.trace import Tracer
from mlx_diffgemma.model.cache import Cache
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.sampling.protocols import Policy
from mlx_diffgemma.serving.jobs.events import Piece, TokenLogprob
from mlx_diffgemma.serving.jobs.functions import Functions
from mlx_diffgemma.serving.jobs.logprobs import LogprobQueue
from mlx_diffgemma.serving.jobs.stops import Stops
from mlx_diffgemma.text.parser import ResponseParser


@dataclass(frozen=True)
class AnswerPlan:
    """What all choices of an answer share.

    ``functions`` are those that may be called, if any.  ``top_logprobs`` is the number of
    alternatives per token.  ``one_call`` says that the answer ends with its first call.
    """

    policy: Policy
    tracer: Tracer
    tokenizer: TokenizerWrapper
    functions: Functions | None = None
    stops: Sequence[str] = ()
    logprobs: bool = False
    top_logprobs: int = 0
    one_call: bool = False


class Choice:
    """One of the answers to a prompt.

    ``warnings`` are for the caller.  ``called`` says whether it has made a call.  ``broken`` holds
    the positions of calls that have to be made again, see ``Functions.broken``.
    """

    session: Session

    def __init__(self, index: int, request: Request, plan: AnswerPlan) -> None:
        self.index = index
        self.request = request
        self.plan = plan
        self.called = False
        self.broken: list[int] = []
        self.warnings: list[str] = []
        self._stops = Stops(plan.stops)
        self._logprobs = LogprobQueue(plan.tracer, plan.tokenizer) if plan.logprobs else None
        request.warn = self.warnings.append

    def begin(self, model: DiffusionGemma, cache: Cache | None) -> Session:
        """Make its session.  ``cache``, if there is one, already holds the prompt."""
        self.session = self.request.session(model, self.plan.policy, cache=cache)
        self.session.wants_top = self.plan.top_logprobs
        self.request.begin()
        return self.session

    @property
    def generated(self) -> int:
        """The number of tokens so far."""
        return self.request.responses[-1].generation_tokens if self.request.responses else 0

    @property
    def tokens(self) -> list[int]:
        """The tokens so far."""
        return [token for part in self.request.responses for token in part.tokens]

    def piece(self, step: CanvasStep) -> Piece:
        """The piece that the canvas adds which ``step`` has just committed."""
        session = self.session
        self.request.prefill_seconds = session.prefill_seconds
        response = self.request.add_canvas(session.canvases[-1], session.finished)
        reason = "stop" if response.finish_reason == "empty" else response.finish_reason
        calls = self._valid_calls(response)
        self.called = self.called or bool(calls)
        has_its_call = self.plan.one_call and self.called
        if has_its_call:
            session.finished = True
            reason = "stop"
        text = self._stops.feed(response.text, session.finished)
        if self._stops.found:
            session.finished = True
            reason = "stop"
        elif reason == "stop" and not has_its_call:
            self._find_broken()
        if reason == "stop" and self.called:
            reason = "tool_calls"
        logprobs: tuple[TokenLogprob, ...] = ()
        if self._logprobs is not None:
            self._logprobs.add(response, step)
            logprobs = self._logprobs.release(text, self._stops.found, bool(reason))
        # If a call is made again, that call ends the answer.
        reason = None if self.broken else reason
        return Piece(self.index, text, response.thought, calls, logprobs, reason)

    def _valid_calls(self, response: GenerationResponse) -> tuple[dict[str, object], ...]:
        functions = self.plan.functions
        calls = [call for call in response.tool_calls if functions is None or functions.fits(call)]
        return tuple(calls[: 1 if self.plan.one_call else None])

    def _find_broken(self) -> None:
        """Note the calls that have to be made again.  An answer cut off at its limit has none."""
        if self.plan.functions is None:
            return
        broken = self.plan.functions.broken(self.tokens, self.plan.tokenizer)
        self.broken = broken[: 1 if self.plan.one_call else None]
        malformed = self.request.parser.malformed
        if self.broken and malformed:
            self.warnings.remove(malformed_warning(malformed))

    def again(self, model: DiffusionGemma, begin: int, last: bool) -> Call:
        """Make a call to replace the broken one that begins at ``begin`` of the answer.

        Args:
            model: the model that answered.
            begin: one of ``broken``.
            last: whether this call ends the answer.

        Raises:
            UserError: no call fits in the context, or in the limit of the answer.
        """
        functions = self.plan.functions
        assert functions is not None
        request = functions.again(model, self.plan.tokenizer, self.request, self.tokens, begin)
        plan = AnswerPlan(self.plan.policy, self.plan.tracer, self.plan.tokenizer)
        call = Call(self.index, request, plan)
        call.finish_reason = "tool_calls" if last else None
        call.warnings = self.warnings
        request.warn = self.warnings.append
        return call


class Call(Choice):
    """An answer that is one call, whose arguments are valid by construction.

    The prompt ends where the model would begin the call.  The end of the call ends the answer.
    """

    finish_reason: str | None = "tool_calls"

    def piece(self, step: CanvasStep) -> Piece:  # noqa: ARG002
        session = self.session
        response = self.request.add_canvas(session.canvases[-1], session.finished)
        if not session.finished:
            return Piece(self.index)
        assert response.finish_reason != "length", "a constrained answer ends within the limit"
        begin, end = Functions.markers(self.plan.tokenizer)
        written = [token for token in self.tokens if token != end]
        calls = ResponseParser(self.plan.tokenizer).feed([begin, *written, end]).tool_calls
        assert len(calls) == 1, "a constrained answer is a call"
        return Piece(self.index, calls=calls, finish_reason=self.finish_reason)
