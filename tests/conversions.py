"""Conversions in processes of their own, which may be killed at a chosen file operation.

    python -m tests.conversions SOURCE

reads jobs from standard input, one JSON object a line: ``target``, ``resume`` and ``kill_at``, the
number of the file operation at which the process kills itself, 0 for never.  For each it writes
[signal or exit status, file operations].  A job is a fork of this process, which has only imported
the package: starting Python anew takes longer than the conversion.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from mlx_diffgemma.checkpoint import convert as convert_module
from mlx_diffgemma.checkpoint import plan  # imported before any fork

OPERATIONS = ("pwrite", "fsync", "ftruncate", "rename", "unlink", "mkdir", "rmdir")


class Count:
    """Counts file operations, and kills the process at one of them."""

    def __init__(self, kill_at: int) -> None:
        self.done = 0
        self.kill_at = kill_at

    def add(self) -> None:
        self.done += 1
        if self.done == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self, target: str) -> None:
        for name in OPERATIONS:
            setattr(os, name, self._counted(getattr(os, name)))
        parent = str(Path(target).parent)

        def opened(event: str, arguments: tuple[Any, ...]) -> None:
            if event == "open" and str(arguments[0]).startswith(parent):
                self.add()

        sys.addaudithook(opened)

    def _counted(self, function: Any) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Any:
            self.add()
            return function(*arguments, **keywords)

        return call


def convert(source: str, job: dict[str, Any]) -> int:
    """The number of file operations of a conversion that was not killed."""
    plan.SHARD_SIZE = 300_000
    count = Count(job["kill_at"])
    count.watch(job["target"])
    convert_module.convert(
        source, job["target"], recipe="4bit", overwrite=True, resume=job["resume"]
    )
    return count.done


def forked(source: str, job: dict[str, Any]) -> list[int]:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.write(writing, str(convert(source, job)).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        done = pipe.read()
    return [-os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), int(done or 0)]


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(forked(sys.argv[1], json.loads(line))), flush=True)
