"""The canvas resolving in the terminal, coloured by confidence."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from types import TracebackType

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper
from rich.console import Console
from rich.live import Live
from rich.text import Text

from mlx_diffgemma.decoding.records import CanvasStep

FRAMES_PER_SECOND = 15
# Entropy in nats, from certain to uncertain.  The first bound that is not exceeded gives the style.
STYLES = ((0.005, "bold"), (0.1, "green"), (0.7, "yellow"), (2.0, "red"), (float("inf"), "dim red"))
# The styles of drafted tokens that are unchanged, and of those that are another token now.
STANDS, REPAIRED = (
    "underline",
    "reverse",
)


class LiveCanvas:
    """Draws the canvas in progress, with its thoughts; a context manager.

    It does not change the steps.  The caller prints the finished answer: a frame of one canvas fits
    on a screen and can be erased, but a whole answer may not fit.
    """

    def __init__(
        self,
        tokenizer: TokenizerWrapper,
        eos_ids: Iterable[int],
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._decode = tokenizer.decode
        self._eos = set(eos_ids)
        self._clock, self._drawn = clock, -1.0
        self._live = Live(console=console, transient=True, auto_refresh=False)

    def __enter__(self) -> LiveCanvas:
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()

    def show(self, step: CanvasStep) -> None:
        """Draw ``step``, unless the last frame is too recent.

        The last step of a canvas is always drawn.
        """
        now = self._clock()
        if not step.stopped and now - self._drawn < 1 / FRAMES_PER_SECOND:
            return
        self._drawn = now
        canvas = self._render(step)
        footer = Text(
            f"\ncanvas {step.canvas_index + 1}, step {step.step + 1} of at most {step.max_steps}, "
            f"mean entropy {step.mean_entropy:.3f} nats",
            style="dim",
        )
        self._live.update(canvas + footer + self._drafted(step), refresh=True)

    def _end(self, ids: list[int]) -> int:
        """The position of the first end token, or the length if there is none."""
        return next((place for place, token in enumerate(ids) if token in self._eos), len(ids))

    def _drafted(self, step: CanvasStep) -> Text:
        """A line with the number of drafted positions, and how many of them are unchanged."""
        if step.draft is None:
            return Text()
        end = self._end(np.array(step.argmax).tolist())
        guess, argmax = np.array(step.draft)[:end], np.array(step.argmax)[:end]
        drafted, stands = int((guess >= 0).sum()), int((guess == argmax).sum())
        found = Text(f"\n{drafted} positions drafted, ", style="dim")
        return (
            found.append(f"{stands} stand", style=STANDS)
            .append(", ")
            .append(f"{drafted - stands} repaired", style=REPAIRED)
        )

    def _render(self, step: CanvasStep) -> Text:
        ids, entropy, text = np.array(step.argmax).tolist(), np.array(step.entropy).tolist(), Text()
        end = self._end(ids)
        styles = [next(style for bound, style in STYLES if nats <= bound) for nats in entropy[:end]]
        if step.draft is not None:
            guesses = np.array(step.draft).tolist()
            styles = [
                style if guess < 0 else f"{style} {STANDS if guess == token else REPAIRED}"
                for style, guess, token in zip(styles, guesses, ids, strict=False)
            ]
        # Neighbours with the same style are decoded together, so that a character of several tokens
        # stays whole.
        for style, run in itertools.groupby(
            zip(ids[:end], styles, strict=True), key=lambda pair: pair[1]
        ):
            text.append(
                self._decode([token for token, _ in run], skip_special_tokens=True), style=style
            )
        return text
