"""Checks of sorting, selecting and sampling over the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from mlx_diffgemma.diagnostics.operations.checks import Checks, Result
from mlx_diffgemma.model.layers import soft_cap
from mlx_diffgemma.sampling import sampler


def ordering(checks: Checks) -> Iterator[Result]:
    """Check maxima, sorts, and operations on NaN and infinity."""
    size = checks.sizes.vocabulary
    length = checks.sizes.length
    ties = np.zeros((2, size), dtype=np.float32)
    ties[0, [7, 9, size - 1]] = 5
    ties[1] = 1
    yield checks.equal(
        "argmax takes the first of equals", mx.argmax(mx.array(ties), axis=-1), [7, 0]
    )
    yield checks.equal(
        "argmax of a mask takes the first True", mx.argmax(mx.array(ties > 0), axis=-1), [7, 0]
    )
    entropies = np.repeat(checks.rng.permutation(length // 4).astype(np.float32), 4)[None]
    yield checks.equal(
        "argsort is stable",
        mx.argsort(mx.array(entropies), axis=-1),
        np.argsort(entropies, kind="stable"),
    )
    uncovered = checks.rng.random(length) > 0.5
    order = mx.argsort((~mx.array(uncovered)).astype(mx.uint8))
    yield checks.equal("argsort of a mask as uint8", order, np.argsort(~uncovered, kind="stable"))
    long = checks.normal(2, size)
    yield checks.equal("sort of the vocabulary", mx.sort(mx.array(long), axis=-1), np.sort(long))
    experts = checks.rng.integers(0, checks.sizes.experts, max(checks.sizes.expert_rows)).astype(
        np.uint32
    )
    yield checks.equal(
        "argsort of expert numbers",
        mx.argsort(mx.array(experts)),
        np.argsort(experts, kind="stable"),
    )
    capped = soft_cap(mx.array([1.0, mx.inf, -mx.inf, mx.nan]), mx.array(30.0))
    yield checks.equal(
        "soft cap turns infinity into NaN", mx.isnan(capped), [False, True, True, True]
    )
    yield checks.equal(
        "maximum passes NaN on", mx.isnan(mx.maximum(mx.array([mx.nan]), 0.0)), [True]
    )
    finite = mx.isfinite(mx.array([1.0, mx.nan, mx.inf]))
    yield checks.equal("isfinite sees NaN and infinity", finite, [True, False, False])


def sampling(checks: Checks) -> Iterator[Result]:
    """Check the sampler over the vocabulary."""
    yield from _distribution(checks)
    yield from _acceptance(checks)


def _distribution(checks: Checks) -> Iterator[Result]:
    """Check the largest logits, their probabilities, and the draw of a token."""
    size = checks.sizes.vocabulary
    length = checks.sizes.length
    logits = checks.normal(1, length, size, scale=3.0)
    device = mx.array(logits)
    rows = checks.some(length)
    best = -np.sort(-logits[0, rows], axis=-1)[:, : sampler.KEPT]
    kept = mx.take_along_axis(device, sampler.largest(device, sampler.KEPT), axis=-1)
    kept_sorted = -np.sort(-np.array(kept)[0, rows], axis=-1)
    yield checks.equal("the 64 largest of the vocabulary", kept_sorted, best)
    host = logits[0, rows].astype(np.float64)
    host -= host.max(axis=-1, keepdims=True)
    exact = np.exp(host)
    total = exact.sum(axis=-1, keepdims=True)
    probabilities = mx.softmax(device, axis=-1)
    yield checks.near(
        "softmax over the vocabulary",
        np.array(probabilities)[0, rows],
        exact / total,
        checks.sum_bound,
    )
    sums = mx.logsumexp(device - mx.max(device, axis=-1, keepdims=True), axis=-1)
    yield checks.near(
        "logsumexp over the vocabulary",
        np.array(sums)[0, rows],
        np.log(total[:, 0]),
        checks.sum_bound,
    )
    u = checks.rng.random((1, length)).astype(np.float32)
    u[0, rows[:2]] = (0.0, 1 - 2.0**-24)
    tokens = np.array(sampler.inverse_cdf(probabilities, mx.array(u)))[0, rows]
    running = np.cumsum(exact, axis=-1) / total
    index = np.arange(len(rows))
    valid = (tokens >= 0) & (tokens < size)
    tokens = np.clip(tokens, 0, size - 1)
    below = np.where(tokens > 0, running[index, tokens - 1], 0)
    drawn = u[0, rows]
    inside = (drawn >= below - 2e-6) & (drawn <= running[index, tokens] + 2e-6)
    expected = np.ones(len(rows), dtype=bool)
    yield checks.equal("the drawn token's interval holds u", valid & inside, expected)


def _acceptance(checks: Checks) -> Iterator[Result]:
    """Check the positions within the entropy bound, the router's choice, and scattered writes."""
    length = checks.sizes.length
    entropy = np.abs(checks.normal(1, length))
    order = np.argsort(entropy[0], kind="stable")
    before = np.cumsum(entropy[0, order].astype(np.float64)) - entropy[0, order]
    bound = float(before[length // 2] + before[length // 2 + 1]) / 2
    accepted = np.zeros(length, dtype=bool)
    accepted[order] = before <= bound
    computed = sampler.accept(mx.array(entropy), mx.array([bound]))[0]
    yield checks.equal("positions within the entropy bound", computed, accepted)
    scores = checks.normal(length, checks.sizes.experts)
    few = min(8, checks.sizes.experts - 1)
    chosen = mx.argpartition(-mx.array(scores), few - 1, axis=-1)[:, :few]
    best = np.argsort(-scores, axis=-1)[:, :few]
    yield checks.equal(
        "the router's experts", np.sort(np.array(chosen), axis=-1), np.sort(best, axis=-1)
    )
    values = mx.arange(10, 10 + length)
    moved = mx.put_along_axis(values, mx.array([3, 1]), mx.array([0, 1]), axis=0)
    yield checks.equal("put_along_axis of int32", moved[:4], [10, 1, 12, 0])
