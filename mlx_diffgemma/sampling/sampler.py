"""One step of the canvas sampler: pure functions of logits, canvas and numbers.

The module uses neither the model nor the text.  Source: EntropyBoundSampler and
StableAndConfidentStoppingCriteria of transformers (generation_diffusion_gemma.py); the acceptance
rule is that of arXiv 2505.24857.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import mlx.core as mx

from mlx_diffgemma.sampling import truncation

KEPT = 64  # tokens of a position that sparse self-conditioning uses
CHUNK = 64  # tokens of the vocabulary in a chunk; a chunk is found before the token in it


class Flag:
    """The columns of ``SamplerStep.flags``, the only array that the host reads at each step."""

    STOP, MEAN_ENTROPY, NON_FINITE, EOS_POSITION, UNCOVERED, COUNT = 0, 1, 2, 3, 4, 5


@dataclass(frozen=True)
class StepNumbers:
    """The parameters of a step, one entry for each row of the batch; all are [batch].

    Attributes:
        temperature: The temperature of the schedule at this step.
        entropy_bound: Nats.
        confidence: Nats.
        greedy: Rows that take the argmax instead of the draw.
        top_k, top_p, min_p: These affect only the draw.  0, 1 and 0 are off.
        few: Rows with a top_k from 1 to KEPT, whose candidates are found faster.
        tail: Asks for the KEPT most probable tokens, and for the positions where more than this
            share of the mass lies outside of them.
        positions: The number of positions in the mean entropy, if it is more than the rows:
            positions that left the canvas count as certain.
        threshold: Replaces the entropy bound: a position is accepted permanently when its token
            has at least this probability.
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
    """The input of a step.

    Attributes:
        canvas: The ids [batch, length].
        accepted: The mask [batch, length] of the previous step.
        history: The argmax canvases of earlier steps [batch, stability, length]; -1 where there was
            no step.
    """

    canvas: mx.array
    accepted: mx.array
    history: mx.array


class SamplerStep(NamedTuple):
    """The outcome of a step.

    ``canvas`` and ``argmax`` are ids, ``accepted`` is a mask, ``entropy`` is in nats and
    ``logprob`` is that of the argmax; all are [batch, length].  ``flags`` are [batch, Flag.COUNT].
    With a ``tail``, ``kept`` are ids [batch, length, KEPT] and ``uncovered`` is a mask.
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
    """The marginal distributions of the positions in a step.

    ``argmax`` and ``drawn`` are ids, ``entropy`` is in nats, ``logprob`` is that of the argmax and
    ``probability`` is that of the drawn token; all are [batch, length].  With a ``tail``, ``kept``
    are the ids of the most probable tokens [batch, length, KEPT], and ``covered`` is their mass.
    """

    argmax: mx.array
    drawn: mx.array
    entropy: mx.array
    logprob: mx.array
    probability: mx.array
    kept: mx.array | None = None
    covered: mx.array | None = None


def independent(logits: mx.array, u: mx.array | None, numbers: StepNumbers) -> Marginals:
    """The marginals of each position on its own.

    Args:
        logits: Soft-capped float32 logits [batch, length, vocabulary].
        u: As in ``sample_step``.
        numbers: The parameters of the step.
    """
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
    """Take one step.  The argmax canvas of the last step is the one that is committed.

    Args:
        logits: Soft-capped float32 logits [batch, length, vocabulary].
        u: The numbers [batch, length] of the draw.  None: every row takes the argmax.
        renoise: The ids [batch, length] for renoising.
        before: The input of the step.
        numbers: The parameters of the step.
        eos_ids: The end tokens.
        forced: The marginals under constraints, which replace those of the logits.
    """
    own = independent(logits, u, numbers) if forced is None else forced
    argmax, drawn, entropy = own.argmax, own.drawn, own.entropy
    mean_entropy = (
        entropy.mean(axis=-1)
        if numbers.positions is None
        else entropy.sum(axis=-1) / numbers.positions
    )
    stop = is_stable(argmax, before.history) & (mean_entropy < numbers.confidence)
    if numbers.threshold is None:
        accepted = accept(entropy, numbers.entropy_bound)
        kept_tokens = drawn
    else:
        accepted = before.accepted | reveal(own.probability, before.accepted, numbers.threshold)
        kept_tokens = mx.where(before.accepted, before.canvas, drawn)
        stop = stop | accepted.all(axis=-1)
    finite = mx.isfinite(entropy + own.logprob).all(
        axis=-1
    )  # a NaN or infinity anywhere has reached one of the sums
    uncovered = mx.zeros(argmax.shape, dtype=mx.bool_)
    if numbers.tail is not None and own.covered is not None:
        uncovered = 1 - own.covered > numbers.tail[:, None]
    flags = mx.stack(
        [stop, mean_entropy, ~finite, first_position(argmax, eos_ids), uncovered.sum(axis=-1)],
        axis=-1,
    )
    return SamplerStep(
        canvas=mx.where(
            accepted, kept_tokens, renoise
        ),  # every position that is not accepted now, even if it was before
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
    """Return exp d and d exp d of the scaled distance d from ``top``, in one pass over logits."""
    distance = (logits - top) / temperature
    weights = mx.exp(distance)
    return weights, distance * weights


def _chunked(x: mx.array, fill: float) -> mx.array:
    """Reshape [..., vocabulary] to [..., chunks, CHUNK]; the last chunk is padded with ``fill``."""
    if missing := -x.shape[-1] % CHUNK:
        x = mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)], constant_values=fill)
    return x.reshape(*x.shape[:-1], -1, CHUNK)


def _sums(x: mx.array) -> mx.array:
    """The sum of each chunk [..., chunks].  Two short sums have less rounding than one long sum."""
    return _chunked(x, 0.0).sum(axis=-1)


def inverse_cdf(probabilities: mx.array, u: mx.array) -> mx.array:
    """Inverse transform sampling: the token at which the running sum passes the share ``u``.

    ``probabilities`` [..., vocabulary] may have any total.  The chunk is found first, by the sums
    of the chunks, and then the token in it.  A token of probability zero is never drawn, even if
    rounding makes ``u`` times the total equal to the total, or if a parallel scan makes the running
    sum uneven where it should be flat.
    """
    chunks = _chunked(probabilities, 0.0)
    sums = chunks.sum(axis=-1)
    chunk, before = passing(sums, u * sums.sum(axis=-1))
    inside = mx.take_along_axis(chunks, chunk[..., None, None], axis=-2)[..., 0, :]
    token, _ = passing(inside, u * sums.sum(axis=-1) - before)
    return (chunk * CHUNK + token).astype(mx.int32)


def passing(weights: mx.array, target: mx.array) -> tuple[mx.array, mx.array]:
    """Find the first nonzero entry of ``weights`` [..., n] at which the running sum exceeds
    ``target`` [...], or else the last nonzero one.  Returns its index and the sum before it.
    """
    running, possible = mx.cumsum(weights, axis=-1), weights > 0
    passed = possible & (running > target[..., None])
    last = mx.argmax(mx.where(possible, running, -1.0), axis=-1)
    index = mx.where(passed.any(axis=-1), mx.argmax(passed, axis=-1), last)
    return index, mx.take_along_axis(running - weights, index[..., None], axis=-1)[..., 0]


def largest(x: mx.array, k: int) -> mx.array:
    """The indices [..., k] of the ``k`` largest entries of ``x`` [..., vocabulary], in no order.

    The search has two stages and is exact: the k largest entries lie in the k chunks with the
    largest maxima.
    """
    chunks = _chunked(x, -mx.inf)
    if chunks.shape[-2] <= k:
        return mx.argpartition(-x, k - 1, axis=-1)[..., :k]
    chosen = mx.argpartition(-chunks.max(axis=-1), k - 1, axis=-1)[..., :k]
    candidates = mx.take_along_axis(chunks, chosen[..., None], axis=-2).flatten(-2)
    inner = mx.argpartition(-candidates, k - 1, axis=-1)[..., :k]
    return mx.take_along_axis(chosen, inner // CHUNK, axis=-1) * CHUNK + inner % CHUNK


def truncate(weights: mx.array, numbers: StepNumbers) -> mx.array:
    """Set the weights of all tokens that top_k, top_p and min_p leave out to zero.

    ``weights`` [batch, length, vocabulary] may have any total.  The largest weight always stays.
    :mod:`mlx_diffgemma.sampling.truncation` says what each option keeps, and how ties are treated.
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
    """The least weight that top_k and top_p keep [batch, length].  It does not depend on the other
    rows of the batch.
    """
    total, top_k, top_p = _sums(weights).sum(axis=-1), numbers.top_k, numbers.top_p
    if top_k is None or not numbers.few:
        return truncation.of_all(weights, total, top_k, top_p)
    candidates = mx.take_along_axis(
        weights, largest(weights, min(KEPT, weights.shape[-1])), axis=-1
    )
    found = truncation.of_candidates(candidates, total, top_k, top_p)
    if all(numbers.few):
        return found
    return mx.where(
        mx.array(numbers.few)[:, None], found, truncation.of_all(weights, total, top_k, top_p)
    )


def accept(entropy: mx.array, bound: mx.array) -> mx.array:
    """Accept positions in ascending order of entropy while the sum of those before is at most
    ``bound``.

    ``entropy`` [batch, length] and ``bound`` [batch] are in nats.  The result is a mask.  The most
    certain position is always accepted.
    """
    order = mx.argsort(entropy, axis=-1)
    ascending = mx.take_along_axis(entropy, order, axis=-1)
    chosen = mx.cumsum(ascending, axis=-1) - ascending <= bound[:, None]
    return mx.take_along_axis(chosen, mx.argsort(order, axis=-1), axis=-1)


def reveal(probability: mx.array, revealed: mx.array, threshold: mx.array) -> mx.array:
    """The mask [batch, length] of the positions that are newly accepted.

    They are those not ``revealed`` yet whose token has at least the probability ``threshold``.  If
    there are none, it is the most probable one.  Source: the confidence-threshold sampler of
    mlx-vlm.

    Args:
        probability: The probability of each token [batch, length].
        revealed: The mask [batch, length] of the positions accepted so far.
        threshold: [batch].
    """
    waiting = mx.where(revealed, -1.0, probability)
    best = waiting == waiting.max(axis=-1, keepdims=True)
    best = best & (mx.cumsum(best.astype(mx.int32), axis=-1) == 1)
    passed = waiting >= threshold[:, None]
    return ~revealed & mx.where(passed.any(axis=-1, keepdims=True), passed, best)


def is_stable(argmax: mx.array, history: mx.array) -> mx.array:
    """Whether ``argmax`` [batch, length] equals every entry of ``history`` [batch, n, length].

    The result is [batch].  With n = 0 every row is stable.
    """
    return (history == argmax[:, None]).all(axis=(-2, -1))


def first_position(ids: mx.array, wanted: mx.array) -> mx.array:
    """The first position [batch] of ``ids`` [batch, length] that holds one of ``wanted``; length if
    there is none.
    """
    hit = (ids[..., None] == wanted).any(axis=-1)
    return mx.where(hit.any(axis=-1), mx.argmax(hit, axis=-1), ids.shape[-1])


def draw_next(
    logits: mx.array,
    u: mx.array,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> mx.array:
    """Draw the next token [rows] of the causal mode.

    Args:
        logits: [rows, vocabulary].
        u: The number [rows] of each draw.
        temperature: 0 takes the argmax.
        top_k, top_p, min_p: 0, 1 and 0 are off.
    """
    if temperature == 0:
        return mx.argmax(logits, axis=-1).astype(mx.int32)
    probabilities = mx.softmax(logits / temperature, axis=-1, precise=True)[:, None]
    one = mx.ones((logits.shape[0],))
    numbers = StepNumbers(
        one,
        one,
        one,
        top_k=one.astype(mx.int32) * top_k if top_k else None,
        top_p=one * top_p if top_p < 1 else None,
        min_p=one * min_p if min_p else None,
        few=few_candidates([top_k] * logits.shape[0]),
    )
    return inverse_cdf(truncate(probabilities, numbers), u[:, None])[:, 0]


def few_candidates(top_k: Sequence[int]) -> tuple[bool, ...]:
    """``StepNumbers.few`` of rows with these ``top_k``; empty if it holds for no row."""
    found = tuple(0 < k <= KEPT for k in top_k)
    return found if any(found) else ()
