"""Runs the targets in turn and prints what failed, with the command that repeats it.

The cases run in a process of their own, so that one which hangs in C code, or kills the process, is
a failure like others.
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

from mlx_diffgemma.errors import UserError
from tests.fuzz.targets import TARGETS, WEIGHTS, World

HANG = 10  # seconds
ROOT = Path(__file__).parents[2]
STARTED, FAILED = "started ", "failed "  # what a worker tells of a case


class HangError(BaseException):
    """Not an ``Exception``, so that nothing in between takes it for an error of its own."""


def main() -> None:
    options = _options()
    if options.worker:
        return _work(options)
    began, done, failures = time.monotonic(), Counter[str](), Counter[str]()
    first, last = options.first, options.first + options.cases
    while first < last and time.monotonic() - began < options.seconds:
        command = [
            sys.executable,
            "-m",
            "tests.fuzz",
            "--worker",
            "--first",
            str(first),
            "--cases",
            str(last - first),
            "--seed",
            str(options.seed),
            "--seconds",
            str(options.seconds - (time.monotonic() - began)),
        ]
        command += ["--only", options.only] if options.only else []
        command += ["-v"] if options.verbose else []
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, errors="replace", cwd=ROOT
        ) as worker:
            current = None
            for line in worker.stdout:
                if line.startswith(STARTED):
                    current = int(line.removeprefix(STARTED))
                    done[_name(options, current)] += 1
                elif line.startswith(FAILED):
                    failures[_name(options, current)] += 1
                    _tell(options, current, line.removeprefix(FAILED).strip())
                elif options.verbose:
                    print(line, end="")
        if worker.returncode == 0:
            break
        if current is None:
            sys.exit("the cases could not be started")
        failures[_name(options, current)] += 1
        _tell(options, current, f"the process ended with {worker.returncode}, or hung")
        first = current + 1
    counts = ", ".join(f"{name} {count}" for name, count in sorted(done.items()))
    print(
        f"{sum(done.values())} cases in {time.monotonic() - began:.0f} s ({counts}): {sum(failures.values())} failed "
        f"{dict(failures) or ''}"
    )
    sys.exit(1 if failures else 0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument(
        "--seconds", type=float, default=1e9, help="stop after this long, whatever is left"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=sorted(TARGETS))
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="print the tracebacks of failures"
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def _name(options: argparse.Namespace, number: int) -> str:
    names = (
        [options.only]
        if options.only
        else [name for name in TARGETS for _ in range(WEIGHTS.get(name, 1))]
    )
    return names[number % len(names)]


def _tell(options: argparse.Namespace, number: int, failure: str) -> None:
    name = _name(options, number)
    print(
        f"{name} {number}: {failure}\n    repeat: python -m tests.fuzz --only {name} --seed {options.seed} "
        f"--first {number} --cases 1 -v",
        flush=True,
    )


def _work(options: argparse.Namespace) -> None:
    warnings.simplefilter("ignore")
    faulthandler.enable()
    signal.signal(signal.SIGALRM, _hang)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        os.chdir(folder)  # a changed path may be a relative one
        world = World(Path(folder))
        for number in itertools.islice(itertools.count(options.first), options.cases):
            if time.monotonic() - began > options.seconds:
                break
            name = _name(options, number)
            print(f"{STARTED}{number}", flush=True)
            failure = _case(
                name, world, random.Random(f"{options.seed} {name} {number}"), options.verbose
            )
            if failure:
                print(f"{FAILED}{failure}".replace("\n", " "), flush=True)


def _case(name: str, world: World, rng: random.Random, verbose: bool) -> str | None:
    faulthandler.dump_traceback_later(3 * HANG, exit=True)
    signal.alarm(HANG)
    try:
        TARGETS[name](world, rng)
    except UserError:
        return None
    except (Exception, HangError) as error:  # whatever it is, it is reported
        if verbose:
            traceback.print_exc()
        return f"{type(error).__name__}: {str(error)[:700]}"
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
    return None


def _hang(*_: object) -> None:
    raise HangError(f"no end after {HANG} seconds")


if __name__ == "__main__":
    main()
