import json
import struct

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_diffgemma.errors import UserError
from mlx_diffgemma.safetensors import SafetensorsWriter, read_header, read_headers

DTYPES = [mx.bfloat16, mx.float16, mx.float32, mx.uint32, mx.uint8]


def random(dtype, shape, seed=0):
    raw = np.random.default_rng(seed).integers(0, 200, shape)
    return mx.array(raw).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_those_mlx_reads(tmp_path, dtype):
    tensors = {
        "a": random(dtype, (5, 3, 7)),
        "b": random(dtype, (11,), 1),
        "c": random(dtype, (), 2),
    }
    mx.save_safetensors(str(tmp_path / "x.safetensors"), tensors)
    found = read_header(tmp_path / "x.safetensors")
    assert {name: t.shape for name, t in found.items()} == {
        name: t.shape for name, t in tensors.items()
    }
    assert mx.array_equal(found["a"].rows(4, 13), tensors["a"].reshape(15, 7)[4:13])
    assert mx.array_equal(found["b"].rows(0, 1)[0], tensors["b"])
    assert mx.array_equal(found["c"].rows(0, 1).reshape(()), tensors["c"])
    assert found["a"].rows(0, 2).dtype == dtype


@given(
    st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(1, 6), min_size=0, max_size=3)),
        min_size=1,
        max_size=6,
    ),
    st.randoms(use_true_random=False),
)
@settings(max_examples=25, deadline=None)
def test_what_is_written_in_pieces_is_what_mlx_reads(tmp_path_factory, kinds, order):
    path = tmp_path_factory.mktemp("w") / "x.safetensors"
    tensors = {f"t{i}": random(dtype, tuple(shape), i) for i, (dtype, shape) in enumerate(kinds)}
    writer = SafetensorsWriter(
        path, {name: (t.dtype, t.shape) for name, t in tensors.items()}, {"format": "mlx"}
    )
    names = list(tensors)
    order.shuffle(names)
    for name in names:
        place = 0
        for row in tensors[name].reshape(-1, tensors[name].shape[-1] if tensors[name].ndim else 1):
            place = writer.write(name, place, row)
    writer.close()
    loaded, metadata = mx.load(str(path), return_metadata=True)
    assert metadata == {"format": "mlx"}
    assert set(loaded) == set(tensors)
    for name, t in tensors.items():
        assert loaded[name].dtype == t.dtype
        assert mx.array_equal(loaded[name], t), name


def test_tensors_begin_at_a_multiple_of_eight_and_end_where_they_should(tmp_path):
    for name in ("a", "ab", "abc"):
        path = tmp_path / f"{name}.safetensors"
        writer = SafetensorsWriter(path, {name: (mx.float32, (2, 3))}, {})
        assert writer.write(name, 12, mx.ones((3,))) == 24
        with pytest.raises(ValueError, match="do not fit"):
            writer.write(name, 12, mx.ones((4,)))
        writer.close()
        (length,) = struct.unpack("<Q", path.read_bytes()[:8])
        assert length % 8 == 0


def test_the_reference_library_reads_it(tmp_path):
    from safetensors.numpy import load_file

    writer = SafetensorsWriter(
        tmp_path / "x.safetensors", {"a": (mx.float32, (2, 3))}, {"format": "mlx"}
    )
    writer.write("a", 0, mx.arange(6).astype(mx.float32))
    writer.close()
    assert load_file(tmp_path / "x.safetensors")["a"].tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.fixture
def folder(tmp_path):
    mx.save_safetensors(
        str(tmp_path / "model.safetensors"), {"a": mx.zeros((4, 4)), "b": mx.zeros((3,))}
    )
    return tmp_path


def test_a_cut_off_file_is_noticed_without_reading_it(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="damaged or cut off .it should have"):
        read_headers(folder)


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b"[]",
        b'{"a": 3}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 12]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}',
        b'{"a": {"dtype": "F32", "shape": "x", "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32"}}',
        b'{"a": {"dtype": "F32", "shape": [1e400], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1.5], "data_offsets": [0, 4]}}',
    ],
)
def test_a_wrong_header(folder, header):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"0" * 64)
    with pytest.raises(UserError, match="damaged or cut off"):
        read_headers(folder)


@pytest.mark.parametrize("length", [11, 10**7, 10**12])
def test_a_header_longer_than_the_file(folder, length):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(UserError, match="the header is longer than the file"):
        read_headers(folder)


def test_an_empty_file(folder):
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="damaged or cut off"):
        read_headers(folder)


def test_a_dtype_that_is_not_read(folder):
    header = json.dumps({"a": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"0000")
    with pytest.raises(UserError, match="stored as F8_E4M3"):
        read_headers(folder)["a"].rows(0, 1)


def test_a_file_that_shrinks_while_it_is_read(folder):
    tensor = read_headers(folder)["a"]
    tensor.path.write_bytes(tensor.path.read_bytes()[: tensor.offset + 8])
    with pytest.raises(UserError, match="ends inside tensor 'a'"):
        tensor.rows(0, 4)


def two(folder, first, second, mapping=None):
    """A folder of two files with these tensors, and an index if there is a mapping."""
    for number, tensors in enumerate((first, second), 1):
        mx.save_safetensors(str(folder / f"model-{number}.safetensors"), tensors)
    if mapping is not None:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": mapping}))


@pytest.mark.parametrize(
    "mapping", [None, {"a": "model-1.safetensors", "b": "model-2.safetensors"}]
)
def test_a_tensor_in_two_files(tmp_path, mapping):
    two(tmp_path, {"a": mx.zeros((2,))}, {"a": mx.ones((2,)), "b": mx.ones((2,))}, mapping)
    with pytest.raises(
        UserError, match=r"tensor 'a' is in both model-1.safetensors and model-2.safetensors"
    ):
        read_headers(tmp_path)


@pytest.mark.parametrize(
    "name", ["/etc/model.safetensors", "../model-1.safetensors", "a/../../b", "a\\b", "", "a\0b"]
)
def test_an_index_that_leads_out_of_its_folder(tmp_path, name):
    two(tmp_path, {"a": mx.zeros((2,))}, {"b": mx.ones((2,))}, {"a": name})
    with pytest.raises(UserError, match="does not lie in that folder"):
        read_headers(tmp_path)


@pytest.mark.parametrize("second", [[0, 8], [4, 12], [0, 4]])
def test_tensors_that_share_bytes(folder, second):
    size = second[1] - second[0]
    entries = {
        "a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]},
        "b": {"dtype": "U8", "shape": [size], "data_offsets": second},
    }
    header = json.dumps(entries).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"0" * 64)
    with pytest.raises(UserError, match=r"'[ab]' and '[ab]' overlap"):
        read_headers(folder)


def test_a_name_that_stands_twice_in_a_header(folder):
    entry = b'"a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}'
    header = b"{" + entry + b", " + entry + b"}"
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"0" * 64)
    with pytest.raises(UserError, match="names 'a' twice"):
        read_headers(folder)


def test_a_header_that_nests_without_end(folder):
    header = b"[" * 100_000
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(UserError, match="damaged or cut off"):
        read_headers(folder)


def test_apple_doubles_are_no_weights(folder):
    (folder / "._model.safetensors").write_bytes(b"attributes")
    assert read_headers(folder).keys() == {"a", "b"}
