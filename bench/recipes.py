"""Measures what a quantisation recipe costs.

The figures are size, divergence from the original, steps, convergence and task score.

    python bench/recipes.py                                              # nano, all recipes
    python bench/recipes.py --model google/diffusiongemma-26B-A4B-it --recipes 8bit,4bit,mxfp4
    --tasks nano --limit 20
    python bench/recipes.py --table                                      # docs/recipes.md and the plot from the JSON

Divergence is measured where a canvas is refined.  The original's own answers to held-out prompts
are corrupted uniformly with probability t, and one denoising forward runs without
self-conditioning. The divergence is KL(original || quantised) for each position, in nats.

The original runs first and leaves its log-probabilities on disk, so that only one model is in
memory at a time.  Where the original does not fit, ``--original RECIPE`` uses the best recipe that
does, and the record says so.  Every recipe is converted, loaded, measured, scored by ``evaluate``
and removed.  The record is written after each recipe; recipes that it already holds are not
measured again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from documents import put_table

from mlx_diffgemma import chat_ids, load, nano
from mlx_diffgemma.checkpoint import hub
from mlx_diffgemma.checkpoint.convert import convert
from mlx_diffgemma.checkpoint.info import inspect
from mlx_diffgemma.decoding.loop import Loop
from mlx_diffgemma.decoding.session import Session
from mlx_diffgemma.device import describe
from mlx_diffgemma.evaluation.run import evaluate
from mlx_diffgemma.evaluation.tasks import tasks_named
from mlx_diffgemma.model.cache import Cache
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.model.recipes import RECIPES, recipe_named
from mlx_diffgemma.sampling.draws import Draws
from mlx_diffgemma.sampling.policy import ReferencePolicy

ROOT = Path(__file__).parent.parent
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
Case = tuple[list[int], np.ndarray]  # prompt ids and the committed first canvas


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=nano.NAME)
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument(
        "--original", help="compare with this recipe in place of the checkpoint as it is"
    )
    parser.add_argument("--tasks", default="nano")
    parser.add_argument("--limit", type=int, default=100, help="held-out prompts a task")
    parser.add_argument("--prompts", type=int, default=4, help="prompts a task for the divergence")
    parser.add_argument(
        "--rows",
        type=int,
        default=16,
        help="positions of a canvas whose distributions are compared",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument(
        "--output", type=Path, default=ROOT / "bench" / "results" / "recipes-nano.json"
    )
    parser.add_argument("--table", action="store_true", help="only make the table and the plot")
    arguments = parser.parse_args()
    if not arguments.table:
        measure(arguments)
    write_docs(arguments.output)


def measure(arguments: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        source = arguments.model
        if arguments.original:
            source = str(convert(arguments.model, work / "original", recipe=arguments.original))
        settings = {
            key: getattr(arguments, key)
            for key in ("original", "tasks", "limit", "prompts", "rows", "seed")
        }
        settings["model"] = nano.VERSION if arguments.model == nano.NAME else arguments.model
        for recipe in arguments.recipes.split(","):
            recipe_named(recipe)  # an unknown name is refused before anything is measured
        model, tokenizer = load(source)
        record = _begin(arguments.output, settings, describe(model.dtype))
        cases = answers(model, tokenizer, arguments.tasks, arguments.prompts, arguments.seed)
        for index, rows in enumerate(
            log_probabilities(model, cases, arguments.rows, arguments.seed)
        ):
            np.save(work / f"{index}.npy", rows)
        todo = [
            recipe
            for recipe in ("original", *arguments.recipes.split(","))
            if recipe not in record["recipes"]
        ]
        for recipe in todo:
            folder = hub.resolve(source)
            if recipe != "original":
                del model  # one model at a time
                folder = convert(arguments.model, work / recipe, recipe=recipe)
                model, _ = load(str(folder))
            record["recipes"][recipe] = row = measure_one(
                model, tokenizer, folder, work, cases, arguments
            )
            arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            print(recipe, {key: value for key, value in row.items() if key != "tasks"}, flush=True)
            if recipe != "original":
                shutil.rmtree(folder)


def _begin(path: Path, settings: dict[str, Any], machine: dict[str, str]) -> dict[str, Any]:
    """The record to go on with, or a new one when the settings or the machine differ."""
    if path.exists():
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if (record["settings"], record["machine"]) == (settings, machine):
            return record
    return {
        "command": "python bench/recipes.py",
        "settings": settings,
        "machine": machine,
        "levels": LEVELS,
        "recipes": {},
    }


def answers(
    model: DiffusionGemma, tokenizer: Any, tasks: str, prompts: int, seed: int
) -> list[Case]:
    """The model's own first canvases on held-out prompts."""
    generation, cases = model.config.generation, []
    for task in tasks_named(tasks):
        for number, question in enumerate(task.questions(prompts)):
            ids = chat_ids(tokenizer, question.messages)
            draws = Draws(seed + number, model.config.text.vocab_size)
            session = Session(
                model,
                ids,
                ReferencePolicy.from_config(generation),
                draws,
                generation.eos_token_ids,
                max_tokens=1,
            )
            loop = Loop(model, [session])
            while loop.active:
                ((_, step),) = loop.advance()
            cases.append((ids, np.array(step.argmax)))
    return cases


def log_probabilities(
    model: DiffusionGemma, cases: Sequence[Case], rows: int, seed: int
) -> list[np.ndarray]:
    """For each noise level [cases x rows, vocabulary] of the denoiser on the corrupted canvases."""
    out = []
    for level in LEVELS:
        rng, parts = np.random.default_rng([seed, round(1000 * level)]), []
        for ids, canvas in cases:
            noise = rng.integers(0, model.config.text.vocab_size, canvas.size)
            noisy = np.where(rng.random(canvas.size) < level, noise, canvas).astype(np.int32)
            chosen = np.sort(rng.permutation(canvas.size)[:rows])
            cache = Cache(model.config.text)
            model.encode([mx.array(ids)], [cache])
            logits = model.denoise(mx.array(noisy)[None], [cache]).logits[0, mx.array(chosen)]
            parts.append(np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True)))
        out.append(np.concatenate(parts))
    return out


def measure_one(
    model: DiffusionGemma,
    tokenizer: Any,
    folder: Path,
    work: Path,
    cases: Sequence[Case],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """The row of one recipe."""
    kl, same = [], []
    for index, ours in enumerate(log_probabilities(model, cases, arguments.rows, arguments.seed)):
        theirs = np.load(work / f"{index}.npy")
        kl.append(
            float(
                (np.exp(theirs.astype(np.float64)) * (theirs.astype(np.float64) - ours))
                .sum(-1)
                .mean()
            )
        )
        same.append(float((theirs.argmax(-1) == ours.argmax(-1)).mean()))
    report = evaluate(
        model,
        tokenizer,
        tasks_named(arguments.tasks),
        arguments.limit,
        [arguments.seed],
        arguments.batch_size,
    )
    canvases = sum(r.canvases for r in report.results)
    found = inspect(folder)
    return {
        "bytes": found.stored_bytes,
        "bits_per_weight": found.bits_per_weight,
        "kl": kl,
        "kl_mean": float(np.mean(kl)),
        "argmax": same,
        "argmax_mean": float(np.mean(same)),
        "steps_per_canvas": sum(r.canvases * (r.steps_per_canvas or 0) for r in report.results)
        / canvases,
        "converged": sum(r.canvases * (r.converged or 0) for r in report.results) / canvases,
        "canvases": canvases,
        "score": report.exact_mean,
        "tasks": {r.task: r.score for r in report.results},
    }


def write_docs(path: Path) -> None:
    """The table in docs/recipes.md and the plot beside the record."""
    record = json.loads(path.read_text(encoding="utf-8"))
    if record["settings"]["model"] == nano.VERSION:
        put_table("recipes.md", "recipes.py", table(record))
    else:
        print(table(record))
    plot(record, path.with_suffix(".png"))


def table(record: dict[str, Any]) -> str:
    lines = [
        "| recipe | size, MB | bits per weight | KL, nats | same argmax | steps a canvas | converged | exact tasks |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in record["recipes"].items():
        lines.append(
            f"| {name} | {row['bytes'] / 1e6:,.2f} | {row['bits_per_weight']:.2f} | {row['kl_mean']:.1e} | "
            f"{row['argmax_mean']:.1%} | {row['steps_per_canvas']:.2f} | {row['converged']:.1%} | {row['score']:.1%} |"
        )
    return "\n".join(lines)


def plot(record: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.2))
    changed = {name: row for name, row in record["recipes"].items() if row["kl_mean"] > 0}
    for number, (name, row) in enumerate(changed.items()):
        colour = plt.get_cmap("tab20")(number)
        axes[0].plot(record["levels"], row["kl"], marker="o", label=name, color=colour)
        axes[1].scatter(row["bits_per_weight"], row["steps_per_canvas"], color=colour)
        axes[1].annotate(
            name,
            (row["bits_per_weight"], row["steps_per_canvas"]),
            fontsize=8,
            xytext=(4, 3),
            textcoords="offset points",
        )
    axes[0].set(
        xlabel="noise level t",
        ylabel="KL to the original, nats",
        yscale="log",
        title=record["settings"]["model"],
    )
    axes[0].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes[1].axhline(
        record["recipes"]["original"]["steps_per_canvas"], color="grey", linewidth=1, linestyle="--"
    )
    axes[1].set(
        xlabel="bits per weight", ylabel="denoising steps a canvas", title="dashed: the original"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
