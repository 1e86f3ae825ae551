"""Carries out a conversion: tensors are read, quantised and written a slice at a time.

The result grows in ``TARGET.partial`` and gets the target's name when it is complete.  An
interrupted conversion can be resumed and is never taken for a model.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_diffgemma.checkpoint.layouts import SLICE
from mlx_diffgemma.checkpoint.model_card import model_card
from mlx_diffgemma.checkpoint.outputs import Output
from mlx_diffgemma.checkpoint.plan import Conversion
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.files import (
    WriteError,
    check_folder,
    expand_path,
    list_files,
    read_json,
    read_text,
    write_json,
    write_text,
)
from mlx_diffgemma.model.config import MARK, MODEL_TYPE
from mlx_diffgemma.safetensors import (
    INDEX,
    SafetensorsWriter,
)

# A partial folder holds the unfinished result and a journal.  The journal starts with the plan's
# fingerprint, and has a line for each finished output.
JOURNAL = "conversion.jsonl"
RESULT = "result"
COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "NOTICE*")
WRITTEN = {"config.json", "generation_config.json", INDEX, "README.md"}
# The key in the index's metadata that lists the copied files, by which --overwrite recognises them.
LIST = "files"
HUB = {".gitattributes", ".cache"}  # what the Hub's client puts next to a checkpoint
# The files that conversions without such a list may have copied.
OLDER = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "processor_config.json",
    "preprocessor_config.json",
    "LICENSE",
    "NOTICE",
)
DISK_MARGIN = 50_000_000  # bytes for the small files
Progress = Callable[[int, int], None]  # source bytes read so far, and in all


@dataclass(frozen=True)
class Destination:
    """Where a conversion writes.

    Args:
        folder: The folder, resolved.
        overwrite: Whether to replace an existing conversion.
        resume: Whether to continue one that was interrupted.
        upload_repo: The repository on the Hub that the result will be uploaded to, or None.
    """

    folder: Path
    overwrite: bool = False
    resume: bool = False
    upload_repo: str | None = None

    @classmethod
    def at(
        cls, path: str | Path, overwrite: bool, resume: bool, upload_repo: str | None
    ) -> Destination:
        """The destination at a path as a user types it."""
        return cls(expand_path(path).resolve(), overwrite, resume, upload_repo)

    @property
    def partial(self) -> Path:
        """The folder in which the result grows."""
        return partial_folder(self.folder)


def check_target(destination: Destination) -> None:
    """Check that the destination may and can be written.

    Raises:
        UserError: It may not, or cannot.
    """
    target = destination.folder
    partial = destination.partial
    try:
        if target.exists():
            if not destination.overwrite:
                raise UserError(
                    f"{target} exists already; choose another folder, "
                    "or add --overwrite to replace it."
                )
            if foreign := _foreign(target):
                raise UserError(
                    f"{target} holds {foreign}, which this command did not write, and is not "
                    "overwritten; move that, or choose another folder."
                )
        if partial.exists():
            if not _is_partial(partial):
                raise UserError(
                    f"{partial} is in the way and is not ours; move it, or choose another folder."
                )
            if not (destination.resume or destination.overwrite):
                raise UserError(
                    f"An interrupted conversion lies in {partial}; add --resume to continue it, "
                    "or --overwrite to start again."
                )
    except OSError as error:
        raise UserError(
            f"{target} cannot be written ({error.strerror}); choose another folder."
        ) from None
    try:
        check_folder(partial)
    except WriteError as error:
        reason = os.strerror(error.errno or 0)
        raise UserError(f"{target} cannot be written ({reason}); choose another folder.") from None


def _is_partial(folder: Path) -> bool:
    """Whether an interrupted conversion left this folder.

    Such a folder has a journal and a part of the result, or nothing yet.
    """
    if not folder.is_dir():
        return False
    # A process that was killed while it wrote the journal leaves an unfinished file.
    names = {path.name for path in folder.iterdir() if not path.name.startswith(f".{JOURNAL}.")}
    begun = JOURNAL in names or not (RESULT in names and any((folder / RESULT).iterdir()))
    return begun and names <= {JOURNAL, f"{JOURNAL}.new", RESULT}


def _foreign(folder: Path) -> str | None:
    """The first name in ``folder`` that no conversion wrote, by the folder's own list of files.

    None where there is no such name.
    """
    if not folder.is_dir():
        return "a file in its place"
    names = sorted(path.name for path in folder.iterdir())
    if not names:
        return None
    try:
        config = read_json(folder / "config.json")
        index = read_json(folder / INDEX)
    except UserError:
        return names[0]
    if config.get("model_type") != MODEL_TYPE or not isinstance(config.get(MARK), dict):
        return "a checkpoint"
    listed = (index.get("metadata") or {}).get(LIST, OLDER)
    ours = {*WRITTEN, *HUB, *listed, *(index.get("weight_map") or {}).values()}
    return next((name for name in names if name not in ours), None)


def write(
    conversion: Conversion, destination: Destination, progress: Progress | None = None
) -> None:
    """Carry out a plan.

    Args:
        conversion: The plan.
        destination: Where the result goes.
        progress: Called with the bytes read so far and in all.

    Raises:
        UserError: As ``convert``.
    """
    target = destination.folder
    partial = destination.partial
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{target} cannot be written ({error.strerror}); choose another folder."
        ) from None
    with _alone(partial):
        done = _finished(partial, conversion.fingerprint()) if destination.resume else ()
        if not done:
            shutil.rmtree(partial / RESULT, ignore_errors=True)
        cache_limit = mx.set_cache_limit(4 * SLICE)
        try:
            (partial / RESULT).mkdir(exist_ok=True)
            _write_weights(conversion, partial, done, progress)
            write_files(conversion, partial / RESULT, destination.upload_repo)
            if not target.exists() or destination.overwrite:
                _put_in_place(partial, target)
                return
        except (OSError, WriteError) as error:
            raise _stopped(error, target, conversion.bytes_out) from None
        except UserError:
            # the source is at fault, so resuming cannot help
            shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            mx.set_cache_limit(cache_limit)
    check_target(destination)  # refuse if the target appeared in the meantime


def _stopped(error: OSError | WriteError, target: Path, size: int) -> UserError:
    """The error for the user after a failed write.

    Args:
        error: The error of the write.
        target: The folder of the result.
        size: The bytes that the conversion needs in all.
    """
    again = "--overwrite --resume" if target.exists() else "--resume"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"The disk of {target} filled up; free {_gb(size)} in all and run again with {again}."
        )
    return UserError(
        f"Converting stopped ({error}); when that is put right, run again with {again}."
    )


@contextlib.contextmanager
def _alone(partial: Path) -> Iterator[None]:
    """Lock a partial folder.

    Raises:
        UserError: Another process has locked it.
    """
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(
            f"Another conversion is writing {partial}; wait for it, or choose another folder."
        ) from None
    finally:
        os.close(descriptor)


def _write_weights(
    conversion: Conversion, partial: Path, done: Iterable[str], progress: Progress | None
) -> None:
    """Write the weights, and record each finished output in the journal.

    Args:
        conversion: The plan.
        partial: The partial folder.
        done: The paths of the outputs that an interrupted run finished.
        progress: Called with the bytes read so far and in all.
    """
    done = set(done)
    # The journal is written again from the start, without a line that was cut off.
    entries = [{"fingerprint": conversion.fingerprint()}]
    entries += [{"finished": path} for path in sorted(done)]
    write_text(partial / JOURNAL, "".join(json.dumps(entry) + "\n" for entry in entries))
    read_bytes = 0
    with (partial / JOURNAL).open("a", encoding="utf-8") as journal:
        for name, outputs in conversion.shards().items():
            arrays = {key: array for output in outputs for key, array in output.arrays.items()}
            writer = SafetensorsWriter(partial / RESULT / name, arrays, {"format": "mlx"})
            try:
                for output in outputs:
                    if output.path not in done or not writer.resumed:
                        _write_output(writer, output)
                        journal.write(json.dumps({"finished": output.path}) + "\n")
                        journal.flush()
                        os.fsync(journal.fileno())
                    read_bytes += output.bytes_in
                    if progress:
                        progress(read_bytes, conversion.bytes_in)
            finally:
                writer.close()


def _write_output(writer: SafetensorsWriter, output: Output) -> None:
    offsets = dict.fromkeys(output.arrays, 0)
    for arrays in output.slices():
        for key, values in arrays.items():
            offsets[key] = writer.write(key, offsets[key], values)
    writer.sync()


def write_files(conversion: Conversion, folder: Path, upload_repo: str | None) -> None:
    """Write everything except the weights."""
    for unfinished in folder.glob(".*.partial"):  # a killed process left these
        unfinished.unlink()
    copied = []
    for path in _small_files(conversion.folder):
        shutil.copyfile(path, folder / path.name)
        copied.append(path.name)
    mapping = {}
    for name, outputs in conversion.shards().items():
        for output in outputs:
            mapping.update(dict.fromkeys(output.arrays, name))
    metadata = {
        "total_size": conversion.bytes_out,
        "total_parameters": sum(output.size for output in conversion.outputs),
        LIST: copied,
    }
    write_json(folder / INDEX, {"metadata": metadata, "weight_map": dict(sorted(mapping.items()))})
    write_json(folder / "generation_config.json", conversion.generation_config)
    write_text(folder / "README.md", model_card(conversion, upload_repo))
    write_json(folder / "config.json", conversion.raw_config)


def _small_files(folder: Path) -> list[Path]:
    """The files of a checkpoint that are copied as they are, sorted by name."""
    files = set()
    for pattern in COPIED:
        for path in list_files(folder, pattern):
            is_written = path.name in WRITTEN or path.name.endswith(".index.json")
            if path.is_file() and not is_written:
                files.add(path)
    return sorted(files)


def _put_in_place(partial: Path, target: Path) -> None:
    """Give the result the target's name; an old target is removed only after that."""
    old = target.with_name(f".{target.name}.replaced-by-mlx-diffgemma")
    shutil.rmtree(old, ignore_errors=True)  # a run that was killed here left it
    if target.exists():
        target.rename(old)
    (partial / RESULT).rename(target)
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(partial, ignore_errors=True)


def _finished(partial: Path, fingerprint: str) -> set[str]:
    """The paths of the outputs that are complete in a partial folder.

    Raises:
        UserError: The folder was begun from something else, or its journal is damaged.
    """
    journal = partial / JOURNAL
    try:
        text = read_text(journal) if journal.exists() else ""
        # A last line without a line end was cut off and does not count.
        entries = [json.loads(line) for line in text.split("\n")[:-1]]
        if not entries:
            return set()
        begun = entries[0]["fingerprint"]
        done = {entry["finished"] for entry in entries[1:]}
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{journal} is damaged; add --overwrite without --resume to start again."
        ) from None
    if begun != fingerprint:
        raise UserError(
            f"{partial} was begun from another checkpoint, with other options or another version; "
            "add --overwrite without --resume to start again."
        )
    return done


def check_disk(conversion: Conversion, target: Path) -> None:
    """Check that the disk has room for the result.

    Raises:
        UserError: It has not.
    """
    parent = target.parent
    while not parent.exists():
        parent = parent.parent
    partial = partial_folder(target)
    held = 0
    if partial.exists():
        held = sum(path.stat().st_blocks * 512 for path in partial.rglob("*"))
    needed = conversion.bytes_out + DISK_MARGIN - held
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise UserError(
            f"{target} needs {_gb(needed)} on disk, {_gb(free)} are free; "
            "make room or choose another folder."
        )


def partial_folder(target: Path) -> Path:
    return target.with_name(f"{target.name}.partial")


def _gb(count: int) -> str:
    return f"{count / 1e9:,.2f} GB"
