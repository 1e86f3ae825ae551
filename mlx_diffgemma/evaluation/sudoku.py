"""Sudoku as a task: puzzles in three sizes, each with a single solution, written as text.

Answers are scored by board and by cell.  A puzzle is held out if its *solution* is, so no training
puzzle has the solution of a puzzle that is scored.  A hash decides which solutions are held out.

    >>> puzzle = draw_puzzle(4, clues=8, rng=random.Random(0), held_out=False)
    >>> print(puzzle.prompt)
"""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}  # rows and columns of a box
CLUES = {4: (4, 10), 6: (10, 24), 9: (26, 50)}  # the fewest and the most given cells
EMPTY = "."


@dataclass(frozen=True)
class Puzzle:
    """A puzzle.  ``clues`` and ``solution`` hold the cells row by row; 0 is an empty cell."""

    clues: tuple[int, ...]
    solution: tuple[int, ...]

    @property
    def size(self) -> int:
        return round(len(self.clues) ** 0.5)

    @property
    def given(self) -> int:
        return sum(cell > 0 for cell in self.clues)

    @property
    def prompt(self) -> str:
        return f"Solve this Sudoku:\n{board_text(self.clues)}"

    @property
    def answer(self) -> str:
        return board_text(self.solution)


def board_text(cells: tuple[int, ...]) -> str:
    """The board as text: one line for each row, without spaces."""
    size = round(len(cells) ** 0.5)
    return "\n".join(
        "".join(str(cell) if cell else EMPTY for cell in cells[row * size : (row + 1) * size])
        for row in range(size)
    )


def is_held_out(solution: tuple[int, ...]) -> bool:
    """Whether a solution is held out, as an eighth of all solutions is."""
    return hashlib.sha256(board_text(solution).encode()).digest()[0] < 32


def clue_range(puzzle: Puzzle) -> str:
    """The name of the range of clues, one of four, in which a puzzle is counted."""
    fewest, most = CLUES[puzzle.size]
    step = -(-(most - fewest + 1) // 4)
    first = fewest + step * max(0, min(3, (puzzle.given - fewest) // step))
    return f"{first} to {first + step - 1} clues"


@dataclass(frozen=True)
class Score:
    """The score of an answer.

    ``solved`` says whether the whole board is right.  ``cells`` is the share of the empty cells
    that were filled correctly.
    """

    solved: bool
    cells: float


def score(text: str, puzzle: Puzzle) -> Score:
    """Score an answer.

    Cells are compared position by position, so after a missing cell the rest of its row is wrong.
    """
    lines = text.strip().split("\n")
    size = puzzle.size
    right = 0
    for place, (clue, cell) in enumerate(zip(puzzle.clues, puzzle.solution, strict=True)):
        row, column = divmod(place, size)
        written = lines[row][column : column + 1] if row < len(lines) else ""
        right += not clue and written == str(cell)
    return Score(text.strip() == puzzle.answer, right / max(1, len(puzzle.clues) - puzzle.given))


@functools.cache
def _units(size: int) -> tuple[tuple[int, ...], ...]:
    """For each cell, the other cells of its row, column and box."""
    height, width = BOXES[size]
    peers = []
    for cell in range(size * size):
        row, column = divmod(cell, size)
        peers.append(
            tuple(
                other
                for other in range(size * size)
                if other != cell
                and (
                    other // size == row
                    or other % size == column
                    or (
                        other // size // height == row // height
                        and other % size // width == column // width
                    )
                )
            )
        )
    return tuple(peers)


def solutions(
    cells: tuple[int, ...], rng: random.Random | None = None
) -> Iterator[tuple[int, ...]]:
    """Yield all completions of a board; with ``rng``, in random order.

    The search fills the cell with the fewest candidates first.
    """
    size = round(len(cells) ** 0.5)
    peers = _units(size)
    board = list(cells)

    def search() -> Iterator[tuple[int, ...]]:
        best = -1
        options = None
        for cell, value in enumerate(board):
            if value:
                continue
            taken = {board[other] for other in peers[cell]}
            free = [digit for digit in range(1, size + 1) if digit not in taken]
            if options is None or len(free) < len(options):
                best = cell
                options = free
                if len(free) < 2:
                    break
        if options is None:
            yield tuple(board)
            return
        if rng is not None:
            rng.shuffle(options)
        for digit in options:
            board[best] = digit
            yield from search()
        board[best] = 0

    return search()


def is_unique(cells: tuple[int, ...]) -> bool:
    found = solutions(cells)
    return next(found, None) is not None and next(found, None) is None


def draw_puzzle(size: int, clues: int, rng: random.Random, held_out: bool) -> Puzzle:
    """Draw a puzzle.

    Args:
        size: Cells of a row.
        clues: About how many clues it has.  It has more if fewer would leave several solutions.
        rng: The source of random numbers.
        held_out: Whether its solution is held out.
    """
    while True:
        solution = next(solutions((0,) * size**2, rng))
        if is_held_out(solution) == held_out:
            break
    cells = list(solution)
    places = list(range(size * size))
    rng.shuffle(places)
    left = len(cells)
    for place in places:
        if left <= clues:
            break
        value = cells[place]
        cells[place] = 0
        if is_unique(tuple(cells)):
            left -= 1
        else:
            cells[place] = value
    return Puzzle(tuple(cells), solution)


def draw_puzzles(size: int, count: int, seed: int, held_out: bool) -> list[Puzzle]:
    """Draw different puzzles whose clues are spread evenly over the range of the size.

    Args:
        size: Cells of a row.
        count: The number of puzzles.
        seed: The same seed gives the same puzzles.
        held_out: Whether their solutions are held out.
    """
    rng = random.Random(f"{size} {seed} {held_out}")
    fewest_most = CLUES[size]
    found = dict[tuple[int, ...], Puzzle]()
    while len(found) < count:
        puzzle = draw_puzzle(size, rng.randint(*fewest_most), rng, held_out)
        found[puzzle.clues] = puzzle
    return list(found.values())
