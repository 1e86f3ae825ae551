"""What a break is.

A break replaces ``old``, which occurs once in ``file``, by ``new``.  ``tests`` are pytest's
arguments for those that must then fail: paths, then perhaps ``-k`` and an expression; they should
take seconds.  ``equivalent`` says why nothing can notice, where that is so.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Break:
    name: str
    file: str
    old: str
    new: str
    tests: str
    equivalent: str = ""
