"""Prompts of nano's tasks as `draft train` reads them, none of them held out:
``python -m mlx_diffgemma.evaluation.nano_prompts 8000 --seed 0 > prompts.jsonl``."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator

from mlx_diffgemma.evaluation.nano_tasks import TASKS, draw


def prompts(count: int, seed: int = 0) -> Iterator[str]:
    """Yield ``count`` prompts, one task after the other in turn."""
    rng = random.Random(seed)
    tasks = list(TASKS.values())
    for index in range(count):
        yield draw(tasks[index % len(tasks)], rng, held_out=False).prompt


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for prompt in prompts(given.count, given.seed):
        print(json.dumps({"prompt": prompt}, ensure_ascii=False))
