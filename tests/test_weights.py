import json
import shutil

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_diffgemma import device, weights
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.weights import INDEX, load_model
from tests.checkpoints import make_checkpoint


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A copy to break."""
    return shutil.copytree(tiny_folder, tmp_path / "copy")


def rewrite(folder, change):
    """Apply ``change`` to all tensors of a folder and write them as one file."""
    tensors = dict(weights.read_tensors(folder))
    mx.eval(tensors)
    change(tensors)
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)


def test_harmless_extra_tensors_pass(folder):
    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.decoder.embed_tokens.weight"]
        tensors["model.decoder.rotary_emb.full_attention_inv_freq"] = mx.zeros((4,))
        tensors["model.decoder.embed_tokens.embed_scale"] = mx.zeros(())
        tensors["model.encoder.vision_tower.patch_embedder.input_proj.weight"] = mx.zeros((3, 3))
        tensors["model.encoder.embed_vision.embedding_projection.weight"] = mx.zeros((3, 3))
        name = "layers.0.mlp.up_proj.weight"
        tensors[f"model.encoder.language_model.{name}"] = tensors[f"model.decoder.{name}"]

    rewrite(folder, add)
    load_model(folder)


def test_an_encoder_copy_that_differs_is_refused(folder):
    name = "layers.0.mlp.up_proj.weight"
    rewrite(folder, lambda t: t.update({f"model.encoder.language_model.{name}": t[f"model.decoder.{name}"] + 1}))
    with pytest.raises(UserError, match="differs from"):
        load_model(folder)


def test_missing_tensor(folder):
    rewrite(folder, lambda t: t.pop("model.decoder.layers.3.router.scale"))
    with pytest.raises(UserError, match=r"layers\.3\.router\.scale' is missing"):
        load_model(folder)


def test_unexpected_tensor(folder):
    rewrite(folder, lambda t: t.update({"model.decoder.layers.0.surprise": mx.zeros((2,))}))
    with pytest.raises(UserError, match="unexpected tensor 'model.decoder.layers.0.surprise'"):
        load_model(folder)


def test_unexpected_encoder_tensor(folder):
    rewrite(folder, lambda t: t.update({"model.encoder.language_model.layers.0.surprise": mx.zeros((2,))}))
    with pytest.raises(UserError, match="surprise"):
        load_model(folder)


def test_wrong_shape(folder):
    rewrite(folder, lambda t: t.update({"model.decoder.norm.weight": mx.zeros((63,))}))
    with pytest.raises(UserError, match=r"norm.weight' has shape \(63,\).*\(64,\)"):
        load_model(folder)


def test_missing_shard(folder):
    next(folder.glob("*.safetensors")).unlink()
    with pytest.raises(UserError, match="lacks model-"):
        load_model(folder)


def test_truncated_file(folder):
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged or cut off"):
        load_model(folder)


def test_damaged_header(folder):
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:8] + b"!!!!" + path.read_bytes()[12:])
    with pytest.raises(UserError, match="damaged or cut off"):
        load_model(folder)


def test_index_that_promises_too_much(folder):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.decoder.ghost"] = next(iter(index["weight_map"].values()))
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match="ghost"):
        load_model(folder)


def test_no_weights_at_all(folder):
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()
    with pytest.raises(UserError, match="no .safetensors file"):
        load_model(folder)


def test_quantised_checkpoints_are_refused_for_now(folder):
    raw = json.loads((folder / "config.json").read_text()) | {"quantization": {"bits": 4, "group_size": 64}}
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="quantised"):
        load_model(folder)


def test_the_cpu_computes_in_float32(folder):
    rewrite(folder, lambda t: t.update({k: v.astype(mx.bfloat16) for k, v in t.items()}))
    assert load_model(folder).dtype == mx.float32
    assert load_model(folder, "bfloat16").dtype == mx.bfloat16


def test_compute_dtype_on_a_gpu_is_the_checkpoints(monkeypatch):
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    assert device.compute_dtype(mx.bfloat16) == mx.bfloat16
    assert device.compute_dtype(mx.float32) == mx.float32
    assert device.compute_dtype(mx.bfloat16, "float32") == mx.float32
    with pytest.raises(UserError, match="float8"):
        device.compute_dtype(mx.bfloat16, "float8")


def test_memory_is_checked_before_anything_is_loaded(folder, monkeypatch):
    monkeypatch.setattr(device, "memory_limit", lambda: 100_000)
    monkeypatch.setattr(mx, "eval", lambda *a: pytest.fail("something was loaded"))
    with pytest.raises(UserError, match=r"needs 0\.\d GB, this machine allows 0\.0 GB"):
        load_model(folder)


def test_values_survive_sharding(tmp_path):
    one, three = make_checkpoint(tmp_path / "1", shards=1), make_checkpoint(tmp_path / "3", shards=3)
    a, b = load_model(one), load_model(three)
    for x, y in zip(*(tree_flatten(m.parameters()) for m in (a, b))):
        assert x[0] == y[0]
        assert mx.array_equal(x[1], y[1]), x[0]
