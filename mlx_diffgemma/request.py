"""One prompt on its way to an answer: ``Request``, checked before the model runs, and the ``GenerationResponse`` it makes of each
canvas or token."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_diffgemma import cost
from mlx_diffgemma.autoregressive import CausalToken
from mlx_diffgemma.demands import Demands, Stretch
from mlx_diffgemma.device import check_memory
from mlx_diffgemma.draws import Draws
from mlx_diffgemma.errors import ContextError, UserError
from mlx_diffgemma.grammar.constraint import compile_constraint
from mlx_diffgemma.model import DiffusionGemma
from mlx_diffgemma.options import DEFAULT_TOKEN_LIMIT, GenerationOptions
from mlx_diffgemma.policy import Policy
from mlx_diffgemma.prompt import Medium, PlacedImage, place, prepare_media
from mlx_diffgemma.session import Canvas, Session
from mlx_diffgemma.tokenizer import ResponseParser, answer_part, encode_prompt, repeated
from mlx_diffgemma.video import VideoWarning

Prompt: TypeAlias = "str | Sequence[int] | mx.array"


class GenerationWarning(UserWarning):
    """Something the caller should see: a canvas that did not converge, an empty answer, a malformed tool call."""


@dataclass(frozen=True)
class GenerationResponse:
    """A piece of an answer: one canvas, or one token with ``mode="ar"``.

    mlx-lm's fields keep their meaning: ``text`` is the visible text this piece added, ``token`` its last token,
    ``generation_tokens`` and the rates count from the beginning, ``peak_memory`` is in GB, ``finish_reason`` is None until
    the end, then "stop", "length" or "empty" (the end token came first).  ``logprobs`` holds one log-probability a token,
    under the last step's scaled distribution (with ``mode="ar"`` the whole row [vocabulary] at temperature 1).

    Beyond them: ``tokens`` of this piece (the end token included), ``thought`` and ``tool_calls`` parsed out of the text,
    denoising ``steps`` of this canvas and the canvas ``rows`` they computed, ``judged``, the causal passes that a drafted
    canvas was judged by, ``tokens_per_forward`` so far (end token included; of steps and judges' passes, prefill and commits not
    counted), ``canvas_index``, whether the canvas ``converged``, ``retries`` it took, the ``seed``, and of a draft model's tokens
    so far how many it ``proposed`` and how many of these were ``accepted``.
    ``certificate`` names the rule under which a canvas converged ("stable-and-confident", "causal"…), None where it did not.
    Of a whole answer (``batch_generate``, ``generate --json``) ``converged`` means that all its canvases did; ``certificate`` is
    then the last one's, and None otherwise.
    """

    text: str
    token: int
    logprobs: Any
    from_draft: bool
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    peak_memory: float
    finish_reason: str | None = None
    tokens: tuple[int, ...] = ()
    thought: str = ""
    tool_calls: tuple[dict[str, Any], ...] = ()
    steps: int = 0
    judged: int = 0
    tokens_per_forward: float = 0.0
    canvas_index: int = 0
    converged: bool = True
    retries: int = 0
    rows: int = 0
    seed: int = 0
    proposed: int = 0
    accepted: int = 0
    certificate: str | None = None
    parts: tuple[GenerationResponse, ...] = ()  # the responses a whole answer of batch_generate was put together from

    @property
    def is_canvas(self) -> bool:
        """Whether it is one of canvases, not of tokens left to right; a drafted canvas may have taken no step."""
        return self.certificate is not None or not self.converged


@dataclass
class Request:
    """One prompt on its way to an answer: what was asked, and the bookkeeping from token ids to responses."""

    ids: list[int]
    limit: int
    seed: int
    parser: ResponseParser
    eos_ids: tuple[int, ...]
    opened: Callable[[], tuple[list[int], tuple[PlacedImage, ...]]]  # opens the images again
    images: tuple[PlacedImage, ...] = ()
    patches: int = 0  # of the largest image
    demands: Demands | None = None
    repeated: int = 0  # how many of the ids the next turn of a conversation repeats
    began: float = 0.0
    prefill_seconds: float = 0.0
    produced: int = 0  # tokens, end token included
    cut: int = 0  # tokens, cut at the limit, end token left out
    forwards: int = 0
    proposed: int = 0  # by a drafter, and how many of these were right
    accepted: int = 0
    anything: bool = False  # whether text or a call has come
    warn: Callable[[str], None] | None = None  # is told what the caller should see; None: as a GenerationWarning
    responses: list[GenerationResponse] = field(default_factory=list)

    @classmethod
    def prepare(cls, model: DiffusionGemma, tokenizer: TokenizerWrapper, prompt: Prompt, options: GenerationOptions,
                prefix: Sequence[int] = (), seed: int | None = None, images: Sequence[Medium] = (), clamp: bool = False) -> Request:
        """With ``clamp`` a max_tokens that does not fit the context becomes the largest that does.

        Errors: UserError for an empty prompt, ids out of the vocabulary, images without a place, or an answer that would pass
        the context."""
        ids = prompt_ids(model, tokenizer, prompt)

        def opened(asked: list[int] = ids) -> tuple[list[int], tuple[PlacedImage, ...]]:
            media = prepare_media(images, model.config, options.image_tokens)
            return place(asked, media, model.config.image_tokens, tokenizer)

        ids, placed = opened()
        length = 1 if options.mode == "ar" else model.config.canvas_length
        parser = ResponseParser(tokenizer)
        parser.feed(prefix)
        chosen = options.seed if seed is None else seed
        context, most = model.config.text.max_position_embeddings, options.max_tokens
        if clamp and most is not None:
            most = min(most, answer_room(len(ids), length, context))
        limit = token_limit(len(ids), most, length, context)
        eos_ids = model.config.generation.eos_token_ids
        demands = None
        if options.constraints:
            constraint = compile_constraint(tokenizer, model.config, **options.constraints)
            demands = Demands(eos_ids, limit, stretches=[Stretch(constraint, begun=tuple(answer_part(tokenizer, prefix)))])
        return cls(ids, limit, fresh_seed() if chosen is None else chosen, parser, eos_ids, opened,
                   placed, max((math.prod(p.image.grid) for p in placed), default=0), demands, repeated(tokenizer, ids))

    def draws(self, model: DiffusionGemma) -> Draws:
        return Draws(self.seed, model.config.text.vocab_size)

    def session(self, model: DiffusionGemma, policy: Policy, **given: Any) -> Session:
        """Of its canvases; ``given`` is what else ``Session`` takes."""
        return Session(model, self.ids, policy, self.draws(model), self.eos_ids, self.limit, images=self.images,
                       demands=self.demands, repeated=self.repeated, **given)

    def begin(self) -> None:
        self.began = time.perf_counter()

    def open(self) -> None:
        """Take up the images again that were let go.  Errors: UserError when they are not what they were."""
        if not self.patches or self.images:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", VideoWarning)  # told the first time
            ids, self.images = self.opened()
        if ids != self.ids:
            raise UserError("An image or video was changed after the batch began; leave the files as they are until it ends.")

    def add(self, tokens: Sequence[int], logprobs: Any, done: bool, canvas: Canvas | None = None, from_draft: bool = False,
            ) -> GenerationResponse:
        """The response for newly produced ``tokens`` (an end token, if any, is the last); ``done``: nothing follows."""
        ended = bool(tokens) and tokens[-1] in self.eos_ids
        visible = list(tokens[:-1] if ended else tokens)
        steps = canvas.steps if canvas else 0
        self.produced, self.forwards = self.produced + len(tokens), self.forwards + steps + (canvas.judged if canvas else 0)
        over = self.cut + len(visible) - self.limit
        if over > 0:
            visible, tokens, ended = visible[:-over], tokens[: len(visible) - over], False
        elif ended and self.cut + len(visible) == self.limit:
            tokens = tokens[:-1]  # the limit leaves no place for the end token, but the answer is whole
        self.cut += len(visible)
        delta = self.parser.feed(visible)
        text, thought, calls = delta.answer, delta.thought, delta.tool_calls
        if done:
            rest = self.parser.finish()
            text, thought = text + rest.answer, thought + rest.thought
        self.anything = self.anything or bool(text.strip() or calls)
        # A constraint can tell that nothing follows before an end token comes.
        whole = ended or (self.demands is not None and canvas is not None and canvas.ended)
        reason = None if not done else "length" if not whole else "stop" if self.anything else "empty"
        now, index = time.perf_counter(), len(self.responses) if canvas else 0
        if canvas:
            logprobs = logprobs[: len(tokens)]
        response = GenerationResponse(
            text=text, token=int(tokens[-1]) if tokens else -1, logprobs=logprobs, from_draft=from_draft,
            prompt_tokens=len(self.ids), prompt_tps=len(self.ids) / max(self.prefill_seconds, 1e-9),
            generation_tokens=min(self.cut + ended, self.limit),
            generation_tps=min(self.cut + ended, self.limit) / max(now - self.began - self.prefill_seconds, 1e-9),
            peak_memory=mx.get_peak_memory() / 1e9, finish_reason=reason, tokens=tuple(int(t) for t in tokens),
            thought=thought, tool_calls=calls, steps=steps, judged=canvas.judged if canvas else 0,
            tokens_per_forward=self.produced / self.forwards if self.forwards else 1.0,
            canvas_index=index, converged=canvas.converged if canvas else True, retries=canvas.retries if canvas else 0,
            rows=canvas.rows if canvas else 0, seed=self.seed, proposed=self.proposed, accepted=self.accepted,
            certificate=canvas.certificate if canvas else None,
        )
        # The causal mode's rows over the vocabulary are for the caller; keeping them would grow by a megabyte a token.
        self.responses.append(response if canvas else replace(response, logprobs=None))
        self._warn(response)
        return response

    def add_token(self, new: CausalToken, done: bool) -> GenerationResponse:
        session = new.session
        self.forwards, self.proposed, self.accepted = session.forwards, session.proposed, session.accepted
        return self.add([new.token], new.logprobs, done, from_draft=new.from_draft)

    def add_canvas(self, canvas: Canvas, done: bool) -> GenerationResponse:
        self.proposed, self.accepted = self.proposed + canvas.proposed, self.accepted + canvas.accepted
        return self.add(canvas.tokens.tolist(), canvas.logprobs, done, canvas)

    def whole(self) -> GenerationResponse:
        """All responses so far as one."""
        parts = self.responses
        return replace(
            parts[-1], text="".join(r.text for r in parts), thought="".join(r.thought for r in parts),
            tool_calls=tuple(call for r in parts for call in r.tool_calls), tokens=tuple(t for r in parts for t in r.tokens),
            steps=sum(r.steps for r in parts), judged=sum(r.judged for r in parts), rows=sum(r.rows for r in parts),
            retries=sum(r.retries for r in parts),
            converged=all(r.converged for r in parts),
            certificate=parts[-1].certificate if all(r.converged for r in parts) else None, parts=tuple(parts),
        )

    def _warn(self, response: GenerationResponse) -> None:
        found = list[str]()
        if not response.converged:
            attempts = f" in {response.retries + 1} attempts" if response.retries else ""
            found.append(f"Canvas {response.canvas_index} did not converge within {response.steps} denoising steps{attempts}; "
                         "its text may be faulty.")
        if response.finish_reason == "empty":
            found.append("The answer is empty: the end token came first; try another seed or a fuller prompt.")
        if response.finish_reason and self.parser.malformed:
            found.append(malformed_warning(self.parser.malformed))
        for message in found:
            if self.warn:
                self.warn(message)
            else:
                warnings.warn(message, GenerationWarning, stacklevel=4)


def fresh_seed() -> int:
    return int.from_bytes(os.urandom(4), "little")


def malformed_warning(malformed: Sequence[str]) -> str:
    return f"{len(malformed)} tool call(s) could not be parsed: {malformed[0]!r}."


def prompt_ids(model: DiffusionGemma, tokenizer: TokenizerWrapper, prompt: Prompt) -> list[int]:
    """Ids of a prompt, a marker for each image.  Errors: UserError for an empty prompt, or ids out of the vocabulary."""
    ids = encode_prompt(tokenizer, prompt) if isinstance(prompt, str) else [int(token) for token in np.array(prompt)]
    vocabulary = model.config.text.vocab_size
    if not ids or (isinstance(prompt, str) and not prompt.strip()):
        raise UserError("The prompt is empty; give at least one character.")
    if not all(0 <= token < vocabulary for token in ids):
        raise UserError(f"The prompt holds token ids outside 0 to {vocabulary - 1}; it was made with another tokenizer.")
    return ids


def answer_room(prompt: int, canvas_length: int, context: int) -> int:
    """How many tokens of whole canvases fit the ``context`` behind the ``prompt``.  Errors: ContextError where there are none."""
    room = (context - prompt) // canvas_length * canvas_length
    if room <= 0:
        raise ContextError(f"The prompt has {prompt:,} tokens and the context holds {context:,}, which leaves no room for an "
                           f"answer of one canvas ({canvas_length} tokens); shorten the prompt.")
    return room


def token_limit(prompt: int, max_tokens: int | None, canvas_length: int, context: int) -> int:
    """How many tokens an answer may have; whole canvases must fit the ``context`` behind the ``prompt``.

    Errors: ContextError when they do not.
    """
    room = answer_room(prompt, canvas_length, context)
    if max_tokens is None:
        return min(DEFAULT_TOKEN_LIMIT, room)
    if max_tokens > room:
        raise ContextError(f"max_tokens {max_tokens:,} does not fit: the prompt has {prompt:,} tokens and the context holds "
                           f"{context:,}, so at most {room:,} are possible.")
    return max_tokens


def check_room(model: DiffusionGemma, lengths: Sequence[int], batch_size: int = 1, patches: int = 0,
               prefill_step_size: int = cost.PREFILL_ROWS) -> None:
    """Refuse, before anything is allocated, what memory cannot hold.

    Args:
        lengths: tokens of each prompt.
        batch_size: how many answers run side by side; the longest prompts are counted.
        patches: of the largest image; 0 without images, and the vision tower's weights are then not counted, as they are
            read with the first image.
        prefill_step_size: rows of each prompt that go through one forward.

    Raises:
        UserError: weights, caches and the widest part of a forward do not fit this machine.
    """
    longest = sorted(lengths, reverse=True)[:batch_size] or [0]
    needed = cost.answers_bytes(model, longest, patches, prefill_step_size)
    many = len(longest) > 1
    size = f"{longest[0]:,} tokens"
    what = f"Running {len(longest)} prompts of up to {size} together" if many else f"A prompt of {size}"
    check_memory(needed, what, f"{'take fewer at once' if many else 'shorten it'}, or take a conversion with fewer bits")
