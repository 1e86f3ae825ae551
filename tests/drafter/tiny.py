"""A model whose answers can be enumerated."""

import tempfile
from pathlib import Path

import tests.checkpoints as checkpoints
from mlx_diffgemma.checkpoint.loading import load_model


def tiny_vocabulary_model(vocabulary=7):
    """Two layers over a few tokens, whose distributions are neither flat nor certain."""
    shape = dict(
        hidden=32,
        heads=2,
        kv=1,
        head_dim=16,
        global_kv=1,
        global_head_dim=16,
        layers=2,
        window=8,
        canvas=8,
        experts=4,
        top_k=1,
        vocab=vocabulary,
        kinds=[checkpoints.SLIDING, checkpoints.FULL],
    )
    with tempfile.TemporaryDirectory() as folder:
        model = load_model(checkpoints.write_checkpoint(Path(folder), shape, calm=False), "float32")
    norm = model.model.decoder.norm
    norm.weight = norm.weight * 0.1
    return model
