"""The parts of the backbone: the gated MLP, one layer, and the self-conditioning.

Attribute names are the checkpoint's key paths.

    >>> Layer(config, config.layers[0])(x, table, segments, 0, scalar)      # [rows, hidden]
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_diffgemma.model.attention import Attention, Segment
from mlx_diffgemma.model.config import LayerConfig, TextConfig
from mlx_diffgemma.model.experts import Experts, Router
from mlx_diffgemma.model.joined import JoinedLinear, join
from mlx_diffgemma.model.layers import (
    RMSNorm,
    add_and_scale,
    add_both,
    add_scaled,
    gated_gelu,
    rms_norm,
    three_scaled,
)


class MLP(nn.Module):
    """Gated MLP with the tanh form of GELU; the dense path of a layer."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self._joined: JoinedLinear | None = None

    @property
    def _projections(self) -> list[nn.Module]:
        return [self.gate_proj, self.up_proj]

    def join(self) -> None:
        """Lay the projection matrices into one array, as in :class:`Attention`."""
        self._joined = join(self._projections)

    def __call__(self, x: mx.array) -> mx.array:
        if self._joined is not None and not self._joined.holds(self._projections):
            self._joined = None
        if self._joined:
            gate, up = mx.split(self._joined(x), 2, axis=-1)
        else:
            gate = self.gate_proj(x)
            up = self.up_proj(x)
        return self.down_proj(gated_gelu(gate, up))


class Layer(nn.Module):
    """Attention, then dense MLP and experts side by side, each between two norms.

    ``layer_scalar`` belongs to the canvas mode; the causal mode has its own in ``model.encoder``.
    Source: DiffusionGemma*TextLayer.
    """

    def __init__(self, config: TextConfig, layer: LayerConfig):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.router = Router(config)
        self.experts = Experts(config)
        self.layer_scalar = mx.ones((1,))
        self.eps = config.rms_norm_eps
        for name in (
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
            "post_feedforward_layernorm_1",
            "post_feedforward_layernorm_2",
            "pre_feedforward_layernorm_2",
        ):
            self[name] = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def __call__(
        self,
        x: mx.array,
        table: tuple[mx.array, mx.array],
        segments: Sequence[Segment],
        index: int,
        scalar: mx.array,
    ) -> mx.array:
        """Run the layer.

        Args:
            x: The residual stream [rows, hidden].
            table: The rotary table of this layer's shape.
            segments: The segments that the rows fall into, in order.
            index: The number of this layer in the caches.
            scalar: The layer scalar, one for all rows or [rows, 1].

        Returns:
            [rows, hidden]
        """
        h = self.self_attn(self.input_layernorm(x), table, segments, index)
        # The norms here have no weights: those are applied in one pass with what follows.
        x, wide = add_scaled(x, rms_norm(h, None, self.eps), self.post_attention_layernorm.weight)
        dense, routed, router_input = three_scaled(
            rms_norm(wide, None, self.eps),
            self.pre_feedforward_layernorm.weight,
            self.pre_feedforward_layernorm_2.weight,
            self.router.scale,
            self.router.factor,
        )
        dense = rms_norm(self.mlp(dense), None, self.eps)
        weights, scales, chosen = self.router.choose(router_input)
        routed = rms_norm(self.experts(routed, weights, scales, chosen), None, self.eps)
        both = add_both(
            dense,
            self.post_feedforward_layernorm_1.weight,
            routed,
            self.post_feedforward_layernorm_2.weight,
        )
        return add_and_scale(
            x, rms_norm(both, None, self.eps), self.post_feedforward_layernorm.weight, scalar
        )


class SelfConditioning(MLP):
    """Adds the self-conditioning signal, made from the last step's prediction, to the canvas.

    It inherits from :class:`MLP` because the checkpoint keeps its projections at this path.
    Source: DiffusionGemmaSelfConditioning.
    """

    def __init__(self, config: TextConfig):
        super().__init__(config)
        self.pre_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eps = config.rms_norm_eps

    def __call__(self, x: mx.array, soft_embedding: mx.array | None) -> mx.array:  # type: ignore[override]
        if soft_embedding is not None:
            x = x + super().__call__(self.pre_norm(soft_embedding.astype(x.dtype)))
        # Without a signal the MLP would give exactly zero; the norm runs at the first step too.
        return rms_norm(x, None, self.eps)
