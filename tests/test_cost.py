"""Counted against figures that others published or measured for the released model."""

import json
import math
from pathlib import Path

import pytest

from mlx_diffgemma import cost
from mlx_diffgemma.config import ModelConfig, VisionConfig, released_config
from mlx_diffgemma.convert import ConvertOptions, plan
from mlx_diffgemma.recipes import RECIPES, kind_of
from mlx_diffgemma.storage import read_headers

CONFIG = released_config()


def test_parameters():
    total, active = cost.count_parameters(CONFIG)
    assert 25.2e9 <= total < 25.3e9
    assert 3.8e9 <= active < 3.9e9


@pytest.mark.parametrize(("recipe", "gigabytes"), [("4bit", 15.4), ("8bit", 26.8), ("bf16", 50.4)])
def test_weights(recipe, gigabytes):
    assert cost.weight_bytes(CONFIG, RECIPES[recipe]) / 1e9 == pytest.approx(gigabytes, abs=0.15)


def test_the_count_is_what_a_conversion_writes(divisible_folder):
    stored, config = read_headers(divisible_folder), ModelConfig.from_folder(divisible_folder)
    for recipe in RECIPES.values():
        conversion = plan("x", divisible_folder, stored, ConvertOptions(recipe=recipe.name, dtype="bfloat16"))
        assert cost.weight_bytes(config, recipe) == conversion.bytes_out, recipe.name


def test_a_tower_takes_about_what_was_measured():
    rows = json.loads((Path(__file__).parents[1] / "bench" / "results" / "images.json").read_text())["tower"]
    vision = VisionConfig.from_dict({"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16,
                                     "num_key_value_heads": 16, "head_dim": 72})
    for row in rows:
        assert cost.tower_bytes(vision, row["patches"]) == pytest.approx(row["peak_bytes"], rel=0.34)


def test_cache():
    full, sliding = cost.cache_bytes(CONFIG.text, element_size=2)
    assert full == 20_480
    assert sliding / 1e6 == pytest.approx(210, abs=1)
    assert cost.run_bytes(CONFIG, 0, 262_144, 2) - cost.run_bytes(CONFIG, 0, 0, 2) == pytest.approx(5.4e9, rel=0.01)


def test_flops():
    parts = {part: flops / 1e12 for part, flops in cost.step_flops(CONFIG, context=512).items()}
    assert parts == pytest.approx({"attention": 0.57, "dense_mlp": 0.28, "experts": 0.73, "head": 0.38, "scores": 0.11,
                                   "self_conditioning": 0.38}, abs=0.011)


def test_flops_of_the_matrices_are_their_sizes():
    """A row meets every weight of the attention and the dense MLP once, and those of its own experts."""
    sizes, parts = {name: math.prod(shape) for name, shape in cost.shapes(CONFIG).items()}, cost.step_flops(CONFIG, 512)
    for kind, part in (("attention", "attention"), ("dense_mlp", "dense_mlp")):
        assert parts[part] == 2 * 256 * sum(size for name, size in sizes.items() if kind_of(name.removesuffix(".weight")) == kind)
    experts = sum(size for name, size in sizes.items() if ".experts." in name) * 8 / 128
    assert parts["experts"] == 2 * 256 * (experts + sum(size for name, size in sizes.items() if ".router.proj" in name))


def test_sliding_layers_stop_growing():
    assert cost.step_flops(CONFIG, 4096)["scores"] - cost.step_flops(CONFIG, 2048)["scores"] == 2 * 256 * 5 * 2 * 16 * 512 * 2048


def test_info_says_what_is_stored(divisible_folder, tmp_path):
    from mlx_diffgemma.convert import convert
    from mlx_diffgemma.info import inspect

    folder = convert(str(divisible_folder), tmp_path / "q", recipe="4bit", dtype="bfloat16")
    found, config = inspect(folder), ModelConfig.from_folder(folder)
    assert found.stored_bytes == cost.weight_bytes(config, RECIPES["4bit"])
    assert found.bits_per_weight == pytest.approx(8 * found.stored_bytes / cost.count_parameters(config)[0])
    assert "4 bits" in found.quantisation
    assert "attention 8 bits" in found.quantisation
    assert "recipe 4bit" in found.quantisation
    json.dumps(found.record())
