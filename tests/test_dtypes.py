"""A bfloat16 model computes in bfloat16, and rounds where the reference rounds.

More exact than asked for is wrong too: a float32 factor somewhere makes everything behind it
float32, which costs twice the memory and time, and no comparison with the reference notices.
"""

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma.checkpoint.loading import load_model
from mlx_diffgemma.model.cache import Cache
from mlx_diffgemma.model.config import VisionConfig
from mlx_diffgemma.model.vision import VisionTower
from mlx_diffgemma.sampling import self_conditioning
from tests.checkpoints import VISIONS


@pytest.fixture(scope="module")
def half(tiny_folder):
    return load_model(tiny_folder, "bfloat16")


def test_hidden_states_caches_and_logits(half):
    assert half.embed(mx.array([1, 2])).dtype == mx.bfloat16
    cache = Cache(half.config.text)
    taps = range(len(half.layers))
    output = half.encode([mx.array([3, 4, 5])], [cache], logits="last", taps=taps)
    assert {states[0].dtype for states in output.taps.values()} == {mx.bfloat16}
    assert {array.dtype for array in cache.arrays} == {mx.bfloat16}
    assert output.logits[0].dtype == mx.float32
    soft = self_conditioning.dense(half, mx.zeros((1, 24, half.config.text.vocab_size)))
    assert soft.dtype == mx.bfloat16
    denoised = half.denoise(mx.zeros((1, 24), dtype=mx.int32), [cache], soft, taps=taps)
    assert {states.dtype for rows in denoised.taps.values() for states in rows} == {mx.bfloat16}
    assert denoised.logits.dtype == mx.float32


def test_the_embedding_scale_is_rounded(half):
    size = half.config.text.hidden_size
    expected = half.model.decoder.embed_tokens(mx.array([7])) * mx.array(size**0.5).astype(
        mx.bfloat16
    )
    assert mx.array_equal(half.embed(mx.array([7])), expected)


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_scaled_logits_are_rounded_before_the_softmax(half, kind):
    """Two logits that bfloat16 cannot tell apart have the same probability."""
    vocabulary = half.config.text.vocab_size
    near = np.full((1, vocabulary), -30.0, dtype=np.float32)
    near[0, 3], near[0, 5] = 20.0, 20.06  # bfloat16 has steps of 0.125 there
    same = near.copy()
    same[0, 5] = 20.0
    if kind == "dense":
        ours, expected = (
            self_conditioning.dense(half, mx.array(logits)) for logits in (near, same)
        )
        exact = half.soft_embed(mx.softmax(mx.array(near), axis=-1))
    else:
        kept = mx.array([[3, 5]])
        ours, expected = (
            self_conditioning.sparse(half, mx.array(logits[:, [3, 5]]), kept)
            for logits in (near, same)
        )
        exact = half.soft_embed(mx.softmax(mx.array(near[:, [3, 5]]), axis=-1), kept)
    assert mx.array_equal(ours, expected)
    assert not mx.array_equal(ours, exact), "the rounding would not show"


def test_pooled_patches_are_rounded_before_they_are_scaled():
    config = VisionConfig.from_dict(VISIONS["plain"])
    side, size = config.pooling_kernel_size, config.hidden_size
    rng = np.random.default_rng(0)
    tower = VisionTower(config)
    tower.std_bias = mx.array(rng.normal(size=size)).astype(mx.bfloat16)
    patches = mx.array(rng.normal(3, 1, (side * side, size))).astype(mx.bfloat16)
    mean = patches.astype(mx.float32).reshape(side * side, size).mean(axis=0)

    def finished(pooled):
        return (
            (pooled * size**0.5 - tower.std_bias.astype(mx.float32))
            * tower.std_scale.astype(mx.float32)
        ).astype(mx.bfloat16)

    rounded = finished(mean.astype(mx.bfloat16).astype(mx.float32))
    found = tower.pool(patches, (side, side))
    assert mx.array_equal(found[0], rounded)
    assert not mx.array_equal(found[0], finished(mean)), "the rounding would not show"
