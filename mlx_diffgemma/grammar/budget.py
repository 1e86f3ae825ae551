"""Limits the time of a constraint's compilation, and ends it when nobody waits for it.

Every loop of this package whose length a user decides calls ``check``.  A limit applies to the
thread that sets it:

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
    """The compilation of a constraint took longer than allowed."""


class AbandonedError(RuntimeError):
    """Nobody waits for this compilation any more."""


@dataclass(frozen=True)
class Limit:
    """A limit of ``seconds``, which ends at ``deadline`` on the clock of ``time.monotonic``."""

    seconds: float
    deadline: float
    abandoned: Callable[[], bool]


def _never() -> bool:
    return False


_limit: ContextVar[Limit | None] = ContextVar("limit", default=None)


@contextmanager
def limited(seconds: float, abandoned: Callable[[], bool] | None = None) -> Iterator[None]:
    """Limit the code in the block: ``check`` raises after ``seconds``, or once ``abandoned``
    returns True.

    A limit inside another one ends no later than the outer one.
    """
    outer = _limit.get()
    limit = Limit(seconds, time.monotonic() + seconds, abandoned or _never)
    if outer is not None:
        limit = Limit(
            seconds=seconds if limit.deadline < outer.deadline else outer.seconds,
            deadline=min(limit.deadline, outer.deadline),
            abandoned=abandoned or outer.abandoned,
        )
    token = _limit.set(limit)
    try:
        yield
    finally:
        _limit.reset(token)


def current() -> Limit | None:
    """The limit of this thread; None if it has none."""
    return _limit.get()


def check() -> None:
    """Check this thread's limit, if it has one.

    Raises:
        TooLongError: The time is over.
        AbandonedError: Nobody waits any more; see ``limited``.
    """
    limit = _limit.get()
    if limit is None:
        return
    if limit.abandoned():
        raise abandoned_error()
    if time.monotonic() > limit.deadline:
        raise too_long_error(limit.seconds)


def abandoned_error() -> AbandonedError:
    return AbandonedError("Nobody waits for this constraint any longer.")


def too_long_error(seconds: float) -> TooLongError:
    return TooLongError(
        f"The constraint takes too long to compile, more than the {max(0.0, seconds):g} seconds allowed; "
        "lower the bounds of its repeats (maxLength, maxItems), or split it."
    )
