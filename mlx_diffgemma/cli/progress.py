"""The progress of long work: bars on a terminal, and an occasional line elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from mlx_diffgemma.cli.output import errors

LINE_SECONDS = 10  # between two lines without a terminal; shorter work prints no line


def time_left(seconds: float) -> str:
    """A duration as text, such as 40 s, 3 min or 2 h 5 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


class Bars:
    """Shows the progress of several pieces of work; a context manager."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=errors,
            transient=True,
            disable=not errors.is_terminal,
        )
        self._tasks = dict[str, TaskID]()
        self._began = dict[str, tuple[float, int]]()  # the start time, and the parts done by then
        self._last_line = clock()

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def begin(self, name: str, total: int, done: int = 0) -> None:
        """Begin to show the work ``name``.

        Args:
            name: the name of the work.
            total: the number of its parts.
            done: the number of parts that are done already.
        """
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(escape(name), total=total, completed=done)
            self._began[name] = (self._clock(), done)

    def update(self, name: str, done: int, total: int) -> None:
        """Show the progress of the work ``name``.

        Args:
            name: the name of the work.
            done: the number of parts that are done.
            total: the number of its parts.
        """
        self.begin(name, total)
        self._progress.update(self._tasks[name], completed=done, total=total)
        if not errors.is_terminal:
            self._line(name, done, total)

    def print(self, text: str) -> None:
        """Print a line above the bars."""
        self._progress.console.print(text, markup=False)

    def _line(self, name: str, done: int, total: int) -> None:
        now = self._clock()
        if now - self._last_line < LINE_SECONDS or done >= total:
            return
        self._last_line = now
        began, before = self._began[name]
        left = ""
        if done > before:
            left = f", {time_left((now - began) / (done - before) * (total - done))} left"
        errors.print(f"{name}: {done:,} of {total:,}, {done / total:.0%}{left}", markup=False)
