"""Attention of the backbone: segments, rotary positions, and attention over a cache.

A *segment* is a run of rows that belong to one sequence.  All rows of a forward go through the
projections together.  The attention itself runs segment by segment, each over its own cache, so
rows of a batch need no padding and no mask between sequences.

    >>> table = rope_table(mx.arange(position, position + rows), config.layers[0])
    >>> attention(x, table, [Segment(0, rows, cache)], 0)         # [rows, hidden]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_diffgemma.model.cache import Cache
from mlx_diffgemma.model.config import LayerConfig, TextConfig
from mlx_diffgemma.model.joined import JoinedLinear, join
from mlx_diffgemma.model.layers import (
    RMSNorm,
    attend_in_turn,
    is_fused,
    rms_norm,
    rope_frequencies,
    rows_at_once,
    turn,
)
from mlx_diffgemma.model.masks import Mask, block_mask, causal_mask

MASK_KEPT = 2**22  # a mask of at most this many entries is kept for the layers that follow
SIGNS = mx.array(np.array([[-1.0], [1.0]], dtype=np.float32))


@dataclass(frozen=True)
class Segment:
    """Rows ``start`` to ``stop`` of a forward: the next positions of one sequence.

    Canvas rows see each other and the cache, and write nothing.  Causal rows write their K/V into
    the cache.

    Args:
        start: The first row of the segment in the forward.
        stop: The row after its last.
        cache: The cache of the sequence.
        canvas: Whether the rows run in the canvas mode.
        after: How many rows of an earlier segment of the same forward and sequence come before.
        at: The position of the first row, where it lies inside the cached sequence.  The rows then
            see only what comes before that position.
        write: ``"hold"`` keeps the K/V of causal rows aside instead of appending them.
        blocks: Ranges (start, end) inside the segment whose rows see each other both ways.
        masks: The masks made so far, shared by all layers.
    """

    start: int
    stop: int
    cache: Cache
    canvas: bool = False
    after: int = 0
    at: int | None = None
    write: Literal["append", "hold"] = "append"
    blocks: tuple[tuple[int, int], ...] = ()
    masks: dict[Any, mx.array] = field(default_factory=dict, compare=False, repr=False)

    @property
    def rows(self) -> int:
        return self.stop - self.start

    @property
    def position(self) -> int:
        """The position of the first row in the sequence."""
        return self.cache.length + self.after if self.at is None else self.at


class RowBlock(NamedTuple):
    """Rows ``start`` to ``stop`` of a segment; they may see the keys ``first`` to ``last``."""

    start: int
    stop: int
    first: int
    last: int


@lru_cache
def head_numbers(heads: int) -> mx.array:
    """The numbers 0, 1, 2 and so on, in the shape [heads, 1, 1]."""
    return mx.array(np.arange(heads, dtype=np.int32)[:, None, None])


@partial(mx.compile, shapeless=True)
def _turns(
    positions: mx.array, frequencies: mx.array, signs: mx.array
) -> tuple[mx.array, mx.array]:
    angles = positions.astype(mx.float32) * frequencies
    return mx.cos(angles), mx.sin(angles) * signs


def rope_table(positions: mx.array, layer: LayerConfig) -> tuple[mx.array, mx.array]:
    """The rotary table of a layer, in float32.

    "proportional" RoPE rotates only the first ``layer.rotated`` pairs but keeps the full head size
    in the exponent.  The angles are products of float32 numbers, exactly as in the reference.
    MLX's fused RoPE divides and, on Metal, uses fast trigonometry, which drifts at long contexts.

    Returns:
        cos [rows, 1, 1, head_dim / 2] and (-sin, sin) [rows, 1, 2, head_dim / 2].
    """
    return _turns(positions[:, None, None, None], layer_frequencies(layer), SIGNS)


@lru_cache
def layer_frequencies(layer: LayerConfig) -> mx.array:
    """The frequencies [head_dim / 2] in float32, zero for the pairs that are not rotated."""
    turned = mx.array(np.arange(layer.head_dim // 2) < layer.rotated)
    frequencies = mx.where(turned, rope_frequencies(layer.rope_theta, layer.head_dim), 0.0)
    mx.eval(frequencies)  # evaluated here, because any thread may use it later
    return frequencies


@dataclass(frozen=True)
class HeadWeights:
    """The norm weights of all heads, in float32 [heads, 2, head_dim / 2].

    Args:
        norms: The parameters this was computed from.
        weights: The weights: queries, keys, and ones for the values.
        swapped: The same with the two halves of each head exchanged.
    """

    norms: tuple[mx.array, mx.array]
    weights: mx.array
    swapped: mx.array


class Attention(nn.Module):
    """Grouped-query attention at scale 1 over segments.

    Source: DiffusionGemma{Encoder,Decoder}TextAttention.
    """

    def __init__(self, config: TextConfig, layer: LayerConfig):
        super().__init__()
        self.heads = config.num_attention_heads
        self.kv_heads = layer.num_kv_heads
        self.head_dim = layer.head_dim
        self.window = layer.window
        self.eps = config.rms_norm_eps
        width = self.heads * self.head_dim
        kv_width = self.kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        if layer.has_value_projection:
            self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(self.head_dim, self.eps)
        self.k_norm = RMSNorm(self.head_dim, self.eps)
        self._joined: JoinedLinear | None = None
        self._head_weights: HeadWeights | None = None

    @property
    def _projections(self) -> list[nn.Module]:
        return [self[name] for name in ("q_proj", "k_proj", "v_proj") if name in self]

    def join(self) -> None:
        """Lay the projection matrices into one array, so that one product takes the place of three.

        The matrices become views of that array.
        """
        self._joined = join(self._projections)
        self._head_weights = self._weigh_heads()
        mx.eval(self._head_weights.weights, self._head_weights.swapped)

    def _project(self, x: mx.array) -> mx.array:
        """Project rows to queries, keys and, where the layer has them, values.

        Returns:
            [rows, heads of all, head_dim]
        """
        if self._joined is not None and not self._joined.holds(self._projections):
            self._joined = None  # the weights were replaced: trained, adapted or cast
        if self._joined is not None:
            return self._joined(x).reshape(x.shape[0], -1, self.head_dim)
        return mx.concatenate([projection(x) for projection in self._projections], axis=-1).reshape(
            x.shape[0], -1, self.head_dim
        )

    def _weigh_heads(self) -> HeadWeights:
        """The present head weights of the norms."""
        norms = (self.q_norm.weight, self.k_norm.weight)
        if self._head_weights is not None and all(
            a is b for a, b in zip(self._head_weights.norms, norms, strict=True)
        ):
            return self._head_weights
        self._head_weights = None
        counts = (self.heads, self.kv_heads, self.kv_heads)
        parts = [
            mx.broadcast_to(weight.astype(mx.float32), (heads, self.head_dim))
            for weight, heads in zip((*norms, mx.ones((self.head_dim,))), counts, strict=True)
        ]
        weights = mx.concatenate(parts).reshape(-1, 2, self.head_dim // 2)
        return HeadWeights(norms, weights, mx.contiguous(weights[:, ::-1]))

    def __call__(
        self, x: mx.array, table: tuple[mx.array, mx.array], segments: Sequence[Segment], index: int
    ) -> mx.array:
        """Attention of all rows.

        Args:
            x: Normed rows [rows, hidden].
            table: The rotary table of this layer's shape, from ``rope_table``.
            segments: The segments that the rows fall into, in order.
            index: The number of this layer in the caches.

        Returns:
            [rows, hidden]
        """
        rows = x.shape[0]
        projected = rms_norm(self._project(x), None, self.eps)
        if "v_proj" not in self:  # the values are the keys, before norm weights and rotation
            projected = mx.concatenate((projected, projected[:, self.heads :]), axis=1)
        halves = projected.reshape(rows, -1, 2, self.head_dim // 2)
        norms = self._weigh_heads()
        wide, narrow = turn(
            halves,
            halves[:, :, ::-1],
            norms.weights,
            norms.swapped,
            head_numbers(halves.shape[1]),
            table,
            self.heads + self.kv_heads,
        )
        # Attention takes [1, heads, rows, head_dim], and the cache takes [2, KV heads, rows,
        # head_dim].
        queries = wide.reshape(rows, -1, self.head_dim)[:, : self.heads].transpose(1, 0, 2)[None]
        entries = narrow.reshape(rows, -1, self.head_dim)[:, self.heads :]
        entries = entries.reshape(rows, 2, self.kv_heads, self.head_dim).transpose(1, 2, 0, 3)
        parts = []
        for segment in segments:
            own_queries = queries[:, :, segment.start : segment.stop]
            new_entries = entries[:, :, segment.start : segment.stop]
            parts.append(self._attend(segment, index, own_queries, new_entries))
        out = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)
        return self.o_proj(out.squeeze(0).transpose(1, 0, 2).reshape(rows, -1).astype(x.dtype))

    def _attend(
        self, segment: Segment, index: int, queries: mx.array, entries: mx.array
    ) -> mx.array:
        """Attention of one segment.

        Args:
            segment: The segment.
            index: The number of this layer in the cache.
            queries: Its queries in float32 [1, heads, rows, head_dim].
            entries: Its new keys and values [2, KV heads, rows, head_dim].

        Returns:
            [1, heads, rows, head_dim]
        """
        entries = self._write_and_extend(segment, index, entries)
        # Attention is computed in float32.  MLX has no fused kernel at head sizes 256 and 512 and
        # would round the scores to the compute dtype, which at attention scale 1 moves the weights
        # visibly in bf16. For the same reason the scores are held in full, so long contexts are
        # computed a few rows at a time. K/V are cast once for all blocks.  Where the GPU does have
        # a kernel, the kernel keeps the scores in float32 and reads K/V as they are in the cache.
        if is_fused(segment.rows, self.heads, self.kv_heads, self.head_dim):
            queries = queries.astype(entries.dtype)
        else:
            entries = entries.astype(mx.float32)
        keys = entries[:1]
        values = entries[1:]
        parts = []
        for block in self._row_blocks(segment, keys.shape[2]):
            seen = slice(block.first, block.last)
            mask = self._mask(segment, block, keys.shape[2] - segment.rows)
            parts.append(
                (
                    queries[:, :, block.start : block.stop],
                    keys[:, :, seen],
                    values[:, :, seen],
                    mask,
                )
            )
        return attend_in_turn(parts)

    def _write_and_extend(self, segment: Segment, index: int, entries: mx.array) -> mx.array:
        """Write the new entries of causal rows into the cache.

        Args:
            segment: The segment.
            index: The number of this layer in the cache.
            entries: Its new keys and values [2, KV heads, rows, head_dim].

        Returns:
            All entries that the segment may see.
        """
        past = segment.cache.entries(index, segment.at)
        if not segment.canvas:
            write = segment.cache.add if segment.write == "append" else segment.cache.hold_entries
            write(index, entries)
        if self.window is None and not segment.canvas and segment.write == "append":
            # The cache has past and new rows in one array, so they need not be copied again.
            together = segment.cache.entries(index)
            return entries if together is None else together
        if past is None:
            return entries
        return mx.concatenate((past, entries), axis=2)

    def _mask(self, segment: Segment, block: RowBlock, past: int) -> Mask:
        """The mask of a block of rows over its keys.

        Args:
            segment: The segment.
            block: The block of its rows.
            past: How many keys come before those of the segment.
        """
        rows = range(past + block.start, past + block.stop)
        blocks = [(past + start, past + end) for start, end in segment.blocks]
        touching = _touching(blocks, rows)
        if touching:
            return block_mask(rows, range(block.first, block.last), self.window, touching)
        if segment.canvas:
            return None
        return self._causal_mask(segment, block.last - block.first - len(rows), len(rows))

    def _causal_mask(self, segment: Segment, past: int, rows: int) -> Mask:
        """The causal mask of new rows.  A small one is made once for all layers.

        Args:
            segment: The segment, which keeps small masks.
            past: How many keys come before the rows.
            rows: How many rows.
        """
        key = (past, rows, self.window)
        if key in segment.masks:
            return segment.masks[key]
        mask = causal_mask(past, rows, self.window)
        if mask is not None and rows * (past + rows) <= MASK_KEPT:
            if isinstance(mask, str):
                mask = block_mask(range(past, past + rows), range(past + rows), None, ())
            segment.masks[key] = mask
        return mask

    def _row_blocks(self, segment: Segment, keys: int) -> Iterator[RowBlock]:
        """Divide the rows of a segment into blocks whose scores stay within bounds.

        A single row left over joins the block before it: it would take other kernels and round
        differently.
        """
        past = keys - segment.rows
        window = None if segment.canvas else self.window
        longest = max((end - start for start, end in segment.blocks), default=0)
        width = keys if window is None else min(keys, 2 * window + longest)
        rows = rows_at_once(self.heads, width)
        if window is not None:
            rows = min(rows, max(2, window))
        start = 0
        while start < segment.rows:
            stop = segment.rows if segment.rows - start <= rows + 1 else start + rows
            if segment.canvas:
                yield RowBlock(start, stop, 0, keys)
            else:
                touching = _touching(segment.blocks, range(start, stop))
                first = 0
                if window is not None:
                    earliest = min([start - window + 1, *(begin for begin, _ in touching)])
                    first = max(0, past + earliest)
                last = past + max([stop, *(end for _, end in touching)])
                yield RowBlock(start, stop, first, last)
            start = stop


def _touching(blocks: Sequence[tuple[int, int]], rows: range) -> list[tuple[int, int]]:
    """The ``blocks`` that contain at least one of the ``rows``."""
    return [(start, end) for start, end in blocks if start < rows.stop and end > rows.start]
