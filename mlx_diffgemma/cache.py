"""The K/V cache of one sequence.

Entries are always in temporal order.  A full layer keeps everything, in an array with room for more, so that a long
prompt does not lie in memory twice while it grows; a sliding layer keeps its last ``window - 1`` entries, which is all a
later row may see beside itself.  Appending never changes what another holder of the array sees, so a snapshot is a few
references and a length.  ``view`` mutates nothing.

    >>> cache = Cache(config.text)
    >>> model.encode([ids], [cache])
    >>> before = cache.snapshot()
    >>> model.encode([more], [cache]); cache.restore(before)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import mlx.core as mx

from mlx_diffgemma.config import TextConfig
from mlx_diffgemma.errors import UserError

KeyValue = tuple[mx.array, mx.array]  # each [1, KV heads, entries, head size]
FORMAT = "mlx-diffgemma cache 1"
ROOM = 1024  # positions by which a full layer's array grows when it is full


class HasWindow(Protocol):
    @property
    def window(self) -> int | None: ...


class HasLayers(Protocol):
    """A model's config, as far as a cache needs it: the windows of its layers."""

    @property
    def layers(self) -> Sequence[HasWindow]: ...


@dataclass(frozen=True)
class Snapshot:
    """A point to go back to: the length, and the entries of the sliding layers as they were."""

    length: int
    sliding: tuple[KeyValue | None, ...]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for entries in self.sliding if entries is not None for array in entries)


class Cache:
    """K/V of all layers for one sequence of ``length`` positions.

    ``keep_all`` keeps every entry of the sliding layers too, for training, where the canvas lies inside the sequence.
    """

    def __init__(self, config: HasLayers, keep_all: bool = False):
        self.windows = tuple(layer.window for layer in config.layers)
        self.keep_all = keep_all
        self.length = 0
        self._reserved = 0
        self._entries: list[KeyValue | None] = [None] * len(self.windows)
        self._stored = [0] * len(self.windows)  # how many positions of each layer's arrays are entries, not room
        self._held: list[KeyValue | None] = [None] * len(self.windows)

    def reserve(self, length: int) -> None:
        """Full layers that must grow make room for ``length`` positions at once."""
        self._reserved = length

    def view(self, layer: int, upto: int | None = None) -> KeyValue | None:
        """What rows after position ``upto`` (default: the end) may see: on a sliding layer the last window - 1 entries."""
        entries, window = self._entries[layer], self.windows[layer]
        if entries is None or upto == 0:
            return None
        stored = self._stored[layer]
        if upto is not None and not self.keep_all and window is not None and upto != self.length:
            raise ValueError(f"layer {layer} no longer holds the entries before position {upto}; use keep_all=True")
        # Where all is kept, entries stand at their positions, also those of a forward that ``advance`` has not counted yet.
        end = stored if upto is None or (window is not None and not self.keep_all) else min(upto, stored)
        start = 0 if window is None else max(0, end - (window - 1))
        return _cut(entries, start, end)

    def append(self, layer: int, keys: mx.array, values: mx.array) -> None:
        """Add entries [1, KV heads, n, head size] to one layer; ``advance`` counts them once all layers have theirs."""
        entries, window = self._entries[layer], self.windows[layer]
        if window is None and not self.keep_all:
            stored = self._stored[layer]
            self._stored[layer] = stored + keys.shape[2]
            room = entries or (keys[:, :, :0], values[:, :, :0])
            self._entries[layer] = (self._written(room[0], keys, stored), self._written(room[1], values, stored))
            return
        if entries is not None:
            keys, values = mx.concatenate((entries[0], keys), axis=2), mx.concatenate((entries[1], values), axis=2)
        if window is not None and not self.keep_all and keys.shape[2] > window - 1:
            # A slice would keep the whole array alive.
            keys, values = (mx.contiguous(t[:, :, t.shape[2] - (window - 1) :]) for t in (keys, values))
        self._entries[layer], self._stored[layer] = (keys, values), keys.shape[2]

    def _written(self, room: mx.array, new: mx.array, stored: int) -> mx.array:
        """``room`` with ``new`` from position ``stored`` on; MLX writes in place where nobody else holds the array."""
        needed = stored + new.shape[2]
        if needed > room.shape[2]:
            size = max(self._reserved, -(-needed // ROOM) * ROOM)
            empty = mx.zeros((*room.shape[:2], size - stored, room.shape[3]), dtype=room.dtype)
            room = mx.concatenate((room[:, :, :stored], empty), axis=2) if stored else empty
        return mx.slice_update(room, new, mx.array([stored]), axes=[2])

    def advance(self, count: int) -> None:
        self.length += count

    def hold(self, layer: int, keys: mx.array, values: mx.array) -> None:
        """Keep entries aside that are not certain yet; ``view`` does not show them."""
        self._held[layer] = (keys, values)

    def accept(self, count: int) -> None:
        """Append the first ``count`` held entries of every layer and drop the rest."""
        for layer, held in enumerate(self._held):
            if held is None or count > held[0].shape[2]:
                raise ValueError(f"layer {layer} holds fewer than {count} entries")
        for layer, held in enumerate(self._held):
            if held is not None and count:
                self.append(layer, *_cut(held, 0, count))
            self._held[layer] = None
        self.advance(count)

    def snapshot(self) -> Snapshot:
        sliding = tuple(None if window is None else entries
                        for window, entries in zip(self.windows, self._entries, strict=True))
        return Snapshot(self.length, sliding)

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to ``snapshot``, taken from this cache or from one this was copied from."""
        if snapshot.length > self.length:
            raise ValueError(f"snapshot at {snapshot.length} lies ahead of this cache at {self.length}")
        for layer, (window, entries) in enumerate(zip(self.windows, self._entries, strict=True)):
            if window is not None:
                self._entries[layer] = kept = snapshot.sliding[layer]
                self._stored[layer] = 0 if kept is None else kept[0].shape[2]
            elif entries is not None:
                self._stored[layer] = snapshot.length
                if not snapshot.length:
                    self._entries[layer] = None
                elif self.keep_all:  # without room for more
                    self._entries[layer] = _cut(entries, 0, snapshot.length)
        self._held = [None] * len(self.windows)
        self.length = snapshot.length

    def copy(self) -> Cache:
        """An independent cache with the same content; arrays are shared, since nothing writes into them."""
        twin = object.__new__(Cache)
        twin.windows, twin.keep_all, twin.length, twin._reserved = self.windows, self.keep_all, self.length, 0
        twin._entries, twin._stored, twin._held = list(self._entries), list(self._stored), list(self._held)
        return twin

    @classmethod
    def like(cls, other: Cache) -> Cache:
        """An empty cache of the same layers."""
        twin = other.copy()
        twin._entries, twin._held, twin.length = [None] * len(other.windows), [None] * len(other.windows), 0
        twin._stored = [0] * len(other.windows)
        return twin

    @property
    def arrays(self) -> list[mx.array]:
        """All entries, without the room for more."""
        return [array for entries, stored in zip(self._entries, self._stored, strict=True) if entries is not None
                for array in _cut(entries, 0, stored)]

    @property
    def nbytes(self) -> int:
        """Bytes of the entries and of the room for more."""
        return sum(array.nbytes for entries in self._entries if entries is not None for array in entries)

    def save(self, path: Path | str, metadata: dict[str, str] | None = None) -> None:
        """Write to a safetensors file; ``metadata`` comes back from ``load``."""
        tensors = {f"{layer}.{name}": mx.contiguous(array) for layer, entries in enumerate(self._entries) if entries is not None
                   for name, array in zip(("keys", "values"), _cut(entries, 0, self._stored[layer]), strict=True)}
        header = {**(metadata or {}), "format": FORMAT, "length": str(self.length), "keep_all": str(self.keep_all)}
        # MLX writes to no other ending; the name is the caller's choice.
        written = Path(path).with_name(f"{Path(path).name}.safetensors")
        mx.save_safetensors(str(written), tensors, header)
        written.replace(path)

    @classmethod
    def load(cls, path: Path | str, config: TextConfig) -> tuple[Cache, dict[str, str]]:
        """Errors: UserError when the file is damaged or of another model shape."""
        try:
            tensors, header = mx.load(str(path), format="safetensors", return_metadata=True)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{path} is not a cache file ({error}); make it anew.") from None
        if header.get("format") != FORMAT:
            raise UserError(f"{path} is not a cache file of this version (format {header.get('format')!r}, "
                            f"expected {FORMAT!r}); make it anew.")
        cache = cls(config, keep_all=header["keep_all"] == "True")
        cache.length = int(header["length"])
        for index, layer in enumerate(config.layers):
            pair = tensors.get(f"{index}.keys"), tensors.get(f"{index}.values")
            if pair[0] is None or pair[1] is None:
                continue
            if any(a.shape[1] != layer.num_kv_heads or a.shape[3] != layer.head_dim for a in pair):
                raise UserError(f"{path} was made with another model: layer {index} has shape {pair[0].shape}.")
            cache._entries[index], cache._stored[index] = pair, pair[0].shape[2]
        mx.eval(cache.arrays)  # here: the cache may be used on another thread
        return cache, header


def _cut(entries: KeyValue, start: int, end: int) -> KeyValue:
    if start == 0 and end == entries[0].shape[2]:
        return entries
    return entries[0][:, :, start:end], entries[1][:, :, start:end]
