"""Compares the estimated memory of a training step with MLX's measured peaks.

    python bench/training_memory.py

The estimate is that of mlx_diffgemma.tuning.memory.  The models are small, in several proportions,
with random weights.  They train LoRA with experts on one batch, in float32 on a CPU.  Peaks do not
include the weights.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from documents import put_table
from mlx.utils import tree_flatten
from synthetic import random_model

from mlx_diffgemma.device import describe
from mlx_diffgemma.model.config import FULL, SLIDING, ModelConfig, released_config
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.tuning.adapters import AdapterOptions, prepare
from mlx_diffgemma.tuning.memory import training_memory, ways
from mlx_diffgemma.tuning.objective import Objective, losses, make_batch
from mlx_diffgemma.tuning.trainer import TrainingOptions

RESULTS = Path(__file__).parent / "results" / "training-memory.json"
BASE = {
    "layers": 8,
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "top_k_experts": 2,
    "heads": 4,
    "vocab_size": 2048,
    "batch": 4,
    "sequence": 96,
}
CHANGES: list[dict[str, int]] = [
    {},
    {"layers": 4},
    {"hidden_size": 512},
    {"intermediate_size": 1024},
    {"moe_intermediate_size": 256},
    {"top_k_experts": 4},
    {"heads": 8},
    {"vocab_size": 32_768},
    {"batch": 8},
    {"sequence": 256},
]
OBJECTIVE = Objective(self_conditioning=1.0)


def config_of(shape: dict[str, int]) -> ModelConfig:
    raw = copy.deepcopy(dict(released_config().raw)) | {"canvas_length": 32, "vision_config": None}
    layers = shape["layers"]
    kinds = [FULL if (i + 1) % 6 == 0 or i + 1 == layers else SLIDING for i in range(layers)]
    raw["text_config"] |= {name: shape[name] for name in shape if name in raw["text_config"]} | {
        "num_hidden_layers": layers,
        "layer_types": kinds,
        "num_attention_heads": shape["heads"],
        "num_experts": 8,
        "head_dim": 32,
        "global_head_dim": 64,
        "num_key_value_heads": 2,
        "num_global_key_value_heads": 1,
        "sliding_window": 64,
    }
    return ModelConfig.from_dict(raw)


def peak(model: DiffusionGemma, shape: dict[str, int], checkpoint: bool) -> int:
    """Bytes above the weights of a step's losses and gradients."""
    rng, config = np.random.default_rng(0), model.config
    sequences = [
        rng.integers(7, config.text.vocab_size, shape["sequence"]).astype(np.int32)
        for _ in range(shape["batch"])
    ]
    batch = make_batch(
        sequences,
        [shape["sequence"] - config.canvas_length] * len(sequences),
        config.canvas_length,
        config.text.vocab_size,
        1,
        OBJECTIVE,
        rng,
    )
    model.train()
    step = nn.value_and_grad(
        model, lambda m: losses(m, batch, OBJECTIVE, checkpoint).total(OBJECTIVE)
    )
    mx.eval(model.parameters())
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(step(model))
    return mx.get_peak_memory() - before


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", action="store_true", help="only make the table")
    if not parser.parse_args().table:
        rows = []
        for change in CHANGES:
            shape = BASE | change
            model = random_model(config_of(shape), None)
            prepare(
                model,
                AdapterOptions(
                    "lora", -1, {"rank": 2, "scale": 2.0, "dropout": 0.0}, train_experts=True
                ),
            )
            trainable = sum(value.nbytes for _, value in tree_flatten(model.trainable_parameters()))
            for checkpoint in (False, True):
                counted = training_memory(
                    model.config,
                    0,
                    trainable,
                    4,
                    shape["sequence"],
                    TrainingOptions(batch_size=shape["batch"], grad_checkpoint=checkpoint),
                )
                # One step without an optimiser: of the updates only the gradient.
                row = change | {
                    "grad_checkpoint": checkpoint,
                    "measured": peak(model, shape, checkpoint),
                    "counted": counted.kept + counted.work + trainable,
                }
                rows.append(row)
                print(row, flush=True)
        record = {
            "command": "python bench/training_memory.py",
            "base": BASE,
            "machine": describe(mx.float32),
            "rows": rows,
        }
        RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    put_table("tuning.md", "training_memory.py (Macs)", macs())
    put_table(
        "tuning.md", "training_memory.py", table(json.loads(RESULTS.read_text(encoding="utf-8")))
    )


def table(record: dict[str, Any]) -> str:
    lines = [
        "| shape | measured, MB | counted, MB | with `--grad-checkpoint`, measured | counted |",
        "|---|---|---|---|---|",
    ]
    for plain, twice in zip(record["rows"][::2], record["rows"][1::2], strict=True):
        name = (
            ", ".join(
                f"{key.replace('_', ' ')} {plain[key]:,}" for key in record["base"] if key in plain
            )
            or "base"
        )
        figures = [row[key] / 1e6 for row in (plain, twice) for key in ("measured", "counted")]
        lines.append(f"| {name} | " + " | ".join(f"{figure:.0f}" for figure in figures) + " |")
    return "\n".join(lines)


def macs() -> str:
    lines = [
        "| trained | base | all | fits a Mac of | with `--grad-checkpoint` | fits |",
        "|---|---|---|---|---|---|",
    ]
    for way, plain, twice in ways(released_config(), sequence=512, batch_size=1):
        figures = (f"{memory.total / 1e9:.1f} | {memory.mac} GB" for memory in (plain, twice))
        lines.append(f"| {way} | {way.recipe} | {' | '.join(figures)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
