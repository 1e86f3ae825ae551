"""Left-to-right decoding with the causal mode of the same weights (``mode="ar"``), greedy or sampled.

Position p of an answer is drawn with ``u`` of (canvas 0, step 0, position p), so a seed means the same in a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from mlx_diffgemma.cache import Cache
from mlx_diffgemma.draws import DrawSource
from mlx_diffgemma.errors import NonFiniteLogitsError
from mlx_diffgemma.model import DiffusionGemma
from mlx_diffgemma.sampler import draw_next

CLEAR_EVERY = 256  # tokens between two clearings of MLX's cache of freed buffers


@dataclass(frozen=True)
class CausalPolicy:
    """``temperature`` 0 is greedy; top-k 0 and top-p 1 are off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0


@dataclass
class CausalSession:
    """One answer, token by token; ``pending`` are ids the cache does not hold yet."""

    pending: list[int]
    cache: Cache
    policy: CausalPolicy
    draws: DrawSource
    eos_ids: frozenset[int]
    max_tokens: int
    tokens: list[int] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return len(self.tokens) >= self.max_tokens or (bool(self.tokens) and self.tokens[-1] in self.eos_ids)


class CausalLoop:
    """Takes sessions forward one token at a time, all in one forward."""

    def __init__(self, model: DiffusionGemma, sessions: Iterable[CausalSession], prefill_step_size: int):
        self.model, self.sessions, self.prefill_step_size = model, list(sessions), prefill_step_size
        self.steps = 0

    @property
    def active(self) -> list[CausalSession]:
        return [session for session in self.sessions if not session.finished]

    def prefill(self) -> None:
        """Encode all of each prompt but its last chunk, which the first ``advance`` reads."""
        size = self.prefill_step_size
        for session in self.active:
            while len(session.pending) > size + 1:
                self.model.encode([mx.array(session.pending[:size])], [session.cache])
                session.pending = session.pending[size:]
                mx.eval(session.cache.arrays)
                mx.clear_cache()

    def advance(self) -> list[tuple[CausalSession, int, mx.array]]:
        """The next token of every active session with its log-probabilities [vocabulary] at temperature 1."""
        rows = self.active
        if not rows:
            return []
        output = self.model.encode([mx.array(s.pending) for s in rows], [s.cache for s in rows], logits="last")
        logits = mx.concatenate(output.logits or [])
        chosen = [self._draw(logits[row : row + 1], session) for row, session in enumerate(rows)]
        finite = mx.isfinite(logits).all()
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        tokens = mx.concatenate(chosen)
        mx.eval(tokens, finite, logprobs, [array for s in rows for array in s.cache.arrays])
        if not finite.item():
            raise NonFiniteLogitsError("The model returned NaN or infinity: the checkpoint is damaged or the dtype too "
                                       "narrow; try --dtype float32.")
        for session, token in zip(rows, tokens.tolist(), strict=True):
            session.tokens.append(token)
            session.pending = [token]
        self.steps += 1
        if self.steps % CLEAR_EVERY == 0:
            mx.clear_cache()
        return [(session, session.tokens[-1], logprobs[row]) for row, session in enumerate(rows)]

    @staticmethod
    def _draw(logits: mx.array, session: CausalSession) -> mx.array:
        u = session.draws.step(0, 0, 0, len(session.tokens), 1).u
        policy = session.policy
        return draw_next(logits, mx.array(np.asarray(u)), policy.temperature, policy.top_k, policy.top_p)


def causal_sessions(model: DiffusionGemma, prompts: Sequence[Sequence[int]], policy: CausalPolicy,
                    draws: Sequence[DrawSource], eos_ids: Iterable[int], max_tokens: Sequence[int]) -> list[CausalSession]:
    return [CausalSession(list(ids), Cache(model.config.text), policy, source, frozenset(eos_ids), limit)
            for ids, source, limit in zip(prompts, draws, max_tokens, strict=True)]
