"""Scores a model on generated tasks with known answers.

A suite is a set of tasks; ``nano`` is the one the built-in model was trained for, asked on held-out inputs only.  Every
prompt has its own seed, so a figure does not depend on the batch size.

    >>> report = evaluate(model, tokenizer, "nano", limit=500, seeds=[0])
    >>> report.exact_mean
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_diffgemma.device import describe
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.generate import GenerationResponse, GenerationWarning, batch_generate
from mlx_diffgemma.model import DiffusionGemma
from mlx_diffgemma.nano.tasks import TASKS, Example, Task, held_out_examples
from mlx_diffgemma.tokenizer import chat_ids

# "find" was trained too but not learnt: nano answers it no better than chance, as its card says.
SUITES: dict[str, tuple[str, ...]] = {"nano": tuple(name for name in TASKS if name != "find")}
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class TaskResult:
    """Figures of one task: ``score`` in [0, 1] with its 95 % interval over ``answers`` answers.

    ``steps_per_canvas``, ``tokens_per_forward`` and ``converged`` (share of canvases) are None for ``mode="ar"``.
    """

    task: str
    answers: int
    score: float
    low: float
    high: float
    canvases: int
    steps_per_canvas: float | None
    tokens_per_forward: float | None
    converged: float | None


@dataclass(frozen=True)
class EvaluationReport:
    mode: str
    seeds: tuple[int, ...]
    limit: int
    options: dict[str, object]
    machine: dict[str, str]
    results: tuple[TaskResult, ...]

    @property
    def exact_mean(self) -> float:
        """Mean score of the tasks scored by exact match."""
        exact = [r.score for r in self.results if TASKS[r.task].exact]
        return float(np.mean(exact)) if exact else math.nan

    def record(self) -> dict[str, object]:
        return {**asdict(self), "exact_mean": self.exact_mean}


def tasks_named(names: str) -> list[Task]:
    """Tasks of a comma-separated list of suites and tasks.  Errors: UserError for an unknown name."""
    chosen: dict[str, Task] = {}
    for name in filter(None, (part.strip() for part in names.split(","))):
        if name not in SUITES and name not in TASKS:
            raise UserError(f"Unknown task {name!r}; there are the suite(s) {', '.join(SUITES)} and the tasks {', '.join(TASKS)}.")
        chosen |= {task: TASKS[task] for task in SUITES.get(name, (name,))}
    if not chosen:
        raise UserError("No task named; give for example --tasks nano.")
    return list(chosen.values())


def evaluate(model: DiffusionGemma, tokenizer: TokenizerWrapper, tasks: str, limit: int = 500, seeds: Sequence[int] = (0,),
             batch_size: int = 16, progress: Progress | None = None, **options: Any) -> EvaluationReport:
    """Answer ``limit`` held-out prompts of each task under each seed; ``options`` as in ``batch_generate``."""
    if limit < 1 or not seeds:
        raise UserError(f"limit must be at least 1 and one seed given, got limit {limit} and {len(seeds)} seeds.")
    results = []
    for task in tasks_named(tasks):
        examples = held_out_examples(task, limit)
        prompts = [chat_ids(tokenizer, [{"role": "user", "content": e.prompt}]) for e in examples]
        answers: list[GenerationResponse] = []
        finished = itertools.count(1)

        def count(*_: object, name: str = task.name, finished: Iterator[int] = finished) -> None:
            if progress:
                progress(name, next(finished), limit * len(seeds))

        for seed in seeds:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", GenerationWarning)  # counted below
                answers += batch_generate(model, tokenizer, prompts, seeds=[seed * 1_000_003 + i for i in range(limit)],
                                          batch_size=batch_size, on_answer=count, **options)
        results.append(_result(task, examples * len(seeds), answers))
    return EvaluationReport(str(options.get("mode", "diffusion")), tuple(seeds), limit, dict(options), describe(model.dtype),
                            tuple(results))


def _result(task: Task, examples: Sequence[Example], answers: Sequence[GenerationResponse]) -> TaskResult:
    scores = np.array([task.score(answer.text, example) for answer, example in zip(answers, examples, strict=True)])
    low, high = _wilson(scores) if task.exact else _bootstrap(scores)
    canvases = [part for answer in answers for part in answer.parts if part.steps]
    forwards = sum(part.steps for part in canvases)
    return TaskResult(
        task.name, len(scores), float(scores.mean()), low, high, len(canvases),
        steps_per_canvas=forwards / len(canvases) if canvases else None,
        tokens_per_forward=sum(len(part.tokens) for part in canvases) / forwards if canvases else None,
        converged=float(np.mean([part.converged for part in canvases])) if canvases else None,
    )


def _wilson(scores: np.ndarray) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    n, p, z = scores.size, scores.mean(), 1.96
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return float((centre - half) / (1 + z * z / n)), float((centre + half) / (1 + z * z / n))


def _bootstrap(scores: np.ndarray, rounds: int = 2000) -> tuple[float, float]:
    means = np.random.default_rng(0).choice(scores, (rounds, scores.size)).mean(axis=1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))
