"""Printing an answer as it comes: the thought first and labelled, then the text."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_diffgemma.cli.output import errors
from mlx_diffgemma.decoding.records import CanvasStep

SHOWN_CHARACTERS = 2000  # the most characters that are shown of an interrupted canvas


def print_thought(thought: str) -> None:
    """Print a thought on standard error, with the label ``thought:``.  An empty one is skipped."""
    if thought.strip():
        errors.print(f"thought: {thought.strip()}", style="dim", markup=False)


class CanvasInFlight:
    """Remembers the last denoising step, for an answer that is interrupted."""

    def __init__(self, tokenizer: TokenizerWrapper, eos_ids: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._eos_ids = set(eos_ids)
        self._step: CanvasStep | None = None

    def step(self, step: CanvasStep) -> None:
        """Remember ``step``.  The method can be passed as ``on_step``."""
        self._step = None if step.committed else step

    @property
    def text(self) -> str:
        """The most probable text of the canvas; empty if no canvas was in progress."""
        if self._step is None:
            return ""
        ids = np.array(self._step.argmax).tolist()
        end = next((at for at, token in enumerate(ids) if token in self._eos_ids), len(ids))
        text: str = self._tokenizer.decode(ids[:end], skip_special_tokens=True)
        return text.strip()

    def report(self) -> None:
        """Print the text of the canvas on standard error."""
        if self._step is None or not self.text:
            return
        errors.print(
            f"the unfinished canvas after {self._step.step + 1} of at most "
            f"{self._step.max_steps} steps: {self.text[:SHOWN_CHARACTERS]}",
            style="dim",
            markup=False,
        )
