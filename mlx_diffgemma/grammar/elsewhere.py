"""Where long work on a user's input runs: in this thread, or where a server sends it.

The work is a function in a module that imports neither MLX nor a tokenizer.  Its arguments can be
pickled, so that a small process can do it.  Without ``sent_to`` it runs in this thread.

    >>> with sent_to(worker.run):
    ...     automaton, states = run(compiled, language_of, asked, vocabulary, 60.0)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Runner(Protocol):
    """Calls ``function`` with ``args`` and returns its result, or raises its error."""

    def __call__(self, function: Callable[..., T], /, *args: Any) -> T: ...


_runner: ContextVar[Runner | None] = ContextVar("runner", default=None)


@contextmanager
def sent_to(runner: Runner) -> Iterator[None]:
    """Send the work of ``run`` to ``runner`` within the block."""
    token = _runner.set(runner)
    try:
        yield
    finally:
        _runner.reset(token)


def run(function: Callable[..., T], *args: Any) -> T:
    """Call ``function`` and return its result.

    Raises: the errors of ``function`` and those of the runner.
    """
    runner = _runner.get()
    return function(*args) if runner is None else runner(function, *args)
