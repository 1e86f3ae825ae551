"""The drafter: a few small decoder layers that read the target's hidden states and guess a whole block at once.

DFlash's shape (arXiv 2602.06036).  The hidden states of some layers of the target, the *taps*, are concatenated, projected and
normed; the keys and values of every draft layer come from these features, at their true positions, and from the block itself.
Only the features' K/V are kept, in a :class:`mlx_diffgemma.cache.Cache`, so nothing is ever rolled back.  Embedding and head
are the target's and passed in at the call as :class:`Borrowed`.

    >>> borrowed, cache = Borrowed(target, drafter), Cache(drafter.config)
    >>> drafter.absorb([drafter.features([taps])], [cache])
    >>> drafter(borrowed.embed(block), [Segment(0, 16, cache, canvas=True)])
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.rope_utils import initialize_rope

from drafter.config import DrafterConfig, DraftLayer
from mlx_diffgemma.cache import Cache
from mlx_diffgemma.model import DiffusionGemma, Segment, soft_cap
from mlx_diffgemma.sampler import largest

if TYPE_CHECKING:
    from drafter.canvas import DraftPolicy, DraftRules
    from drafter.causal import CausalDraft
    from mlx_diffgemma.policy import Policy

KEPT = 16  # tokens that carry what a pass believes on to the next one
Rope = Callable[..., mx.array]


class Borrowed:
    """The target's embedding and head, as a drafter sees them."""

    def __init__(self, target: DiffusionGemma, drafter: Drafter):
        self.target, config = target, drafter.config
        self.scale, self.multiplier = config.input_embedding_scale, config.output_multiplier
        self.cap = config.final_logit_softcapping
        self.ids: mx.array | None = drafter.head_ids if config.head_size else None
        table = target.model.decoder.embed_tokens
        self._head: Callable[[mx.array], mx.array] = table.as_linear if self.ids is None else _some_rows(table, self.ids)

    def embed(self, ids: mx.array) -> mx.array:
        """Scaled embeddings of ids of any shape."""
        return self.target.embed(ids) * self.scale

    def soft_embed(self, probabilities: mx.array, ids: mx.array | None = None) -> mx.array:
        """Scaled mean embedding under ``probabilities`` of all tokens, or of the tokens ``ids``."""
        return self.target.soft_embed(probabilities, ids) * self.scale

    def logits(self, hidden: mx.array) -> mx.array:
        """[..., tokens] float32, of the tokens the drafter can draft."""
        logits = self._head(hidden.astype(self.target.dtype)).astype(mx.float32) * self.multiplier
        return logits if not self.cap else soft_cap(logits, mx.array(self.cap, dtype=mx.float32))

    def tokens(self, places: mx.array) -> mx.array:
        """Token ids of places in ``logits``."""
        return (places if self.ids is None else self.ids[places]).astype(mx.int32)

    def belief(self, logits: mx.array) -> mx.array:
        """The mean embedding [rows, hidden] under the ``KEPT`` most probable tokens of ``logits`` [rows, tokens]."""
        places = largest(logits, min(KEPT, logits.shape[-1]))
        shares = mx.softmax(mx.take_along_axis(logits, places, axis=-1), axis=-1)
        return self.soft_embed(shares, self.tokens(places))


def _some_rows(table: nn.Embedding | nn.QuantizedEmbedding, ids: mx.array) -> Callable[[mx.array], mx.array]:
    """The head of the tokens ``ids`` alone."""
    if isinstance(table, nn.QuantizedEmbedding):
        biases = table.get("biases")
        weight, scales, biases = table.weight[ids], table.scales[ids], None if biases is None else biases[ids]
        mx.eval(weight, scales, [] if biases is None else biases)  # here: the first draft may be made on another thread
        return lambda x: mx.quantized_matmul(x, weight, scales, biases, transpose=True, group_size=table.group_size,
                                             bits=table.bits, mode=table.mode)
    rows = table.weight[ids]
    mx.eval(rows)
    return lambda x: x @ rows.T


def weights_fingerprint(drafter: Drafter) -> str:
    """Of all its weights."""
    digest = hashlib.sha256()
    for name, value in sorted(tree_flatten(drafter.parameters())):
        digest.update(name.encode() + np.array(value.astype(mx.float32)).tobytes())
    return digest.hexdigest()


class DraftAttention(nn.Module):
    def __init__(self, config: DrafterConfig, layer: DraftLayer):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.window, self.causal = layer.window, layer.causal
        self.q_proj = nn.Linear(config.hidden_size, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def keys_values(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Each [1, KV heads, rows, head size] of rows [rows, hidden]; the keys are not turned yet."""
        shape = (x.shape[0], self.kv_heads, self.head_dim)
        keys, values = self.k_norm(self.k_proj(x).reshape(shape)), self.v_proj(x).reshape(shape)
        return keys.transpose(1, 0, 2)[None], values.transpose(1, 0, 2)[None]

    def __call__(self, x: mx.array, rope: Rope, segments: Sequence[Segment], index: int) -> mx.array:
        rows = x.shape[0]
        queries = self.q_norm(self.q_proj(x).reshape(rows, self.heads, self.head_dim)).transpose(1, 0, 2)[None]
        keys, values = self.keys_values(x)
        parts = []
        for segment in segments:
            q, k, v = (t[:, :, segment.start : segment.stop] for t in (queries, keys, values))
            q, k = rope(q, offset=segment.position), rope(k, offset=segment.position)
            past = segment.cache.view(index)
            if past is not None:
                k, v = mx.concatenate((past[0], k), axis=2), mx.concatenate((past[1], v), axis=2)
            mask = block_mask(k.shape[2] - segment.rows, segment.rows, self.window, self.causal)
            parts.append(mx.fast.scaled_dot_product_attention(q, k, v, scale=self.head_dim**-0.5, mask=mask))
        out = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)
        return self.o_proj(out[0].transpose(1, 0, 2).reshape(rows, -1))


def block_mask(past: int, rows: int, window: int | None, causal: bool) -> mx.array | None:
    """[rows, past + rows], True where seen; None: everything.  A window limits what a row sees of the features before the block,
    not of the block."""
    if not causal and (window is None or past + rows <= window):
        return None
    query, key = mx.arange(past, past + rows)[:, None], mx.arange(past + rows)[None]
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

    def __call__(self, x: mx.array, rope: Rope, segments: Sequence[Segment], index: int) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), rope, segments, index)
        return x + self.mlp(self.post_attention_layernorm(x))


class Drafter(nn.Module):
    """Made by :func:`drafter.loading.load_drafter`."""

    def __init__(self, config: DrafterConfig):
        super().__init__()
        self.config = config
        self.rules: DraftRules | None = None  # for its canvases; None: the defaults
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
        # Under a name that makes it no parameter: it holds frequencies that are computed, not stored.
        self._rope = initialize_rope(config.head_dim, config.rope_theta, False,
                                     dict(config.rope_scaling) if config.rope_scaling else None, config.max_position_embeddings)

    @property
    def dtype(self) -> mx.Dtype:
        return self.norm.weight.dtype

    def features(self, taps: Mapping[int, mx.array]) -> mx.array:
        """[rows, hidden] of the target's hidden states [rows, hidden] after each tapped layer."""
        states = mx.concatenate([taps[layer] for layer in self.config.taps], axis=-1)
        return self.hidden_norm(self.fc(states.astype(self.dtype)))

    def absorb(self, features: Sequence[mx.array], caches: Sequence[Cache]) -> None:
        """Append the K/V of ``features`` [rows, hidden], the next positions of each sequence, to its cache."""
        flat = mx.concatenate(list(features))
        for index, layer in enumerate(self.layers):
            keys, values = layer.self_attn.keys_values(flat)
            start = 0
            for part, cache in zip(features, caches, strict=True):
                stop = start + part.shape[0]
                cache.append(index, self._rope(keys[:, :, start:stop], offset=cache.length), values[:, :, start:stop])
                start = stop
        for part, cache in zip(features, caches, strict=True):
            cache.advance(part.shape[0])

    def __call__(self, x: mx.array, segments: Sequence[Segment]) -> mx.array:
        """Hidden states [rows, hidden] after the last norm of blocks whose embeddings are ``x`` [rows, hidden].

        Each segment is the block of one sequence, behind the features its cache holds.
        """
        x = x.astype(self.dtype)
        for index, layer in enumerate(self.layers):
            x = layer(x, self._rope, segments, index)
        normed: mx.array = self.norm(x)
        return normed

    def causal(self, target: DiffusionGemma) -> CausalDraft:
        """Itself as left-to-right decoding asks for it.  Errors: UserError when it was made for another target."""
        from drafter.causal import CausalDraft
        from drafter.loading import check_pairing

        check_pairing(self.config, target)
        return CausalDraft(self, target)

    def canvas(self, target: DiffusionGemma, base: Policy, rules: DraftRules | None = None) -> DraftPolicy:
        """``base``, beginning its canvases from this drafter's guesses, under ``rules``, by default its own.

        Errors: UserError when it was made for another target, or for decoding left to right only.
        """
        from drafter.canvas import CanvasDraft, DraftPolicy, DraftRules
        from drafter.loading import check_pairing

        check_pairing(self.config, target)
        rules = rules or self.rules or DraftRules()
        return DraftPolicy(base, CanvasDraft(self, target, rules), rules.watchdog, rules.judge)

    def condition(self, x: mx.array, soft_embedding: mx.array) -> mx.array:
        """``x`` [rows, hidden] with the self-conditioning signal [rows, hidden] of an earlier pass added."""
        signal: mx.array = self.self_conditioning(self.self_conditioning_norm(soft_embedding.astype(self.dtype)))
        return x.astype(self.dtype) + signal

    def refine(self, x: mx.array, taps: Mapping[int, mx.array]) -> mx.array:
        """``x`` [rows, hidden] with what the target's denoising of these rows made of them added: its taps [rows, hidden]."""
        signal: mx.array = self.refinement(self.features(taps))
        return x.astype(self.dtype) + signal
