"""Stand-ins for a checkpoint that is too large for this machine.

They are models of random weights, and logits of a stated certainty.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_diffgemma.device import compute_dtype
from mlx_diffgemma.model.config import ModelConfig
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.model.recipes import kind_of, recipe_named


def quantise_as(recipe: str) -> Callable[[str, nn.Module], bool | dict[str, Any]]:
    """The predicate of ``nn.quantize`` for a recipe."""
    rows = recipe_named(recipe)

    def predicate(path: str, module: nn.Module) -> bool | dict[str, Any]:
        precision = (
            rows.precision_of(kind_of(path), module.weight.shape[-1])
            if hasattr(module, "to_quantized")
            else None
        )
        return vars(precision) if precision else False

    return predicate


def random_model(config: ModelConfig, recipe: str | None) -> DiffusionGemma:
    """Random weights at the scale of trained ones; every matrix is quantised as soon as it is
    drawn.
    """
    model = DiffusionGemma(config)
    dtype = compute_dtype(mx.bfloat16)
    for name, value in tree_flatten(model.parameters()):
        scale = 1.0 if "embed_tokens" in name else value.shape[-1] ** -0.5
        drawn = (
            mx.random.normal(value.shape, dtype=dtype, scale=scale)
            if value.ndim > 1
            else mx.ones(value.shape, dtype=dtype)
        )
        mx.eval(drawn)
        model.update(tree_unflatten([(name, drawn)]))
    if recipe:
        nn.quantize(model, class_predicate=quantise_as(recipe))
        mx.eval(model.parameters())
    model.join()
    mx.eval(model.parameters())
    return model


def canvas_logits(config: ModelConfig, certain: float, seed: int = 0) -> mx.array:
    """[1, canvas, vocabulary]: a share ``certain`` of positions with one token far ahead, the
    others flat but for noise.
    """
    rng = np.random.default_rng(seed)
    length, vocabulary = config.canvas_length, config.text.vocab_size
    logits = mx.random.normal((1, length, vocabulary), key=mx.random.key(seed))
    ahead = np.zeros((1, length, 1), dtype=np.float32)
    ahead[0, : round(certain * length)] = 29.0
    winner = mx.array(rng.integers(0, vocabulary, (1, length, 1)))
    return mx.put_along_axis(
        logits, winner, mx.take_along_axis(logits, winner, axis=-1) + mx.array(ahead), axis=-1
    )


def median(run: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):  # the first warms up
        began = time.perf_counter()
        mx.eval(run())
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])
