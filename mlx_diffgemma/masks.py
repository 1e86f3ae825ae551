"""Which keys a row of the causal mode may see.  Canvas rows need no mask: they see all that the cache shows them.

A mask is None (everything), ``"causal"`` (the fast path of MLX) or a boolean array [rows, keys], True where seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import mlx.core as mx

Mask: TypeAlias = "mx.array | str | None"


def causal_mask(past: int, rows: int, window: int | None, blocks: Sequence[tuple[int, int]] = ()) -> Mask:
    """Mask of ``rows`` new positions over ``past`` cached ones followed by themselves.

    ``window`` counts the positions a row may see, itself included; None means all.  ``blocks`` are (start, end) ranges
    of the new rows that see each other in both directions, on sliding and full layers alike (images).
    Source: create_causal_mask and create_sliding_window_causal_mask of transformers.
    """
    keys = past + rows
    if not blocks and (window is None or keys <= window):
        return "causal" if rows > 1 else None
    query = mx.arange(past, keys)[:, None]
    key = mx.arange(keys)[None]
    mask = key <= query
    if window is not None:
        mask = mask & (key > query - window)
    for start, end in blocks:
        inside_query = (query >= past + start) & (query < past + end)
        mask = mask | (inside_query & (key >= past + start) & (key < past + end))
    return mask
