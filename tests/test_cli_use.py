"""The command as a person meets it: near names, hints, tables, thoughts, progress, Ctrl-C."""

import io
import random
import re
import threading
import warnings
from dataclasses import replace

import pytest
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.console import Console

from mlx_diffgemma.cli import answer, output, progress
from mlx_diffgemma.cli.app import COMMANDS
from mlx_diffgemma.cli.chat import COMMANDS as CHAT_COMMANDS
from mlx_diffgemma.cli.chat import _take_turn
from mlx_diffgemma.cli.command import OTHER_NAMES
from mlx_diffgemma.cli.generate import _print_answer
from mlx_diffgemma.cli.hints import hint_for
from mlx_diffgemma.cli.line_editor import CommandCompleter, LineEditor
from mlx_diffgemma.errors import GenerationWarning
from mlx_diffgemma.evaluation.nano_tasks import TASKS
from mlx_diffgemma.generation.response import GenerationResponse
from tests.helpers.in_process import generate, run
from tests.test_cli_options import commands
from tests.test_live import step

RESPONSE = GenerationResponse(
    "yes", 5, None, False, 3, 1.0, 1, 1.0, 0.1, tokens=(5,), steps=2, certificate="x"
)


class TestNearNames:
    @pytest.mark.parametrize(
        ("command", "written", "meant"),
        [
            ("generate", "--steps", "--max-denoising-steps"),
            ("generate", "--max-new-tokens", "--max-tokens"),
            ("generate", "--temperature=1", "--temp"),
            ("generate", "--max_tokens", "--max-tokens"),
            ("generate", "--sytem-prompt", "--system-prompt"),
            ("lora", "--steps", "--iters"),
            ("convert", "--bits", "--q-bits"),
            ("draft train", "--lr", "--learning-rate"),
        ],
    )
    def test_the_right_option_is_named(self, monkeypatch, capsys, command, written, meant):
        code, out, err = run(monkeypatch, capsys, *command.split(), written, "3")
        assert (code, out) == (2, "")
        assert f"No such option: {written.partition('=')[0]}; did you mean {meant}?" in err

    def test_what_is_near_nothing(self, monkeypatch, capsys):
        assert "did you mean" not in run(monkeypatch, capsys, "info", "--zzz")[2]

    def test_every_option_of_the_table_is_one_of_some_command(self):
        known = {name for _, command in commands() for own in command.params for name in own.opts}
        assert {meant for names in OTHER_NAMES.values() for meant in names} <= known


class TestPrompt:
    def test_it_may_stand_alone(self, monkeypatch, capsys):
        alone = generate(monkeypatch, capsys, "Is 47 greater than 38?")
        assert alone == (0, "yes\n", "")

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (("fox", "-p", "fox"), "The prompt is given twice"),
            ((), "There is no prompt; give one"),
            (("",), "The prompt is empty"),
        ],
    )
    def test_mistakes(self, monkeypatch, capsys, arguments, says):
        code, out, err = run(monkeypatch, capsys, "generate", *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert says in err


class TestHint:
    @pytest.mark.parametrize("task", TASKS)
    def test_none_for_what_nano_knows(self, task):
        rng = random.Random(0)
        for _ in range(50):
            example = TASKS[task].make(rng, True)
            assert hint_for("nano", None, example.prompt) is None, example.prompt

    @pytest.mark.parametrize("prompt", ["Who was Napoleon?", "Translate this to French: fox"])
    def test_the_tasks_are_named(self, prompt):
        assert "short stories" in hint_for("nano", None, prompt)
        assert hint_for("another/model", None, prompt) is None
        assert hint_for("nano", "adapters", prompt) is None

    def test_it_goes_to_standard_error(self, monkeypatch, capsys):
        code, out, err = generate(monkeypatch, capsys, "Who was Napoleon?", "--max-tokens", "4")
        assert (code, "hint: nano" in err, "hint" in out) == (0, True, False)


class TestTables:
    def shown(self, monkeypatch, table, width):
        out = io.StringIO()
        monkeypatch.setattr(
            output, "output", Console(file=out, force_terminal=True, width=width, color_system=None)
        )
        output.print_table(table)
        return out.getvalue()

    def table(self):
        table = output.new_table(*(f"column {number}" for number in range(9)))
        table.add_row(*(f"{number}-unexplained" for number in range(9)))
        return table

    def test_nothing_is_cut_on_a_terminal(self, monkeypatch):
        lines = self.shown(monkeypatch, self.table(), 80).splitlines()
        assert max(map(len, lines)) <= 80
        assert "…" not in "".join(lines)
        rule = next(number for number, line in enumerate(lines) if "─" in line)
        columns = list(zip(*(line.ljust(80) for line in lines[rule + 1 :])))
        text = re.sub(r"\s", "", "".join("".join(column) for column in columns))
        assert sorted(text) == sorted("".join(f"{number}-unexplained" for number in range(9)))

    def test_whole_in_a_pipe(self, capsys):
        output.print_table(self.table())
        assert any(
            all(f"{number}-unexplained" in line for number in range(9))
            for line in capsys.readouterr().out.splitlines()
        )

    def test_every_command_with_a_table_has_a_record(self):
        with_tables = {
            "info",
            "convert",
            "estimate",
            "doctor",
            "evaluate",
            "parity",
            "decide",
            "draft evaluate",
        }
        names = {name for name, own in commands() if any("--json" in p.opts for p in own.params)}
        assert with_tables <= names
        assert names >= set(COMMANDS) - {"chat", "serve", "draft"}


class TestStreaming:
    def test_a_warning_waits_for_the_end_of_the_text(self, monkeypatch, capsys):
        events = []
        monkeypatch.setattr(output.errors, "print", lambda text, **_: events.append(text))
        monkeypatch.setattr(
            "builtins.print", lambda text="", **options: events.append(text) if text else None
        )

        def responses():
            yield RESPONSE
            output.warn("Canvas 0 did not converge.")
            yield replace(RESPONSE, text=" indeed")

        _print_answer(responses(), None, False, False)
        assert events == ["yes", " indeed", "warning: Canvas 0 did not converge."]

    def test_the_command_warns_that_way(self, monkeypatch, capsys):
        from mlx_diffgemma.cli import app

        with output.streaming():
            app._show_warning("late", GenerationWarning)
            assert capsys.readouterr().err == ""
        assert capsys.readouterr().err == "warning: late\n"
        with warnings.catch_warnings():
            app._show_warning("now", GenerationWarning)
        assert capsys.readouterr().err == "warning: now\n"

    def test_the_thought_comes_first_and_is_labelled(self, monkeypatch):
        events = []
        monkeypatch.setattr(answer.errors, "print", lambda text, **_: events.append(text))
        monkeypatch.setattr(
            "builtins.print", lambda text="", **options: events.append(text) if text else None
        )
        _print_answer(iter([replace(RESPONSE, thought="47 and 38. ")]), None, False, True)
        assert events[:2] == ["thought: 47 and 38.", "yes"]


class TestTrace:
    def test_the_file_is_named(self, monkeypatch, capsys, tmp_path):
        file = tmp_path / "a.jsonl"
        code, _, err = generate(monkeypatch, capsys, "Is 47 greater than 38?", "--trace", str(file))
        assert (code, err) == (0, f"trace: {file}\n")
        assert file.exists()


class TestInterrupted:
    def test_the_canvas_is_shown(self, monkeypatch, capsys, nano_pair):
        tokenizer = nano_pair[1]
        flight = answer.CanvasInFlight(tokenizer, (1,))
        ids = tokenizer.encode("fox moon", add_special_tokens=False)

        def responses():
            flight.step(step([*ids, 1, *ids], 3))
            raise KeyboardInterrupt
            yield

        with pytest.raises(BaseException) as left:
            _print_answer(responses(), None, False, False, None, flight)
        assert left.value.exit_code == 130
        err = capsys.readouterr().err
        assert "the unfinished canvas after 4 of at most 8 steps: fox moon\n" in err

    def test_a_finished_canvas_is_not_shown_again(self, capsys, nano_pair):
        flight = answer.CanvasInFlight(nano_pair[1], (1,))
        ids = nano_pair[1].encode("fox", add_special_tokens=False)
        flight.step(step(ids, 0))
        flight.step(step(ids, 1, "converged"))
        flight.report()
        assert capsys.readouterr().err == ""

    def test_a_turn_of_a_conversation(self, capsys, nano_pair):
        from mlx_diffgemma.generation.chat import Chat

        talk = Chat(*nano_pair, seed=5)
        ids = nano_pair[1].encode("fox", add_special_tokens=False)

        def send(_text, on_step, _images):
            on_step(step(ids, 0))
            raise KeyboardInterrupt
            yield

        talk.send = send
        assert not _take_turn(talk, "hello", [], True)
        err = capsys.readouterr().err
        assert "the unfinished canvas after 1 of at most 8 steps: fox" in err
        assert "interrupted" in err


@pytest.fixture
def typed():
    """What the line editor reads of keys."""

    def read(*keys, times=1):
        with create_pipe_input() as pipe:
            editor = LineEditor(CHAT_COMMANDS, input=pipe, output=DummyOutput())
            pipe.send_text("".join(keys))
            return [editor.read() for _ in range(times)]

    return read


class TestLineEditor:
    ALT_ENTER, UP, CTRL_C, CTRL_D, TAB = "\x1b\r", "\x1b[A", "\x03", "\x04", "\t"

    def test_a_line(self, typed):
        assert typed("Add 1 and 2.\r") == ["Add 1 and 2."]

    def test_several_lines(self, typed):
        assert typed("one", self.ALT_ENTER, "two\r") == ["one\ntwo"]

    def test_a_pasted_block_stays_whole(self, typed):
        assert typed("\x1b[200~one\ntwo\n\x1b[201~\r") == ["one\ntwo\n"]

    def test_history(self):
        with create_pipe_input() as pipe:
            editor = LineEditor(CHAT_COMMANDS, input=pipe, output=DummyOutput())
            pipe.send_text("one\r")
            assert editor.read() == "one"
            # The editor reads its history beside its keys.
            threading.Timer(0.5, pipe.send_text, [f"{self.UP}\r"]).start()
            assert editor.read() == "one"

    def test_control_c_clears_and_a_second_one_ends(self, typed):
        assert typed("half", self.CTRL_C, "whole\r") == ["whole"]
        assert typed("half", self.CTRL_C, self.CTRL_C) == [None]
        assert typed(self.CTRL_C, "whole\r", self.CTRL_C, "x\r", times=2) == ["whole", "x"]
        assert typed(self.CTRL_C, self.CTRL_C) == [None]

    def test_after_an_answer_was_interrupted_one_is_enough(self):
        with create_pipe_input() as pipe:
            editor = LineEditor(CHAT_COMMANDS, input=pipe, output=DummyOutput())
            editor.interrupted()
            pipe.send_text(self.CTRL_C)
            assert editor.read() is None

    def test_control_d_ends(self, typed):
        assert typed(self.CTRL_D) == [None]

    def test_completion(self, tmp_path):
        (tmp_path / "cat.png").write_text("")
        completer = CommandCompleter(CHAT_COMMANDS)

        def completed(text):
            return [c.text for c in completer.get_completions(Document(text, len(text)), None)]

        assert completed("/s") == ["/system", "/stats"]
        assert completed("say /s") == []
        assert completed(f"/image {tmp_path}/c") == ["at.png"]


class TestProgress:
    def test_lines_off_a_terminal(self, capsys):
        now = iter([0.0, 0.0, 5.0, 20.0, 21.0, 40.0])
        with progress.Bars(clock=lambda: next(now)) as bars:
            for done in (1, 2, 3, 4):
                bars.update("answering", done, 10)
        lines = capsys.readouterr().err.splitlines()
        assert lines == [
            "answering: 2 of 10, 20%, 80 s left",
            "answering: 4 of 10, 40%, 60 s left",
        ]

    @pytest.mark.parametrize(
        ("seconds", "text"), [(40, "40 s"), (180, "3 min"), (7500, "2 h 5 min")]
    )
    def test_time_left(self, seconds, text):
        assert progress.time_left(seconds) == text


def test_lora_trains_all_layers_of_a_smaller_model(monkeypatch, capsys, tmp_path):
    """With nothing but --train, on the default model."""
    chosen = []

    def prepare(_network, _tokenizer, options, *_):
        chosen.append(options.adapter.num_layers)
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mlx_diffgemma.cli.lora.Run.prepare", prepare)
    run(monkeypatch, capsys, "lora", "--train")
    run(monkeypatch, capsys, "lora", "--train", "--num-layers", "2")
    (tmp_path / "c.yaml").write_text("num_layers: 16\n")
    run(monkeypatch, capsys, "lora", "--train", "-c", "c.yaml")
    assert chosen == [6, 2, 16]


def test_an_argument_is_not_offered_as_an_option(monkeypatch, capsys):
    code, _, err = run(monkeypatch, capsys, "info", "--model", "nano")
    assert (code, "did you mean" in err) == (2, False)


@pytest.mark.parametrize("command", ["evaluate", "draft evaluate"])
def test_a_number_of_seeds_has_an_end(command, monkeypatch, capsys):
    code, _, err = run(monkeypatch, capsys, *command.split(), "--num-seeds", str(10**30))
    assert (code, "100000" in err) == (2, True)
