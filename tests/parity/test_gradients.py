"""The training objective against the same objective over transformers' model: losses and every
gradient.
"""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from transformers import DynamicCache

from mlx_diffgemma.checkpoint.loading import load_model
from mlx_diffgemma.tuning.objective import Objective, losses, make_batch
from tests.checkpoints import make_checkpoint
from tests.helpers.deferred import Reference

LENGTH = 24


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A window of 200, since the reference cannot show a canvas in the middle of a longer sequence."""
    folder = make_checkpoint(tmp_path_factory.mktemp("wide"), "wide-window")
    model = load_model(folder, "float32")
    model.freeze(keys=["layer_scalar"])  # buffers in the reference
    return model, Reference(folder)


def batch_of(objective, seed=0):
    rng = np.random.default_rng(seed)
    sequences = [rng.integers(7, 180, n).astype(np.int32) for n in (40, 61, 33)]
    return make_batch(sequences, [10, 21, 30], LENGTH, 189, 1, objective, rng)


def reference_losses(reference, batch, objective):
    """(canvas, causal) with gradients to the reference's parameters."""
    model, cap = reference.model, reference.model.final_logit_softcapping

    def capped(hidden):
        return torch.tanh(model.lm_head(hidden).float() / cap) * cap

    def cache():
        return DynamicCache(config=reference.config.get_text_config(decoder=True))

    def denoise(prefix, corrupted, conditioning):
        encoded = cache()
        model.model.encoder(input_ids=prefix, past_key_values=encoded)
        return model(
            decoder_input_ids=corrupted,
            past_key_values=encoded,
            self_conditioning_logits=conditioning,
        ).logits

    canvas, causal = [], []
    for row, ids in enumerate(batch.sequences):
        ids, start = torch.tensor(ids, dtype=torch.long)[None], batch.starts[row]
        corrupted = torch.tensor(batch.corrupted[row], dtype=torch.long)[None]

        signal = None
        if batch.conditioned[row]:
            with torch.no_grad():
                signal = denoise(ids[:, :start], corrupted, None)
        logits = denoise(ids[:, :start], corrupted, signal)[0].float()
        canvas.append(
            torch.nn.functional.cross_entropy(
                logits, torch.tensor(batch.clean[row]).long(), reduction="none"
            )
        )
        hidden = model.model.encoder(input_ids=ids, past_key_values=cache()).last_hidden_state[0]
        first = batch.answers[row] - 1 if objective.mask_prompt else 0
        causal.append(
            torch.nn.functional.cross_entropy(
                capped(hidden[first:-1]), ids[0, first + 1 :], reduction="none"
            )
        )
    return torch.cat(canvas).mean(), torch.cat(causal).mean()


OBJECTIVES = [
    Objective(),
    Objective(self_conditioning=1.0, mask_prompt=True),
    Objective(causal=0.0, self_conditioning=0.0),
    Objective(canvas=0.0),
]


@pytest.mark.parametrize(
    "objective", OBJECTIVES, ids=["all", "conditioned, answers only", "canvas", "causal"]
)
def test_losses_and_gradients(both, objective):
    model, reference = both
    batch = batch_of(objective)
    if objective.self_conditioning == 0.5:
        assert 0 < sum(batch.conditioned) < len(batch.conditioned), "both kinds"

    def total(model):
        found = losses(model, batch, objective)
        return found.total(objective), found

    model.train()
    (ours, found), gradients = nn.value_and_grad(model, total)(model)
    reference.model.zero_grad()
    canvas, causal = reference_losses(reference, batch, objective)
    theirs = objective.canvas * canvas + objective.causal * causal
    theirs.backward()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    assert found.canvas.item() == pytest.approx(canvas.item(), rel=1e-5)
    named = dict(reference.model.named_parameters(remove_duplicate=False))
    compared, scale = (
        0,
        max(float(np.linalg.norm(p.grad)) for p in named.values() if p.grad is not None),
    )
    for name, mine in tree_flatten(gradients):
        key = name.removesuffix(".weight") if ".experts." in name else name
        other = named[key].grad
        other = torch.zeros(mine.shape) if other is None else other
        mine, other = np.array(mine), other.numpy()
        if "embed_tokens" in name:
            mine, other = (
                mine[1:],
                other[1:],
            )  # the reference's embedding blocks the gradient of the pad row
        assert np.linalg.norm(mine - other) <= 1e-3 * np.linalg.norm(other) + 1e-7 * scale, name
        compared += 1
    assert compared > 40


def test_checkpointing_changes_nothing(both):
    model, _ = both
    batch = batch_of(Objective())

    def gradients(checkpoint):
        def total(model):
            return losses(model, batch, Objective(), checkpoint).total(Objective())

        loss, found = nn.value_and_grad(model, total)(model)
        mx.eval(loss, found)
        return [loss, *(array for _, array in tree_flatten(found))]

    assert all(mx.array_equal(a, b) for a, b in zip(gradients(False), gradients(True)))
