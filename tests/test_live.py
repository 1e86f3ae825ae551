import io

import mlx.core as mx
import pytest
from rich.console import Console

from mlx_diffgemma.live import LiveCanvas
from mlx_diffgemma.session import CanvasStep


def step(ids, number=0, reason=None, entropy=1.0):
    ids = mx.array(ids)
    return CanvasStep(0, 0, number, 8, ids, ids, ids > 0, mx.full(ids.shape, entropy), mx.zeros(ids.shape), entropy, reason)


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


def ids_of(nano_pair, text):
    return nano_pair[1].encode(text, add_special_tokens=False)


def test_frames_are_throttled_but_the_last_one_is_drawn(drawn, nano_pair):
    ids = ids_of(nano_pair, "fox")
    out = drawn((step(ids, 0), 0.0), (step(ids, 1), 0.01), (step(ids, 2), 0.02), (step(ids, 3, "converged"), 0.03))
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
