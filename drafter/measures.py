"""What a way of answering costs, loses and changes, beside the reference under the same seeds.

A cost is counted in denoising steps: a pass of the drafter, a commit and a judge's pass have their shares of a step's
multiply-adds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from drafter.config import DrafterConfig
from drafter.run import share
from mlx_diffgemma import cost
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.session import Canvas

RESAMPLES = 2000


@dataclass(frozen=True)
class Answered:
    """One question under one seed: its score, its canvases, and the ids of each, whole."""

    score: float
    canvases: tuple[Canvas, ...]
    committed: tuple[np.ndarray, ...]

    def total(self, name: str) -> int:
        return sum(getattr(canvas, name) for canvas in self.canvases)

    @property
    def commits(self) -> int:
        """Causal passes that only committed: of every canvas but the last, unless the judge's pass did it."""
        return sum("causal" not in (canvas.certificate or "") for canvas in self.canvases[:-1])

    @property
    def text(self) -> tuple[int, ...]:
        return tuple(int(token) for canvas in self.canvases for token in canvas.tokens)


@dataclass(frozen=True)
class Shares:
    """What a pass of the drafter, a commit and a judge's pass take of a denoising step's multiply-adds; the last reads the text's
    rows only, and takes so much less."""

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
        """In denoising steps; ``free_steps`` leaves those out."""
        steps = 0 if free_steps else answered.total("steps")
        judged = answered.total("judged_rows") / answered.committed[0].size
        causal = self.judge * judged + self.commit * answered.commits
        return steps + causal + self.draft * answered.total("passes")


@dataclass(frozen=True)
class WayResult:
    """A way to answer, over all questions and seeds.

    ``steps`` and ``forwards`` of the target a canvas, ``rows`` of them, and ``cost`` in denoising steps with everything counted;
    ``ratio`` of that to the reference's, and the same for the ``longest``: the questions that took most of the reference, up to a
    third of all it spent; ``longest_steps`` is the ratio of their steps.  Of the drafter ``passes``, and of the causal mode
    ``judged_passes`` with ``judged_rows``, as a share of the canvas's, and ``commits`` beside them, all a canvas.
    ``loss`` of mean score against the reference, in points, with the upper end of its 95 % interval.  ``drafted`` tokens of a
    canvas's text, of which ``right`` were committed; ``judged`` is the share of canvases that the causal mode certified,
    ``retries`` that of those begun anew.  ``same``: texts as the reference's.  ``drift`` is the squared distance between the
    distributions of the tokens at each place and ``text_drift`` that between those of whole texts (see ``drift``); ``variety`` is
    the chance that two seeds give different tokens at a place.
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


def drift(own: Sequence[Sequence[Answered]], reference: Sequence[Sequence[Answered]],
          of: Callable[[Answered], Sequence[Any]]) -> float:
    """The squared distance between the distributions of ``own`` and ``reference`` [seeds][questions], for each entry of what ``of``
    makes of an answer, in mean over entries and questions; pairs of one seed, which share their random numbers, are left out.

    An unbiased estimate of sum (p - q)^2: what a token at a place, say, is under the one and under the other.  It is around 0
    where the two ways are one.  Source: the energy distance (Székely and Rizzo 2013) under the discrete metric.
    """
    found = []
    for question in range(len(own[0])):
        length = max(len(of(run[question])) for run in (*own, *reference))
        across, inside, outside = (_differ(a, b, question, of, length) for a, b in ((own, reference), (own, own),
                                                                                    (reference, reference)))
        found.append(float(np.mean(2 * across - inside - outside)))
    return float(np.mean(found))


def _differ(a: Sequence[Sequence[Answered]], b: Sequence[Sequence[Answered]], question: int,
            of: Callable[[Answered], Sequence[Any]], length: int = 0) -> np.ndarray:
    """[entries] how often an answer under one seed and one under another differ; short ones are filled up."""
    x, y = ([list(map(hash, of(run[question]))) for run in runs] for runs in (a, b))
    length = length or max(map(len, x + y))
    left, right = (np.array([[*one, *[-1] * (length - len(one))] for one in ways]) for ways in (x, y))
    pairs = [left[i] != right[j] for i in range(len(a)) for j in range(len(b)) if i != j]
    different: np.ndarray = np.mean(pairs, axis=0)
    return different


def a_canvas(answers: Iterable[Answered], value: Callable[[Answered], float]) -> float:
    answers = list(answers)
    return sum(map(value, answers)) / sum(len(a.canvases) for a in answers)


def way_result(name: str, own: Sequence[Sequence[Answered]], reference: Sequence[Sequence[Answered]], shares: Shares,
               free_steps: bool) -> WayResult:
    """What ``own`` answers [seeds][questions] came to, beside those of the ``reference``; ``free_steps``: the target took none."""
    flat, before = [a for run in own for a in run], [a for run in reference for a in run]

    def spent(a: Answered) -> float:
        return shares.spent(a, free_steps)

    def scores(runs: Sequence[Sequence[Answered]]) -> np.ndarray:
        return np.array([[a.score for a in run] for run in runs]).mean(axis=0)

    effort = np.array([[shares.spent(a) for a in run] for run in reference]).sum(axis=0)
    order = np.argsort(-effort, kind="stable")
    most = order[: 1 + int(np.searchsorted(np.cumsum(effort[order]), effort.sum() / 3))]
    long, long_before = ([run[i] for run in runs for i in most] for runs in (own, reference))
    losses = 100 * (scores(reference) - scores(own))
    rng = np.random.default_rng(0)
    means = losses[rng.integers(0, losses.size, (RESAMPLES, losses.size))].mean(axis=1)
    proposed, cost_of = sum(a.total("proposed") for a in flat), a_canvas(flat, spent)
    certified = [canvas.certificate or "" for a in flat for canvas in a.canvases]

    def forwards(a: Answered) -> int:
        return (0 if free_steps else a.total("steps")) + a.total("judged") + a.commits

    def rows(a: Answered) -> int:
        return ((0 if free_steps else a.total("steps")) + a.commits) * a.committed[0].size + a.total("judged_rows")

    return WayResult(
        name=name, score=float(np.mean([a.score for a in flat])),
        steps=0.0 if free_steps else a_canvas(flat, lambda a: a.total("steps")), forwards=a_canvas(flat, forwards),
        rows=a_canvas(flat, rows), cost=cost_of, ratio=cost_of / a_canvas(before, shares.spent),
        longest=a_canvas(long, spent) / a_canvas(long_before, shares.spent),
        longest_steps=a_canvas(long, lambda a: a.total("steps")) / a_canvas(long_before, lambda a: a.total("steps")),
        passes=a_canvas(flat, lambda a: a.total("passes")), judged_passes=a_canvas(flat, lambda a: a.total("judged")),
        judged_rows=a_canvas(flat, lambda a: a.total("judged_rows") / a.committed[0].size),
        commits=a_canvas(flat, lambda a: a.commits), loss=float(losses.mean()),
        loss_bound=float(np.quantile(means, 0.975)), drafted=proposed / len(certified),
        right=sum(a.total("accepted") for a in flat) / proposed if proposed else None,
        judged=float(np.mean(["causal" in one for one in certified])), retries=a_canvas(flat, lambda a: a.total("retries")),
        same=float(np.mean([a.text == b.text for a, b in zip(flat, before, strict=True)])),
        drift=drift(own, reference, lambda a: a.text), text_drift=drift(own, reference, lambda a: [a.text]),
        variety=float(np.mean([_differ(own, own, i, lambda a: a.text).mean() for i in range(len(own[0]))])))
