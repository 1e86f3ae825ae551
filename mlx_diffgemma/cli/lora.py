"""``mlx-diffgemma lora``: a thin layer over :mod:`mlx_diffgemma.tuning.run` with mlx-lm's flags."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import typer

from mlx_diffgemma import nano
from mlx_diffgemma.cli.options import Json
from mlx_diffgemma.cli.output import errors
from mlx_diffgemma.cli.progress import Bars
from mlx_diffgemma.cli.signature import command, part_option
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.generation.load import load
from mlx_diffgemma.tuning.adapters import TYPES
from mlx_diffgemma.tuning.run import OPTIMIZERS, Run, TuningOptions, check_target, read_config
from mlx_diffgemma.tuning.trainer import Report
from mlx_diffgemma.values import Values

DEFAULTS = TuningOptions()
TRAINING, ADAPTER = DEFAULTS.training, DEFAULTS.adapter
OWN = (
    "model",
    "config",
    "resume",
    "as_json",
    "train",
    "dtype",
    "revision",
    "rank",
    "ignore_memory",
)


def _flag(default: object, help: str, *names: str) -> Any:
    """An option whose default is the file's value, or else ``default``."""
    return part_option(None, *names, help=f"{help} Default: {default}.")


def _switch(name: str, help: str) -> Any:
    """An option that is off unless the command line or the file sets it."""
    return part_option(None, name, help=help)


@dataclass(frozen=True)
class BaseOptions:
    """The options of the model that is trained."""

    PANEL = "Model"

    model: str | None = _flag(
        nano.NAME, f"'{nano.NAME}' (built in), a folder, or a Hub id; quantised ones too."
    )
    revision: str | None = part_option(None, help="Branch, tag or commit of the Hub repository.")
    dtype: str | None = part_option(
        None,
        help="Compute dtype: float32, bfloat16 or float16. Default: the checkpoint's on a GPU, "
        "float32 on a CPU.",
    )


@dataclass(frozen=True)
class RunOptions:
    """The options that say what is done, and where files are read and written."""

    PANEL = "Run"

    train: bool = part_option(
        False,
        "--train",
        help="Train an adapter. Without --train, --test alone scores the base of the adapter.",
    )
    test: bool | None = _switch("--test", "Print the losses over test.jsonl at the end.")
    data: str | None = _flag(
        DEFAULTS.data,
        "Folder with train.jsonl, valid.jsonl and test.jsonl: chat, completions or text.",
    )
    adapter_path: str | None = _flag(DEFAULTS.adapter_path, "Folder to write the adapter to.")
    resume: bool = part_option(
        False, "--resume", help="Continue the run in --adapter-path, bit for bit."
    )
    resume_adapter_file: str | None = part_option(
        None, help="Begin with the weights of this file of an adapter."
    )
    ignore_memory: bool = part_option(
        False, "--ignore-memory", help="Begin even if the training should not fit the memory."
    )
    config: Path | None = part_option(
        None,
        "--config",
        "-c",
        help="YAML file of these options, with lora_parameters, lr_schedule, optimizer_config as "
        "in mlx-lm; the command line goes first.",
    )


@dataclass(frozen=True)
class AdapterFlags:
    """The options that say what is trained."""

    PANEL = "Adapter"

    fine_tune_type: str | None = _flag(
        ADAPTER.fine_tune_type, f"What is trained: {', '.join(TYPES)}."
    )
    num_layers: int | None = _flag(
        f"{ADAPTER.num_layers}, or all of a smaller model",
        "Train the last layers, this many of them; -1 is all.",
    )
    rank: int | None = _flag(
        8, "Rank of the adapter's matrices; scale and dropout come from the YAML file."
    )
    train_experts: bool | None = _switch("--train-experts", "Train the experts too.")
    train_router: bool | None = _switch("--train-router", "Train the router too.")


@dataclass(frozen=True)
class TrainingFlags:
    """The options that say how it is trained."""

    PANEL = "Training"

    optimizer: str | None = _flag(DEFAULTS.optimizer, f"Optimiser: {', '.join(OPTIMIZERS)}.")
    learning_rate: float | None = _flag(DEFAULTS.learning_rate, "Learning rate.")
    batch_size: int | None = _flag(TRAINING.batch_size, "Examples a batch.")
    iters: int | None = _flag(TRAINING.iters, "Number of batches to train on.")
    grad_accumulation_steps: int | None = _flag(
        TRAINING.grad_accumulation_steps, "Batches a step of the optimiser."
    )
    max_grad_norm: float | None = _flag(
        TRAINING.max_grad_norm, "Clip gradients to this norm; 0 does not clip."
    )
    grad_checkpoint: bool | None = _switch(
        "--grad-checkpoint", "Compute activations twice: less memory, a third more time."
    )
    val_batches: int | None = _flag(
        TRAINING.val_batches, "Batches of a validation; -1 is all of them, 0 is no validation."
    )
    steps_per_report: int | None = _flag(
        TRAINING.steps_per_report, "Report the losses every this many batches."
    )
    steps_per_eval: int | None = _flag(TRAINING.steps_per_eval, "Validate every this many batches.")
    save_every: int | None = _flag(
        TRAINING.save_every, "Write a checkpoint every this many batches."
    )
    seed: int | None = _flag(TRAINING.seed, "Seed of the training.")


@dataclass(frozen=True)
class ObjectiveFlags:
    """The options that say what the losses are computed on."""

    PANEL = "Objective"

    canvas_length: int | None = _flag("the checkpoint's", "Positions of a canvas.")
    max_seq_length: int | None = _flag(
        DEFAULTS.max_seq_length, "Leave longer examples out, and count them."
    )
    allow_control_tokens: bool | None = _switch(
        "--allow-control-tokens",
        "Read what looks like a control token in the data as one. Default: it is plain text.",
    )
    mask_prompt: bool | None = _switch(
        "--mask-prompt", "Leave the prompt out of the next-token loss."
    )
    canvas_weight: float | None = _flag(DEFAULTS.canvas_weight, "Weight of the canvas's loss.")
    causal_weight: float | None = _flag(DEFAULTS.causal_weight, "Weight of the next-token loss.")
    self_conditioning_probability: float | None = _flag(
        DEFAULTS.self_conditioning_probability,
        "Share of the examples whose canvas sees a first pass of the model.",
    )


@command
def lora(
    *,
    base: BaseOptions,
    work: RunOptions,
    adapter: AdapterFlags,
    training: TrainingFlags,
    objective: ObjectiveFlags,
    as_json: Json = False,
) -> None:
    """Fine-tune with LoRA, DoRA or all weights.

    The objective is the model's own.
    """
    parts = (base, work, adapter, training, objective)
    given = {name: value for part in parts for name, value in vars(part).items()}
    options, chosen = _options(given | {"as_json": as_json})
    if not (chosen["train"] or options.test):
        raise UserError("Nothing to do; give --train, or --test, or both.")
    if chosen["train"]:
        check_target(options, work.resume)
    network, tokenizer = load(chosen["model"], revision=base.revision, dtype=base.dtype)
    if chosen["default_layers"]:
        layers = min(ADAPTER.num_layers, len(network.layers))
        options = replace(options, adapter=replace(options.adapter, num_layers=layers))
    run = Run.prepare(
        network,
        tokenizer,
        options,
        chosen["model"],
        work.resume,
        work.ignore_memory or not chosen["train"],
    )
    _print_splits(run)
    if chosen["train"]:
        _train(run)
    tested = run.test() if options.test else None
    if tested:
        errors.print(_line(tested, "test"))
    if as_json:
        record = {
            "adapter_path": str(run.folder),
            "iteration": run.trainer.iteration,
            "reports": [asdict(report) for report in run.trainer.reports],
            "test": asdict(tested) if tested else None,
        }
        print(json.dumps(record), flush=True)
    if chosen["train"]:
        run.plot()


def _print_splits(run: Run) -> None:
    """Print how many examples there are, and how many were left out."""
    for name, split in run.splits.items():
        left_out = (
            f", {split.too_long} left out for exceeding {run.options.max_seq_length} tokens (the longest has {split.longest})"
            if split.too_long
            else ""
        )
        errors.print(f"{name}: {len(split.examples):,} examples{left_out}", markup=False)
    if run.resumed:
        errors.print(f"going on at iteration {run.trainer.iteration}")


def _options(given: dict[str, Any]) -> tuple[TuningOptions, dict[str, Any]]:
    """Merge the options of the command line and of the file.  The command line has precedence.

    Returns:
        (the options of the run, the options that only the command has).
    """
    own = {name: given[name] for name in OWN}
    flags = {name: value for name, value in given.items() if name not in OWN and value is not None}
    file = read_config(given["config"]) if given["config"] else {}
    values = Values(file, str(given["config"]))
    own["model"] = own["model"] or values.text("model", nano.NAME)
    own["train"] = values.flag("train", False) or own["train"]
    rest = {name: value for name, value in file.items() if name not in ("model", "train")}
    TuningOptions.read(
        rest, values.source
    )  # a wrong value is refused even if the command line overrides it
    merged = rest | flags
    own["default_layers"] = merged.get("num_layers") is None
    if own["rank"] is not None:
        base = values.part("lora_parameters").content or ADAPTER.lora_parameters
        merged["lora_parameters"] = {**base, "rank": own["rank"]}
    return TuningOptions.from_mapping(merged, values.source if file else "lora"), own


def _train(run: Run) -> None:
    total = run.options.training.iters
    with Bars() as bars:
        bars.begin("training", total, run.trainer.iteration)

        def tell(report: Report) -> None:
            bars.update("training", report.iteration, total)
            bars.print(_line(report, "valid" if report.valid else "train"))

        try:
            run.start(tell)
        except KeyboardInterrupt:
            errors.print(
                f"interrupted at iteration {run.trainer.iteration}; --resume continues from the last checkpoint"
            )
            raise typer.Exit(130) from None


def _line(report: Report, name: str) -> str:
    return (
        f"{report.iteration:6} {name}: loss {report.total:.4f} (canvas {report.canvas:.4f}, causal {report.causal:.4f}), "
        f"rate {report.learning_rate:.2e}, {report.tokens_per_second:,.0f} tokens/s, {report.peak_memory / 1e9:.2f} GB"
    )
