"""Writes nano-vision's card from measured results: ``python bench/nano/nano_vision_card.py
bench/results``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mlx_diffgemma import nano
from mlx_diffgemma.safetensors import read_headers

FOLDER = nano.FOLDERS[nano.VISION]
TEMPLATE = """---
license: apache-2.0
library_name: mlx
pipeline_tag: image-text-to-text
tags: [mlx, diffusion_gemma]
---

# {version}

[nano](../checkpoint/README.md) with eyes: a DiffusionGemma of {parameters:.2f} million parameters with a small vision tower of the
released kind, trained by this project. It exists so that every path for images and video runs anywhere with true, trained
weights. It knows drawn digits, five shapes and seven colours, and nano's own tasks.

- SHA-256 of `model.safetensors`: `{sha256}`
- stored in bfloat16; trained and measured in float32 (measured from the bfloat16 file)
- tower: {tower:.2f} million parameters, 3 layers of 96, patches of 24 pixels, 2 x 2 of them a soft token; trained with at most 70
  soft tokens an image, its default
- the backbone has nano's shape and began with its weights; the tokenizer is nano's

## Data

Drawn by `mlx_diffgemma/evaluation/pictures.py`: one thing (a digit, circle, square, triangle, star or ring in one of seven
colours, a little turned and aside, on light paper), two side by side, one to four equal shapes, two pictures, films of three
frames. Questions ask what, which, which colour, where and how many. One pair of thing and colour in ten is never drawn in
training.

## Training

`python bench/nano/train_nano_vision.py OUT && python bench/nano/train_nano_vision.py OUT --export FOLDER`

{alone:,} steps of the tower alone, which learns to name the thing in a picture; then all weights with nano's objective on
questions about pictures, one step in five on nano's own tasks. {steps:,} steps, {minutes:.0f} minutes on {machine}.
At steps {changed} the mix of questions was changed and the rates rose again, and two things side by side are named only since
the second of these, so a repetition follows the recipe but does not end in the same bits.

## Scores

New drawings, seed 0, the reference sampler; 95 % intervals in brackets.
`mlx-diffgemma evaluate --model nano-vision --tasks pictures,nano --limit {limit}`

| task | questions | right | of known pairs | of new pairs | steps a canvas |
|---|---|---|---|---|---|
{pictures}

Mean over the five kinds of held-out drawings: {mean:.1%}; of pairs of thing and colour that training showed {known:.1%}, of pairs
never shown together {new:.1%}, lowest in {lowest}.  On nano's own tasks:

| task | prompts | score | nano's |
|---|---|---|---|
{text}
"""


def card(results: Path) -> str:
    record = json.loads((results / "nano-vision-evaluate.json").read_text(encoding="utf-8"))
    plain = json.loads((results / "nano-evaluate-diffusion.json").read_text(encoding="utf-8"))
    training = json.loads((results / "nano-vision-training.json").read_text(encoding="utf-8"))
    stored = read_headers(FOLDER)
    sizes = {name: tensor.nbytes // 2 for name, tensor in stored.items()}
    own = [row for row in record["results"] if row["task"].startswith("pictures")]
    before = {row["task"]: row["score"] for row in plain["results"]}
    lines, pairs = [], []
    for row in own:
        groups = {group["group"]: group["score"] for group in row["groups"]}
        pairs.append((groups["a new pair of thing and colour"], groups["known pairs"], row["task"]))
        lines.append(
            f"| {row['task']} | {row['answers']} | {row['score']:.1%} ({row['low']:.1%} to {row['high']:.1%}) | "
            f"{pairs[-1][1]:.1%} | {pairs[-1][0]:.1%} | {row['steps_per_canvas']:.2f} |"
        )
    text = [
        f"| {row['task']} | {row['answers']} | {row['score']:.1%} | {before[row['task']]:.1%} |"
        for row in record["results"]
        if row["task"] in before
    ]
    return TEMPLATE.format(
        version=nano.VISION_VERSION,
        sha256=nano.VISION_SHA256,
        parameters=sum(sizes.values()) / 1e6,
        tower=sum(size for name, size in sizes.items() if "vision" in name) / 1e6,
        alone=training["recipe"]["alone"],
        steps=training["steps"],
        minutes=training["minutes"],
        machine=training["machine"],
        changed=" and ".join(f"{step:,}" for step in training["changed_at"]),
        limit=record["limit"],
        pictures="\n".join(lines),
        text="\n".join(text),
        mean=sum(row["score"] for row in own) / len(own),
        known=sum(known for _, known, _ in pairs) / len(pairs),
        new=sum(new for new, *_ in pairs) / len(pairs),
        lowest=" and ".join(f"{task} ({new:.1%})" for new, _, task in sorted(pairs)[:2]),
    )


if __name__ == "__main__":
    (FOLDER / "README.md").write_text(card(Path(sys.argv[1])), encoding="utf-8")
