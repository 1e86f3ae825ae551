"""Counted against figures that others published or measured for the released model."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from mlx.utils import tree_flatten

from mlx_diffgemma import device
from mlx_diffgemma.checkpoint.options import ConvertOptions
from mlx_diffgemma.checkpoint.plan import plan
from mlx_diffgemma.estimate import cost
from mlx_diffgemma.estimate.estimate import CHIPS, estimate
from mlx_diffgemma.estimate.macs import fit
from mlx_diffgemma.model.config import ModelConfig, VisionConfig, released_config
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.model.recipes import RECIPES, VISION, kind_of
from mlx_diffgemma.safetensors import read_headers
from tests.checkpoints import DIVISIBLE, VISIONS, config_dict

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
        conversion = plan(
            "x", divisible_folder, stored, ConvertOptions(recipe=recipe.name, dtype="bfloat16")
        )
        assert cost.weight_bytes(config, recipe) == conversion.bytes_out, recipe.name


def test_a_tower_takes_about_what_was_measured():
    rows = json.loads(
        (Path(__file__).parents[1] / "bench" / "results" / "images.json").read_text()
    )["tower"]
    vision = VisionConfig.from_dict(
        {
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "head_dim": 72,
        }
    )
    for row in rows:
        assert cost.tower_bytes(vision, row["patches"]) == pytest.approx(
            row["peak_bytes"], rel=0.34
        )


def test_cache():
    full, sliding = cost.cache_bytes(CONFIG.text, element_size=2)
    assert full == 20_480
    assert sliding / 1e6 == pytest.approx(210, abs=1)
    assert cost.run_bytes(CONFIG, 0, 262_144, 2) - cost.run_bytes(CONFIG, 0, 0, 2) == pytest.approx(
        5.4e9, rel=0.01
    )


def test_the_tower():
    """0.57 B parameters with the projection, and what groups of 64 divide of them at 8 bits."""
    config = cost.released_with_tower()
    assert cost.tower_weight_bytes(config, RECIPES["4bit"]) / 1e9 == pytest.approx(1.146, abs=0.001)
    assert cost.tower_weight_bytes(config, RECIPES["3bit"]) / 1e9 == pytest.approx(0.757, abs=0.001)
    assert cost.tower_weight_bytes(CONFIG, RECIPES["4bit"]) == 0
    plain, seen = (
        cost.run_memory(config, RECIPES["4bit"], 8192, tower=tower, patches=2520)
        for tower in (False, True)
    )
    assert seen.total - plain.total == seen.tower


class TestAnswers:
    """What check_room counts."""

    def test_the_experts_of_many_prompts(self):
        """Eight prompts of 2,048 rows: the float32 results of the experts alone are 1.5 GB."""
        at_once = cost.prefill_bytes(CONFIG.text, 8 * 2048, 2)
        assert at_once > 8 * 2048 * 8 * 2816 * 4 == 1_476_395_008
        one = cost.prefill_bytes(CONFIG.text, 2048, 2)
        assert one < cost.logits_bytes(CONFIG) < at_once

    def test_the_tower_counts_where_there_are_images(self):
        vision = VisionConfig.from_dict(VISIONS["plain"])
        model = DiffusionGemma(
            replace(ModelConfig.from_dict(config_dict(**DIVISIBLE)), vision=vision)
        )
        weights = sum(
            value.nbytes
            for name, value in tree_flatten(model.parameters())
            if name.startswith(VISION)
        )
        assert (
            cost.answers_bytes(model, [9], patches=1) - cost.answers_bytes(model, [9])
            == weights
            > 0
        )
        large = cost.tower_bytes(vision, 10**6)
        assert cost.answers_bytes(model, [9], patches=10**6) > large

    def test_a_chunk_of_the_prompts(self):
        model = DiffusionGemma(ModelConfig.from_dict(config_dict(**DIVISIBLE)))
        text = model.config.text
        whole, chunked = (
            cost.answers_bytes(model, [4000] * 8, prefill_rows=rows) for rows in (4000, 500)
        )
        assert whole - chunked == cost.prefill_bytes(text, 32_000, 4) - cost.prefill_bytes(
            text, 4000, 4
        )

    def test_logits_of_every_answer(self):
        model = DiffusionGemma(ModelConfig.from_dict(config_dict(**DIVISIBLE | {"vocab": 32_000})))
        one, eight = (cost.answers_bytes(model, [9] * count) for count in (1, 8))
        assert eight - one >= 7 * cost.logits_bytes(model.config)


def test_flops():
    parts = {part: flops / 1e12 for part, flops in cost.step_flops(CONFIG, context=512).items()}
    assert parts == pytest.approx(
        {
            "attention": 0.57,
            "dense_mlp": 0.28,
            "experts": 0.73,
            "head": 0.38,
            "scores": 0.11,
            "self_conditioning": 0.38,
        },
        abs=0.011,
    )


def test_flops_of_the_matrices_are_their_sizes():
    """A row meets every weight of the attention and the dense MLP once, and those of its own
    experts.
    """
    sizes, parts = (
        {name: math.prod(shape) for name, shape in cost.shapes(CONFIG).items()},
        cost.step_flops(CONFIG, 512),
    )
    for kind, part in (("attention", "attention"), ("dense_mlp", "dense_mlp")):
        assert parts[part] == 2 * 256 * sum(
            size for name, size in sizes.items() if kind_of(name.removesuffix(".weight")) == kind
        )
    experts = sum(size for name, size in sizes.items() if ".experts." in name) * 8 / 128
    assert parts["experts"] == 2 * 256 * (
        experts + sum(size for name, size in sizes.items() if ".router.proj" in name)
    )


def test_sliding_layers_stop_growing():
    assert (
        cost.step_flops(CONFIG, 4096)["scores"] - cost.step_flops(CONFIG, 2048)["scores"]
        == 2 * 256 * 5 * 2 * 16 * 512 * 2048
    )


def test_info_says_what_is_stored(divisible_folder, tmp_path):
    from mlx_diffgemma.checkpoint.convert import convert
    from mlx_diffgemma.checkpoint.info import inspect

    folder = convert(str(divisible_folder), tmp_path / "q", recipe="4bit", dtype="bfloat16")
    found, config = inspect(folder), ModelConfig.from_folder(folder)
    assert found.stored_bytes == cost.weight_bytes(config, RECIPES["4bit"])
    assert found.bits_per_weight == pytest.approx(
        8 * found.stored_bytes / cost.count_parameters(config)[0]
    )
    assert "4 bits" in found.quantisation
    assert "attention 8 bits" in found.quantisation
    assert "recipe 4bit" in found.quantisation
    json.dumps(found.record())


def test_info_counts_what_is_resident_here(divisible_folder, tmp_path):
    """Not what the files hold: on a CPU what is floating is held in float32."""
    from mlx_diffgemma.checkpoint.convert import convert
    from mlx_diffgemma.checkpoint.info import CONTEXT, inspect
    from mlx_diffgemma.checkpoint.loading import load_model

    folder = convert(str(divisible_folder), tmp_path / "q", recipe="4bit", dtype="bfloat16")
    model = load_model(folder)
    resident = sum(value.nbytes for _, value in tree_flatten(model.parameters()))
    found = inspect(folder)
    assert (resident > found.stored_bytes) == device.on_cpu()
    assert found.memory_needed == resident + sum(
        cost.forward_bytes(found.config, CONTEXT, model.dtype.size)
    )


def test_one_figure_for_one_need():
    """`estimate`, `convert --fit`, `convert --dry-run` and `info` count alike."""
    recipe = RECIPES["4bit"]
    counted = cost.weight_bytes(CONFIG, recipe) + sum(cost.forward_bytes(CONFIG, 8192, 2))
    assert (
        cost.run_memory(CONFIG, recipe, 8192).total == counted == fit(CONFIG, "24GB").memory.total
    )
    assert estimate(CONFIG, recipe, CHIPS["M3 Max"], 8192).memory == counted
