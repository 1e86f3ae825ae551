"""``mlx-diffgemma decide``: a thin layer over :mod:`mlx_diffgemma.generation.decide`."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from mlx_lm.tokenizer_utils import TokenizerWrapper
from rich.markup import escape

from mlx_diffgemma.cli.options import (
    Images,
    Json,
    ModelOptions,
    PromptCacheFile,
    PromptOptions,
    prompt_cache_at,
)
from mlx_diffgemma.cli.output import new_table, print_table, spinner
from mlx_diffgemma.cli.signature import command, generation, part_option
from mlx_diffgemma.cli.values import TEMPLATE_CONFIG, template_variables
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.files import expand_path, read_json_value, read_stdin
from mlx_diffgemma.generation.decide import Decision, Question, check_reads, decide
from mlx_diffgemma.generation.load import load
from mlx_diffgemma.media.images import open_image
from mlx_diffgemma.text.tokenizer import chat_ids, user_message
from mlx_diffgemma.text.variables import check_variables

FIELDS = ("question", "labels", "scale", "template")


@dataclass(frozen=True)
class QuestionOptions:
    """The options that say what is to be decided."""

    PANEL = "Questions"

    labels: str | None = part_option(
        None, help="The answer is one of these, separated by commas. Default: yes,no."
    )
    scale: str | None = part_option(
        None, help="The answer is an integer of this scale, such as 1-5."
    )
    questions: Path | None = part_option(
        None,
        help='A JSON file with a list of objects {"question": …}, each with '
        '"labels": […], or "scale": [1, 5], or neither for yes and no.',
    )
    template: str | None = part_option(
        None,
        help="How the canvas begins: a text with {answer}, and {text} for the text of a "
        "question of --questions.",
    )

    def check(self) -> None:
        """Raise UserError if several options say what is to be decided."""
        if sum(own is not None for own in (self.labels, self.scale, self.questions)) > 1:
            raise UserError(
                "--labels, --scale and --questions each say what is to be decided; give one of them."
            )

    def read(self) -> list[Question]:
        """The questions.

        Raises:
            UserError: they cannot be read.
        """
        template = self.template or ""
        if self.questions is not None:
            return _questions(self.questions, template)
        if self.scale is not None:
            return [Question.scale(*_scale(self.scale), template=template)]
        if self.labels is not None:
            labels = [label.strip() for label in self.labels.split(",")]
            return [Question.choice(labels, template=template)]
        return [Question.yes_no(template=template)]


@dataclass(frozen=True)
class ReadingOptions:
    """The options that say how the canvas is read."""

    PANEL = "Reading"

    reads: int = part_option(1, help="Canvases of noise that are averaged.")
    seed: int = part_option(
        0, help="Seed of the first read; it counts up by one a read. The same gives the same."
    )
    canvas_length: int | None = part_option(
        None, help="Positions of a canvas. Default: see docs/decisions.md."
    )


@command
def decide_command(
    *,
    prompt: Annotated[
        str,
        typer.Option(
            "--prompt",
            "-p",
            help="The question, or with --questions what they are about; '-' reads standard input.",
        ),
    ],
    questions: QuestionOptions,
    reading: ReadingOptions,
    surroundings: PromptOptions,
    source: ModelOptions,
    image: Images = [],  # noqa: B006 (typer copies it)
    vision: Annotated[dict[str, Any], generation("image_tokens")],
    prompt_cache_file: PromptCacheFile = None,
    as_json: Json = False,
) -> None:
    """Decide yes or no, a label or a score.

    The probabilities are read off the canvas.
    """
    questions.check()
    check_reads(reading.reads)
    variables = _variables(surroundings)
    text = read_stdin() if prompt == "-" else prompt
    if not text.strip():
        raise UserError("The prompt is empty; give at least one character.")
    asked = questions.read()
    media = [open_image(name, allow_urls=True) for name in image]
    if vision["image_tokens"] is not None and not media:
        raise UserError("--image-tokens has no meaning without --image; leave it out.")
    with spinner(f"loading {source.model}"):
        network, tokenizer = load(source.model, **source.loading)
    ids = _ids(tokenizer, surroundings, variables, user_message(text, len(media)))
    cache = prompt_cache_at(prompt_cache_file, network, tokenizer)
    began = time.perf_counter()
    decisions = decide(
        network,
        tokenizer,
        ids,
        asked,
        reads=reading.reads,
        seed=reading.seed,
        canvas_length=reading.canvas_length,
        images=media,
        image_tokens=vision["image_tokens"],
        prompt_cache=cache,
    )
    seconds = time.perf_counter() - began
    if questions.questions is None:
        _print_one(decisions[0])
    else:
        _print_all(decisions)
    if as_json:
        _print_json(decisions, reading, seconds)
    if cache and prompt_cache_file:
        cache.save(prompt_cache_file, tokenizer)


def _variables(surroundings: PromptOptions) -> dict[str, Any]:
    """The variables of the chat template.

    Raises:
        UserError: one of them lets the model think.
    """
    variables, thinks = template_variables(surroundings.chat_template_config)
    if thinks:
        raise UserError(
            "A decision is read off the first canvas, which holds no thought; leave enable_thinking out."
        )
    return variables


def _ids(
    tokenizer: TokenizerWrapper,
    surroundings: PromptOptions,
    variables: dict[str, Any],
    message: dict[str, Any],
) -> list[int]:
    check_variables(tokenizer, variables, TEMPLATE_CONFIG)
    return chat_ids(
        tokenizer,
        [*surroundings.messages, message],
        allow_control_tokens=surroundings.allow_control_tokens,
        **variables,
    )


def _print_json(decisions: Sequence[Decision], reading: ReadingOptions, seconds: float) -> None:
    record = {
        "decisions": [_record(decision) for decision in decisions],
        "reads": reading.reads,
        "seed": reading.seed,
        "seconds": seconds,
    }
    print(json.dumps(record, ensure_ascii=False), flush=True)


def _scale(text: str) -> tuple[int, int]:
    """The ends of a scale such as "1-5" or "-2-2".  Raises UserError if it is invalid."""
    found = re.fullmatch(r"\s*([+-]?\d{1,9})\s*-\s*([+-]?\d{1,9})\s*", text)
    if not found:
        raise UserError(
            f"--scale takes two integers with a dash between them, got {text!r}; give for example 1-5."
        )
    return int(found[1]), int(found[2])


def _questions(path: Path, template: str) -> list[Question]:
    """Read the questions of a file.

    Raises:
        UserError: a question is invalid.  The message names the file and the question's number,
            from 1.
    """
    entries = read_json_value(expand_path(path))
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path} must hold a list of questions, and at least one.")
    found = []
    for number, entry in enumerate(entries, 1):
        try:
            found.append(_question(entry, template))
        except UserError as error:
            raise UserError(f"{path}, question {number}: {error}") from None
    return found


def _question(entry: Any, template: str) -> Question:
    """Make a question from an entry of the file.  Raises UserError if the entry is invalid."""
    if not isinstance(entry, Mapping):
        raise UserError(f"an object is expected, got {type(entry).__name__}.")
    if unknown := next((name for name in entry if name not in FIELDS), None):
        raise UserError(f"unknown field {unknown!r}; known are {', '.join(FIELDS)}.")
    text, labels, scale = (entry.get(name) for name in ("question", "labels", "scale"))
    template = entry.get("template", template)
    if not isinstance(text, str) or not text.strip():
        raise UserError("'question' must be a text that is not empty.")
    if not isinstance(template, str):
        raise UserError("'template' must be a text.")
    if labels is not None and scale is not None:
        raise UserError("'labels' and 'scale' each say what is to be decided; give one of them.")
    if scale is not None:
        if not isinstance(scale, list) or len(scale) != 2:
            raise UserError(
                f"'scale' must be a list of its two ends, got {scale!r}; give for example [1, 5]."
            )
        return Question.scale(scale[0], scale[1], text, template)
    if labels is None:
        return Question.yes_no(text, template=template)
    if not isinstance(labels, list):
        raise UserError(f"'labels' must be a list of texts, got {labels!r}.")
    return Question.choice(labels, text, template)


def _print_one(decision: Decision) -> None:
    """Print a line for each label, the most probable first."""
    width = max(map(len, decision.probabilities))
    for label, share in sorted(decision.probabilities.items(), key=lambda pair: -pair[1]):
        print(f"{label:<{width}}  {share:6.1%}")
    if _is_scale(decision):
        print(f"expected {decision.value:.2f}")


def _print_all(decisions: Sequence[Decision]) -> None:
    table = new_table("question", "answer", "probability", "expected")
    for decision in decisions:
        table.add_row(
            escape(decision.question.text),
            escape(decision.label),
            f"{decision.probabilities[decision.label]:.1%}",
            f"{decision.value:.2f}" if _is_scale(decision) else "-",
        )
    print_table(table)


def _is_scale(decision: Decision) -> bool:
    """Whether the value is a score, not a probability that is printed anyway."""
    return decision.value is not None and decision.question.values != (1.0, 0.0)


def _record(decision: Decision) -> dict[str, Any]:
    return {
        "question": decision.question.text,
        "label": decision.label,
        "value": decision.value,
        "mass": decision.mass,
        "probabilities": decision.probabilities,
    }
