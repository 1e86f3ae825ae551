"""``mlx-diffgemma decide``: a thin layer over :mod:`mlx_diffgemma.decide`."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mlx_diffgemma import nano
from mlx_diffgemma.decide import Decision, Question, check_reads, decide
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.files import expand_path, read_json_value, read_stdin
from mlx_diffgemma.flags import (
    Adapter,
    Dtype,
    Images,
    ImageTokens,
    Json,
    Model,
    PromptCacheFile,
    Revision,
    SystemPrompt,
    prompt_cache_at,
)
from mlx_diffgemma.generate import load
from mlx_diffgemma.images import open_image
from mlx_diffgemma.tokenizer import chat_ids, user_message

errors = Console(stderr=True, highlight=False, soft_wrap=True)
output = Console(highlight=False, soft_wrap=True)
FIELDS = ("question", "labels", "scale", "template")


def decide_command(
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The question, or with --questions what they are about; '-' reads "
                                        "standard input.")],
    labels: Annotated[str | None, typer.Option(help="The answer is one of these, separated by commas. Default: yes,no.")] = None,
    scale: Annotated[str | None, typer.Option(help="The answer is an integer of this scale: 1-5.")] = None,
    questions: Annotated[Path | None, typer.Option(help="A JSON file with a list of objects {\"question\": …}, each with "
                                                   "\"labels\": […], or \"scale\": [1, 5], or neither for yes and no.")] = None,
    template: Annotated[str | None, typer.Option(help="How the canvas begins: a text with {answer}, and {text} for the text of a "
                                                 "question of --questions.")] = None,
    reads: Annotated[int, typer.Option(help="Canvases of noise that are averaged.")] = 1,
    seed: Annotated[int, typer.Option(help="Same seed, same decision; of the first read, counting up by one a read.")] = 0,
    canvas_length: Annotated[int | None, typer.Option(help="Positions of a canvas. Default: see docs/decisions.md.")] = None,
    system_prompt: SystemPrompt = None,
    model: Model = nano.NAME,
    revision: Revision = None,
    adapter_path: Adapter = None,
    dtype: Dtype = None,
    image: Images = [],  # noqa: B006 (typer copies it)
    image_tokens: ImageTokens = None,
    prompt_cache_file: PromptCacheFile = None,
    as_json: Json = False,
) -> None:
    """Decide: yes or no, one of several labels, a score; with probabilities, read off the canvas."""
    if (labels is not None) + (scale is not None) + (questions is not None) > 1:
        raise UserError("--labels, --scale and --questions each say what is to be decided; give one of them.")
    check_reads(reads)
    text = read_stdin() if prompt == "-" else prompt
    if not text.strip():
        raise UserError("The prompt is empty; give at least one character.")
    if questions is not None:
        asked = _questions(questions, template or "")
    elif scale is not None:
        asked = [Question.scale(*_scale(scale), template=template or "")]
    elif labels is not None:
        asked = [Question.choice([label.strip() for label in labels.split(",")], template=template or "")]
    else:
        asked = [Question.yes_no(template=template or "")]
    media = [open_image(source, allow_urls=True) for source in image]
    if image_tokens is not None and not media:
        raise UserError("--image-tokens has no meaning without --image; leave it out.")
    with errors.status(f"loading {model}") if errors.is_terminal else contextlib.nullcontext():
        network, tokenizer = load(model, revision=revision, dtype=dtype, adapter_path=adapter_path)
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    ids = chat_ids(tokenizer, [*system, user_message(text, len(media))])
    cache, began = prompt_cache_at(prompt_cache_file, network, tokenizer), time.perf_counter()
    decisions = decide(network, tokenizer, ids, asked, reads=reads, seed=seed, canvas_length=canvas_length, images=media,
                       image_tokens=image_tokens, prompt_cache=cache)
    seconds = time.perf_counter() - began
    if cache and prompt_cache_file:
        cache.save(prompt_cache_file, tokenizer)
    if questions is None:
        _print_one(decisions[0])
    else:
        _print_all(decisions)
    if as_json:
        print(json.dumps({"decisions": [_record(decision) for decision in decisions], "reads": reads, "seed": seed,
                          "seconds": seconds}, ensure_ascii=False))


def _scale(text: str) -> tuple[int, int]:
    """The ends of "1-5", or of "-2-2".  Errors: UserError."""
    found = re.fullmatch(r"\s*([+-]?\d{1,9})\s*-\s*([+-]?\d{1,9})\s*", text)
    if not found:
        raise UserError(f"--scale takes two integers with a dash between them, got {text!r}; give for example 1-5.")
    return int(found[1]), int(found[2])


def _questions(path: Path, template: str) -> list[Question]:
    """Errors: UserError naming the file, and the question by its number from 1."""
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
    """Errors: UserError."""
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
            raise UserError(f"'scale' must be a list of its two ends, got {scale!r}; give for example [1, 5].")
        return Question.scale(scale[0], scale[1], text, template)
    if labels is None:
        return Question.yes_no(text, template=template)
    if not isinstance(labels, list):
        raise UserError(f"'labels' must be a list of texts, got {labels!r}.")
    return Question.choice(labels, text, template)


def _print_one(decision: Decision) -> None:
    """A line a label, the most probable first."""
    width = max(map(len, decision.probabilities))
    for label, share in sorted(decision.probabilities.items(), key=lambda pair: -pair[1]):
        print(f"{label:<{width}}  {share:6.1%}")
    if _is_scale(decision):
        print(f"expected {decision.value:.2f}")


def _print_all(decisions: Sequence[Decision]) -> None:
    table = Table("question", "answer", "probability", "expected", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for decision in decisions:
        table.add_row(escape(decision.question.text), escape(decision.label), f"{decision.probabilities[decision.label]:.1%}",
                      f"{decision.value:.2f}" if _is_scale(decision) else "-")
    output.print(table)


def _is_scale(decision: Decision) -> bool:
    """Whether its value is another thing than a probability that is told already."""
    return decision.value is not None and decision.question.values != (1.0, 0.0)


def _record(decision: Decision) -> dict[str, Any]:
    return {"question": decision.question.text, "label": decision.label, "value": decision.value, "mass": decision.mass,
            "probabilities": decision.probabilities}
