"""``mlx-diffgemma draft``: a thin layer over :mod:`drafter.run`."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from drafter.evaluation import KINDS, EvaluationOptions, evaluate_drafter
from drafter.loading import load_drafter
from drafter.pairing import tokenizer_fingerprint
from drafter.report import plot, table
from drafter.rules import DraftRules
from drafter.run import LOG, DraftRun, DraftShape, check_target, read_prompts, share
from drafter.training import DraftReport, DraftTrainingOptions
from mlx_diffgemma import nano
from mlx_diffgemma.cli.command import Command
from mlx_diffgemma.cli.options import AdaptedOptions, Json
from mlx_diffgemma.cli.output import errors, spinner
from mlx_diffgemma.cli.progress import Bars
from mlx_diffgemma.cli.signature import command, part_option
from mlx_diffgemma.device import describe
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.evaluation.tasks import Task, tasks_named, tasks_of_file
from mlx_diffgemma.files import check_folder, expand_path, make_folder, write_json
from mlx_diffgemma.generation.load import load
from mlx_diffgemma.text.tokenizer import chat_ids
from mlx_diffgemma.tuning.adapters import model_fingerprint

app = typer.Typer(
    name="draft",
    help="Train a drafter and measure it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
SHAPE, TRAINING = DraftShape(), DraftTrainingOptions()


@dataclass(frozen=True)
class ShapeOptions:
    """The options of the drafter's network."""

    PANEL = "Shape"

    num_layers: int | None = part_option(
        SHAPE.num_layers,
        help="Layers of the drafter. Default: 5, 1 for a model of at most 12 layers.",
    )
    taps: str | None = part_option(
        None, help="Layers of the model that are read, as 1,6,11. Default: evenly spread."
    )
    intermediate_size: int | None = part_option(
        SHAPE.intermediate_size,
        help="Width of the drafter's MLPs. Default: chosen to fit the model.",
    )
    head_size: int | None = part_option(
        SHAPE.head_size,
        help="How many tokens can be drafted, the most frequent ones. Default: 32,768, "
        "or three eighths of a small vocabulary.",
    )
    block_size: int = part_option(
        SHAPE.block_size, help="Tokens of a draft left to right, the known token included."
    )

    @property
    def shape(self) -> DraftShape:
        return DraftShape(
            self.num_layers,
            _layers(self.taps),
            self.intermediate_size,
            self.head_size,
            self.block_size,
        )


@dataclass(frozen=True)
class RolloutOptions:
    """The options of the answers that the drafter learns from."""

    PANEL = "Answers"

    max_tokens: int = part_option(
        512, "--max-tokens", "-m", help="Cut each answer after this many tokens."
    )
    rollout_batch_size: int = part_option(8, help="Answers that share a forward.")


@dataclass(frozen=True)
class TrainingFlags:
    """The options of the drafter's training."""

    PANEL = "Training"

    iters: int = part_option(TRAINING.iters, help="Number of batches to train on.")
    batch_size: int = part_option(TRAINING.batch_size, help="Blocks a batch.")
    learning_rate: float = part_option(
        TRAINING.learning_rate, help="Learning rate of AdamW, at its highest."
    )
    steps_per_report: int = part_option(
        TRAINING.steps_per_report, help="Report the losses every this many batches."
    )
    steps_per_eval: int = part_option(
        TRAINING.steps_per_eval,
        help="Validate, and write a checkpoint, every this many batches.",
    )
    seed: int = part_option(TRAINING.seed, help="Seed of answers and training.")

    @property
    def options(self) -> DraftTrainingOptions:
        return DraftTrainingOptions(**vars(self))


@app.command(cls=Command)
@command
def train(
    *,
    data: Annotated[
        Path,
        typer.Option(
            help="A jsonl file with `prompt` or `messages` in each line; the model answers them."
        ),
    ],
    source: AdaptedOptions,
    draft_model: Annotated[
        str | None,
        typer.Option(
            help="Continue from this drafter: the answers begin from its guesses, and what it "
            "was trained on stays in, if it is in its folder."
        ),
    ] = None,
    draft_path: Annotated[
        Path,
        typer.Option(help="The folder to write: a new or empty one, or with --resume a run's."),
    ] = Path("trained-drafter"),
    size: ShapeOptions,
    rollout: RolloutOptions,
    training: TrainingFlags,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --draft-path.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Let the model answer prompts, log what it does, and train a drafter on it."""
    options = training.options
    shape = size.shape
    draft_path = expand_path(draft_path)
    check_target(draft_path, resume)
    asked = read_prompts(expand_path(data))
    network, tokenizer = load(
        source.model, revision=source.revision, adapter_path=source.adapter_path
    )
    first = load_drafter(draft_model, network, tokenizer=tokenizer) if draft_model else None
    if first and shape != DraftShape():
        raise UserError(
            "--draft-model has its shape already; leave --num-layers, --taps, --intermediate-size, --head-size and "
            "--block-size out."
        )
    target = {
        "name": _version(source.model),
        "fingerprint": model_fingerprint(network),
        "tokenizer": tokenizer_fingerprint(tokenizer),
    }
    run = DraftRun(
        network,
        target,
        [chat_ids(tokenizer, messages) for messages in asked],
        draft_path,
        shape,
        options,
        rollout.max_tokens,
        rollout.rollout_batch_size,
        resume,
        first,
        expand_path(draft_model) / LOG if draft_model else None,
    )
    cost = share(run.config, network.config)
    errors.print(
        f"a pass of the drafter takes {share(run.config, network.config):.1%} of a denoising step's multiply-adds\n"
        f"{run.plan().describe()}",
        markup=False,
    )
    reports = _train(run, options.iters)
    if as_json:
        reported = [asdict(report) for report in reports]
        print(json.dumps({"draft_path": str(draft_path), "share": cost, "reports": reported}))


def _version(model: str) -> str:
    return nano.VERSION if model == nano.NAME else model


def _train(run: DraftRun, iters: int) -> list[DraftReport]:
    """Let the model answer, and train the drafter on it.  Returns the reports of the training."""
    reports: list[DraftReport] = []
    try:
        with Bars() as bars:
            learn, valid = run.log(lambda done, total: bars.update("answering", done, total))
            bars.print(f"{len(learn):,} canvases to train on, {len(valid):,} to validate on")

            def tell(report: DraftReport) -> None:
                reports.append(report)
                bars.update("training", report.iteration, iters)
                bars.print(_line(report))

            run.train(learn, valid, tell)
    except KeyboardInterrupt:
        errors.print("interrupted; --resume continues from the last shard or checkpoint")
        raise typer.Exit(130) from None
    return reports


@dataclass(frozen=True)
class MeasureOptions:
    """The options that say what is measured."""

    PANEL = "Questions"

    tasks: str = part_option(nano.NAME, help="Suites or tasks, comma-separated: nano, sudoku, ….")
    data: Path | None = part_option(
        None, help="A jsonl file of questions of your own in place of --tasks."
    )
    parts: str = part_option(
        ",".join(KINDS),
        help="What to measure beside reference and drafter: the drafter under other rules, what it "
        "must be better than, drafts that are wrong on purpose, left to right, the oracle "
        "curve.",
    )
    limit: int = part_option(20, help="Questions a task, at most.")
    num_seeds: int = part_option(5, max=100_000, help="How many seeds, from 0 on; at least 2.")
    max_tokens: int = part_option(
        256, "--max-tokens", "-m", help="Cut each answer after this many tokens."
    )

    def options(self, rules: DraftRules) -> EvaluationOptions:
        """The options of ``evaluate_drafter``."""
        kinds = tuple(filter(None, self.parts.split(",")))
        return EvaluationOptions(self.limit, range(self.num_seeds), self.max_tokens, rules, kinds)

    @property
    def asked(self) -> list[Task]:
        return list(tasks_of_file(self.data) if self.data else tasks_named(self.tasks))


@app.command(cls=Command)
@command
def evaluate(
    *,
    draft_model: Annotated[
        str, typer.Option(help="The drafter: a folder or a Hub id.")
    ] = nano.DRAFTER,
    source: AdaptedOptions,
    measured: MeasureOptions,
    draft_rules: Annotated[
        str | None,
        typer.Option(
            help="How canvases are drafted: gate=0.9,passes=2,refine=on,judge=off and the like."
        ),
    ] = None,
    also: Annotated[
        list[str] | None, typer.Option(help="Another drafter to ask beside it; may be given again.")
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(help="Write drafting.json, and drafting.png if matplotlib is there."),
    ] = None,
    as_json: Json = False,
) -> None:
    """What drafted canvases cost and lose beside the reference, a looser stop, and drafts that are
    wrong on purpose.
    """
    asked = measured.asked
    if output_dir is not None:
        output_dir = expand_path(output_dir)
        check_folder(output_dir)
    network, tokenizer = load(
        source.model, revision=source.revision, adapter_path=source.adapter_path
    )
    drafter = load_drafter(draft_model, network, tokenizer=tokenizer)
    others = {name: load_drafter(name, network, tokenizer=tokenizer) for name in also or ()}
    rules = DraftRules.parse(draft_rules or "")
    with spinner("") as status:
        record: dict[str, Any] = evaluate_drafter(
            network,
            tokenizer,
            drafter,
            asked,
            measured.options(rules),
            others,
            progress=lambda text: status.update(text) if status else None,
        )
    record |= {
        "model": _version(source.model),
        "draft_model": draft_model,
        "machine": describe(network.dtype),
    }
    print(json.dumps(record) if as_json else table(record), flush=True)
    if output_dir is not None:
        make_folder(output_dir)
        write_json(output_dir / "drafting.json", record, indent=1)
        if "oracle" in record:
            with contextlib.suppress(
                ImportError
            ):  # the picture needs matplotlib, which is optional
                plot(record, output_dir / "drafting.png")


def _layers(taps: str | None) -> tuple[int, ...] | None:
    try:
        return None if taps is None else tuple(int(part) for part in taps.split(","))
    except ValueError:
        raise UserError(
            f"--taps must be layer numbers with commas between them, got {taps!r}."
        ) from None


def _line(report: DraftReport) -> str:
    return (
        f"{report.iteration:6} {'valid' if report.valid else 'train'}: loss {report.loss:.4f}, right: canvas "
        f"{report.canvas_right:.1%}, block {report.block_right:.1%}"
    )
