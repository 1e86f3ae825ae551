import gc
import json
import shutil
import tempfile
import warnings
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_diffgemma import device
from mlx_diffgemma.checkpoint import layouts
from mlx_diffgemma.checkpoint.convert import convert
from mlx_diffgemma.checkpoint.loading import load_model
from mlx_diffgemma.errors import CheckpointWarning, UserError
from mlx_diffgemma.safetensors import INDEX, read_headers
from tests.checkpoints import make_checkpoint


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A copy to break."""
    return shutil.copytree(tiny_folder, tmp_path / "copy")


def rewrite(folder, change):
    """Apply ``change`` to all tensors of a folder and write them as one file."""
    tensors = {
        name: array
        for path in folder.glob("*.safetensors")
        for name, array in mx.load(str(path)).items()
    }
    mx.eval(tensors)
    change(tensors)
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink(missing_ok=True)
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

    before = load_model(folder, "float32")
    rewrite(folder, add)
    after = load_model(folder, "float32")
    parameters = dict(tree_flatten(after.parameters()))
    for name, array in tree_flatten(before.parameters()):
        assert mx.array_equal(array, parameters.pop(name)), name
    assert not parameters, "nothing came along"
    assert after.config.vision is None


def test_a_loaded_model_holds_what_is_stored(folder):
    """Under each name of its own, also where matrices lie in one array."""
    stored = {
        name: array
        for path in folder.glob("*.safetensors")
        for name, array in mx.load(str(path)).items()
    }
    parameters = dict(tree_flatten(load_model(folder, "float32").parameters()))
    for name, array in stored.items():
        own = parameters.pop(name if name in parameters else f"{name}.weight")
        assert mx.array_equal(own, array.astype(mx.float32)), name
    assert not parameters


def test_an_encoder_copy_that_differs_is_refused(folder):
    name = "layers.0.mlp.up_proj.weight"
    rewrite(
        folder,
        lambda t: t.update(
            {f"model.encoder.language_model.{name}": t[f"model.decoder.{name}"] + 1}
        ),
    )
    with pytest.raises(UserError, match="differs from"):
        load_model(folder)


@pytest.mark.parametrize("row", [0, 40, -1])
def test_copies_are_compared_to_their_last_row(folder, monkeypatch, row):
    """In slices, as large ones are."""
    name = "layers.0.mlp.up_proj.weight"

    def differ(tensors):
        original = tensors[f"model.decoder.{name}"]
        copy = np.array(original)
        copy[row, -1] += 1
        tensors[f"model.encoder.language_model.{name}"] = mx.array(copy).astype(original.dtype)

    rewrite(folder, differ)
    monkeypatch.setattr(layouts, "SLICE", 4 * 64 * 7)
    with pytest.raises(UserError, match="differs from"):
        load_model(folder)


def test_originals_go_when_they_are_cast(divisible_folder):
    """At most one tensor is held twice."""
    tensors = read_headers(divisible_folder).values()
    cast = sum(tensor.nbytes // 2 for tensor in tensors)  # float32 to bfloat16
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = load_model(divisible_folder, "bfloat16")
    peak = mx.get_peak_memory() - before
    assert model.dtype == mx.bfloat16
    assert cast <= peak < cast + 3 * max(tensor.nbytes for tensor in tensors)
    assert 3 * max(tensor.nbytes for tensor in tensors) < cast, "else this could not fail"


def test_missing_tensor(folder):
    rewrite(folder, lambda t: t.pop("model.decoder.layers.3.router.scale"))
    with pytest.raises(UserError, match=r"layers\.3\.router\.scale' is missing"):
        load_model(folder)


def test_unexpected_tensor(folder):
    rewrite(folder, lambda t: t.update({"model.decoder.layers.0.surprise": mx.zeros((2,))}))
    with pytest.raises(UserError, match="unexpected tensor 'model.decoder.layers.0.surprise'"):
        load_model(folder)


def test_unexpected_encoder_tensor(folder):
    rewrite(
        folder,
        lambda t: t.update({"model.encoder.language_model.layers.0.surprise": mx.zeros((2,))}),
    )
    with pytest.raises(UserError, match="surprise"):
        load_model(folder)


def test_wrong_shape(folder):
    rewrite(folder, lambda t: t.update({"model.decoder.norm.weight": mx.zeros((63,))}))
    with pytest.raises(UserError, match=r"norm.weight' has shape \(63,\).*\(64,\)"):
        load_model(folder)
    narrow = {
        "model.decoder.norm.weight": mx.zeros((64,)),
        "model.decoder.layers.0.self_attn.o_proj.weight": mx.zeros((64, 60)),
    }
    rewrite(folder, lambda t: t.update(narrow))
    with pytest.raises(UserError, match=r"o_proj.weight' has shape \(64, 60\)"):
        load_model(folder)


def test_a_norm_of_integers(folder):
    rewrite(
        folder,
        lambda t: t.update({"model.decoder.norm.weight": mx.zeros((64,), dtype=mx.uint32)}),
    )
    with pytest.raises(UserError, match="stored as U32, which does not go with"):
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


def test_scales_without_a_word_in_the_config(divisible_folder, tmp_path):
    folder = convert(str(divisible_folder), tmp_path / "q", recipe="4bit")
    raw = json.loads((folder / "config.json").read_text())
    del raw["quantization"], raw["quantization_config"]
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="names no quantisation"):
        load_model(folder)


def test_a_word_in_the_config_that_the_files_contradict(divisible_folder, tmp_path):
    folder = convert(str(divisible_folder), tmp_path / "q", recipe="4bit")
    raw = json.loads((folder / "config.json").read_text())
    path = "model.decoder.layers.0.mlp.up_proj"
    raw["quantization"][path] = False
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=f"{path} is not quantised, the files say otherwise"):
        load_model(folder)


def test_a_wrong_group_size_in_the_config(divisible_folder, tmp_path):
    folder = convert(str(divisible_folder), tmp_path / "q", recipe="4bit")
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization"]["group_size"] = 32
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="experts.* has shape"):
        load_model(folder)


def test_a_foreign_quantisation_is_refused(folder):
    raw = json.loads((folder / "config.json").read_text()) | {
        "quantization_config": {"quant_method": "gptq", "bits": 4}
    }
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match="only checkpoints quantised by MLX tools are read"):
        load_model(folder)


class TestWarning:
    """Community conversions from before mlx-vlm's fix have everything at their lowest precision,
    and no mark of ours.
    """

    @staticmethod
    def warnings_of(folder, recipe, change=lambda raw: None):
        # A folder for each: without its mark one is no longer ours to overwrite.
        made = convert(
            str(folder), Path(tempfile.mkdtemp(dir=folder.parent)) / recipe, recipe=recipe
        )
        raw = json.loads((made / "config.json").read_text())
        change(raw)
        (made / "config.json").write_text(json.dumps(raw))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            load_model(made)
        return [str(w.message) for w in caught if issubclass(w.category, CheckpointWarning)]

    def test_low_attention_and_no_mark(self, divisible_folder):
        (message,) = self.warnings_of(
            divisible_folder, "uniform-4bit", lambda raw: raw.pop("mlx_diffgemma")
        )
        assert "attention at 4 bits" in message
        assert "hf download --force-download" in message

    def test_attention_at_eight_bits(self, divisible_folder):
        assert not self.warnings_of(divisible_folder, "4bit", lambda raw: raw.pop("mlx_diffgemma"))

    def test_our_own_uniform_conversion_was_warned_about_when_it_was_made(self, divisible_folder):
        assert not self.warnings_of(divisible_folder, "uniform-4bit")


def test_the_cpu_computes_in_float32(folder, monkeypatch):
    monkeypatch.setattr(device, "on_cpu", lambda: True)  # also with --as-gpu
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
    with pytest.raises(
        UserError, match=r"in float32 needs 0\.\d\d GB, this machine allows 0\.00 GB"
    ):
        load_model(folder)


def test_values_survive_sharding(tmp_path):
    one, three = (
        make_checkpoint(tmp_path / "1", shards=1),
        make_checkpoint(tmp_path / "3", shards=3),
    )
    a, b = load_model(one), load_model(three)
    for x, y in zip(*(tree_flatten(m.parameters()) for m in (a, b))):
        assert x[0] == y[0]
        assert mx.array_equal(x[1], y[1]), x[0]
