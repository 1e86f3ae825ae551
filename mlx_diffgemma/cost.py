"""What a model costs, counted from its config: parameters, bytes and FLOPs.  Nothing is read or allocated.

    >>> cost.weight_bytes(config, RECIPES["4bit"])
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_diffgemma.cache import ROOM
from mlx_diffgemma.config import ModelConfig, TextConfig, VisionConfig, released_config
from mlx_diffgemma.model import DiffusionGemma
from mlx_diffgemma.recipes import VISION, Precision, Recipe, kind_of

CONTEXTS = (4096, 32_768, 262_144)  # tokens at which memory is stated
LOGITS = 3.25  # sizes of its logits that a step takes at its peak; 3.17 measured (bench/loop_memory.py)
PREFILL_ROWS = 2048  # rows of a prompt in one forward, unless told otherwise


@dataclass(frozen=True)
class RunMemory:
    """Bytes that answers take, by part.

    ``work`` is what the largest part of a forward holds at its peak: a step's logits, a chunk of a prompt, or an image in the
    tower.  They never run at the same time.
    """

    weights: int
    tower: int
    cache: int
    work: int

    @property
    def total(self) -> int:
        return self.weights + self.tower + self.cache + self.work


def shapes(config: ModelConfig, with_tower: bool = False) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter by name: of the text backbone, and of the vision tower if asked for."""
    return dict(_shapes(config.text, config.vision if with_tower else None))


@lru_cache(maxsize=8)
def _shapes(text: TextConfig, vision: VisionConfig | None) -> tuple[tuple[str, tuple[int, ...]], ...]:
    # Building the tree allocates nothing, as MLX arrays are lazy, but it takes a second at the released shape.
    model = DiffusionGemma(ModelConfig(text=text, canvas_length=1, vision=vision))
    return tuple((name, value.shape) for name, value in tree_flatten(model.parameters()))


def released_with_tower() -> ModelConfig:
    """The shape of google/diffusiongemma-26B-A4B-it with its vision tower."""
    config = released_config()
    return replace(config, vision=VisionConfig.from_dict(config.raw["released_vision_config"]))


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
        precision = recipe.precision_of(kind, shape[-1]) if len(shape) > 1 else None
        if precision:
            precision.check(path, shape[-1])
        sizes[kind] = sizes.get(kind, 0) + stored_bytes(shape, precision, dtype)
    return sizes


def weight_bytes(config: ModelConfig, recipe: Recipe, dtype: mx.Dtype = mx.bfloat16) -> int:
    """Bytes of the whole text backbone, as ``class_bytes``."""
    return sum(class_bytes(config, recipe, dtype).values())


def tower_weight_bytes(config: ModelConfig, recipe: Recipe, dtype: mx.Dtype = mx.bfloat16) -> int:
    """Bytes of the vision tower and of the projection into the backbone; 0 for a model without a tower."""
    every = shapes(config, with_tower=True)
    return sum(stored_bytes(every[name], recipe.precision_at(name, every[name]), dtype)
               for name in every.keys() - shapes(config).keys())


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


def logits_bytes(config: ModelConfig, canvas_length: int | None = None) -> int:
    """Bytes that a denoising step of one canvas holds at its peak: logits in float32, their exponentials, the entropy's terms."""
    return int(LOGITS * 4 * (canvas_length or config.canvas_length) * config.text.vocab_size)


def prefill_bytes(text: TextConfig, rows: int, element_size: int) -> int:
    """Peak bytes of a causal forward of ``rows`` rows: the results of the chosen experts.

    They are held as they are, put back in order, and in float32 for their weighted sum, beside what went in.  Attention holds at
    most SCORES scores at once, less than a step's logits at the released vocabulary.
    """
    return rows * text.hidden_size * (text.top_k_experts * (4 + 3 * element_size) + 4 * element_size)


def run_memory(config: ModelConfig, recipe: Recipe, context: int, dtype: mx.Dtype = mx.bfloat16, tower: bool = False,
               patches: int = 0) -> RunMemory:
    """What one answer takes after ``context`` tokens under a recipe, with or without the vision tower.

    ``dtype`` is that of the computation.  ``patches`` are those of the largest image.
    """
    cache, work = forward_bytes(config, context, dtype.size)
    seen = 0
    if config.vision and tower:
        seen = tower_weight_bytes(config, recipe, dtype)
        work = max(work, tower_bytes(config.vision, patches))
    return RunMemory(weight_bytes(config, recipe, dtype), seen, cache, work)


def forward_bytes(config: ModelConfig, context: int, element_size: int) -> tuple[int, int]:
    """(bytes of the K/V cache, bytes of the widest part of a forward) of one answer after ``context`` tokens of text."""
    full, sliding = cache_bytes(config.text, element_size)
    prefill = prefill_bytes(config.text, min(context, PREFILL_ROWS), element_size)
    return full * (context + ROOM) + sliding, max(logits_bytes(config), prefill)


def answers_bytes(model: DiffusionGemma, lengths: Sequence[int], patches: int = 0, prefill_rows: int = PREFILL_ROWS) -> int:
    """Bytes that answers to prompts of these ``lengths`` take side by side: weights, caches, and the widest part of a forward.

    All prompts are read in one forward, up to ``prefill_rows`` of each at a time; logits are one canvas's for each answer.
    """
    config, element = model.config, model.dtype.size
    weights = sum(array.nbytes for name, array in tree_flatten(model.parameters()) if patches or not name.startswith(VISION))
    full, sliding = cache_bytes(config.text, element)
    caches = sum(full * (length + config.canvas_length + ROOM) + sliding for length in lengths)
    rows = sum(min(length, prefill_rows) for length in lengths)
    work = [len(lengths) * logits_bytes(config), prefill_bytes(config.text, rows, element)]
    if config.vision and patches:  # one image at a time
        work.append(tower_bytes(config.vision, patches))
    return weights + caches + max(work)


def run_bytes(config: ModelConfig, weights: int, context: int, element_size: int) -> int:
    """Bytes one answer takes at ``context`` tokens: weights, K/V cache and a step's logits."""
    full, sliding = cache_bytes(config.text, element_size)
    return weights + full * context + sliding + logits_bytes(config)


def held_bytes(model: DiffusionGemma, answers: int = 1) -> tuple[int, int]:
    """(weights, caches and logits) in bytes of a loaded model with ``answers`` rows at the smallest of CONTEXTS."""
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

