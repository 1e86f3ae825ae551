"""Measures the memory that images and videos take.

The figures are the memory by number of frames, and what the tower holds for one image at the
released shape.

    python bench/images.py

Videos go to nano-vision, at 70 soft tokens a frame, and the prompt is read in chunks.  Peaks are
MLX's own figures, without the weights.  The tower has the released widths, random weights and two
layers, because the memory that it holds at a time does not grow with the number of layers.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from documents import put_table
from mlx.utils import tree_flatten, tree_map

from mlx_diffgemma import chat_ids, load, nano, user_message
from mlx_diffgemma.decoding.loop import Loop
from mlx_diffgemma.decoding.session import Session
from mlx_diffgemma.device import describe
from mlx_diffgemma.media.images import BUDGETS, Image, fitting_size
from mlx_diffgemma.media.prompt import expand_image_tokens
from mlx_diffgemma.media.video import Film
from mlx_diffgemma.model.cache import Cache
from mlx_diffgemma.model.config import VisionConfig
from mlx_diffgemma.model.vision import VisionTower
from mlx_diffgemma.sampling.draws import Draws
from mlx_diffgemma.sampling.policy import ReferencePolicy

RESULTS = Path(__file__).parent / "results" / "images.json"
FRAMES, CHUNKS = (1, 10, 20, 40, 60), (512, 2048)
RELEASED = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 72,
    "standardize": True,
}


def noise(config: VisionConfig, budget: int, seed: int) -> Image:
    """A square image."""
    size = fitting_size(1000, 1000, config.patch_size, config.pooling_kernel_size, budget)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image(pixels, config.patch_size, config.pooling_kernel_size)


def video(model: Any, tokenizer: Any, frames: int, chunk: int) -> dict[str, Any]:
    """One answer of one canvas to a question about a video."""
    film = Film(
        tuple(noise(model.config.vision, 70, i) for i in range(frames)),
        tuple(map(float, range(frames))),
    )
    asked = chat_ids(tokenizer, [user_message("What is shown at 00:01?", 1)])
    ids, images = expand_image_tokens(asked, [film], model.config.image_tokens, tokenizer)
    generation = model.config.generation
    session = Session(
        model,
        ids,
        ReferencePolicy.from_config(generation),
        Draws(0, model.config.text.vocab_size),
        generation.eos_token_ids,
        64,
        images=images,
    )
    gc.collect()
    mx.clear_cache()
    before, began = mx.get_active_memory(), time.perf_counter()
    mx.reset_peak_memory()
    loop = Loop(model, [session], chunk)
    while loop.active:
        loop.advance()
    return {
        "frames": frames,
        "chunk": chunk,
        "tokens": len(ids),
        "peak_bytes": mx.get_peak_memory() - before,
        "cache_bytes": session.cache.nbytes,
        "pixel_bytes": sum(i.image.pixels.nbytes for i in images),
        "prefill_seconds": round(session.prefill_seconds, 2),
        "seconds": round(time.perf_counter() - began, 2),
    }


def tower(budget: int) -> dict[str, Any]:
    config = VisionConfig.from_dict(RELEASED)
    net = VisionTower(config)
    net.update(
        tree_map(
            lambda x: mx.random.normal(x.shape) * x.shape[-1] ** -0.5 if x.ndim > 1 else x,
            net.parameters(),
        )
    )
    mx.eval(net.parameters())
    image = noise(config, budget, 0)
    gc.collect()
    mx.clear_cache()
    before, began = mx.get_active_memory(), time.perf_counter()
    mx.reset_peak_memory()
    mx.eval(net(mx.array(image.patches), image.grid))
    return {
        "budget": budget,
        "soft_tokens": image.soft_tokens,
        "patches": len(image.patches),
        "peak_bytes": mx.get_peak_memory() - before,
        "seconds": round(time.perf_counter() - began, 2),
        "weights": sum(value.size for _, value in tree_flatten(net.parameters())),
    }


def table(record: dict[str, Any]) -> str:
    lines = [
        "| frames | tokens of the prompt | chunk | peak above the weights, MB | cache, MB | frames kept, MB |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['frames']} | {row['tokens']:,} | {row['chunk']:,} | {row['peak_bytes'] / 1e6:.1f} | "
        f"{row['cache_bytes'] / 1e6:.1f} | {row['pixel_bytes'] / 1e6:.1f} |"
        for row in record["videos"]
    ]
    lines += [
        "",
        "| budget | soft tokens | patches | peak of the released tower above its weights, float32, MB |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {row['budget']} | {row['soft_tokens']} | {row['patches']:,} | {row['peak_bytes'] / 1e6:.0f} |"
        for row in record["tower"]
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    model, tokenizer = load(nano.VISION)
    mx.eval(model.parameters(), Cache(model.config.text).arrays)
    video(model, tokenizer, 1, 512)  # what is compiled once
    record = {
        "machine": describe(model.dtype),
        "model": nano.VISION_VERSION,
        "videos": [video(model, tokenizer, frames, chunk) for chunk in CHUNKS for frames in FRAMES],
        "tower": [tower(budget) for budget in BUDGETS],
    }
    arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    put_table("images.md", "images.py", table(record))
    print(table(record))


if __name__ == "__main__":
    main()
