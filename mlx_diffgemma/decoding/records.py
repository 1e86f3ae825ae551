"""The records of the decoding loop: a ``CanvasStep`` for each denoising step, and a ``Canvas`` for
each finished canvas.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np


@dataclass(frozen=True)
class CanvasStep:
    """One denoising step of one session.

    Attributes:
        canvas_index: The number of the canvas in its answer, from 0.
        retry: The number of attempts at this canvas before this one.
        step: The number of the step in its attempt, from 0.  -1: a draft that was committed before
            any step; ``entropy`` and ``logprob`` then come from the causal mode.
        max_steps: The most steps the attempt may take.
        canvas: Ids [length] from which the next step would start.
        argmax: Ids [length] that would be committed now.
        accepted: Mask [length] of the positions whose tokens were kept.
        entropy: Nats [length].
        logprob: Log-probability [length] of the argmax under the scaled distribution.
        mean_entropy: Nats, over the positions that the stop rule counts.
        reason: Why the canvas ended: "converged", "plateau", "max_steps", "watchdog" or "judge".
            None while it continues.
        certificate: The stop rule under which it converged.
        rejected: Whether the canvas is thrown away.  The next step starts attempt ``retry`` + 1.
        draft: What a drafter proposed [length], -1 where it proposed nothing.
        surprise: Nats, under the causal mode, if the policy asked for it (see
            :class:`mlx_diffgemma.sampling.stopping.StopContext`).
        top: Ids and log-probabilities [length, n] of the most probable tokens, most probable first,
            under the distribution of ``logprob``.  Only on a stopped step of a session that asks
            for them.
    """

    canvas_index: int
    retry: int
    step: int
    max_steps: int
    canvas: mx.array
    argmax: mx.array
    accepted: mx.array
    entropy: mx.array
    logprob: mx.array
    mean_entropy: float
    reason: str | None = None
    certificate: str | None = None
    rejected: bool = False
    draft: mx.array | None = None
    surprise: float | None = None
    top: tuple[mx.array, mx.array] | None = None

    @property
    def stopped(self) -> bool:
        return self.reason is not None

    @property
    def committed(self) -> bool:
        return self.stopped and not self.rejected


@dataclass(frozen=True)
class Canvas:
    """A finished canvas and what it took.

    Attributes:
        tokens: Ids up to and including the first end token.
        logprobs: Log-probability of each token.
        steps: Denoising steps of all attempts.
        rows: Canvas rows that these steps computed.
        converged: Whether a stop rule ended it, not a limit.
        ended: Whether the answer ends with it.
        retries: Attempts before the one that was committed.
        proposed: Tokens of a drafter's proposal among ``tokens``.
        accepted: How many of the ``proposed`` were committed.
        certificate: The stop rule under which it converged.
        passes: Forward passes of the drafter.
        judged: Causal passes over the text of the argmax.  With the certificate "causal", the last
            of them is also the commit.
        judged_rows: Rows of these passes.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    steps: int
    rows: int
    converged: bool
    ended: bool
    retries: int = 0
    proposed: int = 0
    accepted: int = 0
    certificate: str | None = None
    passes: int = 0
    judged: int = 0
    judged_rows: int = 0
