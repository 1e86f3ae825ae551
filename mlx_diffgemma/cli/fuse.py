"""`mlx-diffgemma fuse`: merge an adapter into a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlx_diffgemma import nano
from mlx_diffgemma.cli.options import Json, WritingOptions
from mlx_diffgemma.cli.output import print_written, writing
from mlx_diffgemma.cli.signature import command
from mlx_diffgemma.tuning.fuse import fuse


@command
def fuse_command(
    *,
    model: Annotated[
        str,
        typer.Option(help=f"'{nano.NAME}' (built in), a checkpoint folder, or a Hub id."),
    ] = nano.NAME,
    adapter_path: Annotated[Path, typer.Option(help="Folder of the adapter.")] = Path("adapters"),
    save_path: Annotated[Path, typer.Option(help="The folder to write.")] = Path("fused_model"),
    dequantize: Annotated[
        bool, typer.Option("--dequantize", "-d", help="Store everything unquantised.")
    ] = False,
    requantize: Annotated[
        bool,
        typer.Option(
            "--requantize",
            help="Give what the adapter changed the precision it had. Default: it "
            "stays unquantised, so that the result answers as the adapter did.",
        ),
    ] = False,
    target: WritingOptions,
    as_json: Json = False,
) -> None:
    """Merge an adapter into the weights of its base model."""
    with writing(save_path, target.overwrite) as progress:
        folder = fuse(
            model,
            adapter_path,
            save_path,
            dequantize,
            requantize,
            target.dtype,
            target.upload_repo,
            target.revision,
            target.overwrite,
            target.resume,
            progress,
        )
    print_written(folder, as_json)
