"""Parameters, bytes and FLOPs of a model, counted from its config without reading weights.

>>> cost.weight_bytes(config, RECIPES["4bit"])
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_diffgemma.model.cache import ROOM
from mlx_diffgemma.model.config import ModelConfig, TextConfig, VisionConfig, released_config
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.model.recipes import VISION, Precision, Recipe, kind_of

CONTEXTS = (4096, 32_768, 262_144)  # tokens at which memory is stated
# The peak memory of a step, in multiples of its logits; 3.17 was measured (bench/loop_memory.py).
LOGITS = 3.25
PREFILL_ROWS = 2048  # the default number of rows of a prompt in one forward


@dataclass(frozen=True)
class RunMemory:
    """The bytes that answers take, by part.

    ``work`` is the peak of the largest part of a forward: a step's logits, a chunk of a prompt, or
    an image in the tower.  These never run at the same time.
    """

    weights: int
    tower: int
    cache: int
    work: int

    @property
    def total(self) -> int:
        return self.weights + self.tower + self.cache + self.work


def shapes(config: ModelConfig, with_tower: bool = False) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of the text backbone, by name; ``with_tower`` adds the tower."""
    return dict(_shapes(config.text, config.vision if with_tower else None))


@lru_cache(maxsize=8)
def _shapes(
    text: TextConfig, vision: VisionConfig | None
) -> tuple[tuple[str, tuple[int, ...]], ...]:
    # Building the tree allocates nothing, as MLX arrays are lazy, but it takes a second at the
    # released shape.
    model = DiffusionGemma(ModelConfig(text=text, canvas_length=1, vision=vision))
    return tuple((name, value.shape) for name, value in tree_flatten(model.parameters()))


def released_with_tower() -> ModelConfig:
    """The shape of google/diffusiongemma-26B-A4B-it with its vision tower."""
    config = released_config()
    return replace(config, vision=VisionConfig.from_dict(config.raw["released_vision_config"]))


def count_parameters(config: ModelConfig) -> tuple[int, int]:
    """The parameters of the text backbone.

    Returns:
        (all, those that are active in one row's canvas forward)
    """
    sizes = {name: math.prod(shape) for name, shape in shapes(config).items()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    used = experts * config.text.top_k_experts // config.text.num_experts
    return sum(sizes.values()), sum(sizes.values()) - experts + used


def class_bytes(
    config: ModelConfig, recipe: Recipe, dtype: mx.Dtype = mx.bfloat16
) -> dict[str, int]:
    """The bytes of each class of tensors of the text backbone under a recipe.

    Args:
        config: The model's config.
        recipe: The recipe.
        dtype: The dtype of tensors that are not quantised.

    Raises:
        UserError: The recipe does not fit the shapes.
    """
    sizes: dict[str, int] = {}
    for name, shape in shapes(config).items():
        path = name.removesuffix(".weight")
        kind = kind_of(path)
        precision = recipe.precision_of(kind, shape[-1]) if len(shape) > 1 else None
        if precision:
            precision.check(path, shape[-1])
        sizes[kind] = sizes.get(kind, 0) + stored_bytes(shape, precision, dtype)
    return sizes


def weight_bytes(config: ModelConfig, recipe: Recipe, dtype: mx.Dtype = mx.bfloat16) -> int:
    """The bytes of the whole text backbone; the arguments are those of ``class_bytes``."""
    return sum(class_bytes(config, recipe, dtype).values())


def tower_weight_bytes(config: ModelConfig, recipe: Recipe, dtype: mx.Dtype = mx.bfloat16) -> int:
    """The bytes of the vision tower and of its projection; 0 for a model without a tower.

    The arguments are those of ``class_bytes``.
    """
    backbone = shapes(config)
    total = 0
    for name, shape in shapes(config, with_tower=True).items():
        if name not in backbone:
            total += stored_bytes(shape, recipe.precision_at(name, shape), dtype)
    return total


def stored_bytes(shape: tuple[int, ...], precision: Precision | None, dtype: mx.Dtype) -> int:
    """The bytes of one tensor.

    Args:
        shape: Its shape.
        precision: How it is quantised; None if it is not.
        dtype: The dtype of its floating-point arrays.
    """
    if precision is None:
        return math.prod(shape) * dtype.size
    arrays = precision.packed(shape, dtype).values()
    return sum(math.prod(packed) * kind.size for kind, packed in arrays)


def cache_bytes(text: TextConfig, element_size: int) -> tuple[int, int]:
    """The bytes of a K/V cache.

    Returns:
        (bytes a token on the full layers, bytes of all sliding layers once their windows are full)
    """
    full = 0
    sliding = 0
    for layer in text.layers:
        entry = 2 * layer.num_kv_heads * layer.head_dim * element_size
        if layer.window is None:
            full += entry
        else:
            sliding += entry * (layer.window - 1)
    return full, sliding


def logits_bytes(config: ModelConfig, canvas_length: int | None = None) -> int:
    """The peak bytes of a denoising step of one canvas: the logits in float32, their exponentials
    and the terms of the entropy.
    """
    return int(LOGITS * 4 * (canvas_length or config.canvas_length) * config.text.vocab_size)


def prefill_bytes(text: TextConfig, rows: int, element_size: int) -> int:
    """The peak bytes of a causal forward of ``rows`` rows.

    They are the results of the chosen experts.

    They are held as they come, in the order of the rows, and in float32 for their weighted sum,
    next to the input.  Attention holds at most SCORES scores at once, which is less than a step's
    logits at the released vocabulary.
    """
    per_element = text.top_k_experts * (4 + 3 * element_size) + 4 * element_size
    return rows * text.hidden_size * per_element


def run_memory(
    config: ModelConfig,
    recipe: Recipe,
    context: int,
    dtype: mx.Dtype = mx.bfloat16,
    tower: bool = False,
    patches: int = 0,
) -> RunMemory:
    """The memory of one answer.

    Args:
        config: The model's config.
        recipe: The recipe of its weights.
        context: The tokens before the canvas.
        dtype: The compute dtype.
        tower: Whether the vision tower is loaded.
        patches: The patches of the largest image.
    """
    cache, work = forward_bytes(config, context, dtype.size)
    tower_weights = 0
    if config.vision and tower:
        tower_weights = tower_weight_bytes(config, recipe, dtype)
        work = max(work, tower_bytes(config.vision, patches))
    return RunMemory(weight_bytes(config, recipe, dtype), tower_weights, cache, work)


def forward_bytes(config: ModelConfig, context: int, element_size: int) -> tuple[int, int]:
    """The bytes of one answer after ``context`` tokens of text, without weights.

    Returns:
        (bytes of the K/V cache, bytes of the largest part of a forward)
    """
    full, sliding = cache_bytes(config.text, element_size)
    prefill = prefill_bytes(config.text, min(context, PREFILL_ROWS), element_size)
    return full * (context + ROOM) + sliding, max(logits_bytes(config), prefill)


def answers_bytes(
    model: DiffusionGemma,
    lengths: Sequence[int],
    patches: int = 0,
    prefill_rows: int = PREFILL_ROWS,
) -> int:
    """The bytes of several answers that run together: weights, caches, largest part of a forward.

    Args:
        model: The loaded model.
        lengths: The length of each prompt.
        patches: The patches of the largest image; 0 leaves the tower out.
        prefill_rows: How many rows of each prompt are read in one forward.
    """
    config = model.config
    element = model.dtype.size
    weights = 0
    for name, array in tree_flatten(model.parameters()):
        if patches or not name.startswith(VISION):
            weights += array.nbytes
    full, sliding = cache_bytes(config.text, element)
    caches = sum(full * (length + config.canvas_length + ROOM) + sliding for length in lengths)
    rows = sum(min(length, prefill_rows) for length in lengths)
    work = [len(lengths) * logits_bytes(config), prefill_bytes(config.text, rows, element)]
    if config.vision and patches:  # one image at a time
        work.append(tower_bytes(config.vision, patches))
    return weights + caches + max(work)


def run_bytes(config: ModelConfig, weights: int, context: int, element_size: int) -> int:
    """The bytes of one answer at ``context`` tokens: weights, K/V cache and a step's logits."""
    full, sliding = cache_bytes(config.text, element_size)
    return weights + full * context + sliding + logits_bytes(config)


def held_bytes(model: DiffusionGemma, answers: int = 1) -> tuple[int, int]:
    """The bytes of a loaded model with ``answers`` rows at the smallest of CONTEXTS.

    Returns:
        (weights, caches and logits)
    """
    weights = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    return weights, answers * run_bytes(model.config, 0, CONTEXTS[0], model.dtype.size)


def tower_bytes(vision: VisionConfig, patches: int) -> int:
    """The approximate peak bytes of the tower for an image of ``patches`` patches, in any dtype.

    Eight times the widths of a layer in float32; within a third of the measurements in
    docs/images.md.
    """
    attention = 3 * vision.num_attention_heads * vision.head_dim
    widths = vision.hidden_size + vision.intermediate_size + attention
    return 8 * 4 * widths * patches


def step_flops(config: ModelConfig, context: int) -> dict[str, float]:
    """The FLOPs of one denoising step of a whole canvas after ``context`` tokens, by part.

    A multiply-add counts as two.  ``self_conditioning`` is the product of the full vocabulary's
    probabilities with the embedding, and its MLP.
    """
    text = config.text
    parts = ("attention", "scores", "dense_mlp", "experts", "head", "self_conditioning")
    macs = dict.fromkeys(parts, 0)
    for layer in text.layers:
        heads = 2 * text.num_attention_heads + (1 + layer.has_value_projection) * layer.num_kv_heads
        past = context if layer.window is None else min(context, layer.window - 1)
        seen = config.canvas_length + past
        macs["attention"] += heads * layer.head_dim * text.hidden_size
        macs["scores"] += 2 * text.num_attention_heads * layer.head_dim * seen
        macs["dense_mlp"] += 3 * text.hidden_size * text.intermediate_size
        expert_rows = 3 * text.moe_intermediate_size * text.top_k_experts
        macs["experts"] += text.hidden_size * (expert_rows + text.num_experts)
    macs["head"] = text.hidden_size * text.vocab_size
    macs["self_conditioning"] = text.hidden_size * (text.vocab_size + 3 * text.intermediate_size)
    return {part: 2.0 * count * config.canvas_length for part, count in macs.items()}
