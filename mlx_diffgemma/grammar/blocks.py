"""Sums and maxima of many runs of numbers at once, in numpy.

>>> blocks = Blocks(begins, counts)
>>> blocks.maxima(values[blocks.entries])      # of each run, in the order ``blocks.order``
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

LOWEST = -1e300  # stands for minus infinity where it is subtracted
BLOCK = 800  # one more block costs as much as this many places
NEGLIGIBLE = -230.0  # the log of a number that vanishes beside one; float64 is still fast there
NOTHING = float(np.exp(np.full(64, NEGLIGIBLE))[0])


class Blocks:
    """A layout of runs of entries in which all runs of about one length are reduced together.

    Such runs are the columns of a block, whose rows are their first entries, their second ones and
    so on.  The blocks follow one another.  numpy reduces them several times as fast as runs
    (``reduceat``).

    Attributes:
        order: The runs in the order of the results.
        entries: The entry at each place [places], -1 where a run has none.
        parts: The places and the runs of each block.
    """

    def __init__(self, begins: np.ndarray, counts: np.ndarray, price: int = BLOCK) -> None:
        self.order = np.argsort(-counts, kind="stable")
        begins = begins[self.order]
        counts = counts[self.order]
        self.parts: list[tuple[slice, slice]] = []
        entries = []
        place = 0
        for first, last in _cut(counts, price):
            row = np.arange(counts[first])[:, None]
            entries.append(np.where(row < counts[first:last], begins[first:last] + row, -1).ravel())
            self.parts.append((slice(place, place + entries[-1].size), slice(first, last)))
            place += entries[-1].size
        self.entries = np.concatenate(entries)

    def run(self, number: int) -> slice:
        """The places of a run, by its number in ``order``."""
        places, runs = next(part for part in self.parts if number < part[1].stop)
        return slice(places.start + number - runs.start, places.stop, runs.stop - runs.start)

    def _views(self, x: np.ndarray) -> Iterator[tuple[np.ndarray, slice]]:
        """Each block [rows, runs, ...] of ``x`` [places, ...], and its runs."""
        for places, runs in self.parts:
            yield x[places].reshape(-1, runs.stop - runs.start, *x.shape[1:]), runs

    def maxima(self, x: np.ndarray) -> np.ndarray:
        """The maximum of each run [runs, ...] of ``x`` [places, ...]."""
        maxima = np.empty((len(self.order), *x.shape[1:]))
        for block, runs in self._views(x):
            block.max(axis=0, out=maxima[runs])
        return maxima

    def sums(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sum the exponentials of each run.

        ``x`` is overwritten with the exponentials, divided by the largest of the run.

        Returns:
            (the log of the sum of the exponentials [runs, ...], the sum of the new ``x``)
        """
        top = np.maximum(self.maxima(x), LOWEST)
        total = np.empty((len(self.order), *x.shape[1:]))
        for block, runs in self._views(x):
            block -= top[runs]
        _exponentials(x)
        for block, runs in self._views(x):
            block.sum(axis=0, out=total[runs])
        with np.errstate(divide="ignore"):
            return top + np.log(total), total

    def multiply(self, x: np.ndarray, factors: np.ndarray) -> None:
        """Multiply each run of ``x`` [places] by its factor in ``factors`` [runs]."""
        for block, runs in self._views(x):
            block *= factors[runs]


def _exponentials(x: np.ndarray) -> None:
    """Replace numbers, at most zero, by their exponentials.

    The result is exactly zero below NEGLIGIBLE, because numpy takes ten times as long near
    underflow.
    """
    np.maximum(x, NEGLIGIBLE, out=x)
    np.exp(x, out=x)
    x -= NOTHING


def _cut(counts: np.ndarray, price: int) -> list[tuple[int, int]]:
    """Divide descending ``counts`` into the blocks (first, last) with the fewest places.

    One more block counts as ``price`` places; ``last`` is not in the block.
    """
    starts = np.flatnonzero(np.diff(counts, prepend=-1)).tolist()
    ends = [*starts[1:], len(counts)]
    # The lowest cost up to each of ``starts``, and the blocks that have it.
    best: list[tuple[int, list[tuple[int, int]]]] = [(0, [])]
    for place, end in enumerate(ends):
        cost, begin = min(
            (best[begin][0] + int(counts[start]) * (end - start) + price, begin)
            for begin, start in enumerate(starts[: place + 1])
        )
        best.append((cost, [*best[begin][1], (starts[begin], end)]))
    return best[-1][1]


class SetSums:
    """Sums over the members [sets, members] of sets."""

    def __init__(self, holds: np.ndarray) -> None:
        sets, members = np.nonzero(holds)
        begins = np.searchsorted(sets, np.arange(len(holds) + 1))
        # A place holds a row of numbers here.
        self.blocks = Blocks(begins[:-1], np.diff(begins), BLOCK // 200)
        self.members = np.append(members, holds.shape[1])[self.blocks.entries]
        self.back = np.argsort(self.blocks.order)

    def _taken(self, x: np.ndarray) -> np.ndarray:
        """``x`` [length, members] as [places, length]."""
        return np.concatenate((x.T, np.full((1, len(x)), -np.inf)))[self.members]

    def log_sums(self, x: np.ndarray) -> np.ndarray:
        """The log of the sum over each set [length, sets]; ``x`` [length, members] holds
        logarithms.
        """
        return self.blocks.sums(self._taken(x))[0][self.back].T

    def maxima(self, x: np.ndarray) -> np.ndarray:
        return self.blocks.maxima(self._taken(x))[self.back].T
