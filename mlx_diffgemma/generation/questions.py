"""Questions with known answers, and the decisions about them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mlx_diffgemma.errors import UserError

ANSWER = "{answer}"
TEXT = "{text}"
# The templates of a question without a text and with one.
PLAIN = ANSWER
ASKED = f"{TEXT}\n{ANSWER}"
MAX_STEPS = 101  # the most steps of a scale
LEAST_MASS = 0.01  # there is a warning if all labels together have a smaller probability


@dataclass(frozen=True)
class Question:
    """A question with known answers.

    Args:
        labels: The possible answers, at least two.
        text: The question, at the start of the canvas, so that many questions share one encoded
            prompt.  Empty: the prompt itself is the question.
        template: Arranges ``{text}`` and ``{answer}`` on the canvas.  Text after ``{answer}``
            belongs to every label.  Empty: the label alone, or the text and the label on the next
            line.
        values: The numbers of the labels, for ``Decision.value``.

    Raises:
        UserError: There are fewer than two labels, a label is empty or appears twice, or the
            template has no place for the text or the answer.
    """

    labels: tuple[str, ...]
    text: str = ""
    template: str = ""
    values: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.labels, str) or not all(isinstance(label, str) for label in self.labels):
            raise UserError(
                f"labels are texts in a list, got {self.labels!r}; give for example ['yes', 'no']."
            )
        object.__setattr__(self, "labels", tuple(self.labels))
        if len(self.labels) < 2:
            raise UserError(
                f"There is nothing to decide with {len(self.labels)} label(s); give at least two."
            )
        if not all(label.strip() for label in self.labels):
            raise UserError("A label is empty; give each at least one character.")
        if twice := next(
            (label for place, label in enumerate(self.labels) if label in self.labels[:place]), None
        ):
            raise UserError(f"The label {twice!r} is given twice; leave one of them out.")
        if self.values and len(self.values) != len(self.labels):
            raise UserError(
                f"values must have one entry a label: got {len(self.values)} for {len(self.labels)} labels."
            )
        if self.template and self.template.count(ANSWER) != 1:
            raise UserError(
                f"The template {self.template!r} must have one place for the answer; write {ANSWER} there."
            )
        if self.template and (TEXT in self.template) != bool(self.text):
            raise UserError(
                f"The template {self.template!r} has no place for the question's text; write {TEXT} there."
                if self.text
                else f"The template {self.template!r} has a place for a text and the question none; give it a text."
            )

    @classmethod
    def yes_no(
        cls, text: str = "", yes: str = "yes", no: str = "no", template: str = ""
    ) -> Question:
        """A question of yes or no.  Its value is the probability of ``yes``.

        Args:
            text: As in ``Question``.
            yes: The label that means yes.
            no: The label that means no.
            template: As in ``Question``.
        """
        return cls((yes, no), text, template, (1.0, 0.0))

    @classmethod
    def scale(cls, low: int, high: int, text: str = "", template: str = "") -> Question:
        """A score from ``low`` to ``high``, both included.  Its value is the expected score.

        Args:
            low: The smallest score, an integer.
            high: The largest score, an integer.
            text: As in ``Question``.
            template: As in ``Question``.

        Raises:
            UserError: The bounds are not integers, are out of order, or are too far apart.
        """
        if not all(isinstance(end, int) and not isinstance(end, bool) for end in (low, high)):
            raise UserError(f"A scale goes from one integer to another, got {low!r} and {high!r}.")
        if low >= high:
            raise UserError(f"A scale goes upwards, got {low} to {high}; give the lower end first.")
        if high - low >= MAX_STEPS:
            raise UserError(
                f"The scale from {low} to {high} has {high - low + 1:,} steps, and at most {MAX_STEPS} are possible; "
                "take a coarser one."
            )
        steps = range(low, high + 1)
        return cls(tuple(map(str, steps)), text, template, tuple(map(float, steps)))

    @classmethod
    def choice(cls, labels: Iterable[str], text: str = "", template: str = "") -> Question:
        """A choice among labels.  It has no value.

        Args:
            labels: As in ``Question``.
            text: As in ``Question``.
            template: As in ``Question``.
        """
        return cls(labels if isinstance(labels, str) else tuple(labels), text, template)  # type: ignore[arg-type]

    def written(self, label: str) -> str:
        """The text at the start of the canvas if the answer is ``label``."""
        before, after = (self.template or (ASKED if self.text else PLAIN)).split(ANSWER)
        return before.replace(TEXT, self.text) + label + after.replace(TEXT, self.text)


@dataclass(frozen=True)
class Decision:
    """The probability of each label.

    Args:
        question: The question that was asked.
        probabilities: By label.  They sum to 1.
        mass: The probability that the model gave to all labels together, before they were
            normalised.  Near 0, the model would have written something else.
    """

    question: Question
    probabilities: dict[str, float]
    mass: float

    @property
    def label(self) -> str:
        """The most probable label."""
        return max(self.probabilities, key=lambda label: self.probabilities[label])

    @property
    def value(self) -> float | None:
        """The expected score of a scale, the probability of yes, or None for a choice."""
        if not self.question.values:
            return None
        return sum(
            p * value
            for p, value in zip(self.probabilities.values(), self.question.values, strict=True)
        )


def unlikely(decision: Decision) -> str | None:
    """A warning if the model would write none of the labels; None otherwise."""
    if decision.mass >= LEAST_MASS:
        return None
    question = decision.question
    about = f" to {question.text[:40]!r}" if question.text else ""
    return (
        f"The labels {', '.join(question.labels)[:60]} hold {decision.mass:.1g} of what the model would answer{about}; ask so "
        "that one of them is the answer, or pin by a template what comes before it."
    )
