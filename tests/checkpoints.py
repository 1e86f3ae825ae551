"""Random tiny checkpoints in the released layout, wide enough that the soft cap matters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

SLIDING, FULL = "sliding_attention", "full_attention"
NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
    "post_feedforward_layernorm_1",
    "post_feedforward_layernorm_2",
    "pre_feedforward_layernorm_2",
)
LAST_NORMS = (
    "post_attention_layernorm",
    "post_feedforward_layernorm",
)  # those a layer's two halves end with

# Each departs from the released shape in its own way: a window smaller than the canvas, odd head
# counts, full layers only in the newer dialect, and a window that short prompts never fill.
SHAPES: dict[str, dict[str, Any]] = {
    "five-and-one": dict(
        hidden=64,
        heads=4,
        kv=2,
        head_dim=16,
        global_kv=1,
        global_head_dim=32,
        layers=6,
        window=16,
        canvas=24,
        experts=8,
        top_k=2,
        vocab=301,
    ),
    "odd-heads": dict(
        hidden=48,
        heads=9,
        kv=3,
        head_dim=10,
        global_kv=3,
        global_head_dim=8,
        layers=4,
        window=9,
        canvas=16,
        experts=5,
        top_k=3,
        vocab=211,
        kinds=[SLIDING, FULL, SLIDING, FULL],
    ),
    "full-only": dict(
        hidden=40,
        heads=5,
        kv=5,
        head_dim=8,
        global_kv=1,
        global_head_dim=16,
        layers=3,
        window=32,
        canvas=20,
        experts=4,
        top_k=1,
        vocab=157,
        kinds=[FULL] * 3,
        dialect="per_layer",
    ),
    "wide-window": dict(
        hidden=56,
        heads=7,
        kv=7,
        head_dim=12,
        global_kv=7,
        global_head_dim=24,
        layers=3,
        window=200,
        canvas=16,
        experts=6,
        top_k=2,
        vocab=189,
        kinds=[SLIDING, SLIDING, FULL],
        dialect="per_layer",
    ),
}

# Rows that groups of 64 divide, for quantisation.
DIVISIBLE = dict(
    hidden=128,
    heads=4,
    kv=2,
    head_dim=32,
    global_kv=1,
    global_head_dim=64,
    layers=6,
    window=16,
    canvas=24,
    experts=8,
    top_k=2,
    vocab=320,
)


# Towers whose head sizes, widths and heads divide each other in different ways; patches are small,
# so that many fit.
VISIONS: dict[str, dict[str, Any]] = {
    "plain": dict(
        hidden_size=24,
        intermediate_size=36,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=8,
        patch_size=4,
        pooling_kernel_size=3,
        position_embedding_size=3400,
        standardize=True,
    ),
    "clipped": dict(
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        patch_size=2,
        pooling_kernel_size=2,
        position_embedding_size=3400,
        standardize=False,
        use_clipped_linears=True,
    ),
    # Rows that groups of 64 divide, but for those of one matrix, as in the released tower.
    "divisible": dict(
        hidden_size=128,
        intermediate_size=144,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        patch_size=8,
        pooling_kernel_size=3,
        position_embedding_size=256,
        standardize=True,
    ),
    "released-heads": dict(
        hidden_size=72,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=72,
        patch_size=4,
        pooling_kernel_size=3,
        position_embedding_size=3400,
        standardize=True,
    ),
}


def with_vision(
    shape: dict[str, Any], vision: dict[str, Any], seed: int = 0
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(further entries of config.json, weights under the checkpoint's keys) of a random tower for a
    model of ``shape``.
    """
    rng, size, inner, heads = (
        np.random.default_rng(seed),
        vision["hidden_size"],
        vision["intermediate_size"],
        vision["head_dim"],
    )
    kv, pixels = vision["num_key_value_heads"] * heads, 3 * vision["patch_size"] ** 2
    maps = {
        "self_attn.q_proj": (vision["num_attention_heads"] * heads, size),
        "self_attn.k_proj": (kv, size),
        "self_attn.v_proj": (kv, size),
        "self_attn.o_proj": (size, vision["num_attention_heads"] * heads),
        "mlp.gate_proj": (inner, size),
        "mlp.up_proj": (inner, size),
        "mlp.down_proj": (size, inner),
    }
    weights: dict[str, np.ndarray] = {
        "patch_embedder.input_proj.weight": rng.normal(0, pixels**-0.5, (size, pixels)),
        "patch_embedder.position_embedding_table": rng.normal(
            0, 0.5, (2, vision["position_embedding_size"], size)
        ),
    }
    for layer in (f"encoder.layers.{i}" for i in range(vision["num_hidden_layers"])):
        for name, matrix in maps.items():
            weights[f"{layer}.{name}.linear.weight"] = rng.normal(0, matrix[1] ** -0.5, matrix)
            if vision.get("use_clipped_linears"):
                for bound, value in (
                    ("input_min", -1.5),
                    ("input_max", 1.2),
                    ("output_min", -1.1),
                    ("output_max", 1.4),
                ):
                    weights[f"{layer}.{name}.{bound}"] = np.array(value * (1 + 0.2 * rng.random()))
        for norm in (
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        ):
            # Calm, as the backbone's layers are for the comparisons.
            weights[f"{layer}.{norm}.weight"] = (0.15 if norm in LAST_NORMS else 1.0) * (
                1 + 0.25 * rng.normal(size=size)
            )
        for norm in ("q_norm", "k_norm"):
            weights[f"{layer}.self_attn.{norm}.weight"] = heads**-0.25 * (
                1 + 0.25 * rng.normal(size=heads)
            )
    if vision["standardize"]:
        weights |= {"std_bias": rng.normal(size=size), "std_scale": 0.2 + 0.1 * rng.random(size)}
    out = {f"model.encoder.vision_tower.{key}": value for key, value in weights.items()}
    out["model.encoder.embed_vision.embedding_projection.weight"] = 3 * rng.normal(
        0, size**-0.5, (shape["hidden"], size)
    )
    rope = {"rope_type": "axial", "rope_theta": 100.0}
    tower = {"model_type": "gemma4_vision", "rope_parameters": rope} | vision
    config = {"vision_config": tower, "vision_soft_tokens_per_image": 70}
    return config, {key: value.astype(np.float32) for key, value in out.items()}


def config_dict(
    hidden: int,
    heads: int,
    kv: int,
    head_dim: int,
    global_kv: int,
    global_head_dim: int,
    layers: int,
    window: int,
    canvas: int,
    experts: int,
    top_k: int,
    vocab: int,
    kinds: list[str] | None = None,
    dialect: str = "released",
) -> dict[str, Any]:
    kinds = kinds or [FULL if (i + 1) % 6 == 0 else SLIDING for i in range(layers)]
    text: dict[str, Any] = {
        "model_type": "diffusion_gemma_text",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": hidden * 2,
        "moe_intermediate_size": hidden // 2,
        "num_experts": experts,
        "top_k_experts": top_k,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": head_dim,
        "layer_types": kinds,
        "sliding_window": window,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "final_logit_softcapping": 30.0,
        "hidden_activation": "gelu_pytorch_tanh",
        "use_bidirectional_attention": "vision",
        "pad_token_id": 0,
        "rope_parameters": {
            SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
            FULL: {
                "rope_type": "proportional",
                "rope_theta": 1_000_000.0,
                "partial_rotary_factor": 0.25,
            },
        },
    }
    if dialect == "released":
        text |= {"global_head_dim": global_head_dim, "num_global_key_value_heads": global_kv}
    else:
        text["per_layer_config"] = {
            str(i): {"head_dim": global_head_dim, "num_key_value_heads": global_kv}
            for i, kind in enumerate(kinds)
            if kind == FULL
        }
    return {
        "model_type": "diffusion_gemma",
        "architectures": ["DiffusionGemmaForBlockDiffusion"],
        "canvas_length": canvas,
        "tie_word_embeddings": True,
        "vision_config": None,
        "boi_token_id": vocab - 3,
        "eoi_token_id": vocab - 2,
        "image_token_id": vocab - 1,
        "text_config": text,
    }


def random_weights(config: dict[str, Any], seed: int, calm: bool) -> dict[str, np.ndarray]:
    """Under the checkpoint's keys; norms, scales and layer scalars vary, so that leaving one out
    shows.

    ``calm`` layers add little to the residual stream, so that rounding does not grow from layer to
    layer: the reference's own spread then lies under the absolute bounds of the comparison, as it
    does for trained weights.  Lively ones change their mind from step to step, which makes long
    trajectories.
    """
    rng, text = np.random.default_rng(seed), config["text_config"]
    hidden, heads = text["hidden_size"], text["num_attention_heads"]
    experts, inner = text["num_experts"], text["moe_intermediate_size"]

    def matrix(*shape: int, scale: float = 1.0) -> np.ndarray:
        return rng.normal(0, scale * shape[-1] ** -0.5, shape)

    def vector(size: int, mean: float = 1.0) -> np.ndarray:
        return mean * (1 + 0.25 * rng.normal(size=size))

    weights = {
        "embed_tokens.weight": matrix(text["vocab_size"], hidden, scale=3.3),
        "norm.weight": vector(hidden, 2.0),
        "self_conditioning.pre_norm.weight": vector(hidden),
    }
    for path in (
        "self_conditioning",
        *(f"layers.{i}.mlp" for i in range(text["num_hidden_layers"])),
    ):
        weights |= {
            f"{path}.gate_proj.weight": matrix(2 * hidden, hidden),
            f"{path}.up_proj.weight": matrix(2 * hidden, hidden),
            f"{path}.down_proj.weight": matrix(hidden, 2 * hidden),
        }
    overrides = text.get("per_layer_config", {})
    for i, kind in enumerate(text["layer_types"]):
        size, kv = text["head_dim"], text["num_key_value_heads"]
        if kind == FULL:
            size = overrides[str(i)]["head_dim"] if overrides else text["global_head_dim"]
            kv = (
                overrides[str(i)]["num_key_value_heads"]
                if overrides
                else text["num_global_key_value_heads"]
            )
        layer = f"layers.{i}"
        weights |= {
            f"{layer}.{norm}.weight": vector(hidden, 0.15 if calm and norm in LAST_NORMS else 1.0)
            for norm in NORMS
        }
        weights |= {
            f"{layer}.self_attn.q_proj.weight": matrix(heads * size, hidden),
            f"{layer}.self_attn.k_proj.weight": matrix(kv * size, hidden),
            f"{layer}.self_attn.o_proj.weight": matrix(hidden, heads * size),
            f"{layer}.self_attn.q_norm.weight": vector(size, size**-0.25),
            f"{layer}.self_attn.k_norm.weight": vector(size, size**-0.25),
            f"{layer}.router.proj.weight": matrix(experts, hidden, scale=1.5),
            f"{layer}.router.scale": vector(hidden),
            f"{layer}.router.per_expert_scale": vector(experts),
            f"{layer}.experts.gate_up_proj": matrix(experts, 2 * inner, hidden),
            f"{layer}.experts.down_proj": matrix(experts, hidden, inner),
            f"{layer}.layer_scalar": vector(1, 0.9),
        }
        if kind == SLIDING:
            weights[f"{layer}.self_attn.v_proj.weight"] = matrix(kv * size, hidden)
    out = {f"model.decoder.{key}": value for key, value in weights.items()}
    out |= {
        f"model.encoder.language_model.layers.{i}.layer_scalar": vector(1, 0.9)
        for i in range(text["num_hidden_layers"])
    }
    return {key: value.astype(np.float32) for key, value in out.items()}


GENERATION = {
    "max_denoising_steps": 8,
    "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.1},
    "t_min": 0.4,
    "t_max": 0.8,
    "stability_threshold": 1,
    "confidence_threshold": 0.005,
    "eos_token_id": [1, 6, 5],
    "pad_token_id": 0,
}


def make_checkpoint(
    folder: Path,
    shape: str = "five-and-one",
    seed: int = 0,
    shards: int = 2,
    calm: bool = True,
    extra: dict[str, np.ndarray] | None = None,
    vision: str | dict[str, Any] | None = None,
) -> Path:
    """A checkpoint folder without tokenizer, in ``shards`` files with an index; ``shape`` and
    ``vision`` by their names.
    """
    own = VISIONS[vision] if isinstance(vision, str) else vision
    return write_checkpoint(
        folder, DIVISIBLE if shape == "divisible" else SHAPES[shape], seed, shards, calm, extra, own
    )


def write_checkpoint(
    folder: Path,
    shape: dict[str, Any],
    seed: int = 0,
    shards: int = 2,
    calm: bool = True,
    extra: dict[str, np.ndarray] | None = None,
    vision: dict[str, Any] | None = None,
) -> Path:
    config = config_dict(**shape)
    weights = random_weights(config, seed, calm) | (extra or {})
    if vision:
        entries, tower = with_vision(shape, vision, seed)
        config, weights = config | entries, weights | tower
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    index = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {key: mx.array(weights[key]) for key in sorted(weights)[shard::shards]}
        mx.save_safetensors(str(folder / name), part, {"format": "pt"})
        index |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    return folder


def make_adapter(folder: Path) -> dict[str, mx.array]:
    """An adapter of nano that changes its answers; its weights."""
    from mlx.utils import tree_flatten

    from mlx_diffgemma import load
    from mlx_diffgemma.tuning.adapters import (
        WEIGHTS,
        AdapterOptions,
        model_fingerprint,
        prepare,
        write_config,
    )

    options = AdapterOptions(
        num_layers=2, lora_parameters={"rank": 2, "dropout": 0.0, "scale": 8.0}
    )
    model, _ = load("nano")
    base = model_fingerprint(model)
    prepare(model, options)
    weights = {
        name: mx.full(array.shape, 0.05)
        for name, array in tree_flatten(model.trainable_parameters())
    }
    write_config(folder, base, len(model.layers), options)
    mx.save_safetensors(str(folder / WEIGHTS), weights)
    return weights
