"""The experts of the backbone: the router that chooses a few for each row, and their matrices.

Source: DiffusionGemmaTextRouter and DiffusionGemmaTextExperts.

    >>> weights, scales, chosen = router(x)
    >>> experts(x, weights, scales, chosen)      # [rows, hidden], float32
"""

from __future__ import annotations

import math
from functools import lru_cache

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_diffgemma.model.config import TextConfig
from mlx_diffgemma.model.layers import both_signs, gated_gelu, rms_norm, weigh

# From this many (row, expert) pairs on, rows are sorted by expert: MLX then reads each expert once.
SORT_FROM = 64


@lru_cache(maxsize=64)
def row_numbers(shape: tuple[int, ...]) -> mx.array:
    """The row-major index of every place in an array of ``shape``."""
    return mx.array(np.arange(math.prod(shape), dtype=np.uint32).reshape(shape))


class Router(nn.Module):
    """Chooses experts from the residual stream itself, not from the normed rows.

    Source: DiffusionGemmaTextRouter.
    """

    def __init__(self, config: TextConfig):
        super().__init__()
        self.proj = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.scale = mx.ones((config.hidden_size,))
        self.per_expert_scale = mx.ones((config.num_experts,))
        self.top_k = config.top_k_experts
        self.eps = config.rms_norm_eps

    @property
    def factor(self) -> float:
        """The factor on the normed rows, next to ``scale``: 1 / sqrt(hidden size)."""
        return float(self.scale.shape[0] ** -0.5)

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Choose the experts of rows ``x`` [rows, hidden].

        Returns:
            (weights float32, scales, experts), each [rows, top_k].  An expert's output counts by
            the product of its weight and its scale.
        """
        normed = rms_norm(x.astype(mx.float32), None, self.eps)
        h = normed * self.scale.astype(mx.float32) * self.factor
        return self.choose(h.astype(x.dtype))

    def choose(self, h: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Choose the experts of rows that are already normed and scaled."""
        logits, negative = both_signs(self.proj(h))
        # MLX would differentiate through a sort; the choice itself has no gradient.
        chosen = mx.stop_gradient(
            mx.argpartition(negative, self.top_k - 1, axis=-1)[:, : self.top_k]
        )
        # The softmax over the chosen experts is the softmax over all, normalised to a sum of one.
        return (
            mx.softmax(mx.take_along_axis(logits, chosen, axis=-1), axis=-1),
            self.per_expert_scale[chosen],
            chosen,
        )


class ExpertLinear(nn.Module):
    """One matrix for each expert, [experts, outputs, inputs]."""

    def __init__(self, experts: int, inputs: int, outputs: int):
        super().__init__()
        self.weight = mx.zeros((experts, outputs, inputs))

    def __call__(self, x: mx.array, experts: mx.array, sorted_indices: bool) -> mx.array:
        """Multiply each row by the matrices of its experts.

        Args:
            x: Rows [n, 1, inputs] of one expert each, or [n, 1, 1, inputs] of k experts each.
            experts: The numbers of their experts, [n] or [n, k].
            sorted_indices: Whether ``experts`` ascend.

        Returns:
            [n, 1, outputs] or [n, k, 1, outputs]
        """
        weight = self.weight
        if mx.default_device() == mx.cpu and weight.dtype != mx.float32:
            # MLX's CPU backend has the grouped product in float32 only.
            y = mx.gather_mm(
                x.astype(mx.float32),
                weight.astype(mx.float32).swapaxes(-1, -2),
                rhs_indices=experts,
                sorted_indices=sorted_indices,
            )
            return y.astype(x.dtype)
        return mx.gather_mm(
            x, weight.swapaxes(-1, -2), rhs_indices=experts, sorted_indices=sorted_indices
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(experts, outputs, inputs)"""
        experts, outputs, inputs = self.weight.shape
        return experts, outputs, inputs

    def to_quantized(self, group_size: int, bits: int, mode: str) -> QuantizedExpertLinear:
        """The quantised twin.  ``nn.quantize`` calls this method of a layer."""
        return QuantizedExpertLinear(self.weight, group_size, bits, mode)


class QuantizedExpertLinear(nn.Module):
    """:class:`ExpertLinear` with quantised matrices, packed along the inputs."""

    def __init__(self, weight: mx.array, group_size: int, bits: int, mode: str):
        super().__init__()
        self.group_size = group_size
        self.bits = bits
        self.mode = mode
        self.weight, self.scales, *biases = mx.quantize(weight, group_size, bits, mode=mode)
        if biases:  # only the affine mode has biases
            self.biases = biases[0]
        self.freeze()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(experts, outputs, inputs)"""
        experts, outputs, packed = self.weight.shape
        return experts, outputs, packed * 32 // self.bits

    def __call__(self, x: mx.array, experts: mx.array, sorted_indices: bool) -> mx.array:
        """Multiply each row by the matrices of its experts, as in :class:`ExpertLinear`."""
        # MLX uses its kernel for sorted rows only if it may number the rows itself.
        rows = None if sorted_indices else row_numbers(x.shape[:-2])
        return mx.gather_qmm(
            x,
            self.weight,
            self.scales,
            self.get("biases"),
            lhs_indices=rows,
            rhs_indices=experts,
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
            sorted_indices=sorted_indices,
        )


class Experts(nn.Module):
    """Gated MLPs; each row uses the few that the router chose.

    Source: DiffusionGemmaTextExperts.
    """

    def __init__(self, config: TextConfig):
        super().__init__()
        self.gate_up_proj = ExpertLinear(
            config.num_experts, config.hidden_size, 2 * config.moe_intermediate_size
        )
        self.down_proj = ExpertLinear(
            config.num_experts, config.moe_intermediate_size, config.hidden_size
        )

    def __call__(
        self, x: mx.array, weights: mx.array, scales: mx.array, chosen: mx.array
    ) -> mx.array:
        """The weighted sum of each row's experts.

        Args:
            x: Normed rows [rows, hidden].
            weights: The weight of each chosen expert, from the router, [rows, top_k].
            scales: The scale of each chosen expert, [rows, top_k].
            chosen: The numbers of the chosen experts, [rows, top_k].

        Returns:
            [rows, hidden] in float32
        """
        top_k = chosen.shape[-1]
        flat = chosen.flatten()
        is_sorted = flat.size >= SORT_FROM
        # The axis is added before rows are picked: MLX's CPU product takes twice as long on rows
        # that get it afterwards.
        if is_sorted:
            order = mx.argsort(flat)
            chosen = flat[order]
            x = x[:, None][order // top_k]
        else:
            x = x[:, None, None]  # each row meets its experts without a copy
        gate, up = mx.split(self.gate_up_proj(x, chosen, is_sorted), 2, axis=-1)
        y = self.down_proj(gated_gelu(gate, up), chosen, is_sorted)
        if is_sorted:
            y = y[mx.argsort(order)]
        y = weigh(y.reshape(*weights.shape, -1), weights[..., None], scales[..., None])
        return y.sum(axis=1)
