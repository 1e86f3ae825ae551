"""Small adapters of a random model."""

import mlx.core as mx
import mlx.optimizers as optimizers
import numpy as np
from mlx.utils import tree_flatten

from mlx_diffgemma.safetensors import write_tensors
from mlx_diffgemma.tuning.adapters import (
    WEIGHTS,
    model_fingerprint,
    prepare,
    write_config,
)
from mlx_diffgemma.tuning.data import Example
from mlx_diffgemma.tuning.objective import Objective
from mlx_diffgemma.tuning.trainer import Trainer, TrainingOptions

RNG = np.random.default_rng(0)
EXAMPLES = [
    Example(RNG.integers(7, 300, n).astype(np.int32), n // 2) for n in (30, 41, 25, 50, 33, 28)
]


LORA = {"rank": 4, "dropout": 0.0, "scale": 8.0}


def trained(model, options, iters=3, rate=1e-2):
    model.base = model_fingerprint(model)
    prepare(model, options)
    Trainer(
        model,
        EXAMPLES,
        (),
        Objective(),
        TrainingOptions(iters=iters, batch_size=2, canvas_length=16),
        optimizers.Adam(learning_rate=rate),
    ).run()
    return model


def save(model, options, folder):
    folder.mkdir()
    write_config(folder, model.base, len(model.layers), options)
    write_tensors(folder / WEIGHTS, dict(tree_flatten(model.trainable_parameters())))


def outputs(model):
    sequence, canvas = model.training_forward(
        [mx.array(EXAMPLES[0].ids)],
        mx.array(EXAMPLES[1].ids[None, :16]),
        [20],
        mx.ones((1, 16, 128)),
    )
    return model.logits(mx.concatenate([sequence, canvas[0]]))
