"""A model with its adapter worked in answers as the two side by side."""

import json

import mlx.core as mx
import pytest

from mlx_diffgemma.checkpoint import layouts
from mlx_diffgemma.checkpoint.convert import convert
from mlx_diffgemma.checkpoint.info import inspect
from mlx_diffgemma.checkpoint.loading import load_model
from mlx_diffgemma.checkpoint.outputs import Merge, Output
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.model.recipes import Precision
from mlx_diffgemma.safetensors import write_tensors
from mlx_diffgemma.tuning.adapters import CONFIG, WEIGHTS, AdapterOptions, load_adapter
from mlx_diffgemma.tuning.fuse import fuse
from tests.helpers.adapters import LORA, outputs, save, trained
from tests.helpers.in_process import run


def options_of(kind):
    return AdapterOptions(
        "lora" if kind == "experts" else kind, -1, LORA, train_experts=kind == "experts"
    )


@pytest.fixture(scope="module")
def packed_folder(divisible_folder, tmp_path_factory):
    return convert(str(divisible_folder), tmp_path_factory.mktemp("packed") / "4bit", recipe="4bit")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Adapters by (base, kind), trained when they are first asked for."""

    class Made(dict):
        def __missing__(self, key):
            base, kind = key
            model = trained(load_model(base), options_of(kind), iters=2, rate=1.5e-2)
            folder = tmp_path_factory.mktemp(kind) / "adapters"
            save(model, options_of(kind), folder)
            self[key] = folder
            return folder

    return Made()


def with_adapter(base, adapter):
    model = load_model(base, "float32")
    load_adapter(model, adapter)
    return outputs(model)


@pytest.mark.parametrize("kind", ["dora", "full", "experts"])
def test_fused_answers_as_unfused(divisible_folder, adapters, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(layouts, "SLICE", 50_000)  # so that slices end in the middle of an expert
    adapter = adapters[divisible_folder, kind]
    fused = fuse(str(divisible_folder), adapter, tmp_path / "fused", dtype="float32")
    wanted = with_adapter(divisible_folder, adapter)
    assert mx.abs(outputs(load_model(fused)) - wanted).max() < 1e-4
    assert mx.abs(outputs(load_model(divisible_folder)) - wanted).max() > 0.1


def test_an_update_is_added_to_weights_that_were_not_rounded():
    packing, seen = Precision(4, 64), []
    packed = packing.quantize(mx.random.normal((8, 128), key=mx.random.key(0)))
    merge = Merge((8, 128), lambda rows, start, stop: seen.append(rows) or rows)
    output = Output(
        "q_proj", "attention", (8, 128), {}, packing, None, mx.bfloat16, {"weight": ()}, merge
    )
    (made,) = output._convert(packed, 0, 8)
    assert made.dtype == mx.bfloat16
    assert mx.array_equal(seen[0], packing.dequantize(packed, mx.float32))
    assert not mx.array_equal(seen[0], made.astype(mx.float32))


class TestOnAPackedBase:
    def test_what_was_changed_is_not_packed_and_answers_as_unfused(
        self, packed_folder, adapters, tmp_path
    ):
        adapter = adapters[packed_folder, "experts"]
        fused = fuse(str(packed_folder), adapter, tmp_path / "fused", dtype="float32")
        wanted = with_adapter(packed_folder, adapter)
        assert mx.abs(outputs(load_model(fused)) - wanted).max() < 1e-4
        model = load_model(fused)
        layer = model.layers[0]
        assert [
            hasattr(module, "bits")
            for module in (layer.router.proj, layer.self_attn.q_proj, layer.experts.down_proj)
        ] == [True, False, False]
        in_bfloat16 = fuse(str(packed_folder), adapter, tmp_path / "bf16", dtype="bfloat16")
        rounding = mx.abs(outputs(load_model(in_bfloat16, "float32")) - wanted)
        assert (
            0
            < rounding.mean()
            < 0.02 * mx.abs(wanted - outputs(load_model(packed_folder, "float32"))).mean()
        )

    def test_requantized_it_has_the_size_of_its_base(self, packed_folder, adapters, tmp_path):
        adapter = adapters[packed_folder, "experts"]
        fused = fuse(str(packed_folder), adapter, tmp_path / "fused", requantize=True)
        assert inspect(fused).stored_bytes == inspect(packed_folder).stored_bytes
        assert inspect(fused).config.quantization == inspect(packed_folder).config.quantization
        wanted = with_adapter(packed_folder, adapter)
        off = mx.abs(outputs(load_model(fused)) - wanted).mean()
        assert 0 < off < mx.abs(outputs(load_model(packed_folder)) - wanted).mean()

    def test_dequantized_nothing_is_packed(self, packed_folder, adapters, tmp_path):
        adapter = adapters[packed_folder, "experts"]
        fused = fuse(
            str(packed_folder), adapter, tmp_path / "fused", dequantize=True, dtype="float32"
        )
        assert inspect(fused).config.quantization is None
        assert (
            mx.abs(outputs(load_model(fused)) - with_adapter(packed_folder, adapter)).max() < 1e-4
        )


def test_refusals(divisible_folder, packed_folder, adapters, tmp_path):
    adapter, target = adapters[divisible_folder, "experts"], tmp_path / "fused"
    with pytest.raises(UserError, match="Either --dequantize or --requantize"):
        fuse(str(packed_folder), adapter, target, dequantize=True, requantize=True)
    with pytest.raises(UserError, match="no adapter folder"):
        fuse(str(divisible_folder), tmp_path / "nowhere", target)
    with pytest.raises(UserError, match="another base model"):
        fuse("nano", _without(adapter, tmp_path / "a", ".experts."), target)
    with pytest.raises(UserError, match="which .* does not have"):
        fuse(str(divisible_folder), _renamed(adapter, tmp_path / "b"), target)
    with pytest.raises(UserError, match=r"holds lora_b for .*, expected lora_a, lora_b"):
        fuse(str(divisible_folder), _without(adapter, tmp_path / "c", ".q_proj.lora_a"), target)
    with pytest.raises(UserError, match=r"has an update of shape \(\d+, 128\)"):
        fuse(str(divisible_folder), _doubled(adapter, tmp_path / "d"), target)
    assert not list(tmp_path.glob("fused*"))


def _changed(adapter, folder, change):
    folder.mkdir()
    (folder / CONFIG).write_text((adapter / CONFIG).read_text())
    write_tensors(folder / WEIGHTS, change(dict(mx.load(str(adapter / WEIGHTS)))))
    return folder


def _without(adapter, folder, part):
    return _changed(
        adapter,
        folder,
        lambda weights: {name: value for name, value in weights.items() if part not in name},
    )


def _renamed(adapter, folder):
    return _changed(
        adapter,
        folder,
        lambda weights: {
            name.replace("q_proj", "qq_proj"): value for name, value in weights.items()
        },
    )


def _doubled(adapter, folder):
    return _changed(
        adapter,
        folder,
        lambda weights: {
            name: mx.concatenate([value, value], axis=1)
            if name.endswith("0.self_attn.q_proj.lora_b")
            else value
            for name, value in weights.items()
        },
    )


def test_the_command_writes_the_fused_model_once(
    monkeypatch, capsys, divisible_folder, adapters, tmp_path
):
    adapter = adapters[divisible_folder, "dora"]
    arguments = (
        "fuse",
        "--model",
        str(divisible_folder),
        "--adapter-path",
        str(adapter),
        "--save-path",
        str(tmp_path / "fused"),
    )
    code, out, err = run(monkeypatch, capsys, *arguments, "--dtype", "float32", "--json")
    assert (code, json.loads(out.splitlines()[-1])["folder"]) == (0, str(tmp_path / "fused")), err
    assert "mlx-diffgemma fuse --model" in (tmp_path / "fused" / "README.md").read_text()
    assert (
        mx.abs(
            outputs(load_model(tmp_path / "fused")) - with_adapter(divisible_folder, adapter)
        ).max()
        < 1e-4
    )
    code, _, err = run(monkeypatch, capsys, *arguments)
    assert (code, "exists already" in err) == (2, True)
    with pytest.raises(UserError, match="worked into this model already"):
        load_adapter(load_model(tmp_path / "fused"), adapter)
    with pytest.raises(UserError, match="worked into this model already"):
        fuse(str(tmp_path / "fused"), adapter, tmp_path / "twice")
