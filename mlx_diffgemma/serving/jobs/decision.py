"""Probabilities of labels, for questions about one prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mlx_diffgemma.decoding.job import Job
from mlx_diffgemma.decoding.session import Session
from mlx_diffgemma.generation.decide import Decision, Question, decision_of
from mlx_diffgemma.generation.label_reading import labels_in_turns
from mlx_diffgemma.generation.labels import Labels, canvas_for, label_ids
from mlx_diffgemma.generation.limits import check_room, token_limit
from mlx_diffgemma.media.prompt import ImageSpan, expand_image_tokens, prepare_media
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.serving.conversation import template_messages
from mlx_diffgemma.serving.engine import Engine
from mlx_diffgemma.serving.jobs.events import Emit, Ended, Usage
from mlx_diffgemma.serving.settings import Settings
from mlx_diffgemma.serving.tasks import DecisionTask, QuestionTask
from mlx_diffgemma.text.tokenizer import chat_ids


@dataclass(frozen=True)
class DecisionPlan:
    """A prompt and the questions about it.

    ``labels`` and ``lengths`` hold, for each question, the ids of its labels and the length of its
    canvas.  ``reads`` is the number of canvases that are averaged.
    """

    ids: Sequence[int]
    images: Sequence[ImageSpan]
    questions: Sequence[Question]
    labels: Sequence[Labels]
    lengths: Sequence[int]
    reads: int
    seed: int


class DecisionJob(Job):
    """Reads the probabilities from canvases after the prompt.  ``decisions`` holds the result."""

    def __init__(self, plan: DecisionPlan, emit: Emit) -> None:
        self.plan = plan
        self.reused = 0
        self.decisions: list[Decision] = []
        self._emit = emit

    def rounds(self, model: DiffusionGemma) -> Iterator[Sequence[Session]]:
        plan = self.plan
        reader = Session.reading(model, list(plan.ids), images=plan.images)
        yield [reader]
        self.reused = reader.reused
        probabilities = yield from labels_in_turns(
            model, reader.cache, plan.labels, plan.lengths, plan.reads, plan.seed
        )
        self.decisions = list(map(decision_of, plan.questions, probabilities))

    def done(self, error: Exception | None) -> None:
        self._emit(Ended(error))

    @property
    def usage(self) -> Usage:
        return Usage(len(self.plan.ids), 0, self.reused, 0, 0, 0)


def prepare_decision(engine: Engine, settings: Settings, task: DecisionTask) -> DecisionPlan:
    """Make the prompt and the questions, ready to run.

    Args:
        engine: the engine with the model.
        settings: the settings of the server.
        task: what the request asks for.

    Raises:
        UserError: the task cannot be done.
    """
    model = engine.model
    tokenizer = engine.tokenizer
    messages, images = template_messages(task.messages, settings.allow_files, settings.allow_urls)
    questions = [_question(question) for question in task.questions]
    labels = [label_ids(tokenizer, question) for question in questions]
    lengths = [canvas_for(model, ids, task.canvas_length) for ids in labels]
    media = prepare_media(images, model.config, task.image_tokens)
    prompt = chat_ids(tokenizer, messages, allow_control_tokens=settings.allow_control_tokens)
    ids, placed = expand_image_tokens(prompt, media, model.config.image_tokens, tokenizer)
    context = model.config.text.max_position_embeddings
    token_limit(len(ids), None, max(lengths), context)
    settings.check_prompt(len(ids))
    check_room(model, [len(ids)])
    return DecisionPlan(ids, placed, questions, labels, lengths, task.reads, task.seed)


def _question(task: QuestionTask) -> Question:
    if task.scale is not None:
        return Question.scale(task.scale[0], task.scale[1], task.text, task.template)
    if task.labels is not None:
        return Question.choice(task.labels, task.text, task.template)
    return Question.yes_no(task.text, template=task.template)
