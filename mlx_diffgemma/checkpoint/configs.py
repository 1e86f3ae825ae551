"""config.json and generation_config.json of a converted checkpoint.

>>> raw, generation = written_configs(folder, config, {}, has_vision=False)
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_diffgemma.files import read_json
from mlx_diffgemma.model.config import FULL, ModelConfig, TextConfig
from mlx_diffgemma.model.generation_config import GENERATION, GenerationConfig
from mlx_diffgemma.model.recipes import Precision, to_config

# The names of head size and KV heads, by kind of layer, in the older dialect of config.json.
FULL_NAMES = ("global_head_dim", "num_global_key_value_heads")
SLIDING_NAMES = ("head_dim", "num_key_value_heads")


def written_configs(
    folder: Path, config: ModelConfig, precisions: Mapping[str, Precision | None], has_vision: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configs of the result, as mlx-vlm needs them.

    Args:
        folder: The folder of the source.
        config: The config of the source.
        precisions: The precision of each output, by path; None where it is not quantised.
        has_vision: Whether the result has a vision tower.

    Returns:
        (config.json in the older dialect, generation_config.json with every sampling parameter)
    """
    raw = copy.deepcopy(dict(config.raw))
    raw.pop("quantization", None)
    raw.pop("quantization_config", None)
    if any(precisions.values()):
        # the second name is where the Hub looks
        raw["quantization"] = raw["quantization_config"] = to_config(precisions)
    _name_shapes(raw["text_config"], config.text)
    if not has_vision:
        raw["vision_config"] = None  # mlx-vlm refuses a vision_config without its weights
    raw["generation_config"] = _generation_config(folder, raw, config.generation)
    return raw, raw["generation_config"]


def set_dtype(raw: dict[str, Any], dtype: str) -> None:
    """Name ``dtype`` in a config.json wherever it names one, or under the newer name."""
    for part in (raw, raw["text_config"]):
        names = [name for name in ("dtype", "torch_dtype") if name in part] or ["dtype"]
        part.update(dict.fromkeys(names, dtype))


def _name_shapes(text: dict[str, Any], config: TextConfig) -> None:
    """Replace the newer dialect's map of layers by the shapes of both kinds of layer.

    The map is kept where layers of one kind differ in shape.
    """
    if "per_layer_config" not in text:
        return
    shapes: dict[str, set[tuple[int, int]]] = {}
    for layer in config.layers:
        shapes.setdefault(layer.kind, set()).add((layer.head_dim, layer.num_kv_heads))
    if any(len(of_kind) > 1 for of_kind in shapes.values()):
        return
    del text["per_layer_config"]
    for kind, (shape,) in shapes.items():
        names = FULL_NAMES if kind == FULL else SLIDING_NAMES
        text.update(zip(names, shape, strict=True))


def _generation_config(
    folder: Path, raw: Mapping[str, Any], sampling: GenerationConfig
) -> dict[str, Any]:
    """The source's generation config, with defaults for everything that it leaves out.

    Args:
        folder: The folder of the source.
        raw: The source's config.json.
        sampling: Its sampling parameters, with the defaults.
    """
    path = folder / GENERATION
    stored = read_json(path) if path.exists() else dict(raw.get("generation_config") or {})
    generation: dict[str, Any] = copy.deepcopy(stored)
    numbers = {
        "max_denoising_steps": sampling.max_denoising_steps,
        "t_min": sampling.t_min,
        "t_max": sampling.t_max,
        "confidence_threshold": sampling.confidence_threshold,
        "stability_threshold": sampling.stability_threshold,
        "sampler_config": {
            "_cls_name": "EntropyBoundSamplerConfig",
            "entropy_bound": sampling.entropy_bound,
        },
        "eos_token_id": list(sampling.eos_token_ids),
        "pad_token_id": sampling.pad_token_id,
    }
    for key, value in numbers.items():
        if generation.get(key) is None:
            generation[key] = value
    return generation
