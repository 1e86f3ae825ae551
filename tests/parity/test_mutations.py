"""Each of the traps, sprung on purpose: the comparison with the reference must notice every one."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_diffgemma.checkpoint.loading import load_model
from mlx_diffgemma.diagnostics.forwards import compare_forwards
from mlx_diffgemma.diagnostics.parity import default_prompts
from mlx_diffgemma.diagnostics.trajectories import compare_trajectories
from mlx_diffgemma.sampling import policy
from tests.checkpoints import make_checkpoint
from tests.helpers.deferred import Reference
from tests.helpers.traps import MUTATIONS


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    folder = make_checkpoint(tmp_path_factory.mktemp("checkpoint"))
    loaded = load_model(folder, "float32")
    return loaded, Reference(folder), default_prompts(loaded, 2)


def test_unbroken_code_passes(sides):
    assert all(stage.ok for stage in compare_forwards(*sides))
    assert compare_trajectories(*sides, "plain").ok


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda f: f.__name__)
def test_forward_mutation_is_noticed(mutate, sides, monkeypatch):
    mutate(monkeypatch)
    assert not all(stage.ok for stage in compare_forwards(*sides))


def test_frozen_positions_are_noticed(tmp_path, monkeypatch):
    """Positions accepted once keep their token, in place of being drawn or renoised anew."""
    folder = make_checkpoint(tmp_path, calm=False)
    loaded = load_model(folder, "float32")
    sides = loaded, Reference(folder), default_prompts(loaded, 2)
    assert compare_trajectories(*sides, "plain").ok
    sample, frozen = policy.sample_step, {}

    def freezing(logits, u, renoise, before, numbers, eos, forced):
        step = sample(logits, u, renoise, before, numbers, eos, forced)
        first = bool((before.history[:, -1] == -1).all().item())
        mask, canvas = (
            (mx.zeros(step.accepted.shape, dtype=mx.bool_), step.canvas)
            if first
            else frozen["last"]
        )
        canvas = mx.where(mask, canvas, step.canvas)
        frozen["last"] = (mask | step.accepted, canvas)
        return step._replace(canvas=canvas)

    monkeypatch.setattr(policy, "sample_step", freezing)
    assert not compare_trajectories(*sides, "frozen").ok
