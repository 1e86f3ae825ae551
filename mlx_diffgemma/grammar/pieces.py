"""Sums and maxima of logits by column of a constraint.

A column is a set of tokens that the constraint treats alike.  The tokens are column by column in
pieces of equal size, so that few operations reduce all columns of a step.

    >>> pieces = Pieces(column_of, columns)
    >>> pieces.maxima(picked(logits, pieces.ids).max(axis=-1))      # [length, columns]
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

PIECE = 16  # tokens of one column that are reduced together
ALONE = (
    128  # from this many pieces on, a column is reduced by itself; others with those of its size
)


class Pieces:
    """The tokens in pieces, column by column.

    Args:
        column_of: The column of each token.
        columns: How many columns there are.

    Attributes:
        ids: The tokens [pieces, PIECE]; the last piece of a column is padded with its last token.
        own: One where ``ids`` holds a token, and zero where it is padded.
        column: The column of each piece.
        first: The first piece of each column, followed by the number of pieces.
        empty: Whether each column has no tokens; it then has one piece of padding.
        unfilled: The pieces that have padding.
    """

    def __init__(self, column_of: np.ndarray, columns: int) -> None:
        order = np.argsort(column_of, kind="stable")
        tokens = np.bincount(column_of, minlength=columns)
        counts = np.maximum(1, -(-tokens // PIECE))
        self.first = np.concatenate(([0], np.cumsum(counts)))
        column = np.repeat(np.arange(columns), counts)
        piece_in_column = np.arange(self.first[-1]) - self.first[column]
        place = piece_in_column[:, None] * PIECE + np.arange(PIECE)
        begin = (np.cumsum(tokens) - tokens)[column, None]
        last = tokens[column, None] - 1
        ids = order[np.clip(begin + np.minimum(place, last), 0, len(order) - 1)]
        self.ids = mx.array(ids.astype(np.int32))
        self.own = mx.array((place <= last).astype(np.float32))
        self.column = mx.array(column.astype(np.int32))
        self.empty = mx.array(tokens == 0)
        self.unfilled = mx.array(np.flatnonzero((place > last).any(axis=1)).astype(np.int32))
        self._group(counts)

    def _group(self, counts: np.ndarray) -> None:
        """Group the columns by how they are reduced.

        ``counts`` is the number of pieces of each column.  ``_slices`` are the pieces of each
        column that is reduced by itself.  ``_sets`` are the other columns by size, a power of two:
        their pieces [columns, size], and which of these are padding.  ``_back`` puts the results
        into the order of the columns.
        """
        alone = np.flatnonzero(counts >= ALONE)
        self._slices = [
            slice(int(self.first[column]), int(self.first[column + 1])) for column in alone
        ]
        self._sets: list[tuple[mx.array, mx.array]] = []
        columns_by_size = [alone]
        sizes = np.where(counts < ALONE, 1 << np.ceil(np.log2(counts)).astype(np.int64), 0)
        for size in np.unique(sizes[sizes > 0]).tolist():
            same = np.flatnonzero(sizes == size)
            columns_by_size.append(same)
            places = np.minimum(np.arange(size), counts[same, None] - 1)
            pieces = mx.array((self.first[same, None] + places).astype(np.int32))
            self._sets.append((pieces, mx.array(np.arange(size) >= counts[same, None])))
        self._back = mx.array(np.argsort(np.concatenate(columns_by_size)))

    def sums_within(self, x: mx.array) -> mx.array:
        """The sum of each piece [length, pieces] of ``x`` [length, pieces, PIECE]."""
        sums = x.sum(axis=-1)
        # A product with all of ``own`` would cost a quarter of the exponentials; few pieces have
        # padding.
        sums[:, self.unfilled] = (x[:, self.unfilled] * self.own[self.unfilled]).sum(axis=-1)
        return sums

    def maxima(self, x: mx.array) -> mx.array:
        """The maximum of each column [length, columns] of ``x`` [length, pieces]."""
        parts = [x[:, pieces].max(axis=-1, keepdims=True) for pieces in self._slices]
        for pieces, _ in self._sets:
            parts.append(picked(x, pieces).max(axis=-1))
        return self._in_order(parts)

    def sums(self, x: mx.array) -> mx.array:
        """The sum of each column [length, columns] of ``x`` [length, pieces]."""
        parts = [x[:, pieces].sum(axis=-1, keepdims=True) for pieces in self._slices]
        for pieces, is_filling in self._sets:
            parts.append(mx.where(is_filling, 0.0, picked(x, pieces)).sum(axis=-1))
        return self._in_order(parts)

    def _in_order(self, parts: list[mx.array]) -> mx.array:
        return mx.concatenate(parts, axis=-1)[:, self._back]

    def of(self, columns: np.ndarray) -> tuple[mx.array, mx.array]:
        """The pieces of one column at each position.

        Returns:
            (pieces [length, n], with padding; whether each belongs to the column)
        """
        counts = self.first[columns + 1] - self.first[columns]
        place = np.arange(counts.max())
        places = self.first[columns, None] + np.minimum(place, counts[:, None] - 1)
        return mx.array(places.astype(np.int32)), mx.array(place < counts[:, None])


def picked(x: mx.array, places: mx.array) -> mx.array:
    """The entries [length, *] of ``x`` [length, n] at ``places`` [*], in every row.

    They are taken along each row: MLX's CPU reads whole columns for ``take``, which is five times
    as slow.
    """
    return mx.take_along_axis(x, places.reshape(1, -1), axis=-1).reshape(len(x), *places.shape)


def entry_at(x: mx.array, place: mx.array) -> mx.array:
    """The entry [length, ...] of ``x`` [length, n, ...] at each position's ``place`` [length]."""
    return x[mx.arange(len(x)), place]
