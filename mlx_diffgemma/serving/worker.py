"""The program of a worker: it calls functions that a server sends, one after the other.

The server runs it by its path, so that it does not import the package's ``__init__``: MLX and
transformers would take seconds, and ten times the memory.  ``workers`` is the server's side.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import types
from pathlib import Path
from typing import Any, BinaryIO

NICE = 10  # a lower priority than the model's
MEMORY = 4 * 2**30  # bytes of address space that work may take; more is refused
GROWTH = 8 * 2**20  # bytes of memory that work may leave behind; a worker that holds more ends


def main() -> None:
    package = types.ModuleType("mlx_diffgemma")
    folder = Path(__file__).resolve().parent
    package.__path__ = [str(folder.parent)]
    sys.modules["mlx_diffgemma"] = package
    sys.path[:] = [
        entry for entry in sys.path if entry != str(folder)
    ]  # Python adds it for a program
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which ends its workers
    os.nice(NICE)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # so that nothing else is written between the answers
    work(sys.stdin.buffer, answers)


def work(jobs: BinaryIO, answers: BinaryIO) -> None:
    from mlx_diffgemma.grammar import compilation  # noqa: F401 (before the first job)
    from mlx_diffgemma.grammar.budget import limited
    from mlx_diffgemma.heap import map_large_blocks, trim_heap
    from mlx_diffgemma.serving.frames import Kept, read, write

    cancelled = False

    def cancel(*_: Any) -> None:
        nonlocal cancelled
        cancelled = True

    signal.signal(signal.SIGUSR1, cancel)
    server = os.getppid()

    def given_up() -> bool:
        return cancelled or os.getppid() != server

    map_large_blocks()
    kept, before = list[Any](), _memory()
    with contextlib.suppress(ValueError, OSError):  # some systems have no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.RLIM_INFINITY))
    while True:
        try:
            job = read(jobs)
        except EOFError:
            return
        cancelled = False
        if len(job) == 1:  # an argument to keep for later jobs
            kept += job
            before = _memory()
            continue
        function, given, seconds = job
        given = [kept[own.number] if isinstance(own, Kept) else own for own in given]
        del job
        try:
            with limited(seconds, given_up):
                answer = True, function(*given)
        except Exception as error:  # the server raises it
            answer = False, error.with_traceback(None)
        del function, given
        trim_heap()
        grown = _memory() - before > GROWTH
        write(answers, (*answer, grown))
        if grown:
            return
        del answer


def _memory() -> int:
    """The bytes that this process holds, or the most it has held if the system does not say more.

    On Linux, the maximum of a process includes that of the server that started it.
    """
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return taken if sys.platform == "darwin" else 1024 * taken


if __name__ == "__main__":
    main()
