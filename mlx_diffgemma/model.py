"""The DiffusionGemma backbone: one stack of weights, two modes, one forward.

``encode`` runs the causal mode and writes the cache; ``denoise`` runs the canvas mode and only reads it.  Both are doors
to one forward over *segments*: runs of rows that belong to one sequence.  All rows of a call go through the projections,
the experts and the head together; attention runs segment by segment over that segment's own cache, so rows of a batch
need no padding, no mask between sequences, and get the same numbers as alone.

The module tree carries the checkpoint's key paths (``model.decoder.layers.N...``).  This file knows no text and no
sampling.

    >>> cache = Cache(model.config.text)
    >>> model.encode([prompt_ids], [cache])
    >>> model.denoise(canvas, [cache]).logits          # [1, canvas, vocabulary], float32
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_diffgemma.cache import Cache
from mlx_diffgemma.config import LayerConfig, ModelConfig, TextConfig
from mlx_diffgemma.joined import JoinedLinear, join
from mlx_diffgemma.layers import (
    RMSNorm,
    add_and_scale,
    add_both,
    add_scaled,
    attend_in_turn,
    both_signs,
    gated_gelu,
    is_fused,
    rms_norm,
    rope_frequencies,
    rows_at_once,
    three_scaled,
    turn,
    weigh,
)
from mlx_diffgemma.masks import Mask, block_mask, causal_mask
from mlx_diffgemma.vision import Grid, VisionEmbedder, VisionTower

# From this many (row, expert) pairs on, rows are sorted by expert: MLX then reads each expert once.
SORT_FROM = 64
MASK_KEPT = 2**22  # masks of so many entries are kept for the layers that follow
SIGNS = mx.array(np.array([[-1.0], [1.0]], dtype=np.float32))


@dataclass(frozen=True)
class Segment:
    """Rows ``start`` to ``stop`` of a forward, the next positions of one sequence.

    ``canvas`` rows see each other and the cache and write nothing; ``after`` are the rows of an earlier segment of the same
    forward and sequence, which they follow, or ``at`` is the position in the sequence that they begin at, of which they then
    see nothing more.  Causal rows write their K/V into the cache, or hold them aside with
    ``write="hold"``.  ``blocks`` are (start, end) ranges inside the segment that see each other both ways.
    """

    start: int
    stop: int
    cache: Cache
    canvas: bool = False
    after: int = 0
    at: int | None = None
    write: Literal["append", "hold"] = "append"
    blocks: tuple[tuple[int, int], ...] = ()
    masks: dict[Any, mx.array] = field(default_factory=dict, compare=False, repr=False)  # made once for all layers

    @property
    def rows(self) -> int:
        return self.stop - self.start

    @property
    def position(self) -> int:
        """Of the first row."""
        return self.cache.length + self.after if self.at is None else self.at


@dataclass(frozen=True)
class Encoded:
    """What ``encode`` returns, one entry a sequence.

    ``logits`` [1 or rows, vocabulary] float32 soft-capped, or None; ``hidden`` [rows, hidden] after the last norm;
    ``taps`` maps a layer index to the hidden states after that layer.
    """

    logits: list[mx.array] | None
    hidden: list[mx.array]
    taps: dict[int, list[mx.array]]


@dataclass(frozen=True)
class Denoised:
    """What ``denoise`` returns: ``logits`` [batch, length, vocabulary] and hidden states [batch, length, hidden], or both
    without the first axis where the lengths differ."""

    logits: mx.array
    hidden: mx.array
    taps: dict[int, mx.array]


@lru_cache(maxsize=64)
def row_numbers(shape: tuple[int, ...]) -> mx.array:
    """0, 1, 2 and so on in this shape."""
    return mx.array(np.arange(math.prod(shape), dtype=np.uint32).reshape(shape))


@lru_cache
def head_numbers(heads: int) -> mx.array:
    """[heads, 1, 1]"""
    return mx.array(np.arange(heads, dtype=np.int32)[:, None, None])


@partial(mx.compile, shapeless=True)
def _turns(positions: mx.array, frequencies: mx.array, signs: mx.array) -> tuple[mx.array, mx.array]:
    angles = positions.astype(mx.float32) * frequencies
    return mx.cos(angles), mx.sin(angles) * signs


def rope_table(positions: mx.array, layer: LayerConfig) -> tuple[mx.array, mx.array]:
    """cos of shape [rows, 1, 1, head_dim / 2] and (-sin, sin) [rows, 1, 2, head_dim / 2], float32.

    "proportional" RoPE turns only the first ``layer.rotated`` pairs but keeps the full head size in the exponent.  The
    angles are products of float32 numbers exactly as in the reference; MLX's fused RoPE divides and, on Metal, uses fast
    trigonometry, which drifts at long contexts.
    """
    return _turns(positions[:, None, None, None], layer_frequencies(layer), SIGNS)


@lru_cache
def layer_frequencies(layer: LayerConfig) -> mx.array:
    """[head_dim / 2] float32, zero for the pairs that are not turned."""
    turned = mx.array(np.arange(layer.head_dim // 2) < layer.rotated)
    found = mx.where(turned, rope_frequencies(layer.rope_theta, layer.head_dim), 0.0)
    mx.eval(found)  # any thread may use it later
    return found


@partial(mx.compile, shapeless=True)
def soft_cap(logits: mx.array, cap: mx.array) -> mx.array:
    """``cap * tanh(logits / cap)`` in float32, in one pass over the vocabulary.

    The cap would turn an overflow into a confident token; it stays visible as NaN.
    """
    logits = logits.astype(mx.float32)
    return mx.where(mx.isfinite(logits), mx.tanh(logits / cap) * cap, mx.nan)


@dataclass(frozen=True)
class HeadWeights:
    """Of the norms of all heads in float32 [heads, 2, head_dim / 2], ``own`` and with the halves exchanged.

    The values at the end have none.  Made of the ``norms``' weights as they were.
    """

    norms: tuple[mx.array, mx.array]
    own: mx.array
    swapped: mx.array


class Attention(nn.Module):
    """Grouped-query attention at scale 1 over segments; source: DiffusionGemma{Encoder,Decoder}TextAttention."""

    def __init__(self, config: TextConfig, layer: LayerConfig):
        super().__init__()
        heads, kv, size = config.num_attention_heads, layer.num_kv_heads, layer.head_dim
        self.heads, self.kv_heads, self.head_dim = heads, kv, size
        self.window, self.eps = layer.window, config.rms_norm_eps
        self.q_proj = nn.Linear(config.hidden_size, heads * size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv * size, bias=False)
        if layer.has_value_projection:
            self.v_proj = nn.Linear(config.hidden_size, kv * size, bias=False)
        self.o_proj = nn.Linear(heads * size, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(size, self.eps)
        self.k_norm = RMSNorm(size, self.eps)
        self._joined: JoinedLinear | None = None
        self._head_weights: HeadWeights | None = None

    @property
    def _projections(self) -> list[nn.Module]:
        return [self[name] for name in ("q_proj", "k_proj", "v_proj") if name in self]

    def join(self) -> None:
        """Lay the projections' matrices into one array, of which they become parts; for one product in place of three."""
        self._joined = join(self._projections)
        self._head_weights = self._weigh_heads()
        mx.eval(self._head_weights.own, self._head_weights.swapped)

    def _project(self, x: mx.array) -> mx.array:
        """Queries, keys and, where they are projected, values: [rows, heads of all, head_dim]."""
        if self._joined is not None and not self._joined.holds(self._projections):
            self._joined = None  # weights were replaced: trained, adapted or cast
        if self._joined is not None:
            return self._joined(x).reshape(x.shape[0], -1, self.head_dim)
        return mx.concatenate([projection(x) for projection in self._projections], axis=-1).reshape(x.shape[0], -1, self.head_dim)

    def _weigh_heads(self) -> HeadWeights:
        norms = self.q_norm.weight, self.k_norm.weight
        if self._head_weights is not None and all(a is b for a, b in zip(self._head_weights.norms, norms, strict=True)):
            return self._head_weights
        self._head_weights = None
        counts = (self.heads, self.kv_heads, self.kv_heads)
        parts = [mx.broadcast_to(weight.astype(mx.float32), (heads, self.head_dim))
                 for weight, heads in zip((*norms, mx.ones((self.head_dim,))), counts, strict=True)]
        own = mx.concatenate(parts).reshape(-1, 2, self.head_dim // 2)
        return HeadWeights(norms, own, mx.contiguous(own[:, ::-1]))

    def __call__(self, x: mx.array, table: tuple[mx.array, mx.array], segments: Sequence[Segment], index: int) -> mx.array:
        """[rows, hidden] to [rows, hidden]; ``index`` is this layer's place in the caches."""
        rows, turned = x.shape[0], self.heads + self.kv_heads
        projected = rms_norm(self._project(x), None, self.eps)
        if "v_proj" not in self:  # the values are the keys, before these are weighted and turned
            projected = mx.concatenate((projected, projected[:, self.heads :]), axis=1)
        halves = projected.reshape(rows, -1, 2, self.head_dim // 2)
        weights = self._weigh_heads()
        wide, narrow = turn(halves, halves[:, :, ::-1], weights.own, weights.swapped, head_numbers(halves.shape[1]), table, turned)
        # [1, heads, rows, head_dim], as attention wants it, and [2, KV heads, rows, head_dim], as the cache does
        queries = wide.reshape(rows, -1, self.head_dim)[:, : self.heads].transpose(1, 0, 2)[None]
        entries = narrow.reshape(rows, -1, self.head_dim)[:, self.heads :]
        entries = entries.reshape(rows, 2, self.kv_heads, self.head_dim).transpose(1, 2, 0, 3)
        parts = [self._attend(segment, index, *(t[:, :, segment.start : segment.stop] for t in (queries, entries)))
                 for segment in segments]
        out = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)
        return self.o_proj(out.squeeze(0).transpose(1, 0, 2).reshape(rows, -1).astype(x.dtype))

    def _attend(self, segment: Segment, index: int, queries: mx.array, entries: mx.array) -> mx.array:
        """[1, heads, rows, head_dim] of float32 ``queries`` of one segment and its new ``entries``."""
        past = segment.cache.entries(index, segment.at)
        if not segment.canvas:
            (segment.cache.add if segment.write == "append" else segment.cache.hold_entries)(index, entries)
        if self.window is None and not segment.canvas and segment.write == "append":
            seen = segment.cache.entries(index)
            entries = entries if seen is None else seen  # past and new rows in one, not copied once more
        elif past is not None:
            entries = mx.concatenate((past, entries), axis=2)
        # In float32: MLX has no fused kernel at head sizes 256 and 512 and would round the scores to the compute dtype,
        # which at attention scale 1 moves the weights visibly in bf16.  For the same reason the scores are held in full, so
        # long contexts go a few rows at a time.  K/V are cast once for all blocks.  Where the GPU has a kernel after all, it
        # keeps the scores in float32 by itself and reads K/V as they lie in the cache.
        if is_fused(segment.rows, self.heads, self.kv_heads, self.head_dim):
            queries = queries.astype(entries.dtype)
        else:
            entries = entries.astype(mx.float32)
        keys, values = entries[:1], entries[1:]
        parts, past_keys = [], keys.shape[2] - segment.rows
        blocks = [(past_keys + start, past_keys + end) for start, end in segment.blocks]
        for start, stop, first, last in self._row_blocks(segment, keys.shape[2]):
            mask: Mask = None
            rows = range(past_keys + start, past_keys + stop)
            if near := _touching(blocks, rows):
                mask = block_mask(rows, range(first, last), self.window, near)
            elif not segment.canvas:
                mask = self._causal_mask(segment, last - first - len(rows), len(rows))
            parts.append((queries[:, :, start:stop], keys[:, :, first:last], values[:, :, first:last], mask))
        return attend_in_turn(parts)

    def _causal_mask(self, segment: Segment, past: int, rows: int) -> Mask:
        """That of ``rows`` after ``past`` keys; a small one is made once for all layers."""
        key = past, rows, self.window
        if key in segment.masks:
            return segment.masks[key]
        mask = causal_mask(past, rows, self.window)
        if mask is not None and rows * (past + rows) <= MASK_KEPT:
            if isinstance(mask, str):
                mask = block_mask(range(past, past + rows), range(past + rows), None, ())
            segment.masks[key] = mask
        return mask

    def _row_blocks(self, segment: Segment, keys: int) -> Iterator[tuple[int, int, int, int]]:
        """Rows start to stop, and the keys first to last that they see: as many rows as keep the scores within bounds.

        A single row left over joins the block before it: it would take other kernels and round differently.
        """
        past, window = keys - segment.rows, None if segment.canvas else self.window
        longest = max((end - start for start, end in segment.blocks), default=0)
        width = keys if window is None else min(keys, 2 * window + longest)
        rows = rows_at_once(self.heads, width)
        if window is not None:
            rows = min(rows, max(2, window))
        start = 0
        while start < segment.rows:
            stop = segment.rows if segment.rows - start <= rows + 1 else start + rows
            if segment.canvas:
                yield start, stop, 0, keys
            else:
                near = _touching(segment.blocks, range(start, stop))
                first = 0 if window is None else max(0, past + min([start - window + 1, *(begin for begin, _ in near)]))
                yield start, stop, first, past + max([stop, *(end for _, end in near)])
            start = stop


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
        """As of :class:`Attention`."""
        self._joined = join(self._projections)

    def __call__(self, x: mx.array) -> mx.array:
        if self._joined is not None and not self._joined.holds(self._projections):
            self._joined = None
        gate, up = mx.split(self._joined(x), 2, axis=-1) if self._joined else (self.gate_proj(x), self.up_proj(x))
        return self.down_proj(gated_gelu(gate, up))


class Router(nn.Module):
    """Chooses experts from the residual stream itself, not from the normed rows; source: DiffusionGemmaTextRouter."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.proj = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.scale = mx.ones((config.hidden_size,))
        self.per_expert_scale = mx.ones((config.num_experts,))
        self.top_k, self.eps = config.top_k_experts, config.rms_norm_eps

    @property
    def factor(self) -> float:
        """By which rows are scaled beside ``scale``."""
        return float(self.scale.shape[0] ** -0.5)

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """(weights float32, scales, experts), each [rows, top_k]; the weight of an expert is the product of the first two."""
        h = rms_norm(x.astype(mx.float32), None, self.eps) * self.scale.astype(mx.float32) * self.factor
        return self.choose(h.astype(x.dtype))

    def choose(self, h: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """The same of rows that are normed and scaled already."""
        logits, negative = both_signs(self.proj(h))
        # MLX differentiates through a sort unless told that the choice itself has no gradient.
        chosen = mx.stop_gradient(mx.argpartition(negative, self.top_k - 1, axis=-1)[:, : self.top_k])
        # The softmax over the chosen alone is that over all, normalised to a sum of one.
        return mx.softmax(mx.take_along_axis(logits, chosen, axis=-1), axis=-1), self.per_expert_scale[chosen], chosen


class ExpertLinear(nn.Module):
    """One matrix per expert, [experts, outputs, inputs]."""

    def __init__(self, experts: int, inputs: int, outputs: int):
        super().__init__()
        self.weight = mx.zeros((experts, outputs, inputs))

    def __call__(self, x: mx.array, experts: mx.array, sorted_indices: bool) -> mx.array:
        """Rows [n, 1, inputs] through the expert of each, ``experts`` [n]; or rows [n, 1, 1, inputs] through several, [n, k]."""
        weight = self.weight
        if mx.default_device() == mx.cpu and weight.dtype != mx.float32:
            # MLX's CPU backend has the grouped product in float32 only.
            y = mx.gather_mm(x.astype(mx.float32), weight.astype(mx.float32).swapaxes(-1, -2), rhs_indices=experts,
                             sorted_indices=sorted_indices)
            return y.astype(x.dtype)
        return mx.gather_mm(x, weight.swapaxes(-1, -2), rhs_indices=experts, sorted_indices=sorted_indices)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(experts, outputs, inputs)"""
        experts, outputs, inputs = self.weight.shape
        return experts, outputs, inputs

    def to_quantized(self, group_size: int, bits: int, mode: str) -> QuantizedExpertLinear:
        """As MLX's own layers have it, for ``nn.quantize``."""
        return QuantizedExpertLinear(self.weight, group_size, bits, mode)


class QuantizedExpertLinear(nn.Module):
    """:class:`ExpertLinear` with quantised matrices, packed along the inputs."""

    def __init__(self, weight: mx.array, group_size: int, bits: int, mode: str):
        super().__init__()
        self.group_size, self.bits, self.mode = group_size, bits, mode
        self.weight, self.scales, *biases = mx.quantize(weight, group_size, bits, mode=mode)
        if biases:  # affine only
            self.biases = biases[0]
        self.freeze()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(experts, outputs, inputs)"""
        experts, outputs, packed = self.weight.shape
        return experts, outputs, packed * 32 // self.bits

    def __call__(self, x: mx.array, experts: mx.array, sorted_indices: bool) -> mx.array:
        """As of :class:`ExpertLinear`."""
        # MLX numbers the rows itself where it is not told to; but the kernel for sorted rows is taken only if it may.
        rows = None if sorted_indices else row_numbers(x.shape[:-2])
        return mx.gather_qmm(x, self.weight, self.scales, self.get("biases"), lhs_indices=rows, rhs_indices=experts, transpose=True,
                             group_size=self.group_size, bits=self.bits, mode=self.mode, sorted_indices=sorted_indices)


class Experts(nn.Module):
    """Gated MLPs of which each row takes its own few; source: DiffusionGemmaTextExperts."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.gate_up_proj = ExpertLinear(config.num_experts, config.hidden_size, 2 * config.moe_intermediate_size)
        self.down_proj = ExpertLinear(config.num_experts, config.moe_intermediate_size, config.hidden_size)

    def __call__(self, x: mx.array, weights: mx.array, scales: mx.array, chosen: mx.array) -> mx.array:
        """[rows, hidden] to the same in float32; ``weights``, ``scales`` and ``chosen`` [rows, top_k] are the router's."""
        top_k, flat = chosen.shape[-1], chosen.flatten()
        is_sorted = flat.size >= SORT_FROM
        # The axis is added before rows are picked: MLX's CPU product takes twice as long on rows that got it afterwards.
        if is_sorted:
            order = mx.argsort(flat)
            chosen = flat[order]
            x = x[:, None][order // top_k]
        else:
            x = x[:, None, None]  # each row meets its experts without being copied
        gate, up = mx.split(self.gate_up_proj(x, chosen, is_sorted), 2, axis=-1)
        y = self.down_proj(gated_gelu(gate, up), chosen, is_sorted)
        if is_sorted:
            y = y[mx.argsort(order)]
        return weigh(y.reshape(*weights.shape, -1), weights[..., None], scales[..., None]).sum(axis=1)


class Layer(nn.Module):
    """Attention, then dense MLP and experts side by side, each between two norms; source: DiffusionGemma*TextLayer.

    ``layer_scalar`` is the canvas mode's; the causal mode has its own in ``model.encoder``.
    """

    def __init__(self, config: TextConfig, layer: LayerConfig):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.router = Router(config)
        self.experts = Experts(config)
        self.layer_scalar = mx.ones((1,))
        self.eps = config.rms_norm_eps
        for name in ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
                     "post_feedforward_layernorm", "post_feedforward_layernorm_1", "post_feedforward_layernorm_2",
                     "pre_feedforward_layernorm_2"):
            self[name] = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def __call__(self, x: mx.array, table: tuple[mx.array, mx.array], segments: Sequence[Segment], index: int,
                 scalar: mx.array) -> mx.array:
        h = self.self_attn(self.input_layernorm(x), table, segments, index)
        # Norms without their weights, which are applied in one pass with what follows.
        x, wide = add_scaled(x, rms_norm(h, None, self.eps), self.post_attention_layernorm.weight)
        dense, routed, asking = three_scaled(rms_norm(wide, None, self.eps), self.pre_feedforward_layernorm.weight,
                                             self.pre_feedforward_layernorm_2.weight, self.router.scale, self.router.factor)
        dense = rms_norm(self.mlp(dense), None, self.eps)
        routed = rms_norm(self.experts(routed, *self.router.choose(asking)), None, self.eps)
        both = add_both(dense, self.post_feedforward_layernorm_1.weight, routed, self.post_feedforward_layernorm_2.weight)
        return add_and_scale(x, rms_norm(both, None, self.eps), self.post_feedforward_layernorm.weight, scalar)


class SelfConditioning(MLP):
    """Adds what the last step believed to the canvas; source: DiffusionGemmaSelfConditioning.

    An MLP by inheritance, because the checkpoint keeps its projections at this path.
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


class Decoder(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [Layer(config, layer) for layer in config.layers]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_conditioning = SelfConditioning(config)


class EncoderLayer(nn.Module):
    """All that the causal mode does not share with the canvas mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_scalar = mx.ones((1,))


class EncoderText(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.layers = [EncoderLayer() for _ in config.layers]


class Encoder(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.language_model = EncoderText(config.text)
        if config.vision:
            self.vision_tower = VisionTower(config.vision)
            self.embed_vision = VisionEmbedder(config.vision, config.text.hidden_size)


class Trunk(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.decoder = Decoder(config.text)
        self.encoder = Encoder(config)


class DiffusionGemma(nn.Module):
    """The whole model.  Made by :func:`mlx_diffgemma.weights.load_model`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Trunk(config)

    @property
    def layers(self) -> list[Layer]:
        """Under the name that mlx-lm's tuner looks for."""
        layers: list[Layer] = self.model.decoder.layers
        return layers

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype of the hidden states."""
        return self.model.decoder.norm.weight.dtype

    def join(self) -> None:
        """Let products of the same rows be one, where their matrices have the same precision.

        The matrices become parts of one array, under their own names; nothing lies in memory twice.  A module whose weights are
        replaced or adapted later multiplies by each again.
        """
        for layer in self.layers:
            layer.self_attn.join()
            layer.mlp.join()
        self.model.decoder.self_conditioning.join()

    @property
    def embed_scale(self) -> mx.array:
        """sqrt(hidden size), rounded to the compute dtype as the reference rounds it."""
        return mx.array(self.config.text.hidden_size**0.5, dtype=self.dtype)

    def embed(self, ids: mx.array) -> mx.array:
        """Scaled token embeddings; ids of any shape."""
        # A table in a floating-point mode gives bfloat16 whatever the compute dtype.
        return self.model.decoder.embed_tokens(ids).astype(self.dtype) * self.embed_scale

    def see(self, patches: mx.array, grid: Grid) -> mx.array:
        """Embeddings [soft tokens, hidden] of an image: ``patches`` [rows * columns, 3 * patch size²] from 0 to 1, row by row.

        Only of a model whose config has a vision tower.  Source: DiffusionGemmaEncoderModel.get_image_features.
        """
        encoder = self.model.encoder
        return encoder.embed_vision(encoder.vision_tower(patches, grid)).astype(self.dtype)

    def soft_embed(self, probabilities: mx.array, ids: mx.array | None = None) -> mx.array:
        """Scaled mean embedding under ``probabilities`` [..., vocabulary], or [..., n] of the tokens ``ids`` [..., n]."""
        table, probabilities = self.model.decoder.embed_tokens, probabilities.astype(self.dtype)
        if ids is not None:
            mean = (probabilities[..., None, :] @ table(ids).astype(self.dtype))[..., 0, :]
        elif isinstance(table, nn.QuantizedEmbedding):
            mean = mx.quantized_matmul(probabilities, table.weight, table.scales, table.get("biases"), transpose=False,
                                       group_size=table.group_size, bits=table.bits, mode=table.mode)
        else:
            mean = probabilities @ table.weight
        return mean * self.embed_scale

    def encode(
        self,
        inputs: Sequence[mx.array],
        caches: Sequence[Cache],
        logits: Literal["none", "last", "all"] = "none",
        taps: Sequence[int] = (),
        write: Literal["append", "hold"] = "append",
        blocks: Sequence[Sequence[tuple[int, int]]] = (),
    ) -> Encoded:
        """Causal mode: read the next positions of each sequence and write its cache.

        ``inputs`` holds, for each cache, token ids [n] or embeddings [n, hidden].  ``logits`` asks for the next-token
        distribution of no row, each sequence's last row or all rows.  ``blocks`` are, for each input, the ranges (start, end)
        of its rows that see each other both ways: images.
        """
        embeddings = [x if x.ndim == 2 else self.embed(x) for x in inputs]
        segments, start = [], 0
        for row, (x, cache) in enumerate(zip(embeddings, caches, strict=True)):
            segments.append(Segment(start, start + x.shape[0], cache, write=write, blocks=tuple(blocks[row]) if blocks else ()))
            start += x.shape[0]
        hidden, tapped = self._forward(_concatenate(embeddings), segments, taps)
        for segment in segments:
            if write == "append":
                segment.cache.advance(segment.rows)
        parts = [hidden[s.stop - 1 if logits == "last" else s.start : s.stop] for s in segments]
        return Encoded(
            logits=None if logits == "none" else [self.logits(part) for part in parts],
            hidden=[hidden[s.start : s.stop] for s in segments],
            taps={layer: [x[s.start : s.stop] for s in segments] for layer, x in tapped.items()},
        )

    def denoise(
        self,
        canvas: mx.array,
        caches: Sequence[Cache],
        soft_embedding: mx.array | None = None,
        taps: Sequence[int] = (),
        commits: Sequence[mx.array | None] = (),
        lengths: Sequence[int] = (),
    ) -> Denoised:
        """Canvas mode: one denoising forward of ``canvas`` ids [batch, length] after each sequence's cache.

        Canvases of different ``lengths`` come one after the other in ids [sum of lengths]; what is returned has the leading
        axes of ``canvas``.  ``soft_embedding`` [batch, length, hidden] is the self-conditioning signal; None, or zeros for a
        canvas, at the first step.  The caches are only read, but for ``commits``: ids [n] of a sequence that are encoded
        into its cache in the same forward, before its canvas, as ``encode`` would have done.
        """
        lengths = lengths or [canvas.shape[1]] * canvas.shape[0]
        if len(caches) != len(lengths) or sum(lengths) != canvas.size:
            raise ValueError(f"{len(caches)} caches for canvases of lengths {list(lengths)} in an array of {canvas.shape}")
        rows, segments, start = [], list[Segment](), 0
        for cache, ids in zip(caches, commits, strict=False):
            if ids is not None:
                rows.append(self.embed(ids))
                segments.append(Segment(start, start + ids.size, cache))
                start += ids.size
        committed, commit_segments = start, list(segments)
        x = self.model.decoder.self_conditioning(self.embed(canvas), soft_embedding).reshape(canvas.size, -1)
        for row, (cache, length) in enumerate(zip(caches, lengths, strict=True)):
            after = commits[row].size if commits and commits[row] is not None else 0  # type: ignore[union-attr]
            segments.append(Segment(start, start + length, cache, canvas=True, after=after))
            start += length
        hidden, tapped = self._forward(_concatenate([*rows, x]), segments, taps)
        for segment in commit_segments:
            segment.cache.advance(segment.rows)
        hidden, tapped = hidden[committed:], {layer: x[committed:] for layer, x in tapped.items()}
        return Denoised(
            logits=self.logits(hidden).reshape(*canvas.shape, -1),
            hidden=hidden.reshape(*canvas.shape, -1),
            taps={layer: x.reshape(*canvas.shape, -1) for layer, x in tapped.items()},
        )

    def learn(self, sequences: Sequence[mx.array], canvases: mx.array, starts: Sequence[int],
              soft_embedding: mx.array | None = None, checkpoint: bool = False) -> tuple[mx.array, mx.array]:
        """Both modes in one forward, for training: each sequence causally, and a canvas that lies inside of it.

        ``sequences`` of ids [n], ``canvases`` ids [batch, length]; the canvas begins at position ``starts[i]`` and sees of its
        sequence only what comes before, so that gradients flow from it into the sequence's keys and values.  With
        ``checkpoint`` a layer's inner values are computed again for the backward pass instead of being kept.  Returns the
        hidden states after the last norm: [rows of all sequences, hidden] and [batch, length, hidden].
        """
        batch, length = canvases.shape
        total = sum(ids.size for ids in sequences)

        def segments() -> list[Segment]:
            caches = [Cache(self.config.text, keep_all=True) for _ in sequences]
            made, row = [], 0
            for ids, cache in zip(sequences, caches, strict=True):
                made.append(Segment(row, row + ids.size, cache))
                row += ids.size
            return made + [Segment(total + i * length, total + (i + 1) * length, cache, canvas=True, at=start)
                           for i, (cache, start) in enumerate(zip(caches, starts, strict=True))]

        canvas = self.model.decoder.self_conditioning(self.embed(canvases), soft_embedding).reshape(batch * length, -1)
        x = _concatenate([self.embed(_concatenate(list(sequences))), canvas])
        hidden, _ = self._forward(x, segments(), (), segments if checkpoint else None)
        return hidden[:total], hidden[total:].reshape(batch, length, -1)

    def _forward(self, x: mx.array, segments: Sequence[Segment], taps: Sequence[int],
                 renew: Callable[[], Sequence[Segment]] | None = None) -> tuple[mx.array, dict[int, mx.array]]:
        """[rows, hidden] through all layers and the final norm, and the hidden states after the layers in ``taps``.

        ``renew`` makes the segments anew, with caches of their own, for layers that run once more in the backward pass.
        """
        decoder, encoder = self.model.decoder, self.model.encoder.language_model
        positions = _concatenate([mx.arange(s.position, s.position + s.rows) for s in segments])
        shapes = self.config.text.layers
        tables = {shape: rope_table(positions, shape) for shape in set(shapes)}
        scalars = _per_row(segments, [layer.layer_scalar for layer in decoder.layers],
                           [layer.layer_scalar for layer in encoder.layers])
        tapped = {}
        for index, layer in enumerate(decoder.layers):
            if renew is None:
                x = layer(x, tables[shapes[index]], segments, index, scalars[index])
            else:
                x = _checkpointed(layer, x, tables[shapes[index]], renew, index, scalars[index])
            if index in taps:
                tapped[index] = x
        return decoder.norm(x), tapped

    def logits(self, hidden: mx.array) -> mx.array:
        """Soft-capped float32 logits."""
        cap = mx.array(self.config.text.final_logit_softcapping, dtype=mx.float32)
        return soft_cap(self.model.decoder.embed_tokens.as_linear(hidden), cap)


def _checkpointed(layer: Layer, x: mx.array, table: tuple[mx.array, mx.array], renew: Callable[[], Sequence[Segment]],
                  index: int, scalar: mx.array) -> mx.array:
    """``layer`` of ``x``, keeping nothing for the backward pass but ``x``."""
    def run(parameters: dict[str, Any], x: mx.array) -> mx.array:
        layer.update(parameters)
        return layer(x, table, renew(), index, scalar)

    return checkpoint(run, layer.trainable_parameters(), x)


def checkpoint(run: Callable[[Any, mx.array], mx.array], parameters: Any, x: mx.array) -> mx.array:
    """``run(parameters, x)``, computed a second time for its gradient in place of keeping what lies between.

    Unlike mx.checkpoint's, the second time waits for the gradient that comes from above, and the gradient that goes down waits
    for those of the parameters: MLX is free to choose an order in which it would hold what lies between for all layers at once.
    """
    flat = tree_flatten(parameters)
    names, values = [name for name, _ in flat], [value for _, value in flat]

    def on_values(x: mx.array, *values: mx.array) -> mx.array:
        return run(tree_unflatten(list(zip(names, values, strict=True))) if names else {}, x)

    function = mx.custom_function(on_values)

    @function.vjp
    def backward(inputs: Sequence[mx.array] | mx.array, cotangent: mx.array, _: mx.array) -> Any:
        if isinstance(inputs, mx.array):  # MLX unpacks what is alone
            return mx.vjp(on_values, mx.depends([inputs], [cotangent]), [cotangent])[1][0]
        below, *own = mx.vjp(on_values, mx.depends(list(inputs), [cotangent]), [cotangent])[1]
        return [*mx.depends([below], own), *own]

    out: mx.array = function(x, *values)
    return out


def _touching(blocks: Sequence[tuple[int, int]], rows: range) -> list[tuple[int, int]]:
    """Those of the ``blocks`` that have some of the ``rows``."""
    return [(start, end) for start, end in blocks if start < rows.stop and end > rows.start]


def _per_row(segments: Sequence[Segment], canvas: Sequence[mx.array], causal: Sequence[mx.array]) -> Sequence[mx.array]:
    """The scalars of all layers: one for all rows where the mode is one, else that of each row [rows, 1]."""
    if len({segment.canvas for segment in segments}) == 1:
        return canvas if segments[0].canvas else causal
    is_canvas = mx.array(np.repeat([s.canvas for s in segments], [s.rows for s in segments])[:, None])
    return mx.split(mx.where(is_canvas, mx.concatenate(canvas), mx.concatenate(causal)), len(canvas), axis=-1)


def _concatenate(arrays: Sequence[mx.array]) -> mx.array:
    return arrays[0] if len(arrays) == 1 else mx.concatenate(arrays)
