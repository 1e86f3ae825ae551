"""The comparison as a judge: fair to a correct port on lively weights, not ended by one tie, and
never a traceback.
"""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from mlx_diffgemma.checkpoint.loading import load_model
from mlx_diffgemma.diagnostics import parity, trajectories
from mlx_diffgemma.diagnostics.decisions import Decision, Ended
from mlx_diffgemma.diagnostics.forwards import compare_forwards, compare_images
from mlx_diffgemma.diagnostics.parity import default_prompts, run
from mlx_diffgemma.diagnostics.stages import StageErrors
from mlx_diffgemma.diagnostics.trajectories import RowComparison, compare_trajectories
from mlx_diffgemma.errors import UserError
from tests.checkpoints import SHAPES, VISIONS, make_checkpoint
from tests.helpers.deferred import Reference
from tests.helpers.traps import MUTATIONS
from tests.variants import few

SMALL_TOWER = VISIONS["plain"] | dict(
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
)


@pytest.fixture(scope="module")
def lively(tmp_path_factory):
    folder = make_checkpoint(tmp_path_factory.mktemp("lively"), "odd-heads", calm=False)
    model = load_model(folder, "float32")
    return model, Reference(folder), default_prompts(model, 2)


@pytest.mark.parametrize("shape", few(SHAPES, "odd-heads"))
def test_a_correct_port_passes_on_lively_weights(shape, tmp_path):
    """Where two float32 implementations are further apart than either is from float64."""
    folder = make_checkpoint(tmp_path, shape, calm=False)
    model = load_model(folder, "float32")
    for stage in compare_forwards(model, Reference(folder), default_prompts(model, 3)):
        assert stage.exact
        assert stage.ok, stage


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda f: f.__name__)
def test_a_planted_fault_fails_on_lively_weights(mutate, lively, monkeypatch):
    mutate(monkeypatch)
    assert not all(stage.ok for stage in compare_forwards(*lively))


def stage(ours, own, margins=None):
    """The result for errors of ours and of the reference against float64 zeros."""
    errors = StageErrors("a stage")
    errors.add(
        np.array(ours)[:, None],
        [np.array(own)[:, None], np.zeros((len(own), 1))],
        margins,
        exact=True,
    )
    return errors.result()


def test_errors_are_held_against_the_references_own():
    own = np.linspace(1e-4, 2e-4, 50)
    assert stage(1.9 * own, own).ok
    assert not stage(2.1 * own, own).ok, "twice as far in the median row"
    tail = own.copy()
    tail[-8:] *= 3.5
    assert stage(tail, own).p90 > 3 * np.quantile(own, 0.9)
    assert not stage(tail, own).ok, "three times as far at the 90th percentile"
    one = own.copy()
    one[3] = 1e-3
    assert not stage(one, own).ok, "a single row that is off"
    ties = np.where(np.arange(50) == 3, 1e-6, 1.0)
    assert stage(one, own, ties).ok, "unless two experts tie there"
    nan = own.copy()
    nan[3] = np.nan
    assert not stage(nan, own).ok
    assert stage(np.full(50, 9e-6), np.full(50, 1e-9)).ok, (
        "rounding of numbers that happen to be exact"
    )
    assert not stage(np.full(50, 3e-5), np.full(50, 1e-9)).ok


def with_a_tie(monkeypatch, at):
    """Our sides differ in one position of a step of the first canvas, and the reference's margin
    excuses it.
    """
    ours = trajectories.run_ours

    def differing(*args):
        rows = ours(*args)
        step = rows[0][0][at]
        rows[0][0][at] = replace(step, argmax=step.argmax.at[2].add(1))
        return rows

    monkeypatch.setattr(trajectories, "run_ours", differing)
    first = Decision.first

    def judged(self, names, mine):
        if self.number == at and self.index == 0 and names == ["argmax"]:
            return Ended(0, at, "argmax", 1e-9, 1e-6)
        return first(self, names, mine)

    monkeypatch.setattr(Decision, "first", judged)


def test_one_tie_does_not_end_the_comparison(lively, monkeypatch):
    model, reference, prompts = lively
    whole = compare_trajectories(model, reference, prompts[:1], "whole", canvases=2, max_steps=6)
    assert whole.ok
    assert whole.steps > 4
    with_a_tie(monkeypatch, at=1)
    tied = compare_trajectories(model, reference, prompts[:1], "tied", canvases=2, max_steps=6)
    assert (tied.steps, tied.canvases) == (whole.steps, whole.canvases)
    assert len(tied.ended) == 1
    assert tied.ok


@pytest.mark.parametrize("name", ["accept", "inverse_cdf"])
def test_a_fault_after_a_tie_is_noticed(name, lively, monkeypatch):
    model, reference, prompts = lively
    with_a_tie(monkeypatch, at=0)
    take_step = RowComparison.take_step

    def faulty(*args):
        mine = take_step(*args)
        if name == "accept":
            return replace(mine, accepted=~mine.accepted)
        return replace(mine, canvas=(mine.canvas + 1) % 200)

    monkeypatch.setattr(RowComparison, "take_step", faulty)
    found = compare_trajectories(model, reference, prompts[:1], "faulty", max_steps=6)
    assert not found.ok
    assert any(not e.excused for e in found.ended)


def changed(folder, target, name, change):
    """A copy of a checkpoint folder, one of its JSON files changed."""
    shutil.copytree(folder, target)
    path = target / name
    content = json.loads(path.read_text()) if path.exists() else {}
    change(content)
    path.write_text(json.dumps(content))
    return target


@pytest.fixture(scope="module")
def sighted_folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("sighted") / "model", vision="plain")


@pytest.mark.parametrize(
    "settings",
    [
        {"t_min": 0.9, "t_max": 0.1},
        {"confidence_threshold": "low"},
        {"max_denoising_steps": -3},
        {"max_denoising_steps": 2.5},
    ],
    ids=str,
)
def test_generation_settings_that_the_reference_refuses(settings, tmp_path, tiny_folder):
    folder = changed(
        tiny_folder,
        tmp_path / "model",
        "generation_config.json",
        lambda content: content.update(settings),
    )
    with pytest.raises(UserError, match="generation_config|refuses|cannot load"):
        run(folder, prompts=1, canvases=1)


@pytest.mark.parametrize("key", ["image_token_id", "boi_token_id", "eoi_token_id"])
def test_image_ids_outside_of_the_vocabulary(key, tmp_path, sighted_folder):
    folder = changed(
        sighted_folder,
        tmp_path / "model",
        "config.json",
        lambda content: content.update({key: 100_000}),
    )
    with pytest.raises(
        UserError, match=f"config.json: {key} must be a whole number from 0 to 300, got 100000"
    ):
        run(folder, prompts=1, canvases=1)


def test_a_tower_without_image_ids(tmp_path, sighted_folder):
    folder = changed(
        sighted_folder,
        tmp_path / "model",
        "config.json",
        lambda content: content.pop("image_token_id"),
    )
    with pytest.raises(UserError, match="config.json must name|image_token_id"):
        run(folder, prompts=1, canvases=1)


def test_images_stay_within_the_position_table(tmp_path):
    """A table of 12 positions, of which the wide and the tall picture would need more."""
    folder = make_checkpoint(
        tmp_path / "model", vision=SMALL_TOWER | {"position_embedding_size": 12}
    )
    model = load_model(folder, "float32")
    images = [image for group in parity.default_images(model) for image in group]
    assert len(images) == 3
    assert all(max(image.grid) <= 12 for image in images)
    assert all(
        stage.ok for stage in compare_images(model, Reference(folder), parity.default_images(model))
    )


def test_a_table_that_holds_no_image(tiny_folder, tmp_path):
    folder = make_checkpoint(
        tmp_path / "model", vision=SMALL_TOWER | {"position_embedding_size": 2}
    )
    with pytest.raises(
        UserError, match="position_embedding_size is 2, and an image has at least 3 patches a side"
    ):
        run(folder, prompts=1, canvases=1)
