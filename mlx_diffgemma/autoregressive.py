"""Left-to-right decoding with the causal mode of the same weights (``mode="ar"``), greedy or sampled, drafted or not.

Position p of an answer is drawn with ``u`` of (canvas 0, step 0, position p), so a seed means the same in a batch.

With a drafter several positions go through one forward: the last token and a proposal for those after it.  The target draws
every position with its own ``u`` from its own distribution; a proposed token is right where it equals what was drawn, and all
behind the first wrong one is thrown away.  So drafted and plain decoding give the same tokens for the same seed, but for ties
that rounding breaks (a forward of several rows rounds otherwise than one of a single row).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_diffgemma.cache import Cache
from mlx_diffgemma.drafting import CausalDrafter
from mlx_diffgemma.draws import DrawSource
from mlx_diffgemma.errors import NonFiniteLogitsError
from mlx_diffgemma.model import DiffusionGemma
from mlx_diffgemma.penalties import Penalties
from mlx_diffgemma.prompt import PlacedImage, next_chunk, read_rows
from mlx_diffgemma.sampler import draw_next

CLEAR_EVERY = 256  # forwards between two clearings of MLX's cache of freed buffers
FEW = 0.3  # a proposal of which a smaller share was right is followed by one of half its length


@dataclass(frozen=True)
class CausalPolicy:
    """``temperature`` 0 is greedy; top-k 0, top-p 1 and min-p 0 are off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    penalties: Penalties | None = None


class CausalToken(NamedTuple):
    """One new token of a session: its log-probabilities [vocabulary] at temperature 1, and whether a drafter had proposed it."""

    session: CausalSession
    token: int
    logprobs: mx.array
    from_draft: bool


@dataclass
class CausalSession:
    """One answer, token by token; ``pending`` are ids the cache does not hold yet, and ``images`` stand in the prompt.

    ``draft`` is the drafter's, ``block`` how many tokens it is asked for next; ``proposed`` and ``accepted`` count its tokens.
    """

    pending: list[int]
    cache: Cache
    policy: CausalPolicy
    draws: DrawSource
    eos_ids: frozenset[int]
    max_tokens: int
    images: Sequence[PlacedImage] = ()
    tokens: list[int] = field(default_factory=list)
    draft: Any = None
    block: int = 0
    proposed: int = 0
    accepted: int = 0
    forwards: int = 0
    prompt: Sequence[int] = ()

    @property
    def finished(self) -> bool:
        return len(self.tokens) >= self.max_tokens or (bool(self.tokens) and self.tokens[-1] in self.eos_ids)

    def take(self, drawn: Sequence[int], proposal: Sequence[int]) -> int:
        """Go on by what was ``drawn`` at the last token and at each of the ``proposal``; how many tokens that gave."""
        right = next((i for i, (token, guess) in enumerate(zip(drawn, proposal, strict=False)) if token != guess), len(proposal))
        before = len(self.tokens)
        for token in drawn[: right + 1]:
            self.tokens.append(token)
            if self.finished:
                break
        taken = len(self.tokens) - before
        self.pending = [self.tokens[-1]]
        self.forwards += 1
        self.proposed, self.accepted = self.proposed + len(proposal), self.accepted + min(right, taken)
        if proposal and right == len(proposal):
            self.block += 2
        elif right < FEW * len(proposal):
            self.block = max(1, len(proposal) // 2)
        return taken


class CausalLoop:
    """Takes sessions forward, all in one forward: one token at a time, or with a ``drafter`` as many as it guessed.

    ``longest`` limits the proposals further than the drafter does.
    """

    def __init__(self, model: DiffusionGemma, sessions: Iterable[CausalSession], prefill_step_size: int,
                 drafter: CausalDrafter | None = None, longest: int | None = None):
        self.model, self.sessions, self.prefill_step_size, self.drafter = model, list(sessions), prefill_step_size, drafter
        self.steps = 0
        if drafter:
            self.longest = min(drafter.longest, longest or drafter.longest)
            for session in self.sessions:
                session.draft, session.block = drafter.begin(), max(1, self.longest // 2)

    @property
    def active(self) -> list[CausalSession]:
        return [session for session in self.sessions if not session.finished]

    def prefill(self) -> None:
        """Encode all of each prompt but its last chunk, which the first ``advance`` reads."""
        size = self.prefill_step_size
        for session in self.active:
            while (count := next_chunk(len(session.pending), session.cache.length, session.images, size)) < len(session.pending):
                rows, blocks = read_rows(self.model, session.pending[:count], session.cache.length, session.images)
                output = self.model.encode([rows], [session.cache], taps=self._taps, blocks=[blocks])
                if self.drafter:
                    self.drafter.read([session], [{layer: rows[0] for layer, rows in output.taps.items()}])
                session.pending = session.pending[count:]
                mx.eval(session.cache.arrays)
                mx.clear_cache()

    @property
    def _taps(self) -> Sequence[int]:
        return self.drafter.taps if self.drafter else ()

    def advance(self) -> list[CausalToken]:
        """The next tokens of every active session."""
        rows = self.active
        if not rows:
            return []
        proposals = self._propose(rows)
        drafted = any(proposals)
        read = [read_rows(self.model, s.pending + guess, s.cache.length, s.images)
                for s, guess in zip(rows, proposals, strict=True)]
        output = self.model.encode([x for x, _ in read], [s.cache for s in rows], logits="all" if drafted else "last",
                                   taps=self._taps, write="hold" if drafted else "append", blocks=[blocks for _, blocks in read])
        counts = [1 + len(guess) for guess in proposals]
        logits = adjusted(mx.concatenate(output.logits or []), rows, counts)
        drawn = draw_positions(logits, rows, counts)
        finite = mx.isfinite(logits).all()
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        each = [logprobs[row] for row in range(len(logprobs))]  # evaluated here, as they may be read on another thread
        mx.eval(drawn, finite, each, [] if drafted else [array for session in rows for array in session.cache.arrays])
        if not finite.item():
            raise NonFiniteLogitsError("The model returned NaN or infinity: the checkpoint is damaged or the dtype too "
                                       "narrow; try --dtype float32.")
        found, taken_in, first, every = [], [], 0, drawn.tolist()
        for row, (session, guess) in enumerate(zip(rows, proposals, strict=True)):
            tokens = every[first : first + counts[row]]
            taken = session.take(tokens, guess)
            found += [CausalToken(session, token, each[first + place], [token] == guess[place : place + 1])
                      for place, token in enumerate(tokens[:taken])]
            first += len(tokens)
            if drafted:
                session.cache.accept(taken)  # the last token before, and all new ones but the last
                mx.eval(session.cache.arrays)
            taken_in.append({layer: states[row][: taken if drafted else None] for layer, states in output.taps.items()})
        if self.drafter:
            self.drafter.read(rows, taken_in)
        self.steps += 1
        if self.steps % CLEAR_EVERY == 0:
            mx.clear_cache()
        return found

    def _propose(self, rows: Sequence[CausalSession]) -> list[list[int]]:
        """What the drafter guesses; nothing while a session still reads its prompt, whose logits nobody wants in full."""
        if self.drafter is None or any(len(session.pending) > 1 for session in rows):
            return [[] for _ in rows]
        counts = [min(session.block, self.longest, session.max_tokens - len(session.tokens) - 1) for session in rows]
        return self.drafter.propose(rows, counts)


def adjusted(logits: mx.array, sessions: Sequence[CausalSession], counts: Sequence[int]) -> mx.array:
    """``logits`` [rows, tokens] as the penalties want them; ``counts`` rows of each session, one where it has penalties."""
    if not any(session.policy.penalties for session in sessions):
        return logits
    found, start = list[mx.array](), 0
    for session, count in zip(sessions, counts, strict=True):
        own = logits[start : start + count]
        start += count
        if session.policy.penalties:
            assert count == 1, "no drafter is beside penalties"
            ends = sorted(session.eos_ids)
            own = session.policy.penalties.after(session.prompt, session.tokens, ends, logits.shape[-1]).adjust(own)
        found.append(own)
    return mx.concatenate(found)


def draw_positions(logits: mx.array, sessions: Sequence[CausalSession], counts: Sequence[int]) -> mx.array:
    """Tokens [rows] from ``logits`` [rows, tokens], which are of the next ``counts[i]`` positions of each session's answer."""
    u = [s.draws.step(0, 0, 0, len(s.tokens), count).u for s, count in zip(sessions, counts, strict=True)]
    parts, start = [], 0
    for policy, group in itertools.groupby(range(len(sessions)), key=lambda index: sessions[index].policy):
        numbers = np.concatenate([u[index] for index in group])
        parts.append(draw_next(logits[start : start + numbers.size], mx.array(numbers), policy.temperature, policy.top_k,
                               policy.top_p, policy.min_p))
        start += numbers.size
    return mx.concatenate(parts)


def causal_sessions(model: DiffusionGemma, prompts: Sequence[Sequence[int]], policy: CausalPolicy,
                    draws: Sequence[DrawSource], eos_ids: Iterable[int], max_tokens: Sequence[int],
                    images: Sequence[Sequence[PlacedImage]] = ()) -> list[CausalSession]:
    return [CausalSession(list(ids), Cache(model.config.text), policy, source, frozenset(eos_ids), limit,
                          tuple(images[row]) if images else (), prompt=tuple(ids) if policy.penalties else ())
            for row, (ids, source, limit) in enumerate(zip(prompts, draws, max_tokens, strict=True))]
