"""What the causal mode says of a canvas: a pass over its text that tells how probable each token is, given those before it.

Unlike the canvas mode it does not see the token it judges, so it believes nothing because it stands there.  The pass is the commit
of the canvas as well, if the canvas is committed: the keys and values are held beside the cache until that is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx

from mlx_diffgemma.cache import ROOM
from mlx_diffgemma.drafting import Taps

if TYPE_CHECKING:
    from mlx_diffgemma.model import DiffusionGemma
    from mlx_diffgemma.session import Session


class Verdict(NamedTuple):
    """Of the text ``ids`` [rows] of a canvas: log-probability of each token and entropy at its place in nats [rows], the
    ``next_logits`` [vocabulary] behind it, and the hidden states that a drafter reads.

    ``held``: its keys and values are beside the session's cache.
    """

    ids: list[int]
    logprob: mx.array
    entropy: mx.array
    next_logits: mx.array
    taps: Taps
    held: bool

    @property
    def surprises(self) -> mx.array:
        """By what the log-probability of each token lies below the expected one, the negative entropy; nats [rows]."""
        return -self.entropy - self.logprob


def text_of(canvas: mx.array, eos_ids: Sequence[int]) -> list[int]:
    """The ids of a canvas up to its first end token; what follows that is no text."""
    ids: list[int] = canvas.tolist()
    return ids[: next((place + 1 for place, token in enumerate(ids) if token in eos_ids), len(ids))]


def consult(model: DiffusionGemma, asked: Sequence[tuple[Session, list[int]]]) -> None:
    """One causal pass over the texts; each session takes note of its verdict."""
    taps = sorted({layer for s, _ in asked if s.policy.drafter for layer in s.policy.drafter.taps})
    output = model.encode([mx.array(ids) for _, ids in asked], [session.cache for session, _ in asked], logits="all", taps=taps,
                          write="hold")
    assert output.logits is not None
    found = []
    for (session, ids), own in zip(asked, output.logits, strict=True):
        assert session.next_logits is not None
        logits = mx.concatenate((session.next_logits[None], own[:-1]))
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        entropy = -(mx.exp(logprobs) * logprobs).sum(axis=-1)
        logprob = mx.take_along_axis(logprobs, mx.array(ids)[:, None], axis=-1)[:, 0]
        found.append((logprob, entropy))
    last = [mx.contiguous(own[-1]) for own in output.logits]  # a view would keep the logits of all rows alive
    mx.eval(found, last, list(output.taps.values()))
    for row, ((session, ids), (logprob, entropy)) in enumerate(zip(asked, found, strict=True)):
        verdict = Verdict(ids, logprob, entropy, last[row], {layer: output.taps[layer][row] for layer in taps}, True)
        session.judged_as(verdict, rows=len(ids))


def settle(sessions: Sequence[Session]) -> None:
    """What the causal mode has just read goes into the caches where it was committed, and away where not."""
    for session in sessions:
        verdict, drafter = session.verdict, session.policy.drafter
        if not (verdict and verdict.held):
            continue
        if session.canvas is None and not session.finished and session.pending.tolist() == verdict.ids:
            session.cache.reserve(session.cache.length + len(verdict.ids) + ROOM)
            session.cache.accept(len(verdict.ids))
            session.next_logits = verdict.next_logits
            if drafter:
                drafter.read([session], [{layer: verdict.taps[layer] for layer in drafter.taps}])
            session.encoded()
            mx.eval(session.cache.arrays)
        else:
            session.cache.accept(0)
        session.verdict = verdict._replace(held=False, taps={})
