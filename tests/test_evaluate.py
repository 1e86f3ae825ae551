import numpy as np
import pytest

from mlx_diffgemma.errors import UserError
from mlx_diffgemma.evaluate import _bootstrap, _wilson, evaluate, tasks_named
from mlx_diffgemma.nano.tasks import TASKS


def test_suites_and_tasks():
    assert [t.name for t in tasks_named("nano")] == [name for name in TASKS if name != "find"]
    assert [t.name for t in tasks_named("add, story,add")] == ["add", "story"]
    for bad in ("", "nanno", "add,x"):
        with pytest.raises(UserError):
            tasks_named(bad)


def test_figures_do_not_depend_on_the_batch_size(nano_pair):
    one, four = (evaluate(*nano_pair, "compare", limit=5, seeds=[3], batch_size=size).results for size in (1, 4))
    assert one == four


def test_counts(nano_pair):
    report = evaluate(*nano_pair, "compare", limit=3, seeds=[0, 1])
    result = report.results[0]
    assert result.answers == 6
    assert 1 <= result.steps_per_canvas <= 48
    assert 0 <= result.low <= result.score <= result.high <= 1
    assert result.converged is not None
    causal = evaluate(*nano_pair, "compare", limit=3, mode="ar").results[0]
    assert causal.steps_per_canvas is causal.converged is None


def test_intervals():
    # Wilson's interval of 8 of 10, from the formula's usual table
    low, high = _wilson(np.array([1] * 8 + [0] * 2))
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-3)
    assert _wilson(np.ones(100))[0] < 1
    low, high = _bootstrap(np.array([0.0, 1.0] * 200))
    assert low < 0.5 < high
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.15)


def test_limits():
    with pytest.raises(UserError, match="limit must be at least 1"):
        evaluate(None, None, "add", limit=0)
