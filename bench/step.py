"""Measures where the time of a denoising step goes, at the widths of the released model.

    python bench/step.py                         # one sliding layer, the whole head, dense weights in the compute dtype
    python bench/step.py --recipe 4bit --layers 30    # a machine that holds it all: the whole step too
    python bench/step.py --parts sampler,self_conditioning

The weights are random, and the positions of the canvas logits have a stated entropy.  Each part
warms up once; its time is the median of ``--repeats`` runs.  Each time is printed with the FLOPs
counted from the config, the rate they amount to, and the ceiling of this machine as ``mlx-diffgemma
estimate --measure`` finds it.  The last line is one JSON record.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from synthetic import canvas_logits, median, random_model

from mlx_diffgemma.device import describe
from mlx_diffgemma.estimate import cost
from mlx_diffgemma.estimate.estimate import measure
from mlx_diffgemma.model.cache import Cache
from mlx_diffgemma.model.config import released_config
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.sampling import self_conditioning
from mlx_diffgemma.sampling.policy import ReferencePolicy
from mlx_diffgemma.sampling.sampler import KEPT, Before, Flag
from mlx_diffgemma.sampling.self_conditioning import Belief

ROOT = Path(__file__).parent.parent
PARTS = ("head", "sampler", "self_conditioning", "attention", "experts", "dense_mlp", "step")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--recipe", help="quantise by this recipe")
    parser.add_argument("--parts", default=",".join(PARTS[:-1]))
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument(
        "--certain", default="0,0.5,0.9,1", help="shares of certain positions for self-conditioning"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    config = released_config()
    every = config.text.layers
    layers = (
        every[: arguments.layers - 1] + every[-1:] if arguments.layers > 1 else every[:1]
    )  # the last one is full
    config = replace(config, text=replace(config.text, layers=layers))
    model = random_model(config, arguments.recipe)
    parts = measure_parts(model, set(arguments.parts.split(",")), arguments)
    flops = cost.step_flops(config, arguments.context)
    for name, row in parts.items():
        if count := flops.get(row.pop("counts_as", name)):
            row |= {"gflop": count / 1e9, "gflops": count / row["seconds"] / 1e9}
        print(
            f"{name:42} {1000 * row['seconds']:12,.1f} ms"
            + (f" {row['gflops']:12,.1f} GFLOP/s" if "gflops" in row else "")
            + (f"  {row['note']}" if "note" in row else "")
        )
    ceiling = measure()
    record = {
        "command": "python bench/step.py",
        "layers": len(layers),
        "recipe": arguments.recipe,
        "context": arguments.context,
        "canvas": config.canvas_length,
        "parts": parts,
        "machine": describe(model.dtype),
        "ceiling": {"bytes_per_second": 0.85 * ceiling.bandwidth, "gflops": ceiling.flops / 1e9},
    }
    print(
        f"ceiling: {ceiling.flops / 1e9:,.1f} GFLOP/s, {0.85 * ceiling.bandwidth / 1e9:,.1f} GB/s"
    )
    print(json.dumps(record))
    if arguments.output:
        arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def measure_parts(
    model: DiffusionGemma, wanted: set[str], arguments: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    config, repeats = model.config, arguments.repeats
    length, hidden = config.canvas_length, config.text.hidden_size
    parts: dict[str, dict[str, Any]] = {}
    x = mx.random.normal((length, hidden)).astype(model.dtype)
    layer = model.model.decoder.layers[0]
    if "head" in wanted:
        parts["head"] = {"seconds": median(lambda: model.logits(x), repeats)}
    if "dense_mlp" in wanted:
        parts["dense_mlp, one layer"] = {"seconds": median(lambda: layer.mlp(x), repeats)}
    if "experts" in wanted:
        parts["experts, one layer"] = {
            "seconds": median(lambda: layer.experts(x, *layer.router(x)), repeats)
        }
    policy = ReferencePolicy.from_config(config.generation, coverage=1 - 1e-6)
    u, renoise = np.zeros((1, length), np.float32), np.zeros((1, length), np.int32)
    blank, eos = mx.zeros((1, length), dtype=mx.int32), mx.array([1])
    before = Before(blank, blank > 0, blank[None])
    for certain in map(float, arguments.certain.split(",")):
        if not wanted & {"sampler", "self_conditioning"}:
            break
        logits = canvas_logits(config, certain)
        mx.eval(logits)
        step = ReferencePolicy.sample([policy], [0], [length], logits, u, renoise, before, eos)
        mx.eval([array for array in step if array is not None])
        entropy, uncovered = step.entropy.mean().item(), int(step.flags[0, Flag.UNCOVERED].item())
        note = f"mean entropy {entropy:.3f} nats, {uncovered / length:.1%} of positions fall back to dense"
        belief = Belief(
            logits, mx.array([policy.schedule(0)]), step.kept, step.uncovered, [uncovered]
        )
        if "self_conditioning" in wanted:
            seconds = median(lambda: self_conditioning.soft_embedding(model, belief), repeats)  # noqa: B023 (run at once)
            parts[f"self-conditioning, sparse, {certain:.0%} certain"] = {
                "seconds": seconds,
                "note": note,
            }
    if "self_conditioning" in wanted:
        scaled = logits / 0.8
        mx.eval(scaled)
        parts["self-conditioning, dense"] = {
            "seconds": median(lambda: self_conditioning.dense(model, scaled), repeats),
            "counts_as": "self_conditioning",
        }
    if "sampler" in wanted:

        def sample(p: ReferencePolicy) -> list[mx.array]:
            return [
                a
                for a in ReferencePolicy.sample([p], [0], [length], logits, u, renoise, before, eos)
                if a is not None
            ]

        plain = replace(policy, coverage=None)
        parts["sampler"] = {"seconds": median(lambda: sample(plain), repeats)}
        parts[f"sampler with the {KEPT} largest"] = {
            "seconds": median(lambda: sample(policy), repeats)
        }
    if wanted & {"attention", "step"}:
        cache = Cache(config.text)
        model.encode([mx.random.randint(0, config.text.vocab_size, (arguments.context,))], [cache])
        mx.eval(cache.arrays)
    if "attention" in wanted:
        parts["attention and norms, one layer"] = {
            "seconds": median(lambda: _attention(model, x, cache), repeats)
        }
    if "step" in wanted:
        canvas = mx.random.randint(0, config.text.vocab_size, (1, length))
        parts["step"] = {
            "seconds": median(lambda: model.denoise(canvas, [cache], x[None]).logits, repeats)
        }
    return parts


def _attention(model: DiffusionGemma, x: mx.array, cache: Cache) -> mx.array:
    from mlx_diffgemma.model.attention import Segment, rope_table

    layer, shape = model.model.decoder.layers[0], model.config.text.layers[0]
    table = rope_table(mx.arange(cache.length, cache.length + x.shape[0]), shape)
    out: mx.array = layer.self_attn(
        layer.input_layernorm(x), table, [Segment(0, x.shape[0], cache, canvas=True)], 0
    )
    return out


if __name__ == "__main__":
    main()
