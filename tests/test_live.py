import io
from dataclasses import replace

import mlx.core as mx
import pytest
from rich.console import Console

from mlx_diffgemma.cli.live import LiveCanvas
from tests.helpers.steps import ids_of, step


@pytest.fixture
def drawn(nano_pair):
    """Draw steps at given times; what went to the terminal."""

    def draw(*steps_and_times):
        out, now = io.StringIO(), iter([t for _, t in steps_and_times])
        console = Console(file=out, force_terminal=True, width=80, color_system="standard")
        with LiveCanvas(nano_pair[1], (1, 5, 13), console, clock=lambda: next(now)) as live:
            for s, _ in steps_and_times:
                live.show(s)
        return out.getvalue()

    return draw


def test_frames_are_throttled_but_the_last_one_is_drawn(drawn, nano_pair):
    ids = ids_of(nano_pair, "fox")
    out = drawn(
        (step(ids, 0), 0.0),
        (step(ids, 1), 0.01),
        (step(ids, 2), 0.02),
        (step(ids, 3, "converged"), 0.03),
    )
    assert "step 1 of" in out
    assert "step 2 of" not in out
    assert "step 3 of" not in out
    assert "step 4 of" in out


def test_nothing_is_drawn_after_the_end_token(drawn, nano_pair):
    out = drawn((step([*ids_of(nano_pair, "fox"), 1, *ids_of(nano_pair, "moon")]), 0.0))
    assert "fox" in out
    assert "moon" not in out


def test_colour_tells_certain_from_guessing(drawn, nano_pair):
    ids = ids_of(nano_pair, "fox")
    assert drawn((step(ids, entropy=0.001), 0.0)) != drawn((step(ids, entropy=5.0), 0.0))


def test_drafted_positions_that_stand_and_that_were_repaired_are_told_apart(drawn, nano_pair):
    ids = [*ids_of(nano_pair, "fox moon"), 1, 7]
    guess = [
        *ids[:-3],
        9,
        1,
        7,
    ]  # the last token of the text was guessed wrong; what comes after the end is not shown
    found = replace(step(ids), draft=mx.array(guess))
    out = drawn((found, 0.0))
    count = len(ids) - 2
    for text in (
        f"{count} positions drafted",
        f"{count - 1} stand",
        "1 repaired",
        "\x1b[4;31m",
        "\x1b[7;31m",
    ):
        assert text in out, text
    assert "drafted" not in drawn((step(ids), 0.0))
    nothing = drawn((replace(step(ids), draft=mx.full((len(ids),), -1)), 0.0))
    assert "0 positions drafted" in nothing
    assert "\x1b[4;31m" not in nothing
