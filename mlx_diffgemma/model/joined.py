"""Joins linear maps of the same rows into one product.

Their matrices are laid into one array, and each module keeps its part of it as a view.  So key
paths, saving, adapters and per-path quantisation see unchanged modules, and nothing is in memory
twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

ARRAYS = ("weight", "scales", "biases")


@dataclass(frozen=True)
class JoinedLinear:
    """Several maps as one.

    Args:
        arrays: The arrays of all maps, one after the other.
        parts: The weights that the modules had after joining.
        packing: The group size, bits and mode of quantised maps.
    """

    arrays: dict[str, mx.array]
    parts: tuple[mx.array, ...]
    packing: tuple[int, int, str] | None

    def holds(self, modules: Sequence[nn.Module]) -> bool:
        """Whether the modules still have the weights that were joined."""
        return all(
            module.get("weight") is part for module, part in zip(modules, self.parts, strict=True)
        )

    def __call__(self, x: mx.array) -> mx.array:
        """Map [..., inputs] to [..., outputs of all]."""
        if self.packing is None:
            return x @ self.arrays["weight"].T
        group_size, bits, mode = self.packing
        return mx.quantized_matmul(
            x,
            self.arrays["weight"],
            self.arrays["scales"],
            self.arrays.get("biases"),
            transpose=True,
            group_size=group_size,
            bits=bits,
            mode=mode,
        )


def join(modules: Sequence[nn.Module]) -> JoinedLinear | None:
    """Join maps of one kind, precision and dtype.  Other maps are left unchanged, and None is
    returned.
    """
    if len({(type(module), _packing(module), module.weight.dtype) for module in modules}) > 1:
        return None
    if type(modules[0]) not in (nn.Linear, nn.QuantizedLinear) or any(
        "bias" in module for module in modules
    ):
        return None
    arrays = {}
    for name in ARRAYS:
        if name not in modules[0]:
            continue
        arrays[name] = mx.concatenate([module[name] for module in modules])
        start = 0
        for module in modules:
            stop = start + module[name].shape[0]
            module[name] = arrays[name][start:stop]
            start = stop
        # Evaluated here for two reasons: the model may be used on another thread, and until then
        # the separate matrices would be held as well.
        mx.eval(arrays[name], [module[name] for module in modules])
    return JoinedLinear(arrays, tuple(module.weight for module in modules), _packing(modules[0]))


def _packing(module: nn.Module) -> tuple[int, int, str] | None:
    if isinstance(module, nn.QuantizedLinear):
        return module.group_size, module.bits, module.mode
    return None
