"""The examples of nano's tasks, and how they are split into training and held-out ones."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass

HELD_OUT_SHARE = 8  # one input in eight is held out


@dataclass(frozen=True)
class Example:
    """One instruction: the canonical ``key`` of its input, the ``prompt`` and the right ``answer``.

    ``split`` and ``key`` decide whether it is held out.  The yes/no tasks share one split.
    """

    split: str
    key: str
    prompt: str
    answer: str
    thought: str = ""

    @property
    def held_out(self) -> bool:
        return is_held_out(self.split, self.key)


@dataclass(frozen=True)
class Task:
    """A kind of question.

    Attributes:
        name: Its name.
        make: ``make(rng, wide)`` draws an example.
        score: ``score(answer, example)`` is in [0, 1].
        weight: Its share of the training examples.
        exact: An answer is right or wrong, without a score between.
    """

    name: str
    make: Callable[[random.Random, bool], Example]
    score: Callable[[str, Example], float]
    weight: float
    exact: bool = True


def is_held_out(split: str, key: str) -> bool:
    """Whether the input ``key`` is kept out of training."""
    return hashlib.sha256(f"{split}\n{key}".encode()).digest()[0] % HELD_OUT_SHARE == 0
