"""``mlx-diffgemma infill`` and ``edit``: a thin layer over :mod:`mlx_diffgemma.infill`."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mlx_diffgemma import nano
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.flags import (
    Adapter,
    Choices,
    Dtype,
    Json,
    Model,
    Preset,
    Regex,
    Revision,
    Sampler,
    Schema,
    Seed,
    Steps,
    Temperature,
    Threshold,
    constraints_of,
)
from mlx_diffgemma.generate import load
from mlx_diffgemma.infill import LENGTHS, Hole, Infilled, edit, infill, read_length, split_holes
from mlx_diffgemma.options import GenerationOptions

errors = Console(stderr=True, highlight=False, soft_wrap=True)
OPTIONS = ("seed", "max_denoising_steps", "preset", "diffusion_sampler", "threshold")
EDIT = re.compile(r"<\|edit\|>(.*?)<\|/edit\|>", re.DOTALL)
InPlace = Annotated[bool, typer.Option("--in-place", help="Write the result into FILE.")]
BatchSize = Annotated[int, typer.Option(help="Lengths that are tried side by side.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Print what was tried, and figures, on standard error.")]


def infill_command(
    file: Annotated[str | None, typer.Argument(help="A text with holes, each marked <|hole|>, <|hole:5|> or <|hole:2-8|> with its "
                                               "length in tokens; '-' reads standard input.", show_default=False)] = None,
    prefix: Annotated[str | None, typer.Option(help="In place of FILE: the text before the hole.")] = None,
    suffix: Annotated[str | None, typer.Option(help="The text behind it.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="A message of the user to which the text is the answer. "
                                               "Default: the text stands alone.")] = None,
    length: Annotated[str | None, typer.Option(help="Tokens of a hole whose marker says nothing: 5, or 2-8 of which the best "
                                               f"length is taken. Default: {LENGTHS[0]}-{LENGTHS[1]}.")] = None,
    json_schema: Schema = None,
    regex: Regex = None,
    choices: Choices = None,
    in_place: InPlace = False,
    model: Model = nano.NAME,
    revision: Revision = None,
    adapter_path: Adapter = None,
    dtype: Dtype = None,
    seed: Seed = None,
    temp: Temperature = None,
    max_denoising_steps: Steps = None,
    preset: Preset = None,
    diffusion_sampler: Sampler = None,
    threshold: Threshold = None,
    batch_size: BatchSize = 8,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Fill holes in a text by what stands on both sides of them; the rest comes back byte for byte."""
    options = _options(locals())
    if file is None and prefix is None and suffix is None:
        raise UserError("There is no text; give --prefix and --suffix, or a file with holes.")
    if file is not None and (prefix is not None or suffix is not None):
        raise UserError("A file has its holes marked; leave --prefix and --suffix out.")
    if in_place and file in (None, "-"):
        raise UserError("--in-place needs a FILE to write to; leave it out.")
    hole = Hole(read_length(length) if length else None, **constraints_of(json_schema, regex, choices))
    text: str | tuple[str, str] = (prefix or "", suffix or "") if file is None else _read(file)
    if isinstance(text, str) and not split_holes(text)[1]:
        raise UserError(f"{file} has no hole; mark each with <|hole|>.")
    with _status(f"loading {model}"):
        network, tokenizer = load(model, revision=revision, dtype=dtype, adapter_path=adapter_path)
    found = infill(network, tokenizer, text, prompt, hole=hole, batch_size=batch_size, **options)
    _write(found, file, in_place, as_json, verbose)


def edit_command(
    file: Annotated[str, typer.Argument(help="A text in which the span is marked, <|edit|>like this<|/edit|>, or named by --lines; "
                                        "'-' reads standard input.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to do. The model is shown the whole text with it.")],
    lines: Annotated[str | None, typer.Option(help="The lines that are written anew, 3-5 or 3, in place of marks.")] = None,
    length: Annotated[str | None, typer.Option(help="Tokens of what comes in its place: 5, or 2-8 of which the best length is "
                                               "taken. Default: about as many, a quarter less or more.")] = None,
    json_schema: Schema = None,
    regex: Regex = None,
    choices: Choices = None,
    in_place: InPlace = False,
    model: Model = nano.NAME,
    revision: Revision = None,
    adapter_path: Adapter = None,
    dtype: Dtype = None,
    seed: Seed = None,
    temp: Temperature = None,
    max_denoising_steps: Steps = None,
    preset: Preset = None,
    diffusion_sampler: Sampler = None,
    threshold: Threshold = None,
    batch_size: BatchSize = 8,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Write one span of a text anew; the rest comes back byte for byte."""
    options = _options(locals())
    if in_place and file == "-":
        raise UserError("--in-place needs a FILE to write to; leave it out.")
    hole = Hole(read_length(length) if length else None, **constraints_of(json_schema, regex, choices))
    text, span = _marked(_read(file)) if lines is None else _lines(_read(file), lines)
    with _status(f"loading {model}"):
        network, tokenizer = load(model, revision=revision, dtype=dtype, adapter_path=adapter_path)
    found = edit(network, tokenizer, text, span, prompt, hole=hole, batch_size=batch_size, **options)
    _write(found, file, in_place, as_json, verbose)


def _marked(text: str) -> tuple[str, tuple[int, int]]:
    """(the text without marks, the span they were about).  Errors: UserError unless there is one such span."""
    found = list(EDIT.finditer(text))
    if len(found) != 1:
        raise UserError(f"One span must be marked, <|edit|>like this<|/edit|>, and {len(found)} are; or name its --lines.")
    inside, start = found[0][1], found[0].start()
    return text[:start] + inside + text[found[0].end() :], (start, start + len(inside))


def _lines(text: str, lines: str) -> tuple[str, tuple[int, int]]:
    """(the text, from the first of the lines up to the end of the last, without what ends that).  Errors: UserError."""
    found = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", lines)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    own = re.split(r"(\r\n|\n|\r)", text)[::2]
    ends = [*re.findall(r"\r\n|\n|\r", text), ""]
    if not 1 <= first <= last <= len(own):
        raise UserError(f"--lines {lines} are no lines of a text of {len(own)}; give for example 3-5.")
    starts = [0]
    for line, end in zip(own, ends, strict=True):
        starts.append(starts[-1] + len(line) + len(end))
    return text, (starts[first - 1], starts[last - 1] + len(own[last - 1]))


def _read(file: str) -> str:
    """Errors: UserError for a file that cannot be read, or is not UTF-8."""
    try:
        content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        return content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"{file} cannot be read ({reason}).") from None


def _write(found: Infilled, file: str | None, in_place: bool, as_json: bool, verbose: bool) -> None:
    if in_place and file:
        try:
            Path(file).write_bytes(found.text.encode("utf-8"))
        except OSError as error:
            raise UserError(f"{file} cannot be written ({error.strerror}).") from None
    else:
        end = "\n" if file is None or (as_json and not found.text.endswith("\n")) else ""
        sys.stdout.flush()
        sys.stdout.buffer.write((found.text + end).encode("utf-8"))
        sys.stdout.buffer.flush()
    if found.unseen:
        errors.print(f"The last {found.unseen} tokens stood behind the canvas: no hole knew of them.", style="dim")
    if verbose:
        for fill in found.fills:
            errors.print(f"hole {fill.hole + 1}: {fill.text!r}, {len(fill.tokens)} tokens, {fill.steps} steps", style="dim",
                         markup=False)
            for one in sorted(fill.candidates, key=lambda one: -one.score):
                errors.print(f"  {one.length:3} tokens {one.score:8.3f}  {one.text!r}", style="dim", markup=False)
        errors.print(f"seed {found.seed}", style="dim")
    if as_json:
        print(json.dumps(asdict(found), ensure_ascii=False), flush=True)


def _options(given: dict[str, Any]) -> dict[str, Any]:
    """Those of the canvases; what is wrong with them is refused here, before anything is loaded."""
    options = {name: given[name] for name in OPTIONS} | {"temperature": given["temp"]}
    GenerationOptions.from_keywords(options)
    return options


def _status(text: str) -> Any:
    return errors.status(text) if errors.is_terminal else contextlib.nullcontext()
