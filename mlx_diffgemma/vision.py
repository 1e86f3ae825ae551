"""The vision tower of Gemma 4: from the patches of an image to embeddings that stand in the prompt.

Patches of one image go through in one piece and without padding, so no mask is needed and an image gets the same numbers
whatever comes beside it.  The module tree carries the checkpoint's key paths (``model.encoder.vision_tower...``).

    >>> tower(patches, (24, 24))       # [576, 768] to [64, hidden]
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_diffgemma.config import VisionConfig
from mlx_diffgemma.layers import RMSNorm, apply_rope, attend_in_turn, gated_gelu, rms_norm, rope_frequencies, rows_at_once

FUSED = (64, 80, 128)  # head sizes for which MLX's Metal backend holds no scores at all
Grid = tuple[int, int]  # rows and columns of patches


def patch_positions(grid: Grid) -> np.ndarray:
    """[rows * columns, 2] int32: the place of each patch as (x, y), row by row."""
    y, x = np.indices(grid, dtype=np.int32)
    return np.stack((x.ravel(), y.ravel()), axis=-1)


def axial_table(positions: mx.array, head_dim: int, theta: float) -> tuple[mx.array, mx.array]:
    """(cos, sin) of shape [patches, 2, 1, head_dim / 4], float32: the first half of a head turns with x, the second with y.

    Source: Gemma4VisionRotaryEmbedding.
    """
    angles = positions.astype(mx.float32)[:, :, None, None] * rope_frequencies(theta, head_dim // 2)
    return mx.cos(angles), mx.sin(angles)


def apply_axial_rope(x: mx.array, table: tuple[mx.array, mx.array]) -> mx.array:
    """Rotate [patches, heads, head_dim], each half of a head by its own coordinate.  Source: apply_multidimensional_rope."""
    halves = mx.split(x, 2, axis=-1)
    return mx.concatenate([apply_rope(half, (table[0][:, axis], table[1][:, axis])) for axis, half in enumerate(halves)], axis=-1)


class ClippedLinear(nn.Module):
    """A linear map whose input and output are kept within stored bounds, where the checkpoint has any; source:
    Gemma4ClippableLinear."""

    def __init__(self, config: VisionConfig, inputs: int, outputs: int):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=False)
        if config.clipped:
            for name in ("input_min", "output_min"):
                self[name] = mx.array(-mx.inf)
            for name in ("input_max", "output_max"):
                self[name] = mx.array(mx.inf)

    def __call__(self, x: mx.array) -> mx.array:
        """[patches, inputs] to [patches, outputs]."""
        if "input_min" not in self:
            return self.linear(x)
        return mx.clip(self.linear(mx.clip(x, self.input_min, self.input_max)), self.output_min, self.output_max)


class VisionAttention(nn.Module):
    """Attention at scale 1 in which every patch sees every other; source: Gemma4VisionAttention."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.eps = config.rms_norm_eps
        self.q_proj = ClippedLinear(config, config.hidden_size, self.heads * self.head_dim)
        self.k_proj = ClippedLinear(config, config.hidden_size, self.kv_heads * self.head_dim)
        self.v_proj = ClippedLinear(config, config.hidden_size, self.kv_heads * self.head_dim)
        self.o_proj = ClippedLinear(config, self.heads * self.head_dim, config.hidden_size)
        self.q_norm = RMSNorm(self.head_dim, self.eps)
        self.k_norm = RMSNorm(self.head_dim, self.eps)

    def __call__(self, x: mx.array, table: tuple[mx.array, mx.array]) -> mx.array:
        """[patches, hidden] to the same shape; ``table`` is that of ``axial_table``."""
        patches = x.shape[0]
        queries, keys, values = (projection(x).reshape(patches, heads, self.head_dim) for projection, heads in
                                 ((self.q_proj, self.heads), (self.k_proj, self.kv_heads), (self.v_proj, self.kv_heads)))
        queries, keys = apply_axial_rope(self.q_norm(queries), table), apply_axial_rope(self.k_norm(keys), table)
        values = rms_norm(values, None, self.eps)
        # Zeros at the end of a head change no score; the released head size of 72 has no fused kernel.
        fill = next((size for size in FUSED if FUSED[0] < self.head_dim <= size), self.head_dim) - self.head_dim
        queries, keys, values = (mx.pad(t.transpose(1, 0, 2)[None].astype(mx.float32), [(0, 0)] * 3 + [(0, fill)])
                                 for t in (queries, keys, values))
        rows = rows_at_once(self.heads, patches)
        out = attend_in_turn((queries[:, :, start : start + rows], keys, values, None) for start in range(0, patches, rows))
        out = out[0, :, :, : self.head_dim]
        return self.o_proj(out.transpose(1, 0, 2).reshape(patches, -1).astype(x.dtype))


class VisionMLP(nn.Module):
    """Two maps up, one of them the gate, and one down; source: Gemma4VisionMLP."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.gate_proj = ClippedLinear(config, config.hidden_size, config.intermediate_size)
        self.up_proj = ClippedLinear(config, config.hidden_size, config.intermediate_size)
        self.down_proj = ClippedLinear(config, config.intermediate_size, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        """[patches, hidden] to the same shape."""
        return self.down_proj(gated_gelu(self.gate_proj(x), self.up_proj(x)))


class VisionLayer(nn.Module):
    """Attention and MLP, each between two norms; source: Gemma4VisionEncoderLayer."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.self_attn = VisionAttention(config)
        self.mlp = VisionMLP(config)
        for name in ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"):
            self[name] = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def __call__(self, x: mx.array, table: tuple[mx.array, mx.array]) -> mx.array:
        """[patches, hidden] to the same shape; ``table`` is that of ``axial_table``."""
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), table))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class PatchEmbedder(nn.Module):
    """Patches to vectors, with a learned embedding for each coordinate; source: Gemma4VisionPatchEmbedder."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.input_proj = nn.Linear(3 * config.patch_size**2, config.hidden_size, bias=False)
        self.position_embedding_table = mx.zeros((2, config.position_embedding_size, config.hidden_size))

    def __call__(self, patches: mx.array, positions: mx.array) -> mx.array:
        """[patches, 3 * patch size²] from 0 to 1 and [patches, 2] (x, y), to [patches, hidden]."""
        table = self.position_embedding_table
        x = self.input_proj((2 * (patches - 0.5)).astype(table.dtype))
        return x + (table[0][positions[:, 0]] + table[1][positions[:, 1]])


class VisionEncoder(nn.Module):
    """The layers under the checkpoint's key path; the tower runs them.  Source: Gemma4VisionEncoder."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layers = [VisionLayer(config) for _ in range(config.num_hidden_layers)]


class VisionTower(nn.Module):
    """Patches to soft tokens; source: Gemma4VisionModel."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.patch_embedder = PatchEmbedder(config)
        self.encoder = VisionEncoder(config)
        if config.standardize:
            self.std_bias = mx.zeros((config.hidden_size,))
            self.std_scale = mx.ones((config.hidden_size,))

    def __call__(self, patches: mx.array, grid: Grid) -> mx.array:
        """``patches`` [rows * columns, 3 * patch size²] with values from 0 to 1, row by row, to [soft tokens, hidden]."""
        positions = mx.array(patch_positions(grid))
        x = self.patch_embedder(patches, positions)
        table = axial_table(positions, self.config.head_dim, self.config.rope_theta)
        for layer in self.encoder.layers:
            x = layer(x, table)
        return self.pool(x, grid)

    def pool(self, x: mx.array, grid: Grid) -> mx.array:
        """[patches, hidden] to [soft tokens, hidden]: the mean of each square of patches, scaled and standardised in float32.

        Source: Gemma4VisionPooler, and the end of Gemma4VisionModel.
        """
        side, size = self.config.pooling_kernel_size, self.config.hidden_size
        squares = x.astype(mx.float32).reshape(grid[0] // side, side, grid[1] // side, side, size)
        pooled = squares.mean(axis=(1, 3)).astype(x.dtype).astype(mx.float32).reshape(-1, size) * size**0.5
        if self.config.standardize:
            pooled = (pooled - self.std_bias.astype(mx.float32)) * self.std_scale.astype(mx.float32)
        return pooled.astype(x.dtype)


class VisionEmbedder(nn.Module):
    """Soft tokens to embeddings of the backbone; source: DiffusionGemmaMultimodalEmbedder."""

    def __init__(self, config: VisionConfig, hidden_size: int):
        super().__init__()
        self.embedding_projection = nn.Linear(config.hidden_size, hidden_size, bias=False)
        self.eps = config.rms_norm_eps

    def __call__(self, x: mx.array) -> mx.array:
        """[soft tokens, hidden of the tower] to [soft tokens, hidden of the backbone]."""
        return self.embedding_projection(rms_norm(x, None, self.eps))
