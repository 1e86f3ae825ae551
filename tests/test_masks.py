import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma.model.masks import block_mask, causal_mask


def expected(past, rows, window, blocks):
    """Entry by entry, from the definition."""
    seen = np.zeros((rows, past + rows), dtype=bool)
    for i in range(rows):
        for key in range(past + rows):
            near = window is None or key > past + i - window
            same_block = any(a <= i < b and a <= key - past < b for a, b in blocks)
            seen[i, key] = (key <= past + i and near) or same_block
    return seen


def dense(mask, past, rows):
    if mask is None:
        return np.ones((rows, past + rows), dtype=bool)
    if isinstance(mask, str):
        assert mask == "causal"
        return np.tril(np.ones((rows, past + rows), dtype=bool), past)
    return np.array(mask)


@pytest.mark.parametrize("window", [None, 1, 3, 8, 100])
@pytest.mark.parametrize(("past", "rows"), [(0, 1), (0, 7), (5, 1), (5, 7), (2, 6)])
def test_equals_the_definition(past, rows, window):
    got = dense(causal_mask(past, rows, window), past, rows)
    np.testing.assert_array_equal(got, expected(past, rows, window, ()))


@pytest.mark.parametrize("blocks", [(), ((1, 4),), ((0, 2), (3, 6))], ids=str)
@pytest.mark.parametrize("window", [None, 1, 3, 8, 100])
@pytest.mark.parametrize(("start", "stop", "first"), [(0, 7, 0), (2, 5, 0), (3, 4, 2), (5, 7, 4)])
def test_any_part_of_a_mask_with_blocks(blocks, window, start, stop, first):
    past, rows = 5, 7
    whole = expected(past, rows, window, blocks)[start:stop, first:]
    moved = [(past + a, past + b) for a, b in blocks]
    got = block_mask(range(past + start, past + stop), range(first, past + rows), window, moved)
    np.testing.assert_array_equal(np.array(got), whole)


def test_no_dense_mask_where_none_is_needed():
    assert causal_mask(100, 50, None) == "causal"
    assert causal_mask(10, 5, 15) == "causal"
    assert isinstance(causal_mask(10, 6, 15), mx.array)
