"""Every layout of the same weights is the same model, loaded and converted."""

import json
import shutil

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_diffgemma.checkpoint import layouts
from mlx_diffgemma.checkpoint.convert import convert
from mlx_diffgemma.checkpoint.loading import load_model
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.safetensors import INDEX
from tests.checkpoints import make_checkpoint
from tests.helpers.tensors import tensors_of
from tests.variants import few

EXPERTS, INNER, HIDDEN = 8, 32, 64  # of the shape five-and-one


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("released"), calm=False)


def rewritten(released, target, change):
    """A copy of the checkpoint whose expert tensors ``change(prefix, gate_up, down)`` gives."""
    shutil.copytree(released, target)
    tensors = tensors_of(target)
    mx.eval(tensors)
    for path in [*target.glob("*.safetensors"), target / INDEX]:
        path.unlink()
    for layer in range(6):
        prefix = f"model.decoder.layers.{layer}.experts"
        tensors |= change(
            prefix, tensors.pop(f"{prefix}.gate_up_proj"), tensors.pop(f"{prefix}.down_proj")
        )
    mx.save_safetensors(
        str(target / "model.safetensors"), {k: mx.contiguous(v) for k, v in tensors.items()}
    )
    return target


def community(prefix, gate_up, down):
    return {f"{prefix}.gate_up_proj.weight": gate_up, f"{prefix}.down_proj.weight": down}


def apart(prefix, gate_up, down):
    gate, up = mx.split(gate_up, 2, axis=1)
    return {
        f"{prefix}.gate_proj.weight": gate,
        f"{prefix}.up_proj.weight": up,
        f"{prefix}.down_proj.weight": down,
    }


def switched(prefix, gate_up, down):
    gate, up = mx.split(gate_up, 2, axis=1)
    prefix = f"{prefix}.switch_glu"
    return {
        f"{prefix}.gate_proj.weight": gate,
        f"{prefix}.up_proj.weight": up,
        f"{prefix}.down_proj.weight": down,
    }


def one_by_one(prefix, gate_up, down):
    out = {}
    for e in range(EXPERTS):
        gate, up = mx.split(gate_up[e], 2, axis=0)
        out |= {
            f"{prefix}.{e}.gate_proj.weight": gate,
            f"{prefix}.{e}.up_proj.weight": up,
            f"{prefix}.{e}.down_proj.weight": down[e],
        }
    return out


def on_its_side(prefix, gate_up, down):
    """[experts, inputs, outputs]; gate_up is square here, so that only its sibling tells."""
    assert gate_up.shape[1] == gate_up.shape[2]
    return {
        f"{prefix}.gate_up_proj": gate_up.swapaxes(1, 2),
        f"{prefix}.down_proj": down.swapaxes(1, 2),
    }


def apart_on_their_side(prefix, gate_up, down):
    gate, up = mx.split(gate_up, 2, axis=1)
    return {
        f"{prefix}.gate_proj": gate.swapaxes(1, 2),
        f"{prefix}.up_proj": up.swapaxes(1, 2),
        f"{prefix}.down_proj": down.swapaxes(1, 2),
    }


LAYOUTS = [community, apart, switched, one_by_one, on_its_side, apart_on_their_side]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_loaded(released, tmp_path, layout):
    ours, theirs = (
        dict(tree_flatten(load_model(folder).parameters()))
        for folder in (released, rewritten(released, tmp_path / "x", layout))
    )
    for name, array in ours.items():
        assert mx.array_equal(array, theirs[name]), name


@pytest.mark.parametrize(
    "layout", few(LAYOUTS, "one_by_one", "apart_on_their_side"), ids=lambda f: f.__name__
)
def test_converted_to_the_released_layout(released, tmp_path, layout, monkeypatch):
    # slices that cut through experts
    monkeypatch.setattr(layouts, "SLICE", 4 * HIDDEN * 7)
    folder = convert(str(rewritten(released, tmp_path / "x", layout)), tmp_path / "out")
    ours, theirs = tensors_of(released), tensors_of(folder)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert mx.array_equal(array, theirs[name]), name


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_untied_copies_in_the_encoder(released, tmp_path, layout):
    folder = rewritten(released, tmp_path / "x", layout)
    tensors = tensors_of(folder)
    copies = {
        name.replace("model.decoder.", "model.encoder.language_model."): array
        for name, array in tensors.items()
        if ".experts" in name or "self_attn" in name
    }
    mx.save_safetensors(str(folder / "model.safetensors"), tensors | copies)
    load_model(folder)
    name = next(name for name in copies if "experts" in name and "down_proj" in name)
    mx.save_safetensors(
        str(folder / "model.safetensors"), tensors | copies | {name: copies[name] + 1}
    )
    with pytest.raises(UserError, match="differs from"):
        convert(str(folder), tmp_path / "out")


@pytest.mark.parametrize(
    ("layout", "gone", "message"),
    [
        (
            apart,
            "layers.3.experts.up_proj.weight",
            r"layers.3.experts.gate_up_proj is incomplete, there is only gate_proj",
        ),
        (
            one_by_one,
            "layers.2.experts.5.up_proj.weight",
            "expert 5 of .*layers.2.experts.gate_up_proj is missing",
        ),
        (
            community,
            "layers.1.experts.down_proj.weight",
            "layers.1.experts.down_proj.weight' is missing",
        ),
    ],
)
def test_incomplete_experts(released, tmp_path, layout, gone, message):
    folder = rewritten(released, tmp_path / "x", layout)
    tensors = tensors_of(folder)
    mx.eval(tensors)
    del tensors[f"model.decoder.{gone}"]
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    with pytest.raises(UserError, match=message):
        load_model(folder)


def test_quantised_experts_apart(divisible_folder, tmp_path):
    """mlx-lm's stacked layout of the sibling model, quantised."""
    fused = convert(str(divisible_folder), tmp_path / "q", recipe="4bit")
    folder = shutil.copytree(fused, tmp_path / "apart")
    tensors = tensors_of(folder)
    mx.eval(tensors)
    for name in [name for name in tensors if ".experts.gate_up_proj." in name]:
        gate, up = mx.split(tensors.pop(name), 2, axis=1)
        for part, array in (("gate_proj", gate), ("up_proj", up)):
            tensors[name.replace("gate_up_proj", part)] = mx.contiguous(array)
    (folder / INDEX).unlink()
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    ours, theirs = (dict(tree_flatten(load_model(f).parameters())) for f in (fused, folder))
    assert all(mx.array_equal(array, theirs[name]) for name, array in ours.items())
    again = convert(str(folder), tmp_path / "again")
    assert all(
        mx.array_equal(array, tensors_of(again)[name]) for name, array in tensors_of(fused).items()
    )
    assert (
        json.loads((again / "config.json").read_text())["quantization"]
        == json.loads((fused / "config.json").read_text())["quantization"]
    )


def test_bounds_that_the_config_does_not_use(tmp_path):
    """A tower written with bounds of its linear maps, by a config that clips none: they are left
    out, loaded and converted.
    """
    folder = make_checkpoint(tmp_path / "a", vision="clipped")
    raw = json.loads((folder / "config.json").read_text())
    raw["vision_config"]["use_clipped_linears"] = False
    (folder / "config.json").write_text(json.dumps(raw))
    model = load_model(folder, "float32")
    names = [name for name, _ in tree_flatten(model.parameters())]
    assert any("vision_tower" in name for name in names)
    assert not [name for name in names if name.endswith(layouts.BOUNDS)]
    converted = tensors_of(convert(str(folder), tmp_path / "b"))
    assert not [name for name in converted if name.endswith(layouts.BOUNDS)]
