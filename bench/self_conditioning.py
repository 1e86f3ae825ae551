"""Compares sparse self-conditioning with dense: tokens, steps and scores.

Answers are compared one by one, with the same draws.

    python bench/self_conditioning.py --limit 63 --seeds 3
    python bench/self_conditioning.py --table          # docs/speed.md from the JSON
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from documents import put_table

from mlx_diffgemma import batch_generate, chat_ids, load, nano
from mlx_diffgemma.device import describe
from mlx_diffgemma.evaluation.tasks import tasks_named
from mlx_diffgemma.generation.response import GenerationResponse

ROOT = Path(__file__).parent.parent
TAILS = (1e-6, 1e-4, 1e-3, 1e-2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=nano.NAME)
    parser.add_argument("--tasks", default="nano")
    parser.add_argument("--limit", type=int, default=63, help="held-out prompts a task")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument(
        "--output", type=Path, default=ROOT / "bench" / "results" / "self-conditioning-nano.json"
    )
    parser.add_argument("--table", action="store_true", help="only make the table")
    arguments = parser.parse_args()
    if not arguments.table:
        measure(arguments)
    record = json.loads(arguments.output.read_text(encoding="utf-8"))
    print(table(record))
    if record["model"] == nano.VERSION:
        put_table("speed.md", "self_conditioning.py", table(record))


def measure(arguments: argparse.Namespace) -> None:
    model, tokenizer = load(arguments.model)
    settings: dict[str, dict[str, Any]] = {"dense": {"self_conditioning": "dense"}}
    settings |= {f"sparse, {1 - tail:g}": {"coverage": 1 - tail} for tail in TAILS}
    rows: dict[str, dict[str, Any]] = {
        name: {"answers": 0, "changed": 0, "canvases": 0, "steps": 0, "converged": 0, "scores": []}
        for name in settings
    }
    for task in tasks_named(arguments.tasks):
        questions = task.questions(arguments.limit)
        prompts = [chat_ids(tokenizer, question.messages) for question in questions]
        for seed in range(arguments.seeds):
            seeds = [seed * 1_000_003 + i for i in range(len(prompts))]
            plain: list[GenerationResponse] = []
            for name, options in settings.items():
                found = batch_generate(
                    model,
                    tokenizer,
                    prompts,
                    seeds=seeds,
                    batch_size=arguments.batch_size,
                    **options,
                )
                plain, row = plain or found, rows[name]
                row["answers"] += len(found)
                row["changed"] += sum(
                    a.tokens != b.tokens for a, b in zip(found, plain, strict=True)
                )
                canvases = [part for answer in found for part in answer.parts]
                row["canvases"] += len(canvases)
                row["steps"] += sum(part.steps for part in canvases)
                row["converged"] += sum(part.converged for part in canvases)
                if task.exact:
                    row["scores"] += [
                        q.mark(a.text).score for a, q in zip(found, questions, strict=True)
                    ]
        print(task.name, {name: row["changed"] for name, row in rows.items()}, flush=True)
    for row in rows.values():
        row["score"] = float(np.mean(row.pop("scores")))
    record = {
        "command": f"python bench/self_conditioning.py --limit {arguments.limit} --seeds {arguments.seeds}",
        "model": nano.VERSION if arguments.model == nano.NAME else arguments.model,
        "tasks": arguments.tasks,
        "machine": describe(model.dtype),
        "settings": rows,
    }
    arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def table(record: dict[str, Any]) -> str:
    lines = [
        "| self-conditioning | answers | changed | canvases | steps a canvas | converged | exact tasks |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in record["settings"].items():
        lines.append(
            f"| {name} | {row['answers']:,} | {row['changed']} | {row['canvases']:,} | "
            f"{row['steps'] / row['canvases']:.3f} | {row['converged'] / row['canvases']:.1%} | {row['score']:.2%} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
