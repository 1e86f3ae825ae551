"""Measures infilling by canvases and left to right.

The holes are in nano's held-out stories and JSON.

    python bench/infill.py --limit 300                      # about twenty minutes; writes results/infill.json and docs/infill.md
    python bench/infill.py --table                          # docs/infill.md from the JSON

A hole takes 1 to 8 tokens anywhere inside a text.  All configurations have the same weights, prompt
and prefix.  They know the length of the hole, except where "searched" says that lengths of 1 to 10
are searched.  Left to right is greedy, and its prompt contains the suffix, in two wordings.
Differences are paired.  Their 95 % intervals come from drawing texts with replacement.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from documents import put_table
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_diffgemma import Hole, batch_generate, batch_infill, chat_ids, load, nano, user_message
from mlx_diffgemma.device import describe
from mlx_diffgemma.evaluation.nano_tasks import TASKS, held_out_examples
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma

RESULTS = Path(__file__).parent / "results" / "infill.json"
LONGEST, SEARCHED = 8, (1, 10)
WORDINGS = {
    "suffix in the prompt, as what follows": "{prompt} It goes on with: {suffix}",
    "suffix in the prompt, as a text with a gap": "{prompt}\n{prefix}___{suffix}",
}
CANVAS, SEARCH, PREFIX = "canvas, length given", "canvas, length searched", "prefix alone"


class Case(NamedTuple):
    prompt: str
    prefix: str
    hole: str
    suffix: str
    length: int  # in tokens
    counted: int  # with the blanks before it


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--limit", type=int, default=300, help="texts of each kind")
    parser.add_argument(
        "--searched", type=int, default=60, help="of these the length is searched too"
    )
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only make the table")
    arguments = parser.parse_args()
    if not arguments.table:
        measure(arguments)
    record = json.loads(arguments.output.read_text(encoding="utf-8"))
    print(table(record))
    if arguments.output == RESULTS:
        put_table("infill.md", "infill.py", table(record))


def cases(tokenizer: TokenizerWrapper, kind: str, limit: int) -> list[Case]:
    rng, found = random.Random(f"holes {kind}"), list[Case]()
    for example in held_out_examples(TASKS[kind], limit):
        ids = tokenizer.encode(example.answer, add_special_tokens=False)
        length = rng.randint(1, min(LONGEST, len(ids) - 2))
        start = rng.randint(1, len(ids) - length - 1)
        stop = start + length
        prefix, hole, suffix = (
            tokenizer.decode(part) for part in (ids[:start], ids[start:stop], ids[stop:])
        )
        assert prefix + hole + suffix == example.answer
        blanks = prefix[len(prefix.rstrip(" ")) :]  # which a hole counts with it
        counted = len(tokenizer.encode(blanks + hole, add_special_tokens=False))
        found.append(Case(example.prompt, prefix, hole, suffix, length, counted))
    return found


def measure(arguments: argparse.Namespace) -> None:
    model, tokenizer = load("nano")
    record: dict[str, Any] = {
        "model": nano.VERSIONS["nano"],
        "machine": describe(model.dtype),
        "kinds": {},
    }
    all_asked, all_ways = list[Case](), dict[str, list[str]]()
    for kind in ("story", "json"):
        asked = cases(tokenizer, kind, arguments.limit)
        ways: dict[str, Any] = {}
        for name, limit in ((CANVAS, len(asked)), (SEARCH, arguments.searched)):
            began = time.perf_counter()
            ways[name] = by_canvas(
                model, tokenizer, asked[:limit], name == SEARCH, arguments.batch_size
            )
            ways[name]["seconds"] = time.perf_counter() - began
            print(kind, name, score(ways[name]["texts"], asked), flush=True)
        for name, wording in {PREFIX: "{prompt}", **WORDINGS}.items():
            ways[name] = {
                "texts": left_to_right(model, tokenizer, asked, wording, arguments.batch_size)
            }
            print(kind, name, score(ways[name]["texts"], asked), flush=True)
        texts = {name: way.pop("texts") for name, way in ways.items()}
        record["kinds"][kind] = compared(texts, asked)
        for name, way in ways.items():
            record["kinds"][kind]["ways"][name] |= way
        del texts[SEARCH]  # of fewer texts
        all_asked += asked
        for name, own in texts.items():
            all_ways.setdefault(name, []).extend(own)
    record["kinds"]["both"] = compared(all_ways, all_asked)
    arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def compared(texts: dict[str, list[str]], asked: list[Case]) -> dict[str, Any]:
    return {
        "ways": {name: score(own, asked) for name, own in texts.items()},
        "gains": {name: gain(texts[CANVAS], texts[name], asked) for name in (PREFIX, *WORDINGS)},
    }


def by_canvas(
    model: DiffusionGemma,
    tokenizer: TokenizerWrapper,
    asked: list[Case],
    searched: bool,
    batch_size: int,
) -> dict[str, Any]:
    texts = [
        f"{case.prefix}<|hole|>{case.suffix}"
        if searched
        else f"{case.prefix}<|hole:{case.counted}|>{case.suffix}"
        for case in asked
    ]
    found = batch_infill(
        model,
        tokenizer,
        texts,
        [case.prompt for case in asked],
        hole=Hole(SEARCHED),
        seeds=range(len(asked)),
        batch_size=batch_size,
    )
    fills = [one.fills[0] for one in found]
    return {
        "texts": [fill.text for fill in fills],
        "steps": float(np.mean([fill.steps for fill in fills])),
        "converged": float(np.mean([fill.converged for fill in fills])),
    }


def left_to_right(
    model: DiffusionGemma,
    tokenizer: TokenizerWrapper,
    asked: list[Case],
    wording: str,
    batch_size: int,
) -> list[str]:
    prefixes = [tokenizer.encode(case.prefix, add_special_tokens=False) for case in asked]
    prompts = [
        chat_ids(
            tokenizer,
            [
                user_message(
                    wording.format(prompt=case.prompt, prefix=case.prefix, suffix=case.suffix)
                )
            ],
        )
        for case in asked
    ]
    given = batch_generate(
        model,
        tokenizer,
        [prompt + prefix for prompt, prefix in zip(prompts, prefixes, strict=True)],
        batch_size=batch_size,
        mode="ar",
        max_tokens=LONGEST,
        seed=0,
    )
    return [
        tokenizer.decode(prefix + list(response.tokens[: case.length]))[len(case.prefix) :]
        for prefix, response, case in zip(prefixes, given, asked, strict=True)
    ]


def distance(a: str, b: str) -> float:
    """Levenshtein's, of the longer text's length."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1] / max(len(a), len(b), 1)


def points(texts: list[str], asked: list[Case]) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(text, case.hole) for text, case in zip(texts, asked, strict=False)]
    return np.array([float(a == b) for a, b in pairs]), np.array([distance(a, b) for a, b in pairs])


def score(texts: list[str], asked: list[Case]) -> dict[str, float]:
    exact, away = points(texts, asked)
    return {"texts": len(texts), "exact": float(exact.mean()), "edit_distance": float(away.mean())}


def gain(ours: list[str], other: list[str], asked: list[Case]) -> dict[str, list[float]]:
    """(Mean, low, high) of what exact match gains, and of the share of the edit distance that goes."""
    rng, size = np.random.default_rng(0), min(len(ours), len(other))
    (exact, away), (other_exact, other_away) = (
        points(ours[:size], asked),
        points(other[:size], asked),
    )
    drawn = rng.integers(0, size, (5000, size))
    gained = (exact - other_exact)[drawn].mean(axis=1)
    found = {
        "exact": [
            float((exact - other_exact).mean()),
            *np.quantile(gained, (0.025, 0.975)).tolist(),
        ]
    }
    if other_away.any():
        less = 1 - away[drawn].mean(axis=1) / np.maximum(other_away[drawn].mean(axis=1), 1e-9)
        found["edit_distance"] = [
            float(1 - away.mean() / other_away.mean()),
            *np.quantile(less, (0.025, 0.975)).tolist(),
        ]
    return found


def table(record: dict[str, Any]) -> str:
    lines = [
        "| | texts | exact | edit distance | exact, canvas beside it | edit distance less by |",
        "|---|---|---|---|---|---|",
    ]
    for kind, own in record["kinds"].items():
        for name, way in own["ways"].items():
            row = [
                f"{kind}: {name}",
                str(way["texts"]),
                f"{way['exact']:.1%}",
                f"{way['edit_distance']:.3f}",
                "",
                "",
            ]
            if name in own["gains"]:
                exact, away = own["gains"][name]["exact"], own["gains"][name].get("edit_distance")
                row[4] = (
                    f"{100 * exact[0]:+.1f} points ({100 * exact[1]:+.1f} to {100 * exact[2]:+.1f})"
                )
                row[5] = f"{away[0]:.0%} ({away[1]:.0%} to {away[2]:.0%})" if away else ""
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
