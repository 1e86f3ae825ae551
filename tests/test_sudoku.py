"""Puzzles have one solution, held-out solutions stay apart, and scores count what they say."""

import random

import pytest

from mlx_diffgemma.evaluation.sudoku import (
    BOXES,
    CLUES,
    Puzzle,
    board_text,
    draw_puzzle,
    draw_puzzles,
    is_held_out,
    is_unique,
    score,
    solutions,
)


@pytest.mark.parametrize(("size", "count"), [(4, 20), (6, 8), (9, 2)])
def test_puzzles(size, count):
    height, width = BOXES[size]
    for puzzle in draw_puzzles(size, count, 0, held_out=False):
        rows = [puzzle.solution[i * size : (i + 1) * size] for i in range(size)]
        boxes = [
            [rows[r + i][c + j] for i in range(height) for j in range(width)]
            for r in range(0, size, height)
            for c in range(0, size, width)
        ]
        assert all(
            sorted(unit) == list(range(1, size + 1)) for unit in (*rows, *zip(*rows), *boxes)
        )
        assert all(clue in (0, cell) for clue, cell in zip(puzzle.clues, puzzle.solution))
        assert list(solutions(puzzle.clues)) == [puzzle.solution]
        assert CLUES[size][0] <= puzzle.given


def test_more_than_one_solution_is_noticed():
    assert len(set(solutions((0,) * 16))) == 288
    assert not is_unique((0,) * 16)
    assert not is_unique((1, 1, *(0,) * 14)), "none is not one"


def test_no_solution_is_on_both_sides():
    sides = [
        {puzzle.solution for puzzle in draw_puzzles(4, 60, 0, held_out)}
        for held_out in (False, True)
    ]
    assert not sides[0] & sides[1]
    assert all(is_held_out(solution) for solution in sides[1])
    assert not any(is_held_out(solution) for solution in sides[0])


def test_draws_repeat():
    assert draw_puzzles(4, 5, 3, True) == draw_puzzles(4, 5, 3, True) != draw_puzzles(4, 5, 4, True)
    assert draw_puzzle(4, 16, random.Random(0), False).given == 16


def test_scores():
    solution = (1, 2, 3, 4, 3, 4, 1, 2, 2, 1, 4, 3, 4, 3, 2, 1)
    puzzle = Puzzle((1, 0, 0, 4, *solution[4:]), solution)
    assert puzzle.prompt == "Solve this Sudoku:\n1..4\n3412\n2143\n4321"
    assert (score(puzzle.answer, puzzle).solved, score(puzzle.answer + "\n", puzzle).cells) == (
        True,
        1.0,
    )
    wrong = board_text((1, 2, 2, 4, *solution[4:]))
    assert (score(wrong, puzzle).solved, score(wrong, puzzle).cells) == (False, 0.5)
    assert score("", puzzle).cells == 0
