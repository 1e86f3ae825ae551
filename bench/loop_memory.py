"""Measures the peak memory of denoising steps at the released vocabulary and canvas.

    python bench/loop_memory.py

The layers are tiny, so this measures the part of a step that grows with the vocabulary: logits,
sampler and self-conditioning.  Peaks are given in sizes of the canvas logits (268 MB for each row
of the batch), without the weights.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from documents import put_table
from synthetic import random_model

from mlx_diffgemma.decoding.loop import Loop
from mlx_diffgemma.decoding.session import Session
from mlx_diffgemma.device import describe
from mlx_diffgemma.model.config import ModelConfig, released_config
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.sampling.draws import Draws
from mlx_diffgemma.sampling.policy import ReferencePolicy

RESULTS = Path(__file__).parent / "results" / "loop-memory.json"
SETTINGS = {"dense": None, "sparse": 0.999999}
STEPS = 3
# Seen with `--label` on the commit before the logits were dropped after each step.
HELD = "logits held through the next step"
DROPPED = "only the signal is kept"


def shaped() -> ModelConfig:
    """The released config with one tiny layer; vocabulary and canvas are as released."""
    config = released_config()
    layer = replace(config.text.layers[0], num_kv_heads=1, head_dim=32, rotated=16)
    text = replace(
        config.text,
        layers=(layer,),
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=32,
        num_experts=2,
        top_k_experts=1,
        num_attention_heads=1,
    )
    return replace(config, text=text, vision=None)


def peaks(model: DiffusionGemma, coverage: float | None, rows: int) -> list[dict[str, int]]:
    """Bytes held before each step, and its peak, of ``rows`` sessions side by side."""
    vocabulary = model.config.text.vocab_size
    policy = ReferencePolicy.from_config(model.config.generation, coverage=coverage)
    sessions = [
        Session(model, [5, 6, 7], policy, Draws(row, vocabulary), (1,), 256) for row in range(rows)
    ]
    loop = Loop(model, sessions)
    found = []
    for _ in range(STEPS):
        mx.synchronize()
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        loop.advance()
        mx.synchronize()
        found.append({"before": before, "peak": mx.get_peak_memory()})
    return found


def measure(rows: list[int]) -> list[dict[str, Any]]:
    mx.random.seed(0)
    model = random_model(shaped(), None)
    mx.eval(model.parameters())
    weights = mx.get_active_memory()
    logits = 4 * model.config.canvas_length * model.config.text.vocab_size
    return [
        {
            "self_conditioning": name,
            "rows": count,
            "weights": weights,
            "logits": logits * count,
            "steps": peaks(model, coverage, count),
        }
        for count in rows
        for name, coverage in SETTINGS.items()
    ]


def table(record: dict[str, Any]) -> str:
    lines = [
        "| self-conditioning | rows | what is kept | between two steps, MB | peak of a step, MB | in sizes of the logits |",
        "|---|---|---|---|---|---|",
    ]
    for label in (HELD, DROPPED):
        for row in record[label]:
            later = row["steps"][1:]
            before, peak = (max(step[name] for step in later) for name in ("before", "peak"))
            lines.append(
                f"| {row['self_conditioning']} | {row['rows']} | {label} | {before / 1e6:,.0f} | {peak / 1e6:,.0f} | "
                f"{(peak - row['weights']) / row['logits']:.2f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", default="1,2", help="sessions side by side, comma-separated; eight take 7 GB"
    )
    parser.add_argument(
        "--label", default=DROPPED, help="under which name the figures are recorded"
    )
    parser.add_argument("--table", action="store_true", help="only make the table")
    arguments = parser.parse_args()
    record = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if not arguments.table:
        record |= {
            "command": "python bench/loop_memory.py",
            "machine": describe(mx.float32),
            arguments.label: measure([int(count) for count in arguments.rows.split(",")]),
        }
        RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(table(record))
    put_table("speed.md", "loop_memory.py", table(record))


if __name__ == "__main__":
    main()
