"""Traces: what a frame says of a step, what the files hold, and that recording changes nothing."""

import contextlib
import io
import json
import math
import re
import sys
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_diffgemma import chat_ids, stream_generate
from mlx_diffgemma.cli import main
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.generation import trace
from mlx_diffgemma.generation.trace import FORMAT, Recorder, Tracer, replay_page
from tests.helpers.steps import STORY, ids_of, records_of, step

ENDS = (1, 5, 13)


@pytest.fixture
def tracer(nano_pair):
    return Tracer(nano_pair[1], ENDS)


class TestFrames:
    @pytest.mark.parametrize(
        "text",
        [
            "fox",
            "a 🦊👩‍👩‍👧 and 日本語 é",
            "\ufffd stands for itself",
            "<|channel>thought\n<channel|>tab\tend\r\n",
        ],
    )
    def test_pieces_join_to_the_decoded_text(self, tracer, nano_pair, text):
        pieces = tracer.pieces(nano_pair[1].encode(text, add_special_tokens=False))
        assert "".join(pieces) == text

    def test_a_character_of_several_tokens_stands_whole(self, tracer, nano_pair):
        ids = ids_of(nano_pair, "a🦊é")
        assert len(ids) > 4
        pieces = tracer.pieces(ids)
        assert [piece for piece in pieces if piece] == ["a", "🦊", "é"]
        assert len(pieces) == len(ids)

    @given(
        st.lists(st.integers(20, 1023), max_size=24) | st.lists(st.integers(100, 300), max_size=12)
    )
    @settings(max_examples=60, deadline=None)
    def test_noise_is_decoded_as_the_tokenizer_does(self, nano_pair, ids):
        tracer = Tracer(nano_pair[1], ENDS)
        pieces = tracer.pieces(ids)
        assert len(pieces) == len(ids)
        assert "".join(pieces) == nano_pair[1].decode(ids, skip_special_tokens=False)

    def test_what_a_frame_holds(self, tracer, nano_pair):
        ids = ids_of(nano_pair, "red fox")
        found = replace(
            step(ids, 3),
            accepted=mx.array([True, False, *[True] * (len(ids) - 2)]),
            canvas_index=2,
            retry=1,
        )
        frame = tracer.frame(found)
        assert frame == {
            "canvas": 2,
            "retry": 1,
            "step": 3,
            "max_steps": 8,
            "pieces": tracer.pieces(ids),
            "entropy": [1.0] * len(ids),
            "accepted": "10" + "1" * (len(ids) - 2),
            "mean_entropy": 1.0,
            "reason": None,
            "certificate": None,
        }
        assert json.loads(json.dumps(frame, allow_nan=False)) == frame

    def test_positions_after_the_first_end_token_are_left_out_and_control_tokens_shown(
        self, tracer, nano_pair
    ):
        ids = ids_of(nano_pair, "<|channel>fox")
        frame = tracer.frame(replace(step([*ids, 5, 7, 1]), draft=mx.array([*ids, 5, 7, 1])))
        assert "".join(frame["pieces"]) == "<|channel>fox"
        assert {len(frame[name]) for name in ("pieces", "entropy", "accepted", "draft")} == {
            len(ids)
        }
        assert tracer.frame(step([1, 7]))["pieces"] == []

    def test_what_became_of_a_draft(self, tracer, nano_pair):
        ids = ids_of(nano_pair, "fox moon")
        guess = [-1, 9, *ids[2:]]
        assert tracer.frame(replace(step(ids), draft=mx.array(guess)))["draft"] == "02" + "1" * (
            len(ids) - 2
        )
        assert "draft" not in tracer.frame(step(ids))
        assert tracer.frame(replace(step(ids), rejected=True, reason="max_steps"))["rejected"]

    def test_numbers_that_json_does_not_know_are_null(self, tracer, nano_pair):
        ids = ids_of(nano_pair, "fox")
        entropy = mx.array([math.inf, math.nan, -0.0, 0.12345][: len(ids)] + [0.5] * (len(ids) - 4))
        frame = tracer.frame(replace(step(ids), entropy=entropy, mean_entropy=math.inf))
        assert frame["entropy"][:2] == [None, None]
        assert frame["mean_entropy"] is None
        assert "-0.0" not in json.dumps(frame, allow_nan=False)


class TestRecorder:
    def record(self, path, tracer, steps, footer=True, **header):
        now = iter(range(100))
        with Recorder(path, tracer, header, clock=lambda: next(now)) as recorder:
            for one in steps:
                recorder.step(one)
            if footer:
                recorder.finish("fox", "stop", tokens=2, tokens_per_second=math.inf)

    @pytest.mark.parametrize("name", ["a.jsonl", "a.html"])
    def test_header_frames_footer(self, tracer, nano_pair, tmp_path, name):
        steps = [step(ids_of(nano_pair, "fox"), number) for number in range(3)]
        self.record(
            tmp_path / name,
            tracer,
            [replace(steps[0], step=-1), *steps],
            model="nano",
            prompt="\udcff",
        )
        header, *frames, footer = records_of(tmp_path / name)
        assert header["format"] == FORMAT
        assert header["prompt"] == "\udcff", "what a command line may hold"
        assert [frame["seconds"] for frame in frames] == [1, 2, 3, 4]
        assert [
            {name: value for name, value in frame.items() if name != "seconds"}
            for frame in frames[1:]
        ] == [tracer.frame(one) for one in steps]
        assert footer == {
            "text": "fox",
            "finish_reason": "stop",
            "tokens": 2,
            "tokens_per_second": None,
            "steps": 3,
            "seconds": 5,
        }

    def test_no_text_can_end_the_element_it_stands_in(self, tracer, nano_pair, tmp_path):
        evil = "</script><script>alert(1)</script><!-- <img src=x onerror=alert(1)> & \u2028"
        self.record(tmp_path / "a.html", tracer, [step(ids_of(nano_pair, evil))], prompt=evil)
        text = (tmp_path / "a.html").read_text(encoding="utf-8")
        assert text.count("</script>") == replay_page()[0].count("</script>") + 1, (
            "only the page's own"
        )
        header, frame, _ = records_of(tmp_path / "a.html")
        assert header["prompt"] == evil
        assert "".join(frame["pieces"]) == evil

    def test_the_page_needs_nothing_else_and_allows_only_its_own_script(self):
        page = "".join(replay_page())
        assert "{{" not in page
        assert not re.search(r"(src|href)=|@import|url\(|https?://(?!www\.w3\.org/2000/svg)", page)
        assert page.count("sha256-") == 2
        assert (
            "</script"
            not in (trace.PAGE / "canvas.js").read_text() + (trace.PAGE / "replay.js").read_text()
        )

    def test_every_line_is_there_at_once(self, tracer, nano_pair, tmp_path):
        path = tmp_path / "a.jsonl"
        with Recorder(path, tracer, {}) as recorder:
            recorder.step(step(ids_of(nano_pair, "fox")))
            assert len(records_of(path)) == 2

    def test_an_error_in_the_middle_leaves_a_whole_page(self, tracer, nano_pair, tmp_path):
        def fail():
            with Recorder(tmp_path / "a.html", tracer, {}) as recorder:
                recorder.step(step(ids_of(nano_pair, "fox")))
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            fail()
        assert (tmp_path / "a.html").read_text().rstrip().endswith("</html>")
        assert len(records_of(tmp_path / "a.html")) == 2

    def test_a_full_disk_is_one_line(self, tracer, nano_pair, tmp_path):
        (tmp_path / "a.jsonl").symlink_to("/dev/full")
        with (
            pytest.raises(UserError, match="cannot be written .No space left"),
            Recorder(tmp_path / "a.jsonl", tracer, {}),
        ):
            pass

    def test_a_disk_that_fills_up_does_not_end_the_answer(self, tracer, nano_pair, tmp_path):
        with Recorder(tmp_path / "a.jsonl", tracer, {}) as recorder:
            recorder.step(step(ids_of(nano_pair, "fox")))
            with contextlib.suppress(OSError), open("/dev/full", "w") as full:
                recorder._file, own = full, recorder._file
                recorder.step(step(ids_of(nano_pair, "fox")))
                recorder._file = own
            recorder.step(step(ids_of(nano_pair, "owl")))
            recorder.finish("fox", "stop")
        assert len(records_of(tmp_path / "a.jsonl")) == 2
        assert "cannot be written (No space left on device)" in str(recorder.failure)


def command(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["mlx-diffgemma", "generate", *arguments])
    try:
        main()
        code = 0
    except SystemExit as left:
        code = left.code or 0
    return code, *capsys.readouterr()


class TestCommand:
    def test_recording_changes_no_token(self, nano_pair, tracer, tmp_path):
        model, tokenizer = nano_pair
        ids = chat_ids(tokenizer, [{"role": "user", "content": STORY}])

        def answer(on_step=None):
            return [
                (r.text, r.tokens, r.steps, r.logprobs.tolist())
                for r in stream_generate(
                    model,
                    tokenizer,
                    ids,
                    seed=3,
                    max_tokens=60,
                    max_denoising_steps=6,
                    on_step=on_step,
                )
            ]

        with Recorder(tmp_path / "a.jsonl", tracer, {}) as recorder:
            assert answer(recorder.step) == answer()
        assert len(records_of(tmp_path / "a.jsonl")) > 3

    def test_the_file_holds_the_answer_and_how_it_came_about(self, monkeypatch, capsys, tmp_path):
        path, asked = (
            tmp_path / "a.jsonl",
            ["-p", STORY, "--seed", "7", "-m", "80", "--max-denoising-steps", "5", "--json"],
        )
        plain = command(monkeypatch, capsys, *asked)
        traced = command(monkeypatch, capsys, *asked, "--trace", str(path))
        assert traced[1].splitlines()[:-1] == plain[1].splitlines()[:-1]
        said = json.loads(traced[1].splitlines()[-1])
        header, *frames, footer = records_of(path)
        assert header["model"] == "nano"
        assert (header["prompt"], header["seed"], header["options"]) == (
            STORY,
            7,
            {"max_tokens": 80, "max_denoising_steps": 5},
        )
        assert footer["text"] == said["text"]
        assert (footer["tokens"], footer["steps"], footer["seed"]) == (
            said["generation_tokens"],
            said["steps"],
            7,
        )
        assert footer["finish_reason"] == said["finish_reason"] == "length"
        assert len(frames) == said["steps"]
        whole = "".join("".join(frame["pieces"]) for frame in frames if frame["reason"])
        assert whole.startswith(said["text"])
        assert [frame["canvas"] for frame in frames if frame["reason"]] == [0, 1]
        assert np.isfinite([nats for frame in frames for nats in frame["entropy"]]).all()

    def test_beside_a_drafter_a_preset_and_a_constraint(self, monkeypatch, capsys, tmp_path):
        path = tmp_path / "a.html"
        code, _, _ = command(
            monkeypatch,
            capsys,
            "-p",
            "20 + 55 =",
            "--seed",
            "1",
            "--draft-model",
            "nano-drafter",
            "--trace",
            str(path),
        )
        assert code == 0
        assert [(frame["step"], frame["draft"]) for frame in records_of(path)[1:-1]] == [
            (-1, "11")
        ], "a draft committed at once"
        assert records_of(path)[0]["options"] == {"draft_model": "nano-drafter"}
        code, out, _ = command(
            monkeypatch,
            capsys,
            "-p",
            "Is 47 greater than 38?",
            "--choices",
            "yes,no",
            "--preset",
            "fast",
            "--trace",
            str(path),
        )
        assert code == 0
        assert records_of(path)[-1]["text"] == out.strip()
        assert isinstance(records_of(path)[-1]["seed"], int), "the fresh one that was drawn"

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (["--trace", "answer.txt"], "answer.txt must end in .html or .jsonl"),
            (["--trace", "/no/such/folder/a.html"], "there is no folder /no/such/folder"),
            (["--trace", "folder.html"], "folder.html cannot be written"),
            (["--trace", "diary.html"], "diary.html is no trace and stays as it is"),
            (["--trace", "a.html", "--mode", "ar"], "mode 'ar' runs none"),
        ],
    )
    def test_refused_before_anything_is_loaded(
        self, monkeypatch, capsys, tmp_path, arguments, says
    ):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "folder.html").mkdir()
        (tmp_path / "diary.html").write_text("<p>Dear diary")
        monkeypatch.setattr(
            "mlx_diffgemma.cli.generate.load", lambda *_, **__: pytest.fail("loaded")
        )
        code, out, err = command(monkeypatch, capsys, "-p", "fox", *arguments)
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert says in err
        assert sorted(path.name for path in tmp_path.iterdir()) == ["diary.html", "folder.html"]

    def test_a_refused_prompt_leaves_the_trace_of_before(self, monkeypatch, capsys, tmp_path):
        (tmp_path / "a.jsonl").write_text("before")
        code, _, _ = command(
            monkeypatch, capsys, "-p", "7" * 9000, "--trace", str(tmp_path / "a.jsonl")
        )
        assert code == 2
        assert (tmp_path / "a.jsonl").read_text() == "before"

    @pytest.mark.parametrize("name", ["a.jsonl", "a.html"])
    def test_an_interrupted_run_leaves_a_readable_file(self, monkeypatch, capsys, tmp_path, name):
        record, seen = Recorder.step, io.StringIO()

        def interrupted(self, found):
            record(self, found)
            seen.write(".")
            if len(seen.getvalue()) == 4:
                raise KeyboardInterrupt

        monkeypatch.setattr(Recorder, "step", interrupted)
        code, _, err = command(
            monkeypatch, capsys, "-p", STORY, "--seed", "7", "--trace", str(tmp_path / name)
        )
        assert code == 130
        assert "interrupted after 0 tokens" in err
        _, *frames, footer = records_of(tmp_path / name)
        assert len(frames) == 4
        assert (footer["text"], footer["finish_reason"], footer["steps"]) == ("", "interrupted", 4)
