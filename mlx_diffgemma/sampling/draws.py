"""The random numbers of a generation, a public contract.

One step uses two numbers per position: ``u`` in [0, 1) for the categorical draw, and a token id for
renoising.  The first step of a canvas uses a third one, its initial token id.  They are the words
of Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") under

    key     = (request seed mod 2^64, 0)
    counter = (position in the answer + 1, step, canvas index, retry index)

So a number depends only on these five values.  It does not depend on the batch, the canvas length,
the display, the device or the library version.  Pass n of a drafter counts as step 2^32 + n.  Word
0 gives ``u`` (its upper 24 bits), word 1 the renoising id and word 2 the initial id.  An id is the
upper 32 bits of the word times the vocabulary size, divided by 2^32.

    >>> draws = Draws(seed=0, vocab_size=262_144)
    >>> draws.step(canvas_index=0, retry=0, step=0, start=0, length=256).u
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class StepDraws:
    """``u`` float32 [length] in [0, 1); ``renoise`` and ``initial`` int32 [length] token ids."""

    u: np.ndarray
    renoise: np.ndarray
    initial: np.ndarray


class DrawSource(Protocol):
    def step(self, canvas_index: int, retry: int, step: int, start: int, length: int) -> StepDraws:
        """The numbers of one step.

        Args:
            canvas_index: The number of the canvas in its answer, from 0.
            retry: The attempts at this canvas before the current one.
            step: The number of the step in its attempt, from 0.
            start: The first position in the answer.
            length: The number of positions.
        """


@dataclass(frozen=True)
class Draws:
    """All the numbers of one request."""

    seed: int
    vocab_size: int

    def step(self, canvas_index: int, retry: int, step: int, start: int, length: int) -> StepDraws:
        # numpy's generator increments the counter before each block of four words, so there is no
        # + 1 here.
        generator = np.random.Philox(
            key=np.array([self.seed % 2**64, 0], dtype=np.uint64),
            counter=np.array([start, step, canvas_index, retry], dtype=np.uint64),
        )
        words = generator.random_raw(4 * length).reshape(length, 4)
        return StepDraws(
            u=(words[:, 0] >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24),
            renoise=self._ids(words[:, 1]),
            initial=self._ids(words[:, 2]),
        )

    def _ids(self, words: np.ndarray) -> np.ndarray:
        return ((words >> np.uint64(32)) * np.uint64(self.vocab_size) >> np.uint64(32)).astype(
            np.int32
        )
