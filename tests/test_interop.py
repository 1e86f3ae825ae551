"""What mlx-vlm converts we load, and what we convert mlx-vlm loads: the same logits from the same
packed weights.
"""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image as pillow

from mlx_diffgemma.checkpoint.convert import convert
from mlx_diffgemma.checkpoint.loading import load_model
from mlx_diffgemma.media.images import prepare
from mlx_diffgemma.model.cache import Cache
from mlx_diffgemma.model.recipes import RECIPES
from mlx_diffgemma.sampling import self_conditioning
from tests.checkpoints import DIVISIBLE, config_dict, make_checkpoint
from tests.helpers.deferred import Deferred
from tests.variants import few

vlm, quantization = Deferred("mlx_vlm.utils"), Deferred("mlx_vlm.quant_utils")

TOLERANCE = 1e-4  # logits of two float32 implementations; measured: 1e-5
MODES = {
    "8bit": dict(group_size=64, bits=8, mode="affine"),
    "4bit": dict(group_size=64, bits=4, mode="affine"),
    "6bit": dict(group_size=64, bits=6, mode="affine"),
    "mxfp4": dict(group_size=32, bits=4, mode="mxfp4"),
    "nvfp4": dict(group_size=16, bits=4, mode="nvfp4"),
}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """nano in float32, so that scales and activations are float32 on both sides."""
    return convert("nano", tmp_path_factory.mktemp("original") / "nano", dtype="float32")


def compare(folder):
    """Logits of a canvas after a prompt beyond the sliding window, without and with
    self-conditioning.
    """
    ours, theirs = load_model(folder, "float32"), vlm.load_model(folder)
    rng, text = np.random.default_rng(0), ours.config.text
    ids, canvas = (
        mx.array(rng.integers(1, text.vocab_size, size)) for size in (90, ours.config.canvas_length)
    )
    cache = Cache(text)
    ours.encode([ids], [cache])
    first = ours.denoise(canvas[None], [cache]).logits
    scaled = first / 0.7
    second = ours.denoise(canvas[None], [cache], self_conditioning.dense(ours, scaled)).logits
    assert mx.abs(first).max() > 5, "logits that say something"
    for mine, signal in ((first, None), (second, scaled)):
        other = theirs(ids[None], canvas_ids=canvas[None], self_conditioning_logits=signal).logits
        assert mx.abs(mine - other).max() < TOLERANCE


@pytest.mark.parametrize(
    "recipe",
    few(
        [None, *(recipe.name for recipe in RECIPES.values() if recipe.quantises)],
        None,
        "4bit",
        "mxfp4",
    ),
)
def test_mlx_vlm_loads_what_we_write(original, tmp_path, recipe):
    compare(convert(str(original), tmp_path / "out", recipe=recipe))


@pytest.mark.parametrize("name", few(["bf16", *MODES], "bf16", "4bit"))
def test_we_load_what_mlx_vlm_converts(original, tmp_path, name):
    model, config = vlm.load_model(original, lazy=True), vlm.load_config(original)
    if name in MODES:

        def predicate(path, module):  # as mlx_vlm.convert composes it
            return not vlm.skip_multimodal_module(path) and model.quant_predicate(path, module)

        model, config = quantization.quantize_model(
            model, config, **MODES[name], quant_predicate=predicate
        )
    vlm.save_weights(tmp_path, model)
    vlm.save_config(config, tmp_path / "config.json")
    compare(tmp_path)


def test_mlx_vlm_loads_a_bf16_conversion(tmp_path):
    folder = convert("nano", tmp_path / "out", recipe="bf16")
    theirs = vlm.load_model(folder)
    assert theirs.model.decoder.norm.weight.dtype == mx.bfloat16
    expected = load_model(folder, "bfloat16")
    assert mx.array_equal(
        theirs.model.decoder.layers[3].experts.gate_up_proj.weight,
        expected.model.decoder.layers[3].experts.gate_up_proj.weight,
    )


@pytest.mark.slow
def test_transformers_loads_unquantised_and_dequantised_conversions(tmp_path):
    from transformers import AutoModelForMultimodalLM

    packed = convert("nano", tmp_path / "q", recipe="4bit")
    for folder in (
        convert("nano", tmp_path / "bf16"),
        convert(str(packed), tmp_path / "d", dequantize=True),
    ):
        _, report = AutoModelForMultimodalLM.from_pretrained(folder, output_loading_info=True)
        assert not report["unexpected_keys"]
        assert not [key for key in report["missing_keys"] if "vision" not in key]


@pytest.mark.parametrize("recipe", few(["4bit", "3bit"], "3bit"))
def test_vision_towers_travel_along(tmp_path, recipe):
    """A random tower in the released layout, its 144 inputs dividing by no group: kept in bf16 or
    quantised by the recipe.
    """
    import torch
    from transformers import AutoConfig, AutoModelForMultimodalLM

    raw = config_dict(**DIVISIBLE)
    raw["vision_config"] = {
        "model_type": "gemma4_vision",
        "hidden_size": 128,
        "intermediate_size": 144,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "patch_size": 8,
        "pooling_kernel_size": 3,
        "position_embedding_size": 64,
        "standardize": True,
        "use_clipped_linears": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    }
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text(json.dumps(raw))
    torch.manual_seed(0)
    model = AutoModelForMultimodalLM.from_config(AutoConfig.from_pretrained(tmp_path / "config"))
    model.save_pretrained(tmp_path / "src")
    shutil.copy(tmp_path / "config" / "config.json", tmp_path / "src" / "config.json")
    folder = convert(str(tmp_path / "src"), tmp_path / "out", recipe=recipe)
    theirs = vlm.load_model(folder)  # strict: every key must have its place
    tower = theirs.model.encoder.vision_tower.encoder.layers[0]
    kinds = [
        type(linear).__name__
        for linear in (tower.self_attn.q_proj.linear, tower.mlp.down_proj.linear)
    ]
    assert kinds == (["QuantizedLinear", "Linear"] if recipe == "3bit" else ["Linear", "Linear"])
    assert json.loads((folder / "config.json").read_text())["vision_config"] == raw["vision_config"]
    seen_alike(load_model(folder, "float32"), theirs)


def seen_alike(ours, theirs):
    """Embeddings of an image, from both."""
    pixels = np.random.default_rng(0).integers(0, 256, (90, 150, 3), dtype=np.uint8)
    image = prepare(pillow.fromarray(pixels), ours.config.vision, 70)
    encoder, rows = theirs.model.encoder, len(image.patches)
    soft = encoder.vision_tower(mx.array(image.patches)[None], mx.array(image.positions)[None])
    assert soft.shape[1] == image.soft_tokens == rows // 9
    mine = ours.encode_image(mx.array(image.patches), image.grid)
    assert mx.abs(mine).max() > 0.5, "embeddings that say something"
    assert mx.abs(encoder.embed_vision(soft)[0].astype(mx.float32) - mine).max() < TOLERANCE


@pytest.mark.parametrize("name", few(["bf16", *MODES], "4bit"))
def test_towers_that_mlx_vlm_converts(tmp_path, name):
    """mlx-vlm leaves the tower as it is, whatever the backbone becomes."""
    source = make_checkpoint(tmp_path / "src", "divisible", vision="divisible")
    raw = json.loads((source / "config.json").read_text())
    raw["vision_config"]["default_output_length"] = 70
    (source / "config.json").write_text(json.dumps(raw))
    model, config = vlm.load_model(source, lazy=True), vlm.load_config(source)
    if name in MODES:

        def predicate(path, module):
            return not vlm.skip_multimodal_module(path) and model.quant_predicate(path, module)

        model, config = quantization.quantize_model(
            model, config, **MODES[name], quant_predicate=predicate
        )
    vlm.save_weights(tmp_path / "out", model)
    vlm.save_config(config, tmp_path / "out" / "config.json")
    seen_alike(load_model(tmp_path / "out", "float32"), vlm.load_model(tmp_path / "out"))
