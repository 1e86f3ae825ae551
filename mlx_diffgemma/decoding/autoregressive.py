"""Autoregressive decoding (``mode="ar"``): the causal mode of the same weights, left to right.

It is greedy or sampled, with or without a drafter.  Position p of an answer is drawn with the ``u``
of (canvas 0, step 0, position p).  So a seed gives the same answer in any batch.

This is speculative decoding when there is a drafter.  One forward reads several positions: the last
token and the proposal for the tokens after it.  The target draws every position with its own ``u``
from its own distribution.  A proposed token is accepted if it equals the token that was drawn.  All
tokens after the first rejected one are dropped.  So decoding with and without a drafter gives the
same tokens for the same seed, apart from ties that rounding breaks: a forward of several rows does
not round as a forward of one row does.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_diffgemma.errors import NonFiniteLogitsError
from mlx_diffgemma.media.prompt import ImageSpan, embed_inputs, next_chunk
from mlx_diffgemma.model.cache import Cache
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.sampling.draws import DrawSource
from mlx_diffgemma.sampling.penalties import Penalties
from mlx_diffgemma.sampling.protocols import CausalContext, CausalDrafter, Taps
from mlx_diffgemma.sampling.sampler import draw_next

CLEAR_EVERY = 256  # forwards between two clearings of MLX's cache of freed buffers
FEW = 0.3  # if a smaller share of a proposal was accepted, the next one has half its length


@dataclass(frozen=True)
class CausalPolicy:
    """Sampling parameters.  ``temperature`` 0 is greedy; top-k 0, top-p 1 and min-p 0 are off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    penalties: Penalties | None = None


class CausalToken(NamedTuple):
    """One new token of a session.

    Attributes:
        session: The session.
        token: Its id.
        logprobs: Log-probabilities [vocabulary] at temperature 1.
        from_draft: Whether a drafter proposed the token.
    """

    session: CausalSession
    token: int
    logprobs: mx.array
    from_draft: bool


@dataclass
class CausalSession:
    """One answer that is decoded token by token.

    Attributes:
        pending: The ids that the cache does not hold yet.
        images: The images of the prompt.
        draft: The drafter's own state.
        block: How many tokens the drafter is asked for next.
        proposed: The number of tokens that the drafter proposed.
        accepted: How many of these were accepted.
    """

    pending: list[int]
    cache: Cache
    policy: CausalPolicy
    draws: DrawSource
    eos_ids: frozenset[int]
    max_tokens: int
    images: Sequence[ImageSpan] = ()
    tokens: list[int] = field(default_factory=list)
    draft: Any = None
    block: int = 0
    proposed: int = 0
    accepted: int = 0
    forwards: int = 0
    prompt: Sequence[int] = ()

    @property
    def finished(self) -> bool:
        return len(self.tokens) >= self.max_tokens or (
            bool(self.tokens) and self.tokens[-1] in self.eos_ids
        )

    def take(self, drawn: Sequence[int], proposal: Sequence[int]) -> int:
        """Append the tokens that were ``drawn`` after the last token and after each one of the
        ``proposal``, up to the first that differs from the proposal.  Returns their number.
        """
        right = next(
            (
                i
                for i, (token, guess) in enumerate(zip(drawn, proposal, strict=False))
                if token != guess
            ),
            len(proposal),
        )
        before = len(self.tokens)
        for token in drawn[: right + 1]:
            self.tokens.append(token)
            if self.finished:
                break
        taken = len(self.tokens) - before
        self.pending = [self.tokens[-1]]
        self.forwards += 1
        self.proposed += len(proposal)
        self.accepted += min(right, taken)
        if proposal and right == len(proposal):
            self.block += 2
        elif right < FEW * len(proposal):
            self.block = max(1, len(proposal) // 2)
        return taken


class CausalLoop:
    """Decodes the next tokens of all sessions in one forward.

    A step gives one token a session.  With a ``drafter`` it also gives the accepted tokens of a
    proposal.  ``longest`` limits the length of proposals, in addition to the drafter's own limit.
    """

    def __init__(
        self,
        model: DiffusionGemma,
        sessions: Iterable[CausalSession],
        prefill_step_size: int,
        drafter: CausalDrafter | None = None,
        longest: int | None = None,
    ):
        self.model = model
        self.sessions = list(sessions)
        self.prefill_step_size = prefill_step_size
        self.drafter = drafter
        self.steps = 0
        if drafter:
            self.longest = min(drafter.longest, longest or drafter.longest)
            for session in self.sessions:
                session.draft, session.block = drafter.begin(), max(1, self.longest // 2)

    @property
    def active(self) -> list[CausalSession]:
        return [session for session in self.sessions if not session.finished]

    def prefill(self) -> None:
        """Encode each prompt except its last chunk.  The first ``advance`` encodes that."""
        size = self.prefill_step_size
        for session in self.active:
            while (
                count := next_chunk(
                    len(session.pending), session.cache.length, session.images, size
                )
            ) < len(session.pending):
                rows, blocks = embed_inputs(
                    self.model, session.pending[:count], session.cache.length, session.images
                )
                output = self.model.encode(
                    [rows], [session.cache], taps=self._taps, blocks=[blocks]
                )
                if self.drafter:
                    self.drafter.read(
                        [session], [{layer: rows[0] for layer, rows in output.taps.items()}]
                    )
                session.pending = session.pending[count:]
                mx.eval(session.cache.arrays)
                mx.clear_cache()

    @property
    def _taps(self) -> Sequence[int]:
        return self.drafter.taps if self.drafter else ()

    def advance(self) -> list[CausalToken]:
        """Return the next tokens of every active session."""
        rows = self.active
        if not rows:
            return []
        proposals = self._propose(rows)
        drafted = any(proposals)
        read = [
            embed_inputs(self.model, s.pending + guess, s.cache.length, s.images)
            for s, guess in zip(rows, proposals, strict=True)
        ]
        output = self.model.encode(
            [x for x, _ in read],
            [s.cache for s in rows],
            logits="all" if drafted else "last",
            taps=self._taps,
            write="hold" if drafted else "append",
            blocks=[blocks for _, blocks in read],
        )
        counts = [1 + len(guess) for guess in proposals]
        logits = adjusted(mx.concatenate(output.logits or []), rows, counts)
        drawn = draw_positions(logits, rows, counts)
        finite = mx.isfinite(logits).all()
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        # They may be read on another thread, so they are evaluated here.
        each = [logprobs[row] for row in range(len(logprobs))]
        mx.eval(
            drawn,
            finite,
            each,
            [] if drafted else [array for session in rows for array in session.cache.arrays],
        )
        if not finite.item():
            raise NonFiniteLogitsError(
                "The model returned NaN or infinity: the checkpoint is damaged or the dtype too "
                "narrow; try --dtype float32."
            )
        tokens = list[CausalToken]()
        kept = list[Taps]()
        first = 0
        ids = drawn.tolist()
        for row, (session, guess) in enumerate(zip(rows, proposals, strict=True)):
            own = slice(first, first + counts[row])
            new = _take(session, ids[own], guess, each[own])
            tokens += new
            first = own.stop
            if drafted:
                # The cache holds the last token before this step, and all new ones but the last.
                session.cache.accept(len(new))
                mx.eval(session.cache.arrays)
            limit = len(new) if drafted else None
            kept.append({layer: states[row][:limit] for layer, states in output.taps.items()})
        if self.drafter:
            self.drafter.read(rows, kept)
        self.steps += 1
        if self.steps % CLEAR_EVERY == 0:
            mx.clear_cache()
        return tokens

    def _propose(self, rows: Sequence[CausalSession]) -> list[list[int]]:
        """Return the drafter's proposals.  They are empty while a session still encodes its prompt,
        because a proposal needs the logits of every position.
        """
        if self.drafter is None or any(len(session.pending) > 1 for session in rows):
            return [[] for _ in rows]
        counts = [
            min(session.block, self.longest, session.max_tokens - len(session.tokens) - 1)
            for session in rows
        ]
        return self.drafter.propose(rows, counts)


def _take(
    session: CausalSession,
    drawn: Sequence[int],
    proposal: Sequence[int],
    logprobs: Sequence[mx.array],
) -> list[CausalToken]:
    """Give a session its new tokens.

    Args:
        session: The session.
        drawn: The ids drawn after its last token and after each proposed one.
        proposal: The ids that its drafter proposed.
        logprobs: The log-probabilities [vocabulary] for each drawn id.

    Returns:
        The tokens that the session accepted.
    """
    taken = session.take(drawn, proposal)
    tokens = []
    for index, token in enumerate(drawn[:taken]):
        proposed = index < len(proposal) and token == proposal[index]
        tokens.append(CausalToken(session, token, logprobs[index], proposed))
    return tokens


def adjusted(
    logits: mx.array, sessions: Sequence[CausalSession], counts: Sequence[int]
) -> mx.array:
    """Apply the penalties of each session.

    Args:
        logits: [rows, vocabulary] of all sessions.
        sessions: The sessions.
        counts: The number of rows of each session; 1 if it has penalties.

    Returns:
        The adjusted logits [rows, vocabulary].
    """
    if not any(session.policy.penalties for session in sessions):
        return logits
    found, start = list[mx.array](), 0
    for session, count in zip(sessions, counts, strict=True):
        own = logits[start : start + count]
        start += count
        if session.policy.penalties:
            assert count == 1, "no drafter is beside penalties"
            ends = sorted(session.eos_ids)
            own = session.policy.penalties.after(
                session.prompt, session.tokens, ends, logits.shape[-1]
            ).adjust(own)
        found.append(own)
    return mx.concatenate(found)


def draw_positions(
    logits: mx.array, sessions: Sequence[CausalContext], counts: Sequence[int]
) -> mx.array:
    """Draw a token for each position.

    Args:
        logits: [rows, vocabulary] of all sessions.
        sessions: The sessions.
        counts: The number of rows of each session, which are its next positions.

    Returns:
        The tokens [rows].
    """
    u = [
        s.draws.step(0, 0, 0, len(s.tokens), count).u
        for s, count in zip(sessions, counts, strict=True)
    ]
    parts, start = [], 0
    for policy, group in itertools.groupby(
        range(len(sessions)), key=lambda index: sessions[index].policy
    ):
        numbers = np.concatenate([u[index] for index in group])
        parts.append(
            draw_next(
                logits[start : start + numbers.size],
                mx.array(numbers),
                policy.temperature,
                policy.top_k,
                policy.top_p,
                policy.min_p,
            )
        )
        start += numbers.size
    return mx.concatenate(parts)


def causal_sessions(
    model: DiffusionGemma,
    prompts: Sequence[Sequence[int]],
    policy: CausalPolicy,
    draws: Sequence[DrawSource],
    eos_ids: Iterable[int],
    max_tokens: Sequence[int],
    images: Sequence[Sequence[ImageSpan]] = (),
) -> list[CausalSession]:
    return [
        CausalSession(
            list(ids),
            Cache(model.config.text),
            policy,
            source,
            frozenset(eos_ids),
            limit,
            tuple(images[row]) if images else (),
            prompt=tuple(ids) if policy.penalties else (),
        )
        for row, (ids, source, limit) in enumerate(zip(prompts, draws, max_tokens, strict=True))
    ]
