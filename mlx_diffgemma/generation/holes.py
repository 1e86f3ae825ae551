"""The records of ``infill``: holes in a text and what fills them.  Also the syntax of a marker."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from mlx_diffgemma.errors import UserError
from mlx_diffgemma.generation.options import CONSTRAINTS
from mlx_diffgemma.grammar.constraint import check_constraint

LENGTHS = (1, 16)  # the bounds of a hole without a given length
ANY_TEXT = "(?s:.*)"  # keeps control tokens and broken characters out of a hole
MARKER = re.compile(r"<\|hole(?::([^|<>]*))?\|>")
Messages: TypeAlias = "str | Sequence[Mapping[str, Any]]"


@dataclass(frozen=True)
class Hole:
    """A hole in a text, and which texts it may hold.

    Blanks before a hole are counted with it, since tokens hold a blank together with the word
    after it.

    Attributes:
        length: The number of tokens, or (fewest, most), between which the length is searched.
            None: the length is searched between LENGTHS.
        json_schema: The hole holds a value of this schema.
        regex: The hole matches this regular expression.
        choices: The hole holds one of these texts.

    Raises:
        UserError: A length is below 1, the lengths are out of order, or there are two constraints.
    """

    length: int | tuple[int, int] | None = None
    json_schema: Any = None
    regex: str | None = None
    choices: Sequence[str] | None = None

    def __post_init__(self) -> None:
        fewest, most = self.bounds
        if not 1 <= fewest <= most:
            raise UserError(
                "A hole has at least 1 token and its bounds are in order; got the length "
                f"{self.length!r}."
            )
        check_constraint(**self.constraint)

    @property
    def bounds(self) -> tuple[int, int]:
        """The fewest and the most tokens."""
        length = LENGTHS if self.length is None else self.length
        return (length, length) if isinstance(length, int) else (length[0], length[1])

    @property
    def constraint(self) -> dict[str, Any]:
        """The constraint, by its keyword.  Without one, the hole may hold any text."""
        given = {name: getattr(self, name) for name in CONSTRAINTS}
        return {name: value for name, value in given.items() if value is not None} or {
            "regex": ANY_TEXT
        }


@dataclass(frozen=True)
class Candidate:
    """A text of ``length`` tokens for a hole, and its ``score``: see ``Fill``."""

    text: str
    length: int
    score: float
    converged: bool


@dataclass(frozen=True)
class Fill:
    """What fills one hole.

    Attributes:
        hole: The number of the hole, from 0.
        text: What was written, without the blanks before the hole.
        tokens: Its ids.
        converged: Whether a stop rule ended its canvas, not a limit.
        steps: Denoising steps of all lengths that were tried; 0 for a hole that was filled on the
            canvas of the one before.
        candidates: If several lengths were tried, the text of each, by length.  The one with the
            largest ``score`` was chosen: the mean log-probability a token, in nats, that the causal
            mode gives to the text from the start of the hole.
    """

    hole: int
    text: str
    tokens: tuple[int, ...]
    converged: bool
    steps: int
    candidates: tuple[Candidate, ...] = ()


@dataclass(frozen=True)
class Infilled:
    """A text whose holes are filled.

    Attributes:
        text: The given text with the ``fills``.  The rest is unchanged, byte for byte.
        fills: One for each hole, in the order of the text.
        unseen: The number of tokens at the end that come after the last canvas.  No hole depends
            on them.
        seed: The seed that was used.
    """

    text: str
    fills: tuple[Fill, ...]
    unseen: int
    seed: int


def split_holes(text: str, hole: Hole = Hole()) -> tuple[list[str], list[Hole]]:  # noqa: B008
    """Split ``text`` at its markers.

    Returns:
        The texts between the markers, and the marked holes: ``hole`` with the marker's length.

    Raises:
        UserError: A marker cannot be read.
    """
    parts = list[str]()
    holes = list[Hole]()
    done = 0
    for marker in MARKER.finditer(text):
        parts.append(text[done : marker.start()])
        holes.append(hole if marker[1] is None else replace(hole, length=read_length(marker[1])))
        done = marker.end()
    return [*parts, text[done:]], holes


def read_length(text: str) -> int | tuple[int, int]:
    """Read a length in the form of a marker, ``5`` or ``2-8``.  Raises UserError if it is wrong."""
    match = re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", text)
    if not match:
        raise UserError(
            f"{text!r} is no length of a hole; write a number of tokens, 5, or two, 2-8."
        )
    return int(match[1]) if match[2] is None else (int(match[1]), int(match[2]))
