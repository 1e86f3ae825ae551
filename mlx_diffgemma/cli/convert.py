"""`mlx-diffgemma convert`: write a checkpoint in another precision."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import mlx.core as mx
import typer
from rich.table import Table

from mlx_diffgemma import nano
from mlx_diffgemma.checkpoint import hub
from mlx_diffgemma.checkpoint.convert import convert
from mlx_diffgemma.checkpoint.options import ConvertOptions
from mlx_diffgemma.checkpoint.plan import Conversion, plan
from mlx_diffgemma.cli.options import Json, WritingOptions
from mlx_diffgemma.cli.output import (
    errors,
    human_count,
    new_table,
    output,
    print_table,
    print_written,
    writing,
)
from mlx_diffgemma.cli.signature import command, part_option
from mlx_diffgemma.device import compute_dtype, memory_limit
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.estimate import cost, macs
from mlx_diffgemma.model.config import ModelConfig
from mlx_diffgemma.model.recipes import MODES, RECIPES


@dataclass(frozen=True)
class PrecisionOptions:
    """The precision of the checkpoint that is written."""

    PANEL = "Precision"

    quantize: bool = part_option(
        False, "--quantize", "-q", help="Quantise by the recipe 4bit, or --q-mode's."
    )
    q_bits: int | None = part_option(
        None, help="Bits of the experts (of everything with uniform-4bit)."
    )
    q_group_size: int | None = part_option(None, help="Group size of the experts.")
    q_mode: str | None = part_option(None, help="Mode of the experts: " + ", ".join(MODES) + ".")
    recipe: str | None = part_option(
        None,
        "--recipe",
        "--quant-predicate",
        help="Which tensors get how many bits: " + ", ".join(RECIPES) + ". See docs/recipes.md.",
    )
    fit: str | None = part_option(
        None,
        help="With -q: the largest recipe that fits a Mac with this much memory and 8,192 "
        "tokens of context, 24GB for instance, or 'auto' for this machine.",
    )
    dequantize: bool = part_option(False, "--dequantize", "-d", help="Undo a quantisation.")


@command
def convert_command(
    *,
    hf_path: Annotated[
        str,
        typer.Option(
            "--hf-path", "--model", help=f"The checkpoint: a folder, a Hub id, or '{nano.NAME}'."
        ),
    ],
    mlx_path: Annotated[Path, typer.Option(help="The folder to write.")] = Path("mlx_model"),
    precision: PrecisionOptions,
    target: WritingOptions,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print what would be written and whether it fits this machine; of a "
            "Hub repository only headers are fetched.",
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Convert or quantise a checkpoint.

    It takes far less memory than the checkpoint, and continues after an interruption.
    """
    recipe = precision.recipe
    if precision.fit is not None:
        recipe = _fitting(hf_path, target.revision, precision.fit, precision)
    options = ConvertOptions(
        precision.quantize,
        recipe,
        precision.q_bits,
        precision.q_group_size,
        precision.q_mode,
        target.dtype,
        precision.dequantize,
    )
    if (chosen := options.chosen()) and chosen.warning:
        errors.print(f"warning: {chosen.warning}", markup=False)
    if dry_run:
        _print_conversion(plan(hf_path, *hub.headers(hf_path, target.revision), options), as_json)
        return
    with writing(mlx_path, target.overwrite) as progress:
        folder = convert(
            hf_path,
            mlx_path,
            precision.quantize,
            precision.q_group_size,
            precision.q_bits,
            precision.q_mode,
            target.dtype,
            target.upload_repo,
            target.revision,
            precision.dequantize,
            recipe,
            target.overwrite,
            target.resume,
            progress,
        )
    print_written(folder, as_json)


def _fitting(model: str, revision: str | None, fit: str, precision: PrecisionOptions) -> str:
    """The name of the recipe that --fit chooses.  It is printed on standard error.

    Args:
        model: the checkpoint.
        revision: its branch, tag or commit on the Hub.
        fit: the machine that the recipe must fit.
        precision: the other options of precision.

    Raises:
        UserError: other options also choose a recipe, or nothing fits.
    """
    changes = (precision.q_bits, precision.q_group_size, precision.q_mode)
    if not precision.quantize:
        raise UserError("--fit chooses a recipe to quantise by; add -q.")
    if precision.recipe is not None or changes != (None, None, None):
        raise UserError(
            "--fit chooses the recipe itself; leave --recipe and the --q- options out, or leave --fit out."
        )
    macs.limit_of(fit)  # an invalid size is refused before the network is used
    config = ModelConfig.from_folder(hub.small_files(model, revision))
    if config.quantization:
        raise UserError(
            f"{model} is quantised already, so --fit has nothing to choose; convert the original checkpoint."
        )
    found = macs.fit(config, fit)
    errors.print(f"recipe {found}", markup=False)
    return found.recipe.name


def _print_conversion(conversion: Conversion, as_json: bool) -> None:
    """Print what would be written, and whether it fits this machine."""
    size = compute_dtype(mx.bfloat16).size
    limit = memory_limit()
    longest = conversion.config.text.max_position_embeddings
    contexts = sorted({min(context, longest) for context in cost.CONTEXTS})
    needs = {
        context: conversion.memory_bytes + sum(cost.forward_bytes(conversion.config, context, size))
        for context in contexts
    }
    if as_json:
        record = {
            "classes": [
                asdict(row) | {"bits_per_weight": row.bits_per_weight} for row in conversion.rows()
            ],
            "bytes": conversion.bytes_out,
            "bits_per_weight": conversion.bits_per_weight,
            "files": len(conversion.shards()),
            "memory_limit": limit,
            "memory_needed": needs,
        }
        print(json.dumps(record))
        return
    print_table(_classes(conversion))
    files = len(conversion.shards())
    output.print(
        f"{files} file{'s' if files > 1 else ''} would be written; bits are per weight. Weights, "
        f"K/V cache and the widest part of a forward take of the {human_count(limit, 'B')} this "
        "machine allows, by tokens of context:",
        soft_wrap=not output.is_terminal,
    )
    for context, needed in needs.items():
        fits = "fits" if needed <= limit else "DOES NOT FIT"
        output.print(f"  {context:>7,}  {human_count(needed, 'B'):>8}  {fits}")


def _classes(conversion: Conversion) -> Table:
    """A table with a row for each class of tensors, and their sum."""
    table = new_table("class", "tensors", "weights", "from", "to", "precision", "bits")
    for row in conversion.rows():
        table.add_row(
            row.kind,
            str(row.tensors),
            human_count(row.parameters),
            human_count(row.bytes_in, "B"),
            human_count(row.bytes_out, "B"),
            row.precision,
            f"{row.bits_per_weight:.2f}",
        )
    table.add_section()
    table.add_row(
        "all",
        str(len(conversion.outputs)),
        human_count(sum(tensor.size for tensor in conversion.outputs)),
        human_count(conversion.bytes_in, "B"),
        human_count(conversion.bytes_out, "B"),
        "",
        f"{conversion.bits_per_weight:.2f}",
    )
    return table
