"""Asks a model the questions of tasks and counts: scores with intervals, steps of right and of wrong answers, groups.

Every question has its own seed, so a figure does not depend on the batch size.

    >>> report = evaluate(model, tokenizer, tasks_named("nano"), limit=500, seeds=[0])
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

from mlx_diffgemma.decide import Labels, average, canvas_for, read_labels, read_prompt
from mlx_diffgemma.device import describe
from mlx_diffgemma.drafting import DraftModel
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.evaluation.tasks import Mark, Question, Task
from mlx_diffgemma.generate import batch_generate
from mlx_diffgemma.model import DiffusionGemma
from mlx_diffgemma.prompt import place, prepare_media
from mlx_diffgemma.request import GenerationResponse, GenerationWarning
from mlx_diffgemma.tokenizer import answer_ids, chat_ids

Progress = Callable[[str, int, int], None]
READS = 4  # canvases of noise for a question of multiple choice


@dataclass(frozen=True)
class GroupResult:
    """Figures of those questions of a task that share a name."""

    group: str
    answers: int
    score: float


@dataclass(frozen=True)
class TaskResult:
    """Figures of one task: ``score`` in [0, 1] with its 95 % interval over ``answers`` answers.

    ``partial`` is the mean partial credit, None where a task knows none.  ``steps_per_canvas``, with those of right and of wrong
    answers, ``tokens_per_forward`` and ``converged`` (share of canvases) are None where no canvas was denoised, and those
    of right and wrong also where there is none or the task is not exact.  ``accepted`` is the share of a draft model's tokens that
    were right, None where it proposed none; left to right ``tokens_per_forward`` is known then too.
    """

    task: str
    exact: bool
    answers: int
    score: float
    low: float
    high: float
    partial: float | None
    canvases: int
    steps_per_canvas: float | None
    steps_when_right: float | None
    steps_when_wrong: float | None
    tokens_per_forward: float | None
    converged: float | None
    accepted: float | None = None
    groups: tuple[GroupResult, ...] = ()


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
        exact = [r.score for r in self.results if r.exact]
        return float(np.mean(exact)) if exact else math.nan

    def record(self) -> dict[str, object]:
        return {**asdict(self), "exact_mean": self.exact_mean}


@dataclass(frozen=True)
class _Answer:
    """``response`` is None for a choice that was read off the canvas."""

    question: Question
    mark: Mark
    response: GenerationResponse | None


def evaluate(model: DiffusionGemma, tokenizer: TokenizerWrapper, tasks: Sequence[Task], limit: int = 500,
             seeds: Sequence[int] = (0,), batch_size: int = 16, progress: Progress | None = None,
             draft_model: DraftModel | None = None, **options: Any) -> EvaluationReport:
    """Ask at most ``limit`` questions of each task under each seed; ``draft_model`` and ``options`` as in ``batch_generate``."""
    if limit < 1 or not seeds:
        raise UserError(f"limit must be at least 1 and one seed given, got limit {limit} and {len(seeds)} seeds.")
    asked = [(task, list(task.questions(limit))) for task in tasks]
    mode = str(options.get("mode", "diffusion"))
    # All that can be refused is refused before the first question is asked.
    choices = [[_choice_ids(model, tokenizer, question) for question in questions if question.choices] for _, questions in asked]
    if mode == "ar" and any(choices):
        raise UserError("Multiple choice is read off a canvas; leave it out with mode 'ar'.")
    results = []
    for (task, questions), own_choices in zip(asked, choices, strict=True):
        finished = itertools.count(1)

        def count(*_: object, name: str = task.name, total: int = len(questions), finished: Iterator[int] = finished) -> None:
            if progress:
                progress(name, next(finished), total * len(seeds))

        answers: list[_Answer] = []
        for seed in seeds:
            own = [seed * 1_000_003 + index for index in range(len(questions))]
            if own_choices:
                for question, labels, number in zip(questions, own_choices, own, strict=True):
                    media = prepare_media(question.images, model.config)
                    prompt, placed = place(chat_ids(tokenizer, question.messages), media, model.config.image_tokens, tokenizer)
                    (found,) = read_labels(model, read_prompt(model, prompt, placed), [labels], [canvas_for(model, labels)], READS,
                                           READS * number)
                    shares = average(found)
                    answers.append(_Answer(question, question.mark(question.choices[int(shares.argmax())]), None))
                    count()
                continue
            prompts = [chat_ids(tokenizer, question.messages) for question in questions]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", GenerationWarning)  # counted below
                given = batch_generate(model, tokenizer, prompts, seeds=own, batch_size=batch_size, on_answer=count,
                                       draft_model=draft_model, images=[question.images for question in questions], **options)
            answers += [_Answer(q, q.mark(response.text), response) for q, response in zip(questions, given, strict=True)]
        results.append(_result(task, answers, len(questions)))
    return EvaluationReport(mode, tuple(seeds), limit, dict(options), describe(model.dtype), tuple(results))


def _choice_ids(model: DiffusionGemma, tokenizer: TokenizerWrapper, question: Question) -> Labels:
    """Each choice is a whole answer: it ends with the turn's end.  Errors: UserError for one longer than a canvas, or two that are
    the same tokens."""
    ids = [answer_ids(tokenizer, [*question.messages, {"role": "assistant", "content": choice}]) for choice in question.choices]
    for choice, own in zip(question.choices, ids, strict=True):
        if len(own) > model.config.canvas_length:
            raise UserError(f"The choice {choice[:40]!r} has {len(own)} tokens, a canvas {model.config.canvas_length}.")
    return Labels(tuple(map(tuple, ids)))


def _result(task: Task, answers: Sequence[_Answer], questions: int) -> TaskResult:
    """``answers`` to so many questions, under one seed after the other."""
    scores = np.array([answer.mark.score for answer in answers])
    # Answers to one question are not independent: a question counts once, with its mean over seeds.
    means = scores.reshape(-1, questions).mean(axis=0)
    low, high = _wilson(means) if task.exact else _bootstrap(means)
    partial = [answer.mark.partial for answer in answers if answer.mark.partial is not None]
    canvases = [(answer.mark, part) for answer in answers if answer.response for part in answer.response.parts if part.is_canvas]
    names = sorted({answer.question.group for answer in answers} - {""}, key=_by_number)
    groups = [(name, np.array([a.mark.score for a in answers if a.question.group == name])) for name in names]

    def steps(chosen: Callable[[Mark], bool]) -> float | None:
        counts = [part.steps for mark, part in canvases if chosen(mark)]
        return float(np.mean(counts)) if counts else None

    given = [answer.response for answer in answers if answer.response]
    proposed = sum(response.proposed for response in given)
    tokens, forwards = sum(len(part.tokens) for _, part in canvases), float(sum(part.steps + part.judged for _, part in canvases))
    if proposed and not canvases:
        tokens, forwards = (sum(counts) for counts in zip(*((len(r.tokens), len(r.tokens) / r.tokens_per_forward) for r in given),
                                                          strict=True))
    return TaskResult(
        task.name, task.exact, len(scores), float(scores.mean()), low, high, float(np.mean(partial)) if partial else None,
        len(canvases), steps(lambda _: True), steps(lambda mark: task.exact and mark.score == 1),
        steps(lambda mark: task.exact and mark.score == 0),
        tokens_per_forward=tokens / forwards if forwards else None,
        converged=float(np.mean([part.converged for _, part in canvases])) if canvases else None,
        accepted=sum(response.accepted for response in given) / proposed if proposed else None,
        groups=tuple(GroupResult(name, own.size, float(own.mean())) for name, own in groups),
    )


def _by_number(name: str) -> tuple[int, str]:
    first = name.split(" ")[0]
    return (int(first) if first.isdigit() else -1, name)


def _wilson(scores: np.ndarray) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    n, p, z = scores.size, scores.mean(), 1.96
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, float((centre - half) / (1 + z * z / n))), min(1.0, float((centre + half) / (1 + z * z / n)))


def _bootstrap(scores: np.ndarray, rounds: int = 2000) -> tuple[float, float]:
    means = np.random.default_rng(0).choice(scores, (rounds, scores.size)).mean(axis=1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))
