"""Whole answers with the same random numbers on both sides, decision by decision."""

import pytest

from mlx_diffgemma import nano
from mlx_diffgemma.checkpoint.loading import load_model
from mlx_diffgemma.diagnostics.parity import default_prompts
from mlx_diffgemma.diagnostics.trajectories import compare_trajectories
from tests.checkpoints import SHAPES, make_checkpoint
from tests.helpers.deferred import Reference
from tests.helpers.prompts import nano_prompts
from tests.variants import few


@pytest.mark.parametrize("together", few([False, True], True), ids=["alone", "batch"])
@pytest.mark.parametrize("shape", SHAPES)
def test_random_checkpoint(shape, together, tmp_path):
    folder = make_checkpoint(tmp_path, shape, calm=False)
    model, reference = load_model(folder, "float32"), Reference(folder)
    result = compare_trajectories(
        model, reference, default_prompts(model, 3), shape, canvases=2, together=together
    )
    assert result.canvases >= 3
    assert result.steps > 3 * result.canvases, "trajectories long enough to tell"
    assert result.ok, result


@pytest.mark.parametrize("together", few([False, True], False), ids=["alone", "batch"])
def test_nano(together):
    model, reference = load_model(nano.FOLDER, "float32"), Reference(nano.FOLDER)
    result = compare_trajectories(
        model, reference, nano_prompts(4), "nano", canvases=2, max_steps=8, together=together
    )
    assert result.canvases >= 4
    assert result.ok, result


@pytest.mark.slow
def test_two_hundred_canvases_on_nano(capsys):
    model, reference = load_model(nano.FOLDER, "float32"), Reference(nano.FOLDER)
    result = compare_trajectories(
        model, reference, nano_prompts(200), "nano", canvases=3, max_steps=16
    )
    with capsys.disabled():
        print(f"\n{result}")
    assert result.canvases >= 200
    assert len(result.ended) <= 0.02 * result.canvases
    assert result.ok, result


@pytest.mark.slow
def test_two_hundred_canvases_on_random_checkpoints(tmp_path, capsys):
    results = []
    for shape in SHAPES:
        folder = make_checkpoint(tmp_path / shape, shape, seed=1, calm=False)
        model, reference = load_model(folder, "float32"), Reference(folder)
        results.append(
            compare_trajectories(
                model,
                reference,
                default_prompts(model, 30, seed=1),
                shape,
                canvases=2,
                together=True,
            )
        )
        with capsys.disabled():
            print(f"\n{results[-1]}")
    assert all(e.excused for result in results for e in result.ended)
    canvases = sum(result.canvases for result in results)
    assert canvases >= 200
    assert sum(len(result.ended) for result in results) <= 0.02 * canvases
