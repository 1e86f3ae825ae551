import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma.decoding.prefix_cache import LEAST, PrefixCache
from mlx_diffgemma.model.cache import Cache


@pytest.fixture
def made(tiny):
    """Prefixes without a limit, and a function that reads ids into a cache."""

    def read(ids, cache=None):
        cache = cache or Cache(tiny.config.text)
        tiny.encode([mx.array(ids[cache.length :])], [cache])
        return cache

    return PrefixCache(Cache(tiny.config.text), 2**40), read


def ids_of(seed, size):
    return np.random.default_rng(seed).integers(0, 300, size).tolist()


class TestBegin:
    def test_nothing_is_kept_at_first(self, made):
        cache, border = made[0].begin(ids_of(0, 50))
        assert (cache.length, border) == (0, 0)

    def test_the_longest_beginning_is_found(self, made):
        prefixes, read = made
        ids = ids_of(0, 60)
        for length in (10, 40, 20):
            prefixes.keep(ids, read(ids[:length]))
        assert prefixes.begin(ids)[0].length == 40
        assert prefixes.begin(ids[:40])[0].length == 40
        assert prefixes.begin(ids[:35])[0].length == 20
        assert prefixes.begin([299 - ids[0], *ids[1:]])[0].length == 0

    def test_what_is_kept_stays_as_it_was(self, made):
        """Whoever goes on from the cache that was kept, or from what was given out."""
        prefixes, read = made
        ids = ids_of(0, 60)
        cache = read(ids[:20])
        prefixes.keep(ids, cache)
        read(ids, cache)
        found, _ = prefixes.begin(ids)
        assert found.length == 20
        read(ids, found)
        assert prefixes.begin(ids)[0].length == 20

    def test_scopes_know_nothing_of_each_other(self, made):
        """Neither what is kept, nor where prompts part, nor what is used is changed by another's."""
        prefixes, read = made
        ids = ids_of(0, LEAST + 60)
        prefixes.keep(ids, read(ids[: LEAST + 40]), scope=b"a")
        assert [prefixes.begin(ids, scope=scope)[0].length for scope in (b"a", b"b", b"")] == [
            LEAST + 40,
            0,
            0,
        ]
        assert prefixes.begin(ids, scope=b"c")[1] == 0
        assert prefixes.begin(ids, scope=b"c")[1] > 0

    def test_never_all_but_one(self, made):
        prefixes, read = made
        ids = ids_of(0, 60)
        prefixes.keep(ids, read(ids[:40]))
        assert [prefixes.begin(ids[:size])[0].length for size in (40, 41, 42)] == [40, 0, 40]
        assert prefixes.begin(ids[:40], whole=False)[0].length == 0

    def test_what_goes_on_leaves_what_is_kept(self, made, tiny):
        """Two that go on from one prefix read as if they were alone, whatever the other appends."""
        prefixes, read = made
        ids, other = ids_of(0, 60), ids_of(1, 60)
        prefixes.keep(ids, read(ids[:40]))
        first = read(ids, prefixes.begin(ids)[0])
        second = read([*ids[:40], *other[:20]], prefixes.begin([*ids[:40], *other[:20]])[0])
        for cache, wanted in ((first, ids), (second, [*ids[:40], *other[:20]])):
            alone = read(wanted, read(wanted[:40]))
            for a, b in zip(cache.arrays, alone.arrays):
                assert mx.array_equal(a, b).item()

    def test_where_prompts_part_is_a_border(self, made):
        prefixes, _ = made
        ids, shared = ids_of(0, 60), LEAST + 3
        assert prefixes.begin(ids)[1] == 0
        assert prefixes.begin([*ids[:shared], 299 - ids[shared], *ids_of(1, 9)])[1] == shared
        assert prefixes.begin([*ids[: LEAST - 1], 299 - ids[LEAST - 1], *ids_of(2, 9)])[1] == 0

    def test_no_border_where_enough_is_kept(self, made):
        prefixes, read = made
        ids = ids_of(0, 60)
        prefixes.begin(ids)
        prefixes.keep(ids, read(ids[:50]))
        cache, border = prefixes.begin([*ids[:50], 299 - ids[50], *ids_of(1, 9)])
        assert (cache.length, border) == (50, 0)


class TestBudget:
    def test_the_oldest_go(self, made, tiny):
        _, read = made
        texts = [ids_of(seed, 40) for seed in range(4)]
        caches = [read(ids) for ids in texts]
        prefixes = PrefixCache(Cache(tiny.config.text), 2 * caches[0].nbytes)
        prefixes.keep(texts[0], caches[0])
        prefixes.keep(texts[1], caches[1])
        prefixes.begin([*texts[0], 1, 2])  # now used later than the other
        prefixes.keep(texts[2], caches[2])
        assert [prefixes.begin([*ids, 1, 2])[0].length for ids in texts[:3]] == [40, 0, 40]
        assert len(prefixes) == 2
        assert prefixes.nbytes == 2 * caches[0].nbytes

    def test_what_is_larger_than_all_is_not_kept(self, made, tiny):
        ids = ids_of(0, 40)
        cache = made[1](ids)
        prefixes = PrefixCache(Cache(tiny.config.text), cache.nbytes - 1)
        prefixes.keep(ids, cache)
        assert (len(prefixes), prefixes.nbytes) == (0, 0)

    def test_none(self, made, tiny):
        prefixes = PrefixCache(Cache(tiny.config.text), 0)
        ids = ids_of(0, 60)
        prefixes.keep(ids, made[1](ids))
        assert prefixes.begin(ids)[0].length == 0
        assert prefixes.begin(ids)[1] == 0

    def test_kept_twice_is_counted_once(self, made):
        prefixes, read = made
        ids = ids_of(0, 40)
        prefixes.keep(ids, read(ids))
        prefixes.keep(ids, read(ids))
        assert (len(prefixes), prefixes.nbytes) == (1, read(ids).nbytes)
