"""Digests of a model: equal only where all weights, adapters and precisions are.

    >>> fingerprint(model) == fingerprint(load_model(folder))
"""

from __future__ import annotations

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_diffgemma.digests import digest
from mlx_diffgemma.model import DiffusionGemma
from mlx_diffgemma.recipes import VISION

Named = list[tuple[str, mx.array]]


def fingerprint(model: DiffusionGemma) -> str:
    """Digest of everything that decides the text backbone's results."""
    text, _ = weights(model)
    return digest(text, structure(model))


def weights(model: DiffusionGemma) -> tuple[Named, Named]:
    """(those of the text backbone, those of the vision tower), adapters included."""
    text: Named = []
    tower: Named = []
    for name, array in tree_flatten(model.parameters()):
        (tower if name.startswith(VISION) else text).append((name, array))
    return text, tower


def structure(model: DiffusionGemma) -> str:
    """What decides the result beside the weights: shapes, precisions, scales of adapters."""
    modules = []
    for path, module in model.named_modules():
        numbers = {
            name: value
            for name, value in vars(module).items()
            if isinstance(value, (bool, int, float, str)) and not name.startswith("_")
        }
        modules.append((path, type(module).__name__, sorted(numbers.items())))
    return repr((model.config.text, str(model.dtype), sorted(modules)))
