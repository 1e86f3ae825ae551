"""The K/V cache of one sequence.

Entries are always in temporal order.  A full layer keeps everything, in an array with spare room,
so that a long prompt is not in memory twice while the array grows.  A sliding layer keeps its last
``window - 1`` entries, which is all that a later row may see besides itself.  Appending never
changes what another holder of the array sees, so a snapshot is a few references and a length.
``view`` changes nothing.

    >>> cache = Cache(config.text)
    >>> model.encode([ids], [cache])
    >>> before = cache.snapshot()
    >>> model.encode([more], [cache]); cache.restore(before)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import mlx.core as mx

from mlx_diffgemma.digests import digest
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.model.config import TextConfig
from mlx_diffgemma.safetensors import read_tensors, write_tensors

KeyValue = tuple[mx.array, mx.array]  # each [1, KV heads, entries, head size]
# Inside the cache both are in one array [2, KV heads, entries, head size], so that one kernel moves
# both.
FORMAT = "mlx-diffgemma cache 2"
ROOM = 1024  # positions by which a full layer's array grows when it is full


class HasWindow(Protocol):
    @property
    def window(self) -> int | None: ...


class HasLayers(Protocol):
    """The part of a model's config that a cache needs: the windows of its layers."""

    @property
    def layers(self) -> Sequence[HasWindow]: ...


@dataclass(frozen=True)
class Snapshot:
    """A point to return to: the length, and the entries of the sliding layers at that time."""

    length: int
    sliding: tuple[mx.array | None, ...]

    @property
    def nbytes(self) -> int:
        return sum(entries.nbytes for entries in self.sliding if entries is not None)


class Cache:
    """K/V of all layers for one sequence of ``length`` positions.

    ``keep_all`` keeps every entry of the sliding layers too, for training, where the canvas lies
    inside the sequence.
    """

    def __init__(self, config: HasLayers, keep_all: bool = False):
        self.windows = tuple(layer.window for layer in config.layers)
        self.keep_all = keep_all
        self.length = 0
        self._reserved = 0
        self._entries: list[mx.array | None] = [None] * len(self.windows)
        # The number of entries in each layer's array; the rest of the array is spare room.
        self._stored = [0] * len(self.windows)
        self._held: list[mx.array | None] = [None] * len(self.windows)

    def reserve(self, length: int) -> None:
        """Make room for ``length`` positions at once in the full layers that must grow."""
        self._reserved = length

    def view(self, layer: int, upto: int | None = None) -> KeyValue | None:
        """The entries that rows after position ``upto`` (default: the end) may see.

        On a sliding layer these are the last window - 1.
        """
        entries = self.entries(layer, upto)
        return None if entries is None else (entries[:1], entries[1:])

    def entries(self, layer: int, upto: int | None = None) -> mx.array | None:
        """The result of ``view`` as one array: keys, then values, [2, KV heads, entries, head
        size].
        """
        entries = self._entries[layer]
        window = self.windows[layer]
        if entries is None or upto == 0:
            return None
        stored = self._stored[layer]
        if upto is not None and not self.keep_all and window is not None and upto != self.length:
            raise ValueError(
                f"layer {layer} no longer holds the entries before position {upto}; "
                "use keep_all=True"
            )
        # With ``keep_all``, entries are at their positions.  That includes the entries of a forward
        # that ``advance`` has not counted yet.
        is_cut = window is not None and not self.keep_all
        end = stored if upto is None or is_cut else min(upto, stored)
        start = 0 if window is None else max(0, end - (window - 1))
        return _cut(entries, start, end)

    def append(self, layer: int, keys: mx.array, values: mx.array) -> None:
        """Add entries to one layer; ``advance`` counts them once all layers have theirs.

        Args:
            layer: The number of the layer.
            keys: The keys [1, KV heads, n, head size].
            values: The values, in the same shape.
        """
        self.add(layer, mx.concatenate((keys, values)))

    def add(self, layer: int, new: mx.array) -> None:
        """Append one array to one layer: keys, then values, [2, KV heads, n, head size]."""
        entries = self._entries[layer]
        window = self.windows[layer]
        if window is None and not self.keep_all:
            stored = self._stored[layer]
            room = new[:, :, :0] if entries is None else entries
            self._stored[layer] = stored + new.shape[2]
            self._entries[layer] = self._written(room, new, stored)
            return
        if entries is not None:
            new = mx.concatenate((entries, new), axis=2)
        elif not self.keep_all:
            # Attention passes a slice of an array that holds the queries too.
            new = mx.contiguous(new)
        if window is not None and not self.keep_all and new.shape[2] > window - 1:
            # A slice would keep the whole array alive.
            new = mx.contiguous(new[:, :, new.shape[2] - (window - 1) :])
        self._entries[layer] = new
        self._stored[layer] = new.shape[2]

    def _written(self, room: mx.array, new: mx.array, stored: int) -> mx.array:
        """Write new entries into an array; MLX writes in place if nothing else refers to the array.

        Args:
            room: The array.
            new: The entries.
            stored: The position of the first one.
        """
        needed = stored + new.shape[2]
        if needed > room.shape[2]:
            size = max(self._reserved, -(-needed // ROOM) * ROOM)
            empty = mx.zeros((*room.shape[:2], size - stored, room.shape[3]), dtype=room.dtype)
            room = mx.concatenate((room[:, :, :stored], empty), axis=2) if stored else empty
        return mx.slice_update(room, new, mx.array([stored]), axes=[2])

    def advance(self, count: int) -> None:
        self.length += count

    def hold(self, layer: int, keys: mx.array, values: mx.array) -> None:
        """Keep entries aside that may still be rejected.  ``view`` does not show them.

        Args:
            layer: The number of the layer.
            keys: The keys [1, KV heads, n, head size].
            values: The values, in the same shape.
        """
        self.hold_entries(layer, mx.concatenate((keys, values)))

    def hold_entries(self, layer: int, new: mx.array) -> None:
        """Hold one array for one layer: keys, then values, [2, KV heads, n, head size]."""
        self._held[layer] = new

    def accept(self, count: int) -> None:
        """Append the first ``count`` held entries of every layer and drop the rest."""
        for layer, held in enumerate(self._held):
            if held is None or count > held.shape[2]:
                raise ValueError(f"layer {layer} holds fewer than {count} entries")
        for layer, held in enumerate(self._held):
            if held is not None and count:
                self.add(layer, _cut(held, 0, count))
            self._held[layer] = None
        self.advance(count)

    def snapshot(self) -> Snapshot:
        sliding = tuple(
            None if window is None else entries
            for window, entries in zip(self.windows, self._entries, strict=True)
        )
        return Snapshot(self.length, sliding)

    def restore(self, snapshot: Snapshot) -> None:
        """Return to ``snapshot``, taken from this cache or from the cache that this is a copy of."""
        if snapshot.length > self.length:
            raise ValueError(
                f"snapshot at {snapshot.length} lies ahead of this cache at {self.length}"
            )
        for layer, (window, entries) in enumerate(zip(self.windows, self._entries, strict=True)):
            if window is not None:
                self._entries[layer] = kept = snapshot.sliding[layer]
                self._stored[layer] = 0 if kept is None else kept.shape[2]
            elif entries is not None:
                self._stored[layer] = snapshot.length
                if not snapshot.length:
                    self._entries[layer] = None
                elif self.keep_all:  # these arrays have no spare room
                    self._entries[layer] = _cut(entries, 0, snapshot.length)
        self._held = [None] * len(self.windows)
        self.length = snapshot.length

    def copy(self) -> Cache:
        """An independent cache with the same content.

        The arrays are shared, because nothing writes into them.
        """
        twin = object.__new__(Cache)
        twin.windows = self.windows
        twin.keep_all = self.keep_all
        twin.length = self.length
        twin._reserved = 0
        twin._entries = list(self._entries)
        twin._stored = list(self._stored)
        twin._held = list(self._held)
        return twin

    @classmethod
    def like(cls, other: Cache) -> Cache:
        """An empty cache of the same layers."""
        twin = other.copy()
        twin.length = 0
        twin._entries = [None] * len(other.windows)
        twin._held = [None] * len(other.windows)
        twin._stored = [0] * len(other.windows)
        return twin

    @property
    def arrays(self) -> list[mx.array]:
        """All entries, without the spare room."""
        return [
            _cut(entries, 0, stored)
            for entries, stored in zip(self._entries, self._stored, strict=True)
            if entries is not None
        ]

    @property
    def nbytes(self) -> int:
        """The bytes of the entries and of the spare room."""
        return sum(entries.nbytes for entries in self._entries if entries is not None)

    def save(self, path: Path | str, metadata: dict[str, str] | None = None) -> None:
        """Write to a safetensors file; ``load`` returns the ``metadata``.

        Raises:
            UserError: The file cannot be written.
        """
        tensors = {}
        for layer, entries in enumerate(self._entries):
            if entries is not None:
                keys, values = mx.split(_cut(entries, 0, self._stored[layer]), 2)
                tensors[f"{layer}.keys"] = mx.contiguous(keys)
                tensors[f"{layer}.values"] = mx.contiguous(values)
        header = {
            **(metadata or {}),
            "format": FORMAT,
            "length": str(self.length),
            "keep_all": str(self.keep_all),
        }
        header["digest"] = _digest(tensors, header)
        write_tensors(Path(path), tensors, header)

    @classmethod
    def load(cls, path: Path | str, config: TextConfig) -> tuple[Cache, dict[str, str]]:
        """Read a cache and its metadata from a file.

        Raises:
            UserError: The file is damaged, of an earlier version or of another model shape.
        """
        try:
            tensors, header = read_tensors(Path(path))
        except UserError:
            raise UserError(
                f"{path} is not a cache file, or is damaged; delete it, or name another file."
            ) from None
        if header.get("format") != FORMAT:
            raise UserError(
                f"{path} is not a cache file of this version (format {header.get('format')!r}, "
                f"expected {FORMAT!r}); delete it, or name another file."
            )
        length = header.get("length", "")
        if not length.isdecimal() or header.get("digest") != _digest(tensors, header):
            raise UserError(f"{path} is damaged; delete it, or name another file.")
        cache = cls(config, keep_all=header.get("keep_all") == "True")
        cache.length = int(length)
        if not cache.length:
            return cache, header
        for index, layer in enumerate(config.layers):
            shape = (1, layer.num_kv_heads, cache._expected(index), layer.head_dim)
            keys = tensors.get(f"{index}.keys")
            values = tensors.get(f"{index}.values")
            if keys is None or values is None or keys.shape != shape or values.shape != shape:
                content = "nothing"
                if keys is not None and values is not None:
                    content = f"{keys.shape} and {values.shape}"
                raise UserError(
                    f"{path} was made with another model: layer {index} should hold {shape} "
                    f"and holds {content}."
                )
            cache._entries[index] = mx.concatenate((keys, values))
            cache._stored[index] = shape[2]
        mx.eval(cache.arrays)  # here, because the cache may be used on another thread
        return cache, header

    def _expected(self, layer: int) -> int:
        """How many entries a layer keeps after ``length`` positions."""
        window = self.windows[layer]
        return self.length if window is None or self.keep_all else min(self.length, window - 1)


def _digest(tensors: Mapping[str, mx.array], header: Mapping[str, str]) -> str:
    """Digest of everything in a cache file."""
    fields = {name: value for name, value in header.items() if name != "digest"}
    return digest(sorted(tensors.items()), json.dumps(fields, sort_keys=True))


def _cut(entries: mx.array, start: int, end: int) -> mx.array:
    if start == 0 and end == entries.shape[2]:
        return entries
    return entries[:, :, start:end]
