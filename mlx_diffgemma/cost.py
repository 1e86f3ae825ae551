"""What a model costs, counted from its config: parameters, bytes and FLOPs.  Nothing is read or allocated.

    >>> cost.weight_bytes(config, RECIPES["4bit"])
"""

from __future__ import annotations

import math
from dataclasses import replace

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_diffgemma.config import ModelConfig, TextConfig, VisionConfig
from mlx_diffgemma.model import DiffusionGemma
from mlx_diffgemma.recipes import Precision, Recipe, kind_of

CONTEXTS = (4096, 32_768, 262_144)  # tokens at which memory is stated


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of the text backbone by name."""
    # Building the tree allocates nothing: MLX arrays are lazy.
    return {name: value.shape for name, value in tree_flatten(DiffusionGemma(replace(config, vision=None)).parameters())}


def count_parameters(config: ModelConfig) -> tuple[int, int]:
    """(all, active in one row's canvas forward) parameters of the text backbone."""
    sizes = {name: math.prod(shape) for name, shape in shapes(config).items()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    used = experts * config.text.top_k_experts // config.text.num_experts
    return sum(sizes.values()), sum(sizes.values()) - experts + used


def class_bytes(config: ModelConfig, recipe: Recipe, dtype: mx.Dtype = mx.bfloat16) -> dict[str, int]:
    """Bytes of each class of tensors of the text backbone under a recipe; what is not quantised is held in ``dtype``.

    Errors: UserError for a recipe that does not fit the shapes.
    """
    sizes: dict[str, int] = {}
    for name, shape in shapes(config).items():
        path = name.removesuffix(".weight")
        kind = kind_of(path)
        precision = recipe.precision(kind) if len(shape) > 1 else None
        if precision:
            precision.check(path, shape[-1])
        sizes[kind] = sizes.get(kind, 0) + stored_bytes(shape, precision, dtype)
    return sizes


def weight_bytes(config: ModelConfig, recipe: Recipe, dtype: mx.Dtype = mx.bfloat16) -> int:
    """Bytes of the whole text backbone, as ``class_bytes``."""
    return sum(class_bytes(config, recipe, dtype).values())


def stored_bytes(shape: tuple[int, ...], precision: Precision | None, dtype: mx.Dtype) -> int:
    """Bytes of one tensor."""
    if precision is None:
        return math.prod(shape) * dtype.size
    return sum(math.prod(packed) * kind.size for kind, packed in precision.packed(shape, dtype).values())


def cache_bytes(text: TextConfig, element_size: int) -> tuple[int, int]:
    """(bytes a token on the full layers, bytes of all sliding layers once their windows are full)."""
    per_layer = [2 * layer.num_kv_heads * layer.head_dim * element_size for layer in text.layers]
    full = sum(size for size, layer in zip(per_layer, text.layers, strict=True) if layer.window is None)
    sliding = sum(size * (layer.window - 1) for size, layer in zip(per_layer, text.layers, strict=True) if layer.window)
    return full, sliding


def logits_bytes(config: ModelConfig) -> int:
    """Bytes of a step's float32 canvas logits, four times: raw, scaled, their softmax and what it replaces."""
    return 4 * 4 * config.canvas_length * config.text.vocab_size


def run_bytes(config: ModelConfig, weights: int, context: int, element_size: int) -> int:
    """Bytes one answer takes at ``context`` tokens: weights, K/V cache and a step's logits."""
    full, sliding = cache_bytes(config.text, element_size)
    return weights + full * context + sliding + logits_bytes(config)


def held_bytes(model: DiffusionGemma, answers: int = 1) -> tuple[int, int]:
    """(weights, caches and logits) in bytes of a loaded model with so many ``answers`` at the smallest of CONTEXTS."""
    weights = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    return weights, answers * run_bytes(model.config, 0, CONTEXTS[0], model.dtype.size)


def tower_bytes(vision: VisionConfig, patches: int) -> int:
    """About what the tower holds while it sees an image of so many ``patches``, whatever the dtype: eight times the widths of a
    layer in float32, within a third of what was measured (docs/images.md)."""
    widths = vision.hidden_size + vision.intermediate_size + 3 * vision.num_attention_heads * vision.head_dim
    return 8 * 4 * widths * patches


def step_flops(config: ModelConfig, context: int) -> dict[str, float]:
    """FLOPs of one denoising step of a whole canvas after ``context`` tokens, by part; a multiply-add counts as two.

    ``self_conditioning`` is the product of the full vocabulary's probabilities with the embedding, and its MLP.
    """
    text = config.text
    macs = dict.fromkeys(("attention", "scores", "dense_mlp", "experts", "head", "self_conditioning"), 0)
    for layer in text.layers:
        heads = 2 * text.num_attention_heads + (1 + layer.has_value_projection) * layer.num_kv_heads
        seen = config.canvas_length + (context if layer.window is None else min(context, layer.window - 1))
        macs["attention"] += heads * layer.head_dim * text.hidden_size
        macs["scores"] += 2 * text.num_attention_heads * layer.head_dim * seen
        macs["dense_mlp"] += 3 * text.hidden_size * text.intermediate_size
        macs["experts"] += text.hidden_size * (3 * text.moe_intermediate_size * text.top_k_experts + text.num_experts)
    macs["head"] = text.hidden_size * text.vocab_size
    macs["self_conditioning"] = text.hidden_size * (text.vocab_size + 3 * text.intermediate_size)
    return {part: 2.0 * count * config.canvas_length for part, count in macs.items()}

