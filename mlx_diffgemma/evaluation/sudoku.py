"""Sudoku as a task: puzzles with a single solution in three sizes, told as text, scored by board and by cell.

A puzzle is held out when its *solution* is, so that no training puzzle shares a solution with one that is scored; which
solutions are is decided by a hash.

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
CLUES = {4: (4, 10), 6: (10, 24), 9: (26, 50)}  # how many cells are given, fewest and most
EMPTY = "."


@dataclass(frozen=True)
class Puzzle:
    """``clues`` and ``solution``: cells row by row, 0 for an empty one."""

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
    """A row a line, without spaces."""
    size = round(len(cells) ** 0.5)
    return "\n".join("".join(str(cell) if cell else EMPTY for cell in cells[row * size : (row + 1) * size]) for row in range(size))


def is_held_out(solution: tuple[int, ...]) -> bool:
    """An eighth of all solutions."""
    return hashlib.sha256(board_text(solution).encode()).digest()[0] < 32


def clue_range(puzzle: Puzzle) -> str:
    """Under which of four ranges of clues a puzzle is counted."""
    fewest, most = CLUES[puzzle.size]
    step = -(-(most - fewest + 1) // 4)
    first = fewest + step * max(0, min(3, (puzzle.given - fewest) // step))
    return f"{first} to {first + step - 1} clues"


@dataclass(frozen=True)
class Score:
    """``solved``: the whole board; ``cells``: the share of the empty cells that were filled rightly."""

    solved: bool
    cells: float


def score(text: str, puzzle: Puzzle) -> Score:
    """Of an answer.  Cells are compared place by place, so one left out spoils those after it in its row."""
    lines = text.strip().split("\n")
    size, right = puzzle.size, 0
    for place, (clue, cell) in enumerate(zip(puzzle.clues, puzzle.solution, strict=True)):
        row, column = divmod(place, size)
        written = lines[row][column : column + 1] if row < len(lines) else ""
        right += not clue and written == str(cell)
    return Score(text.strip() == puzzle.answer, right / max(1, len(puzzle.clues) - puzzle.given))


@functools.cache
def _units(size: int) -> tuple[tuple[int, ...], ...]:
    """For each cell the other cells of its row, column and box."""
    height, width = BOXES[size]
    peers = []
    for cell in range(size * size):
        row, column = divmod(cell, size)
        peers.append(tuple(other for other in range(size * size) if other != cell and (
            other // size == row or other % size == column
            or (other // size // height == row // height and other % size // width == column // width))))
    return tuple(peers)


def solutions(cells: tuple[int, ...], rng: random.Random | None = None) -> Iterator[tuple[int, ...]]:
    """All completions of a board, the cell with the fewest candidates first; in random order with ``rng``."""
    size = round(len(cells) ** 0.5)
    peers, board = _units(size), list(cells)

    def search() -> Iterator[tuple[int, ...]]:
        best, options = -1, None
        for cell, value in enumerate(board):
            if value:
                continue
            taken = {board[other] for other in peers[cell]}
            free = [digit for digit in range(1, size + 1) if digit not in taken]
            if options is None or len(free) < len(options):
                best, options = cell, free
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
    """A puzzle of about ``clues`` clues, more where fewer would leave more than one solution."""
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
        value, cells[place] = cells[place], 0
        if is_unique(tuple(cells)):
            left -= 1
        else:
            cells[place] = value
    return Puzzle(tuple(cells), solution)


def draw_puzzles(size: int, count: int, seed: int, held_out: bool) -> list[Puzzle]:
    """``count`` different puzzles, their clues spread evenly over the size's range."""
    rng, fewest_most, found = random.Random(f"{size} {seed} {held_out}"), CLUES[size], dict[tuple[int, ...], Puzzle]()
    while len(found) < count:
        puzzle = draw_puzzle(size, rng.randint(*fewest_most), rng, held_out)
        found[puzzle.clues] = puzzle
    return list(found.values())
