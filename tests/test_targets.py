"""What commands do with the files they are given: checked before the work, printed before written."""

import errno
import json
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest

from mlx_diffgemma.cli.generate import _print_answer, _record
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.evaluation.run import EvaluationReport, TaskResult
from mlx_diffgemma.generation.request import Request
from mlx_diffgemma.generation.response import GenerationResponse
from mlx_diffgemma.generation.trace import Recorder
from mlx_diffgemma.media.images import open_image
from mlx_diffgemma.media.video import Video, _open
from mlx_diffgemma.tuning.run import read_config
from tests.helpers.in_process import run

RESULT = TaskResult("add", True, 3, 1.0, 0.5, 1.0, None, 0, None, None, None, None, None)
REPORT = EvaluationReport("diffusion", (0,), 3, {}, {}, (RESULT,))
COMMANDS_THAT_LOAD = ("generate", "chat", "evaluate", "decide", "infill", "lora", "draft")


@pytest.fixture
def unloaded(monkeypatch):
    """No command may load a model."""
    for command in COMMANDS_THAT_LOAD:
        monkeypatch.setattr(
            f"mlx_diffgemma.cli.{command}.load", lambda *_, **__: pytest.fail("loaded")
        )


@pytest.fixture
def full_disk(monkeypatch):
    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)


class TestBeforeTheWork:
    @pytest.mark.parametrize(
        "words",
        [
            ["evaluate", "--tasks", "add", "--output-dir"],
            ["draft", "evaluate", "--output-dir"],
            ["draft", "train", "--data", "prompts.jsonl", "--draft-path"],
            ["lora", "--train", "--adapter-path"],
        ],
    )
    @pytest.mark.parametrize(
        ("target", "says"),
        [
            ("file", "is a file"),
            ("file/inside", "is a file"),
            ("link/inside", "is a link to nothing"),
        ],
    )
    def test_a_folder_that_cannot_be_made(
        self, unloaded, monkeypatch, capsys, tmp_path, words, target, says
    ):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "file").write_text("mine")
        (tmp_path / "link").symlink_to("nowhere")
        code, out, err = run(monkeypatch, capsys, *words, target)
        assert (code, out, says in err) == (2, "", True), err
        assert (tmp_path / "file").read_text() == "mine"

    def test_a_drafter_does_not_go_among_other_files(self, unloaded, monkeypatch, capsys, tmp_path):
        """Also not without a path, into the folder of this package where that is the present one."""
        monkeypatch.chdir(tmp_path)
        for name in ("drafter", "trained-drafter"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "model.py").write_text("mine")
        for more in ([], ["--draft-path", "drafter"]):
            code, _, err = run(
                monkeypatch, capsys, "draft", "train", "--data", "prompts.jsonl", *more
            )
            assert (code, "did not write, such as model.py" in err) == (2, True), err
        assert sorted(path.name for path in tmp_path.rglob("*")) == [
            "drafter",
            "model.py",
            "model.py",
            "trained-drafter",
        ]

    @pytest.mark.parametrize("words", [["generate", "-p", "fox"], ["decide", "-p", "fox"]])
    @pytest.mark.parametrize(
        ("target", "says"),
        [
            ("folder", "is a folder"),
            ("none/c", "there is no folder"),
            ("pipe", "is a named pipe"),
            ("diary", "not a cache file"),
        ],
    )
    def test_a_cache_file(self, monkeypatch, capsys, tmp_path, random_pair, words, target, says):
        monkeypatch.setattr("mlx_diffgemma.cli.generate.load", lambda *_, **__: random_pair)
        monkeypatch.setattr("mlx_diffgemma.cli.decide.load", lambda *_, **__: random_pair)
        (tmp_path / "folder").mkdir()
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "diary").write_text("mine")
        code, out, err = run(
            monkeypatch, capsys, *words, "--prompt-cache-file", str(tmp_path / target)
        )
        assert (code, out, says in err) == (2, "", True), err
        assert (tmp_path / "diary").read_text() == "mine"


class TestPrintedBeforeWritten:
    def test_scores(self, full_disk, monkeypatch, capsys, tmp_path):
        monkeypatch.setattr(
            "mlx_diffgemma.cli.evaluate.load", lambda *_, **__: (SimpleNamespace(), None)
        )
        monkeypatch.setattr("mlx_diffgemma.evaluation.run.evaluate", lambda *_, **__: REPORT)
        words = ["evaluate", "--tasks", "add", "--output-dir", str(tmp_path / "out")]
        code, out, err = run(monkeypatch, capsys, *words)
        assert (code, "mean of the exact tasks: 100.0%" in out) == (2, True)
        assert "evaluate-diffusion.json cannot be written (No space left on device)" in err
        code, out, _ = run(monkeypatch, capsys, *words, "--mode", "both", "--json")
        assert (code, len(out.splitlines())) == (2, 2), (
            "those of the second mode are not lost either"
        )
        assert list((tmp_path / "out").iterdir()) == []

    def test_they_are_written(self, monkeypatch, capsys, tmp_path):
        monkeypatch.setattr(
            "mlx_diffgemma.cli.evaluate.load", lambda *_, **__: (SimpleNamespace(), None)
        )
        monkeypatch.setattr("mlx_diffgemma.evaluation.run.evaluate", lambda *_, **__: REPORT)
        monkeypatch.setenv("HOME", str(tmp_path))
        code, out, _ = run(
            monkeypatch, capsys, "evaluate", "--tasks", "add", "--output-dir=~/out", "--json"
        )
        assert code == 0
        assert json.loads((tmp_path / "out" / "evaluate-diffusion.json").read_text()) == json.loads(
            out
        )

    def test_an_answer_whose_trace_failed(self, capsys, tmp_path):
        recorder = Recorder(tmp_path / "a.jsonl", None, {})

        def responses():
            recorder.failure = UserError("the disk is full")
            yield TestConverged.PART

        with pytest.raises(UserError, match="the disk is full"):
            _print_answer(responses(), None, True, False, recorder)
        assert capsys.readouterr().out.splitlines()[0] == "a"

    def test_decisions(self, full_disk, monkeypatch, capsys, tmp_path, random_pair):
        monkeypatch.setattr("mlx_diffgemma.cli.decide.load", lambda *_, **__: random_pair)
        file = str(tmp_path / "c")
        code, out, err = run(
            monkeypatch, capsys, "decide", "-p", "fox", "--prompt-cache-file", file
        )
        assert (code, bool(out), "c cannot be written (No space left on device)" in err) == (
            2,
            True,
            True,
        )

    def test_a_drafters_worth(self, full_disk, monkeypatch, capsys, tmp_path):
        model = SimpleNamespace(dtype="float32")
        monkeypatch.setattr("mlx_diffgemma.cli.draft.load", lambda *_, **__: (model, None))
        monkeypatch.setattr("mlx_diffgemma.cli.draft.load_drafter", lambda *_, **__: None)
        monkeypatch.setattr(
            "mlx_diffgemma.cli.draft.evaluate_drafter", lambda *_, **__: {"ways": []}
        )
        monkeypatch.setattr("mlx_diffgemma.cli.draft.describe", lambda _: {})
        code, out, err = run(
            monkeypatch,
            capsys,
            "draft",
            "evaluate",
            "--json",
            "--output-dir",
            str(tmp_path / "out"),
        )
        assert (code, json.loads(out)["ways"]) == (2, [])
        assert "drafting.json cannot be written (No space left on device)" in err


class TestPathsAndMarks:
    def test_a_home_in_a_path(self, monkeypatch, tmp_path):
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / "c.yaml").write_bytes(b"\xef\xbb\xbfiters: 3\n")
        assert read_config("~/c.yaml") == {"iters": 3}

    def test_a_byte_order_mark_on_standard_input(self, monkeypatch, capsys):
        asked = []
        monkeypatch.setattr(
            "mlx_diffgemma.cli.generate.load", lambda *_, **__: (SimpleNamespace(config=None), None)
        )

        def chat_ids(_tokenizer, messages, **_options):
            asked.append(messages)
            raise UserError("this is enough")

        monkeypatch.setattr("mlx_diffgemma.cli.generate.chat_ids", chat_ids)
        monkeypatch.setattr("mlx_diffgemma.cli.generate.check_variables", lambda *_: None)
        code, _, err = run(monkeypatch, capsys, "generate", "-p", "-", stdin="\ufefffox")
        assert (code, "this is enough" in err) == (2, True)
        assert asked[0][-1]["content"] == "fox"

    def test_a_schema_with_a_mark(self, monkeypatch, tmp_path):
        from mlx_diffgemma.cli.values import constraints_of

        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / "s.json").write_bytes(b'\xef\xbb\xbf{"type": "null"}')
        assert constraints_of("~/s.json", None, None)["json_schema"] == '{"type": "null"}'

    def test_an_image_that_is_a_named_pipe(self, tmp_path):
        os.mkfifo(tmp_path / "pipe.png")
        with pytest.raises(ValueError, match="is a named pipe"):
            open_image(tmp_path / "pipe.png")
        with pytest.raises(ValueError, match="is a named pipe"):
            _open(Video(str(tmp_path / "pipe.png")))

    def test_a_video_by_a_file_url(self, tmp_path):
        (tmp_path / "a b.mp4").write_bytes(b"content")
        with _open(Video(f"file://{tmp_path}/a%20b.mp4")) as file:
            assert file.read() == b"content"


class TestConverged:
    """Of an answer it means that all of its canvases did."""

    PART = GenerationResponse(
        "a", 5, None, False, 3, 1.0, 1, 1.0, 0.1, tokens=(5,), steps=2, converged=False
    )

    @pytest.mark.parametrize("order", [(True, False), (False, True), (True, True)])
    def test_one_meaning(self, order):
        certificate = "stable-and-confident"
        parts = [
            replace(self.PART, converged=one, certificate=certificate if one else None)
            for one in order
        ]
        whole = Request.whole(SimpleNamespace(responses=parts))
        assert whole.converged == all(order)
        assert whole.certificate == (certificate if all(order) else None)
        record = _record(parts, interrupted=False)
        assert record["converged"] == all(order)
        assert record["certificate"] == (certificate if all(order) else None)
        assert [canvas["converged"] for canvas in record["canvases"]] == list(order)
