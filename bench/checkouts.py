"""Compare the speed of two checkouts: the same work, in processes that take turns.

    python bench/checkouts.py OLD NEW --pairs 5

Each checkout is a folder with a ``.venv`` of its own.  A process of one checkout runs after a
process of the other, so that a machine that slows down slows both.  The work uses only the public
API and runs on nano.  The table gives, for each part, the median seconds of both and the median of
the ratios of neighbouring processes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

# Runs in each checkout.  The first run of a part compiles and is not timed.
WORK = """
import json, sys, time, resource
began = time.process_time()
import mlx_diffgemma
from mlx_diffgemma import batch_generate, chat_ids, decide, generate, infill, load, Question
times = {}

def part(name, work, times_to_run=3):
    work()
    seconds = []
    for _ in range(times_to_run):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    times[name] = min(seconds)

model, tokenizer = load("nano")
def prompt(text):
    return chat_ids(tokenizer, [{"role": "user", "content": text}])
story = "Tell me a story about Mia the fox."
steps = {"max_denoising_steps": 8, "confidence_threshold": 1e-9, "max_tokens": 64}
part("8 steps of one canvas", lambda: generate(model, tokenizer, prompt(story), seed=0, **steps))
part("8 steps of 8 canvases", lambda: batch_generate(model, tokenizer, [prompt(story)] * 8, seed=0, **steps))
part("64 tokens left to right", lambda: generate(model, tokenizer, prompt(story), mode="ar", max_tokens=64))
part("a prompt of 512 tokens", lambda: decide(model, tokenizer, prompt(story)[:1] + [7] * 511, [Question.yes_no()]))
text = "Mia was a red <|hole:1-8|>. Mia lived near the river."
part("a hole of 1 to 8 tokens", lambda: infill(model, tokenizer, text, story, seed=0))
print(json.dumps(times))
"""


def run(checkout: Path) -> dict[str, float]:
    """The seconds of each part in one process of ``checkout``, and the CPU seconds of a start."""
    python = checkout / ".venv" / "bin" / "python"
    done = subprocess.run(
        [python, "-c", WORK], cwd=checkout, capture_output=True, text=True, check=True
    )
    times: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    for name, options in (
        ("--version", ["--version"]),
        ("generate -m 8", ["generate", "-p", "hi", "-m", "8"]),
    ):
        code = (
            "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, "
            "stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL); "
            "usage = resource.getrusage(resource.RUSAGE_CHILDREN); "
            "print(usage.ru_utime + usage.ru_stime)"
        )
        command = [
            sys.executable,
            "-c",
            code,
            str(checkout / ".venv" / "bin" / "mlx-diffgemma"),
            *options,
        ]
        seconds = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True)
        times[f"{name}, CPU"] = float(seconds.stdout)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--pairs", type=int, default=5)
    arguments = parser.parse_args()
    old, new = list[dict[str, float]](), list[dict[str, float]]()
    for pair in range(arguments.pairs):
        both = [(arguments.old.resolve(), old), (arguments.new.resolve(), new)]
        for checkout, times in both if pair % 2 else reversed(both):
            times.append(run(checkout))
    print("| part | old, s | new, s | new / old |\n|---|---|---|---|")
    for name in old[0]:
        before = [times[name] for times in old]
        after = [times[name] for times in new]
        ratio = statistics.median(b / a for a, b in zip(before, after, strict=True))
        print(
            f"| {name} | {statistics.median(before):.3f} | {statistics.median(after):.3f} "
            f"| {ratio:.3f} |"
        )


if __name__ == "__main__":
    main()
