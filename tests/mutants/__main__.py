"""Applies the breaks one after the other to copies of the tree and runs their tests."""

from __future__ import annotations

import argparse
import importlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from tests.mutants.breaks import BREAKS, PARTS
from tests.mutants.entry import Break

ROOT = Path(__file__).parents[2]
COPIED = (
    "mlx_diffgemma",
    "drafter",
    "tests",
    "bench",
    "docs",
    "tools",
    "pyproject.toml",
    "README.md",
    "CHANGELOG.md",
    "convert.py",
)
LIMIT = 60  # seconds; a break may make a loop endless, which is noticed too
ENDLESS = "noticed by the limit"  # named in the result: slow tests end so as well
GRACE = 25  # seconds after the deadline of a sample, in which what runs may end
# Imported once, here: every break runs in a fork, and torch alone takes seconds.  MLX does not
# survive a fork, so nothing that imports it may stand here.
LIBRARIES = (
    "numpy",
    "torch",
    "transformers.modeling_utils",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.diffusion_gemma.modeling_diffusion_gemma",
    "hypothesis",
    "pytest",
    "fastapi",
    "starlette.testclient",
    "uvicorn",
    "openai",
    "av",
    "PIL.Image",
    "jsonschema",
    "typer",
)


@dataclass(frozen=True)
class Trial:
    """A break whose tests run in the process ``pid``; None: the tests on the whole code."""

    name: str
    tests: str
    one: Break | None
    tree: Path
    pid: int
    began: float

    @property
    def log(self) -> Path:
        return self.tree.with_suffix(".log")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument(
        "--only",
        action="append",
        choices=sorted(one.name for one in BREAKS),
        metavar="NAME",
        help="may be given again",
    )
    parser.add_argument(
        "--part", action="append", choices=list(PARTS), help="a table; may be given again"
    )
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="begin no further break after this long"
    )
    parser.add_argument("--seed", type=int, help="shuffle the breaks, for a sample that changes")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument(
        "--unbroken",
        action="store_true",
        help="run the tests that the breaks name on the code as it is; all must pass",
    )
    options = parser.parse_args()
    chosen = [
        one
        for part in options.part or PARTS
        for one in PARTS[part]
        if not one.equivalent and (not options.only or one.name in options.only)
    ]
    if options.seed is not None:
        print(f"seed {options.seed}", flush=True)
        random.Random(options.seed).shuffle(chosen)
    jobs: list[tuple[str, str, Break | None]] = [(one.name, one.tests, one) for one in chosen]
    if options.unbroken:
        jobs = [(tests, tests, None) for tests in dict.fromkeys(one.tests for one in chosen)]
    began = time.monotonic()
    verdicts = run(jobs, options.jobs, began + options.seconds)
    wanted = "passed" if options.unbroken else "noticed"
    endless = [name for name, verdict in verdicts.items() if verdict == ENDLESS]
    others = [name for name, verdict in verdicts.items() if verdict not in (wanted, ENDLESS)]
    print(
        f"{len(verdicts)} of {len(jobs)} tried in {time.monotonic() - began:.0f} s, "
        f"{len(verdicts) - len(others)} {wanted}, {len(others)} not"
        f"{': ' + ', '.join(others) if others else ''}"
        f"{'; by the limit: ' + ', '.join(endless) if endless else ''}"
    )
    sys.exit(1 if others or not verdicts else 0)


def run(jobs: list[tuple[str, str, Break | None]], most: int, deadline: float) -> dict[str, str]:
    """Verdicts by name; ``most`` of the ``jobs`` run at a time.  None begins after the
    ``deadline``, and what still runs ``GRACE`` seconds later has no verdict.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of torch, as tests/conftest.py has it
    for name in LIBRARIES:
        importlib.import_module(name)
    waiting, running, verdicts = deque(jobs), list[Trial](), dict[str, str]()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        free = [_copy(Path(folder) / str(number)) for number in range(most)]
        try:
            while running or waiting:
                now = time.monotonic()
                if now > deadline + GRACE:
                    break
                while waiting and free and now < deadline:
                    running.append(_begin(*waiting.popleft(), free.pop()))
                if not running:
                    break
                time.sleep(0.02)
                for trial in list(running):
                    if verdict := _verdict(trial):
                        verdicts[trial.name] = verdict
                        took = time.monotonic() - trial.began
                        print(f"{trial.name}: {verdict} ({took:.1f} s)", flush=True)
                        _restore(trial)
                        running.remove(trial)
                        free.append(trial.tree)
        finally:
            for trial in running:
                os.killpg(trial.pid, signal.SIGKILL)
                os.waitpid(trial.pid, 0)
    return verdicts


def _copy(tree: Path) -> Path:
    tree.mkdir()
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tree / name)
    return tree


def broken(one: Break, text: str) -> str:
    """``text`` of the file with the break.  Raises: ValueError when the list no longer fits the
    code.
    """
    if text.count(one.old) != 1:
        raise ValueError(
            f"{one.name}: {one.file} holds the text to replace {text.count(one.old)} times; mend the list"
        )
    return text.replace(one.old, one.new)


def _begin(name: str, tests: str, one: Break | None, tree: Path) -> Trial:
    """Break the code in ``tree`` and start the tests in a fork of this process."""
    if one is not None:
        _write(tree / one.file, broken(one, (ROOT / one.file).read_text(encoding="utf-8")))
    sys.stdout.flush()
    began, pid = time.monotonic(), os.fork()
    if not pid:
        try:
            _test(tests, tree)
        finally:
            os._exit(70)
    return Trial(name, tests, one, tree, pid, began)


def _test(tests: str, tree: Path) -> None:
    """Never returns: the exit status is that of pytest."""
    import pytest

    os.setsid()
    log = os.open(tree.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.chdir(tree)
    os.environ["PYTHONPATH"] = str(tree)  # of commands that tests start
    sys.path[:] = [str(tree), *(path for path in sys.path if path not in ("", str(ROOT)))]
    sys.argv[0] = "pytest"
    for module in [name for name in sys.modules if name.split(".")[0] == "tests"]:
        del sys.modules[module]
    given = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "-m", "not browser", "--durations=0"]
    code = pytest.main([*given, *_words(tests)])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _words(tests: str) -> list[str]:
    """Pytest's arguments; what follows -k is one expression."""
    paths, _, expression = tests.partition(" -k ")
    return [*paths.split(), *(["-k", expression] if expression else [])]


def _verdict(trial: Trial) -> str | None:
    """None while the tests run."""
    pid, status = os.waitpid(trial.pid, os.WNOHANG)
    if not pid:
        if time.monotonic() - trial.began < LIMIT:
            return None
        os.killpg(trial.pid, signal.SIGKILL)
        os.waitpid(trial.pid, 0)
        return ENDLESS if trial.one else f"ran for more than {LIMIT} s"
    code = os.waitstatus_to_exitcode(status)
    if code == 0:
        return "NOT NOTICED" if trial.one else "passed"
    if code == 1 and trial.one:
        return "noticed"
    said = trial.log.read_text(encoding="utf-8", errors="replace")[-1500:]
    return f"its tests {'failed' if code == 1 else 'did not run'} ({code}): {said}"


def _restore(trial: Trial) -> None:
    if trial.one is not None:
        path = trial.one.file
        _write(trial.tree / path, (ROOT / path).read_text(encoding="utf-8"))


def _write(path: Path, text: str) -> None:
    """Without the compiled code of what was there, which may be as long and as old."""
    path.write_text(text, encoding="utf-8")
    for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
        compiled.unlink()


if __name__ == "__main__":
    main()
