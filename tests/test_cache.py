import errno
import os

import mlx.core as mx
import pytest

from mlx_diffgemma.errors import UserError
from mlx_diffgemma.model.cache import ROOM, Cache
from mlx_diffgemma.model.config import ModelConfig
from mlx_diffgemma.safetensors import read_tensors, write_tensors
from tests.checkpoints import SHAPES, config_dict

CONFIG = ModelConfig.from_dict(
    config_dict(**SHAPES["five-and-one"])
).text  # window 16, layers 0-4 sliding, 5 full
SLIDING, FULL = 0, 5


def entries(start, count, layer):
    """Keys whose numbers tell their position, values their negative."""
    shape = CONFIG.layers[layer]
    keys = mx.broadcast_to(
        mx.arange(start, start + count, dtype=mx.float32)[None, None, :, None],
        (1, shape.num_kv_heads, count, shape.head_dim),
    )
    return keys, -keys


def fill(cache, count):
    for layer in range(len(CONFIG.layers)):
        cache.append(layer, *entries(cache.length, count, layer))
    cache.advance(count)


def positions(view):
    assert mx.array_equal(view[0], -view[1])
    return view[0][0, 0, :, 0].astype(mx.int32).tolist()


@pytest.mark.parametrize("pieces", [[40], [1] * 40, [13, 2, 25], [39, 1]])
def test_views_do_not_depend_on_how_it_was_filled(pieces):
    cache = Cache(CONFIG)
    for count in pieces:
        fill(cache, count)
    assert positions(cache.view(SLIDING)) == list(range(25, 40)), "window - 1 entries"
    assert positions(cache.view(FULL)) == list(range(40))
    assert cache.length == 40


def test_an_empty_cache_shows_nothing():
    assert Cache(CONFIG).view(SLIDING) is None


def test_view_changes_nothing():
    cache = Cache(CONFIG)
    fill(cache, 30)
    before = cache.nbytes
    assert positions(cache.view(SLIDING)) == positions(cache.view(SLIDING))
    assert cache.nbytes == before


def test_memory_of_sliding_layers_is_bounded():
    cache = Cache(CONFIG)
    fill(cache, 15)
    sliding = (
        sum(2 * layer.num_kv_heads * layer.head_dim * 4 for layer in CONFIG.layers if layer.window)
        * 15
    )
    full = 2 * CONFIG.layers[FULL].head_dim * 4
    assert cache.nbytes == sliding + ROOM * full
    fill(cache, ROOM)
    assert cache.nbytes == sliding + 2 * ROOM * full, "full layers grow by whole rooms"
    for _ in range(20):
        fill(cache, 1)
    assert cache.nbytes == sliding + 2 * ROOM * full, "also a position at a time"


def test_what_a_sliding_layer_drops_is_freed():
    cache = Cache(CONFIG)
    mx.clear_cache()
    before = mx.get_active_memory()
    long = mx.zeros((2, CONFIG.layers[SLIDING].num_kv_heads, 50_000, 8)) + 1.0
    cache.add(SLIDING, long)
    mx.eval(cache.arrays)
    size = long.nbytes
    del long
    assert mx.get_active_memory() - before < size / 100


def test_reserved_room_is_all_that_is_taken():
    cache = Cache(CONFIG)
    cache.reserve(ROOM + 100)
    fill(cache, 20)
    before = cache.nbytes
    fill(cache, ROOM + 80)
    assert cache.nbytes == before
    assert positions(cache.view(FULL)) == list(range(ROOM + 100))


@pytest.mark.parametrize("keep_all", [False, True])
def test_a_copy_and_a_snapshot_do_not_see_what_is_written_later(keep_all):
    """In the room behind them, which they share."""
    cache = Cache(CONFIG, keep_all)
    fill(cache, 20)
    twin, snapshot = cache.copy(), cache.snapshot()
    fill(cache, 5)
    for layer in range(len(CONFIG.layers)):
        twin.append(layer, *entries(100, 3, layer))
    twin.advance(3)
    mx.eval(cache.arrays, twin.arrays)
    assert positions(cache.view(FULL)) == list(range(25))
    assert positions(twin.view(FULL)) == [*range(20), 100, 101, 102]
    cache.restore(snapshot)
    assert positions(cache.view(FULL)) == list(range(20))
    fill(cache, 2)
    assert positions(cache.view(FULL)) == list(range(22))


def test_writing_into_the_room_copies_nothing():
    """A second array would double the memory of a long prompt at its last chunk."""
    cache = Cache(CONFIG)
    cache.reserve(200_000)
    fill(cache, 10)
    mx.eval(cache.arrays)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    fill(cache, 10)
    mx.eval(cache.arrays)
    assert mx.get_peak_memory() - before < 200_000 * CONFIG.layers[FULL].head_dim * 4


class TestHold:
    def test_held_entries_show_only_once_accepted(self):
        cache = Cache(CONFIG)
        fill(cache, 20)
        for layer in range(len(CONFIG.layers)):
            cache.hold(layer, *entries(20, 8, layer))
        assert positions(cache.view(FULL)) == list(range(20))
        cache.accept(3)
        assert cache.length == 23
        assert positions(cache.view(FULL)) == list(range(23))
        assert positions(cache.view(SLIDING)) == list(range(8, 23))

    def test_accepting_part_equals_never_having_had_the_rest(self):
        held, plain = Cache(CONFIG), Cache(CONFIG)
        for cache, count in ((held, 30), (plain, 30)):
            fill(cache, count)
        for layer in range(len(CONFIG.layers)):
            held.hold(layer, *entries(30, 10, layer))
        held.accept(4)
        fill(plain, 4)
        for layer in range(len(CONFIG.layers)):
            assert positions(held.view(layer)) == positions(plain.view(layer))

    def test_more_than_held_is_refused(self):
        cache = Cache(CONFIG)
        with pytest.raises(ValueError, match="holds fewer"):
            cache.accept(1)


class TestSnapshot:
    @pytest.mark.parametrize("first", [5, 15, 16, 40])
    def test_restore_after_more_was_appended(self, first):
        cache = Cache(CONFIG)
        fill(cache, first)
        snapshot, before = (
            cache.snapshot(),
            [positions(cache.view(layer)) for layer in range(len(CONFIG.layers))],
        )
        fill(cache, 33)
        cache.restore(snapshot)
        assert cache.length == first
        assert [positions(cache.view(layer)) for layer in range(len(CONFIG.layers))] == before
        fill(cache, 2)
        assert positions(cache.view(FULL)) == list(range(first + 2))

    def test_what_was_held_goes(self):
        cache = Cache(CONFIG)
        fill(cache, 4)
        snapshot = cache.snapshot()
        for layer in range(len(CONFIG.layers)):
            cache.hold(layer, *entries(4, 2, layer))
        cache.restore(snapshot)
        with pytest.raises(ValueError, match="fewer than 1 entries"):
            cache.accept(1)

    def test_a_copy_goes_its_own_way(self):
        cache = Cache(CONFIG)
        fill(cache, 20)
        twin = cache.copy()
        fill(twin, 5)
        assert (cache.length, twin.length) == (20, 25)
        assert positions(cache.view(FULL)) == list(range(20))

    def test_empty(self):
        cache = Cache(CONFIG)
        snapshot = cache.snapshot()
        fill(cache, 20)
        cache.restore(snapshot)
        assert cache.length == 0
        assert cache.view(SLIDING) is None
        assert cache.view(FULL) is None


class TestKeepAll:
    def test_earlier_views(self):
        cache = Cache(CONFIG, keep_all=True)
        fill(cache, 50)
        assert positions(cache.view(SLIDING, upto=30)) == list(range(15, 30))
        assert positions(cache.view(SLIDING, upto=7)) == list(range(7))
        assert positions(cache.view(FULL, upto=30)) == list(range(30))
        assert cache.view(FULL, upto=0) is None

    def test_without_it_they_are_refused(self):
        cache = Cache(CONFIG)
        fill(cache, 50)
        with pytest.raises(ValueError, match="keep_all"):
            cache.view(SLIDING, upto=45)


class TestFile:
    def test_round_trip(self, tmp_path):
        cache = Cache(CONFIG)
        fill(cache, 40)
        cache.save(tmp_path / "c.safetensors", {"model": "x"})
        loaded, header = Cache.load(tmp_path / "c.safetensors", CONFIG)
        assert header["model"] == "x"
        assert loaded.length == 40
        for layer in range(len(CONFIG.layers)):
            assert positions(loaded.view(layer)) == positions(cache.view(layer))

    def test_another_model_is_refused(self, tmp_path):
        cache = Cache(CONFIG)
        fill(cache, 4)
        cache.save(tmp_path / "c.safetensors")
        other = ModelConfig.from_dict(config_dict(**SHAPES["odd-heads"])).text
        with pytest.raises(UserError, match="another model"):
            Cache.load(tmp_path / "c.safetensors", other)

    def test_a_damaged_file_is_refused(self, tmp_path):
        (tmp_path / "c.safetensors").write_bytes(b"not a cache")
        with pytest.raises(UserError, match="not a cache file"):
            Cache.load(tmp_path / "c.safetensors", CONFIG)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t, _: t.pop("3.keys"), "is damaged"),
            (lambda t, _: t.update({"5.keys": t["5.keys"][:, :, :20]}), "is damaged"),
            (lambda t, _: t.update({"0.values": t["0.values"] + 1}), "is damaged"),
            (lambda t, _: t.update({"0.values": t["0.values"][:, :, ::-1]}), "is damaged"),
            (lambda _, h: h.update(length="39"), "is damaged"),
            (lambda _, h: h.update(length="many"), "is damaged"),
            (lambda _, h: h.update(model="y"), "is damaged"),
            (lambda _, h: h.pop("length"), "is damaged"),
            (lambda _, h: h.pop("digest"), "is damaged"),
            (
                lambda _, h: h.update(format="mlx-diffgemma cache 1"),
                "not a cache file of this version",
            ),
        ],
    )
    def test_a_changed_file_is_refused(self, tmp_path, change, message):
        cache = Cache(CONFIG)
        fill(cache, 40)
        path = tmp_path / "c.safetensors"
        cache.save(path, {"model": "x"})
        tensors, header = read_tensors(path)
        mx.eval(tensors)
        change(tensors, header)
        write_tensors(path, tensors, header)
        with pytest.raises(UserError, match=message):
            Cache.load(path, CONFIG)

    def test_swapped_bytes_are_noticed(self, tmp_path):
        cache = Cache(CONFIG)
        fill(cache, 40)
        path = tmp_path / "c.safetensors"
        cache.save(path)
        content = bytearray(path.read_bytes())
        first, last = (
            content.rindex(b"\x00\x00\x80\xbf"),
            content.rindex(b"\x00\x00\x00\xc0"),
        )  # -1 and -2
        assert content[first:][:4] != content[last:][:4]
        content[first : first + 4], content[last : last + 4] = (
            content[last:][:4],
            content[first:][:4],
        )
        path.write_bytes(content)
        with pytest.raises(UserError, match="is damaged"):
            Cache.load(path, CONFIG)

    def test_a_file_of_layers_that_are_too_short_is_refused(self, tmp_path):
        """Also where its digest fits, as of a file that a faulty program wrote."""
        cache = Cache(CONFIG)
        fill(cache, 40)
        cache.length = 41
        cache.save(tmp_path / "c")
        with pytest.raises(UserError, match=r"layer 5 should hold \(.*41.*\) and holds \(.*40.*\)"):
            Cache.load(tmp_path / "c", CONFIG)

    def test_a_neighbour_of_nearly_the_same_name_stays(self, tmp_path):
        cache = Cache(CONFIG)
        fill(cache, 4)
        (tmp_path / "model.safetensors").write_text("another's")
        cache.save(tmp_path / "model")
        assert (tmp_path / "model.safetensors").read_text() == "another's"
        assert Cache.load(tmp_path / "model", CONFIG)[0].length == 4

    def test_a_full_disk_leaves_the_old_file_whole(self, tmp_path, monkeypatch):
        cache = Cache(CONFIG)
        fill(cache, 4)
        cache.save(tmp_path / "c")
        fill(cache, 4)

        def full(_descriptor):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="No space left on device"):
            cache.save(tmp_path / "c")
        assert Cache.load(tmp_path / "c", CONFIG)[0].length == 4
        assert [path.name for path in tmp_path.iterdir()] == ["c"]
