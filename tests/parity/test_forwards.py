"""Encoder, cache and logits against transformers, within the reference's own spread."""

import numpy as np
import pytest

from mlx_diffgemma import nano
from mlx_diffgemma.checkpoint.loading import load_model
from mlx_diffgemma.diagnostics.forwards import compare_forwards
from mlx_diffgemma.diagnostics.parity import default_prompts
from tests.checkpoints import SHAPES, make_checkpoint
from tests.helpers.deferred import Reference


@pytest.mark.parametrize("shape", SHAPES)
def test_random_checkpoint(shape, tmp_path):
    folder = make_checkpoint(tmp_path, shape)
    model, reference = load_model(folder, "float32"), Reference(folder)
    prompts = default_prompts(model, 3)
    window = SHAPES[shape]["window"]
    assert min(map(len, prompts)) < window, "a prompt shorter than the window"
    assert max(map(len, prompts)) > window, "a prompt longer than the window"
    logits, _ = reference.denoise(
        reference.encode(prompts[0]).cache, np.arange(model.config.canvas_length)
    )
    assert np.abs(logits).max() > 20, "logits must reach the region where the soft cap bends"
    for stage in compare_forwards(model, reference, prompts):
        assert stage.ok, stage


def test_nano():
    model, reference = load_model(nano.FOLDER, "float32"), Reference(nano.FOLDER)
    for stage in compare_forwards(model, reference, default_prompts(model, 3)):
        assert stage.ok, stage


def test_next_token_logits(tmp_path):
    """The causal mode's head, which the reference itself never uses."""
    import mlx.core as mx

    from mlx_diffgemma.model.cache import Cache

    folder = make_checkpoint(tmp_path)
    model, reference = load_model(folder, "float32"), Reference(folder)
    ids = default_prompts(model, 1)[0]
    ours = model.encode([mx.array(ids)], [Cache(model.config.text)], logits="last").logits[0][0]
    np.testing.assert_allclose(
        np.array(ours), reference.next_token_logits(reference.encode(ids)), atol=1e-4
    )
