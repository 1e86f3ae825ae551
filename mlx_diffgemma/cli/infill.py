"""``mlx-diffgemma infill`` and ``edit``: a thin layer over :mod:`mlx_diffgemma.generation.infill`."""

from __future__ import annotations

import json
import re
import sys
from codecs import BOM_UTF8
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from mlx_diffgemma.cli.options import CANVAS_TEMPERATURE, ModelOptions
from mlx_diffgemma.cli.output import errors, spinner
from mlx_diffgemma.cli.signature import command, generation, part_option
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.files import check_file, decode, expand_path, read_bytes, write_bytes
from mlx_diffgemma.generation.holes import LENGTHS, Hole, Infilled, read_length, split_holes
from mlx_diffgemma.generation.infill import edit, infill
from mlx_diffgemma.generation.load import load
from mlx_diffgemma.generation.options import CONSTRAINTS

OPTIONS = generation(
    "seed",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "max_denoising_steps",
    "preset",
    "diffusion_sampler",
    "threshold",
    help={"temperature": CANVAS_TEMPERATURE},
)
HOLE = generation(*CONSTRAINTS, check=False)  # a hole checks them itself
EDIT = re.compile(r"<\|edit\|>(.*?)<\|/edit\|>", re.DOTALL)
BatchSize = Annotated[int, typer.Option(help="Lengths that are tried side by side.")]


@dataclass(frozen=True)
class ResultOptions:
    """The options that say where the result goes and what else is printed."""

    PANEL = "Output"

    in_place: bool = part_option(
        False, "--in-place", help="Write the result into FILE, unless it did not converge."
    )
    force: bool = part_option(
        False, "--force", help="With --in-place: write it even where it did not converge."
    )
    as_json: bool = part_option(False, "--json", help="Print one JSON record as the last line.")
    verbose: bool = part_option(
        False, "--verbose", help="Print what was tried, and figures, on standard error."
    )

    def check(self, file: str | None) -> None:
        """Raise UserError if there is no file to write to."""
        if self.in_place and file in (None, "-"):
            raise UserError("--in-place needs a FILE to write to; leave it out.")


@command
def infill_command(
    *,
    file: Annotated[
        str | None,
        typer.Argument(
            help="A text with holes, each marked <|hole|>, <|hole:5|> or <|hole:2-8|> with its "
            "length in tokens; '-' reads standard input.",
            show_default=False,
        ),
    ] = None,
    prefix: Annotated[
        str | None, typer.Option(help="In place of FILE: the text before the hole.")
    ] = None,
    suffix: Annotated[
        str | None, typer.Option(help="In place of FILE: the text after the hole.")
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            "-p",
            help="A message of the user to which the text is the answer. "
            "Default: the text stands alone.",
        ),
    ] = None,
    length: Annotated[
        str | None,
        typer.Option(
            help="Tokens of a hole whose marker does not say: 5, or 2-8 of which the best "
            f"length is taken. Default: {LENGTHS[0]}-{LENGTHS[1]}."
        ),
    ] = None,
    constraints: Annotated[dict[str, Any], HOLE],
    source: ModelOptions,
    options: Annotated[dict[str, Any], OPTIONS],
    batch_size: BatchSize = 8,
    result: ResultOptions,
) -> None:
    """Fill holes in a text.

    The model sees the text on both sides; everything else comes back byte for byte.
    """
    if file is None and prefix is None and suffix is None:
        raise UserError("There is no text; give --prefix and --suffix, or a file with holes.")
    if file is not None and (prefix is not None or suffix is not None):
        raise UserError("A file has its holes marked; leave --prefix and --suffix out.")
    result.check(file)
    hole = Hole(read_length(length) if length else None, **constraints)
    original = None if file is None else _read(file, result.in_place)
    text: str | tuple[str, str] = original.text if original else (prefix or "", suffix or "")
    if isinstance(text, str) and not split_holes(text)[1]:
        raise UserError(f"{file} has no hole; mark each with <|hole|>.")
    with spinner(f"loading {source.model}"):
        network, tokenizer = load(source.model, **source.loading)
    with spinner("filling the holes"):
        filled = infill(
            network, tokenizer, text, prompt, hole=hole, batch_size=batch_size, **options
        )
    _write(filled, original, result)


@command
def edit_command(
    *,
    file: Annotated[
        str,
        typer.Argument(
            help="A text in which the span is marked, <|edit|>like this<|/edit|>, or named by --lines; "
            "'-' reads standard input."
        ),
    ],
    prompt: Annotated[
        str,
        typer.Option(
            "--prompt",
            "-p",
            help="What to do with the span. The model is shown the whole text with it.",
        ),
    ],
    lines: Annotated[
        str | None,
        typer.Option(help="The lines to rewrite, 3-5 or 3, in place of marks."),
    ] = None,
    length: Annotated[
        str | None,
        typer.Option(
            help="Tokens of what replaces the span: 5, or 2-8 of which the best length is taken. "
            "Default: about as many, a quarter less or more."
        ),
    ] = None,
    constraints: Annotated[dict[str, Any], HOLE],
    source: ModelOptions,
    options: Annotated[dict[str, Any], OPTIONS],
    batch_size: BatchSize = 8,
    result: ResultOptions,
) -> None:
    """Rewrite one span of a text.

    Everything else comes back byte for byte.
    """
    result.check(file)
    hole = Hole(read_length(length) if length else None, **constraints)
    original = _read(file, result.in_place)
    if lines is None:
        text, span = _marked(original.text)
    else:
        text, span = _lines(original.text, lines)
    with spinner(f"loading {source.model}"):
        network, tokenizer = load(source.model, **source.loading)
    with spinner("rewriting the span"):
        edited = edit(
            network, tokenizer, text, span, prompt, hole=hole, batch_size=batch_size, **options
        )
    _write(edited, original, result)


def _marked(text: str) -> tuple[str, tuple[int, int]]:
    """Read the marked span of a text.

    Returns:
        (the text without marks, the span).

    Raises:
        UserError: there is not exactly one marked span.
    """
    found = list(EDIT.finditer(text))
    if len(found) != 1:
        raise UserError(
            f"One span must be marked, <|edit|>like this<|/edit|>, and {len(found)} are; or name its --lines."
        )
    inside, start = found[0][1], found[0].start()
    return text[:start] + inside + text[found[0].end() :], (start, start + len(inside))


def _lines(text: str, lines: str) -> tuple[str, tuple[int, int]]:
    """Find the span of ``lines``, for example "3-5".

    Returns:
        (the text, the span from the start of the first line to the end of the last one, without its
        line ending).

    Raises:
        UserError: the text has no such lines.
    """
    found = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", lines)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    own = re.split(r"(\r\n|\n|\r)", text)[::2]
    ends = [*re.findall(r"\r\n|\n|\r", text), ""]
    if not 1 <= first <= last <= len(own):
        raise UserError(
            f"--lines {lines} are no lines of a text of {len(own)}; give for example 3-5."
        )
    starts = [0]
    for line, end in zip(own, ends, strict=True):
        starts.append(starts[-1] + len(line) + len(end))
    return text, (starts[first - 1], starts[last - 1] + len(own[last - 1]))


@dataclass(frozen=True)
class _Source:
    """A text as it was read.

    ``content`` are the bytes of ``path``, or of standard input if that is None.  They may begin
    with a byte order ``mark``.
    """

    path: Path | None
    content: bytes
    text: str
    mark: bytes


def _read(file: str, in_place: bool) -> _Source:
    """Read a text.

    Raises:
        UserError: the file cannot be read, is not UTF-8, or cannot be written ``in_place``.
    """
    path = None if file == "-" else expand_path(file)
    if path and in_place:
        check_file(path)
    content = read_bytes(path) if path else sys.stdin.buffer.read()
    mark = BOM_UTF8 if content.startswith(BOM_UTF8) else b""
    return _Source(path, content, decode(content, file if path else "Standard input"), mark)


def _write(found: Infilled, source: _Source | None, result: ResultOptions) -> None:
    """Write the text to the file, or to standard output.

    If the file cannot be written, the text goes to standard output before the error is raised.

    Args:
        found: the filled text.
        source: the text as it was read.
        result: where the result goes.

    Raises:
        UserError: the file cannot be written.
    """
    in_place, as_json = result.in_place, result.as_json
    failure = _write_in_place(found, source, result.force) if in_place and source else None
    if failure or not in_place:
        end = (
            "\n"
            if source is None or ((as_json or failure) and not found.text.endswith("\n"))
            else ""
        )
        sys.stdout.flush()
        sys.stdout.buffer.write(
            (source.mark if source else b"") + (found.text + end).encode("utf-8")
        )
        sys.stdout.buffer.flush()
    if found.unseen:
        errors.print(
            f"The last {found.unseen} tokens stood behind the canvas: no hole knew of them.",
            style="dim",
        )
    if result.verbose:
        _print_fills(found)
    if as_json:
        print(json.dumps(asdict(found), ensure_ascii=False), flush=True)
    if failure:
        raise failure


def _print_fills(found: Infilled) -> None:
    """Print the texts that were tried for each hole, the best first."""
    for fill in found.fills:
        errors.print(
            f"hole {fill.hole + 1}: {fill.text!r}, {len(fill.tokens)} tokens, {fill.steps} steps",
            style="dim",
            markup=False,
        )
        for candidate in sorted(fill.candidates, key=lambda tried: -tried.score):
            errors.print(
                f"  {candidate.length:3} tokens {candidate.score:8.3f}  {candidate.text!r}",
                style="dim",
                markup=False,
            )
    errors.print(f"seed {found.seed}", style="dim")


def _write_in_place(found: Infilled, source: _Source, force: bool) -> UserError | None:
    """Write the text to its file.  Returns the error if it was not written, None if it was.

    Args:
        found: the filled text.
        source: the text as it was read.
        force: write it even if a canvas did not converge.
    """
    assert source.path is not None
    unsure = sum(not fill.converged for fill in found.fills)
    if unsure and not force:
        return UserError(
            f"{source.path} stays as it is, because {unsure} of {len(found.fills)} spans did not converge; the new "
            "text was printed. Add --force to write it all the same."
        )
    try:
        write_bytes(source.path, source.mark + found.text.encode("utf-8"), expected=source.content)
    except UserError as error:
        return error
    return None
