"""Measures decisions on nano's held-out questions, by number of reads.

The figures are accuracy, log loss, calibration and seconds.

    python bench/decisions.py --work WORK                       # every task; results that WORK already holds are kept
    python bench/decisions.py --table                           # docs/decisions.md and the plot from the JSON

The wrong labels are close to the right ones: a sum that is off by 1 or 10, or an order with two
numbers exchanged.  All numbers of reads use the same canvases; a smaller number uses the first
ones.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
from documents import put_table

from mlx_diffgemma import chat_ids, load, nano
from mlx_diffgemma.device import describe
from mlx_diffgemma.evaluation.nano_example import Example
from mlx_diffgemma.evaluation.nano_tasks import TASKS, held_out_examples
from mlx_diffgemma.generation.decide import Question, decide
from mlx_diffgemma.generation.label_reading import BATCH_ROWS, average, read_labels, read_prompt
from mlx_diffgemma.generation.labels import canvas_for, label_ids

RESULTS = Path(__file__).parent / "results" / "decisions.json"
NAMES = ("compare", "add", "find")  # sort, whose labels are long chains, takes hours
READS = (1, 4, 16)
BINS = 10  # of equal width, over the probability of the decision
TIMED = 32  # questions with one read, fewer with more


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=nano.NAME)
    parser.add_argument("--tasks", default=",".join(NAMES))
    parser.add_argument("--limit", type=int, default=500, help="held-out questions a task")
    parser.add_argument("--canvas-length", type=int)
    parser.add_argument("--work", type=Path, default=Path("decisions-work"))
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only make table and plot")
    arguments = parser.parse_args()
    if not arguments.table:
        measure(arguments)
    record = json.loads(arguments.output.read_text(encoding="utf-8"))
    print(table(record))
    if arguments.output == RESULTS:
        put_table("decisions.md", "decisions.py", table(record))
    plot(record, arguments.output.with_suffix(".png"))


def question(name: str, example: Example) -> tuple[Question, int]:
    """(The question with its labels in a drawn order, the number of the right one.)"""
    if name in ("compare", "find"):
        return Question.yes_no(), int(example.answer == "no")
    rng = random.Random(example.key)
    if name == "add":
        right = int(example.answer)
        wrong = rng.sample(
            [str(n) for n in (right - 10, right - 1, right + 1, right + 10) if n >= 0], 3
        )
    else:
        numbers, wrong = example.answer.split(" "), []
        pairs = [(i, j) for j in range(len(numbers)) for i in range(j)]
        for i, j in rng.sample(pairs, 3):
            other = list(numbers)
            other[i], other[j] = other[j], other[i]
            wrong.append(" ".join(other))
    labels = [example.answer, *wrong]
    rng.shuffle(labels)
    return Question.choice(labels), labels.index(example.answer)


def measure(arguments: argparse.Namespace) -> None:
    model, tokenizer = load(arguments.model)
    arguments.work.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    for name in arguments.tasks.split(","):
        path = arguments.work / f"{name}-{arguments.limit}-{arguments.canvas_length}.npy"
        if not path.exists():
            np.save(path, answers(model, tokenizer, name, arguments))
        data = np.load(path)
        found[name] = {
            "questions": len(data),
            "reads": {str(reads): figures(data, reads) for reads in READS},
            "seconds": {
                str(n): seconds(model, tokenizer, name, n, arguments.canvas_length) for n in READS
            },
        }
        print(name, json.dumps(found[name]), flush=True)
    record = {
        "command": f"python bench/decisions.py --tasks {arguments.tasks} --limit {arguments.limit}",
        "machine": describe(model.dtype),
        "model": nano.VERSION if arguments.model == nano.NAME else arguments.model,
        "batch_rows": BATCH_ROWS,
        "canvas_length": arguments.canvas_length,
        "tasks": found,
    }
    arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def answers(model: Any, tokenizer: Any, name: str, arguments: argparse.Namespace) -> np.ndarray:
    """Log-probabilities [questions, reads, 1 + labels]: of the right label, then of all of them,
    -inf where there are fewer.
    """
    out = np.full((arguments.limit, max(READS), 5), -np.inf)
    for number, example in enumerate(held_out_examples(TASKS[name], arguments.limit)):
        asked, right = question(name, example)
        labels = label_ids(tokenizer, asked)
        cache = read_prompt(
            model, chat_ids(tokenizer, [{"role": "user", "content": example.prompt}])
        )
        (read,) = read_labels(
            model,
            cache,
            [labels],
            [canvas_for(model, labels, arguments.canvas_length)],
            max(READS),
            1000 * number,
        )
        out[number, :, 0], out[number, :, 1 : 1 + read.shape[1]] = read[:, right], read
    return out


def figures(data: np.ndarray, reads: int) -> dict[str, Any]:
    """Accuracy, log loss in nats, expected calibration error, and what the plot shows of each bin."""
    shares = np.array([average(own[:reads, 1:]) for own in data])
    right = np.array([own[0, 1:].tolist().index(own[0, 0]) for own in data])
    sure, hit = shares.max(axis=1), shares.argmax(axis=1) == right
    place = np.minimum((sure * BINS).astype(int), BINS - 1)
    bins = [
        {
            "from": b / BINS,
            "questions": int((place == b).sum()),
            "probability": float(sure[place == b].mean()),
            "accuracy": float(hit[place == b].mean()),
        }
        for b in range(BINS)
        if (place == b).any()
    ]
    return {
        "accuracy": float(hit.mean()),
        "log_loss": float(-np.log(shares[np.arange(len(shares)), right]).mean()),
        "ece": float(
            sum(abs(b["probability"] - b["accuracy"]) * b["questions"] for b in bins) / len(sure)
        ),
        "probability": float(sure.mean()),
        "bins": bins,
    }


def seconds(model: Any, tokenizer: Any, name: str, reads: int, canvas_length: int | None) -> float:
    """Of a decision, its prompt included: the median over questions."""
    taken = []
    for example in held_out_examples(TASKS[name], max(5, TIMED // reads)):
        asked, _ = question(name, example)
        prompt, began = (
            chat_ids(tokenizer, [{"role": "user", "content": example.prompt}]),
            time.perf_counter(),
        )
        decide(model, tokenizer, prompt, [asked], reads=reads, canvas_length=canvas_length)
        taken.append(time.perf_counter() - began)
    return float(np.median(taken))


def table(record: dict[str, Any]) -> str:
    lines = [
        "| questions | labels | reads | accuracy | log loss | ECE | mean probability | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    kinds = {
        "compare": "yes, no",
        "add": "the sum and three near ones",
        "sort": "the order and three near ones",
        "find": "yes, no",
    }
    for name, task in record["tasks"].items():
        for reads, row in task["reads"].items():
            lines.append(
                f"| {name}, {task['questions']} | {kinds[name]} | {reads} | {row['accuracy']:.1%} | "
                f"{row['log_loss']:.4f} | {row['ece']:.1%} | {row['probability']:.1%} | {task['seconds'][reads]:.2f} |"
            )
    return "\n".join(lines)


def plot(record: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        1, len(record["tasks"]), figsize=(4 * len(record["tasks"]), 4), squeeze=False, sharey=True
    )
    for axes, (name, task) in zip(panels[0], record["tasks"].items(), strict=True):
        axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
        for reads, row in task["reads"].items():
            bins = row["bins"]
            (line,) = axes.plot(
                [b["probability"] for b in bins], [b["accuracy"] for b in bins], linewidth=0.8
            )
            axes.scatter(
                [b["probability"] for b in bins],
                [b["accuracy"] for b in bins],
                color=line.get_color(),
                s=[8 + 0.3 * b["questions"] for b in bins],
                label=f"{reads} read{'s' if reads != '1' else ''}",
            )
        axes.set(
            title=f"{name}, {task['questions']} questions",
            xlabel="probability of the decision",
            xlim=(0.2, 1.03),
            ylim=(-0.03, 1.03),
        )
    panels[0][0].set_ylabel("share that is right")
    panels[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
