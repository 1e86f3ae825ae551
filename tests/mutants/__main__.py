"""Applies the breaks one after the other to copies of the tree and runs their tests."""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import queue
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.mutants.breaks import BREAKS, Break

ROOT = Path(__file__).parents[2]
PARTS = ("mlx_diffgemma", "drafter", "tests", "bench", "docs", "pyproject.toml", "README.md", "convert.py")
LIMIT = 300  # seconds; a break may make a loop endless, which is noticed too


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--only", action="append", choices=sorted(one.name for one in BREAKS), help="may be given again")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no further break after this long")
    parser.add_argument("--seed", type=int, help="shuffle the breaks, for a sample that changes")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    chosen = [one for one in BREAKS if not options.only or one.name in options.only]
    if options.seed is not None:
        random.Random(options.seed).shuffle(chosen)
    began, survivors, done = time.monotonic(), [], 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        trees: queue.Queue[Path] = queue.Queue()
        for number in range(options.jobs):
            trees.put(_copy(Path(folder) / str(number)))
        with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
            running = [pool.submit(_try, one, trees, began + options.seconds) for one in chosen if not one.equivalent]
            for future in concurrent.futures.as_completed(running):
                one, verdict = future.result()
                if verdict is None:
                    continue
                done += 1
                if verdict != "noticed":
                    survivors.append(one.name)
                print(f"{one.name}: {verdict}", flush=True)
    print(f"{done} breaks tried in {time.monotonic() - began:.0f} s, {done - len(survivors)} noticed, {len(survivors)} not"
          f"{': ' + ', '.join(survivors) if survivors else ''}")
    sys.exit(1 if survivors else 0)


def _copy(tree: Path) -> Path:
    tree.mkdir()
    for name in PARTS:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tree / name)
    return tree


def broken(one: Break, text: str) -> str:
    """``text`` of the file with the break.  Raises: ValueError when the list no longer fits the code."""
    if text.count(one.old) != 1:
        raise ValueError(f"{one.name}: {one.file} holds the text to replace {text.count(one.old)} times; mend breaks.py")
    return text.replace(one.old, one.new)


def _try(one: Break, trees: queue.Queue[Path], deadline: float) -> tuple[Break, str | None]:
    if time.monotonic() > deadline:
        return one, None
    tree = trees.get()
    path = tree / one.file
    whole = path.read_text(encoding="utf-8")
    try:
        path.write_text(broken(one, whole), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", "-m", "not browser",
                   *one.tests.split()]
        try:
            ended = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=LIMIT, check=False,
                                   env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(tree)})
        except subprocess.TimeoutExpired:
            return one, "noticed"
        if ended.returncode == 1:
            return one, "noticed"
        if ended.returncode == 0:
            return one, "NOT NOTICED"
        return one, f"its tests did not run (pytest left with {ended.returncode}): {ended.stdout[-500:]}{ended.stderr[-500:]}"
    finally:
        path.write_text(whole, encoding="utf-8")
        trees.put(tree)


if __name__ == "__main__":
    main()
