"""Whatever leaves a command is one line and an exit code; our own defects are told apart from the
user's mistakes.
"""

import errno
import os
import signal
import subprocess
import sys

import pytest

from mlx_diffgemma import failures
from mlx_diffgemma.errors import NonFiniteLogitsError, UserError
from mlx_diffgemma.text.tokenizer import chat_ids, encode_prompt, user_message
from tests.helpers.command import COMMAND, WITHOUT_TORCH
from tests.helpers.in_process import run


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (UserError("no such thing."), 2, "error: no such thing."),
        (NonFiniteLogitsError("NaN."), 1, "error: NaN."),
        (KeyboardInterrupt(), 130, "interrupted"),
        (BrokenPipeError(), 1, None),
        (MemoryError(), 1, "there is not enough memory"),
        (
            RuntimeError("[metal::malloc] Attempting to allocate 9 bytes"),
            1,
            "there is not enough memory",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            1,
            "the output cannot be written (No space left on device)",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device", "x"),
            1,
            "x cannot be written (No space left on device)",
        ),
        (
            OSError(errno.ENAMETOOLONG, "File name too long", "a" * 300),
            2,
            f"{'a' * 100} cannot be used (File name too long)",
        ),
        (
            RuntimeError("[matmul] shapes"),
            70,
            "a defect of mlx-diffgemma; please report this line: RuntimeError: [matmul] shapes",
        ),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), 70, "a defect"),
        (AttributeError("two\nlines"), 70, "AttributeError: two lines"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_every_exception_is_one_line(error, code, says, capsys):
    said = []
    with pytest.raises(SystemExit) as left, failures.reported(said.append):
        raise error
    assert left.value.code == code
    assert "\n" not in "".join(said)
    assert said == [] if says is None else says in said[0]


def test_a_defect_names_its_place_and_can_show_its_traceback(monkeypatch, capsys):
    def broken(*_, **__):
        raise TypeError("nobody expected this")

    monkeypatch.setattr("mlx_diffgemma.cli.generate.stream_generate", broken)
    code, _, err = run(monkeypatch, capsys, "generate", "-p", "a")
    assert (code, err.count("\n")) == (70, 1)
    assert "TypeError: nobody expected this (" in err
    monkeypatch.setenv(failures.DEBUG, "1")
    assert "Traceback" in run(monkeypatch, capsys, "generate", "-p", "a")[2]


def test_arguments_that_are_not_utf8_are_named(monkeypatch, capsys, tmp_path):
    text = b"caf\xe9".decode("utf-8", "surrogateescape")
    code, _, err = run(monkeypatch, capsys, "generate", "-p", text)
    assert (code, err) == (
        2,
        "error: Argument 3 is not valid UTF-8: caf\\xe9; set the terminal to UTF-8.\n",
    )
    failures.check_arguments(["-p", "café", "😀"])
    named = tmp_path / text
    named.touch()
    failures.check_arguments([str(named)])  # a file may have any name


def info(*, stdout=subprocess.PIPE, env=None):
    return subprocess.run(
        [*COMMAND, "info", "nano"],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        env=os.environ | (env or {}),
        check=False,
    )


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="macOS has no /dev/full")
def test_a_full_disk_below_standard_output():
    with open("/dev/full", "w") as full:
        done = info(stdout=full)
    assert (done.returncode, done.stderr) == (
        1,
        "error: the output cannot be written (No space left on device).\n",
    )


def test_a_terminal_that_lacks_characters(tmp_path):
    done = subprocess.run(
        [*COMMAND, "info", str(tmp_path / "größe")],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        check=False,
    )
    assert done.returncode == 2
    assert "gr\\xf6\\xdfe" in done.stderr
    assert "Traceback" not in done.stderr


def test_ctrl_c_while_the_command_imports(tmp_path):
    """The signal comes when the package has begun to import; it ends the process and prints
    nothing.
    """
    script = tmp_path / "mlx-diffgemma"
    script.write_text(
        f"{WITHOUT_TORCH}import os, signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have ignored it\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'mlx_diffgemma.cli.app':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "from mlx_diffgemma.cli import main\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_importing_the_package_leaves_signals_alone():
    before = signal.getsignal(signal.SIGINT)
    failures.quiet_until_main()
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("literal", [False, True])
def test_half_a_character_is_refused_where_text_becomes_ids(nano_pair, literal):
    tokenizer = nano_pair[1]
    for read in (
        lambda text: encode_prompt(tokenizer, text, literal=literal),
        lambda text: chat_ids(tokenizer, [user_message(text)], allow_control_tokens=not literal),
    ):
        assert read("a fox")
        with pytest.raises(UserError, match=r"not valid Unicode: '.ud800' at position \d+"):
            read("a\ud800fox")
