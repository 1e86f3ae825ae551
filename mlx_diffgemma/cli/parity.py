"""`mlx-diffgemma parity`: compare with the reference."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from mlx_diffgemma.checkpoint import hub
from mlx_diffgemma.cli.options import CheckpointOptions, Json
from mlx_diffgemma.cli.output import new_table, output, print_table, spinner
from mlx_diffgemma.cli.signature import command
from mlx_diffgemma.errors import UserError

if TYPE_CHECKING:
    from mlx_diffgemma.diagnostics.parity import Report


@command
def parity(
    *,
    source: CheckpointOptions,
    device: Annotated[str, typer.Option(help="Where torch runs: cpu or cuda.")] = "cpu",
    prompts: Annotated[int, typer.Option(help="How many random prompts.")] = 4,
    canvases: Annotated[int, typer.Option(help="Canvases a prompt in the trajectory stages.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed of prompts and draws.")] = 0,
    as_json: Json = False,
) -> None:
    """Compare with transformers on the same checkpoint.

    Every stage is compared; the exit code is 1 where one exceeds the tolerance.
    """
    try:
        from mlx_diffgemma.diagnostics.parity import run
    except ImportError as error:
        raise UserError(
            f"parity needs torch and transformers ({error.name} is missing); install them with "
            "`pip install 'mlx-diffgemma[parity]'`."
        ) from None
    folder = hub.resolve(source.model, source.revision)
    with spinner("running both sides"):
        report = run(folder, device, prompts, canvases, seed)
    if as_json:
        print(json.dumps(asdict(report) | {"ok": report.ok}))
    else:
        _print_stages(report)
        _print_trajectories(report)
    if not report.ok:
        raise typer.Exit(1)


def _print_stages(report: Report) -> None:
    """Print the errors of each stage next to the reference's own."""
    table = new_table(
        "stage",
        "rows",
        "median",
        "90 %",
        "largest",
        "its median",
        "its 90 %",
        "beyond",
        "unexplained",
        "",
    )
    for stage in report.stages:
        table.add_row(
            stage.stage,
            str(stage.rows),
            f"{stage.median:.1e}",
            f"{stage.p90:.1e}",
            f"{stage.largest:.1e}",
            f"{stage.spread:.1e}",
            f"{stage.own_p90:.1e}",
            str(stage.beyond),
            str(stage.unexplained),
            "ok" if stage.ok else "FAIL",
        )
    print_table(table)


def _print_trajectories(report: Report) -> None:
    """Print how far the canvases agree, and where each ended at a rounding tie."""
    table = new_table("trajectories", "canvases", "steps", "ended at a rounding tie", "")
    for trajectory in report.trajectories:
        table.add_row(
            trajectory.setting,
            str(trajectory.canvases),
            str(trajectory.steps),
            str(len(trajectory.ended)),
            "ok" if trajectory.ok else "FAIL",
        )
    print_table(table)
    for trajectory in report.trajectories:
        for end in trajectory.ended:
            output.print(
                f"{trajectory.setting}: canvas {end.canvas}, step {end.step}, {end.decision}: "
                f"margin {end.margin:.1e}, reference's spread {end.spread:.1e}"
                f"{'' if end.excused else ' NOT EXCUSED'}",
                soft_wrap=True,
            )
