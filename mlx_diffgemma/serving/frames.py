"""Python objects on a pipe between a server and its workers.

An object is sent as a pickle.  Large arrays in it are sent and received without a copy, and without
Python's lock.
"""

from __future__ import annotations

import pickle
import struct
from dataclasses import dataclass
from typing import Any, BinaryIO

COUNT = struct.Struct("<Q")


@dataclass(frozen=True)
class Kept:
    """Stands for argument ``number`` of those that the worker kept from earlier frames."""

    number: int


def write(stream: BinaryIO, value: Any) -> None:
    """Send ``value``.

    Raises:
        OSError: the other side does not read any more.
        Exception: what pickle raises.  Nothing has been sent in this case.
    """
    buffers = list[pickle.PickleBuffer]()
    content = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    views = [memoryview(content), *(buffer.raw() for buffer in buffers)]
    stream.write(COUNT.pack(len(views)) + b"".join(COUNT.pack(len(view)) for view in views))
    for view in views:
        stream.write(view)
    stream.flush()


def read(stream: BinaryIO) -> Any:
    """Receive a value.

    Raises:
        EOFError: the other side has ended.
    """
    (count,) = COUNT.unpack(_exactly(stream, COUNT.size))
    sizes = [COUNT.unpack(_exactly(stream, COUNT.size))[0] for _ in range(count)]
    content, *buffers = [_exactly(stream, size) for size in sizes]
    return pickle.loads(content, buffers=buffers)


def _exactly(stream: BinaryIO, size: int) -> bytearray:
    content = bytearray(size)
    view = memoryview(content)
    done = 0
    while done < size:
        count = stream.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise EOFError("The other process has ended.")
        done += count
    return content
