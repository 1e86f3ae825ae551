"""Our own protocol for decisions: ``POST /v1/decisions``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from mlx_diffgemma.generation.decide import Decision
from mlx_diffgemma.serving.jobs.events import Usage
from mlx_diffgemma.serving.protocols.body import Body, Strict, Values
from mlx_diffgemma.serving.protocols.fields import Seed, Text, Whole
from mlx_diffgemma.serving.protocols.messages import Message, image_tokens
from mlx_diffgemma.serving.protocols.openai import Envelope, warnings_field
from mlx_diffgemma.serving.tasks import DecisionTask, Delivery, QuestionTask


class DecisionQuestion(Strict):
    """A question; yes or no without ``labels`` and ``scale``."""

    question: str = ""
    labels: list[str] | None = None
    scale: Annotated[list[Whole], Field(min_length=2, max_length=2)] | None = None
    template: str = ""

    @model_validator(mode="after")
    def check_together(self) -> DecisionQuestion:
        if self.labels is not None and self.scale is not None:
            raise ValueError("labels and scale each say what is to be decided; send one of them.")
        return self

    def task(self) -> QuestionTask:
        return QuestionTask(self.question, self.labels, self.scale, self.template)


class DecisionRequest(Body):
    """The body of ``POST /v1/decisions``."""

    NEUTRAL: ClassVar[Values] = {"user": "any", "metadata": "any", "store": (False, True)}

    model: Text
    messages: Annotated[list[Message], Field(min_length=1)]
    questions: Annotated[list[DecisionQuestion], Field(min_length=1, max_length=256)]
    reads: Annotated[Whole, Field(ge=1, le=64)] = 1
    seed: Seed = 0
    canvas_length: Whole | None = None
    image_tokens: Whole | None = None

    @model_validator(mode="after")
    def check_images(self) -> DecisionRequest:
        self.image_tokens = image_tokens(self.messages, self.image_tokens)
        return self

    @property
    def salts(self) -> tuple[str, str]:
        return "", ""

    @property
    def delivery(self) -> Delivery:
        return Delivery()

    def task(self) -> DecisionTask:
        return DecisionTask(
            self.messages,
            [question.task() for question in self.questions],
            self.reads,
            self.seed,
            self.canvas_length,
            self.image_tokens,
        )

    def envelope(self) -> DecisionEnvelope:
        return DecisionEnvelope(self.model)


class DecisionEnvelope(Envelope):
    """The response body of decisions."""

    kind = "decisions"
    prefix = "decisions"

    def body(
        self, decisions: Sequence[Decision], usage: Usage, warnings: Sequence[str]
    ) -> dict[str, Any]:
        bodies = [_decision(decision) for decision in decisions]
        return self.whole(usage, decisions=bodies, **warnings_field(warnings))


def _decision(decision: Decision) -> dict[str, Any]:
    return {
        "question": decision.question.text,
        "label": decision.label,
        "value": decision.value,
        "mass": decision.mass,
        "probabilities": decision.probabilities,
    }
