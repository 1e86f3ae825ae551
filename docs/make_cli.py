"""Writes docs/cli.md from the command's own help: ``python docs/make_cli.py``."""

from pathlib import Path

from typer.testing import CliRunner

from mlx_diffgemma.cli.app import COMMANDS, app, load_command

FILE = Path(__file__).with_name("cli.md")


def page() -> str:
    parts = ["# Command line\n\nMade from the command's own help by `python docs/make_cli.py`.\n"]
    groups = {name: load_command(name) for name in COMMANDS}
    nested = [
        f"{name} {inner}"
        for name, group in groups.items()
        for inner in getattr(group, "commands", ())
    ]
    for command in ("", *groups, *nested):
        arguments = [*command.split(), "--help"]
        help_text = CliRunner().invoke(
            app,
            arguments,
            prog_name="mlx-diffgemma",
            env={"COLUMNS": "100", "TERMINAL_WIDTH": "100"},
        )
        parts.append(
            f"## mlx-diffgemma {command}".rstrip() + f"\n\n```\n{help_text.output.strip()}\n```\n"
        )
    return "\n".join(parts)


if __name__ == "__main__":
    FILE.write_text(page(), encoding="utf-8")
