"""Ask a model the questions of tasks; report scores with intervals, steps and groups.

Every question has its own seed, so a figure does not depend on the batch size.

    >>> report = evaluate(model, tokenizer, tasks_named("nano"), limit=500, seeds=[0])
    >>> report.exact_mean
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_diffgemma.device import describe
from mlx_diffgemma.errors import GenerationWarning, UserError
from mlx_diffgemma.evaluation.tasks import Mark, Question, Task
from mlx_diffgemma.generation.generate import batch_generate
from mlx_diffgemma.generation.label_reading import average, read_labels, read_prompt
from mlx_diffgemma.generation.labels import Labels, canvas_for
from mlx_diffgemma.generation.response import GenerationResponse
from mlx_diffgemma.media.prompt import expand_image_tokens, prepare_media
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.sampling.protocols import DraftModel
from mlx_diffgemma.text.tokenizer import answer_ids, chat_ids

Progress = Callable[[str, int, int], None]
READS = 4  # canvases of noise for a multiple-choice question


@dataclass(frozen=True)
class GroupResult:
    """The figures of the questions of a task that belong to one group."""

    group: str
    answers: int
    score: float


@dataclass(frozen=True)
class TaskResult:
    """The figures of one task: ``score`` in [0, 1] with its 95 % interval over the answers.

    ``partial`` is the mean partial credit; None if the task has none.

    ``steps_per_canvas``, also of right and of wrong answers, ``tokens_per_forward`` and
    ``converged`` (a share of the canvases) are None if no canvas was denoised.  The steps of right
    and of wrong answers are also None if there is no such answer or the task is not exact.

    ``accepted`` is the share of a draft model's tokens that were accepted; None if it proposed
    none.  With a draft model, ``tokens_per_forward`` is also known for ``mode="ar"``.
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
        """The mean score of the tasks that are scored by exact match."""
        exact = [r.score for r in self.results if r.exact]
        return float(np.mean(exact)) if exact else math.nan

    def record(self) -> dict[str, object]:
        return {**asdict(self), "exact_mean": self.exact_mean}


@dataclass(frozen=True)
class _Answer:
    """One answer.  ``response`` is None for a choice that was read from the canvas."""

    question: Question
    mark: Mark
    response: GenerationResponse | None


def evaluate(
    model: DiffusionGemma,
    tokenizer: TokenizerWrapper,
    tasks: Sequence[Task],
    limit: int = 500,
    seeds: Sequence[int] = (0,),
    batch_size: int = 16,
    progress: Progress | None = None,
    draft_model: DraftModel | None = None,
    **options: Any,
) -> EvaluationReport:
    """Ask the questions of tasks and score the answers.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        tasks: The tasks.
        limit: The most questions of a task.
        seeds: Every question is asked with each seed.
        batch_size: How many questions run together.
        progress: Called with the name of the task, the answers so far, and all answers of the task.
        draft_model: As in ``batch_generate``.
        **options: As in ``batch_generate``.

    Returns:
        The scores and costs of each task.

    Raises:
        UserError: An argument is invalid, or a question cannot be asked in this mode.
    """
    if limit < 1 or not seeds:
        raise UserError(
            f"limit must be at least 1 and one seed given, got limit {limit} and {len(seeds)} seeds."
        )
    # All arguments are checked before the first question is asked.
    prepared = []
    for task in tasks:
        questions = list(task.questions(limit))
        labels = [_choice_ids(model, tokenizer, q) for q in questions if q.choices]
        prepared.append((task, questions, labels))
    mode = str(options.get("mode", "diffusion"))
    if mode == "ar" and any(labels for _, _, labels in prepared):
        raise UserError("Multiple choice is read off a canvas; leave it out with mode 'ar'.")
    asking = dict(options, batch_size=batch_size, draft_model=draft_model)
    results = []
    for task, questions, labels in prepared:
        count = _counter(task.name, len(questions) * len(seeds), progress)
        answers: list[_Answer] = []
        for seed in seeds:
            numbers = [seed * 1_000_003 + index for index in range(len(questions))]
            if labels:
                answers += _choose(model, tokenizer, questions, labels, numbers, count)
            else:
                answers += _generate(model, tokenizer, questions, numbers, count, asking)
        results.append(_result(task, answers, len(questions)))
    machine = describe(model.dtype)
    return EvaluationReport(mode, tuple(seeds), limit, options, machine, tuple(results))


def _counter(name: str, total: int, progress: Progress | None) -> Callable[..., None]:
    """A function that reports one more answer at each call.  It ignores its arguments.

    Args:
        name: The name of the task.
        total: All answers of the task.
        progress: As in ``evaluate``.
    """
    finished = itertools.count(1)

    def count(*_: object) -> None:
        if progress:
            progress(name, next(finished), total)

    return count


def _generate(
    model: DiffusionGemma,
    tokenizer: TokenizerWrapper,
    questions: Sequence[Question],
    seeds: Sequence[int],
    count: Callable[..., None],
    options: dict[str, Any],
) -> list[_Answer]:
    """Generate an answer to each question.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        questions: The questions.
        seeds: The seed of each question.
        count: Called after each answer.
        options: As in ``batch_generate``.
    """
    prompts = [chat_ids(tokenizer, question.messages) for question in questions]
    images = [question.images for question in questions]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GenerationWarning)  # the report counts them
        responses = batch_generate(
            model, tokenizer, prompts, seeds=seeds, on_answer=count, images=images, **options
        )
    return [
        _Answer(question, question.mark(response.text), response)
        for question, response in zip(questions, responses, strict=True)
    ]


def _choose(
    model: DiffusionGemma,
    tokenizer: TokenizerWrapper,
    questions: Sequence[Question],
    labels: Sequence[Labels],
    numbers: Sequence[int],
    count: Callable[..., None],
) -> list[_Answer]:
    """Read the most probable choice of each question from a canvas.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        questions: Multiple-choice questions.
        labels: The choices of each question.
        numbers: One for each question; it decides the question's random numbers.
        count: Called after each question.

    Returns:
        One answer for each question, without a response.
    """
    answers = []
    for question, choices, number in zip(questions, labels, numbers, strict=True):
        media = prepare_media(question.images, model.config)
        ids = chat_ids(tokenizer, question.messages)
        prompt, placed = expand_image_tokens(ids, media, model.config.image_tokens, tokenizer)
        (readings,) = read_labels(
            model,
            read_prompt(model, prompt, placed),
            [choices],
            [canvas_for(model, choices)],
            READS,
            READS * number,
        )
        best = question.choices[int(average(readings).argmax())]
        answers.append(_Answer(question, question.mark(best), None))
        count()
    return answers


def _choice_ids(model: DiffusionGemma, tokenizer: TokenizerWrapper, question: Question) -> Labels:
    """The ids of the choices.  Each choice is a whole answer, which includes the end of the turn.

    Raises:
        UserError: A choice is longer than a canvas, or two choices are the same tokens.
    """
    ids = [
        answer_ids(tokenizer, [*question.messages, {"role": "assistant", "content": choice}])
        for choice in question.choices
    ]
    for choice, own in zip(question.choices, ids, strict=True):
        if len(own) > model.config.canvas_length:
            raise UserError(
                f"The choice {choice[:40]!r} has {len(own)} tokens, a canvas {model.config.canvas_length}."
            )
    return Labels(tuple(map(tuple, ids)))


def _result(task: Task, answers: Sequence[_Answer], questions: int) -> TaskResult:
    """The figures of a task.

    Args:
        task: The task.
        answers: The answers to all questions for the first seed, then for the next seed, and so on.
        questions: The number of questions.
    """
    scores = np.array([answer.mark.score for answer in answers])
    # Answers to the same question are not independent, so each question counts once, with its mean
    # over the seeds.
    means = scores.reshape(-1, questions).mean(axis=0)
    low, high = _wilson(means) if task.exact else _bootstrap(means)
    partial = [answer.mark.partial for answer in answers if answer.mark.partial is not None]
    responses = [answer.response for answer in answers if answer.response]
    canvases = []
    for answer in answers:
        if answer.response:
            canvases += [(answer.mark, part) for part in answer.response.parts if part.is_canvas]

    def steps(chosen: Callable[[Mark], bool]) -> float | None:
        counts = [part.steps for mark, part in canvases if chosen(mark)]
        return float(np.mean(counts)) if counts else None

    proposed = sum(response.proposed for response in responses)
    tokens = sum(len(part.tokens) for _, part in canvases)
    forwards = float(sum(part.steps + part.judged for _, part in canvases))
    if proposed and not canvases:
        tokens = sum(len(response.tokens) for response in responses)
        forwards = sum(len(r.tokens) / r.tokens_per_forward for r in responses)
    return TaskResult(
        task=task.name,
        exact=task.exact,
        answers=len(scores),
        score=float(scores.mean()),
        low=low,
        high=high,
        partial=float(np.mean(partial)) if partial else None,
        canvases=len(canvases),
        steps_per_canvas=steps(lambda _: True),
        steps_when_right=steps(lambda mark: task.exact and mark.score == 1),
        steps_when_wrong=steps(lambda mark: task.exact and mark.score == 0),
        tokens_per_forward=tokens / forwards if forwards else None,
        converged=float(np.mean([part.converged for _, part in canvases])) if canvases else None,
        accepted=sum(response.accepted for response in responses) / proposed if proposed else None,
        groups=_groups(answers),
    )


def _groups(answers: Sequence[_Answer]) -> tuple[GroupResult, ...]:
    """The mean score of each group, in the order of the groups' names."""
    scores: dict[str, list[float]] = {}
    for answer in answers:
        if answer.question.group:
            scores.setdefault(answer.question.group, []).append(answer.mark.score)
    groups = []
    for name in sorted(scores, key=_by_number):
        groups.append(GroupResult(name, len(scores[name]), float(np.mean(scores[name]))))
    return tuple(groups)


def _by_number(name: str) -> tuple[int, str]:
    first = name.split(" ")[0]
    return (int(first) if first.isdigit() else -1, name)


def _wilson(scores: np.ndarray) -> tuple[float, float]:
    """The 95 % confidence interval of a share (Wilson 1927)."""
    n = scores.size
    p = scores.mean()
    z = 1.96
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, float((centre - half) / scale)), min(1.0, float((centre + half) / scale))


def _bootstrap(scores: np.ndarray, rounds: int = 2000) -> tuple[float, float]:
    means = np.random.default_rng(0).choice(scores, (rounds, scores.size)).mean(axis=1)
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))
