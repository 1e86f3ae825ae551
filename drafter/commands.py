"""``mlx-diffgemma draft``: a thin layer over :mod:`drafter.run`."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from drafter.canvas import DraftRules
from drafter.evaluation import KINDS, evaluate_drafter
from drafter.loading import load_drafter, tokenizer_fingerprint
from drafter.report import plot, table
from drafter.run import LOG, DraftRun, DraftShape, check_target, read_prompts, share
from drafter.training import DraftReport, DraftTrainingOptions
from mlx_diffgemma import nano
from mlx_diffgemma.device import describe
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.evaluation.tasks import tasks_named, tasks_of_file
from mlx_diffgemma.files import check_folder, expand_path, make_folder, write_json
from mlx_diffgemma.generate import load
from mlx_diffgemma.tokenizer import chat_ids
from mlx_diffgemma.tuning.adapters import model_fingerprint

app = typer.Typer(name="draft", help="Train a drafter for a model, and tell what it is worth.", no_args_is_help=True,
                  rich_markup_mode=None)
errors = Console(stderr=True, highlight=False, soft_wrap=True)
SHAPE, TRAINING = DraftShape(), DraftTrainingOptions()


@app.command()
def train(
    data: Annotated[Path, typer.Option(help="A jsonl file with `prompt` or `messages` in each line; the model answers them.")],
    model: Annotated[str, typer.Option(help=f"'{nano.NAME}' (built in), a folder, or a Hub id; quantised ones too.")] = nano.NAME,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the Hub repository.")] = None,
    adapter_path: Annotated[str | None, typer.Option(help="Folder of an adapter that `lora` trained.")] = None,
    draft_model: Annotated[str | None, typer.Option(help="Go on from this drafter: the answers begin from its guesses, and what it "
                                                    "was trained on stays in, if it is in its folder.")] = None,
    draft_path: Annotated[Path, typer.Option(help="The folder to write: a new or empty one, or with --resume a run's.")
                          ] = Path("trained-drafter"),
    num_layers: Annotated[int | None, typer.Option(help="Default: 5, 1 for a model of at most 12 layers.")] = SHAPE.num_layers,
    taps: Annotated[str | None, typer.Option(help="Layers of the model that are read, as 1,6,11. Default: evenly spread.")] = None,
    intermediate_size: Annotated[int | None, typer.Option(help="Of the MLPs.")] = SHAPE.intermediate_size,
    head_size: Annotated[int | None, typer.Option(help="How many tokens can be drafted, the most frequent ones. Default: 32,768, "
                                                  "or three eighths of a small vocabulary.")] = SHAPE.head_size,
    block_size: Annotated[int, typer.Option(help="Of left-to-right drafts, the known token included.")] = SHAPE.block_size,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-m", help="Of each answer.")] = 512,
    rollout_batch_size: Annotated[int, typer.Option(help="Answers that share a forward.")] = 8,
    iters: Annotated[int, typer.Option(help="Batches.")] = TRAINING.iters,
    batch_size: Annotated[int, typer.Option(help="Blocks a batch.")] = TRAINING.batch_size,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW, at its highest.")] = TRAINING.learning_rate,
    steps_per_report: int = TRAINING.steps_per_report,
    steps_per_eval: Annotated[int, typer.Option(help="A checkpoint is written as often.")] = TRAINING.steps_per_eval,
    seed: int = TRAINING.seed,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --draft-path.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON record as the last line.")] = False,
) -> None:
    """Let the model answer prompts, log what it does, and train a drafter on it."""
    options = DraftTrainingOptions(iters=iters, batch_size=batch_size, learning_rate=learning_rate, seed=seed,
                                   steps_per_report=steps_per_report, steps_per_eval=steps_per_eval)
    shape = DraftShape(num_layers, _layers(taps), intermediate_size, head_size, block_size)
    draft_path = expand_path(draft_path)
    check_target(draft_path, resume)
    asked = read_prompts(expand_path(data))
    network, tokenizer = load(model, revision=revision, adapter_path=adapter_path)
    first = load_drafter(draft_model, network, tokenizer=tokenizer) if draft_model else None
    if first and shape != DraftShape():
        raise UserError("--draft-model has its shape already; leave --num-layers, --taps, --intermediate-size, --head-size and "
                        "--block-size out.")
    target = {"name": nano.VERSION if model == nano.NAME else model, "fingerprint": model_fingerprint(network),
              "tokenizer": tokenizer_fingerprint(tokenizer)}
    run = DraftRun(network, target, [chat_ids(tokenizer, messages) for messages in asked], draft_path, shape, options, max_tokens,
                   rollout_batch_size, resume, first, expand_path(draft_model) / LOG if draft_model else None)
    errors.print(f"a pass of the drafter takes {share(run.config, network.config):.1%} of a denoising step's multiply-adds\n"
                 f"{run.plan().told()}", markup=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
            rolling = bar.add_task("answering", total=len(asked))
            learn, valid = run.log(lambda done, _: bar.update(rolling, completed=done))
            bar.console.print(f"{len(learn):,} canvases to train on, {len(valid):,} to validate on")
            training = bar.add_task("training", total=iters)
            reports: list[DraftReport] = []

            def tell(report: DraftReport) -> None:
                reports.append(report)
                bar.update(training, completed=report.iteration)
                bar.console.print(_line(report))

            run.train(learn, valid, tell)
    except KeyboardInterrupt:
        errors.print("interrupted; --resume goes on from the last shard or checkpoint")
        raise typer.Exit(130) from None
    if as_json:
        print(json.dumps({"draft_path": str(draft_path), "share": share(run.config, network.config),
                          "reports": [asdict(report) for report in reports]}))


@app.command()
def evaluate(
    draft_model: Annotated[str, typer.Option(help="The drafter: a folder or a Hub id.")] = nano.DRAFTER,
    model: Annotated[str, typer.Option(help=f"'{nano.NAME}' (built in), a folder, or a Hub id; quantised ones too.")] = nano.NAME,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the Hub repository.")] = None,
    adapter_path: Annotated[str | None, typer.Option(help="Folder of an adapter that `lora` trained.")] = None,
    tasks: Annotated[str, typer.Option(help="Suites or tasks, as for evaluate.")] = nano.NAME,
    data: Annotated[Path | None, typer.Option(help="A jsonl file of questions of your own in place of --tasks.")] = None,
    draft_rules: Annotated[str | None, typer.Option(help="How canvases are drafted: gate=0.9,passes=2,refine=on,judge=off and the "
                                                    "like.")] = None,
    also: Annotated[list[str] | None, typer.Option(help="Another drafter to ask beside it; may be given again.")] = None,
    parts: Annotated[str, typer.Option(help="What to measure beside reference and drafter: the drafter under other rules, what it "
                                       "must be better than, drafts that are wrong on purpose, left to right, the oracle "
                                       "curve.")] = ",".join(KINDS),
    limit: Annotated[int, typer.Option(help="Questions a task, at most.")] = 20,
    num_seeds: Annotated[int, typer.Option(help="How many seeds, from 0 on; at least 2.")] = 5,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-m", help="Of each answer.")] = 256,
    output_dir: Annotated[Path | None, typer.Option(help="Write drafting.json, and drafting.png if matplotlib is there.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON record as the last line.")] = False,
) -> None:
    """What drafted canvases cost and lose beside the reference, a looser stop, and drafts that are wrong on purpose."""
    asked = tasks_of_file(data) if data else tasks_named(tasks)
    if output_dir is not None:
        output_dir = expand_path(output_dir)
        check_folder(output_dir)
    network, tokenizer = load(model, revision=revision, adapter_path=adapter_path)
    drafter = load_drafter(draft_model, network, tokenizer=tokenizer)
    others = {name: load_drafter(name, network, tokenizer=tokenizer) for name in also or ()}
    rules = DraftRules.parse(draft_rules or "")
    with errors.status("") if errors.is_terminal else contextlib.nullcontext() as status:
        record = evaluate_drafter(network, tokenizer, drafter, asked, limit, range(num_seeds), max_tokens, rules,
                                  filter(None, parts.split(",")), others,
                                  progress=lambda text: status.update(text) if status else None)
    record |= {"model": nano.VERSION if model == nano.NAME else model, "draft_model": draft_model,
               "machine": describe(network.dtype)}
    print(json.dumps(record) if as_json else table(record), flush=True)
    if output_dir is not None:
        make_folder(output_dir)
        write_json(output_dir / "drafting.json", record, indent=1)
        if "oracle" in record:
            with contextlib.suppress(ImportError):  # matplotlib is not needed
                plot(record, output_dir / "drafting.png")


def _layers(taps: str | None) -> tuple[int, ...] | None:
    try:
        return None if taps is None else tuple(int(part) for part in taps.split(","))
    except ValueError:
        raise UserError(f"--taps must be layer numbers with commas between them, got {taps!r}.") from None


def _line(report: DraftReport) -> str:
    return (f"{report.iteration:6} {'valid' if report.valid else 'train'}: loss {report.loss:.4f}, right: canvas "
            f"{report.canvas_right:.1%}, block {report.block_right:.1%}")
