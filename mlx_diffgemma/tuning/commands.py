"""``mlx-diffgemma lora``: a thin layer over :mod:`mlx_diffgemma.tuning.run`, with mlx-lm's flags."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mlx_diffgemma import nano
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.generate import load
from mlx_diffgemma.tuning.adapters import TYPES
from mlx_diffgemma.tuning.run import OPTIMIZERS, Run, TuningOptions, check_target, read_config
from mlx_diffgemma.tuning.trainer import Report
from mlx_diffgemma.values import Values

errors = Console(stderr=True, highlight=False, soft_wrap=True)
DEFAULTS = TuningOptions()
TRAINING, ADAPTER = DEFAULTS.training, DEFAULTS.adapter
OWN = ("model", "config", "resume", "as_json", "train", "dtype", "revision", "rank", "ignore_memory")


def _default(value: object) -> str:
    return f"Default: {value}."


def lora(
    model: Annotated[str | None, typer.Option(help=f"'{nano.NAME}' (built in), a folder, or a Hub id; quantised ones too. "
                                              + _default(nano.NAME))] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the Hub repository.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Compute dtype: float32, bfloat16 or float16.")] = None,
    train: Annotated[bool, typer.Option("--train", help="Train; without it, --test alone scores the adapter's base.")] = False,
    test: Annotated[bool | None, typer.Option("--test", help="Losses over test.jsonl at the end.")] = None,
    data: Annotated[str | None, typer.Option(help="Folder with train.jsonl, valid.jsonl and test.jsonl: chat, completions or text. "
                                             + _default(DEFAULTS.data))] = None,
    fine_tune_type: Annotated[str | None, typer.Option(help=f"{', '.join(TYPES)}. {_default(ADAPTER.fine_tune_type)}")] = None,
    num_layers: Annotated[int | None, typer.Option(help=f"The last so many; -1 is all. {_default(ADAPTER.num_layers)}")] = None,
    rank: Annotated[int | None, typer.Option(help="Of lora_parameters; scale and dropout come from the YAML. Default: 8.")] = None,
    train_experts: Annotated[bool | None, typer.Option("--train-experts", help="The experts too.")] = None,
    train_router: Annotated[bool | None, typer.Option("--train-router", help="The router too.")] = None,
    optimizer: Annotated[str | None, typer.Option(help=f"{', '.join(OPTIMIZERS)}. {_default(DEFAULTS.optimizer)}")] = None,
    learning_rate: Annotated[float | None, typer.Option(help=_default(DEFAULTS.learning_rate))] = None,
    batch_size: Annotated[int | None, typer.Option(help=_default(TRAINING.batch_size))] = None,
    iters: Annotated[int | None, typer.Option(help=f"Batches. {_default(TRAINING.iters)}")] = None,
    grad_accumulation_steps: Annotated[int | None, typer.Option(help="Batches a step of the optimiser. "
                                                                + _default(TRAINING.grad_accumulation_steps))] = None,
    max_grad_norm: Annotated[float | None, typer.Option(help=f"0 does not clip. {_default(TRAINING.max_grad_norm)}")] = None,
    canvas_length: Annotated[int | None, typer.Option(help="Default: the checkpoint's.")] = None,
    max_seq_length: Annotated[int | None, typer.Option(help="Longer examples are left out, and counted. "
                                                       + _default(DEFAULTS.max_seq_length))] = None,
    allow_control_tokens: Annotated[bool | None, typer.Option("--allow-control-tokens", help="Read what looks like a control token "
                                                              "in the data as one; without it, it is plain text.")] = None,
    mask_prompt: Annotated[bool | None, typer.Option("--mask-prompt", help="Leave the prompt out of the causal term.")] = None,
    canvas_weight: Annotated[float | None, typer.Option(help=f"Of the canvas's loss. {_default(DEFAULTS.canvas_weight)}")] = None,
    causal_weight: Annotated[float | None, typer.Option(help=f"Of the next-token loss. {_default(DEFAULTS.causal_weight)}")] = None,
    self_conditioning_probability: Annotated[float | None, typer.Option(
        help=f"Of a first pass. {_default(DEFAULTS.self_conditioning_probability)}")] = None,
    grad_checkpoint: Annotated[bool | None, typer.Option("--grad-checkpoint", help="Less memory, a third more time.")] = None,
    val_batches: Annotated[int | None, typer.Option(help=f"-1 is all. {_default(TRAINING.val_batches)}")] = None,
    steps_per_report: Annotated[int | None, typer.Option(help=_default(TRAINING.steps_per_report))] = None,
    steps_per_eval: Annotated[int | None, typer.Option(help=_default(TRAINING.steps_per_eval))] = None,
    save_every: Annotated[int | None, typer.Option(help=_default(TRAINING.save_every))] = None,
    adapter_path: Annotated[str | None, typer.Option(help=f"Folder to write. {_default(DEFAULTS.adapter_path)}")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --adapter-path, bit for bit.")] = False,
    resume_adapter_file: Annotated[str | None, typer.Option(help="Begin with these weights.")] = None,
    seed: Annotated[int | None, typer.Option(help=_default(TRAINING.seed))] = None,
    ignore_memory: Annotated[bool, typer.Option("--ignore-memory", help="Begin even if it should not fit.")] = False,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="YAML file of these options, with lora_parameters, "
                                                "lr_schedule, optimizer_config as in mlx-lm; the command line goes first.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON record as the last line.")] = False,
) -> None:
    """Fine-tune with the model's own objective: LoRA, DoRA or all weights."""
    options, chosen = _options(locals())
    if not (chosen["train"] or options.test):
        raise UserError("Nothing to do; give --train, or --test, or both.")
    if chosen["train"]:
        check_target(options, resume)
    network, tokenizer = load(chosen["model"], revision=revision, dtype=dtype)
    run = Run.prepare(network, tokenizer, options, chosen["model"], resume, ignore_memory or not chosen["train"])
    for name, split in run.splits.items():
        left_out = (f", {split.too_long} left out for exceeding {options.max_seq_length} tokens (the longest has {split.longest})"
                    if split.too_long else "")
        errors.print(f"{name}: {len(split.examples):,} examples{left_out}", markup=False)
    if run.resumed:
        errors.print(f"going on at iteration {run.trainer.iteration}")
    if chosen["train"]:
        _train(run)
    tested = run.test() if options.test else None
    if tested:
        errors.print(_line(tested, "test"))
    if as_json:
        record = {"adapter_path": str(run.folder), "iteration": run.trainer.iteration,
                  "reports": [asdict(report) for report in run.trainer.reports], "test": asdict(tested) if tested else None}
        print(json.dumps(record), flush=True)
    if chosen["train"]:
        run.plot()


def _options(given: dict[str, Any]) -> tuple[TuningOptions, dict[str, Any]]:
    """The run's options, the command line before the file; and those that belong to the command alone."""
    own = {name: given[name] for name in OWN}
    flags = {name: value for name, value in given.items() if name not in OWN and value is not None}
    file = read_config(given["config"]) if given["config"] else {}
    values = Values(file, str(given["config"]))
    own["model"] = own["model"] or values.text("model", nano.NAME)
    own["train"] = values.flag("train", False) or own["train"]
    rest = {name: value for name, value in file.items() if name not in ("model", "train")}
    TuningOptions.read(rest, values.source)  # a wrong value is refused also where the command line overrides it
    merged = rest | flags
    if own["rank"] is not None:
        base = values.part("lora_parameters").content or ADAPTER.lora_parameters
        merged["lora_parameters"] = {**base, "rank": own["rank"]}
    return TuningOptions.from_mapping(merged, values.source if file else "lora"), own


def _train(run: Run) -> None:
    total = run.options.training.iters
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task("training", total=total, completed=run.trainer.iteration)

        def tell(report: Report) -> None:
            bar.update(task, completed=report.iteration)
            bar.console.print(_line(report, "valid" if report.valid else "train"))

        try:
            run.start(tell)
        except KeyboardInterrupt:
            errors.print(f"interrupted at iteration {run.trainer.iteration}; --resume goes on from the last checkpoint")
            raise typer.Exit(130) from None


def _line(report: Report, name: str) -> str:
    return (f"{report.iteration:6} {name}: loss {report.total:.4f} (canvas {report.canvas:.4f}, causal {report.causal:.4f}), "
            f"rate {report.learning_rate:.2e}, {report.tokens_per_second:,.0f} tokens/s, {report.peak_memory / 1e9:.2f} GB")
