"""Which keys a row of the causal mode may see.  Canvas rows need no mask: they see all that the cache shows them.

A mask is None (everything), ``"causal"`` (the fast path of MLX) or a boolean array [rows, keys], True where seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import mlx.core as mx

Mask: TypeAlias = "mx.array | str | None"


def causal_mask(past: int, rows: int, window: int | None) -> Mask:
    """Mask of ``rows`` new positions over ``past`` cached ones followed by themselves.

    ``window`` counts the positions a row may see, itself included; None means all.
    Source: create_causal_mask and create_sliding_window_causal_mask of transformers.
    """
    keys = past + rows
    if window is None or keys <= window:
        return "causal" if rows > 1 else None
    return block_mask(range(past, keys), range(keys), window, ())


def block_mask(queries: range, keys: range, window: int | None, blocks: Sequence[tuple[int, int]]) -> mx.array:
    """The same for any positions of rows and keys; ``blocks`` are (start, end) ranges of positions that see each other in both
    directions, on sliding and full layers alike, and however long (images).

    Source: blockwise_overlay of transformers.
    """
    query, key = mx.arange(queries.start, queries.stop)[:, None], mx.arange(keys.start, keys.stop)[None]
    mask = key <= query
    if window is not None:
        mask = mask & (key > query - window)
    for start, end in blocks:
        mask = mask | ((query >= start) & (query < end) & (key >= start) & (key < end))
    return mask
