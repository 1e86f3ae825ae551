"""Three hundred steps of fine-tuning nano beside torch, in which it was trained: the same loss at
every step.
"""

import mlx.optimizers as optimizers
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from safetensors.torch import load_file
from train_nano import PAD, Network, losses_on

from mlx_diffgemma import chat_ids, load, nano
from mlx_diffgemma.evaluation.nano_tasks import TASKS, held_out_examples
from mlx_diffgemma.text.tokenizer import answer_ids
from mlx_diffgemma.tuning.adapters import AdapterOptions, prepare
from mlx_diffgemma.tuning.data import Example
from mlx_diffgemma.tuning.objective import Objective
from mlx_diffgemma.tuning.trainer import Trainer, TrainingOptions

STEPS, RATE, LENGTH = 300, 1e-4, 8


def examples(tokenizer):
    """Of tasks nano knows; the answers of one are those of another, so that there is something to
    learn.
    """
    found = []
    for example in held_out_examples(TASKS["reverse"], 40):
        turns = [
            {"role": "user", "content": example.prompt},
            {"role": "assistant", "content": example.answer[::-1]},
        ]
        prompt = chat_ids(tokenizer, turns[:1])
        found.append(
            Example(np.array(prompt + answer_ids(tokenizer, turns), dtype=np.int32), len(prompt))
        )
    return found


def in_torch(batch):
    """The trainer's batch as nano's training takes it."""
    longest = max(ids.size for ids in batch.sequences)
    ids = torch.full((len(batch.sequences), longest), PAD)
    for row, own in enumerate(batch.sequences):
        ids[row, : own.size] = torch.tensor(own)
    return {
        "ids": ids,
        "clean": torch.tensor(batch.clean).long(),
        "starts": torch.tensor(batch.starts),
        "lengths": torch.tensor([own.size for own in batch.sequences]),
        "answers": torch.tensor(batch.answers),
    }


@pytest.mark.slow
def test_the_loss_curve_is_torchs():
    model, tokenizer = load(nano.NAME, dtype="float32")
    prepare(model, AdapterOptions("full", -1, train_experts=True, train_router=True))
    trainer = Trainer(
        model,
        examples(tokenizer),
        (),
        Objective(mask_prompt=True),
        TrainingOptions(
            iters=STEPS, batch_size=2, canvas_length=LENGTH, max_grad_norm=0, steps_per_report=1
        ),
        optimizers.AdamW(
            learning_rate=RATE, betas=[0.9, 0.98], eps=1e-6, weight_decay=0.01, bias_correction=True
        ),
    )
    trained = {
        name.removesuffix(".weight") if ".experts." in name else name
        for name, _ in tree_flatten(model.trainable_parameters())
    }
    weights = {
        name: value.float().requires_grad_(name in trained)
        for name, value in load_file(nano.FOLDER / "model.safetensors").items()
    }
    network = Network(weights)
    own = [value for value in weights.values() if value.requires_grad]
    assert len(own) == len(trained)
    optimizer = torch.optim.AdamW(own, lr=RATE, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01)
    theirs = []
    for step in range(STEPS):
        batch = trainer.batch(step)
        parts = losses_on(
            network,
            in_torch(batch),
            torch.tensor(batch.corrupted).long(),
            torch.tensor(batch.conditioned),
        )
        optimizer.zero_grad()
        (parts["denoise"] + parts["causal"]).backward()
        optimizer.step()
        theirs.append((parts["denoise"].item(), parts["causal"].item()))
    trainer.run()
    ours = np.array([(report.canvas, report.causal) for report in trainer.reports])
    gap = np.abs(ours - np.array(theirs))
    print(
        f"\nlargest gap {gap.max():.1e}, losses {ours[:20].mean():.3f} to {ours[-20:].mean():.3f}"
    )
    assert ours.shape == (STEPS, 2)
    assert ours[-20:].mean() < 0.7 * ours[:20].mean(), "something is learnt"
    assert gap.max() < 1e-3
