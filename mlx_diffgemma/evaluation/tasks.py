"""Tasks: questions and how their answers are scored.

There are built-in suites, and questions from a user's .jsonl file.  A line of such a file has a
``prompt`` or ``messages``, as for fine-tuning, and one of

    "completion": "…"                        the whole answer, compared without the white space around it
    "schema": {…}                            the answer must be JSON that this JSON schema allows, and nothing else
    "choices": ["…", "…"], "answer": 0       the most probable of these on the canvas must be this one, by number or text

A line may also have a ``group``, in which it is counted too, and ``images``: files, relative to the
folder of the .jsonl file, that come before the text of the last message.

    >>> [task.name for task in tasks_named("nano,sudoku")]
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mlx_diffgemma.errors import UserError
from mlx_diffgemma.evaluation import sudoku
from mlx_diffgemma.evaluation.nano_tasks import TASKS as NANO
from mlx_diffgemma.evaluation.nano_tasks import held_out_examples
from mlx_diffgemma.files import expand_path, read_lines
from mlx_diffgemma.grammar.budget import MAX_SECONDS, limited
from mlx_diffgemma.grammar.checker import Checker, TooMuchWorkError
from mlx_diffgemma.media.images import MISSING as IMAGES_MISSING
from mlx_diffgemma.media.prompt import Medium
from mlx_diffgemma.media.video import Clip
from mlx_diffgemma.text.tokenizer import user_message

MAX_STEPS = 1_000_000  # the most keywords of a schema that are checked for one answer


@dataclass(frozen=True)
class Mark:
    """The mark of an answer: a ``score`` in [0, 1], and partial credit if the task has it.

    The partial credit of a Sudoku is the share of correct cells.
    """

    score: float
    partial: float | None = None


@dataclass(frozen=True)
class Question:
    """One question.  ``mark`` scores an answer.

    With ``choices`` nothing is generated: the choice is read from the canvas, and ``mark`` gets its
    text.
    """

    messages: Sequence[Mapping[str, Any]]
    mark: Callable[[str], Mark]
    group: str = ""
    choices: tuple[str, ...] = ()
    images: tuple[Medium, ...] = ()

    @classmethod
    def from_prompt(
        cls,
        prompt: str,
        mark: Callable[[str], Mark],
        group: str = "",
        images: tuple[Medium, ...] = (),
    ) -> Question:
        return cls([user_message(prompt, len(images))], mark, group, images=images)

    @property
    def prompt(self) -> str:
        """The text of the last message."""
        content = self.messages[-1]["content"]
        return (
            content
            if isinstance(content, str)
            else "".join(part.get("text", "") for part in content)
        )


@dataclass(frozen=True)
class Task:
    """A task.

    ``questions`` returns at most the given number of questions, always the same ones.  An answer to
    an ``exact`` task is either right or wrong.
    """

    name: str
    questions: Callable[[int], Sequence[Question]]
    exact: bool = True


def _nano_questions(name: str, limit: int) -> list[Question]:
    def mark(text: str, score: Callable[..., float], example: Any) -> Mark:
        return Mark(score(text, example))

    task = NANO[name]
    return [
        Question.from_prompt(example.prompt, partial(mark, score=task.score, example=example))
        for example in held_out_examples(task, limit)
    ]


def _sudoku_questions(size: int, limit: int) -> list[Question]:
    def mark(text: str, puzzle: sudoku.Puzzle) -> Mark:
        found = sudoku.score(text, puzzle)
        return Mark(float(found.solved), found.cells)

    puzzles = sudoku.draw_puzzles(size, limit, seed=0, held_out=True)
    return [
        Question.from_prompt(puzzle.prompt, partial(mark, puzzle=puzzle), sudoku.clue_range(puzzle))
        for puzzle in puzzles
    ]


def _picture_questions(kind: str, limit: int) -> list[Question]:
    """Questions about pictures.

    Every second question is about a thing in a colour that it never has in nano-vision's training.
    """
    try:
        from mlx_diffgemma.evaluation import pictures
    except ImportError:
        raise UserError(IMAGES_MISSING) from None
    rng = random.Random(f"held out {kind}")
    found = []
    for number in range(limit):
        new = number % 2 == 1
        picture = pictures.draw(rng, new, kind, rng.choice(pictures.RATIOS))
        media: tuple[Medium, ...] = (
            (Clip(picture.images, picture.seconds),) if picture.seconds else picture.images
        )
        group = "a new pair of thing and colour" if new else "known pairs"
        found.append(
            Question.from_prompt(
                picture.question, partial(_same, right=picture.answer), group, media
            )
        )
    return found


PICTURES = ("one", "two", "count", "pictures", "film")
TASKS: dict[str, Task] = {
    name: Task(name, partial(_nano_questions, name), task.exact) for name, task in NANO.items()
}
TASKS |= {
    f"sudoku-{size}": Task(f"sudoku-{size}", partial(_sudoku_questions, size))
    for size in sudoku.BOXES
}
TASKS |= {
    f"pictures-{kind}": Task(f"pictures-{kind}", partial(_picture_questions, kind))
    for kind in PICTURES
}
# "find" was trained too, but nano answers it no better than chance, as its card says.
SUITES: dict[str, tuple[str, ...]] = {
    "nano": tuple(name for name in NANO if name != "find"),
    "pictures": tuple(f"pictures-{kind}" for kind in PICTURES),
    "sudoku": tuple(f"sudoku-{size}" for size in sudoku.BOXES),
}


def tasks_named(names: str) -> list[Task]:
    """The tasks of a comma-separated list of suites and tasks.

    Raises:
        UserError: A name is unknown.
    """
    chosen: dict[str, Task] = {}
    for name in filter(None, (part.strip() for part in names.split(","))):
        if name not in SUITES and name not in TASKS:
            raise UserError(
                f"Unknown task {name!r}; there are the suites {', '.join(SUITES)} and the tasks {', '.join(TASKS)}."
            )
        chosen |= {task: TASKS[task] for task in SUITES.get(name, (name,))}
    if not chosen:
        raise UserError("No task named; give for example --tasks nano.")
    return list(chosen.values())


def tasks_of_file(path: Path) -> list[Task]:
    """The tasks of a file, one for each way of scoring that it uses.

    Raises:
        UserError: The file is invalid.  The message names the file and the line.
    """
    found: dict[str, list[Question]] = {}
    path = expand_path(path)
    for kind, question in read_lines(path, partial(_question, folder=path.parent)):
        found.setdefault(kind, []).append(question)
    if not found:
        raise UserError(f"{path} holds no questions.")
    return [
        Task(
            f"{path.stem} ({kind})" if len(found) > 1 else path.stem,
            lambda limit, own=own: own[:limit],  # type: ignore[misc]
        )
        for kind, own in found.items()
    ]


def _messages(entry: Any) -> tuple[list[Mapping[str, Any]], Any]:
    """Return the messages up to the question, and the answer in the line, if it has one."""
    if not isinstance(entry, Mapping):
        raise UserError(f"an object is expected, got {type(entry).__name__}.")
    messages = entry.get("messages")
    answer = entry.get("completion")
    if messages is None and isinstance(entry.get("prompt"), str):
        messages = [{"role": "user", "content": entry["prompt"]}]
    if (
        not isinstance(messages, list)
        or not messages
        or not all(
            isinstance(m, Mapping)
            and isinstance(m.get("role"), str)
            and isinstance(m.get("content"), str)
            for m in messages
        )
    ):
        raise UserError(
            "'prompt' or 'messages' is missing; a message has a role and a content, both texts."
        )
    if messages[-1]["role"] in ("assistant", "model"):
        answer = messages[-1]["content"]
        messages = messages[:-1]
    if not messages:
        raise UserError("the assistant's message answers nothing.")
    return messages, answer


def _choices(entry: Mapping[str, Any]) -> tuple[tuple[str, ...], str]:
    """Return the choices and the right one."""
    choices = entry["choices"]
    right = entry.get("answer")
    if (
        not isinstance(choices, list)
        or len(choices) < 2
        or not all(isinstance(c, str) and c.strip() for c in choices)
    ):
        raise UserError("'choices' must hold at least two texts.")
    if len({choice.strip() for choice in choices}) < len(choices):
        raise UserError("two of the choices are the same.")
    if isinstance(right, int) and not isinstance(right, bool) and 0 <= right < len(choices):
        right = choices[right]
    if not isinstance(right, str) or right not in choices:
        raise UserError(f"'answer' must be one of the choices or its number from 0, got {right!r}.")
    return tuple(choices), right


def _question(entry: Any, folder: Path) -> tuple[str, Question]:
    """Return the way of scoring and the question of one line.

    Raises:
        UserError: The line is invalid.
    """
    messages, answer = _messages(entry)
    group = str(entry.get("group") or "")
    images = _images(entry.get("images"), folder)
    if images and messages[-1]["role"] != "user":
        raise UserError(
            f"'images' belong to a question of the user's, and the last message is of role {messages[-1]['role']!r}; "
            "end with the user's message, or leave them out."
        )
    if images:
        messages = [*messages[:-1], user_message(messages[-1]["content"], len(images))]
    if "choices" in entry:
        choices, right = _choices(entry)
        mark = partial(_same, right=right)
        return "choices", Question(messages, mark, group, choices, images)
    if "schema" in entry:
        try:
            with limited(MAX_SECONDS):
                checker = Checker(entry["schema"], MAX_STEPS)
        except UserError as error:
            raise UserError(f"'schema' cannot be used ({error})") from None
        return "schema", Question(messages, partial(_valid, checker=checker), group, images=images)
    if not isinstance(answer, str):
        raise UserError("one of 'completion', 'schema', or 'choices' with 'answer' is missing.")
    return "exact", Question(messages, partial(_same, right=answer), group, images=images)


def _images(names: Any, folder: Path) -> tuple[Medium, ...]:
    """The images of a line.  Raises UserError if a file does not exist."""
    if names is None:
        return ()
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError("'images' must be a list of file names.")
    paths = tuple(folder / expand_path(name) for name in names)
    for path in paths:
        if not path.is_file():
            raise UserError(f"there is no image {path}.")
    return paths


def _same(text: str, right: str) -> Mark:
    return Mark(float(text.strip() == right.strip()))


def _valid(text: str, checker: Checker) -> Mark:
    """Check an answer with a schema.  Any JSON gets partial credit."""
    try:
        value = json.loads(text, parse_constant=_refuse)
        return Mark(float(checker.fits(value)), 1.0)
    except TooMuchWorkError:  # the JSON is too deep or too long to be checked
        return Mark(0.0, 0.0)
    except (ValueError, RecursionError):  # it is not JSON, or too deep or too long to be read
        return Mark(0.0, 0.0)


def _refuse(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
