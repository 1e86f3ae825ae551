"""Files that users name: read within bounds, written whole or not at all.

Everything that opens a file by name goes through here.  Reading refuses anything that is not a
regular file, is too large or is not UTF-8, in a sentence that names the file and the line.  Writing
goes to a fresh temporary file in the same folder, which is synced and then renamed.  Whatever
happens meanwhile, the old file stays whole and nothing else is left.

    >>> write_json(expand_path("~/scores.json"), {"score": 0.5})
    >>> read_json(expand_path("~/scores.json"))
"""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import re
import secrets
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import unquote

from mlx_diffgemma.bounded_json import JsonError, decode_json, parse_json
from mlx_diffgemma.errors import UserError

T = TypeVar("T")


class WriteError(UserError):
    """A file that cannot be written; ``errno`` says why, as the system does."""

    def __init__(self, path: Path, error: OSError | ValueError) -> None:
        super().__init__(_sentence(path, "written", error))
        self.errno = error.errno if isinstance(error, OSError) else None


TEXT_LIMIT = 256 * 2**20  # bytes of a text or JSON file; a large tokenizer has 33 MB
LINE_LIMIT = 64 * 2**20  # bytes of a line of a .jsonl file, which itself may have any size
APPLE_DOUBLE = "._"  # macOS keeps attributes in files with this prefix on some foreign disks
PIPES = ("/dev/fd/", "/dev/stdin", "/proc/self/fd/")  # pipes of a shell, as in <(command)
_SCHEME = re.compile(r"file:(?://(?:localhost)?(?=/))?", re.IGNORECASE)


def expand_path(name: str | Path) -> Path:
    """The path that a user typed, expanded as by ``expand_name``."""
    return Path(expand_name(str(name)))


def expand_name(name: str) -> str:
    """Expand ``~`` and ``file://``; any other name stays as it is.

    Raises:
        UserError: It names the home of a user that does not exist.
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
    paths = folder.glob(pattern)
    return sorted(path for path in paths if not path.name.startswith(APPLE_DOUBLE))


# Reading


@contextlib.contextmanager
def open_binary(path: Path, limit: int | None = None) -> Iterator[BinaryIO]:
    """``open_regular`` for a block; a failure to read in the block is a UserError too."""
    with open_regular(path, limit) as file:
        try:
            yield file
        except OSError as error:
            raise UserError(_sentence(path, "read", error)) from None


def open_regular(path: Path, limit: int | None = None) -> BinaryIO:
    """Open a regular file, or a pipe that a shell opened for this process, to read bytes.

    Args:
        path: The file.
        limit: The most bytes it may have; None admits any size.

    Raises:
        UserError: The file is missing, not readable, too large, a folder, a named pipe or a device.
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
    """The kind of file that ``mode`` describes, in words; None for a regular file."""
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
    """The content of a file.  Raises UserError as ``open_binary`` does."""
    with open_binary(path, limit) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise _too_large(path, limit)
    return content


def read_text(path: Path, limit: int = TEXT_LIMIT) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises:
        UserError: As ``open_binary`` and ``decode``.
    """
    return decode(read_bytes(path, limit), str(path))


def read_stdin(limit: int = TEXT_LIMIT) -> str:
    """The text of standard input, read as ``read_text`` reads a file."""
    content = sys.stdin.buffer.read(limit + 1)
    if len(content) > limit:
        raise _too_large("standard input", limit)
    return decode(content, "standard input")


def decode(content: bytes, where: str) -> str:
    """Decode UTF-8, without a byte order mark.

    Raises:
        UserError: It is not UTF-8; the message names ``where`` and the line.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The position does not count the byte order mark.
        start = error.start + len(content) - len(error.object)
        raise _not_utf8(content, start, where, content.count(b"\n", 0, start) + 1) from None


def _not_utf8(content: bytes, start: int, where: str, line: int) -> UserError:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return UserError(f"{where} is UTF-16; save it as UTF-8.")
    byte = f"0x{content[start]:02x}"
    return UserError(f"{where} is not UTF-8: line {line} holds the byte {byte}; save it as UTF-8.")


def read_json_value(path: Path, limit: int = TEXT_LIMIT) -> Any:
    """The JSON value in a file.  Raises UserError as ``read_text`` and ``parse_json`` do."""
    return parse_json(read_text(path, limit), str(path))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file of a checkpoint folder.

    Raises:
        UserError: The file is missing or holds another value; or as ``read_json_value``.
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
    """The result of ``make`` for each line of a .jsonl file that is not empty.

    Raises:
        UserError: A line is not JSON, or ``make`` raises one; the message names file and line.
    """
    with open_binary(path) as file:
        number = 0
        while line := file.readline(LINE_LIMIT + 1):
            number += 1
            if len(line) > LINE_LIMIT:
                raise _too_large(f"{path}, line {number}", LINE_LIMIT)
            text = _decode_line(line, path, number)
            if text.strip():
                yield _make(text, make, f"{path}, line {number}")


def _decode_line(line: bytes, path: Path, number: int) -> str:
    content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(content, error.start, str(path), number) from None


def _make(text: str, make: Callable[[Any], T], where: str) -> T:
    try:
        return make(decode_json(text))
    except JsonError as error:
        raise UserError(f"{where}: not valid JSON ({error}).") from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


# Writing


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of ``path`` when the block ends without an error.

    A link stays a link, to a file with the new content.  The permissions stay as they were, and so
    does the owner where the system allows it.  Missing folders are not made.

    Raises:
        UserError: The file cannot be written.  An old file is then whole, and nothing else is left.
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
    """``path`` without links.  Raises WriteError for a text that cannot be a path."""
    try:
        return Path(os.path.realpath(path))
    except (OSError, ValueError) as error:
        raise WriteError(path, error) from None


def _replaceable(path: Path, target: Path) -> os.stat_result | None:
    """The status of the file at ``target``, or None.  Raises UserError if it must stay."""
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
    """Give a new file the owner and the permissions of the old one."""
    if before is None:
        return
    status = os.fstat(descriptor)
    if (status.st_uid, status.st_gid) != (before.st_uid, before.st_gid):
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
        content: Its new content.
        expected: The content it must have until then; None for any.

    Raises:
        UserError: The file cannot be written, or its content is not the expected one.
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
    """Replace ``path`` by a UTF-8 text.  Raises UserError as ``write_bytes`` does."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, content: object, indent: int | None = 2) -> None:
    """Replace ``path`` by JSON.  Raises UserError as ``write_bytes`` does."""
    write_text(path, json.dumps(content, indent=indent, ensure_ascii=False) + "\n")


# Checks of output files and folders before the work


def check_file(path: Path) -> None:
    """Check before the work that a file can be written.  Raises UserError if it cannot."""
    target = _resolved(path)
    try:
        _replaceable(path, target)
        if not target.parent.is_dir():
            raise UserError(f"{path} cannot be written, there is no folder {target.parent}.")
        _probe(target.parent)
    except OSError as error:
        raise WriteError(path, error) from None


def check_folder(folder: Path, ours: Iterable[str] | None = None) -> None:
    """Check before a long run that a folder can be made or written.

    Args:
        folder: The folder for the results.
        ours: Names of files by which this command recognises its own folders.  Any other folder
            must be empty, apart from hidden files.  With None, other files do not matter.

    Raises:
        UserError: The folder cannot be written, or holds files that this command did not write.
    """
    _resolved(folder)
    try:
        parent = folder
        while not os.path.lexists(parent) and parent != parent.parent:
            parent = parent.parent
        if not parent.is_dir():
            what = "a file" if parent.exists() else "a link to nothing"
            raise UserError(f"{folder} cannot be made, {parent} is {what}; give another folder.")
        _probe(parent)
        if ours is not None and parent == folder:
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
    """Make a folder with its parents.  Raises UserError if it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise WriteError(folder, error) from None


def _probe(folder: Path) -> None:
    """Raise OSError if no file can be made in ``folder``."""
    name = folder / f".{secrets.token_hex(6)}.partial"
    os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    name.unlink()
