"""`mlx-diffgemma evaluate`: score a model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Column, Table

from mlx_diffgemma import nano
from mlx_diffgemma.cli.options import CANVAS_TEMPERATURE, DraftOptions, Json, ModelOptions
from mlx_diffgemma.cli.output import new_table, output, print_table, spinner
from mlx_diffgemma.cli.progress import Bars
from mlx_diffgemma.cli.signature import command, generation, part_option
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.evaluation import run as evaluation
from mlx_diffgemma.evaluation.run import EvaluationReport, TaskResult
from mlx_diffgemma.evaluation.tasks import Task, tasks_named, tasks_of_file
from mlx_diffgemma.files import check_folder, expand_path, make_folder, write_json
from mlx_diffgemma.generation.load import load
from mlx_diffgemma.generation.option_groups import DENOISING, RULE, SAMPLING
from mlx_diffgemma.generation.options import PENALTIES, GenerationOptions

OPTIONS = generation(
    groups=(SAMPLING, DENOISING, RULE),
    without=("mode", "seed"),
    help={"temperature": f"{CANVAS_TEMPERATURE} Left to right (--mode ar) the default is 0."},
    check=False,
)
OutputDir = Annotated[Path | None, typer.Option(help="Write evaluate-MODE.json here.")]
BOTH_MODES = ("max_tokens", "temperature", "top_k", "top_p", "min_p", *PENALTIES)


@dataclass(frozen=True)
class QuestionOptions:
    """The options that say what is asked, and how often."""

    PANEL = "Questions"

    tasks: str | None = part_option(
        None, help="Suites or tasks, comma-separated: nano, pictures, sudoku, sudoku-6, …."
    )
    data: Path | None = part_option(
        None,
        help="A jsonl file of questions of your own: `prompt` or `messages`, with "
        "`completion`, `schema`, or `choices` and `answer`. See docs/evaluate.md.",
    )
    limit: int = part_option(500, help="Questions a task, at most.")
    seed: int = part_option(0, help="The first seed.")
    num_seeds: int = part_option(1, max=100_000, help="How many seeds, counting up from the first.")
    batch_size: int = part_option(16, help="Answers that share a forward.")
    mode: str = part_option("diffusion", help="'diffusion', 'ar', or 'both'.")

    @property
    def modes(self) -> tuple[str, ...]:
        return ("diffusion", "ar") if self.mode == "both" else (self.mode,)

    @property
    def seeds(self) -> range:
        return range(self.seed, self.seed + self.num_seeds)

    def read(self) -> list[Task]:
        """The tasks.

        Raises:
            UserError: there are none, or the mode does not fit them.
        """
        if self.tasks is None and self.data is None:
            raise UserError(
                "Nothing to ask; give --tasks nano for example, or --data with a jsonl file."
            )
        asked = [
            *(tasks_named(self.tasks) if self.tasks is not None else ()),
            *(tasks_of_file(self.data) if self.data else ()),
        ]
        if "ar" in self.modes and any(task.questions(1)[0].choices for task in asked):
            raise UserError(
                "Multiple choice is read off a canvas; leave it out, or take --mode diffusion."
            )
        return asked


@command
def evaluate(
    *,
    questions: QuestionOptions,
    source: ModelOptions,
    options: Annotated[dict[str, Any], OPTIONS],
    drafting: DraftOptions,
    output_dir: OutputDir = None,
    as_json: Json = False,
) -> None:
    """Score a model.

    The questions are built-in tasks held out from training, or your own.
    """
    asked = questions.read()
    per_mode = _options_per_mode(questions.modes, options)
    if output_dir is not None:
        output_dir = expand_path(output_dir)
        check_folder(output_dir)
    with spinner(f"loading {source.model}"):
        network, tokenizer = load(source.model, **source.loading)
        drafter = drafting.load(network, tokenizer, questions.mode)
    records: dict[str, dict[str, Any]] = {}
    for name, chosen in per_mode.items():
        with Bars() as bars:
            report = evaluation.evaluate(
                network,
                tokenizer,
                asked,
                questions.limit,
                questions.seeds,
                questions.batch_size,
                bars.update,
                drafter,
                **chosen,
            )
        record = report.record() | {
            "model": nano.VERSIONS.get(source.model, source.model),
            "draft_model": drafting.draft_model,
        }
        records[f"evaluate-{name}.json"] = record
        if as_json:
            print(json.dumps(record), flush=True)
        else:
            _print_report(report, f"{record['model']}, {name}")
    if output_dir is not None:  # after printing, so that a failed write loses no result
        make_folder(output_dir)
        for file, record in records.items():
            write_json(output_dir / file, record, indent=1)


def _options_per_mode(modes: Sequence[str], options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The options of each mode.

    Raises:
        UserError: an option is invalid.
    """
    per_mode = {mode: options | {"mode": mode} for mode in modes}
    if len(modes) > 1:  # rules of canvases apply only to the modes that have canvases
        per_mode["ar"] = {name: options[name] for name in BOTH_MODES} | {"mode": "ar"}
    for chosen in per_mode.values():
        GenerationOptions.from_keywords(chosen)
    return per_mode


def _print_report(report: EvaluationReport, title: str) -> None:
    output.print(title, markup=False)
    for table in _scores(report):
        print_table(table)
    output.print(f"mean of the exact tasks: {report.exact_mean:.1%}")


def _scores(report: EvaluationReport) -> Iterator[Table]:
    """A table with a row for each task, then one of the groups.

    Columns for which no task has a figure are left out.
    """
    figures: dict[str, Callable[[TaskResult], str]] = {
        "answers": lambda r: str(r.answers),
        "score": lambda r: f"{r.score:.1%}",
        "95 %": lambda r: f"{100 * r.low:.1f}-{r.high:.1%}",
        "partial": lambda r: _share(r.partial),
        "steps a canvas": lambda r: _or_dash(r.steps_per_canvas),
        "when right": lambda r: _or_dash(r.steps_when_right),
        "when wrong": lambda r: _or_dash(r.steps_when_wrong),
        "tokens a forward": lambda r: _or_dash(r.tokens_per_forward),
        "converged": lambda r: _share(r.converged),
        "drafted right": lambda r: _share(r.accepted),
    }
    shown = {
        name: cell for name, cell in figures.items() if any(cell(r) != "-" for r in report.results)
    }
    rows = [(escape(r.task), *(cell(r) for cell in shown.values())) for r in report.results]
    columns = (
        Column(name, min_width=max(map(len, cells)))
        for name, *cells in zip(("task", *shown), *rows, strict=True)
    )
    table = new_table(*columns)
    for row in rows:
        table.add_row(*row)
    yield table
    if any(r.groups for r in report.results):
        table = new_table("task", "group", "answers", "score")
        for r in report.results:
            for group in r.groups:
                table.add_row(
                    escape(r.task), escape(group.group), str(group.answers), f"{group.score:.1%}"
                )
        yield table


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
