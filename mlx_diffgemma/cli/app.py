"""The command ``mlx-diffgemma``: the list of its commands, and what all of them have in common.

A command's module is imported when the command is called, so ``--help`` and ``--version`` import
neither the model nor transformers.  Every mistake of the user becomes one line on standard error
and exit code 2.  Text goes to standard output; figures and warnings go to standard error.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from mlx_diffgemma import __version__
from mlx_diffgemma.cli.command import Command
from mlx_diffgemma.cli.output import errors, warn
from mlx_diffgemma.errors import CheckpointWarning, GenerationWarning, VideoWarning
from mlx_diffgemma.failures import check_arguments, hear_interrupts, reported

SHOWN = (GenerationWarning, CheckpointWarning, VideoWarning)  # warnings meant for the user
SETTINGS: dict[str, Any] = {
    "add_completion": False,
    "pretty_exceptions_enable": False,
    "rich_markup_mode": None,
}


class Entry(NamedTuple):
    """Where a command is defined, and its line in ``mlx-diffgemma --help``."""

    module: str  # a module of mlx_diffgemma.cli
    function: str  # a function, or the Typer app of a group
    help: str  # the first sentence of its docstring


COMMANDS = {
    "generate": Entry("generate", "generate_command", "Turn a prompt into text."),
    "chat": Entry("chat", "chat", "Talk to a model; the canvas is shown while it resolves."),
    "info": Entry("info", "info", "Print what a checkpoint is."),
    "convert": Entry("convert", "convert_command", "Convert or quantise a checkpoint."),
    "fuse": Entry("fuse", "fuse_command", "Merge an adapter into the weights of its base model."),
    "estimate": Entry("estimate", "estimate", "Estimate memory and speed from the config alone."),
    "doctor": Entry("doctor", "doctor", "Check this machine."),
    "evaluate": Entry("evaluate", "evaluate", "Score a model."),
    "parity": Entry("parity", "parity", "Compare with transformers on the same checkpoint."),
    "serve": Entry("serve", "serve_command", "Serve a model over OpenAI's protocol."),
    "decide": Entry("decide", "decide_command", "Decide yes or no, a label or a score."),
    "infill": Entry("infill", "infill_command", "Fill holes in a text."),
    "edit": Entry("infill", "edit_command", "Rewrite one span of a text."),
    "lora": Entry("lora", "lora", "Fine-tune with LoRA, DoRA or all weights."),
    "draft": Entry("draft", "app", "Train a drafter and measure it."),
}


def load_command(name: str) -> TyperCommand | TyperGroup:
    """Import the module of the command ``name``, and return the command."""
    entry = COMMANDS[name]
    module = importlib.import_module(f"mlx_diffgemma.cli.{entry.module}")
    found = getattr(module, entry.function)
    if isinstance(found, typer.Typer):
        return get_command(found)  # type: ignore[return-value]
    alone = typer.Typer(**SETTINGS)
    alone.command(name, cls=Command)(found)
    return get_command(alone)  # type: ignore[return-value]


class Commands(TyperGroup):
    """The commands of ``COMMANDS``.  Each is imported when it is called."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> TyperCommand | None:  # noqa: ARG002
        """A placeholder with the name and the help line, for the list of commands."""
        if cmd_name not in COMMANDS:
            return None
        return TyperCommand(
            cmd_name, help=COMMANDS[cmd_name].help, rich_markup_mode=None, callback=lambda: None
        )

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that ``args`` begin with.  After this, Ctrl-C interrupts the work."""
        name, command, rest = super().resolve_command(ctx, args)
        if name in COMMANDS:
            command = load_command(name)
        hear_interrupts()
        return name, command, rest


app = typer.Typer(
    name="mlx-diffgemma",
    cls=Commands,
    no_args_is_help=True,
    help="DiffusionGemma on Apple silicon with MLX.",
    **SETTINGS,
)


@app.callback(invoke_without_command=True)
def options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def main(arguments: list[str] | None = None) -> None:
    """The entry point.  Every failure becomes one line and an exit code.

    ``arguments`` replace those of ``sys.argv``.
    """
    warnings.showwarning = _show_warning
    for category in SHOWN:
        warnings.simplefilter("always", category)
    with reported(lambda line: errors.print(line, markup=False)):
        check_arguments(sys.argv[1:] if arguments is None else arguments)
        app(arguments)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, SHOWN):
        warn(str(message))
