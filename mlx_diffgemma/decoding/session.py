"""One request that is answered by canvases: ids, cache, draws, policy and the canvas in progress.

A ``Session`` runs nothing.  :class:`mlx_diffgemma.decoding.loop.Loop` takes a denoising step of
many sessions in one forward and passes the outcome to each.  The session opens its canvases,
retries or commits them, and ends.  So the rows of one forward may be at different steps and
canvases, and a session may join or leave between any two steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_diffgemma.decoding.canvas_state import Attempts, CanvasState
from mlx_diffgemma.decoding.constraints import Demands
from mlx_diffgemma.decoding.prompt_cache import PromptCache
from mlx_diffgemma.decoding.records import Canvas, CanvasStep
from mlx_diffgemma.decoding.verifier import VerifyResult
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.media.prompt import ImageSpan, cache_key, next_chunk
from mlx_diffgemma.model.cache import ROOM, Cache
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.sampling.draws import Draws, DrawSource
from mlx_diffgemma.sampling.policy import ReferencePolicy
from mlx_diffgemma.sampling.protocols import Draft, Policy
from mlx_diffgemma.sampling.stopping import StopContext


class Session:
    """One answer in progress.

    Args:
        model: The model that will run it.  Only its config is read here.
        ids: The prompt, chat template included.
        policy: Starts, samples and stops each canvas.
        draws: The random numbers.  Parity checks and tests supply their own.
        eos_ids: Tokens that end the answer.
        max_tokens: Tokens of the answer.  Its canvases run whole; the caller cuts the text.
        canvas_length: Positions of a canvas; None: the checkpoint's.
        prompt_cache: Only the part of the prompt that it does not hold is encoded.
        images: The images of the prompt.
        demands: Fixed tokens and constraints that the canvases must satisfy.
        cache: Keys and values of the first of ``ids``.  The session takes it over and extends it.
        repeated: How many of ``ids`` the next turn of a conversation repeats, see
            :func:`mlx_diffgemma.text.tokenizer.repeated`.

    Raises:
        UserError: A drafter is combined with a ``prompt_cache`` (it needs the hidden states of the
            whole prompt), or with ``demands`` or penalties (it supports neither).

    Attributes:
        ids: All tokens read or written.
        pending: The ids that the cache does not hold yet.
        reused: How many of ``ids`` the cache held at the start.
        start: The position in the answer at which the current canvas begins.
        canvas: The canvas in progress; None between two canvases.
        attempts: What the attempts at the current canvas took.
        canvases: The finished canvases.
        draft: The drafter's own state.
        wants_next: Whether to keep ``next_logits``, [vocabulary] of the causal mode after ``ids``.
        wants_top: How many of the most probable tokens a stopped step names.
        verdict: What the causal mode last said about the text of this canvas.
        prefill_seconds: The time of encoding the prompt, shared with those encoded together with it.
    """

    def __init__(
        self,
        model: DiffusionGemma,
        ids: Sequence[int],
        policy: Policy,
        draws: DrawSource,
        eos_ids: Iterable[int],
        max_tokens: int,
        canvas_length: int | None = None,
        prompt_cache: PromptCache | None = None,
        images: Sequence[ImageSpan] = (),
        demands: Demands | None = None,
        cache: Cache | None = None,
        repeated: int = 0,
    ):
        _check_drafter(policy, prompt_cache, demands)
        config = model.config
        self.policy = policy
        self.draws = draws
        self.eos_ids = tuple(eos_ids)
        self.max_tokens = max_tokens
        self.full_length = canvas_length or config.canvas_length
        self.text_config = config.text
        self.demands = demands
        self.images = tuple(images)
        self.repeated = repeated
        self.ids = list(ids)
        self.prompt_cache = prompt_cache
        if prompt_cache:
            cache = prompt_cache.begin(model, cache_key(self.ids, self.images), self)
        self.use_cache(cache or Cache(config.text))
        self.start = 0
        self.canvas: CanvasState | None = None
        self.attempts = Attempts()
        self.canvases: list[Canvas] = []
        self.finished = False
        self.draft = policy.drafter.begin() if policy.drafter else None
        self.wants_next = policy.drafter is not None
        self.next_logits: mx.array | None = None
        self.wants_top = 0
        self.verdict: VerifyResult | None = None
        self.prefill_seconds = 0.0

    @classmethod
    def reading(cls, model: DiffusionGemma, ids: Sequence[int], **options: Any) -> Session:
        """A session that only encodes ``ids`` and writes nothing; ``options`` as in ``Session``."""
        session = cls(
            model,
            ids,
            ReferencePolicy.from_config(model.config.generation),
            Draws(0, model.config.text.vocab_size),
            (),
            1,
            **options,
        )
        session.finished = True
        return session

    @property
    def canvas_index(self) -> int:
        return len(self.canvases)

    @property
    def retry(self) -> int:
        """Attempts at the current canvas before this one."""
        return self.attempts.retry

    @property
    def step(self) -> int:
        """How many steps this attempt at the canvas has taken."""
        return self.canvas.step if self.canvas else 0

    # The prompt, and committed canvases: what the cache still has to read.

    def use_cache(self, cache: Cache) -> None:
        """Take over ``cache``, which holds the first of ``ids``.

        Call it only before any id is encoded.
        """
        self.cache = cache
        self.reused = cache.length
        self.pending: np.ndarray = np.array(self.ids[cache.length :], dtype=np.int32)

    @property
    def held_bytes(self) -> int:
        """Bytes that the session keeps between two steps."""
        return self.cache.nbytes + (self.canvas.nbytes if self.canvas else 0)

    def reserve(self) -> None:
        """Allocate the cache for all that is pending at once."""
        self.cache.reserve(self.cache.length + self.pending.size + ROOM)

    def chunk(self, most: int) -> int:
        """How many of the pending ids to encode next, about ``most``.

        With a ``prompt_cache`` the first chunk ends where the next turn will continue, since a
        snapshot is kept there.
        """
        size = next_chunk(self.pending.size, self.cache.length, self.images, most)
        ahead = self.repeated - self.cache.length if self.prompt_cache else 0
        return ahead if 1 < ahead < size else size

    def paused(self) -> None:
        """Keep a snapshot if the cache now ends where the next turn will continue."""
        if self.prompt_cache and self.pending.size and self.cache.length == self.repeated:
            self.prompt_cache.reached(cache_key(self.ids, self.images)[: self.repeated], self.cache)

    def encoded(self) -> None:
        """Note that the cache holds all that was pending."""
        self.pending = self.pending[:0]
        if self.prompt_cache:
            self.prompt_cache.reached(cache_key(self.ids, self.images), self.cache)

    # A canvas: opened, continued, tried again or committed.

    def open_canvas(self) -> CanvasState:
        """Start an attempt at the current canvas, from noise and pins."""
        wanted = self.policy.canvas_length(
            self.canvas_index, self.max_tokens - self.start, self.full_length
        )
        length = min(wanted, self.text_config.max_position_embeddings - len(self.ids))
        canvas = CanvasState(
            ids=mx.array(self._noise(length)),
            accepted=mx.zeros((length,), dtype=mx.bool_),
            history=(mx.full((length,), -1, dtype=mx.int32),) * self.policy.stability,
            length=length,
            free=length,
        )
        if self.demands:
            self.demands.open(self.start, length)
            canvas.ids = self.demands.pin(canvas.ids)
            canvas.accepted = self.demands.fixed
            canvas.free = self.demands.free
        penalties = getattr(self.policy.sampling, "penalties", None)
        if penalties:
            prompt = len(self.ids) - self.start
            canvas.adjustment = penalties.after(
                self.ids[:prompt], self.ids[prompt:], self.eos_ids, self.text_config.vocab_size
            )
        if not self.retry:
            self.verdict = None
        self.canvas = canvas
        return canvas

    def _noise(self, length: int) -> np.ndarray:
        return self.policy.initial_canvas(
            self.draws, self.canvas_index, self.retry, self.start, length
        )

    def use_draft(self, draft: Draft) -> None:
        """Continue the open canvas from what a drafter proposes."""
        assert self.canvas is not None
        self.attempts.passes += draft.passes
        self.canvas.use_draft(draft)

    def keep_verified_prefix(self) -> None:
        """Keep the tokens before the first one that the verifier rejected; the rest is noise."""
        assert self.canvas is not None
        assert self.verdict is not None
        assert self.policy.surprise_limit is not None
        surprises = np.array(self.verdict.surprises)
        rejected = np.flatnonzero(surprises > self.policy.surprise_limit)
        prefix = self.verdict.ids[: rejected[0]] if rejected.size else self.verdict.ids
        length = self.canvas.length
        noise = self._noise(length)
        ids = np.concatenate((prefix, noise[len(prefix) :]))
        self.canvas.ids = mx.array(ids.astype(np.int32))
        self.canvas.guess = None
        self.canvas.signal = None
        if prefix:
            guess = np.concatenate((prefix, np.full(length - len(prefix), -1)))
            self.canvas.guess = mx.array(guess.astype(np.int32))

    def observe(self, stop: bool, mean_entropy: float, end: int) -> StopContext:
        """Note what the host read of a step.

        Args:
            stop: The flag of the device's stop rule.
            mean_entropy: Nats.
            end: The position of the first end token in the argmax.
        """
        canvas = self.canvas
        assert canvas is not None
        self.attempts.steps += 1
        self.attempts.rows += canvas.ids.size
        canvas.entropies.append(mean_entropy)
        canvas.ends.append(end)
        canvas.stop_context = StopContext(
            self.canvas_index,
            self.retry,
            canvas.length,
            stop,
            canvas.entropies,
            canvas.ends,
            canvas.guess is not None,
            self.attempts.drafted,
        )
        return canvas.stop_context

    def note_verification(self, verdict: VerifyResult, rows: int = 0) -> None:
        """Note what the causal mode says of the text.

        Args:
            verdict: Its answer.
            rows: Rows of the pass that gave it; 0 where it had answered the same text before.
        """
        assert self.canvas is not None
        assert self.canvas.stop_context is not None
        surprise: float = verdict.surprises.max().item()
        self.verdict = verdict
        self.canvas.stop_context = replace(self.canvas.stop_context, surprise=surprise)
        self.attempts.verified += rows > 0
        self.attempts.verified_rows += rows

    def take(self, step: CanvasStep) -> None:
        """Continue from ``step``, try the canvas again, or commit it."""
        if step.rejected:
            self._retry(step)
        elif step.stopped:
            self._commit(step)
        else:
            self._continue(step)

    def _continue(self, step: CanvasStep) -> None:
        assert self.canvas is not None
        assert self.canvas.stop_context is not None
        rows = self.policy.trim_to(self.canvas.stop_context, step.canvas.size)
        self.canvas.take(step, rows)
        if self.demands and rows < step.canvas.size:
            self.demands.open(self.start, rows)

    def _retry(self, step: CanvasStep) -> None:
        assert self.canvas is not None
        # The session does not return to an empty canvas, nor to a draft that the watchdog or the
        # judge ended.
        if step.reason not in ("converged", "watchdog", "judge") and self.canvas.ends[-1]:
            self.attempts.rejected.append(step)
        drafted = self.canvas.guess is not None
        self.attempts.retry += 1
        self.open_canvas()
        if step.reason == "judge" and not self.attempts.drafted:
            self.keep_verified_prefix()
        self.attempts.drafted += drafted

    def _commit(self, step: CanvasStep) -> None:
        """Append the argmax to the answer; the next forward encodes it unless the answer ends."""
        argmax = np.array(step.argmax)
        ends = np.flatnonzero(np.isin(argmax, self.eos_ids))
        kept = argmax[: ends[0] + 1] if ends.size else argmax
        complete = self.demands.commit(kept) if self.demands else False
        guess = np.full(kept.size, -1) if step.draft is None else np.array(step.draft)[: kept.size]
        ended = ends.size > 0 or complete
        self.canvases.append(
            Canvas(
                tokens=kept,
                logprobs=np.array(step.logprob)[: kept.size],
                steps=self.attempts.steps,
                rows=self.attempts.rows,
                converged=step.reason == "converged",
                ended=ended,
                retries=self.attempts.retry,
                proposed=int((guess >= 0).sum()),
                accepted=int((guess == kept).sum()),
                certificate=step.certificate,
                passes=self.attempts.passes,
                judged=self.attempts.verified,
                judged_rows=self.attempts.verified_rows,
            )
        )
        self.pending = argmax
        self.canvas = None
        self.attempts = Attempts()
        self.ids += argmax.tolist()
        self.start += argmax.size
        self.finished = ended or self.start >= self.max_tokens


def _check_drafter(
    policy: Policy, prompt_cache: PromptCache | None, demands: Demands | None
) -> None:
    """Raise UserError if a drafter is combined with something that it does not support."""
    if not policy.drafter:
        return
    if prompt_cache:
        raise UserError("A prompt_cache does not keep what a drafter reads; leave one of them out.")
    if demands:
        raise UserError("A drafter knows nothing of pins and constraints; leave one of them out.")
    if getattr(policy.sampling, "penalties", None):
        raise UserError(
            "A drafter knows nothing of penalties and logit_bias; leave one of them out."
        )
