"""Turns an exception that leaves a command into one line and an exit code, without a traceback.

    2    a mistake in the input (``UserError``), which the user can correct
    1    the model, the memory or the disk failed
    70   a defect of this package; the line asks for a report
    130  Ctrl-C

With ``MLX_DIFFGEMMA_DEBUG=1`` in the environment the traceback is shown as well.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mlx_diffgemma.errors import NonFiniteLogitsError, UserError

DEBUG = "MLX_DIFFGEMMA_DEBUG"
USER = 2
FAILED = 1
DEFECT = 70
INTERRUPTED = 130
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
# Errors of a file name from the user, wherever the code first uses it.
UNUSABLE = (
    errno.ENAMETOOLONG,
    errno.EACCES,
    errno.EPERM,
    errno.ELOOP,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EMFILE,
)
# Parts of MLX's messages when an allocation fails.
OUT_OF_MEMORY = ("malloc", "Unable to allocate", "Insufficient Memory", "out of memory")


@contextlib.contextmanager
def reported(say: Callable[[str], None]) -> Iterator[None]:
    """Run a command; any exception that leaves it becomes one line and ``SystemExit``.

    ``say`` prints a line on standard error.
    """
    try:
        _print_anything()
        yield
        sys.stdout.flush()
    except SystemExit as left:
        with _silent_exit():
            sys.stdout.flush()
        raise left
    except BaseException as error:
        if os.environ.get(DEBUG):
            traceback.print_exc()
        line, code = explain(error)
        if line:
            say(line)
        with _silent_exit():
            sys.stdout.flush()
        sys.exit(code)


def explain(error: BaseException) -> tuple[str, int]:
    """The line about ``error``, empty if there is nothing to say, and the exit code."""
    if isinstance(error, UserError):
        return f"error: {error}", USER
    if isinstance(error, NonFiniteLogitsError):
        return f"error: {error}", FAILED
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", INTERRUPTED
    if isinstance(error, BrokenPipeError):
        return "", FAILED  # the reader of the output has closed it
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(mark in str(error) for mark in OUT_OF_MEMORY)
    ):
        return (
            f"error: there is not enough memory ({_short(error)}); take a smaller model, a shorter "
            "prompt or a smaller batch.",
            FAILED,
        )
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        where = str(error.filename)[:100] if error.filename else "the output"
        return f"error: {where} cannot be written ({error.strerror}).", FAILED
    if isinstance(error, OSError) and error.errno in UNUSABLE and error.filename:
        return f"error: {str(error.filename)[:100]} cannot be used ({error.strerror}).", USER
    return (
        f"error: this is a defect of mlx-diffgemma; please report this line: {_short(error)} "
        f"({_place(error)}). {DEBUG}=1 shows the whole traceback.",
        DEFECT,
    )


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split())
    name = type(error).__name__
    return f"{name}: {text[:200]}" if text else name


def _place(error: BaseException) -> str:
    """The innermost line of this package that the error went through."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return "no place known"
    ours = [frame for frame in frames if _is_ours(Path(frame.filename))]
    frame = (ours or list(frames))[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"


def _is_ours(path: Path) -> bool:
    """Whether a file belongs to this package or to the drafter's."""
    if "drafter" in path.parts:
        return True
    return "mlx_diffgemma" in path.parts and path.parent.name != "site-packages"


def _print_anything() -> None:
    """Escape characters that the terminal's encoding lacks, instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def _silent_exit() -> Iterator[None]:
    """Ignore a standard output that cannot be written.

    Python flushes it once more when it exits.  If that would fail, the output is replaced here.
    """
    try:
        yield
    except (OSError, ValueError):
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def check_arguments(arguments: Sequence[str]) -> None:
    """Refuse arguments that are not UTF-8, unless they name a file.

    Raises:
        UserError: An argument is not UTF-8; the message names it by its number.
    """
    for number, argument in enumerate(arguments, start=1):
        is_utf8 = not any("\ud800" <= character <= "\udfff" for character in argument)
        if not is_utf8 and not os.path.exists(argument):
            shown = argument.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
            raise UserError(
                f"Argument {number} is not valid UTF-8: {shown[:60]}; set the terminal to UTF-8."
            )


def quiet_until_main() -> None:
    """Let Ctrl-C end the command without a traceback while it is still importing.

    ``main`` handles the signal afterwards.
    """
    name = Path(sys.argv[0]).name if sys.argv else ""
    is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if name in ("mlx-diffgemma", "-m") and is_default:
        with contextlib.suppress(ValueError):  # only the main thread may set signals
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def hear_interrupts() -> None:
    """Let Ctrl-C raise ``KeyboardInterrupt`` again."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGINT, signal.default_int_handler)
