"""``mlx-diffgemma infill`` and ``edit``: a thin layer over :mod:`mlx_diffgemma.infill`."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from codecs import BOM_UTF8
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mlx_diffgemma import nano
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.files import check_file, decode, expand_path, read_bytes, write_bytes
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
InPlace = Annotated[bool, typer.Option("--in-place", help="Write the result into FILE, unless it did not converge.")]
Force = Annotated[bool, typer.Option("--force", help="With --in-place: write it even where it did not converge.")]
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
    force: Force = False,
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
    source = None if file is None else _read(file, in_place)
    text: str | tuple[str, str] = source.text if source else (prefix or "", suffix or "")
    if isinstance(text, str) and not split_holes(text)[1]:
        raise UserError(f"{file} has no hole; mark each with <|hole|>.")
    with _status(f"loading {model}"):
        network, tokenizer = load(model, revision=revision, dtype=dtype, adapter_path=adapter_path)
    found = infill(network, tokenizer, text, prompt, hole=hole, batch_size=batch_size, **options)
    _write(found, source, in_place, force, as_json, verbose)


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
    force: Force = False,
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
    source = _read(file, in_place)
    text, span = _marked(source.text) if lines is None else _lines(source.text, lines)
    with _status(f"loading {model}"):
        network, tokenizer = load(model, revision=revision, dtype=dtype, adapter_path=adapter_path)
    found = edit(network, tokenizer, text, span, prompt, hole=hole, batch_size=batch_size, **options)
    _write(found, source, in_place, force, as_json, verbose)


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


@dataclass(frozen=True)
class _Source:
    """A text as it was read: ``content`` are the bytes of ``path`` (None: standard input), which may begin with a ``mark``."""

    path: Path | None
    content: bytes
    text: str
    mark: bytes


def _read(file: str, in_place: bool) -> _Source:
    """Errors: UserError for a file that cannot be read, or not written ``in_place``, and for what is not UTF-8."""
    path = None if file == "-" else expand_path(file)
    if path and in_place:
        check_file(path)
    content = read_bytes(path) if path else sys.stdin.buffer.read()
    mark = BOM_UTF8 if content.startswith(BOM_UTF8) else b""
    return _Source(path, content, decode(content, file if path else "Standard input"), mark)


def _write(found: Infilled, source: _Source | None, in_place: bool, force: bool, as_json: bool, verbose: bool) -> None:
    """Into the file, or onto standard output, also where it cannot go into the file.  Errors: UserError for that."""
    failure = _write_in_place(found, source, force) if in_place and source else None
    if failure or not in_place:
        end = "\n" if source is None or ((as_json or failure) and not found.text.endswith("\n")) else ""
        sys.stdout.flush()
        sys.stdout.buffer.write((source.mark if source else b"") + (found.text + end).encode("utf-8"))
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
    if failure:
        raise failure


def _write_in_place(found: Infilled, source: _Source, force: bool) -> UserError | None:
    """What kept the text from being written; None for nothing."""
    assert source.path is not None
    unsure = sum(not fill.converged for fill in found.fills)
    if unsure and not force:
        return UserError(f"{source.path} stays as it is, because {unsure} of {len(found.fills)} spans did not converge; the new "
                         "text was printed. Add --force to write it all the same.")
    try:
        write_bytes(source.path, source.mark + found.text.encode("utf-8"), expected=source.content)
    except UserError as error:
        return error
    return None


def _options(given: dict[str, Any]) -> dict[str, Any]:
    """Those of the canvases; what is wrong with them is refused here, before anything is loaded."""
    options = {name: given[name] for name in OPTIONS} | {"temperature": given["temp"]}
    GenerationOptions.from_keywords(options)
    return options


def _status(text: str) -> Any:
    return errors.status(text) if errors.is_terminal else contextlib.nullcontext()
