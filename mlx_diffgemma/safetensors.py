"""Safetensors files: their headers, ranges of rows, and writing piece by piece.

``mx.load`` reads whole tensors.  This module does what ``mx.load`` cannot: it checks files before
anything is read, reads a part of a tensor, and writes a file that is never in memory as a whole.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_diffgemma.errors import UserError
from mlx_diffgemma.files import list_files, open_binary, read_json, replacing
from mlx_diffgemma.values import shown

INDEX = "model.safetensors.index.json"
DTYPES = {
    "BF16": mx.bfloat16,
    "F16": mx.float16,
    "F32": mx.float32,
    "U32": mx.uint32,
    "U8": mx.uint8,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
HEADER_LIMIT = 100_000_000  # bytes; the limit of the format's own library


@dataclass(frozen=True)
class Stored:
    """A tensor in a file; ``offset`` is its first byte there, ``dtype`` the format's own name."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def columns(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def is_float(self) -> bool:
        return self.dtype in ("BF16", "F16", "F32")

    def rows(self, start: int, stop: int) -> mx.array:
        """Read rows [stop - start, columns] of the tensor.  All axes but the last count as one.

        Raises:
            UserError: The file ends early, or its dtype is not supported.
        """
        if self.dtype not in DTYPES:
            raise UserError(
                f"{self.path.name}: tensor {self.name!r} is stored as {self.dtype}, which is not supported; known "
                f"are {', '.join(DTYPES)}."
            )
        dtype = DTYPES[self.dtype]
        row = self.columns * dtype.size
        buffer = bytearray((stop - start) * row)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset + start * row)
            view, filled = memoryview(buffer), 0
            while filled < len(buffer):  # one read returns at most 2 GB
                got = file.readinto(view[filled:])
                if not got:
                    raise UserError(
                        f"{self.path} ends inside tensor {self.name!r}; download it again."
                    )
                filled += got
        return _from_bytes(np.frombuffer(buffer, dtype=np.uint8), dtype).reshape(
            stop - start, self.columns
        )


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, by name.

    Raises:
        UserError: The header is damaged, or the file is cut off.
    """
    try:
        with open_binary(path) as file:
            size = os.fstat(file.fileno()).st_size
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(HEADER_LIMIT, size):
                raise _Damaged("the header is longer than the file")
            header = json.loads(file.read(length), object_pairs_hook=_unique)
        tensors = from_header(header, path, 8 + length)
        end = max((t.offset + t.nbytes for t in tensors.values()), default=0)
        if end > size:
            raise _Damaged(f"it should have {end:,} bytes and has {size:,}")
        _check_overlaps(tensors.values())
    except UserError:
        raise
    except (struct.error, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged or cut off ({error}); download it again.") from None
    return tensors


class _Damaged(ValueError):
    """A header is damaged.  The message says how."""


def _unique(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    """Make a JSON object.  Raises ValueError for equal names, since only the last would be kept."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _Damaged(f"the header names {twice!r} twice")
    return found


def _check_overlaps(tensors: Iterable[Stored]) -> None:
    """Raise ValueError if two tensors share bytes."""
    ordered = sorted((t for t in tensors if t.nbytes), key=lambda t: t.offset)
    for before, after in itertools.pairwise(ordered):
        if before.offset + before.nbytes > after.offset:
            raise _Damaged(f"tensors {before.name!r} and {after.name!r} overlap")


def read_tensors(
    path: Path, stream: mx.Stream | None = None
) -> tuple[dict[str, mx.array], dict[str, str]]:
    """Read a safetensors file of any name, lazily, on ``stream``.

    Returns:
        (the tensors, the metadata).

    Raises:
        UserError: As ``read_header``.
    """
    read_header(path)
    try:
        tensors, metadata = mx.load(
            str(path), format="safetensors", return_metadata=True, stream=stream
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path} is damaged or cut off ({error}); download it again.") from None
    return dict(tensors), dict(metadata)


def _whole(number: object) -> int:
    """A number of a header.  Raises ValueError unless it is a whole number of at least 0."""
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise ValueError(f"{shown(number)} is no whole number of at least 0")
    return number


def from_header(
    header: Mapping[str, Mapping[str, object]], path: Path, start: int
) -> dict[str, Stored]:
    """The tensors of a parsed header.

    Args:
        header: The parsed header.
        path: The file.
        start: The byte at which the data begin.

    Raises:
        ValueError: An entry is impossible.
    """
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        shape = tuple(_whole(n) for n in entry["shape"])  # type: ignore[attr-defined]
        dtype = str(entry["dtype"])
        begin, end = (_whole(n) for n in entry["data_offsets"])  # type: ignore[attr-defined]
        if not 0 <= begin <= end or (
            dtype in DTYPES and end - begin != math.prod(shape) * DTYPES[dtype].size
        ):
            raise ValueError(
                f"tensor {name!r} of shape {shape} in {dtype} cannot take {end - begin:,} bytes"
            )
        tensors[name] = Stored(name, path, dtype, shape, start + begin, end - begin)
    return tensors


def read_headers(folder: Path) -> dict[str, Stored]:
    """Every tensor of a checkpoint folder, from the files in its index, or else from all files.

    Raises:
        UserError: A file is missing, cut off or damaged, or no file has a tensor of the index.
    """
    if (folder / INDEX).exists():
        mapping = read_json(folder / INDEX).get("weight_map")
        if not isinstance(mapping, dict) or not all(
            isinstance(name, str) for name in mapping.values()
        ):
            raise UserError(f"{folder / INDEX} has no weight_map; download the file again.")
        files = sorted(set(mapping.values()))
        for name in files:
            _check_shard(folder, name)
    else:
        mapping = {}
        files = [path.name for path in list_files(folder, "*.safetensors")]
    if not files:
        raise UserError(
            f"{folder} holds no .safetensors file; only safetensors checkpoints are read."
        )
    tensors: dict[str, Stored] = {}
    for name in files:
        if not (folder / name).is_file():
            raise UserError(
                f"{folder} lacks {name}, which its index names; download the checkpoint again."
            )
        own = read_header(folder / name)
        if twice := sorted(own.keys() & tensors.keys()):
            raise UserError(
                f"{folder}: tensor {twice[0]!r} is in both {tensors[twice[0]].path.name} and {name}; download the "
                "checkpoint again into an empty folder."
            )
        tensors |= own
    if lost := sorted(mapping.keys() - tensors.keys()):
        raise UserError(
            f"{folder}: no file holds tensor {lost[0]!r}, which the index names; download the checkpoint again."
        )
    return tensors


def _check_shard(folder: Path, name: str) -> None:
    """Raise UserError if ``name`` leads out of the folder."""
    if not name or os.path.isabs(name) or "\\" in name or "\0" in name or ".." in name.split("/"):
        raise UserError(
            f"{folder / INDEX} names the file {name!r}, which does not lie in that folder; download it again."
        )


class SafetensorsWriter:
    """Writes a safetensors file whose tensors are known in advance and arrive row by row.

    The rows may arrive in any order.  ``tensors`` maps names to (dtype, shape), in the order of the
    file.  If the file exists and has the right size, it is ``resumed``: it keeps what an
    interrupted conversion has written.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, tuple[mx.Dtype, tuple[int, ...]]],
        metadata: Mapping[str, str],
    ):
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        self.places, end = (
            dict[str, tuple[int, int]](),
            0,
        )  # first and last byte of each tensor, counted from the first byte of the data
        for name, (dtype, shape) in tensors.items():
            self.places[name] = end, (end := end + math.prod(shape) * dtype.size)
            header[name] = {
                "dtype": NAMES[dtype],
                "shape": list(shape),
                "data_offsets": list(self.places[name]),
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8
        self.start = 8 + len(text)
        self.resumed = path.exists() and path.stat().st_size == self.start + end
        self.file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        os.pwrite(self.file, struct.pack("<Q", len(text)) + text, 0)
        os.ftruncate(self.file, self.start + end)

    def write(self, name: str, offset: int, values: mx.array) -> int:
        """Write a part of a tensor.

        Args:
            name: The name of the tensor.
            offset: The byte in the tensor at which the part begins.
            values: The part.

        Returns:
            The offset after the part.
        """
        view, (first, last) = memoryview(_to_bytes(values).data), self.places[name]
        size, place = view.nbytes, self.start + first + offset
        if first + offset + size > last:
            raise ValueError(f"{size} bytes from {offset} on do not fit into tensor {name}")
        while view.nbytes:  # one write takes at most 2 GB
            written = os.pwrite(self.file, view, place)
            view, place = view[written:], place + written
        return offset + size

    def sync(self) -> None:
        os.fsync(self.file)

    def close(self) -> None:
        os.close(self.file)


def _from_bytes(buffer: np.ndarray, dtype: mx.Dtype) -> mx.array:
    # numpy has no bfloat16, so two-byte tensors are passed as uint16
    array = mx.array(buffer.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[dtype.size]))
    return array if array.dtype == dtype else array.view(dtype)


def _to_bytes(values: mx.array) -> np.ndarray:
    unsigned = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}[values.dtype.size]
    return (
        np.ascontiguousarray(
            np.array(values if values.dtype == unsigned else values.view(unsigned))
        )
        .reshape(-1)
        .view(np.uint8)
    )


def write_tensors(
    path: Path, tensors: Mapping[str, mx.array], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file of any name.

    Args:
        path: The file.
        tensors: The tensors, by name.
        metadata: The texts of its header.

    Raises:
        UserError: As ``replacing``.
    """
    with replacing(path) as file:
        mx.save_safetensors(file, dict(tensors), dict(metadata or {}))
