"""How long the compilation of a constraint may take, and whether anybody still waits for it.

All loops of this package whose length a user decides call ``check``.  A limit holds for the thread that sets it:

    >>> with limited(seconds=60.0):
    ...     automaton = compile_language(language)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from mlx_diffgemma.errors import UserError

MAX_SECONDS = 60.0


class TooLongError(UserError):
    """The compilation of a constraint took more seconds than it may."""


class AbandonedError(RuntimeError):
    """Nobody waits for this compilation any longer."""


@dataclass(frozen=True)
class _Limit:
    seconds: float
    deadline: float
    abandoned: Callable[[], bool]


def _never() -> bool:
    return False


_limit: ContextVar[_Limit | None] = ContextVar("limit", default=None)


@contextmanager
def limited(seconds: float, abandoned: Callable[[], bool] | None = None) -> Iterator[None]:
    """Within, ``check`` raises after ``seconds``, or once ``abandoned`` returns True.

    A limit inside another one ends no later than that.
    """
    outer = _limit.get()
    limit = _Limit(seconds, time.monotonic() + seconds, abandoned or _never)
    if outer is not None:
        limit = _Limit(
            seconds=seconds if limit.deadline < outer.deadline else outer.seconds,
            deadline=min(limit.deadline, outer.deadline),
            abandoned=abandoned or outer.abandoned,
        )
    token = _limit.set(limit)
    try:
        yield
    finally:
        _limit.reset(token)


def check() -> None:
    """Errors: TooLongError and AbandonedError, see ``limited``; none where no limit was set."""
    limit = _limit.get()
    if limit is None:
        return
    if limit.abandoned():
        raise AbandonedError("Nobody waits for this constraint any longer.")
    if time.monotonic() > limit.deadline:
        raise TooLongError(
            f"The constraint takes too long to compile, more than the {max(0.0, limit.seconds):g} seconds allowed; "
            "lower the bounds of its repeats (maxLength, maxItems), or split it."
        )
