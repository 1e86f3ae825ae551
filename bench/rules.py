"""Measures what the named rules and presets cost and gain against the reference.

The figures are scores, forwards and converged canvases.

    python bench/rules.py --work WORK                       # every setting; results that WORK already holds are kept
    python bench/rules.py --work WORK --settings "preset fast" --limit 500 --output fast.json
    python bench/rules.py --table                           # docs/speed.md and the plot from the JSON

All settings have the same prompts and seeds, so differences are paired.  Their 95 % intervals come
from drawing prompts with replacement.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from documents import put_table

from mlx_diffgemma import GenerationWarning, batch_generate, chat_ids, load, nano
from mlx_diffgemma.device import describe
from mlx_diffgemma.evaluation.tasks import tasks_named
from mlx_diffgemma.sampling.rules import PRESETS

RESULTS = Path(__file__).parent / "results" / "rules-nano.json"
COLUMNS = ("score", "forwards", "rows", "canvases", "converged", "retries", "empty")

SETTINGS: dict[str, dict[str, Any]] = {
    "reference": {},
    **{f"preset {name}": {"preset": name} for name in PRESETS if name != "reference"},
    "stop on entropy alone, 0.005": {"stability_threshold": 0},
    "stop on entropy alone, 0.02": {"stability_threshold": 0, "confidence_threshold": 0.02},
    "stop on entropy alone, 0.05": {"stability_threshold": 0, "confidence_threshold": 0.05},
    "stop when stable, 0.05": {"confidence_threshold": 0.05},
    "plateau 2": {"plateau": 2},
    "at most 8 steps": {"max_denoising_steps": 8},
    "at most 8 steps, own temperatures": {"max_denoising_steps": 8, "temperature_steps": 48},
    "confidence threshold 0.9": {"diffusion_sampler": "confidence-threshold"},
    "confidence threshold 0.6": {"diffusion_sampler": "confidence-threshold", "threshold": 0.6},
    "entropy bound 1": {"entropy_bound": 1.0},
    "t_max 0.6": {"t_max": 0.6},
    "temperature 0": {"temperature": 0.0},
    "drop tail after 1": {"drop_tail": 1},
    "canvas growing": {"canvas_length": "growing"},
    "canvas of 32": {"canvas_length": 32},
    "re-roll empty": {"reroll_empty": 2},
    "retry unconverged": {"retry_unconverged": 2},
    "coverage 0.999": {"coverage": 0.999},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=nano.NAME)
    parser.add_argument("--tasks", default="nano")
    parser.add_argument(
        "--settings", default=";".join(SETTINGS), help="names, separated by semicolons"
    )
    parser.add_argument(
        "--option", action="append", default=[], help="one more setting, as JSON of options"
    )
    parser.add_argument("--limit", type=int, default=63, help="held-out prompts a task")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--work", type=Path, default=Path("rules-work"))
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only make table and plot")
    arguments = parser.parse_args()
    if not arguments.table:
        measure(arguments)
    record = json.loads(arguments.output.read_text(encoding="utf-8"))
    print(table(record))
    if arguments.output == RESULTS and set(record["settings"]) >= set(SETTINGS):
        put_table("speed.md", "rules.py", table(record))
    plot(record, arguments.output.with_suffix(".png"))


def measure(arguments: argparse.Namespace) -> None:
    model, tokenizer = load(arguments.model)
    arguments.work.mkdir(parents=True, exist_ok=True)
    chosen = {name: SETTINGS[name] for name in filter(None, arguments.settings.split(";"))}
    chosen |= {text: json.loads(text) for text in arguments.option}
    found = {}
    for name, options in {"reference": {}, **chosen}.items():
        expanded = PRESETS.get(options.get("preset", ""), {}) | options
        key = hashlib.sha256(
            json.dumps([arguments.model, arguments.tasks, expanded], sort_keys=True).encode()
        ).hexdigest()[:8]
        path = (
            arguments.work
            / f"{name.replace(' ', '-')}-{key}-{arguments.limit}x{arguments.seeds}.npy"
        )
        if not path.exists():
            np.save(path, answers(model, tokenizer, arguments, options))
        found[name] = np.load(path)
        print(name, json.dumps(summary(found[name], found["reference"])), flush=True)
    record = {
        "command": f"python bench/rules.py --limit {arguments.limit} --seeds {arguments.seeds}",
        "tasks": arguments.tasks,
        "limit": arguments.limit,
        "seeds": arguments.seeds,
        "machine": describe(model.dtype),
        "model": nano.VERSION if arguments.model == nano.NAME else arguments.model,
        "settings": {
            name: {"options": SETTINGS.get(name, chosen.get(name))}
            | summary(data, found["reference"])
            for name, data in found.items()
        },
    }
    arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def answers(
    model: Any, tokenizer: Any, arguments: argparse.Namespace, options: dict[str, Any]
) -> np.ndarray:
    """[tasks, seeds, prompts, columns]"""
    tasks = tasks_named(arguments.tasks)
    out = np.zeros((len(tasks), arguments.seeds, arguments.limit, len(COLUMNS)))
    for row, task in enumerate(tasks):
        questions = task.questions(arguments.limit)
        prompts = [chat_ids(tokenizer, question.messages) for question in questions]
        for seed in range(arguments.seeds):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", GenerationWarning)  # counted here
                given = batch_generate(
                    model,
                    tokenizer,
                    prompts,
                    seeds=[seed * 1_000_003 + i for i in range(arguments.limit)],
                    batch_size=arguments.batch_size,
                    **options,
                )
            for index, (answer, question) in enumerate(zip(given, questions, strict=True)):
                out[row, seed, index] = (
                    question.mark(answer.text).score,
                    answer.steps,
                    answer.rows,
                    len(answer.parts),
                    sum(part.converged for part in answer.parts),
                    answer.retries,
                    answer.finish_reason == "empty",
                )
    return out


def summary(data: np.ndarray, reference: np.ndarray) -> dict[str, Any]:
    """Means, and the paired difference of the mean task score from the reference with its interval,
    in points.
    """
    means = dict(zip(COLUMNS, data.mean(axis=(0, 1, 2)).tolist(), strict=True))
    gap = 100 * (data[..., 0] - reference[..., 0]).mean(axis=1)  # [tasks, prompts]
    rng = np.random.default_rng(0)
    draws = rng.integers(0, gap.shape[1], (2000, *gap.shape))
    means_drawn = np.take_along_axis(gap[None], draws, axis=2).mean(axis=(1, 2))
    low, high = np.quantile(means_drawn, (0.025, 0.975))
    return means | {
        "answers": data[..., 0].size,
        "score_difference": float(gap.mean()),
        "low": float(low),
        "high": float(high),
        "fewer_forwards": float(reference[..., 1].mean() / data[..., 1].mean()),
        "fewer_rows": float(reference[..., 2].mean() / data[..., 2].mean()),
        "converged": float(data[..., 4].sum() / data[..., 3].sum()),
    }


def table(record: dict[str, Any]) -> str:
    lines = [
        "| rule | mean score | against the reference, points | forwards an answer | times fewer forwards | times fewer rows | "
        "converged |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in record["settings"].items():
        gap = (
            ""
            if name == "reference"
            else f"{row['score_difference']:+.1f} ({row['low']:+.1f} to {row['high']:+.1f})"
        )
        lines.append(
            f"| {name} | {row['score']:.1%} | {gap} | {row['forwards']:.2f} | {row['fewer_forwards']:.2f} | "
            f"{row['fewer_rows']:.2f} | {row['converged']:.1%} |"
        )
    return "\n".join(lines)


def plot(record: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 6))
    for name, row in record["settings"].items():
        kind = "tab:red" if name.startswith("preset") or name == "reference" else "tab:blue"
        axes.plot(row["fewer_forwards"], 100 * row["score"], "o", color=kind)
        axes.annotate(
            name,
            (row["fewer_forwards"], 100 * row["score"]),
            fontsize=7,
            xytext=(3, 3),
            textcoords="offset points",
        )
    axes.set(
        xlabel="times fewer forwards than the reference",
        ylabel="mean task score, %",
        title=f"{record['model']}, {record['limit']} prompts a task, {record['seeds']} seeds",
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
