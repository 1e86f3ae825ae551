"""What the command says when an exception leaves it: one line and an exit code, never a traceback.

    2    a mistake in the input (``UserError``), which its user can put right
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
USER, FAILED, DEFECT, INTERRUPTED = 2, 1, 70, 130
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)
# What is wrong with a name that a user gave, wherever the code first meets it.
UNUSABLE = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EMFILE)
# How MLX's messages begin or what they hold when an allocation fails.
OUT_OF_MEMORY = ("malloc", "Unable to allocate", "Insufficient Memory", "out of memory")


@contextlib.contextmanager
def reported(say: Callable[[str], None]) -> Iterator[None]:
    """Run a command; whatever exception leaves it becomes one line and ``SystemExit``.

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
    """The line that tells of ``error``, empty where nothing is to be said, and the exit code."""
    if isinstance(error, UserError):
        return f"error: {error}", USER
    if isinstance(error, NonFiniteLogitsError):
        return f"error: {error}", FAILED
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", INTERRUPTED
    if isinstance(error, BrokenPipeError):
        return "", FAILED  # whoever read the output has enough of it
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
    own = [frame for frame in frames if (Path(frame.filename).parent.name != "site-packages"
           and "mlx_diffgemma" in Path(frame.filename).parts) or "drafter" in Path(frame.filename).parts]
    if not frames:
        return "no place known"
    frame = (own or list(frames))[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"


def _print_anything() -> None:
    """A character that the terminal's encoding lacks is written escaped; it ends no command."""
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def _silent_exit() -> Iterator[None]:
    """Python flushes standard output once more when it ends; where that fails, it has nothing left to flush."""
    try:
        yield
    except (OSError, ValueError):
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def check_arguments(arguments: Sequence[str]) -> None:
    """Refuse arguments that are not UTF-8, unless they name a file.

    Raises:
        UserError: naming the argument by its number.
    """
    for number, argument in enumerate(arguments, start=1):
        if any("\ud800" <= character <= "\udfff" for character in argument) and not os.path.exists(argument):
            shown = argument.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
            raise UserError(f"Argument {number} is not valid UTF-8: {shown[:60]}; set the terminal to UTF-8.")


def quiet_until_main() -> None:
    """While the command is still importing, Ctrl-C ends it without a traceback; ``main`` takes the signal over."""
    name = Path(sys.argv[0]).name if sys.argv else ""
    if name in ("mlx-diffgemma", "-m") and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        with contextlib.suppress(ValueError):  # only the main thread may set signals
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def hear_interrupts() -> None:
    """Ctrl-C raises ``KeyboardInterrupt`` again."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGINT, signal.default_int_handler)
