"""The command as its users meet it; every mistake is one line and exit code 2."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import mlx.core as mx
import pytest
from typer.testing import CliRunner

from mlx_diffgemma import chat_ids, load, nano
from mlx_diffgemma.cli.app import app
from mlx_diffgemma.diagnostics import diagnosis, doctor
from mlx_diffgemma.errors import UserError
from tests.helpers.command import COMMAND
from tests.helpers.in_process import generate, run
from tests.variants import few


class TestGenerate:
    def test_prints_the_answer_and_nothing_else(self, monkeypatch, capsys):
        code, out, err = generate(monkeypatch, capsys, "-p", "Is 47 greater than 38?")
        assert (code, out, err) == (0, "yes\n", "")
        _, other, _ = generate(monkeypatch, capsys, "-p", "Is 38 greater than 47?")
        assert other == "no\n"

    def test_json_is_the_last_line(self, monkeypatch, capsys):
        _, out, _ = generate(monkeypatch, capsys, "-p", "Is 47 greater than 38?", "--json")
        text, record = out.splitlines()[:-1], json.loads(out.splitlines()[-1])
        assert record["text"] == "\n".join(text)
        assert {
            "steps",
            "tokens_per_forward",
            "generation_tps",
            "seed",
            "converged",
            "finish_reason",
            "canvases",
        } <= set(record)

    def test_standard_input(self, monkeypatch, capsys):
        given = generate(monkeypatch, capsys, "-p", "Is 47 greater than 38?")
        assert generate(monkeypatch, capsys, "-p", "-", stdin="Is 47 greater than 38?") == given

    def test_show_changes_nothing_off_a_terminal(self, monkeypatch, capsys):
        assert generate(monkeypatch, capsys, "-p", "Add 1 and 2.", "--show") == generate(
            monkeypatch, capsys, "-p", "Add 1 and 2."
        )

    def test_verbose_figures_go_to_standard_error(self, monkeypatch, capsys):
        _, out, err = generate(monkeypatch, capsys, "-p", "Add 1 and 2.", "--verbose")
        assert "tokens a forward" in err
        assert "tokens a forward" not in out

    def test_ar_mode_and_prefilled_answers(self, monkeypatch, capsys):
        code, out, _ = generate(
            monkeypatch,
            capsys,
            "-p",
            "Turn this into JSON: Anna is a red fox.",
            "--mode",
            "ar",
            "--prefill-response",
            '{"name": "',
            "--json",
        )
        assert code == 0
        assert not json.loads(out.splitlines()[-1])["text"].startswith("{")

    def test_unconverged_canvases_are_told(self, monkeypatch, capsys):
        _, _, err = generate(
            monkeypatch, capsys, "-p", "Add 1 and 2.", "--max-denoising-steps", "1"
        )
        assert err.startswith("warning: Canvas 0 did not converge")
        assert err.count("\n") == 1


@pytest.fixture
def broken(tmp_path):
    return shutil.copytree(nano.FOLDER, tmp_path / "broken")


class TestMistakes:
    def refuse(self, monkeypatch, capsys, *arguments, says, **options):
        code, out, err = run(monkeypatch, capsys, *arguments, **options)
        assert code == 2
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1, err
        assert says in err

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (["--model", "/no/such/folder"], "no folder '/no/such/folder'"),
            (["--model", "nanoo"], "no folder 'nanoo'"),
            (["--temp", "3"], "temperature must lie between 0 and 2"),
            (["--mode", "turbo"], "Unknown mode 'turbo'"),
            (["--max-tokens", "0"], "max_tokens must be at least 1"),
            (["--max-tokens", "9000"], "max_tokens 9,000 does not fit"),
            (["--top-p", "0"], "top_p"),
            (["--dtype", "int8"], "Unknown dtype 'int8'"),
            (["--mode", "ar", "--t-min", "0.1"], "t_min has no meaning"),
            (["--t-max", "0.1"], "t_min and t_max"),
            (["--entropy-bound", "-1"], "entropy_bound must be above 0"),
            (["--chat-template-config", "{"], "--chat-template-config is not valid JSON"),
            (["--chat-template-config", "[1]"], "must be a JSON object"),
            (["--ignore-chat-template", "--think"], "--ignore-chat-template leaves no place"),
        ],
    )
    def test_options(self, monkeypatch, capsys, arguments, says):
        self.refuse(monkeypatch, capsys, "generate", "-p", "fox", *arguments, says=says)

    @pytest.mark.parametrize("text", ["", "  "])
    def test_empty_prompt(self, monkeypatch, capsys, text):
        self.refuse(monkeypatch, capsys, "generate", "-p", text, says="prompt is empty")
        self.refuse(monkeypatch, capsys, "generate", "-p", "-", says="prompt is empty", stdin=text)

    def test_another_model(self, monkeypatch, capsys, broken):
        (broken / "config.json").write_text('{"model_type": "gemma4"}')
        self.refuse(
            monkeypatch, capsys, "generate", "-p", "fox", "--model", str(broken), says="use mlx-lm"
        )

    def test_truncated_weights(self, monkeypatch, capsys, broken):
        path = broken / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-5000])
        self.refuse(
            monkeypatch,
            capsys,
            "generate",
            "-p",
            "fox",
            "--model",
            str(broken),
            says="damaged or cut off",
        )

    def test_no_tokenizer(self, monkeypatch, capsys, broken):
        for path in broken.glob("tokenizer*"):
            path.unlink()
        self.refuse(
            monkeypatch,
            capsys,
            "generate",
            "-p",
            "fox",
            "--model",
            str(broken),
            says="no tokenizer.json",
        )

    def test_prompt_beyond_the_context(self, monkeypatch, capsys):
        self.refuse(monkeypatch, capsys, "generate", "-p", "7" * 9000, says="shorten the prompt")

    def test_unknown_task(self, monkeypatch, capsys):
        self.refuse(
            monkeypatch, capsys, "evaluate", "--tasks", "chess", says="Unknown task 'chess'"
        )

    def test_unknown_device(self, monkeypatch, capsys):
        self.refuse(monkeypatch, capsys, "parity", "--device", "tpu", says="Unknown device 'tpu'")

    def test_unknown_option_is_no_traceback(self, monkeypatch, capsys):
        code, _, err = run(monkeypatch, capsys, "generate", "-p", "fox", "--tempp", "1")
        assert code == 2
        assert "--tempp" in err
        assert "Traceback" not in err

    def test_damaged_numbers_stop_the_run(self, monkeypatch, capsys, broken):
        tensors = mx.load(str(broken / "model.safetensors"))
        tensors["model.decoder.norm.weight"] = tensors["model.decoder.norm.weight"] * float("nan")
        mx.save_safetensors(str(broken / "model.safetensors"), tensors)
        code, out, err = run(monkeypatch, capsys, "generate", "-p", "fox", "--model", str(broken))
        assert code == 1
        assert "NaN or infinity" in err
        assert out.strip() == ""


class TestOtherCommands:
    def test_info(self, monkeypatch, capsys):
        code, out, _ = run(monkeypatch, capsys, "info", "--json")
        record = json.loads(out)
        assert code == 0
        assert record["experts"] == 8
        assert record["canvas_length"] == 64
        assert record["stored_bytes"] < 8e6
        assert "sssssF" in run(monkeypatch, capsys, "info")[1]

    def test_info_needs_no_tokenizer(self, monkeypatch, capsys, tiny_folder):
        assert run(monkeypatch, capsys, "info", str(tiny_folder))[0] == 0

    @pytest.mark.parametrize("whole", few([True, False], False))
    def test_doctor(self, monkeypatch, capsys, whole):
        """In the fast pass with two ways to answer, of which tests/test_doctor.py takes each, and
        one timed step.
        """
        if not whole:
            for name in set(diagnosis.WAYS) - {"left to right", "constraints"}:
                monkeypatch.delitem(diagnosis.WAYS, name)
            check = doctor.check
            monkeypatch.setattr(doctor, "check", lambda *args: check(*args[:-1], 1))
        code, out, _ = run(monkeypatch, capsys, "doctor")
        record = json.loads(out.splitlines()[-1])
        assert code == 0
        assert record["ok"]
        assert record["nano"] == nano.VERSION
        assert {c["name"]: c["ok"] for c in record["checks"]} == {
            "float32": True,
            "bfloat16": True,
            "4bit": True,
        }
        packed = record["checks"][2]
        assert packed["logits"] < 1e-3, "the reference on the dequantised weights"
        assert packed["trajectory"] == packed["trajectory_steps"]
        assert {"device", "chip", "blas", "mlx", "os"} <= set(record["machine"])
        assert [way["name"] for way in record["ways"] if not way["ok"]] == []
        assert [way["name"] for way in record["ways"]] == [
            f"{name}, {dtype}" for dtype in ("float32", "bfloat16") for name in diagnosis.WAYS
        ]
        assert record["deep"] == []

    @pytest.mark.slow
    def test_doctor_notices_other_numbers(self, monkeypatch, capsys):
        from mlx_diffgemma.model import diffusion_gemma

        head = diffusion_gemma.DiffusionGemma.logits
        monkeypatch.setattr(
            diffusion_gemma.DiffusionGemma, "logits", lambda self, h: head(self, h) * 1.01
        )
        code, _, err = run(monkeypatch, capsys, "doctor", "--json")
        assert code == 1
        assert "something else than the reference" in err

    def test_evaluate(self, monkeypatch, capsys, tmp_path):
        code, out, _ = run(
            monkeypatch,
            capsys,
            "evaluate",
            "--tasks",
            "compare",
            "--limit",
            "4",
            "--mode",
            "both",
            "--output-dir",
            str(tmp_path),
        )
        assert code == 0
        assert "compare" in out
        record = json.loads((tmp_path / "evaluate-diffusion.json").read_text())
        assert record["model"] == nano.VERSION
        assert record["results"][0]["answers"] == 4

    def test_parity(self, monkeypatch, capsys, tiny_folder):
        code, out, _ = run(
            monkeypatch,
            capsys,
            "parity",
            "--model",
            str(tiny_folder),
            "--prompts",
            "2",
            "--canvases",
            "1",
            "--json",
        )
        record = json.loads(out)
        assert {s["stage"] for s in record["stages"]} >= {
            "encoder hidden states",
            "cache",
            "logits, self-conditioned",
        }
        assert all(t["canvases"] for t in record["trajectories"])
        assert code == (0 if record["ok"] else 1)

    def test_version_and_help(self):
        assert CliRunner().invoke(app, ["--version"]).output.strip()
        for command in ("generate", "info", "convert", "doctor", "evaluate", "parity"):
            assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0


@pytest.mark.slow
def test_ctrl_c_ends_cleanly_with_what_was_finished(tmp_path):
    """A real process, interrupted in the middle of a long story that never ends."""
    folder = shutil.copytree(nano.FOLDER, tmp_path / "endless")
    config = json.loads((folder / "generation_config.json").read_text()) | {
        "eos_token_id": [1000],
        "max_denoising_steps": 2,
    }
    (folder / "generation_config.json").write_text(json.dumps(config))
    process = subprocess.Popen(
        [*COMMAND, "generate", "--model", str(folder), "-p", "Tell me a story.", "--json"],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        cwd=Path(__file__).parents[1],
        # a shell's background jobs ignore the signal, and so would a child of the tests there
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    first = process.stdout.read(1)
    assert first
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "interrupted after" in err
    assert json.loads(out.splitlines()[-1])["finish_reason"] == "interrupted"


@pytest.mark.parametrize("command", ["generate", "chat", "decide"])
class TestTemplateConfig:
    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ('{"messages": []}', "messages is set by the program itself"),
            ('{"think": true}', "think is set by the program itself"),
            ('{"tokenizer": 1}', "tokenizer is set by the program itself"),
            ('{"add_generation_prompt": false}', "add_generation_prompt is set by"),
            ('{"style": 1}', "does not read 'style', only enable_thinking"),
            ('{"enable_thinking": "yes"}', "enable_thinking is true or false, got 'yes'"),
            ('{"a": 1e999}', "is not valid JSON (the number 1e999 is out of range)"),
            ("[1]", "must be a JSON object"),
        ],
    )
    def test_what_is_not_for_a_user_to_set(self, monkeypatch, capsys, command, given, message):
        prompt = () if command == "chat" else ("-p", "Is 47 greater than 38?")
        code, out, err = run(
            monkeypatch, capsys, command, *prompt, "--chat-template-config", given, stdin=""
        )
        assert (code, out) == (2, "")
        assert err.startswith("error: --chat-template-config")
        assert message in err


def test_thinking_is_a_variable_too(monkeypatch, capsys):
    asked = ("-p", "Add 47 and 38.", "--json")
    records = [
        json.loads(generate(monkeypatch, capsys, *asked, *more)[1].splitlines()[-1])
        for more in (("--think",), ("--chat-template-config", '{"enable_thinking": true}'))
    ]
    assert records[0]["tokens"] == records[1]["tokens"]
    assert records[0]["thought"]


@pytest.mark.parametrize("command", ["generate", "chat", "decide"])
def test_control_tokens_are_text_unless_they_are_allowed(monkeypatch, capsys, command):
    prompts = []

    def seen(*given, **options):
        prompts.append(chat_ids(*given, **options))
        raise UserError("enough")

    for module in ("cli.generate", "cli.decide", "generation.chat"):
        monkeypatch.setattr(f"mlx_diffgemma.{module}.chat_ids", seen)
    text = "Is 47 <eos> greater?"
    given = {"stdin": f"{text}\n"} if command == "chat" else {}
    asked = () if command == "chat" else ("-p", text)
    for more in ((), ("--allow-control-tokens",)):
        _, _, err = run(monkeypatch, capsys, command, *asked, *more, **given)
        assert "enough" in err
    eos = load("nano")[1].get_vocab()["<eos>"]
    assert [eos in prompt for prompt in prompts] == [False, True]


@pytest.mark.parametrize("schema", ['{"const": 7}', ' {"enum": [7]}', "FILE"])
def test_a_schema_is_a_file_or_a_text(monkeypatch, capsys, tmp_path, schema):
    (tmp_path / "schema.json").write_text('{"const": 7}')
    named = str(tmp_path / "schema.json") if schema == "FILE" else schema
    assert generate(monkeypatch, capsys, "-p", "Add 3 and 4.", "--json-schema", named)[1] == "7\n"
    asked = ("infill", "--prefix", "3 + 4 = ", "--length", "1-2", "--json-schema", named)
    assert "3 + 4 = 7" in run(monkeypatch, capsys, *asked, "--seed", "1")[1]


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("{", "The JSON schema is not valid JSON"),
        ("deep.json", "nested deeper than 100 levels"),
        ('{"const": ' + "1" * 5000 + "}", "a number has 5,000 digits"),
        ('{"const": NaN}', "NaN is no number in JSON"),
        ("false", "admits"),
        ("none.json", "The JSON schema: none.json cannot be read"),
        ("", "The JSON schema: . is a folder"),
    ],
)
def test_schemas_that_are_none(monkeypatch, capsys, tmp_path, schema, message):
    monkeypatch.chdir(tmp_path)
    Path("deep.json").write_text("[" * 100_000 + "]" * 100_000)
    code, out, err = generate(monkeypatch, capsys, "-p", "Add.", "--json-schema", schema)
    assert (code, out) == (2, "")
    assert message in err


def test_an_adapter_is_no_model(monkeypatch, capsys, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    code, _, err = generate(monkeypatch, capsys, "-p", "Add.", "--model", str(tmp_path))
    assert code == 2
    assert "holds an adapter; give it as --adapter-path" in err


@pytest.mark.parametrize("mode", ["diffusion", "ar"])
def test_evaluate_draws_as_it_is_told(monkeypatch, capsys, tmp_path, mode):
    seen = []

    def answers(*_, **options):
        seen.append(options)
        raise UserError("enough")

    monkeypatch.setattr("mlx_diffgemma.evaluation.run.batch_generate", answers)
    (tmp_path / "a.jsonl").write_text('{"prompt": "Add 1 and 2.", "completion": "3"}')
    given = {"top_k": 3, "top_p": 0.5, "min_p": 0.25, "presence_penalty": 0.5}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    data = ("--data", str(tmp_path / "a.jsonl"), "--mode", mode)
    run(monkeypatch, capsys, "evaluate", *data, *options)
    assert len(seen) == 1
    assert seen[0].items() >= given.items()
