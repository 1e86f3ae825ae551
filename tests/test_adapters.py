"""What is trained, what an adapter changes, and which adapters are refused."""

import json

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_diffgemma.checkpoint.convert import convert
from mlx_diffgemma.checkpoint.loading import load_model
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.tuning.adapters import (
    CONFIG,
    WEIGHTS,
    AdapterOptions,
    load_adapter,
    model_fingerprint,
    prepare,
)
from tests.helpers.adapters import LORA, outputs, save, trained
from tests.variants import few


@pytest.fixture(scope="module")
def packed_folder(divisible_folder, tmp_path_factory):
    return convert(str(divisible_folder), tmp_path_factory.mktemp("packed") / "4bit", recipe="4bit")


def names(model):
    return {name for name, _ in tree_flatten(model.trainable_parameters())}


class TestPrepare:
    def test_lora_takes_attention_dense_mlp_and_self_conditioning(self, divisible_folder):
        model = load_model(divisible_folder)
        prepare(model, AdapterOptions(num_layers=2, lora_parameters=LORA))
        found = names(model)
        assert found == {name for name in found if name.endswith(("lora_a", "lora_b"))}
        layers = {name.split(".")[3] for name in found if ".layers." in name}
        assert layers == {"4", "5"}
        assert not [name for name in found if "router" in name or "experts" in name]
        # the last layer is full and has no v_proj
        assert len(found) == 2 * (7 + 6 + 3)

    def test_experts_and_router_on_demand(self, divisible_folder):
        model = load_model(divisible_folder)
        prepare(
            model,
            AdapterOptions(
                num_layers=-1, lora_parameters=LORA, train_experts=True, train_router=True
            ),
        )
        assert len([name for name in names(model) if "experts" in name]) == 6 * 4
        assert len([name for name in names(model) if "router" in name]) == 6 * 2

    def test_experts_of_the_last_layers_alone(self, divisible_folder):
        model = load_model(divisible_folder)
        prepare(
            model,
            AdapterOptions(
                num_layers=2, lora_parameters=LORA, train_experts=True, train_router=True
            ),
        )
        for part in ("experts", "router"):
            assert {name.split(".")[3] for name in names(model) if part in name} == {"4", "5"}
        model = load_model(divisible_folder)
        prepare(model, AdapterOptions("full", num_layers=2, train_experts=True, train_router=True))
        assert {name.split(".")[3] for name in names(model)} == {"4", "5"}

    def test_full(self, divisible_folder):
        model = load_model(divisible_folder)
        prepare(model, AdapterOptions("full", num_layers=1))
        assert {name.split(".")[3] for name in names(model)} == {"5"}
        prepare(model, AdapterOptions("full", num_layers=-1))
        found = names(model)
        assert "model.decoder.self_conditioning.pre_norm.weight" in found
        assert not [
            name
            for name in found
            if "layer_scalar" in name or "router" in name or "experts" in name
        ]

    def test_a_packed_model_is_not_trained_in_full(self, packed_folder):
        with pytest.raises(UserError, match="quantised model cannot be trained in full"):
            prepare(load_model(packed_folder), AdapterOptions("full", num_layers=1))

    @pytest.mark.parametrize(
        ("options", "word"),
        [
            ({"fine_tune_type": "qlora"}, "lora, dora, full"),
            ({"num_layers": 0}, "-1"),
            ({"lora_parameters": {"rank": 8}}, "missing"),
            ({"lora_parameters": LORA | {"alpha": 16}}, "scale"),
            ({"lora_parameters": LORA | {"rank": 0}}, "rank"),
            ({"lora_parameters": LORA | {"dropout": 1.0}}, "dropout"),
            ({"lora_parameters": LORA | {"r": 8}}, "unknown: r"),
            ({"fine_tune_type": "dora", "train_experts": True}, "DoRA"),
            (
                {
                    "fine_tune_type": "dora",
                    "lora_parameters": LORA | {"keys": ["experts.down_proj"]},
                },
                "DoRA",
            ),
            (
                {"lora_parameters": LORA | {"scale": "x"}},
                "lora_parameters.scale must be a number, got 'x'",
            ),
            ({"lora_parameters": LORA | {"rank": 2.0}}, "rank must be a whole number"),
            ({"lora_parameters": LORA | {"keys": "q"}}, "keys must be a list"),
        ],
    )
    def test_options_that_make_no_sense(self, options, word):
        with pytest.raises(UserError, match=word):
            AdapterOptions(**options)

    def test_what_the_model_does_not_have(self, divisible_folder):
        with pytest.raises(UserError, match="exceeds the 6 layers"):
            prepare(load_model(divisible_folder), AdapterOptions())
        with pytest.raises(UserError, match=r"'self_attn\.qkv'"):
            prepare(
                load_model(divisible_folder),
                AdapterOptions(num_layers=1, lora_parameters=LORA | {"keys": ["self_attn.qkv"]}),
            )
        for key in ("model.decoder.embed_tokens", "experts", "input_layernorm"):
            with pytest.raises(UserError, match=key):
                prepare(
                    load_model(divisible_folder),
                    AdapterOptions(num_layers=1, lora_parameters=LORA | {"keys": [key]}),
                )


@pytest.mark.parametrize("kind", few(["lora", "dora", "full", "experts"], "experts"))
def test_saved_and_loaded_is_the_same(divisible_folder, tmp_path, kind):
    options = AdapterOptions(
        "lora" if kind == "experts" else kind, -1, LORA, train_experts=kind == "experts"
    )
    before = outputs(load_model(divisible_folder))
    model = trained(load_model(divisible_folder), options)
    save(model, options, tmp_path / "adapters")
    again = load_model(divisible_folder)
    load_adapter(again, tmp_path / "adapters")
    assert mx.array_equal(outputs(again), outputs(model))
    assert mx.abs(outputs(again) - before).max() > 0.1


def test_on_a_packed_base(packed_folder, tmp_path):
    options = AdapterOptions("lora", -1, LORA, train_experts=True)
    model = trained(load_model(packed_folder), options)
    save(model, options, tmp_path / "adapters")
    again = load_model(packed_folder)
    load_adapter(again, tmp_path / "adapters")
    assert mx.array_equal(outputs(again), outputs(model))


def test_one_base_in_two_precisions_has_one_fingerprint(divisible_folder, packed_folder, tiny):
    assert model_fingerprint(load_model(divisible_folder)) == model_fingerprint(
        load_model(packed_folder)
    )
    assert model_fingerprint(load_model(divisible_folder)) != model_fingerprint(tiny)


def test_adapters_that_are_refused(divisible_folder, tmp_path, nano_pair):
    options = AdapterOptions("lora", 1, LORA)
    save(
        trained(load_model(divisible_folder), options, iters=1),
        options,
        folder := tmp_path / "adapters",
    )
    from mlx_diffgemma import nano

    with pytest.raises(UserError, match="another base model"):
        load_adapter(load_model(nano.FOLDER), folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        UserError, match="has no adapter_config.json; give the folder of an adapter"
    ):
        load_adapter(load_model(divisible_folder), tmp_path / "empty")
    with pytest.raises(UserError, match="no adapter folder"):
        load_adapter(load_model(divisible_folder), tmp_path / "nowhere")
    config = json.loads((folder / CONFIG).read_text())
    peft = {"peft_type": "LORA", "r": 8, "base_model_name_or_path": "owner/name"}
    (folder / CONFIG).write_text(json.dumps(peft))
    with pytest.raises(UserError, match=r"holds an adapter of PEFT \('LORA'\)"):
        load_adapter(load_model(divisible_folder), folder)
    (folder / CONFIG).write_text(
        json.dumps(config | {"lora_parameters": config["lora_parameters"] | {"rank": 5}})
    )
    with pytest.raises(UserError, match="does not fit this model"):
        load_adapter(load_model(divisible_folder), folder)
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-5])
    with pytest.raises(UserError, match="damaged"):
        load_adapter(load_model(divisible_folder), folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(UserError, match="has no adapters.safetensors"):
        load_adapter(load_model(divisible_folder), folder)
