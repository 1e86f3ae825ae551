"""`mlx-diffgemma estimate`: memory and speed before anything is downloaded."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from drafter.projection import Projection, project, read_record
from mlx_diffgemma.checkpoint import hub
from mlx_diffgemma.cli.options import Json
from mlx_diffgemma.cli.output import human_count, new_table, output, print_table
from mlx_diffgemma.cli.signature import command, part_option
from mlx_diffgemma.device import memory_limit
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.estimate import estimate as estimation
from mlx_diffgemma.estimate import macs as mac_table
from mlx_diffgemma.estimate.cost import released_with_tower
from mlx_diffgemma.estimate.estimate import CHIPS, Estimate
from mlx_diffgemma.model.config import ModelConfig
from mlx_diffgemma.model.recipes import RECIPES, recipe_named
from mlx_diffgemma.tuning.memory import ways


@dataclass(frozen=True)
class SubjectOptions:
    """The options that say what is estimated: a model on a chip."""

    chip: str | None = part_option(
        None, help="A chip of the table, 'M3 Max' for instance. Default: this machine's."
    )
    recipe: str | None = part_option(
        None,
        help="How the weights are stored: " + ", ".join(RECIPES) + ". Default: the "
        "recipe of --model, else 4bit.",
    )
    context: int = part_option(512, help="Tokens before the canvas.")
    model: str | None = part_option(
        None,
        help="A folder or Hub id, of which only the config is read. Default: the released "
        "26B shape.",
    )
    measured: bool = part_option(
        False, "--measure", help="Measure this machine's memory rate and matrix rate first."
    )
    dense: bool = part_option(
        False, "--dense", help="Count self-conditioning over the full vocabulary."
    )


@dataclass(frozen=True)
class QuestionOptions:
    """The options for other questions than the time of a step."""

    drafting: Path | None = part_option(
        None, help="A record of `draft evaluate`: project what such a drafter would do here."
    )
    training: bool = part_option(
        False,
        "--training",
        help="Print what each way of fine-tuning takes with examples of --context tokens, and on "
        "which Mac it fits.",
    )
    batch_size: int = part_option(1, help="With --training: examples a batch.")
    macs: bool = part_option(
        False,
        "--macs",
        help="Print which recipe fits which Mac, and how much context beside it.",
    )


@command
def estimate(*, subject: SubjectOptions, question: QuestionOptions, as_json: Json = False) -> None:
    """Estimate memory and speed from the config alone.

    Nothing is downloaded but small files.
    """
    _check(subject, question)
    # Unknown names are refused before anything is read or measured.
    named = estimation.chip_named(subject.chip) if subject.chip is not None else None
    if subject.recipe is not None:
        recipe_named(subject.recipe)
    config = (
        ModelConfig.from_folder(hub.small_files(subject.model))
        if subject.model
        else released_with_tower()
    )
    if question.training:
        _print_training(config, subject.context, question.batch_size, as_json)
        return
    if question.macs:
        _print_macs(config, as_json)
        return
    chip = estimation.measure() if subject.measured else named or estimation.this_chip()
    if chip is None:
        raise UserError(
            f"This machine is not in the table; name one with --chip ({', '.join(CHIPS)}), or --measure this one."
        )
    own_recipe = config.recipe if config.recipe in RECIPES else None
    stored = recipe_named(subject.recipe or own_recipe or "4bit")
    counted = estimation.estimate(config, stored, chip, subject.context, sparse=not subject.dense)
    projected = None
    if question.drafting is not None:
        record = read_record(question.drafting)
        projected = project(config, stored, chip, subject.context, record)
    if as_json:
        more = {"projection": asdict(projected)} if projected else {}
        print(json.dumps(counted.record() | more))
        return
    _print_estimate(counted, subject.context)
    if projected:
        _print_projection(projected)


def _check(subject: SubjectOptions, question: QuestionOptions) -> None:
    """Raise UserError for options that exclude each other."""
    if question.drafting is not None and (question.training or subject.dense):
        raise UserError(
            "--drafting projects canvases with sparse self-conditioning; leave --training and --dense out."
        )
    chosen = subject.chip is not None or subject.recipe is not None
    if question.training and (chosen or subject.measured or subject.dense):
        raise UserError(
            "--training counts all recipes and needs no chip; leave --chip, --measure, --recipe and --dense out."
        )
    others = (
        chosen,
        question.drafting is not None,
        subject.measured,
        subject.dense,
        question.training,
        subject.context != 512,
    )
    if question.macs and any(others):
        raise UserError(
            "--macs counts all recipes and how much context each leaves; it goes with --model and --json alone."
        )
    if question.batch_size != 1 and not question.training:
        raise UserError("--batch-size belongs to --training; add that.")
    if subject.chip is not None and subject.measured:
        raise UserError(
            "Either --chip or --measure: the one takes a row of the table, the other this machine."
        )


def _print_estimate(counted: Estimate, context: int) -> None:
    """Print the cost of a step, the possible speed, and the memory."""
    chip = counted.chip
    output.print(
        f"{chip.name} ({chip.source})\n{human_count(chip.bandwidth, 'B/s')}, of which "
        f"{chip.bandwidth_share:.0%} count; {chip.flops / 1e12:.3g} TFLOP/s, of which "
        f"{chip.flops_share:.0%} count\n"
        f"{counted.parameters / 1e9:.3g} B parameters, {counted.active / 1e9:.2g} B active, "
        f"recipe {counted.recipe}, {context:,} tokens of context",
        soft_wrap=True,
    )
    table = new_table("part", "TFLOP a step", "GB a step")
    for part in dict.fromkeys([*counted.flops, *counted.bytes]):
        table.add_row(
            part,
            f"{counted.flops[part] / 1e12:.3f}" if part in counted.flops else "-",
            f"{counted.bytes[part] / 1e9:.3f}" if part in counted.bytes else "-",
        )
    table.add_section()
    table.add_row(
        "all",
        f"{sum(counted.flops.values()) / 1e12:.3f}",
        f"{sum(counted.bytes.values()) / 1e9:.3f}",
    )
    print_table(table)
    rates = ", ".join(f"{rate:.0f} tok/s at {steps} steps" for steps, rate in counted.rates.items())
    reported = ""
    if counted.reported is not None:
        reported = (
            f"; against {counted.reported:g} tok/s as reported, "
            f"at {counted.reported_break_even:.1f} steps"
        )
    output.print(
        f"a step takes at least {1000 * counted.step_seconds:.3g} ms, bound by {counted.bound_by} "
        f"(bandwidth {1000 * counted.bandwidth_seconds:.3g} ms, "
        f"compute {1000 * counted.compute_seconds:.3g} ms)\n"
        f"at most {rates}\n"
        f"left to right at most {counted.causal_rate:.0f} tok/s: as fast at "
        f"{counted.break_even:.1f} steps a canvas{reported}\n"
        f"memory: {human_count(counted.memory, 'B')} without the vision tower; {_allowed(counted)}",
        soft_wrap=True,
    )


def _print_projection(projected: Projection) -> None:
    """Print the expected effect of a drafter on that machine."""
    table = new_table(
        "steps a canvas",
        *map(str, projected.plain),
        title="projection, not measured: tok/s at most",
    )
    for name, rates in (
        ("without a drafter", projected.plain),
        ("drafted, as all canvases of the record", projected.drafted_as_all),
        ("drafted, as its longest", projected.drafted_as_longest),
    ):
        table.add_row(name, *(f"{rate:.0f}" for rate in rates.values()))
    print_table(table)
    output.print(
        f"left to right at most {projected.causal:.0f} tok/s, "
        f"drafted {projected.causal_drafted:.0f}",
        soft_wrap=True,
    )


def _allowed(found: Estimate) -> str:
    """The memory to compare with: this machine's if the chip is its own, else that of Macs."""
    if found.chip.here:
        return f"this machine allows {human_count(memory_limit(), 'B')}"
    mac = mac_table.smallest_mac(found.memory)
    return f"fits Macs with {mac} GB and more" if mac else "fits no Mac of the table (--macs)"


def _print_macs(config: ModelConfig, as_json: bool) -> None:
    found = mac_table.table(config)
    if as_json:
        print(
            json.dumps(
                {
                    "gpu_bytes": {mac: mac_table.gpu_memory(mac) for mac in mac_table.MACS},
                    "context": {
                        name: {
                            mac: {"without_tower": plain, "with_tower": seen}
                            for mac, (plain, seen) in row.items()
                        }
                        for name, row in found.items()
                    },
                }
            )
        )
        return
    table = new_table("recipe", *(f"{mac} GB" for mac in mac_table.MACS))
    for name, row in found.items():
        table.add_row(name, *map(mac_table.cell, row.values()))
    print_table(table)
    output.print(
        "Thousands of tokens of context beside the weights, without and with the vision tower; – does not fit. Of a Mac's "
        "memory its GPU may take two thirds up to 32 GB, three quarters above.",
        soft_wrap=True,
    )


def _print_training(config: ModelConfig, sequence: int, batch_size: int, as_json: bool) -> None:
    found = ways(config, sequence, batch_size)
    if as_json:
        print(
            json.dumps(
                [
                    asdict(way)
                    | asdict(plain)
                    | {
                        "grad_checkpoint": asdict(twice),
                        "mac": plain.mac,
                        "mac_with_grad_checkpoint": twice.mac,
                    }
                    for way, plain, twice in found
                ]
            )
        )
        return
    output.print(
        f"Fine-tuning all layers: batch size {batch_size}, {sequence:,} tokens and a canvas of {config.canvas_length}",
        soft_wrap=True,
    )
    table = new_table(
        "trained", "base", "weights", "all", "a Mac of", "--grad-checkpoint", "a Mac of"
    )
    for way, plain, twice in found:
        table.add_row(
            str(way),
            way.recipe,
            human_count(plain.weights, "B"),
            *(
                text
                for memory in (plain, twice)
                for text in (
                    human_count(memory.total, "B"),
                    "none" if memory.mac is None else f"{memory.mac} GB",
                )
            ),
        )
    print_table(table)
    output.print(
        "Of a Mac's memory its GPU may take two thirds up to 32 GB, three quarters above.",
        soft_wrap=True,
    )
