"""One step of the canvas sampler: pure functions of logits, canvas and numbers.  Knows no model and no text.

Source: EntropyBoundSampler and StableAndConfidentStoppingCriteria of transformers (generation_diffusion_gemma.py); the
acceptance rule is that of arXiv 2505.24857.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import mlx.core as mx

from mlx_diffgemma import truncation

KEPT = 64  # tokens of a position that sparse self-conditioning looks at
CHUNK = 64  # tokens of the vocabulary that are looked at as one before any is looked at alone


class Flag:
    """Columns of ``SamplerStep.flags``, the one thing the host reads at each step."""

    STOP, MEAN_ENTROPY, NON_FINITE, EOS_POSITION, UNCOVERED, COUNT = 0, 1, 2, 3, 4, 5


@dataclass(frozen=True)
class StepNumbers:
    """What a step's rules depend on, one entry a row of the batch; all [batch].

    ``temperature`` of the schedule at this step; ``entropy_bound`` and ``confidence`` in nats; ``greedy`` rows take the
    argmax in place of the draw; ``top_k`` (0: off), ``top_p`` (1: off) and ``min_p`` (0: off) act on the draw alone, and ``few``
    tells the rows with a top_k of 1 to KEPT, whose candidates are found faster.  ``tail`` asks for the
    KEPT most probable tokens, and for the positions where more than ``tail`` of the mass lies outside of them.
    ``positions`` is what the mean entropy counts, where it is more than the rows: positions that left the canvas count as
    certain.  ``threshold`` replaces the entropy bound: a position is accepted, for good, when its token is that probable.
    """

    temperature: mx.array
    entropy_bound: mx.array
    confidence: mx.array
    greedy: mx.array | None = None
    top_k: mx.array | None = None
    top_p: mx.array | None = None
    tail: mx.array | None = None
    positions: mx.array | None = None
    threshold: mx.array | None = None
    min_p: mx.array | None = None
    few: Sequence[bool] = ()


class Before(NamedTuple):
    """What a step starts from: ``canvas`` ids and the mask ``accepted`` of the step before [batch, length], and the argmax of
    earlier steps, ``history`` [batch, stability, length] (-1 where there was none)."""

    canvas: mx.array
    accepted: mx.array
    history: mx.array


class SamplerStep(NamedTuple):
    """``canvas`` and ``argmax`` ids, ``accepted`` mask, ``entropy`` in nats and ``logprob`` of the argmax: [batch, length].

    ``flags`` [batch, Flag.COUNT].  Where a ``tail`` was given: ``kept`` [batch, length, KEPT] ids and the mask ``uncovered``.
    """

    canvas: mx.array
    argmax: mx.array
    accepted: mx.array
    entropy: mx.array
    logprob: mx.array
    flags: mx.array
    kept: mx.array | None = None
    uncovered: mx.array | None = None


class Marginals(NamedTuple):
    """What a step knows of its positions, [batch, length] each: the ids ``argmax`` and ``drawn``, the ``entropy`` in nats, the
    ``logprob`` of the argmax and the ``probability`` of the drawn token.  Where a ``tail`` was given, the ids ``kept`` of the most
    probable tokens [batch, length, KEPT] and the mass they have, ``covered``."""

    argmax: mx.array
    drawn: mx.array
    entropy: mx.array
    logprob: mx.array
    probability: mx.array
    kept: mx.array | None = None
    covered: mx.array | None = None


def independent(logits: mx.array, u: mx.array | None, numbers: StepNumbers) -> Marginals:
    """Of soft-capped float32 ``logits`` [batch, length, vocabulary], position by position; ``u`` as in ``sample_step``."""
    temperature = numbers.temperature[:, None, None]
    argmax = mx.argmax(logits, axis=-1)
    top = mx.take_along_axis(logits, argmax[..., None], axis=-1)
    weights, weighted = _weigh(logits, top, temperature)  # the one exponential of a step
    total = _sums(weights).sum(axis=-1)
    # -sum p log p with log p = scaled - top - log total
    entropy = mx.maximum(mx.log(total) - _sums(weighted).sum(axis=-1) / total, 0.0)
    drawn = argmax if u is None else inverse_cdf(truncate(weights, numbers), u)
    if numbers.greedy is not None:
        drawn = mx.where(numbers.greedy[:, None], argmax, drawn)
    probability = mx.take_along_axis(weights, drawn[..., None], axis=-1)[..., 0] / total
    kept = covered = None
    if numbers.tail is not None:
        kept = largest(logits, min(KEPT, logits.shape[-1]))
        covered = mx.take_along_axis(weights, kept, axis=-1).sum(axis=-1) / total
    return Marginals(argmax, drawn, entropy, -mx.log(total), probability, kept, covered)


def sample_step(
    logits: mx.array,
    u: mx.array | None,
    renoise: mx.array,
    before: Before,
    numbers: StepNumbers,
    eos_ids: mx.array,
    forced: Marginals | None = None,
) -> SamplerStep:
    """One step from soft-capped float32 ``logits`` [batch, length, vocabulary].

    ``u`` and ``renoise`` [batch, length] are the step's draws; without ``u`` every row takes the argmax.  The argmax canvas
    of the last step run is what gets committed.  ``forced`` takes the place of what the logits say, where a constraint decides that
    for the whole canvas.
    """
    own = independent(logits, u, numbers) if forced is None else forced
    argmax, drawn, entropy = own.argmax, own.drawn, own.entropy
    mean_entropy = entropy.mean(axis=-1) if numbers.positions is None else entropy.sum(axis=-1) / numbers.positions
    stop = is_stable(argmax, before.history) & (mean_entropy < numbers.confidence)
    if numbers.threshold is None:
        accepted = accept(entropy, numbers.entropy_bound)
        kept_tokens = drawn
    else:
        accepted = before.accepted | reveal(own.probability, before.accepted, numbers.threshold)
        kept_tokens = mx.where(before.accepted, before.canvas, drawn)
        stop = stop | accepted.all(axis=-1)
    finite = mx.isfinite(entropy + own.logprob).all(axis=-1)  # a NaN or infinity anywhere has reached one of the sums
    uncovered = mx.zeros(argmax.shape, dtype=mx.bool_)
    if numbers.tail is not None and own.covered is not None:
        uncovered = 1 - own.covered > numbers.tail[:, None]
    flags = mx.stack([stop, mean_entropy, ~finite, first_position(argmax, eos_ids), uncovered.sum(axis=-1)], axis=-1)
    return SamplerStep(
        canvas=mx.where(accepted, kept_tokens, renoise),  # every position not accepted now, whatever it was before
        argmax=argmax,
        accepted=accepted,
        entropy=entropy,
        logprob=own.logprob,
        flags=flags.astype(mx.float32),
        kept=own.kept,
        uncovered=None if own.kept is None else uncovered,
    )


@partial(mx.compile, shapeless=True)
def _weigh(logits: mx.array, top: mx.array, temperature: mx.array) -> tuple[mx.array, mx.array]:
    """exp of the scaled distance d from ``top``, and d exp d, in one pass over the logits."""
    distance = (logits - top) / temperature
    weights = mx.exp(distance)
    return weights, distance * weights


def _chunked(x: mx.array, fill: float) -> mx.array:
    """[..., vocabulary] as [..., chunks, CHUNK], the last chunk filled up."""
    if missing := -x.shape[-1] % CHUNK:
        x = mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)], constant_values=fill)
    return x.reshape(*x.shape[:-1], -1, CHUNK)


def _sums(x: mx.array) -> mx.array:
    """[..., chunks] the sum of each chunk; two short sums round less than one long one."""
    return _chunked(x, 0.0).sum(axis=-1)


def inverse_cdf(probabilities: mx.array, u: mx.array) -> mx.array:
    """The token at which the running sum of ``probabilities`` [..., vocabulary] (of any total) passes ``u`` of it.

    First the chunk is found by the chunks' sums, then the token in it.  Never a token of probability zero: not when
    rounding carries ``u`` times the total up to the total, and not when a parallel scan leaves the running sum uneven
    where it should be flat.
    """
    chunks = _chunked(probabilities, 0.0)
    sums = chunks.sum(axis=-1)
    chunk, before = passing(sums, u * sums.sum(axis=-1))
    inside = mx.take_along_axis(chunks, chunk[..., None, None], axis=-2)[..., 0, :]
    token, _ = passing(inside, u * sums.sum(axis=-1) - before)
    return (chunk * CHUNK + token).astype(mx.int32)


def passing(weights: mx.array, target: mx.array) -> tuple[mx.array, mx.array]:
    """The first possible entry of ``weights`` [..., n] whose running sum exceeds ``target`` [...], or the last possible one;
    and the sum before it."""
    running, possible = mx.cumsum(weights, axis=-1), weights > 0
    passed = possible & (running > target[..., None])
    last = mx.argmax(mx.where(possible, running, -1.0), axis=-1)
    index = mx.where(passed.any(axis=-1), mx.argmax(passed, axis=-1), last)
    return index, mx.take_along_axis(running - weights, index[..., None], axis=-1)[..., 0]


def largest(x: mx.array, k: int) -> mx.array:
    """Indices [..., k] of the ``k`` largest entries of ``x`` [..., vocabulary], in no order.

    Exact in two stages: the k largest lie in the k chunks with the largest maxima.
    """
    chunks = _chunked(x, -mx.inf)
    if chunks.shape[-2] <= k:
        return mx.argpartition(-x, k - 1, axis=-1)[..., :k]
    chosen = mx.argpartition(-chunks.max(axis=-1), k - 1, axis=-1)[..., :k]
    candidates = mx.take_along_axis(chunks, chosen[..., None], axis=-2).flatten(-2)
    inner = mx.argpartition(-candidates, k - 1, axis=-1)[..., :k]
    return mx.take_along_axis(chosen, inner // CHUNK, axis=-1) * CHUNK + inner % CHUNK


def truncate(weights: mx.array, numbers: StepNumbers) -> mx.array:
    """Zero the ``weights`` [batch, length, vocabulary], of any total, of all tokens that top_k, top_p and min_p leave out.

    What each keeps, also where weights are equal, is said in :mod:`mlx_diffgemma.truncation`; the largest weight stays always.
    """
    if numbers.top_k is None and numbers.top_p is None and numbers.min_p is None:
        return weights
    threshold = mx.zeros(weights.shape[:-1])
    if numbers.top_k is not None or numbers.top_p is not None:
        threshold = _least_kept(weights, numbers)
    if numbers.min_p is not None:
        threshold = mx.maximum(threshold, numbers.min_p[:, None] * weights.max(axis=-1))
    return mx.where(weights >= threshold[..., None], weights, 0.0)


def _least_kept(weights: mx.array, numbers: StepNumbers) -> mx.array:
    """[batch, length] the least weight that top_k and top_p keep; a row's own does not depend on the rows beside it."""
    total, top_k, top_p = _sums(weights).sum(axis=-1), numbers.top_k, numbers.top_p
    if top_k is None or not numbers.few:
        return truncation.of_all(weights, total, top_k, top_p)
    candidates = mx.take_along_axis(weights, largest(weights, min(KEPT, weights.shape[-1])), axis=-1)
    found = truncation.of_candidates(candidates, total, top_k, top_p)
    if all(numbers.few):
        return found
    return mx.where(mx.array(numbers.few)[:, None], found, truncation.of_all(weights, total, top_k, top_p))


def accept(entropy: mx.array, bound: mx.array) -> mx.array:
    """Positions in ascending order of entropy while the sum of those before is at most ``bound``.

    ``entropy`` [batch, length] and ``bound`` [batch] in nats; the result is a mask.  The most certain position is always
    accepted.
    """
    order = mx.argsort(entropy, axis=-1)
    ascending = mx.take_along_axis(entropy, order, axis=-1)
    chosen = mx.cumsum(ascending, axis=-1) - ascending <= bound[:, None]
    return mx.take_along_axis(chosen, mx.argsort(order, axis=-1), axis=-1)


def reveal(probability: mx.array, revealed: mx.array, threshold: mx.array) -> mx.array:
    """The positions of [batch, length] that are newly accepted: those not ``revealed`` yet whose token has at least
    ``threshold`` [batch], or else the most probable of them.

    Source: the confidence-threshold sampler of mlx-vlm.
    """
    waiting = mx.where(revealed, -1.0, probability)
    best = waiting == waiting.max(axis=-1, keepdims=True)
    best = best & (mx.cumsum(best.astype(mx.int32), axis=-1) == 1)
    passed = waiting >= threshold[:, None]
    return ~revealed & mx.where(passed.any(axis=-1, keepdims=True), passed, best)


def is_stable(argmax: mx.array, history: mx.array) -> mx.array:
    """[batch] whether ``argmax`` [batch, length] equals every entry of ``history`` [batch, n, length]; n = 0 is stable."""
    return (history == argmax[:, None]).all(axis=(-2, -1))


def first_position(ids: mx.array, wanted: mx.array) -> mx.array:
    """[batch] the first position of ``ids`` [batch, length] that is one of ``wanted``, or length where none is."""
    hit = (ids[..., None] == wanted).any(axis=-1)
    return mx.where(hit.any(axis=-1), mx.argmax(hit, axis=-1), ids.shape[-1])


def draw_next(logits: mx.array, u: mx.array, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0,
              ) -> mx.array:
    """Next token of the causal mode from ``logits`` [rows, vocabulary]; temperature 0 takes the argmax."""
    if temperature == 0:
        return mx.argmax(logits, axis=-1).astype(mx.int32)
    probabilities = mx.softmax(logits / temperature, axis=-1, precise=True)[:, None]
    one = mx.ones((logits.shape[0],))
    numbers = StepNumbers(one, one, one, top_k=one.astype(mx.int32) * top_k if top_k else None,
                          top_p=one * top_p if top_p < 1 else None, min_p=one * min_p if min_p else None,
                          few=few_candidates([top_k] * logits.shape[0]))
    return inverse_cdf(truncate(probabilities, numbers), u[:, None])[:, 0]


def few_candidates(top_k: Sequence[int]) -> tuple[bool, ...]:
    """``StepNumbers.few`` of rows with these ``top_k``: empty where it holds of none."""
    found = tuple(0 < k <= KEPT for k in top_k)
    return found if any(found) else ()
