"""The output of commands: the two consoles, warnings, tables and figures that people read."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from mlx_diffgemma.files import expand_path

errors = Console(stderr=True, highlight=False, soft_wrap=True)
output = Console(highlight=False)
UNBROKEN = 100_000  # columns, wider than any table, for output that is not a terminal
_held: list[list[str]] = []  # warnings, while text is being streamed


def warn(text: str) -> None:
    """Print a warning on standard error, or keep it until the streamed text has ended."""
    line = f"warning: {text}"
    if _held:
        _held[-1].append(line)
    else:
        errors.print(line, markup=False)


@contextlib.contextmanager
def streaming() -> Iterator[None]:
    """While text is streamed, hold warnings back until its end, so that they break no line."""
    kept = list[str]()
    _held.append(kept)
    try:
        yield
    finally:
        _held.pop()
        for line in kept:
            errors.print(line, markup=False)


def new_table(*columns: Any, **style: Any) -> Table:
    """A table without lines between its rows.  Cells that are too wide wrap."""
    plain: dict[str, Any] = {"box": SIMPLE_HEAD, "padding": (0, 1, 0, 0), "pad_edge": False}
    return Table(*columns, **plain | style)


def print_table(table: Table) -> None:
    """Print the whole ``table``: wrapped to the width of a terminal, unwrapped elsewhere."""
    for column in table.columns:
        column.overflow = "fold"
    if output.is_terminal:
        output.print(table)
    else:
        Console(highlight=False, width=UNBROKEN).print(table)


def spinner(text: str) -> Any:
    """Show ``text`` while something runs.  Without a terminal on standard error, show nothing."""
    return errors.status(text) if errors.is_terminal else contextlib.nullcontext()


def human_count(number: float, unit: str = "") -> str:
    """A number with a prefix and a unit, such as 12.3 GB or 4.56 M."""
    for size, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {prefix}{unit}"
    return f"{number:.0f} {unit}".strip()


@contextlib.contextmanager
def writing(folder: Path, overwrite: bool) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar for a conversion.  If it is interrupted, print how to continue it."""
    from mlx_diffgemma.checkpoint.writer import partial_folder

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=errors,
        transient=True,
        disable=not errors.is_terminal,
    ) as bar:
        task = bar.add_task("writing", total=None)
        try:
            yield lambda done, total: bar.update(task, completed=done, total=total)
        except KeyboardInterrupt:
            where = partial_folder(expand_path(folder).resolve())
            again = "--overwrite --resume" if overwrite else "--resume"
            errors.print(
                "interrupted"
                + (f"; {where} is kept, run again with {again} to go on" if where.exists() else "")
            )
            raise typer.Exit(130) from None


def print_written(target: Path, as_json: bool) -> None:
    """Print the size and the precision of the checkpoint that was written."""
    from mlx_diffgemma.checkpoint.info import inspect

    written = inspect(target)
    if as_json:
        print(json.dumps(written.record()))
    else:
        output.print(
            f"{target}: {human_count(written.stored_bytes, 'B')}, "
            f"{written.bits_per_weight:.2f} bits per weight",
            soft_wrap=True,
        )
