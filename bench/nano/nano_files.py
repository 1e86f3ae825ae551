"""Describes nano's shape in the released checkpoint's dialect, and writes its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LAYERS = 6
CONFIG = {
    "architectures": ["DiffusionGemmaForBlockDiffusion"],
    "model_type": "diffusion_gemma",
    "canvas_length": 64,
    "dtype": "bfloat16",
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
    "boi_token_id": 16,
    "eoi_token_id": 17,
    "image_token_id": 18,
    "eos_token_id": [1, 5, 13],
    "vision_config": None,
    "text_config": {
        "model_type": "diffusion_gemma_text",
        "vocab_size": 1024,
        "hidden_size": 128,
        "intermediate_size": 256,
        "moe_intermediate_size": 64,
        "num_experts": 8,
        "top_k_experts": 2,
        "num_hidden_layers": LAYERS,
        "layer_types": [
            "sliding_attention" if (i + 1) % 6 else "full_attention" for i in range(LAYERS)
        ],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_global_key_value_heads": 1,
        "head_dim": 32,
        "global_head_dim": 64,
        "sliding_window": 64,
        "max_position_embeddings": 8192,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": 1000000.0,
                "partial_rotary_factor": 0.25,
            },
        },
        "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh",
        "final_logit_softcapping": 30.0,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_bidirectional_attention": "vision",
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "dtype": "bfloat16",
    },
}

# Both thresholds are written, because mlx-vlm never stops early without them.
GENERATION_CONFIG = {
    "bos_token_id": 2,
    "eos_token_id": [1, 5, 13],
    "pad_token_id": 0,
    "max_new_tokens": 256,
    "max_denoising_steps": 48,
    "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.1},
    "t_min": 0.4,
    "t_max": 0.8,
    "stability_threshold": 1,
    "confidence_threshold": 0.005,
}


def write_configs(folder: Path, config: dict[str, Any] = CONFIG) -> None:
    """config.json and generation_config.json."""
    files: dict[str, dict[str, Any]] = {
        "config.json": config,
        "generation_config.json": GENERATION_CONFIG,
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
