"""bfloat16: ours against the reference in float32, no worse than the reference's own bfloat16."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma import nano
from mlx_diffgemma.checkpoint.loading import load_model
from mlx_diffgemma.diagnostics.parity import default_prompts
from mlx_diffgemma.model.cache import Cache
from mlx_diffgemma.sampling import self_conditioning
from tests.checkpoints import make_checkpoint
from tests.helpers.deferred import Reference


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64) - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def distance(reference: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """(mean KL in nats, share of positions with another argmax)."""
    p, q = log_softmax(reference), log_softmax(other)
    return float((np.exp(p) * (p - q)).sum(-1).mean()), float(
        (reference.argmax(-1) != other.argmax(-1)).mean()
    )


@pytest.mark.parametrize("which", ["random", pytest.param("nano", marks=pytest.mark.slow)])
def test_not_worse_than_the_reference(which, tmp_path, capsys):
    folder = nano.FOLDER if which == "nano" else make_checkpoint(tmp_path, calm=False)
    model = load_model(folder, "bfloat16")
    assert model.dtype == mx.bfloat16
    exact, rounded = Reference(folder), Reference(folder, dtype="bfloat16")
    rng, ours, theirs, truth = np.random.default_rng(0), [], [], []
    for ids in default_prompts(model, 12):
        canvas = rng.integers(0, model.config.text.vocab_size, model.config.canvas_length).astype(
            np.int32
        )
        cache = Cache(model.config.text)
        model.encode([mx.array(ids)], [cache])
        true_cache, rounded_cache = exact.encode(ids).cache, rounded.encode(ids).cache
        scaled = None
        for _ in range(2):  # without self-conditioning, then with it
            truth.append(exact.denoise(true_cache, canvas, scaled)[0])
            theirs.append(rounded.denoise(rounded_cache, canvas, scaled)[0])
            soft = (
                None if scaled is None else self_conditioning.dense(model, mx.array(scaled)[None])
            )
            ours.append(np.array(model.denoise(mx.array(canvas)[None], [cache], soft).logits[0]))
            scaled = truth[-1] / np.float32(0.6)
    (our_kl, our_flips), (their_kl, their_flips) = (
        distance(np.stack(truth), np.stack(x)) for x in (ours, theirs)
    )
    with capsys.disabled():
        print(
            f"\nbf16 {which}: KL {our_kl:.2e} (reference's own {their_kl:.2e}), "
            f"other argmax {our_flips:.2%} ({their_flips:.2%})"
        )
    assert 0 < our_kl <= 1.2 * their_kl
    assert our_flips <= 1.2 * their_flips + 1e-9
