"""The verifier: a causal pass over the text of a canvas that gives the probability of each token,
given the tokens before it.

The causal mode does not see the token that it scores, as the canvas mode does.  So the presence of
a token does not make it more probable.  The pass also serves as the commit of the canvas.  Its keys
and values are held beside the cache until it is known whether the canvas is committed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from mlx_diffgemma.model.cache import Cache
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.sampling.protocols import Taps


class VerifyResult(NamedTuple):
    """The causal mode's scores of the text ``ids`` [rows] of a canvas.

    They are the log-probability of each token and the entropy at its position [rows], both in nats,
    the ``next_logits`` [vocabulary] after the text, and the hidden states that a drafter reads.
    ``held`` says whether the text's keys and values are held beside the session's cache.
    """

    ids: list[int]
    logprob: mx.array
    entropy: mx.array
    next_logits: mx.array
    taps: Taps
    held: bool

    @property
    def surprises(self) -> mx.array:
        """How far the log-probability of each token lies below its expected value, the negative
        entropy; nats [rows].
        """
        return -self.entropy - self.logprob


def text_of(canvas: mx.array, eos_ids: Sequence[int]) -> list[int]:
    """The ids of a canvas up to its first end token.  What follows is not part of the text."""
    ids: list[int] = canvas.tolist()
    return ids[: next((place + 1 for place, token in enumerate(ids) if token in eos_ids), len(ids))]


def verify(
    model: DiffusionGemma,
    texts: Sequence[list[int]],
    caches: Sequence[Cache],
    first_logits: Sequence[mx.array],
    taps: Sequence[int] = (),
) -> list[VerifyResult]:
    """Read texts in one causal pass and say how probable each token is.

    Args:
        model: The model whose causal mode reads.
        texts: Token ids of each text.
        caches: The cache of the tokens before each text.  Afterwards each cache holds the keys and
            values of its text beside it; ``Cache.accept`` appends or drops them.
        first_logits: Logits [vocabulary] of each text's first token, under the causal mode.
        taps: Layers whose hidden states a drafter reads.
    """
    output = model.encode(
        [mx.array(ids) for ids in texts], caches, logits="all", taps=list(taps), write="hold"
    )
    assert output.logits is not None
    found = []
    for ids, first, own in zip(texts, first_logits, output.logits, strict=True):
        logits = mx.concatenate((first[None], own[:-1]))
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        entropy = -(mx.exp(logprobs) * logprobs).sum(axis=-1)
        logprob = mx.take_along_axis(logprobs, mx.array(ids)[:, None], axis=-1)[:, 0]
        found.append((logprob, entropy))
    # Copies: a view would keep the logits of all rows alive.
    last = [mx.contiguous(own[-1]) for own in output.logits]
    mx.eval(found, last, list(output.taps.values()))
    return [
        VerifyResult(
            ids,
            logprob,
            entropy,
            last[row],
            {layer: output.taps[layer][row] for layer in taps},
            True,
        )
        for row, (ids, (logprob, entropy)) in enumerate(zip(texts, found, strict=True))
    ]
