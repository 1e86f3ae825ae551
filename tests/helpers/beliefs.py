"""Token distributions, as a denoising step makes them."""

import mlx.core as mx
import numpy as np

from mlx_diffgemma.sampling.sampler import Before, Flag, StepNumbers, sample_step
from mlx_diffgemma.sampling.self_conditioning import Belief

LENGTH, VOCABULARY = 24, 301  # of the tiny model


def logits_with(sharp, seed=0, ahead=40):
    """[1, LENGTH, VOCABULARY] whose first ``sharp`` positions are certain and whose others are
    flat.
    """
    logits = np.random.default_rng(seed).normal(0, 1, (1, LENGTH, VOCABULARY))
    logits[0, np.arange(sharp), np.arange(sharp)] += ahead
    return mx.array(logits.astype(np.float32))


def no_history(rows):
    shape = (rows, LENGTH)
    return Before(
        mx.zeros(shape, dtype=mx.int32),
        mx.zeros(shape, dtype=mx.bool_),
        mx.zeros((rows, 0, LENGTH), dtype=mx.int32),
    )


def belief(logits, temperature=0.7, tail=1e-6):
    rows = logits.shape[0]
    one = mx.ones((rows,))
    numbers = StepNumbers(one * temperature, one * 0.1, one * 0.005, tail=one * tail)
    step = sample_step(
        logits,
        None,
        mx.zeros((rows, LENGTH), dtype=mx.int32),
        no_history(rows),
        numbers,
        mx.array([1]),
    )
    counts = [int(row[Flag.UNCOVERED]) for row in step.flags.tolist()]
    return Belief(logits, numbers.temperature, step.kept, step.uncovered, counts)
