"""The costs, losses and changes of a configuration, against the reference under the same seeds.

Costs are counted in denoising steps.  A pass of the drafter, a commit and a verification count by
their shares of a step's multiply-adds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from drafter.config import DrafterConfig
from drafter.run import share
from mlx_diffgemma.decoding.records import Canvas
from mlx_diffgemma.estimate import cost
from mlx_diffgemma.model.config import ModelConfig

RESAMPLES = 2000


@dataclass(frozen=True)
class Answered:
    """One question under one seed.

    Attributes:
        score: The score of the answer.
        canvases: Its canvases.
        committed: The ids of each canvas, including those after the end of the text.
    """

    score: float
    canvases: tuple[Canvas, ...]
    committed: tuple[np.ndarray, ...]

    @property
    def length(self) -> int:
        """The positions of a canvas."""
        return self.committed[0].size

    def total(self, name: str) -> int:
        """The sum of a counter over all canvases."""
        return sum(getattr(canvas, name) for canvas in self.canvases)

    @property
    def commits(self) -> int:
        """The number of causal passes that only committed.

        Every canvas but the last has one, unless the verifier's pass committed it.
        """
        return sum("causal" not in (canvas.certificate or "") for canvas in self.canvases[:-1])

    @property
    def text(self) -> tuple[int, ...]:
        return tuple(int(token) for canvas in self.canvases for token in canvas.tokens)


Runs = Sequence[Sequence[Answered]]  # [seeds][questions]


@dataclass(frozen=True)
class Shares:
    """The costs of a pass of the drafter, a commit and a verification, in denoising steps.

    ``judge`` is the cost of verifying a whole canvas.  A verification reads only the rows of the
    text, and costs less in proportion.
    """

    draft: float
    commit: float
    judge: float

    @classmethod
    def of(cls, drafter: DrafterConfig, config: ModelConfig) -> Shares:
        flops = cost.step_flops(config, 0)
        whole = sum(value for part, value in flops.items() if part != "scores")
        commit = (flops["attention"] + flops["dense_mlp"] + flops["experts"]) / whole
        return cls(share(drafter, config), commit, commit + flops["head"] / whole)

    def spent(self, answered: Answered, free_steps: bool = False) -> float:
        """The cost of an answer in denoising steps; ``free_steps`` leaves out the steps of the
        target.
        """
        steps = 0 if free_steps else answered.total("steps")
        judged = answered.total("judged_rows") / answered.length
        causal = self.judge * judged + self.commit * answered.commits
        return steps + causal + self.draft * answered.total("passes")


@dataclass(frozen=True)
class WayResult:
    """A configuration ("way"), over all questions and seeds.

    The numbers of steps, forwards, rows, passes, commits and drafted tokens are means for a canvas.

    Attributes:
        name: The name of the configuration.
        score: The mean score.
        steps: The denoising steps.
        forwards: The forwards of the target.
        rows: The rows of these forwards.
        cost: The cost in denoising steps, with everything counted.
        ratio: ``cost`` divided by that of the reference.
        longest: ``ratio`` for the questions that cost most under the reference, up to a third of
            all its costs.
        longest_steps: The ratio of the denoising steps for these questions.
        passes: The passes of the drafter.
        judged_passes: The passes of the causal mode that verify.
        judged_rows: The rows of these passes, as a share of the canvas.
        commits: The passes of the causal mode that only commit.
        loss: The loss of mean score against the reference, in points.
        loss_bound: The upper end of its 95 % interval.
        drafted: The tokens of the text that were drafted.
        right: The share of these that were committed.
        judged: The share of canvases that the verifier accepted.
        retries: How often a canvas was started again.
        same: The share of texts that equal the reference's.
        drift: The squared distance between the distributions of tokens at each position (see
            ``drift``).
        text_drift: The squared distance between the distributions of whole texts.
        variety: The chance that two seeds give different tokens at a position.
    """

    name: str
    score: float
    steps: float
    forwards: float
    rows: float
    cost: float
    ratio: float
    longest: float
    longest_steps: float
    passes: float
    judged_passes: float
    judged_rows: float
    commits: float
    loss: float
    loss_bound: float
    drafted: float
    right: float | None
    judged: float
    retries: float
    same: float
    drift: float
    text_drift: float
    variety: float


def drift(
    answers: Runs,
    reference: Runs,
    entries_of: Callable[[Answered], Sequence[Any]],
) -> float:
    """The squared distance between two distributions of answers.

    It is an unbiased estimate of sum (p - q)^2, where p and q are for example the probabilities of
    a token at a position under the two configurations.  It is around 0 where both are the same.
    Pairs of one seed share their random numbers and are left out.  Source: the energy distance
    (Székely and Rizzo 2013) under the discrete metric.

    Args:
        answers: [seeds][questions].
        reference: [seeds][questions].
        entries_of: The entries of an answer to compare, such as its tokens.

    Returns:
        The mean over entries and questions.
    """
    distances = []
    for question in range(len(answers[0])):
        length = max(len(entries_of(run[question])) for run in (*answers, *reference))
        across = _differ(answers, reference, question, entries_of, length)
        inside = _differ(answers, answers, question, entries_of, length)
        outside = _differ(reference, reference, question, entries_of, length)
        distances.append(float(np.mean(2 * across - inside - outside)))
    return float(np.mean(distances))


def _differ(
    first: Runs,
    second: Runs,
    question: int,
    entries_of: Callable[[Answered], Sequence[Any]],
    length: int = 0,
) -> np.ndarray:
    """How often an answer under one seed and one under another differ.

    Args:
        first: [seeds][questions].
        second: [seeds][questions].
        question: The index of the question.
        entries_of: The entries of an answer to compare.
        length: Short answers are padded to this many entries, and at least to the longest answer.

    Returns:
        [entries], the share of pairs that differ.
    """
    left = [list(map(hash, entries_of(run[question]))) for run in first]
    right = [list(map(hash, entries_of(run[question]))) for run in second]
    length = length or max(map(len, left + right))
    left_rows = _padded(left, length)
    right_rows = _padded(right, length)
    pairs = []
    for i in range(len(first)):
        pairs += [left_rows[i] != right_rows[j] for j in range(len(second)) if i != j]
    different: np.ndarray = np.mean(pairs, axis=0)
    return different


def _padded(rows: Sequence[list[int]], length: int) -> np.ndarray:
    """``rows`` as an array [rows, length], padded with -1."""
    return np.array([row + [-1] * (length - len(row)) for row in rows])


def a_canvas(answers: Iterable[Answered], value: Callable[[Answered], float]) -> float:
    """The mean of ``value`` for a canvas: its sum over all answers, divided by their canvases."""
    answers = list(answers)
    return sum(map(value, answers)) / sum(len(answered.canvases) for answered in answers)


@dataclass(frozen=True)
class _Costs:
    """Counts the costs of an answer; with ``free_steps``, steps of the target cost nothing."""

    shares: Shares
    free_steps: bool

    def steps(self, answered: Answered) -> int:
        return 0 if self.free_steps else answered.total("steps")

    def spent(self, answered: Answered) -> float:
        return self.shares.spent(answered, self.free_steps)

    def forwards(self, answered: Answered) -> int:
        return self.steps(answered) + answered.total("judged") + answered.commits

    def rows(self, answered: Answered) -> int:
        whole = (self.steps(answered) + answered.commits) * answered.length
        return whole + answered.total("judged_rows")


def way_result(
    name: str,
    answers: Runs,
    reference: Runs,
    shares: Shares,
    free_steps: bool,
) -> WayResult:
    """Compare a configuration with the reference.

    Args:
        name: The name of the configuration.
        answers: Its answers [seeds][questions].
        reference: The reference's answers [seeds][questions].
        shares: What passes, commits and verification cost.
        free_steps: Steps of the target cost nothing.

    Returns:
        Scores, costs and differences.
    """
    flat = [answered for run in answers for answered in run]
    before = [answered for run in reference for answered in run]
    longest = _longest(reference, shares)
    long = [run[question] for run in answers for question in longest]
    long_before = [run[question] for run in reference for question in longest]
    loss, loss_bound = _loss(answers, reference)
    costs = _Costs(shares, free_steps)
    proposed = sum(answered.total("proposed") for answered in flat)
    certificates = [canvas.certificate or "" for answered in flat for canvas in answered.canvases]

    cost_of = a_canvas(flat, costs.spent)
    long_steps = a_canvas(long, _steps) / a_canvas(long_before, _steps)
    return WayResult(
        name=name,
        score=float(np.mean([answered.score for answered in flat])),
        steps=float(a_canvas(flat, costs.steps)),
        forwards=a_canvas(flat, costs.forwards),
        rows=a_canvas(flat, costs.rows),
        cost=cost_of,
        ratio=cost_of / a_canvas(before, shares.spent),
        longest=a_canvas(long, costs.spent) / a_canvas(long_before, shares.spent),
        longest_steps=long_steps,
        passes=a_canvas(flat, lambda answered: answered.total("passes")),
        judged_passes=a_canvas(flat, lambda answered: answered.total("judged")),
        judged_rows=a_canvas(
            flat, lambda answered: answered.total("judged_rows") / answered.length
        ),
        commits=a_canvas(flat, lambda answered: answered.commits),
        loss=loss,
        loss_bound=loss_bound,
        drafted=proposed / len(certificates),
        right=sum(answered.total("accepted") for answered in flat) / proposed if proposed else None,
        judged=float(np.mean(["causal" in certificate for certificate in certificates])),
        retries=a_canvas(flat, lambda answered: answered.total("retries")),
        same=float(np.mean([a.text == b.text for a, b in zip(flat, before, strict=True)])),
        drift=drift(answers, reference, _text),
        text_drift=drift(answers, reference, lambda answered: [answered.text]),
        variety=_variety(answers),
    )


def _loss(answers: Runs, reference: Runs) -> tuple[float, float]:
    """The loss against the reference.

    Returns:
        (the loss of mean score in points, the upper end of its 95 % interval)
    """
    losses = 100 * (_mean_scores(reference) - _mean_scores(answers))
    rng = np.random.default_rng(0)
    means = losses[rng.integers(0, losses.size, (RESAMPLES, losses.size))].mean(axis=1)
    return float(losses.mean()), float(np.quantile(means, 0.975))


def _variety(answers: Runs) -> float:
    """The chance that two seeds give different tokens at a position."""
    questions = range(len(answers[0]))
    return float(np.mean([_differ(answers, answers, q, _text).mean() for q in questions]))


def _steps(answered: Answered) -> int:
    return answered.total("steps")


def _text(answered: Answered) -> tuple[int, ...]:
    return answered.text


def _mean_scores(runs: Runs) -> np.ndarray:
    """The mean score over the seeds [questions]."""
    return np.array([[answered.score for answered in run] for run in runs]).mean(axis=0)


def _longest(reference: Runs, shares: Shares) -> np.ndarray:
    """The questions that cost most under the reference, up to a third of all its costs."""
    costs = [[shares.spent(answered) for answered in run] for run in reference]
    effort = np.array(costs).sum(axis=0)
    order = np.argsort(-effort, kind="stable")
    third = np.searchsorted(np.cumsum(effort[order]), effort.sum() / 3)
    return order[: 1 + int(third)]
