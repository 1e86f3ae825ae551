"""Measures what a user waits for, by preset.

The figures are the time to the first text, tokens a second, steps, tokens a forward, and peak
memory.

    python bench/generate.py                                   # nano, one prompt of each of its tasks
    python bench/generate.py --model path --prompt "Write a limerick." --presets reference,fast
    --repeats 5

Every prompt runs once to warm up, then ``--repeats`` times with other seeds.  Times are medians
over prompts and seeds.  The printed ceiling is that of ``mlx-diffgemma estimate --measure``: no
step can be faster on this machine.  The last line is one JSON record.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_diffgemma import GenerationWarning, chat_ids, load, nano, stream_generate
from mlx_diffgemma.device import describe
from mlx_diffgemma.estimate.estimate import estimate, measure
from mlx_diffgemma.evaluation.tasks import tasks_named
from mlx_diffgemma.model.recipes import recipe_named
from mlx_diffgemma.sampling.rules import PRESETS

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=nano.NAME)
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        help="may be given more than once; default: nano's tasks",
    )
    parser.add_argument("--presets", default=",".join(PRESETS))
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    model, tokenizer = load(arguments.model)
    asked = arguments.prompt or [task.questions(1)[0].prompt for task in tasks_named("nano")]
    prompts = [chat_ids(tokenizer, [{"role": "user", "content": text}]) for text in asked]
    rows = {}
    for preset in arguments.presets.split(","):
        options = {"preset": preset} | (
            {"max_tokens": arguments.max_tokens} if arguments.max_tokens else {}
        )
        runs = [
            answer(model, tokenizer, prompt, options | {"seed": seed})
            for prompt in prompts
            for seed in range(arguments.repeats + 1)
        ]
        rows[preset] = row = summary(
            [run for index, run in enumerate(runs) if index % (arguments.repeats + 1)]
        )
        print(
            f"{preset:10} {row['tokens_per_second']:8.1f} tokens/s, first text after {row['first_text_seconds']:.3f} s, "
            f"{row['steps_per_canvas']:.2f} steps a canvas, {row['tokens_per_forward']:.1f} tokens a forward, "
            f"{1000 * row['seconds_per_step']:.1f} ms a step, peak {row['peak_memory'] / 1e9:.3f} GB",
            flush=True,
        )
    floor = None
    if (
        recipe := model.config.recipe
    ) or not model.config.quantization:  # else nobody knows how many bytes are read
        ceiling = estimate(
            model.config, recipe_named(recipe or "bf16"), measure(), max(map(len, prompts))
        )
        floor = ceiling.step_seconds
        print(
            f"ceiling: a step takes at least {1000 * floor:.1f} ms here, bound by {ceiling.bound_by}"
        )
    record = {
        "command": f"python bench/generate.py --repeats {arguments.repeats}",
        "prompts": len(prompts),
        "presets": rows,
        "least_step_seconds": floor,
        "model": nano.VERSION if arguments.model == nano.NAME else arguments.model,
        "machine": describe(model.dtype),
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record))


def answer(
    model: Any, tokenizer: Any, prompt: list[int], options: dict[str, Any]
) -> dict[str, float]:
    mx.clear_cache()
    mx.reset_peak_memory()
    began, first, responses = time.perf_counter(), None, []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GenerationWarning)
        for response in stream_generate(model, tokenizer, prompt, **options):
            responses.append(response)
            if first is None and response.text:
                first = time.perf_counter() - began
    seconds, last = time.perf_counter() - began, responses[-1]
    return {
        "seconds": seconds,
        "first": seconds if first is None else first,
        "tokens": last.generation_tokens,
        "rate": last.generation_tps,
        "prompt_rate": last.prompt_tps,
        "steps": sum(r.steps for r in responses),
        "canvases": len(responses),
        "peak": mx.get_peak_memory(),
        "decoding": last.generation_tokens / last.generation_tps,
    }


def summary(runs: list[dict[str, float]]) -> dict[str, float]:
    def total(key: str) -> float:
        return sum(run[key] for run in runs)

    return {
        "answers": len(runs),
        "tokens_per_second": total("tokens") / total("decoding"),
        "median_tokens_per_second": statistics.median(run["rate"] for run in runs),
        "prompt_tokens_per_second": statistics.median(run["prompt_rate"] for run in runs),
        "first_text_seconds": statistics.median(run["first"] for run in runs),
        "seconds": statistics.median(run["seconds"] for run in runs),
        "steps_per_canvas": total("steps") / total("canvases"),
        "tokens_per_forward": total("tokens") / total("steps"),
        "seconds_per_step": total("decoding") / total("steps"),
        "peak_memory": max(run["peak"] for run in runs),
    }


if __name__ == "__main__":
    main()
