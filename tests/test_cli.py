"""The command as its users meet it; every mistake is one line and exit code 2."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest
from typer.testing import CliRunner

from mlx_diffgemma import nano
from mlx_diffgemma.cli import app, main

COMMAND = [sys.executable, "-m", "mlx_diffgemma.cli"]


def run(monkeypatch, capsys, *arguments, stdin=None):
    """(exit code, stdout, stderr) of the command, in this process."""
    monkeypatch.setattr(sys, "argv", ["mlx-diffgemma", *arguments])
    if stdin is not None:
        import io

        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8"))
    try:
        main()
        code = 0
    except SystemExit as left:
        code = left.code or 0
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def generate(monkeypatch, capsys, *arguments, **options):
    return run(monkeypatch, capsys, "generate", "--seed", "1", *arguments, **options)


class TestGenerate:
    def test_prints_the_answer_and_nothing_else(self, monkeypatch, capsys):
        code, out, err = generate(monkeypatch, capsys, "-p", "Is 47 greater than 38?")
        assert code == 0
        assert out.strip()
        assert err == ""

    def test_json_is_the_last_line(self, monkeypatch, capsys):
        _, out, _ = generate(monkeypatch, capsys, "-p", "Is 47 greater than 38?", "--json")
        text, record = out.splitlines()[:-1], json.loads(out.splitlines()[-1])
        assert record["text"] == "\n".join(text)
        assert {"steps", "tokens_per_forward", "generation_tps", "seed", "converged", "finish_reason", "canvases"} <= set(record)

    def test_standard_input(self, monkeypatch, capsys):
        given = generate(monkeypatch, capsys, "-p", "Is 47 greater than 38?")
        assert generate(monkeypatch, capsys, "-p", "-", stdin="Is 47 greater than 38?") == given

    def test_show_changes_nothing_off_a_terminal(self, monkeypatch, capsys):
        assert generate(monkeypatch, capsys, "-p", "Add 1 and 2.", "--show") == generate(monkeypatch, capsys, "-p", "Add 1 and 2.")

    def test_verbose_figures_go_to_standard_error(self, monkeypatch, capsys):
        _, out, err = generate(monkeypatch, capsys, "-p", "Add 1 and 2.", "--verbose")
        assert "tokens a forward" in err
        assert "tokens a forward" not in out

    def test_ar_mode_and_prefilled_answers(self, monkeypatch, capsys):
        code, out, _ = generate(monkeypatch, capsys, "-p", "Turn this into JSON: Anna is a red fox.", "--mode", "ar",
                                "--prefill-response", '{"name": "', "--json")
        assert code == 0
        assert not json.loads(out.splitlines()[-1])["text"].startswith("{")

    def test_unconverged_canvases_are_told(self, monkeypatch, capsys):
        _, _, err = generate(monkeypatch, capsys, "-p", "Add 1 and 2.", "--max-denoising-steps", "1")
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

    @pytest.mark.parametrize(("arguments", "says"), [
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
    ])
    def test_options(self, monkeypatch, capsys, arguments, says):
        self.refuse(monkeypatch, capsys, "generate", "-p", "fox", *arguments, says=says)

    @pytest.mark.parametrize("text", ["", "  "])
    def test_empty_prompt(self, monkeypatch, capsys, text):
        self.refuse(monkeypatch, capsys, "generate", "-p", text, says="prompt is empty")
        self.refuse(monkeypatch, capsys, "generate", "-p", "-", says="prompt is empty", stdin=text)

    def test_another_model(self, monkeypatch, capsys, broken):
        (broken / "config.json").write_text('{"model_type": "gemma4"}')
        self.refuse(monkeypatch, capsys, "generate", "-p", "fox", "--model", str(broken), says="use mlx-lm")

    def test_truncated_weights(self, monkeypatch, capsys, broken):
        path = broken / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-5000])
        self.refuse(monkeypatch, capsys, "generate", "-p", "fox", "--model", str(broken), says="damaged or cut off")

    def test_no_tokenizer(self, monkeypatch, capsys, broken):
        for path in broken.glob("tokenizer*"):
            path.unlink()
        self.refuse(monkeypatch, capsys, "generate", "-p", "fox", "--model", str(broken), says="no tokenizer.json")

    def test_prompt_beyond_the_context(self, monkeypatch, capsys):
        self.refuse(monkeypatch, capsys, "generate", "-p", "7" * 9000, says="shorten the prompt")

    def test_unknown_task(self, monkeypatch, capsys):
        self.refuse(monkeypatch, capsys, "evaluate", "--tasks", "chess", says="Unknown task 'chess'")

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

    def test_doctor(self, monkeypatch, capsys):
        code, out, _ = run(monkeypatch, capsys, "doctor")
        record = json.loads(out.splitlines()[-1])
        assert code == 0
        assert record["ok"]
        assert record["nano"] == nano.VERSION
        assert {c["name"]: c["ok"] for c in record["checks"]} == {"float32": True, "bfloat16": True, "4bit": True}
        packed = record["checks"][2]
        assert packed["logits"] < 1e-3, "the reference on the dequantised weights"
        assert packed["trajectory"] == packed["trajectory_steps"]
        assert {"device", "chip", "blas", "mlx", "os"} <= set(record["machine"])

    @pytest.mark.slow
    def test_doctor_notices_other_numbers(self, monkeypatch, capsys):
        from mlx_diffgemma import model

        head = model.DiffusionGemma.logits
        monkeypatch.setattr(model.DiffusionGemma, "logits", lambda self, h: head(self, h) * 1.01)
        code, _, err = run(monkeypatch, capsys, "doctor", "--json")
        assert code == 1
        assert "something else than the reference" in err

    def test_evaluate(self, monkeypatch, capsys, tmp_path):
        code, out, _ = run(monkeypatch, capsys, "evaluate", "--tasks", "compare", "--limit", "4", "--mode", "both", "--output-dir",
                           str(tmp_path))
        assert code == 0
        assert "compare" in out
        record = json.loads((tmp_path / "evaluate-diffusion.json").read_text())
        assert record["model"] == nano.VERSION
        assert record["results"][0]["answers"] == 4

    def test_parity(self, monkeypatch, capsys, tiny_folder):
        code, out, _ = run(monkeypatch, capsys, "parity", "--model", str(tiny_folder), "--prompts", "2", "--canvases", "1",
                           "--json")
        record = json.loads(out)
        assert {s["stage"] for s in record["stages"]} >= {"encoder hidden states", "cache", "logits, self-conditioned"}
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
    config = json.loads((folder / "generation_config.json").read_text()) | {"eos_token_id": [1000], "max_denoising_steps": 2}
    (folder / "generation_config.json").write_text(json.dumps(config))
    process = subprocess.Popen([*COMMAND, "generate", "--model", str(folder), "-p", "Tell me a story.", "--json"], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": "1"},
                               cwd=Path(__file__).parents[1],
                               # a shell's background jobs ignore the signal, and so would a child of the tests there
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    first = process.stdout.read(1)
    assert first
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "interrupted after" in err
    assert json.loads(out.splitlines()[-1])["finish_reason"] == "interrupted"
