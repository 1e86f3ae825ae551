"""Files that users name: read within bounds, written whole or not at all.

Everything that opens a file by name goes through here.  Reading refuses what is no regular file,
what is too large and what is not UTF-8, in a sentence that names the file and the line.  Writing
goes to a fresh temporary file in the same folder, which is synced and then renamed: whatever
happens meanwhile, the old file stays whole and nothing else is left behind.

    >>> write_json(expand_path("~/scores.json"), {"score": 0.5})
    >>> read_json(expand_path("~/scores.json"))
"""

from __future__ import annotations

import codecs
import contextlib
import json
import math
import os
import re
import secrets
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import unquote

import mlx.core as mx

from mlx_diffgemma.errors import UserError

T = TypeVar("T")


class WriteError(UserError):
    """A file that cannot be written; ``errno`` says why, as the system does."""

    def __init__(self, path: Path, error: OSError | ValueError) -> None:
        super().__init__(_sentence(path, "written", error))
        self.errno = error.errno if isinstance(error, OSError) else None


TEXT_LIMIT = 256 * 2**20  # bytes of a text or JSON file; a large tokenizer has 33 MB
LINE_LIMIT = 64 * 2**20  # bytes of a line of a .jsonl file, which itself may have any size
NESTING = 100  # of JSON; what reads it afterwards may be recursive
DIGITS = 400  # of a number in JSON; the largest float64 has 309
APPLE_DOUBLE = "._"  # macOS keeps attributes in files of this prefix on disks that hold none
PIPES = ("/dev/fd/", "/dev/stdin", "/proc/self/fd/")  # what a shell opened for us, as <(command)
_SCHEME = re.compile(r"file:(?://(?:localhost)?(?=/))?", re.IGNORECASE)


def expand_path(name: str | Path) -> Path:
    """The path that a user means, as ``expand_name``."""
    return Path(expand_name(str(name)))


def expand_name(name: str) -> str:
    """``~`` and ``file://`` are understood everywhere; anything else stays as it is.

    Raises:
        UserError: It names the home of nobody.
    """
    scheme = _SCHEME.match(name)
    if scheme and name[scheme.end() :].startswith("/"):
        return unquote(name[scheme.end() :])
    expanded = os.path.expanduser(name)
    if expanded.startswith("~"):
        raise UserError(
            f"{name!r} is not the path of a file: there is no such user; "
            f"write ./{name} for a file of that name."
        )
    return expanded


def list_files(folder: Path, pattern: str) -> list[Path]:
    """The files of ``folder`` that match, sorted, without macOS's AppleDouble files."""
    found = folder.glob(pattern)
    return sorted(path for path in found if not path.name.startswith(APPLE_DOUBLE))


# Reading


@contextlib.contextmanager
def open_binary(path: Path, limit: int | None = None) -> Iterator[BinaryIO]:
    """``open_regular`` for a block, in which a failure to read is told as a UserError too."""
    with open_regular(path, limit) as file:
        try:
            yield file
        except OSError as error:
            raise UserError(_sentence(path, "read", error)) from None


def open_regular(path: Path, limit: int | None = None) -> BinaryIO:
    """A regular file, or a pipe that a shell opened for us, to read bytes from.

    Args:
        path: The file.
        limit: Bytes it may have; None admits any size.

    Raises:
        UserError: It is missing, not readable, too large, a folder, a named pipe or a device.
    """
    try:
        # Without O_NONBLOCK, opening a named pipe waits until somebody writes to it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0))
    except (OSError, ValueError) as error:
        raise UserError(_sentence(path, "read", error)) from None
    try:
        _check_readable(path, os.fstat(descriptor), limit)
        os.set_blocking(descriptor, True)
    except UserError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def _check_readable(path: Path, status: os.stat_result, limit: int | None) -> None:
    kind = kind_of(status.st_mode)
    is_ours = kind == "a named pipe" and str(path).startswith(PIPES)
    if kind is not None and not is_ours:
        raise UserError(f"{path} is {kind}; give a regular file.")
    if limit is not None and status.st_size > limit:
        raise _too_large(path, limit)


def kind_of(mode: int) -> str | None:
    """What is at a path, in words; None for a regular file."""
    if stat.S_ISREG(mode):
        return None
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a named pipe",
        stat.S_IFSOCK: "a socket",
    }
    return kinds.get(stat.S_IFMT(mode), "a device")


def _too_large(path: Path | str, limit: int) -> UserError:
    return UserError(f"{path} has more than the {limit:,} bytes that are read of such a file.")


def _sentence(path: Path, done: str, error: OSError | ValueError) -> str:
    if isinstance(error, OSError):
        return f"{path} cannot be {done} ({error.strerror or error})."
    return f"{str(path)!r} is not the path of a file."  # a null byte


def read_bytes(path: Path, limit: int = TEXT_LIMIT) -> bytes:
    """Raises: UserError as ``open_binary``."""
    with open_binary(path, limit) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise _too_large(path, limit)
    return content


def read_text(path: Path, limit: int = TEXT_LIMIT) -> str:
    """UTF-8 without its byte order mark.  Raises: UserError as ``open_binary``."""
    return decode(read_bytes(path, limit), str(path))


def read_stdin(limit: int = TEXT_LIMIT) -> str:
    """Standard input, as ``read_text`` reads a file."""
    content = sys.stdin.buffer.read(limit + 1)
    if len(content) > limit:
        raise _too_large("standard input", limit)
    return decode(content, "standard input")


def decode(content: bytes, where: str) -> str:
    """UTF-8 without its byte order mark.

    Raises:
        UserError: It is not UTF-8; names ``where`` and the line.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The position does not count the mark.
        start = error.start + len(content) - len(error.object)
        raise _not_utf8(content, start, where, content.count(b"\n", 0, start) + 1) from None


def _not_utf8(content: bytes, start: int, where: str, line: int) -> UserError:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return UserError(f"{where} is UTF-16; save it as UTF-8.")
    byte = f"0x{content[start]:02x}"
    return UserError(f"{where} is not UTF-8: line {line} holds the byte {byte}; save it as UTF-8.")


def parse_json(text: str, where: str) -> Any:
    """JSON whose nesting and numbers are bounded.

    Raises:
        UserError: It is no JSON, nests deeper than ``NESTING``, or holds a number that is not
            finite or has more than ``DIGITS`` digits; names ``where`` and the line.
    """
    try:
        return _parse(text)
    except _BadJson as error:
        raise UserError(f"{where} is not valid JSON ({error}).") from None


class _BadJson(Exception):
    """What is wrong with a text that should be JSON."""


def _parse(text: str) -> Any:
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text.rstrip("\n") else ""
        raise _BadJson(f"{error.msg} in {line}column {error.colno}") from None
    except RecursionError:
        raise _BadJson(_TOO_DEEP) from None
    if text.count("[") + text.count("{") > NESTING and _depth_exceeds(value, NESTING):
        raise _BadJson(_TOO_DEEP)
    return value


_TOO_DEEP = f"lists and objects are nested deeper than {NESTING} levels"


def _integer(digits: str) -> int:
    if len(digits) > DIGITS:
        raise _BadJson(f"a number has {len(digits):,} digits, at most {DIGITS} are read")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise _BadJson(f"the number {digits[:20]} is out of range")
    return value


def _constant(name: str) -> float:
    raise _BadJson(f"{name} is no number in JSON")


_DECODER = json.JSONDecoder(parse_int=_integer, parse_float=_float, parse_constant=_constant)


def _depth_exceeds(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner += item.values()
            elif isinstance(item, list):
                inner += item
        level = inner
    return any(isinstance(item, (dict, list)) for item in level)


def read_json_value(path: Path, limit: int = TEXT_LIMIT) -> Any:
    """Raises: UserError as ``read_text`` and ``parse_json``."""
    return parse_json(read_text(path, limit), str(path))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file of a checkpoint folder.

    Raises:
        UserError: The file is missing, holds no object, or as ``read_json_value``.
    """
    if not os.path.lexists(path):
        raise UserError(
            f"{path.parent} has no {path.name}; give a folder that holds a DiffusionGemma "
            "checkpoint."
        )
    content = read_json_value(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; download the file again.")
    return content


def read_lines(path: Path, make: Callable[[Any], T]) -> Iterator[T]:
    """What ``make`` makes of each line of a .jsonl file that is not empty.

    Raises:
        UserError: A line is no JSON, or ``make`` refuses it with one; names file and line.
    """
    with open_binary(path) as file:
        number = 0
        while line := file.readline(LINE_LIMIT + 1):
            number += 1
            if len(line) > LINE_LIMIT:
                raise _too_large(f"{path}, line {number}", LINE_LIMIT)
            text = _decode_line(line, path, number)
            if text.strip():
                yield _made(text, make, f"{path}, line {number}")


def _decode_line(line: bytes, path: Path, number: int) -> str:
    content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(content, error.start, str(path), number) from None


def _made(text: str, make: Callable[[Any], T], where: str) -> T:
    try:
        return make(_parse(text))
    except _BadJson as error:
        raise UserError(f"{where}: not valid JSON ({error}).") from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


# Writing


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of ``path`` when the block ends without an error.

    A link stays a link, to a file with the new content; permissions, and the owner where that is
    allowed, stay as they were.  Missing folders are not made.

    Raises:
        UserError: It cannot be written.  What was there is then whole, and nothing else is left.
    """
    target = _resolved(path)
    unfinished = target.with_name(f".{target.name[:100]}.{secrets.token_hex(6)}.partial")
    try:
        before = _replaceable(path, target)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
        descriptor = os.open(unfinished, flags, 0o666)
        try:
            with os.fdopen(descriptor, "wb") as file:
                _keep_rights(descriptor, before)
                yield file
                file.flush()
                os.fsync(descriptor)
            os.replace(unfinished, target)
        finally:
            with contextlib.suppress(FileNotFoundError):
                unfinished.unlink()
        sync_folder(target.parent)
    except OSError as error:
        raise WriteError(path, error) from None


def _resolved(path: Path) -> Path:
    """``path`` without links.  Raises: UserError for what cannot be a name."""
    try:
        return Path(os.path.realpath(path))
    except (OSError, ValueError) as error:
        raise WriteError(path, error) from None


def _replaceable(path: Path, target: Path) -> os.stat_result | None:
    """The status of what is there; None for nothing.  Raises: UserError for what must stay."""
    try:
        before = target.stat()
    except FileNotFoundError:
        return None
    if kind := kind_of(before.st_mode):
        raise UserError(f"{path} is {kind} and cannot be written; give a file.")
    if not os.access(target, os.W_OK):
        raise UserError(f"{path} cannot be written (it is read-only).")
    return before


def _keep_rights(descriptor: int, before: os.stat_result | None) -> None:
    if before is None:
        return
    own = os.fstat(descriptor)
    if (own.st_uid, own.st_gid) != (before.st_uid, before.st_gid):
        with contextlib.suppress(PermissionError):
            os.fchown(descriptor, before.st_uid, before.st_gid)
    os.fchmod(descriptor, stat.S_IMODE(before.st_mode))


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some network disks do not sync folders
        pass
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes, expected: bytes | None = None) -> None:
    """Replace ``path`` by ``content``.

    Args:
        path: The file.
        content: What it is to hold.
        expected: What it must hold until then; None for anything.

    Raises:
        UserError: It cannot be written, or holds something else than was expected.
    """
    with replacing(path) as file:
        file.write(content)
        file.flush()
        if expected is not None and _content(path) != expected:
            raise UserError(
                f"{path} was changed by something else since it was read and stays as it is; "
                "run the command again."
            )


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def write_text(path: Path, text: str) -> None:
    """Raises: UserError as ``write_bytes``."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, content: object, indent: int | None = 2) -> None:
    """Raises: UserError as ``write_bytes``."""
    write_text(path, json.dumps(content, indent=indent, ensure_ascii=False) + "\n")


def write_tensors(
    path: Path, tensors: Mapping[str, mx.array], metadata: Mapping[str, str] | None = None
) -> None:
    """A safetensors file of any name.  Raises: UserError as ``replacing``."""
    with replacing(path) as file:
        mx.save_safetensors(file, dict(tensors), dict(metadata or {}))


# Targets, checked before the work


def check_file(path: Path) -> None:
    """Raises: UserError when a file could not be written at ``path``."""
    target = _resolved(path)
    try:
        _replaceable(path, target)
        if not target.parent.is_dir():
            raise UserError(f"{path} cannot be written, there is no folder {target.parent}.")
        _probe(target.parent)
    except OSError as error:
        raise WriteError(path, error) from None


def check_folder(folder: Path, ours: Iterable[str] | None = None) -> None:
    """Before a long run: can ``folder`` be made or written, and is what lies there ours?

    Args:
        folder: Where results are to go.
        ours: Names of files by which this command knows a folder of its own; any other folder
            must be empty but for hidden files.  None: other files do not matter.

    Raises:
        UserError: It cannot, or is not.
    """
    _resolved(folder)
    try:
        ground = folder
        while not os.path.lexists(ground) and ground != ground.parent:
            ground = ground.parent
        if not ground.is_dir():
            what = "a file" if ground.exists() else "a link to nothing"
            raise UserError(f"{folder} cannot be made, {ground} is {what}; give another folder.")
        _probe(ground)
        if ours is not None and ground == folder:
            _check_ours(folder, ours)
    except OSError as error:
        raise WriteError(folder, error) from None


def _check_ours(folder: Path, ours: Iterable[str]) -> None:
    if any((folder / name).exists() for name in ours):
        return
    foreign = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if foreign:
        raise UserError(
            f"{folder} holds files that this command did not write, such as {foreign[0]}; "
            "give another folder."
        )


def make_folder(folder: Path) -> None:
    """With its parents.  Raises: UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise WriteError(folder, error) from None


def _probe(folder: Path) -> None:
    """Raises: OSError when no file can be made in ``folder``."""
    name = folder / f".{secrets.token_hex(6)}.partial"
    os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    name.unlink()
