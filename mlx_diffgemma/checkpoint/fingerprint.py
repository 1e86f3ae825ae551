"""Digests of a model: equal only where all weights, adapters and precisions are equal.

>>> fingerprint(model) == fingerprint(load_model(folder))
"""

from __future__ import annotations

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_diffgemma.digests import digest
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.model.recipes import VISION

Named = list[tuple[str, mx.array]]


def fingerprint(model: DiffusionGemma) -> str:
    """Digest of everything that decides the text backbone's results."""
    text, _ = weights(model)
    return digest(text, structure(model))


def weights(model: DiffusionGemma) -> tuple[Named, Named]:
    """The weights, with those of adapters.

    Returns:
        (those of the text backbone, those of the vision tower)
    """
    text: Named = []
    tower: Named = []
    for name, array in tree_flatten(model.parameters()):
        (tower if name.startswith(VISION) else text).append((name, array))
    return text, tower


def structure(model: DiffusionGemma) -> str:
    """Describe what decides the result besides the weights: shapes, precisions and adapter scales."""
    modules = []
    for path, module in model.named_modules():
        numbers = {}
        for name, value in vars(module).items():
            if isinstance(value, (bool, int, float, str)) and not name.startswith("_"):
                numbers[name] = value
        modules.append((path, type(module).__name__, sorted(numbers.items())))
    return repr((model.config.text, str(model.dtype), sorted(modules)))
