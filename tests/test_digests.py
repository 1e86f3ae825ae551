"""A digest differs where anything does, whatever the dtype and however the tensor is cut."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma import digests
from mlx_diffgemma.digests import digest

DTYPES = [mx.bfloat16, mx.float16, mx.float32, mx.uint32, mx.uint8, mx.int32]


def numbers(dtype, size=37):
    return mx.array(np.random.default_rng(0).integers(0, 200, size)).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 37, 100])
def test_one_changed_number_is_seen(dtype, size):
    values = numbers(dtype, size)
    before = digest([("a", values)])
    assert digest([("a", mx.array(values))]) == before
    for place in {0, size // 2, size - 1}:
        changed = mx.array(values)
        changed[place] = changed[place] + 1
        assert digest([("a", changed)]) != before


def test_order_counts():
    values = numbers(mx.float32)
    swapped = mx.array(values)
    swapped[3], swapped[20] = values[20].item(), values[3].item()
    assert swapped[3].item() != swapped[20].item()
    found = {digest([("a", one)]) for one in (values, swapped, values[::-1])}
    assert len(found) == 3


def test_changes_do_not_cancel_out():
    """The signs of two numbers: in a sum of products with their places, half of all pairs would."""
    values = numbers(mx.float32, 12) + 1
    pairs = [(one, other) for other in range(12) for one in range(other)]
    found = {digest([("a", values)])}
    for one, other in pairs:
        changed = mx.array(values)
        changed[one], changed[other] = -values[one], -values[other]
        found.add(digest([("a", changed)]))
    assert len(found) == 1 + len(pairs)


def test_names_shapes_dtypes_and_the_text_count():
    values = numbers(mx.float32, 36)
    tensors = [values, values.reshape(6, 6), values.view(mx.uint32)]
    found = {digest([("a", one)]) for one in tensors}
    found |= {digest([("b", values)]), digest([("a", values)], "text"), digest([])}
    found |= {digest([("a", values), ("b", values)]), digest([("b", values), ("a", values)])}
    assert len(found) == 8


def test_pieces_are_seen_as_a_whole(monkeypatch):
    """And equal pieces at different places do not cancel out."""
    values = mx.concatenate([numbers(mx.float32, 8), numbers(mx.float32, 8) + 1])
    monkeypatch.setattr(digests, "PIECE", 8)
    before = digest([("a", values)])
    assert digest([("a", mx.concatenate([values[8:], values[:8]]))]) != before
    changed = mx.array(values)
    changed[15] += 1
    assert digest([("a", changed)]) != before


def test_an_empty_tensor():
    assert digest([("a", mx.zeros((0, 4)))]) != digest([("a", mx.zeros((0, 5)))])
