"""What a training step holds: the head goes in parts, layers are computed twice, and both change
nothing but memory.
"""

import copy
import gc
import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from synthetic import random_model

from mlx_diffgemma import device
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.model.config import FULL, SLIDING, ModelConfig, released_config
from mlx_diffgemma.tuning import head, memory
from mlx_diffgemma.tuning.adapters import AdapterOptions, prepare
from mlx_diffgemma.tuning.memory import check_training_memory, training_memory, ways
from mlx_diffgemma.tuning.objective import Objective, losses, make_batch
from mlx_diffgemma.tuning.trainer import TrainingOptions
from tests.helpers.in_process import run

OBJECTIVE = Objective(self_conditioning=1.0)
BATCH, SEQUENCE, CANVAS, HIDDEN = 4, 48, 24, 128


def model_of(layers=2, vocabulary=2048, trainable=True):
    raw = copy.deepcopy(dict(released_config().raw)) | {
        "canvas_length": CANVAS,
        "vision_config": None,
    }
    raw["text_config"] |= {
        "num_hidden_layers": layers,
        "layer_types": [SLIDING] * (layers - 1) + [FULL],
        "hidden_size": HIDDEN,
        "intermediate_size": 128,
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "top_k_experts": 2,
        "num_attention_heads": 2,
        "head_dim": 32,
        "global_head_dim": 32,
        "num_key_value_heads": 1,
        "num_global_key_value_heads": 1,
        "vocab_size": vocabulary,
        "sliding_window": 64,
    }
    model = random_model(ModelConfig.from_dict(raw), None)
    model.set_dtype(mx.float32)  # the bounds are of float32, also with --as-gpu
    if trainable:
        prepare(
            model,
            AdapterOptions(
                "lora", -1, {"rank": 2, "scale": 4.0, "dropout": 0.0}, train_experts=True
            ),
        )
        # lora_b begins at zero, where lora_a would have no gradient
        model.update(tree_map(lambda value: value + 0.05, model.trainable_parameters()))
    return model


def step(model, checkpoint=False):
    """(loss, gradients) of one batch, not evaluated."""
    rng, vocabulary = np.random.default_rng(0), model.config.text.vocab_size
    sequences = [rng.integers(7, vocabulary, SEQUENCE).astype(np.int32) for _ in range(BATCH)]
    batch = make_batch(
        sequences, [SEQUENCE - CANVAS] * BATCH, CANVAS, vocabulary, 1, OBJECTIVE, rng
    )
    model.train()
    return nn.value_and_grad(
        model, lambda m: losses(m, batch, OBJECTIVE, checkpoint).total(OBJECTIVE)
    )(model)


def peak(model, checkpoint=False):
    """Bytes above what the model holds."""
    mx.eval(model.parameters())
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(step(model, checkpoint))
    return mx.get_peak_memory() - before


@pytest.mark.parametrize("whole", [False, True], ids=["adapter", "embedding"])
def test_the_head_in_parts_changes_nothing(monkeypatch, whole):
    model = model_of()
    if whole:
        model.model.decoder.embed_tokens.unfreeze()
    monkeypatch.setattr(head, "LOGITS", 2**40)
    loss, gradients = step(model)
    monkeypatch.setattr(head, "LOGITS", 4 * 2048 * 7)  # seven rows
    parts, in_parts = step(model)
    assert parts.item() == pytest.approx(loss.item(), rel=1e-6)
    names = dict(tree_flatten(in_parts))
    assert ("model.decoder.embed_tokens.weight" in names) == whole
    for name, wanted in tree_flatten(gradients):
        assert mx.linalg.norm(names[name] - wanted) <= 1e-5 * mx.linalg.norm(wanted), name


def test_losses_without_training_are_the_same(monkeypatch):
    model = model_of()
    monkeypatch.setattr(head, "LOGITS", 4 * 2048 * 7)
    hidden, targets = mx.random.normal((30, HIDDEN)), mx.arange(30)
    model.train()
    trained = head.cross_entropy(model, hidden, targets)
    model.eval()
    assert head.cross_entropy(model, hidden, targets).item() == trained.item()


@pytest.mark.parametrize("rows", [7, 10_000])
def test_the_gradient_is_that_of_the_whole_head(monkeypatch, rows):
    model = model_of()
    model.model.decoder.embed_tokens.unfreeze()
    model.train()
    monkeypatch.setattr(head, "LOGITS", 4 * 2048 * rows)
    hidden, targets = mx.random.normal((30, HIDDEN)), mx.arange(30)

    def gradients(loss):
        value = mx.grad(lambda x: loss(x))(hidden)
        return value, nn.value_and_grad(model, lambda m: loss(hidden))(model)[1]["model"][
            "decoder"
        ]["embed_tokens"]["weight"]

    ours = gradients(lambda x: head.cross_entropy(model, x, targets))
    plain = gradients(lambda x: nn.losses.cross_entropy(model.logits(x), targets, reduction="mean"))
    for mine, wanted in zip(ours, plain, strict=True):
        assert mx.linalg.norm(mine - wanted) <= 1e-5 * mx.linalg.norm(wanted)


def test_the_value_is_that_of_the_whole_head(monkeypatch):
    model = model_of()
    monkeypatch.setattr(head, "LOGITS", 4 * 2048 * 7)
    hidden, targets = mx.random.normal((30, HIDDEN)), mx.arange(30)
    trained = head.cross_entropy(model, hidden, targets)
    assert trained.item() == pytest.approx(
        nn.losses.cross_entropy(model.logits(hidden), targets, reduction="mean").item()
    )


def test_logits_are_held_for_one_part_only(monkeypatch):
    model = model_of(vocabulary=16_384)
    rows = BATCH * (CANVAS + SEQUENCE - 1)
    monkeypatch.setattr(head, "LOGITS", 4 * 16_384 * 8)
    small = peak(model)
    assert small < 1.5 * rows * 16_384 * 4, "little more than the logits of all rows, once"
    monkeypatch.setattr(head, "LOGITS", 2**40)
    assert peak(model) > 4 * small


@pytest.mark.slow
def test_a_checkpointed_layer_holds_its_input_only():
    # Many layers, because MLX's order, and with it the peak, varies by an array or two from run to
    # run.
    two, many = (peak(model_of(layers), checkpoint=True) for layers in (2, 34))
    rows = BATCH * (CANVAS + SEQUENCE)
    gradients = sum(
        value.nbytes
        for name, value in tree_flatten(model_of().trainable_parameters())
        if "layers.0." in name
    )
    assert (many - two) / 32 < 1.5 * (rows * HIDDEN * 4 + gradients)
    assert peak(model_of(34)) > 4 * many


@pytest.mark.parametrize("checkpoint", [False, True])
def test_the_estimate_is_near_the_measured_peak(checkpoint):
    model = model_of(6)
    trainable = sum(value.nbytes for _, value in tree_flatten(model.trainable_parameters()))
    found = training_memory(
        model.config,
        0,
        trainable,
        4,
        SEQUENCE,
        TrainingOptions(batch_size=BATCH, grad_checkpoint=checkpoint),
    )
    assert found.kept + found.work + trainable == pytest.approx(peak(model, checkpoint), rel=0.3)


class TestMacs:
    def test_what_fits(self):
        found = {
            (str(way), way.recipe): (plain.mac, twice.mac)
            for way, plain, twice in ways(released_config(), 512, 1)
        }
        assert found["LoRA", "4bit"] == (48, 32)
        assert found["LoRA, experts too", "8bit"] == (96, 48)
        assert found["full", "bf16"] == (128, 96)
        assert found["full, experts too", "bf16"] == (512, 512)

    def test_what_costs_more(self):
        one, four = (ways(released_config(), 512, size)[0] for size in (1, 4))
        assert (four[1].kept, four[1].weights) == (
            pytest.approx(4 * one[1].kept, rel=1e-6),
            one[1].weights,
        )
        accumulated = [
            training_memory(
                released_config(), 0, 10, 2, 512, TrainingOptions(grad_accumulation_steps=n)
            ).updates
            for n in (1, 2)
        ]
        assert accumulated == [30, 40]

    def test_counting_takes_no_memory(self):
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        ways(released_config(), 512, 1)
        assert mx.get_peak_memory() - before < 1e6

    def test_the_command_names_the_mac_that_suffices(self, monkeypatch, capsys):
        code, out, _ = run(monkeypatch, capsys, "estimate", "--training", "--json")
        first = json.loads(out)[0]
        assert (code, first["recipe"], first["mac"], first["mac_with_grad_checkpoint"]) == (
            0,
            "4bit",
            48,
            32,
        )
        code, out, _ = run(monkeypatch, capsys, "estimate", "--training", "--batch-size", "4")
        assert (code, "LoRA" in out, "batch size 4" in out) == (0, True, True)
        code, _, err = run(monkeypatch, capsys, "estimate", "--training", "--context", "300000")
        assert (code, "between 1 and 262,144" in err) == (2, True)


def test_a_run_that_does_not_fit_is_refused_with_what_would(monkeypatch):
    model = model_of(6)
    plain, twice, alone = (
        training_total(model, options)
        for options in (
            TrainingOptions(batch_size=4),
            TrainingOptions(batch_size=4, grad_checkpoint=True),
            TrainingOptions(batch_size=1, grad_accumulation_steps=4, grad_checkpoint=True),
        )
    )
    for limit, advice in (
        (plain - 1, "; --grad-checkpoint takes"),
        (twice - 1, "--batch-size 1 --grad-accumulation-steps 4"),
        (alone - 1, "take a conversion with fewer bits"),
    ):
        monkeypatch.setattr(device, "memory_limit", lambda limit=limit: limit)
        monkeypatch.setattr(memory, "memory_limit", lambda limit=limit: limit)
        with pytest.raises(UserError, match=advice):
            check_training_memory(model, SEQUENCE, TrainingOptions(batch_size=4))
    monkeypatch.setattr(device, "memory_limit", lambda: plain)
    check_training_memory(model, SEQUENCE, TrainingOptions(batch_size=4))


def training_total(model, options):
    weights, trainable = (
        sum(value.nbytes for _, value in tree_flatten(tree))
        for tree in (model.parameters(), model.trainable_parameters())
    )
    return training_memory(
        model.config, weights, trainable, model.dtype.size, SEQUENCE, options
    ).total
