"""The vision tower of Gemma 4: from the patches of an image to embeddings in the prompt.

The patches of one image go through together and without padding.  So no mask is needed, and an
image gets the same numbers whatever other images the prompt has.  The module tree carries the checkpoint's key paths
(``model.encoder.vision_tower...``).

    >>> tower(patches, (24, 24))       # [576, 768] to [64, hidden]
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_diffgemma.model.config import VisionConfig
from mlx_diffgemma.model.layers import (
    RMSNorm,
    apply_rope,
    attend_in_turn,
    gated_gelu,
    rms_norm,
    rope_frequencies,
    rows_at_once,
)

FUSED = (64, 80, 128)  # head sizes for which MLX's Metal backend holds no scores at all
Grid = tuple[int, int]  # rows and columns of patches


def patch_positions(grid: Grid) -> np.ndarray:
    """The position (x, y) of each patch, row by row: [rows * columns, 2] int32."""
    y, x = np.indices(grid, dtype=np.int32)
    return np.stack((x.ravel(), y.ravel()), axis=-1)


def axial_table(positions: mx.array, head_dim: int, theta: float) -> tuple[mx.array, mx.array]:
    """The rotary table of patches; the first half of a head is rotated by x, the second half by y.

    Source: Gemma4VisionRotaryEmbedding.

    Args:
        positions: The positions (x, y) of the patches [patches, 2].
        head_dim: The head size.
        theta: The base of the frequencies.

    Returns:
        (cos, sin), each [patches, 2, 1, head_dim / 4] float32
    """
    angles = positions.astype(mx.float32)[:, :, None, None] * rope_frequencies(theta, head_dim // 2)
    return mx.cos(angles), mx.sin(angles)


def apply_axial_rope(x: mx.array, table: tuple[mx.array, mx.array]) -> mx.array:
    """Rotate [patches, heads, head_dim], each half of a head by its own coordinate.

    Source: apply_multidimensional_rope.
    """
    cos, sin = table
    by_x, by_y = mx.split(x, 2, axis=-1)
    by_x = apply_rope(by_x, (cos[:, 0], sin[:, 0]))
    by_y = apply_rope(by_y, (cos[:, 1], sin[:, 1]))
    return mx.concatenate((by_x, by_y), axis=-1)


class ClippedLinear(nn.Module):
    """A linear map that clips its input and output to stored bounds, if the checkpoint has any.

    Source: Gemma4ClippableLinear.
    """

    def __init__(self, config: VisionConfig, inputs: int, outputs: int):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=False)
        if config.clipped:
            for name in ("input_min", "output_min"):
                self[name] = mx.array(-mx.inf)
            for name in ("input_max", "output_max"):
                self[name] = mx.array(mx.inf)

    def __call__(self, x: mx.array) -> mx.array:
        """Map [patches, inputs] to [patches, outputs]."""
        if "input_min" not in self:
            return self.linear(x)
        return mx.clip(
            self.linear(mx.clip(x, self.input_min, self.input_max)),
            self.output_min,
            self.output_max,
        )


class VisionAttention(nn.Module):
    """Attention at scale 1 in which every patch sees every other; source: Gemma4VisionAttention."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        self.eps = config.rms_norm_eps
        self.q_proj = ClippedLinear(config, config.hidden_size, self.heads * self.head_dim)
        self.k_proj = ClippedLinear(config, config.hidden_size, self.kv_heads * self.head_dim)
        self.v_proj = ClippedLinear(config, config.hidden_size, self.kv_heads * self.head_dim)
        self.o_proj = ClippedLinear(config, self.heads * self.head_dim, config.hidden_size)
        self.q_norm = RMSNorm(self.head_dim, self.eps)
        self.k_norm = RMSNorm(self.head_dim, self.eps)

    def __call__(self, x: mx.array, table: tuple[mx.array, mx.array]) -> mx.array:
        """Attend within [patches, hidden]; ``table`` is from ``axial_table``.  The shape is kept."""
        patches = x.shape[0]
        queries = self.q_proj(x).reshape(patches, self.heads, self.head_dim)
        keys = self.k_proj(x).reshape(patches, self.kv_heads, self.head_dim)
        values = self.v_proj(x).reshape(patches, self.kv_heads, self.head_dim)
        queries = self._padded(apply_axial_rope(self.q_norm(queries), table))
        keys = self._padded(apply_axial_rope(self.k_norm(keys), table))
        values = self._padded(rms_norm(values, None, self.eps))
        rows = rows_at_once(self.heads, patches)
        out = attend_in_turn(
            (queries[:, :, start : start + rows], keys, values, None)
            for start in range(0, patches, rows)
        )
        out = out[0, :, :, : self.head_dim]
        return self.o_proj(out.transpose(1, 0, 2).reshape(patches, -1).astype(x.dtype))

    def _padded(self, x: mx.array) -> mx.array:
        """Convert [patches, heads, head_dim] to [1, heads, patches, fused head size] in float32.

        Zeros at the end of a head change no score; the released head size of 72 has no fused
        kernel.
        """
        sizes = (size for size in FUSED if FUSED[0] < self.head_dim <= size)
        fill = next(sizes, self.head_dim) - self.head_dim
        return mx.pad(x.transpose(1, 0, 2)[None].astype(mx.float32), [(0, 0)] * 3 + [(0, fill)])


class VisionMLP(nn.Module):
    """Two maps up, one of them the gate, and one down; source: Gemma4VisionMLP."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.gate_proj = ClippedLinear(config, config.hidden_size, config.intermediate_size)
        self.up_proj = ClippedLinear(config, config.hidden_size, config.intermediate_size)
        self.down_proj = ClippedLinear(config, config.intermediate_size, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        """Map [patches, hidden] to the same shape."""
        return self.down_proj(gated_gelu(self.gate_proj(x), self.up_proj(x)))


class VisionLayer(nn.Module):
    """Attention and MLP, each between two norms; source: Gemma4VisionEncoderLayer."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.self_attn = VisionAttention(config)
        self.mlp = VisionMLP(config)
        for name in (
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        ):
            self[name] = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def __call__(self, x: mx.array, table: tuple[mx.array, mx.array]) -> mx.array:
        """Map [patches, hidden] to the same shape; ``table`` is from ``axial_table``."""
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), table))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class PatchEmbedder(nn.Module):
    """Patches to vectors, with a learned embedding for each coordinate.

    Source: Gemma4VisionPatchEmbedder.
    """

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.input_proj = nn.Linear(3 * config.patch_size**2, config.hidden_size, bias=False)
        self.position_embedding_table = mx.zeros(
            (2, config.position_embedding_size, config.hidden_size)
        )

    def __call__(self, patches: mx.array, positions: mx.array) -> mx.array:
        """Embed ``patches`` [patches, 3 * patch size²] from 0 to 1 at ``positions`` [patches, 2]
        (x, y).

        Returns:
            [patches, hidden]
        """
        table = self.position_embedding_table
        x = self.input_proj((2 * (patches - 0.5)).astype(table.dtype))
        return x + (table[0][positions[:, 0]] + table[1][positions[:, 1]])


class VisionEncoder(nn.Module):
    """The layers, under the checkpoint's key path; the tower runs them.

    Source: Gemma4VisionEncoder.
    """

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
        """Run the tower on one image.

        Args:
            patches: [rows * columns, 3 * patch size²] with values from 0 to 1, row by row.
            grid: The rows and columns of patches.

        Returns:
            [soft tokens, hidden]
        """
        positions = mx.array(patch_positions(grid))
        x = self.patch_embedder(patches, positions)
        table = axial_table(positions, self.config.head_dim, self.config.rope_theta)
        for layer in self.encoder.layers:
            x = layer(x, table)
        return self.pool(x, grid)

    def pool(self, x: mx.array, grid: Grid) -> mx.array:
        """Pool [patches, hidden] to [soft tokens, hidden].

        A soft token is the mean of a square of patches, scaled and standardised in float32. Source:
        Gemma4VisionPooler, and the end of Gemma4VisionModel.
        """
        side = self.config.pooling_kernel_size
        size = self.config.hidden_size
        squares = x.astype(mx.float32).reshape(grid[0] // side, side, grid[1] // side, side, size)
        pooled = squares.mean(axis=(1, 3)).astype(x.dtype).astype(mx.float32)
        pooled = pooled.reshape(-1, size) * size**0.5
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
        """Map [soft tokens, hidden of the tower] to [soft tokens, hidden of the backbone]."""
        return self.embedding_projection(rms_norm(x, None, self.eps))
