"""`mlx-diffgemma doctor`: check this machine."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from mlx_diffgemma.cli.options import Json
from mlx_diffgemma.cli.output import errors, new_table, output, print_table, spinner
from mlx_diffgemma.cli.signature import command
from mlx_diffgemma.diagnostics.doctor import Diagnosis, diagnose


@command
def doctor(
    *,
    deep: Annotated[
        bool,
        typer.Option(
            "--deep",
            help="Also check every operation at the released model's shapes, without its "
            "weights: about a minute on a GPU, several on a CPU, up to 5 GB of memory.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Check this machine.

    It compares golden outputs, answers in every way, measures the time of a step, and prints one
    JSON line to paste into a report.
    """
    with spinner("checking this machine") as status:
        result = diagnose(deep=deep, progress=status.update if status else lambda _: None)
    if not as_json:
        _print_diagnosis(result)
    print(json.dumps(result.record()))
    if not result.ok:
        errors.print(
            "This machine computes something else than the reference; please report the line above."
        )
        for line in result.advice:
            errors.print(f"- {line}", markup=False)
        raise typer.Exit(1)


def _print_diagnosis(result: Diagnosis) -> None:
    for key, value in result.machine.items():
        output.print(f"{key:8} {value}", markup=False)
    output.print(f"{'memory':8} {result.memory_limit / 1e9:.1f} GB for a model")
    table = new_table(
        "", "largest logit difference", "KL, nats", "same argmax", "same steps", "ms a step", ""
    )
    for check in result.checks:
        table.add_row(
            check.name,
            f"{check.logits:.2e}",
            f"{check.kl:.2e}",
            f"{check.argmax:.1%}",
            f"{check.trajectory}/{check.trajectory_steps}",
            f"{check.milliseconds_per_step:.1f}",
            "ok" if check.ok else "WRONG",
        )
    print_table(table)
    for way in result.ways:
        output.print(f"{way.name:40} {'ok' if way.ok else 'WRONG: ' + way.note}", markup=False)
    for section in result.deep:
        summary = f"{section.checks} checks, largest error {section.worst:.0%} of its bound"
        output.print(
            f"{section.name:40} {'ok' if section.ok else 'WRONG'}, {summary}", markup=False
        )
        for wrong in section.failed:
            note = wrong.note or f"error {wrong.error:.1e}, bound {wrong.bound:.0e}"
            output.print(f"  {wrong.name}: {note}", markup=False)
