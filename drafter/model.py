"""The drafter's network: a few small decoder layers that guess a whole block at once.

The shape is DFlash's (arXiv 2602.06036).  The hidden states of some layers of the target (``taps``)
are concatenated, projected and normed.  The keys and values of every draft layer come from these
features, at their true positions, and from the block itself.  Only the K/V of the features are
kept, in a :class:`mlx_diffgemma.model.cache.Cache`, so nothing is ever rolled back.  Embedding and
head are the target's (:class:`drafter.head.TargetHead`).

    >>> head = TargetHead(target, drafter)
    >>> cache = Cache(drafter.config)
    >>> drafter.append_features([drafter.features(taps)], [cache])
    >>> drafter(head.embed(block), [Segment(0, 16, cache, canvas=True)])
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.rope_utils import initialize_rope

from drafter.config import DrafterConfig, DraftLayer
from mlx_diffgemma.model.attention import Segment
from mlx_diffgemma.model.cache import Cache

Rope = Callable[..., mx.array]


def weights_fingerprint(drafter: DraftNetwork) -> str:
    """SHA-256 over all weights."""
    digest = hashlib.sha256()
    for name, value in sorted(tree_flatten(drafter.parameters())):
        digest.update(name.encode() + np.array(value.astype(mx.float32)).tobytes())
    return digest.hexdigest()


class DraftAttention(nn.Module):
    def __init__(self, config: DrafterConfig, layer: DraftLayer):
        super().__init__()
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        self.window = layer.window
        self.causal = layer.causal
        self.q_proj = nn.Linear(config.hidden_size, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def keys_values(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """The keys and values of ``x`` [rows, hidden], each [1, KV heads, rows, head size].

        The keys are not rotated yet.
        """
        shape = (x.shape[0], self.kv_heads, self.head_dim)
        keys = self.k_norm(self.k_proj(x).reshape(shape))
        values = self.v_proj(x).reshape(shape)
        return keys.transpose(1, 0, 2)[None], values.transpose(1, 0, 2)[None]

    def __call__(
        self, x: mx.array, rope: Rope, segments: Sequence[Segment], index: int
    ) -> mx.array:
        rows = x.shape[0]
        queries = self.q_norm(self.q_proj(x).reshape(rows, self.heads, self.head_dim))
        queries = queries.transpose(1, 0, 2)[None]
        keys, values = self.keys_values(x)
        parts = []
        for segment in segments:
            q, k, v = (t[:, :, segment.start : segment.stop] for t in (queries, keys, values))
            q = rope(q, offset=segment.position)
            k = rope(k, offset=segment.position)
            past = segment.cache.view(index)
            if past is not None:
                k = mx.concatenate((past[0], k), axis=2)
                v = mx.concatenate((past[1], v), axis=2)
            mask = block_mask(k.shape[2] - segment.rows, segment.rows, self.window, self.causal)
            parts.append(
                mx.fast.scaled_dot_product_attention(q, k, v, scale=self.head_dim**-0.5, mask=mask)
            )
        out = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)
        return self.o_proj(out[0].transpose(1, 0, 2).reshape(rows, -1))


def block_mask(past: int, rows: int, window: int | None, causal: bool) -> mx.array | None:
    """The mask [rows, past + rows], True where a row sees a key; None if every row sees every key.

    The window limits what a row sees of the features before the block, but not of the block.

    Args:
        past: How many features come before the block.
        rows: The rows of the block.
        window: How many positions a row sees of the features, itself included.  None: all.
        causal: Whether rows see only earlier rows of the block.
    """
    if not causal and (window is None or past + rows <= window):
        return None
    query = mx.arange(past, past + rows)[:, None]
    key = mx.arange(past + rows)[None]
    seen = key <= query if causal else key >= 0
    return seen if window is None else seen & ((key >= past) | (query - key < window))


class DraftMLP(nn.Module):
    def __init__(self, config: DrafterConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))


class DraftDecoderLayer(nn.Module):
    def __init__(self, config: DrafterConfig, layer: DraftLayer):
        super().__init__()
        self.self_attn = DraftAttention(config, layer)
        self.mlp = DraftMLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(
        self, x: mx.array, rope: Rope, segments: Sequence[Segment], index: int
    ) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), rope, segments, index)
        return x + self.mlp(self.post_attention_layernorm(x))


class DraftNetwork(nn.Module):
    """The network of a drafter.  Users hold a :class:`drafter.drafter.Drafter`."""

    def __init__(self, config: DrafterConfig):
        super().__init__()
        self.config = config
        self.fc = nn.Linear(len(config.taps) * config.hidden_size, config.hidden_size, bias=False)
        self.hidden_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.layers = [DraftDecoderLayer(config, layer) for layer in config.layers]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if config.self_conditioning:
            self.self_conditioning = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
            self.self_conditioning_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if config.refinement:
            self.refinement = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        if config.confidence:
            self.confidence = nn.Linear(config.hidden_size, 1)
        if config.head_size:
            self.head_ids = mx.arange(config.head_size, dtype=mx.int32)
        # The name begins with an underscore, so that MLX does not count it as a parameter: it holds
        # computed frequencies.
        self._rope = initialize_rope(
            config.head_dim,
            config.rope_theta,
            False,
            dict(config.rope_scaling) if config.rope_scaling else None,
            config.max_position_embeddings,
        )

    @property
    def dtype(self) -> mx.Dtype:
        return self.norm.weight.dtype

    def features(self, taps: Mapping[int, mx.array]) -> mx.array:
        """Project the target's hidden states [rows, hidden] after each tapped layer to features
        [rows, hidden].
        """
        states = mx.concatenate([taps[layer] for layer in self.config.taps], axis=-1)
        return self.hidden_norm(self.fc(states.astype(self.dtype)))

    def append_features(self, features: Sequence[mx.array], caches: Sequence[Cache]) -> None:
        """Append the K/V of ``features`` to the cache of each sequence.

        The features [rows, hidden] are the next positions of the sequence.
        """
        flat = mx.concatenate(list(features))
        for index, layer in enumerate(self.layers):
            keys, values = layer.self_attn.keys_values(flat)
            start = 0
            for part, cache in zip(features, caches, strict=True):
                stop = start + part.shape[0]
                cache.append(
                    index,
                    self._rope(keys[:, :, start:stop], offset=cache.length),
                    values[:, :, start:stop],
                )
                start = stop
        for part, cache in zip(features, caches, strict=True):
            cache.advance(part.shape[0])

    def __call__(self, x: mx.array, segments: Sequence[Segment]) -> mx.array:
        """The hidden states [rows, hidden] of blocks after the last norm.

        Each segment is the block of one sequence, after the features that its cache holds.

        Args:
            x: The embeddings [rows, hidden] of the blocks.
            segments: The blocks that the rows belong to.
        """
        x = x.astype(self.dtype)
        for index, layer in enumerate(self.layers):
            x = layer(x, self._rope, segments, index)
        normed: mx.array = self.norm(x)
        return normed

    def condition(self, x: mx.array, soft_embedding: mx.array) -> mx.array:
        """Add the self-conditioning signal of an earlier pass to ``x``; both are [rows, hidden]."""
        signal: mx.array = self.self_conditioning(
            self.self_conditioning_norm(soft_embedding.astype(self.dtype))
        )
        return x.astype(self.dtype) + signal

    def refine(self, x: mx.array, taps: Mapping[int, mx.array]) -> mx.array:
        """Add the target's hidden states [rows, hidden] of these rows to ``x`` [rows, hidden]."""
        signal: mx.array = self.refinement(self.features(taps))
        return x.astype(self.dtype) + signal
