"""Which keys a row of the causal mode may see.

Canvas rows need no mask: they see everything that the cache shows them.  A mask is None
(everything), ``"causal"`` (the fast path of MLX) or a boolean array [rows, keys], True where a key
is seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import mlx.core as mx

Mask: TypeAlias = "mx.array | str | None"


def causal_mask(past: int, rows: int, window: int | None) -> Mask:
    """The mask of new rows over cached positions and the rows themselves.

    Source: create_causal_mask and create_sliding_window_causal_mask of transformers.

    Args:
        past: How many cached positions come before the rows.
        rows: How many rows.
        window: How many positions a row may see, itself included; None means all.
    """
    keys = past + rows
    if window is None or keys <= window:
        return "causal" if rows > 1 else None
    return block_mask(range(past, keys), range(keys), window, ())


def block_mask(
    queries: range, keys: range, window: int | None, blocks: Sequence[tuple[int, int]]
) -> mx.array:
    """The mask as an array, for any rows and any keys.

    Source: blockwise_overlay of transformers.

    Args:
        queries: The positions of the rows.
        keys: The positions of the keys.
        window: How many positions a row may see, itself included; None means all.
        blocks: Ranges (start, end) of positions that see each other in both directions, on sliding
            and full layers alike and whatever their length (images).
    """
    query = mx.arange(queries.start, queries.stop)[:, None]
    key = mx.arange(keys.start, keys.stop)[None]
    mask = key <= query
    if window is not None:
        mask = mask & (key > query - window)
    for start, end in blocks:
        mask = mask | ((query >= start) & (query < end) & (key >= start) & (key < end))
    return mask
