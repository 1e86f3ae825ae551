"""Converts and quantises a checkpoint, tensor by tensor, in a fraction of its memory.

A :class:`~mlx_diffgemma.checkpoint.plan.Conversion` says what every tensor becomes.  It is made from
headers and config alone, so a dry run shows the plan that a conversion carries out.  Rows are read,
quantised and written a slice at a time below ``TARGET.partial``, which gets the target's name when
everything is written.  An interrupted conversion can be resumed and is never taken for a model.

    >>> convert("google/diffusiongemma-26B-A4B-it", "diffusiongemma-4bit", quantize=True)
"""

from __future__ import annotations

from pathlib import Path

from mlx_diffgemma import nano
from mlx_diffgemma.checkpoint import hub
from mlx_diffgemma.checkpoint.options import ConvertOptions
from mlx_diffgemma.checkpoint.outputs import Merger
from mlx_diffgemma.checkpoint.plan import plan
from mlx_diffgemma.checkpoint.writer import Destination, Progress, check_disk, check_target, write
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.files import expand_name
from mlx_diffgemma.safetensors import read_headers


def convert(
    hf_path: str,
    mlx_path: str | Path = "mlx_model",
    quantize: bool = False,
    q_group_size: int | None = None,
    q_bits: int | None = None,
    q_mode: str | None = None,
    dtype: str | None = None,
    upload_repo: str | None = None,
    revision: str | None = None,
    dequantize: bool = False,
    recipe: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Convert a checkpoint.

    Args:
        hf_path: The checkpoint: a folder, an id on the Hub, or "nano".
        mlx_path: The folder to write.
        quantize: Whether to quantise, by default by the recipe "4bit".
        q_group_size: The group size of the recipe's experts.
        q_bits: Their bits.
        q_mode: Their quantisation mode.
        dtype: The dtype of what is not quantised; None leaves it as stored.
        upload_repo: A repository on the Hub to upload the result to.
        revision: The branch, tag or commit of the source on the Hub.
        dequantize: Whether to undo the quantisation of the source.
        recipe: The recipe to quantise by; it implies ``quantize``.
        overwrite: Whether to replace an existing conversion.
        resume: Whether to continue one that was interrupted.
        progress: Called with the bytes read so far and in all.

    Returns:
        The folder that was written.

    Raises:
        UserError: The conversion is refused or fails.  At most the files that ``resume`` needs are
            left.
    """
    options = ConvertOptions(quantize, recipe, q_bits, q_group_size, q_mode, dtype, dequantize)
    destination = Destination.at(mlx_path, overwrite, resume, upload_repo)
    return run_conversion(hf_path, revision, options, destination, progress=progress)


def run_conversion(
    name: str,
    revision: str | None,
    options: ConvertOptions,
    destination: Destination,
    merger: Merger | None = None,
    progress: Progress | None = None,
) -> Path:
    """``convert``, with an adapter to merge or without.

    Args:
        name: The checkpoint: a folder, an id on the Hub, or "nano".
        revision: The branch, tag or commit of the source on the Hub.
        options: The precision of the result.
        destination: Where the result goes.
        merger: The adapter to merge, or None.
        progress: Called with the bytes read so far and in all.

    Returns:
        The folder that was written.

    Raises:
        UserError: As ``convert``.
    """
    name = name if name == nano.NAME else expand_name(name)
    check_target(destination)
    # Everything that can be refused is refused from headers alone, before gigabytes are fetched or
    # an upload is begun.
    conversion = plan(name, *hub.headers(name, revision), options, merger)
    check_disk(conversion, destination.folder)
    if destination.upload_repo:
        hub.check_upload(destination.upload_repo)
    folder = hub.resolve(name, revision)
    _check_apart(destination.folder, folder.resolve())
    conversion = plan(name, folder, read_headers(folder), options, merger)
    conversion.source.check_copies()
    if merger:
        merger.check(conversion.source, conversion.config.fused)
    write(conversion, destination, progress)
    if destination.upload_repo:
        hub.upload(destination.folder, destination.upload_repo)
    return destination.folder


def _check_apart(target: Path, source: Path) -> None:
    """Check that neither folder lies in the other.

    Raises:
        UserError: One does, or both are the same folder.
    """
    holds_target = any(_is_same(folder, source) for folder in (target, *target.parents))
    if holds_target or any(_is_same(folder, target) for folder in source.parents):
        raise UserError(
            f"{target} and the checkpoint to convert lie in each other; "
            "choose another folder to write."
        )


def _is_same(first: Path, second: Path) -> bool:
    """Whether both paths name one folder.

    File systems may not distinguish upper from lower case, or two encodings of a letter.
    """
    try:
        return first.samefile(second)
    except OSError:  # one of them does not exist
        return first == second
