"""The search for the length of a hole: first lengths over the whole range, then near the best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

# Up to this number, all lengths are tried in one batch.  If there are more, this many are tried
# first, then those near the best.
TRIED = 16


@dataclass(frozen=True)
class Search:
    """How far the length of a hole is searched.

    Attributes:
        side: The number of lengths that are tried together.
        most: The most lengths that are tried in total; None: no limit.
        seconds: After this time, no further lengths are tried; None: no limit.
        short: Whether the first lengths are closer together where they are short.
    """

    side: int = TRIED
    most: int | None = None
    seconds: float | None = None
    short: bool = False


QUICK = Search(side=4, most=8, seconds=10.0, short=True)  # for an editor that waits


def next_lengths(
    lengths: Sequence[int],
    scores: Mapping[int, float],
    search: Search = Search(),  # noqa: B008 (frozen)
    seconds: float = 0.0,
) -> list[int]:
    """The lengths to try next.

    Args:
        lengths: All lengths that the hole may have, ascending.
        scores: The scores of the lengths that were tried.
        search: How far to search.
        seconds: The time that was spent.

    Returns:
        The next lengths, ascending.  Empty when the search is over.
    """
    side = search.side if search.most is None else min(search.side, search.most - len(scores))
    if side < 1 or (scores and search.seconds is not None and seconds > search.seconds):
        return []
    wanted = list(lengths)
    if scores:
        tried = sorted(scores)
        best = tried.index(max(tried, key=lambda length: scores[length]))
        low = tried[max(0, best - 1)]
        high = tried[min(len(tried) - 1, best + 1)]
        wanted = [length for length in lengths if low < length < high and length not in scores]
    if len(wanted) <= side:
        return wanted
    if search.short and not scores:
        return sorted({wanted[round(index) - 1] for index in np.geomspace(1, len(wanted), side)})
    if side == 1:
        return [wanted[len(wanted) // 2]]
    return [wanted[round(index)] for index in np.linspace(0, len(wanted) - 1, side)]
