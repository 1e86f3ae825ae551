"""``Request``: the state of one prompt while it is answered.

It makes the checks before the model runs, and the responses for each canvas or token.
"""

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

from mlx_diffgemma.decoding.autoregressive import CausalToken
from mlx_diffgemma.decoding.constraints import Demands, Stretch
from mlx_diffgemma.decoding.records import Canvas
from mlx_diffgemma.decoding.session import Session
from mlx_diffgemma.errors import GenerationWarning, UserError, VideoWarning
from mlx_diffgemma.generation.limits import answer_room, token_limit
from mlx_diffgemma.generation.options import GenerationOptions
from mlx_diffgemma.generation.response import GenerationResponse
from mlx_diffgemma.grammar.constraint import compile_constraint
from mlx_diffgemma.media.prompt import ImageSpan, Medium, expand_image_tokens, prepare_media
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.sampling.draws import Draws
from mlx_diffgemma.sampling.protocols import Policy
from mlx_diffgemma.text.parser import ResponseParser
from mlx_diffgemma.text.tokenizer import answer_part, encode_prompt, repeated

Prompt: TypeAlias = "str | Sequence[int] | mx.array"


@dataclass
class Request:
    """One prompt, and the state that turns its answer's token ids into responses.

    Attributes:
        opened: Opens the images again.
        patches: The patches of the largest image.
        repeated: How many of ``ids`` the next turn of a conversation repeats.
        produced: Tokens so far, end token included.
        cut: Tokens so far, cut at the limit and without the end token.
        proposed: Tokens that a drafter proposed.
        accepted: How many of these were accepted.
        anything: Whether there was any text or tool call so far.
        warn: Called with each warning; None: it becomes a GenerationWarning.
    """

    ids: list[int]
    limit: int
    seed: int
    parser: ResponseParser
    eos_ids: tuple[int, ...]
    opened: Callable[[], tuple[list[int], tuple[ImageSpan, ...]]]
    images: tuple[ImageSpan, ...] = ()
    patches: int = 0
    demands: Demands | None = None
    repeated: int = 0
    began: float = 0.0
    prefill_seconds: float = 0.0
    produced: int = 0
    cut: int = 0
    forwards: int = 0
    proposed: int = 0
    accepted: int = 0
    anything: bool = False
    warn: Callable[[str], None] | None = None
    responses: list[GenerationResponse] = field(default_factory=list)

    @classmethod
    def prepare(
        cls,
        model: DiffusionGemma,
        tokenizer: TokenizerWrapper,
        prompt: Prompt,
        options: GenerationOptions,
        prefix: Sequence[int] = (),
        seed: int | None = None,
        images: Sequence[Medium] = (),
        clamp: bool = False,
    ) -> Request:
        """Check a prompt and make its request.

        Args:
            model, tokenizer: From ``load``.
            prompt, prefix, images: As in ``stream_generate``.
            options: The options of the generation.
            seed: The seed.  None: that of ``options``.
            clamp: Reduce a max_tokens that does not fit the context to the largest that does.

        Raises:
            UserError: The prompt is empty, an id is not in the vocabulary, an image has no marker,
                or the answer would exceed the context.
        """
        ids = prompt_ids(model, tokenizer, prompt)

        def opened(asked: list[int] = ids) -> tuple[list[int], tuple[ImageSpan, ...]]:
            media = prepare_media(images, model.config, options.image_tokens)
            return expand_image_tokens(asked, media, model.config.image_tokens, tokenizer)

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
            demands = Demands(
                eos_ids,
                limit,
                stretches=[Stretch(constraint, begun=tuple(answer_part(tokenizer, prefix)))],
            )
        return cls(
            ids,
            limit,
            fresh_seed() if chosen is None else chosen,
            parser,
            eos_ids,
            opened,
            placed,
            max((math.prod(p.image.grid) for p in placed), default=0),
            demands,
            repeated(tokenizer, ids),
        )

    def draws(self, model: DiffusionGemma) -> Draws:
        return Draws(self.seed, model.config.text.vocab_size)

    def session(self, model: DiffusionGemma, policy: Policy, **given: Any) -> Session:
        """Make the session of the answer.  ``given`` holds further arguments of ``Session``."""
        return Session(
            model,
            self.ids,
            policy,
            self.draws(model),
            self.eos_ids,
            self.limit,
            images=self.images,
            demands=self.demands,
            repeated=self.repeated,
            **given,
        )

    def begin(self) -> None:
        self.began = time.perf_counter()

    def open(self) -> None:
        """Open the images again that were dropped from memory.

        Raises:
            UserError: A file has changed.
        """
        if not self.patches or self.images:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", VideoWarning)  # it was shown the first time
            ids, self.images = self.opened()
        if ids != self.ids:
            raise UserError(
                "An image or video was changed after the batch began; leave the files as they are until it ends."
            )

    def add(
        self,
        tokens: Sequence[int],
        logprobs: Any,
        done: bool,
        canvas: Canvas | None = None,
        from_draft: bool = False,
    ) -> GenerationResponse:
        """Make the response for newly produced tokens.

        Args:
            tokens: Ids; an end token, if any, is the last.
            logprobs: The log-probability of each token; with ``mode="ar"`` those of the vocabulary.
            done: Whether nothing follows.
            canvas: The canvas they come from; None with ``mode="ar"``.
            from_draft: Whether a drafter proposed the token.
        """
        self.produced += len(tokens)
        self.forwards += canvas.steps + canvas.judged if canvas else 0
        visible, tokens, ended = self._within_limit(tokens)
        self.cut += len(visible)
        text, thought, calls = self._parsed(visible, done)
        # A constraint can tell that nothing follows before an end token comes.
        whole = ended or bool(self.demands and canvas and canvas.ended)
        generated = min(self.cut + ended, self.limit)
        seconds = max(time.perf_counter() - self.began - self.prefill_seconds, 1e-9)
        response = GenerationResponse(
            text=text,
            token=int(tokens[-1]) if tokens else -1,
            logprobs=logprobs[: len(tokens)] if canvas else logprobs,
            from_draft=from_draft,
            prompt_tokens=len(self.ids),
            prompt_tps=len(self.ids) / max(self.prefill_seconds, 1e-9),
            generation_tokens=generated,
            generation_tps=generated / seconds,
            peak_memory=mx.get_peak_memory() / 1e9,
            finish_reason=self._finish_reason(whole) if done else None,
            tokens=tuple(int(t) for t in tokens),
            thought=thought,
            tool_calls=calls,
            tokens_per_forward=self.produced / self.forwards if self.forwards else 1.0,
            seed=self.seed,
            proposed=self.proposed,
            accepted=self.accepted,
        )
        if canvas:
            response = replace(
                response,
                steps=canvas.steps,
                judged=canvas.judged,
                canvas_index=len(self.responses),
                converged=canvas.converged,
                retries=canvas.retries,
                rows=canvas.rows,
                certificate=canvas.certificate,
            )
        # Only the caller keeps the causal mode's row over the vocabulary, a megabyte a token.
        self.responses.append(response if canvas else replace(response, logprobs=None))
        self._warn(response)
        return response

    def _parsed(self, visible: Sequence[int], done: bool) -> tuple[str, str, tuple[Any, ...]]:
        """The visible text, the thought and the tool calls that new tokens add."""
        delta = self.parser.feed(visible)
        text = delta.answer
        thought = delta.thought
        if done:
            rest = self.parser.finish()
            text += rest.answer
            thought += rest.thought
        self.anything = self.anything or bool(text.strip() or delta.tool_calls)
        return text, thought, delta.tool_calls

    def _within_limit(self, tokens: Sequence[int]) -> tuple[list[int], Sequence[int], bool]:
        """Cut new tokens at the limit of the answer.

        Returns:
            (the tokens without an end token, the tokens, whether an end token is among them).
        """
        ended = bool(tokens) and tokens[-1] in self.eos_ids
        visible = list(tokens[:-1] if ended else tokens)
        over = self.cut + len(visible) - self.limit
        if over > 0:
            return visible[:-over], tokens[: len(visible) - over], False
        if ended and self.cut + len(visible) == self.limit:
            # The limit leaves no room for the end token, but the answer is complete.
            tokens = tokens[:-1]
        return visible, tokens, ended

    def _finish_reason(self, complete: bool) -> str:
        if not complete:
            return "length"
        return "stop" if self.anything else "empty"

    def add_token(self, new: CausalToken, done: bool) -> GenerationResponse:
        session = new.session
        self.forwards, self.proposed, self.accepted = (
            session.forwards,
            session.proposed,
            session.accepted,
        )
        return self.add([new.token], new.logprobs, done, from_draft=new.from_draft)

    def add_canvas(self, canvas: Canvas, done: bool) -> GenerationResponse:
        self.proposed, self.accepted = (
            self.proposed + canvas.proposed,
            self.accepted + canvas.accepted,
        )
        return self.add(canvas.tokens.tolist(), canvas.logprobs, done, canvas)

    def whole(self) -> GenerationResponse:
        """All responses so far, joined to one."""
        parts = self.responses
        return replace(
            parts[-1],
            text="".join(r.text for r in parts),
            thought="".join(r.thought for r in parts),
            tool_calls=tuple(call for r in parts for call in r.tool_calls),
            tokens=tuple(t for r in parts for t in r.tokens),
            steps=sum(r.steps for r in parts),
            judged=sum(r.judged for r in parts),
            rows=sum(r.rows for r in parts),
            retries=sum(r.retries for r in parts),
            converged=all(r.converged for r in parts),
            certificate=parts[-1].certificate if all(r.converged for r in parts) else None,
            parts=tuple(parts),
        )

    def _warn(self, response: GenerationResponse) -> None:
        found = list[str]()
        if not response.converged:
            attempts = f" in {response.retries + 1} attempts" if response.retries else ""
            found.append(
                f"Canvas {response.canvas_index} did not converge within {response.steps} denoising steps{attempts}; "
                "its text may be faulty."
            )
        if response.finish_reason == "empty":
            found.append(
                "The answer is empty: the end token came first; try another seed or a fuller prompt."
            )
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
    """The ids of a prompt, with a marker for each image.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        prompt: Text or ids.

    Raises:
        UserError: The prompt is empty, or an id is not in the vocabulary.
    """
    ids = (
        encode_prompt(tokenizer, prompt)
        if isinstance(prompt, str)
        else [int(token) for token in np.array(prompt)]
    )
    vocabulary = model.config.text.vocab_size
    if not ids or (isinstance(prompt, str) and not prompt.strip()):
        raise UserError("The prompt is empty; give at least one character.")
    if not all(0 <= token < vocabulary for token in ids):
        raise UserError(
            f"The prompt holds token ids outside 0 to {vocabulary - 1}; it was made with another tokenizer."
        )
    return ids
