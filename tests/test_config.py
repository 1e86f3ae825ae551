import json

import pytest

from mlx_diffgemma.checkpoint.loading import load_model
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.estimate.cost import count_parameters
from mlx_diffgemma.model.config import FULL, SLIDING, ModelConfig, released_config
from mlx_diffgemma.model.generation_config import GenerationConfig
from tests.checkpoints import SHAPES, VISIONS, config_dict, make_checkpoint

RELEASED = {
    **released_config().raw,
    "vision_config": {"model_type": "gemma4_vision"},
    "image_token_id": 258880,
}


def test_the_released_config():
    config = ModelConfig.from_dict(RELEASED)
    sliding, full = config.text.layers[0], config.text.layers[29]
    assert (sliding.head_dim, sliding.num_kv_heads, sliding.window, sliding.rotated) == (
        256,
        8,
        1024,
        128,
    )
    assert (full.head_dim, full.num_kv_heads, full.window, full.rotated) == (512, 2, None, 64)
    assert full.rope_theta == 1e6
    assert sliding.has_value_projection
    assert not full.has_value_projection
    total, active = count_parameters(config)
    assert 25.2e9 <= total < 25.3e9
    assert 3.8e9 <= active < 3.9e9


def test_pairs_that_turn_are_rounded_down():
    """As the reference does it: a quarter of six pairs is one and a half."""
    full = ModelConfig.from_dict(config_dict(**SHAPES["five-and-one"] | {"global_head_dim": 12}))
    assert (full.text.layers[-1].head_dim, full.text.layers[-1].rotated) == (12, 1)


def test_fields_that_are_null_are_absent():
    raw = config_dict(**SHAPES["five-and-one"])
    plain = ModelConfig.from_dict(raw)
    text = {**raw["text_config"], "hidden_activation": None, "attention_bias": None}
    nulls = {"quantization": None, "vision_config": None, "generation_config": None}
    assert ModelConfig.from_dict({**raw, **nulls, "text_config": text}) == plain


def test_both_dialects_say_the_same():
    shape = dict(SHAPES["five-and-one"])
    assert ModelConfig.from_dict(config_dict(**shape)) == ModelConfig.from_dict(
        config_dict(**shape, dialect="per_layer")
    )


def test_what_transformers_writes_is_read():
    from transformers import DiffusionGemmaConfig

    written = json.loads(
        DiffusionGemmaConfig.from_dict(json.loads(json.dumps(RELEASED))).to_json_string(
            use_diff=False
        )
    )
    assert "per_layer_config" in written["text_config"]
    assert ModelConfig.from_dict(written).text == ModelConfig.from_dict(RELEASED).text


@pytest.mark.parametrize("heads", [(8, 8), (8, 16)], ids=["all alike", "two kinds"])
def test_what_transformers_writes_of_layers_that_are_alike(heads):
    """Its per_layer_config is an empty map when all layers have one shape; an empty map is not an
    absent one.
    """
    from transformers import DiffusionGemmaConfig

    sliding, full = heads
    text = config_dict(**SHAPES["five-and-one"])["text_config"] | {
        "head_dim": sliding,
        "global_head_dim": full,
        "num_global_key_value_heads": None,
    }
    source = config_dict(**SHAPES["five-and-one"]) | {"text_config": text}
    written = json.loads(
        DiffusionGemmaConfig.from_dict(json.loads(json.dumps(source))).to_json_string(
            use_diff=False
        )
    )
    assert bool(written["text_config"]["per_layer_config"]) == (sliding != full)
    assert "global_head_dim" not in written["text_config"]
    assert ModelConfig.from_dict(written).text == ModelConfig.from_dict(source).text


def test_the_last_layer_is_full():
    raw = config_dict(**SHAPES["five-and-one"])
    raw["text_config"]["layer_types"] = [SLIDING] * 6
    assert ModelConfig.from_dict(raw).text.layers[-1].kind == FULL


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("model_type",), "gemma3", "use mlx-lm"),
        (("model_type",), None, "Not a DiffusionGemma"),
        (("text_config",), None, "lacks text_config"),
        (("tie_word_embeddings",), False, "tie_word_embeddings"),
        (
            ("text_config", "hidden_size"),
            "big",
            "hidden_size must be a whole number from 1 to 1,048,576",
        ),
        (("text_config", "num_experts"), 0, "num_experts"),
        (("text_config", "hidden_activation"), "silu", "hidden_activation"),
        (("text_config", "use_bidirectional_attention"), "all", "bidirectional"),
        (("text_config", "layer_types"), ["sliding_attention"], "layer_types"),
        (("text_config", "num_key_value_heads"), 3, "multiple of KV heads"),
        (
            ("text_config", "rope_parameters"),
            {SLIDING: {"rope_type": "yarn", "rope_theta": 1.0}},
            "yarn",
        ),
        (
            ("text_config", "rope_parameters"),
            {FULL: {"rope_type": "default", "rope_theta": 1.0}},
            "no entry",
        ),
        (("text_config", "top_k_experts"), 99, "top_k_experts must be a whole number from 1 to"),
        (("text_config", "head_dim"), 0, "head_dim must be a whole number from 2 to 1,024, got 0"),
        pytest.param(
            ("text_config", "head_dim"),
            10**5000,
            "got a number of thousands of digits",
            id="5,000 digits",
        ),
        (
            ("text_config", "num_hidden_layers"),
            10**12,
            "num_hidden_layers must be a whole number from 1 to 10,000",
        ),
        (("text_config", "max_position_embeddings"), float("inf"), "max_position_embeddings"),
        (
            ("text_config", "final_logit_softcapping"),
            0,
            "final_logit_softcapping must be a number above 0",
        ),
        (
            ("text_config", "rms_norm_eps"),
            "1e-6",
            "rms_norm_eps must be a number of at least 0, got '1e-6'",
        ),
        (("text_config", "rms_norm_eps"), float("nan"), "rms_norm_eps"),
        (("text_config", "pad_token_id"), -1, "pad_token_id"),
        (("text_config", "rope_parameters"), [1], "rope_parameters must hold named values"),
        (("text_config", "per_layer_config"), {"99": {"head_dim": 8}}, "names the layer '99'"),
        (("text_config", "per_layer_config"), {"five": {}}, "names the layer 'five'"),
        (("text_config", "layer_types"), "full_attention", "layer_types must be a list"),
        (("canvas_length",), -1, "canvas_length must be a whole number"),
        (("canvas_length",), 2.5, "canvas_length must be a whole number"),
        (("quantization",), 4, "quantization must hold named values"),
        (("vision_config",), [], "vision_config must hold named values"),
    ],
)
def test_what_cannot_be_run_is_refused(path, value, message):
    raw = config_dict(**SHAPES["five-and-one"])
    target = raw
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    with pytest.raises(UserError, match=message):
        ModelConfig.from_dict(raw)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_key_value_heads", 0),
        ("patch_size", 0),
        ("patch_size", "24"),
        ("pooling_kernel_size", -1),
        ("hidden_size", True),
        ("num_hidden_layers", 2.0),
        ("position_embedding_size", 0),
        ("head_dim", 0),
        ("num_attention_heads", "3"),
        ("intermediate_size", -8),
    ],
    ids=str,
)
def test_numbers_of_a_tower_are_positive_integers(key, value):
    raw = config_dict(**SHAPES["five-and-one"]) | {"vision_config": VISIONS["plain"] | {key: value}}
    with pytest.raises(
        UserError,
        match=rf"vision_config\.{key} must be a whole number from 1 to 1,048,576, got {value!r}",
    ):
        ModelConfig.from_dict(raw)


@pytest.mark.parametrize(
    "change", [{"rope_parameters": {"rope_theta": 0}}, {"rms_norm_eps": -1e-6}], ids=str
)
def test_a_tower_without_a_scale(change):
    with pytest.raises(UserError, match="above 0"):
        ModelConfig.from_dict(
            config_dict(**SHAPES["five-and-one"]) | {"vision_config": VISIONS["plain"] | change}
        )


def test_soft_tokens_an_image_are_checked_at_load(tmp_path):
    folder = make_checkpoint(tmp_path, vision="plain")
    raw = json.loads((folder / "config.json").read_text())
    for budget, message in (
        (256, "is 256; an image takes at most 70,"),
        (0, "must be a whole number of at least 1, got 0"),
        ("70", "must be a whole number of at least 1"),
    ):
        (folder / "config.json").write_text(
            json.dumps(raw | {"vision_soft_tokens_per_image": budget})
        )
        with pytest.raises(UserError, match=rf"vision_soft_tokens_per_image {message}"):
            load_model(folder)


def test_image_tokens_are_those_of_a_tower():
    raw = config_dict(**SHAPES["five-and-one"])
    assert ModelConfig.from_dict(raw).image_tokens is None
    tokens = ModelConfig.from_dict(raw | {"vision_config": VISIONS["plain"]}).image_tokens
    assert (tokens.begin, tokens.end, tokens.image, tokens.budget, tokens.both_ways) == (
        raw["boi_token_id"],
        raw["eoi_token_id"],
        raw["image_token_id"],
        280,
        True,
    )


def test_image_tokens_that_are_absent_are_those_of_the_reference():
    raw = config_dict(**SHAPES["five-and-one"]) | {"vision_config": VISIONS["plain"]}
    raw["text_config"]["vocab_size"] = 262_144
    for key in ("boi_token_id", "image_token_id", "eoi_token_id"):
        del raw[key]
    tokens = ModelConfig.from_dict(raw).image_tokens
    assert (tokens.begin, tokens.image, tokens.end) == (255_999, 258_880, 258_882)
    assert ModelConfig.from_dict(raw | {"image_token_id": None}).image_tokens is None


class TestGenerationConfig:
    @pytest.mark.parametrize(
        ("raw", "message"),
        [
            (
                {"max_denoising_steps": 10**12},
                "max_denoising_steps must be a whole number from 1 to 10,000, got 1000000000000",
            ),
            ({"max_denoising_steps": 2.5}, "max_denoising_steps must be a whole number"),
            ({"max_denoising_steps": 0}, "max_denoising_steps"),
            ({"max_denoising_steps": True}, "max_denoising_steps"),
            ({"stability_threshold": -1}, "stability_threshold"),
            ({"t_min": "0.4"}, "t_min must be a number of at least 0, got '0.4'"),
            ({"t_max": float("inf")}, "t_max"),
            ({"t_min": 0.9, "t_max": 0.1}, "t_min 0.9 exceeds t_max 0.1"),
            (
                {"sampler_config": {"entropy_bound": [0.1]}},
                "sampler_config.entropy_bound must be a number",
            ),
            ({"sampler_config": 3}, "sampler_config must hold named values, got 3"),
            ({"eos_token_id": "<eos>"}, "eos_token_id must be a token id or a list of token ids"),
            ({"eos_token_id": [1, 2.5]}, "eos_token_id"),
            ({"eos_token_id": [1, 2**64]}, "eos_token_id"),
            ({"eos_token_id": []}, "eos_token_id"),
            ({"pad_token_id": -3}, "pad_token_id"),
        ],
        ids=str,
    )
    def test_values_of_the_wrong_kind(self, raw, message):
        with pytest.raises(UserError, match=message):
            GenerationConfig.from_dict(raw)

    def test_end_tokens_of_config_json(self, tmp_path):
        """Without generation_config.json transformers takes them from config.json: the outer ones,
        then the text model's.
        """
        raw = config_dict(**SHAPES["five-and-one"])
        for content, ends in (
            (raw, GenerationConfig().eos_token_ids),
            (raw | {"text_config": raw["text_config"] | {"eos_token_id": [3, 4]}}, (3, 4)),
            (
                raw | {"eos_token_id": 5, "text_config": raw["text_config"] | {"eos_token_id": 3}},
                (5,),
            ),
        ):
            content.pop("generation_config", None)
            (tmp_path / "config.json").write_text(json.dumps(content))
            assert ModelConfig.from_folder(tmp_path).generation.eos_token_ids == ends

    def test_null_means_absent(self):
        assert (
            GenerationConfig.from_dict(
                {"t_min": None, "sampler_config": None, "eos_token_id": None}
            )
            == GenerationConfig()
        )

    def test_the_nested_sampler(self):
        raw = {
            "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.3},
            "eos_token_id": 7,
        }
        config = GenerationConfig.from_dict(raw)
        assert config.entropy_bound == 0.3
        assert config.eos_token_ids == (7,)

    def test_the_list_is_copied(self):
        eos = [1, 106, 50]
        config = GenerationConfig.from_dict({"eos_token_id": eos})
        eos.append(9)
        assert config.eos_token_ids == (1, 106, 50)

    def test_an_unknown_sampler_is_refused(self):
        with pytest.raises(UserError, match="OtherSampler"):
            GenerationConfig.from_dict({"sampler_config": {"_cls_name": "OtherSampler"}})

    def test_the_copy_inside_config_json(self, tmp_path):
        raw = config_dict(**SHAPES["five-and-one"]) | {
            "generation_config": {"max_denoising_steps": 5}
        }
        (tmp_path / "config.json").write_text(json.dumps(raw))
        assert ModelConfig.from_folder(tmp_path).generation.max_denoising_steps == 5
        (tmp_path / "generation_config.json").write_text('{"max_denoising_steps": 9}')
        assert ModelConfig.from_folder(tmp_path).generation.max_denoising_steps == 9
