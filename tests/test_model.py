"""Equalities of the backbone: chunked and whole, batched and alone, held and appended."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma.checkpoint.loading import load_model
from mlx_diffgemma.model import layers
from mlx_diffgemma.model.attention import Segment
from mlx_diffgemma.model.cache import Cache

RNG = np.random.default_rng(0)
LONG = RNG.integers(1, 301, 75).tolist()
SHORT = RNG.integers(1, 301, 6).tolist()
CANVAS = RNG.integers(0, 301, (2, 24)).astype(np.int32)


def encoded(model, ids, pieces=None):
    cache, start = Cache(model.config.text), 0
    for size in pieces or [len(ids)]:
        model.encode([mx.array(ids[start : start + size])], [cache])
        start += size
    assert start == len(ids)
    return cache


def same_caches(one, two):
    return len(one.arrays) == len(two.arrays) and all(
        mx.array_equal(a, b).item() for a, b in zip(one.arrays, two.arrays)
    )


@pytest.mark.parametrize("pieces", [[40, 35], [2] * 36 + [3], [73, 2], [16, 16, 16, 27], [14, 61]])
def test_chunked_prefill_equals_whole(tiny, pieces):
    assert same_caches(encoded(tiny, LONG, pieces), encoded(tiny, LONG))


def test_masks_of_a_chunk_are_those_of_each_layer(tiny):
    """Of as many past keys and rows in sliding and in full layers."""
    cache = encoded(tiny, LONG[:15])
    chunk = tiny.encode([mx.array(LONG[15:31])], [cache], logits="all").logits[0]
    whole = tiny.encode([mx.array(LONG[:31])], [Cache(tiny.config.text)], logits="all").logits[0]
    np.testing.assert_allclose(np.array(chunk), np.array(whole[15:]), atol=1e-4)


def test_single_rows_equal_whole_up_to_rounding(tiny):
    one, whole = encoded(tiny, LONG, [1] * 75), encoded(tiny, LONG)
    for a, b in zip(one.arrays, whole.arrays):
        np.testing.assert_allclose(np.array(a), np.array(b), atol=2e-4)


def test_logits_of_all_rows_end_with_the_last(tiny):
    all_rows = tiny.encode([mx.array(LONG)], [Cache(tiny.config.text)], logits="all").logits[0]
    last = tiny.encode([mx.array(LONG)], [Cache(tiny.config.text)], logits="last").logits[0]
    assert all_rows.shape == (75, 301)
    np.testing.assert_allclose(np.array(all_rows[-1:]), np.array(last), atol=1e-5)


def test_a_batch_equals_its_rows_alone(tiny):
    together = [Cache(tiny.config.text), Cache(tiny.config.text)]
    tiny.encode([mx.array(LONG), mx.array(SHORT)], together)
    alone = [encoded(tiny, LONG), encoded(tiny, SHORT)]
    assert same_caches(together[0], alone[0])
    assert same_caches(together[1], alone[1])
    soft = mx.random.normal((2, 24, 64), key=mx.random.key(0))
    both = tiny.denoise(mx.array(CANVAS), together, soft).logits
    for row in range(2):
        single = tiny.denoise(
            mx.array(CANVAS[row : row + 1]), [alone[row]], soft[row : row + 1]
        ).logits
        assert mx.array_equal(both[row], single[0])


def test_denoising_only_reads_the_cache(tiny):
    cache = encoded(tiny, LONG)
    before, length = [mx.array(a) for a in cache.arrays], cache.length
    mx.eval(tiny.denoise(mx.array(CANVAS[:1]), [cache]).logits)
    assert cache.length == length
    assert all(mx.array_equal(a, b) for a, b in zip(before, cache.arrays))


def test_no_signal_equals_a_signal_of_zeros(tiny):
    cache = encoded(tiny, SHORT)
    zeros = tiny.denoise(mx.array(CANVAS[:1]), [cache], mx.zeros((1, 24, 64))).logits
    assert mx.array_equal(zeros, tiny.denoise(mx.array(CANVAS[:1]), [cache]).logits)


def test_a_signal_changes_the_logits(tiny):
    cache = encoded(tiny, SHORT)
    plain = tiny.denoise(mx.array(CANVAS[:1]), [cache]).logits
    assert not mx.allclose(
        plain, tiny.denoise(mx.array(CANVAS[:1]), [cache], mx.ones((1, 24, 64))).logits, atol=0.1
    )


def test_held_rows_equal_appended_ones_once_accepted(tiny):
    held, appended = encoded(tiny, LONG), encoded(tiny, LONG)
    first = tiny.encode([mx.array(SHORT)], [held], logits="all", write="hold").logits[0]
    assert held.length == 75
    held.accept(6)
    second = tiny.encode([mx.array(SHORT)], [appended], logits="all").logits[0]
    assert same_caches(held, appended)
    assert mx.array_equal(first, second)


def test_embeddings_equal_their_ids(tiny):
    by_embedding = Cache(tiny.config.text)
    tiny.encode([tiny.embed(mx.array(LONG))], [by_embedding])
    assert same_caches(by_embedding, encoded(tiny, LONG))


def test_taps_change_nothing_and_bring_the_layers(tiny):
    cache = encoded(tiny, SHORT)
    out = tiny.denoise(mx.array(CANVAS[:1]), [cache], taps=(0, 5))
    assert mx.array_equal(out.logits, tiny.denoise(mx.array(CANVAS[:1]), [cache]).logits)
    assert set(out.taps) == {0, 5}
    assert out.taps[5].shape == (1, 24, 64)
    normed = tiny.model.decoder.norm(out.taps[5])
    assert mx.array_equal(normed, out.hidden)


def test_causal_and_canvas_rows_share_a_forward(tiny):
    """Commit fusion rests on this: mixed segments give each mode its own layer scalar."""
    apart, mixed = (
        [encoded(tiny, LONG), encoded(tiny, SHORT)],
        [encoded(tiny, LONG), encoded(tiny, SHORT)],
    )
    tiny.encode([mx.array(SHORT)], [apart[0]])
    canvas = tiny.model.decoder.self_conditioning(tiny.embed(mx.array(CANVAS[0])), None)
    alone = tiny.denoise(mx.array(CANVAS[:1]), [apart[1]]).hidden[0]
    rows = mx.concatenate((tiny.embed(mx.array(SHORT)), canvas))
    hidden, _ = tiny._forward(
        rows, [Segment(0, 6, mixed[0]), Segment(6, 30, mixed[1], canvas=True)], ()
    )
    assert same_caches(mixed[0], apart[0])
    np.testing.assert_allclose(np.array(hidden[6:]), np.array(alone), atol=2e-5)


def test_bidirectional_blocks_see_their_own_future(tiny):
    rows = tiny.embed(mx.array(LONG[:12]))
    changed = mx.concatenate((rows[:11], rows[11:] * 2))

    def hidden(x, blocks):
        return tiny._forward(x, [Segment(0, 12, Cache(tiny.config.text), blocks=blocks)], ())[0]

    assert mx.array_equal(hidden(rows, ())[:11], hidden(changed, ())[:11])
    block = ((1, 4), (8, 12))
    assert mx.array_equal(hidden(rows, block)[:8], hidden(changed, block)[:8])
    assert not mx.allclose(hidden(rows, block)[8:11], hidden(changed, block)[8:11], atol=1e-3)


def test_replaced_weights_are_used_at_once(tiny_folder):
    """Projections of the same rows are one product, made of the weights as they were loaded."""
    joined, apart = (load_model(tiny_folder, "float32") for _ in range(2))
    for layer in apart.layers:
        layer.self_attn._joined = layer.mlp._joined = None
    for path in ("self_attn.k_proj", "mlp.up_proj"):
        before = encoded(joined, LONG)
        for model in (joined, apart):
            module = model.layers[1]
            for name in path.split("."):
                module = module[name]
            module.weight = module.weight * 1.5
        found = encoded(joined, LONG)
        assert not same_caches(found, before)
        for a, b in zip(found.arrays, encoded(apart, LONG).arrays):
            np.testing.assert_allclose(np.array(a), np.array(b), atol=1e-5)


def test_an_overflow_is_not_capped_into_a_token(tiny):
    hidden = mx.full((1, 64), 1e38)
    assert not mx.isfinite(tiny.logits(hidden)).all().item()


def test_one_canvas_too_few_caches_is_refused(tiny):
    with pytest.raises(ValueError, match="1 caches for canvases of lengths"):
        tiny.denoise(mx.array(CANVAS), [encoded(tiny, SHORT)])


class TestRowBlocks:
    """Long contexts go a few rows at a time; nothing shows but the memory."""

    LENGTH = 151  # far beyond the window of 16

    def run(self, model, monkeypatch, scores=None):
        """(logits of the prompt and of a canvas, the largest score array of each kind of call)"""
        calls, attention = [], layers.attention

        def spy(queries, keys, values, mask):
            calls.append(
                (
                    queries.shape[1] * queries.shape[2] * keys.shape[2],
                    queries.shape[2],
                    keys.shape[2],
                )
            )
            return attention(queries, keys, values, mask)

        monkeypatch.setattr(layers, "attention", spy)
        if scores is not None:
            monkeypatch.setattr(layers, "SCORES", scores)
        cache = Cache(model.config.text)
        ids = mx.array(np.random.default_rng(3).integers(1, 300, self.LENGTH))
        (causal,) = model.encode([ids], [cache], logits="all").logits
        canvas = model.denoise(ids[None, :24], [cache]).logits
        monkeypatch.undo()
        return (causal, canvas, *cache.arrays), calls

    @pytest.mark.parametrize("scores", [1, 4 * 151 * 5, 4 * 151 * 23, 4 * 40 * 16])
    def test_identical_for_every_bound(self, tiny, monkeypatch, scores):
        whole, _ = self.run(tiny, monkeypatch)
        blocks, calls = self.run(tiny, monkeypatch, scores)
        assert len(calls) > 12, "there are blocks"
        assert all(mx.array_equal(a, b) for a, b in zip(whole, blocks))

    @pytest.mark.parametrize("rows", [20, 15])
    def test_no_array_beyond_the_bound(self, tiny, monkeypatch, rows):
        heads, scores = 4, 4 * 151 * rows  # of 15 rows each, one would be left over
        _, calls = self.run(tiny, monkeypatch, scores)
        # one row more than the bound allows, where it would be left over alone
        assert max(size for size, _, _ in calls) <= scores + heads * (self.LENGTH + 24)
        assert min(rows for _, rows, _ in calls) >= 2

    def test_sliding_layers_read_only_their_window(self, tiny, monkeypatch):
        _, calls = self.run(tiny, monkeypatch)
        window = 16
        causal = [(rows, keys) for _, rows, keys in calls if keys != self.LENGTH and rows != 24]
        assert causal
        assert all(rows <= window + 1 and keys <= rows + window - 1 for rows, keys in causal)
