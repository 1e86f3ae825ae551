"""The Sudoku case: nano before and after fine-tuning.

The command can be killed and repeated.

    python bench/sudoku/run.py                  # hours on two CPU cores; OpenBLAS is worth preloading (README)
    python bench/sudoku/run.py --table          # table and plot from the record alone

It draws puzzles and trains the stages one after the other with ``mlx-diffgemma lora``, each from
its YAML file.  It then scores the results on puzzles whose solutions no stage has seen.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
RESULTS = HERE.parent / "results" / "sudoku.json"


@dataclass(frozen=True)
class Stage:
    """A run of training: ``puzzles`` by size, drawn with ``seed``; ``begin`` is the stage whose
    weights it starts from.
    """

    puzzles: dict[int, int]
    seed: int
    begin: str = ""


STAGES = {
    "both": Stage({4: 8_000, 6: 40_000}, 0),
    "4x4": Stage({4: 30_000}, 2, "both"),
    "6x6": Stage({6: 60_000}, 2, "both"),
    "6x6-more": Stage({6: 60_000}, 3, "6x6"),
    "lora": Stage({4: 8_000, 6: 40_000}, 0),
    "9x9": Stage({9: 6_000}, 2, "both"),
}
CANVAS = {
    4: 24,
    6: 48,
    9: 64,
}  # a board, its line ends and the end of the turn; nano's canvas has 64 positions at most
# What is scored: the stage (none: nano as it is), and the sizes it is asked.
SCORED = {
    "nano": ("", (4, 6, 9)),
    "4x4": ("4x4", (4,)),
    "6x6": ("6x6-more", (6,)),
    "LoRA": ("lora", (4, 6)),
    "9x9": ("9x9", (9,)),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("sudoku-work"))
    parser.add_argument("--limit", type=int, default=200, help="held-out puzzles of each size")
    parser.add_argument("--only", default=",".join(SCORED), help="what to train and score")
    parser.add_argument("--table", action="store_true", help="only make table and plot")
    arguments = parser.parse_args()
    if not arguments.table:
        record = (
            json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"scores": {}}
        )
        for name in arguments.only.split(","):
            stage, sizes = SCORED[name]
            adapter = train(stage, arguments.work) if stage else None
            for size in sizes:
                found = score(adapter, size, arguments.limit)
                record["scores"][f"{name}, {size}x{size}"] = found | {
                    "iterations": iterations(adapter)
                }
        record["command"], record["limit"] = "python bench/sudoku/run.py", arguments.limit
        RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    record = json.loads(RESULTS.read_text(encoding="utf-8"))
    from documents import put_table

    put_table("tuning.md", "sudoku/run.py", table(record))
    plot(record, RESULTS.with_suffix(".png"))


def train(name: str, work: Path) -> Path:
    """The adapter folder of a stage, trained now as far as it is not yet."""
    stage, folder = STAGES[name], work / name
    begin = train(stage.begin, work) / "adapters.safetensors" if stage.begin else None
    data = draw(stage, work)
    command = [
        "mlx-diffgemma",
        "lora",
        "-c",
        str(HERE / f"{name}.yaml"),
        "--data",
        str(data),
        "--adapter-path",
        str(folder),
    ]
    subprocess.run(
        [*command, "--resume", *(["--resume-adapter-file", str(begin)] if begin else [])],
        check=True,
    )
    return folder


def draw(stage: Stage, work: Path) -> Path:
    """The folder of its examples; those of validation have other solutions than those trained on."""
    from mlx_diffgemma.evaluation.sudoku import draw_puzzles

    folder = work / (
        "-".join(
            [
                "data",
                *(f"{count}-of-{size}" for size, count in stage.puzzles.items()),
                f"seed-{stage.seed}",
            ]
        )
    )
    if not (folder / "train.jsonl").exists():
        folder.mkdir(parents=True, exist_ok=True)
        for split, seed, held_out in (("valid", 1, True), ("train", stage.seed, False)):
            puzzles = [
                p
                for size, count in stage.puzzles.items()
                for p in draw_puzzles(size, 96 if held_out else count, seed, held_out)
            ]
            lines = [
                json.dumps({"prompt": p.prompt, "completion": p.answer}) + "\n" for p in puzzles
            ]
            (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def score(adapter: Path | None, size: int, limit: int) -> dict[str, Any]:
    command = [
        "mlx-diffgemma",
        "evaluate",
        "--tasks",
        f"sudoku-{size}",
        "--limit",
        str(limit),
        "--json",
        "--canvas-length",
        str(CANVAS[size]),
        *(["--adapter-path", str(adapter)] if adapter else []),
    ]
    print(" ".join(command), flush=True)
    found = json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    )
    return found["results"][0] | {"machine": found["machine"]}


def iterations(adapter: Path | None) -> int:
    """Of the last checkpoint."""
    found = sorted(adapter.glob("*_adapters.safetensors")) if adapter else []
    return int(found[-1].name.split("_")[0]) if found else 0


def table(record: dict[str, Any]) -> str:
    lines = [
        "| model, boards | scored | solved (95 %) | empty cells right | steps a canvas | when solved | when not |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, r in record["scores"].items():
        keys = ("steps_per_canvas", "steps_when_right", "steps_when_wrong")
        steps = (f"{r[key]:.1f}" if r[key] is not None else "-" for key in keys)
        solved = f"{r['score']:.1%} ({r['low']:.1%} to {r['high']:.1%})"
        lines.append(
            f"| {name} | {r['answers']} | {solved} | {r['partial']:.1%} | {' | '.join(steps)} |"
        )
    return "\n".join(lines)


def plot(record: dict[str, Any], path: Path) -> None:
    """Solved share by clues, and steps, before and after."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes = [
        size for size in CANVAS if any(name.endswith(f"{size}x{size}") for name in record["scores"])
    ]
    figure, axes = plt.subplots(1, len(sizes) + 1, figsize=(4.2 * (len(sizes) + 1), 4))
    for axis, size in zip(axes, sizes, strict=False):
        for name, result in record["scores"].items():
            if name.endswith(f", {size}x{size}"):
                groups = result["groups"]
                axis.plot(
                    [g["group"].removesuffix(" clues") for g in groups],
                    [g["score"] for g in groups],
                    "o-",
                    label=name.split(",")[0],
                )
        axis.set(title=f"{size}x{size}", xlabel="clues", ylabel="solved", ylim=(-0.03, 1.03))
        axis.legend()
    names = list(record["scores"])
    for offset, key, label in (
        (-0.2, "steps_when_right", "solved"),
        (0.2, "steps_when_wrong", "not solved"),
    ):
        places, steps = (
            [index + offset for index in range(len(names))],
            [record["scores"][name][key] or 0 for name in names],
        )
        axes[-1].barh(places, steps, 0.38, label=label)
    axes[-1].set(yticks=range(len(names)), yticklabels=names, xlabel="steps a canvas")
    axes[-1].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
