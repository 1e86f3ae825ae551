"""``mlx-diffgemma infill`` and ``edit`` as their users meet them."""

import json

import pytest

from tests.test_cli import run

TEXT = '{"name": "Anna",\r\n "age": <|hole:3|>, "city": "Paris"}\r\n'
PROMPT = "Turn this into JSON: Anna is 31 years old and lives in Paris."
FEW = ("--max-denoising-steps", "2")


@pytest.fixture
def record(tmp_path):
    path = tmp_path / "record.json"
    path.write_bytes(TEXT.encode())
    return path


def test_prefix_and_suffix(monkeypatch, capsys):
    code, out, err = run(monkeypatch, capsys, "infill", "--prefix", '{"name": "Anna", "age": ', "--suffix", ', "city": "Paris"}',
                         "-p", PROMPT, "--length", "3", "--seed", "0")
    assert (code, out, err) == (0, '{"name": "Anna", "age": 31, "city": "Paris"}\n', "")


def test_a_file_comes_back_byte_for_byte(monkeypatch, capsys, record):
    code, out, _ = run(monkeypatch, capsys, "infill", str(record), "-p", PROMPT, "--regex", "[0-9]{2}", "--seed", "0", *FEW)
    before, behind = TEXT.split("<|hole:3|>")
    assert code == 0
    assert out.startswith(before)
    assert out.endswith(behind)
    assert len(out) == len(before) + 2 + len(behind)
    assert record.read_bytes() == TEXT.encode()


def test_in_place(monkeypatch, capsys, record):
    code, out, _ = run(monkeypatch, capsys, "infill", str(record), "--choices", "31,13", "--seed", "0", "--in-place", *FEW)
    assert (code, out) == (0, "")
    assert record.read_bytes() in [TEXT.replace("<|hole:3|>", age).encode() for age in ("31", "13")]


def test_what_was_tried_is_told(monkeypatch, capsys):
    code, out, err = run(monkeypatch, capsys, "infill", "--suffix", " years old" * 40, "--length", "1-3", "--seed", "5", "--json",
                         "--verbose", *FEW)
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
    code, out, _ = run(monkeypatch, capsys, "edit", str(path), "-p", "Tell it in blue:", "--choices", "blue,green", *FEW)
    assert code == 0
    assert out in [f"One.\r\nMia was a {word} fox.\nThe end." for word in ("blue", "green")]
    plain = b"One.\r\nMia was a red fox.\nThe end."
    path.write_bytes(plain)
    code, _, _ = run(monkeypatch, capsys, "edit", str(path), "-p", "Shorter:", "--lines", "2", "--length", "4", "--in-place", *FEW)
    assert code == 0
    written = path.read_bytes()
    assert written.startswith(b"One.\r\n")
    assert written.endswith(b"\nThe end.")
    assert written != plain


@pytest.mark.parametrize(("arguments", "message"), [
    (["infill"], "There is no text"), (["infill", "none.txt"], "none.txt cannot be read"),
    (["infill", "FILE", "--prefix", "a"], "leave --prefix and --suffix out"),
    (["infill", "--prefix", "a", "--in-place"], "needs a FILE"),
    (["infill", "PLAIN"], "has no hole"), (["infill", "BYTES"], "it is not UTF-8"),
    (["infill", "--prefix", "a", "--length", "many"], "'many' is no length"),
    (["infill", "--prefix", "a", "--length", "0"], "at least 1 token"),
    (["infill", "--prefix", "a", "--regex", "("], "expression"),
    (["infill", "--prefix", "a", "--regex", "a", "--choices", "b"], "Give one"),
    (["infill", "--prefix", "a", "--temp", "-1"], "temperature"), (["infill", "--prefix", "a", "--batch-size", "0"], "batch_size"),
    (["edit", "PLAIN", "-p", "x"], "One span must be marked"),
    (["edit", "PLAIN", "-p", "x", "--lines", "9"], "no lines of a text of 2"),
    (["edit", "PLAIN", "-p", "x", "--lines", "2-1"], "no lines"), (["edit", "-", "-p", "x", "--in-place"], "needs a FILE"),
])
def test_wrong_input_is_one_line(monkeypatch, capsys, tmp_path, record, arguments, message):
    (tmp_path / "plain.txt").write_text("no hole\nhere")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe<|hole|>")
    files = {"FILE": record, "PLAIN": tmp_path / "plain.txt", "BYTES": tmp_path / "bytes.txt"}
    code, out, err = run(monkeypatch, capsys, *(str(files.get(one, one)) for one in arguments))
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.strip().splitlines()) == 1
