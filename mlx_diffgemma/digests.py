"""Digests of tensors, reduced on the device that holds them.

A digest of gigabytes takes about as long as reading them once.  It finds differences, but it is not
cryptographic: it gives no protection against deliberate changes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import mlx.core as mx
import numpy as np

PIECE = 2**24  # elements that are reduced at once; each takes a few integers during the reduction
_UNSIGNED = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}


def digest(tensors: Iterable[tuple[str, mx.array]], text: str = "") -> str:
    """SHA-256 of ``text`` and of the tensors: names, shapes, dtypes and all bits."""
    found = hashlib.sha256(text.encode())
    for name, array in tensors:
        found.update(f"\n{name} {array.shape} {array.dtype} ".encode())
        found.update(_reduced(array))
    return found.hexdigest()


def _reduced(array: mx.array) -> bytes:
    flat = array.reshape(-1)
    # Words of 32 bits where the size allows: half as many as the numbers of a bfloat16 tensor.
    bits = flat.view(mx.uint32 if array.nbytes % 4 == 0 else _UNSIGNED[array.dtype.size])
    sums = [mx.zeros((2,), dtype=mx.uint32)]
    for start in range(0, bits.size, PIECE):
        piece = bits[start : start + PIECE].astype(mx.uint32)
        first = start % 2**32
        place = _mixed(mx.arange(first, first + piece.size, dtype=mx.uint32))
        mixed = _mixed(place ^ piece)
        sums.append(mx.stack([mx.sum(mixed), mx.sum(mixed * place)]))
        mx.eval(sums[-1])
    return np.array(mx.stack(sums)).tobytes()


def _mixed(x: mx.array) -> mx.array:
    """Spread the bits of ``x`` over the whole word, as MurmurHash3's last step does."""
    x = (x ^ (x >> 16)) * mx.array(0x85EBCA6B, dtype=mx.uint32)
    x = (x ^ (x >> 13)) * mx.array(0xC2B2AE35, dtype=mx.uint32)
    return x ^ (x >> 16)
