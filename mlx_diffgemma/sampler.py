"""One step of the canvas sampler: pure functions of logits, canvas and numbers.  Knows no model and no text.

Source: EntropyBoundSampler and StableAndConfidentStoppingCriteria of transformers (generation_diffusion_gemma.py); the
acceptance rule is that of arXiv 2505.24857.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx


class Flag:
    """Columns of ``SamplerStep.flags``, the one thing the host reads at each step."""

    STOP, MEAN_ENTROPY, NON_FINITE, EOS_POSITION, COUNT = 0, 1, 2, 3, 4


@dataclass(frozen=True)
class StepNumbers:
    """What a step's rules depend on, one entry a row of the batch; all [batch].

    ``temperature`` of the schedule at this step; ``entropy_bound`` and ``confidence`` in nats; ``greedy`` rows take the
    argmax in place of the draw; ``top_k`` (0: off) and ``top_p`` (1: off) act on the draw alone.
    """

    temperature: mx.array
    entropy_bound: mx.array
    confidence: mx.array
    greedy: mx.array
    top_k: mx.array | None = None
    top_p: mx.array | None = None


class SamplerStep(NamedTuple):
    """``canvas`` and ``argmax`` ids, ``accepted`` mask, ``entropy`` in nats and ``logprob`` of the argmax: [batch, length].

    ``scaled`` are the temperature-scaled logits, the next step's self-conditioning; ``flags`` [batch, Flag.COUNT].
    """

    canvas: mx.array
    argmax: mx.array
    accepted: mx.array
    entropy: mx.array
    logprob: mx.array
    scaled: mx.array
    flags: mx.array


def sample_step(
    logits: mx.array,
    u: mx.array,
    renoise: mx.array,
    history: mx.array,
    numbers: StepNumbers,
    eos_ids: mx.array,
) -> SamplerStep:
    """One step from soft-capped float32 ``logits`` [batch, length, vocabulary].

    ``u`` and ``renoise`` [batch, length] are the step's draws; ``history`` [batch, stability, length] the argmax of the
    steps before (-1 where there was none).  The argmax canvas of the last step run is what gets committed.
    """
    scaled = logits / numbers.temperature[:, None, None]
    normalised = scaled - mx.logsumexp(scaled, axis=-1, keepdims=True)
    probabilities = mx.exp(normalised)
    # A probability that underflows to zero contributes nothing, as p log p does in the limit.
    entropy = -mx.where(probabilities > 0, probabilities * normalised, 0.0).sum(axis=-1)
    argmax = mx.argmax(scaled, axis=-1)
    drawn = mx.where(numbers.greedy[:, None], argmax, inverse_cdf(truncate(probabilities, numbers), u))
    accepted = accept(entropy, numbers.entropy_bound)
    mean_entropy = entropy.mean(axis=-1)
    stop = is_stable(argmax, history) & (mean_entropy < numbers.confidence)
    finite = mx.isfinite(logits).all(axis=(-2, -1))
    flags = mx.stack([stop, mean_entropy, ~finite, first_position(argmax, eos_ids)], axis=-1)
    return SamplerStep(
        canvas=mx.where(accepted, drawn, renoise),  # every position not accepted now, whatever it was before
        argmax=argmax,
        accepted=accepted,
        entropy=entropy,
        logprob=mx.take_along_axis(normalised, argmax[..., None], axis=-1)[..., 0],
        scaled=scaled,
        flags=flags.astype(mx.float32),
    )


def inverse_cdf(probabilities: mx.array, u: mx.array) -> mx.array:
    """The token at which the running sum of ``probabilities`` [..., vocabulary] (of any total) passes ``u`` of it.

    Never a token of probability zero: not when rounding carries ``u`` times the total up to the total, and not when a
    parallel scan leaves the running sum uneven where it should be flat.
    """
    running = mx.cumsum(probabilities, axis=-1)
    possible = probabilities > 0
    passed = possible & (running > u[..., None] * running[..., -1:])
    last = mx.argmax(mx.where(possible, running, -1.0), axis=-1)
    return mx.where(passed.any(axis=-1), mx.argmax(passed, axis=-1), last).astype(mx.int32)


def truncate(probabilities: mx.array, numbers: StepNumbers) -> mx.array:
    """Zero all but the ``top_k`` most probable tokens and the smallest set that holds ``top_p`` of the mass."""
    if numbers.top_k is None and numbers.top_p is None:
        return probabilities
    order = mx.argsort(-probabilities, axis=-1)
    ranked = mx.take_along_axis(probabilities, order, axis=-1)
    keep = mx.ones(ranked.shape, dtype=mx.bool_)
    if numbers.top_k is not None:
        limit = mx.where(numbers.top_k > 0, numbers.top_k, ranked.shape[-1])
        keep = keep & (mx.arange(ranked.shape[-1]) < limit[:, None, None])
    if numbers.top_p is not None:
        before = mx.cumsum(ranked, axis=-1) - ranked
        keep = keep & ((before < numbers.top_p[:, None, None]) | (mx.arange(ranked.shape[-1]) == 0))
    return mx.put_along_axis(probabilities, order, mx.where(keep, ranked, 0.0), axis=-1)


def accept(entropy: mx.array, bound: mx.array) -> mx.array:
    """Positions in ascending order of entropy while the sum of those before is at most ``bound``.

    ``entropy`` [batch, length] and ``bound`` [batch] in nats; the result is a mask.  The most certain position is always
    accepted.
    """
    order = mx.argsort(entropy, axis=-1)
    ascending = mx.take_along_axis(entropy, order, axis=-1)
    chosen = mx.cumsum(ascending, axis=-1) - ascending <= bound[:, None]
    return mx.take_along_axis(chosen, mx.argsort(order, axis=-1), axis=-1)


def is_stable(argmax: mx.array, history: mx.array) -> mx.array:
    """[batch] whether ``argmax`` [batch, length] equals every entry of ``history`` [batch, n, length]; n = 0 is stable."""
    return (history == argmax[:, None]).all(axis=(-2, -1))


def first_position(ids: mx.array, wanted: mx.array) -> mx.array:
    """[batch] the first position of ``ids`` [batch, length] that is one of ``wanted``, or length where none is."""
    hit = (ids[..., None] == wanted).any(axis=-1)
    return mx.where(hit.any(axis=-1), mx.argmax(hit, axis=-1), ids.shape[-1])


def draw_next(logits: mx.array, u: mx.array, temperature: float, top_k: int = 0, top_p: float = 1.0) -> mx.array:
    """Next token of the causal mode from ``logits`` [rows, vocabulary]; temperature 0 takes the argmax."""
    if temperature == 0:
        return mx.argmax(logits, axis=-1).astype(mx.int32)
    probabilities = mx.softmax(logits / temperature, axis=-1, precise=True)[:, None]
    one = mx.ones((logits.shape[0],))
    numbers = StepNumbers(one, one, one, one > 0, top_k=one.astype(mx.int32) * top_k if top_k else None,
                          top_p=one * top_p if top_p < 1 else None)
    return inverse_cdf(truncate(probabilities, numbers), u[:, None])[:, 0]
