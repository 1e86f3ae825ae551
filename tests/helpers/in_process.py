"""Runs the command in this process."""

import sys

from mlx_diffgemma.cli.app import main


def run(monkeypatch, capsys, *arguments, stdin=None):
    """(exit code, stdout, stderr) of the command, in this process."""
    monkeypatch.setattr(sys, "argv", ["mlx-diffgemma", *arguments])
    if stdin is not None:
        import io

        monkeypatch.setattr(
            sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8")
        )
    try:
        main()
        code = 0
    except SystemExit as left:
        code = left.code or 0
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def generate(monkeypatch, capsys, *arguments, **options):
    """As ``run``, of the command generate with seed 1."""
    return run(monkeypatch, capsys, "generate", "--seed", "1", *arguments, **options)
