"""``mlx-diffgemma infill`` and ``edit`` as their users meet them."""

import errno
import json
import os

import pytest

from mlx_diffgemma.generation.holes import Fill, Infilled
from tests.helpers.in_process import run

TEXT = '{"name": "Anna",\r\n "age": <|hole:3|>, "city": "Paris"}\r\n'
PROMPT = "Turn this into JSON: Anna is 31 years old and lives in Paris."
FEW = ("--max-denoising-steps", "2")


@pytest.fixture
def record(tmp_path):
    path = tmp_path / "record.json"
    path.write_bytes(TEXT.encode())
    return path


def test_prefix_and_suffix(monkeypatch, capsys):
    code, out, err = run(
        monkeypatch,
        capsys,
        "infill",
        "--prefix",
        '{"name": "Anna", "age": ',
        "--suffix",
        ', "city": "Paris"}',
        "-p",
        PROMPT,
        "--length",
        "3",
        "--seed",
        "0",
    )
    assert (code, out, err) == (0, '{"name": "Anna", "age": 31, "city": "Paris"}\n', "")


def test_a_file_comes_back_byte_for_byte(monkeypatch, capsys, record):
    code, out, _ = run(
        monkeypatch,
        capsys,
        "infill",
        str(record),
        "-p",
        PROMPT,
        "--regex",
        "[0-9]{2}",
        "--seed",
        "0",
        *FEW,
    )
    before, behind = TEXT.split("<|hole:3|>")
    assert code == 0
    assert out.startswith(before)
    assert out.endswith(behind)
    assert len(out) == len(before) + 2 + len(behind)
    assert record.read_bytes() == TEXT.encode()


def test_in_place(monkeypatch, capsys, record):
    code, out, _ = run(
        monkeypatch,
        capsys,
        "infill",
        str(record),
        "--choices",
        "31,13",
        "--seed",
        "0",
        "--in-place",
        "--force",
        *FEW,
    )
    assert (code, out) == (0, "")
    assert record.read_bytes() in [TEXT.replace("<|hole:3|>", age).encode() for age in ("31", "13")]


class TestInPlace:
    """What becomes of FILE; the canvas is not denoised."""

    NEW = TEXT.replace("<|hole:3|>", "31")

    @pytest.fixture
    def command(self, monkeypatch, capsys, record):
        def filled(_model, _tokenizer, text, *_arguments, **_options):
            self.meanwhile()
            fill = Fill(0, "31", (5,), self.converged, 2)
            return Infilled(text.replace("<|hole:3|>", "31"), (fill,), 0, 0)

        self.meanwhile = lambda: None
        self.converged = True
        monkeypatch.setattr("mlx_diffgemma.cli.infill.infill", filled)
        monkeypatch.setattr("mlx_diffgemma.cli.infill.load", lambda *_, **__: (None, None))
        return lambda *more: run(monkeypatch, capsys, "infill", str(record), "--in-place", *more)

    def test_it_is_replaced(self, command, record):
        record.chmod(0o751)
        assert command() == (0, "", "")
        assert record.read_bytes() == self.NEW.encode()
        assert record.stat().st_mode & 0o777 == 0o751

    def test_it_stays_where_the_answer_did_not_converge(self, command, record):
        self.converged = False
        code, out, err = command()
        assert (code, out) == (2, self.NEW)
        assert "1 of 1 spans did not converge" in err
        assert record.read_bytes() == TEXT.encode()
        assert command("--force") == (0, "", "")
        assert record.read_bytes() == self.NEW.encode()

    def test_a_full_disk(self, command, record, monkeypatch):
        def full(_descriptor):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        code, out, err = command()
        assert (code, out) == (2, self.NEW)
        assert "No space left on device" in err
        assert record.read_bytes() == TEXT.encode()
        assert len(list(record.parent.iterdir())) == 1

    def test_a_save_of_an_editor_meanwhile(self, command, record):
        self.meanwhile = lambda: record.write_text("saved")
        code, out, err = command()
        assert (code, out) == (2, self.NEW)
        assert "was changed by something else" in err
        assert record.read_text() == "saved"

    def test_a_link_stays_one(self, command, record):
        record.rename(record.with_name("real"))
        record.symlink_to("real")
        assert command()[0] == 0
        assert record.is_symlink()
        assert record.with_name("real").read_bytes() == self.NEW.encode()

    def test_a_byte_order_mark_stays_and_is_not_shown_to_the_model(self, command, record):
        record.write_bytes(b"\xef\xbb\xbf" + TEXT.encode())
        assert command()[0] == 0
        assert record.read_bytes() == b"\xef\xbb\xbf" + self.NEW.encode()

    def test_what_cannot_be_written_is_refused_before_the_work(self, command, monkeypatch):
        def never(*_arguments, **_options):
            raise AssertionError("it was loaded")

        monkeypatch.setattr("mlx_diffgemma.cli.infill.load", never)
        monkeypatch.setattr(os, "access", lambda *_: False)
        code, _, err = command()
        assert code == 2
        assert "is read-only" in err


def test_what_was_tried_is_told(monkeypatch, capsys):
    code, out, err = run(
        monkeypatch,
        capsys,
        "infill",
        "--suffix",
        " years old" * 40,
        "--length",
        "1-3",
        "--seed",
        "5",
        "--json",
        "--verbose",
        *FEW,
    )
    assert code == 0
    record = json.loads(out.splitlines()[-1])
    assert [one["length"] for one in record["fills"][0]["candidates"]] == [1, 2, 3]
    assert record["text"] == out.splitlines()[0]
    assert record["seed"] == 5
    assert f"The last {record['unseen']} tokens stood behind the canvas" in err
    assert err.count(" tokens ") >= 4


def test_edit_by_marks_and_by_lines(monkeypatch, capsys, tmp_path):
    path = tmp_path / "story.txt"
    path.write_bytes(b"One.\r\nMia was a <|edit|>red<|/edit|> fox.\nThe end.")
    code, out, _ = run(
        monkeypatch,
        capsys,
        "edit",
        str(path),
        "-p",
        "Tell it in blue:",
        "--choices",
        "blue,green",
        *FEW,
    )
    assert code == 0
    assert out in [f"One.\r\nMia was a {word} fox.\nThe end." for word in ("blue", "green")]
    plain = b"One.\r\nMia was a red fox.\nThe end."
    path.write_bytes(plain)
    code, _, _ = run(
        monkeypatch,
        capsys,
        "edit",
        str(path),
        "-p",
        "Shorter:",
        "--lines",
        "2",
        "--length",
        "4",
        "--in-place",
        "--force",
        *FEW,
    )
    assert code == 0
    written = path.read_bytes()
    assert written.startswith(b"One.\r\n")
    assert written.endswith(b"\nThe end.")
    assert written != plain


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["infill"], "There is no text"),
        (["infill", "none.txt"], "none.txt cannot be read"),
        (["infill", "FILE", "--prefix", "a"], "leave --prefix and --suffix out"),
        (["infill", "--prefix", "a", "--in-place"], "needs a FILE"),
        (["infill", "PLAIN"], "has no hole"),
        (["infill", "BYTES"], "bytes.txt is UTF-16"),
        (["infill", "--prefix", "a", "--length", "many"], "'many' is no length"),
        (["infill", "--prefix", "a", "--length", "0"], "at least 1 token"),
        (["infill", "--prefix", "a", "--regex", "("], "expression"),
        (["infill", "--prefix", "a", "--regex", "a", "--choices", "b"], "Give one"),
        (["infill", "--prefix", "a", "--temp", "-1"], "temperature"),
        (["infill", "--prefix", "a", "--batch-size", "0"], "batch_size"),
        (["edit", "PLAIN", "-p", "x"], "One span must be marked"),
        (["edit", "PLAIN", "-p", "x", "--lines", "9"], "no lines of a text of 2"),
        (["edit", "PLAIN", "-p", "x", "--lines", "2-1"], "no lines"),
        (["edit", "-", "-p", "x", "--in-place"], "needs a FILE"),
    ],
)
def test_wrong_input_is_one_line(monkeypatch, capsys, tmp_path, record, arguments, message):
    (tmp_path / "plain.txt").write_text("no hole\nhere")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe<|hole|>")
    files = {"FILE": record, "PLAIN": tmp_path / "plain.txt", "BYTES": tmp_path / "bytes.txt"}
    code, out, err = run(monkeypatch, capsys, *(str(files.get(one, one)) for one in arguments))
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.strip().splitlines()) == 1
