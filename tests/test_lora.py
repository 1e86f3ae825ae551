"""From jsonl files to an adapter on disk and back into an answer; what is wrong is told in one
sentence.
"""

import csv
import errno
import json
import os

import mlx.core as mx
import pytest

from mlx_diffgemma import chat_ids, generate, load
from mlx_diffgemma.checkpoint.loading import load_model
from mlx_diffgemma.cli.lora import OWN, _options
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.safetensors import read_tensors, write_tensors
from mlx_diffgemma.tuning.data import load_split, load_splits
from mlx_diffgemma.tuning.run import Run, TuningOptions, check_target, read_config
from tests.helpers.in_process import run

SMALL = [
    "--iters",
    "4",
    "--batch-size",
    "2",
    "--num-layers",
    "1",
    "--canvas-length",
    "8",
    "--learning-rate",
    "1e-3",
    "--steps-per-report",
    "2",
    "--save-every",
    "2",
]


def write(folder, **splits):
    folder.mkdir(parents=True, exist_ok=True)
    for name, entries in splits.items():
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8"
        )
    return folder


PAIRS = [{"prompt": f"What comes after {i}?", "completion": f"{i + 1}"} for i in range(6)]


class TestData:
    @pytest.mark.parametrize(
        "entry",
        [
            {"prompt": "Add 1 and 2.", "completion": "3"},
            {
                "messages": [
                    {"role": "user", "content": "Add 1 and 2."},
                    {"role": "assistant", "content": "3"},
                ]
            },
        ],
    )
    def test_the_prompt_is_what_generation_asks(self, nano_pair, tmp_path, entry):
        _, tokenizer = nano_pair
        (example,) = load_split(
            write(tmp_path, train=[entry]) / "train.jsonl", tokenizer, 1, 100
        ).examples
        prompt = chat_ids(tokenizer, [{"role": "user", "content": "Add 1 and 2."}])
        assert example.ids[: example.answer].tolist() == prompt
        assert example.ids[example.answer :].tolist() == tokenizer.encode(
            "3<turn|>", add_special_tokens=False
        )

    def test_several_turns_train_the_last(self, nano_pair, tmp_path):
        _, tokenizer = nano_pair
        turns = [
            ("user", "Add 1 and 2."),
            ("assistant", "3"),
            ("user", "Add 2 and 2."),
            ("assistant", "4"),
        ]
        messages = [{"role": role, "content": text} for role, text in turns]
        (example,) = load_split(
            write(tmp_path, train=[{"messages": messages}]) / "train.jsonl", tokenizer, 1, 100
        ).examples
        assert example.ids[: example.answer].tolist() == chat_ids(tokenizer, messages[:-1])

    def test_text_ends_with_an_end_token(self, nano_pair, tmp_path):
        (example,) = load_split(
            write(tmp_path, train=[{"text": "a red fox"}]) / "train.jsonl", nano_pair[1], 1, 100
        ).examples
        assert (example.answer, example.ids[-1]) == (1, 1)

    def test_long_examples_are_counted(self, nano_pair, tmp_path):
        path = write(tmp_path, train=[*PAIRS, {"text": "fox " * 300}]) / "train.jsonl"
        split = load_split(path, nano_pair[1], 1, 100)
        assert (len(split.examples), split.too_long, split.longest > 100) == (6, 1, True)
        with pytest.raises(UserError, match="All 7 examples .* exceed 4 tokens"):
            load_split(path, nano_pair[1], 1, 4)

    @pytest.mark.parametrize(
        ("line", "says"),
        [
            ('{"prompt": "a"', "line 2: not valid JSON"),
            ('{"prompt": "a"}', "line 2: 'completion' is missing"),
            ("[1]", "line 2: an object"),
            ('{"x": 1}', "line 2: one of 'messages'"),
            ('{"text": ""}', "line 2: 'text' is empty"),
            (
                '{"messages": [{"role": "user", "content": "a"}]}',
                "line 2: the last message must be",
            ),
            ('{"messages": "a"}', "line 2: 'messages' must be a list"),
            (
                '{"prompt": "a", "completion": "b", "images": ["a.png"]}',
                "line 2: models are tuned on text only",
            ),
            (
                '{"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}, '
                '{"role": "assistant", "content": "b"}]}',
                "line 2: models are tuned on text only",
            ),
            ('{"prompt": "a", "completion": ""}', "line 2: the assistant's message is empty"),
        ],
    )
    def test_wrong_lines_are_named(self, nano_pair, tmp_path, line, says):
        path = write(tmp_path, train=PAIRS[:1]) / "train.jsonl"
        path.write_text(path.read_text() + line + "\n")
        with pytest.raises(UserError, match=says):
            load_split(path, nano_pair[1], 1, 100)

    def test_folders(self, nano_pair, tmp_path):
        with pytest.raises(UserError, match="no data folder"):
            load_splits(tmp_path / "nowhere", nano_pair[1], 1, 100)
        assert set(load_splits(write(tmp_path, train=PAIRS, test=PAIRS), nano_pair[1], 1, 100)) == {
            "train",
            "test",
        }
        (tmp_path / "valid.jsonl").write_text("\n")
        with pytest.raises(UserError, match="holds no examples"):
            load_splits(tmp_path, nano_pair[1], 1, 100)


class TestCommand:
    def lora(self, monkeypatch, capsys, tmp_path, *arguments):
        return run(
            monkeypatch,
            capsys,
            "lora",
            "--data",
            str(tmp_path / "data"),
            "--adapter-path",
            str(tmp_path / "out"),
            *SMALL,
            *arguments,
        )

    @pytest.mark.slow
    def test_train_test_resume_and_use(self, monkeypatch, capsys, tmp_path):
        write(tmp_path / "data", train=PAIRS, valid=PAIRS[:2], test=PAIRS[2:4])
        code, out, err = self.lora(monkeypatch, capsys, tmp_path, "--train", "--test", "--json")
        record = json.loads(out.splitlines()[-1])
        assert (code, record["iteration"], record["test"]["total"] > 0) == (0, 4, True)
        assert "4 train: loss" in err
        found = {path.name for path in (tmp_path / "out").iterdir()}
        assert {
            "adapter_config.json",
            "adapters.safetensors",
            "0000002_adapters.safetensors",
            "state.safetensors",
            "losses.csv",
        } <= found
        rows = list(csv.DictReader((tmp_path / "out" / "losses.csv").open()))
        assert [row["iteration"] for row in rows] == ["0", "2", "4", "4"]
        code, _, err = self.lora(monkeypatch, capsys, tmp_path, "--train")
        assert (code, "holds a run already" in err) == (2, True)
        code, _, err = self.lora(
            monkeypatch, capsys, tmp_path, "--train", "--resume", "--iters", "6"
        )
        assert (code, "going on at iteration 4" in err) == (0, True)
        tuned, tokenizer = load("nano", adapter_path=str(tmp_path / "out"))
        prompt = chat_ids(
            tokenizer, [{"role": "user", "content": "Tell me a story about Leo the owl and a map."}]
        )
        told = run(
            monkeypatch,
            capsys,
            "generate",
            "-p",
            "Tell me a story about Leo the owl and a map.",
            "--seed",
            "1",
            "-m",
            "64",
            "--adapter-path",
            str(tmp_path / "out"),
        )
        assert told[:2] == (0, generate(tuned, tokenizer, prompt, seed=1, max_tokens=64) + "\n")
        plain = load("nano")[0]
        tuned_logits, plain_logits = (
            m.logits(m.training_forward([mx.array(prompt)], mx.array([prompt[:8]]), [4])[0])
            for m in (tuned, plain)
        )
        assert mx.abs(tuned_logits - plain_logits).max() > 1e-3

    def test_a_yaml_file_under_the_command_line(self, monkeypatch, capsys, tmp_path):
        write(tmp_path / "data", train=PAIRS)
        (tmp_path / "c.yaml").write_text(
            "train: true\niters: 9\nlora_parameters: {rank: 2, scale: 4.0, dropout: 0.0}\n"
            "lr_schedule: {name: cosine_decay, arguments: [1e-3, 4], warmup: 1}\nlearning_rate: 1e-4\n"
        )
        code, out, err = self.lora(
            monkeypatch, capsys, tmp_path, "-c", str(tmp_path / "c.yaml"), "--json"
        )
        assert (code, json.loads(out.splitlines()[-1])["iteration"]) == (0, 4), err
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert (
            config["lora_parameters"]["rank"],
            config["fine_tune_type"],
            config["num_layers"],
        ) == (2, "lora", 1)

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            ([], "Nothing to do"),
            (["--train", "--rank", "0"], "rank"),
            (["--train", "--num-layers", "7"], "exceeds the 6 layers"),
            (["--train", "--optimizer", "lion"], "Unknown optimizer"),
            (["--train", "--canvas-length", "65"], "exceeds the 64"),
            (["--train", "--batch-size", "0"], "batch_size"),
            (["--train", "--fine-tune-type", "prefix"], "lora, dora, full"),
            (["--train", "-c", "nowhere.yaml"], "nowhere.yaml cannot be read"),
            (["--test"], "has no test.jsonl"),
            (["--train", "--canvas-weight", "-1"], "negative"),
            (["--train", "--resume-adapter-file", "x.safetensors"], "cannot be read"),
        ],
    )
    def test_refusals(self, monkeypatch, capsys, tmp_path, arguments, says):
        write(tmp_path / "data", train=PAIRS)
        code, _, err = self.lora(monkeypatch, capsys, tmp_path, *arguments)
        assert (code, says in err) == (2, True), err

    @pytest.mark.parametrize(
        "text",
        [
            "seed: null\nlr_schedule: null\noptimizer_config:\nlora_parameters: null",
            "report_to: null\nproject_name: x\ntest_batches: -1\nclear_cache_threshold: 0\nconfig:",
        ],
        ids=["null", "mlx-lm's own"],
    )
    def test_what_changes_nothing_passes(self, text, tmp_path):
        (tmp_path / "c.yaml").write_text(text)
        assert (
            TuningOptions.from_mapping(read_config(tmp_path / "c.yaml"), "c.yaml")
            == TuningOptions()
        )

    def test_the_model_of_the_command_line_goes_before_that_of_the_file(self, tmp_path):
        (tmp_path / "c.yaml").write_text("model: elsewhere\ntrain: true\n")
        given = dict.fromkeys(OWN) | {"config": tmp_path / "c.yaml", "train": False}
        assert _options(given)[1]["model"] == "elsewhere"
        assert _options(given | {"model": "nano"})[1]["model"] == "nano"

    def test_no_batches_of_validation_are_no_validation(self, monkeypatch, capsys, tmp_path):
        write(tmp_path / "data", train=PAIRS, valid=PAIRS[:2])
        (tmp_path / "c.yaml").write_text("val_batches: 0\n")
        code, _, err = self.lora(
            monkeypatch, capsys, tmp_path, "--train", "--iters", "1", "-c", str(tmp_path / "c.yaml")
        )
        assert (code, "valid: loss" in err) == (0, False), err

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("rnak: 3", "c.yaml: unknown option 'rnak'"),
            ("- a", "must hold options"),
            ("a: [", "not valid YAML"),
            ("lora_parameters: {rank: 8, alpha: 16}", "scale"),
            ("lr_schedule: {name: zigzag, arguments: [1]}", "lr_schedule"),
            ("lr_schedule: {name: cosine_decay, arguments: [a, b]}", "lr_schedule"),
            (
                "optimizer: adamw\noptimizer_config: {adamw: {betas: 3, colour: red}}",
                "optimizer_config",
            ),
            ("optimizer: adamw\noptimizer_config: {adamw: {betas: [0.9]}}", "optimizer_config"),
            ("lr_schedule: {name: cosine_decay, arguments: [{}, 3]}", "lr_schedule"),
            ("mask_prompt: 'false'", "c.yaml: mask_prompt must be true or false, got 'false'"),
            ("train: 'no'", "c.yaml: train must be true or false, got 'no'"),
            ("model: [nano]", "c.yaml: model must be a text"),
            ("learning_rate: '1e-5'", "c.yaml: learning_rate must be a number, got '1e-5'"),
            ("learning_rate: .inf", "c.yaml: learning_rate must be a number"),
            ("iters: '10'", "c.yaml: iters must be a whole number, got '10'"),
            ("iters: 2.5", "c.yaml: iters must be a whole number, got 2.5"),
            ("seed: -1", "seed must be a whole number from 0"),
            ("val_batches: -2", "val_batches must be -1 (all), 0 (no validation) or more"),
            ("lora_parameters: 8", "lora_parameters must hold named values, got 8"),
            ("report_to: wandb", "unknown option 'report_to'"),
            ("1: 2", "must hold options by name"),
            pytest.param("iters: " + "9" * 5000, "not valid YAML", id="5,000 digits"),
            pytest.param(
                f"lr_schedule: {{name: cosine_decay, arguments: [{10**400}, 3]}}",
                "lr_schedule",
                id="400 digits",
            ),
            pytest.param("[" * 3000, "not valid YAML", id="nested"),
        ],
    )
    def test_wrong_files(self, monkeypatch, capsys, tmp_path, text, says):
        write(tmp_path / "data", train=PAIRS)
        (tmp_path / "c.yaml").write_text(text)
        code, _, err = self.lora(
            monkeypatch, capsys, tmp_path, "--train", "-c", str(tmp_path / "c.yaml")
        )
        assert (code, says in err) == (2, True), err

    def test_the_target_is_checked_before_the_work(self, monkeypatch, capsys, tmp_path):
        def never(*_arguments, **_options):
            raise AssertionError("the model was loaded")

        monkeypatch.setattr("mlx_diffgemma.cli.lora.load", never)
        (tmp_path / "out").write_text("a file")
        code, _, err = self.lora(monkeypatch, capsys, tmp_path, "--train")
        assert (code, "out cannot be made" in err) == (2, True), err

    @pytest.mark.parametrize(
        ("files", "says"),
        [
            ({"thesis.txt": "x"}, "did not write, such as thesis.txt"),
            ({"adapter_config.json": "{}"}, "holds an adapter already"),
            (
                {"adapter_config.json": '{"mlx_diffgemma": {}}', "adapters.safetensors": "x"},
                "holds an adapter already",
            ),
            (
                {"adapter_config.json": '{"mlx_diffgemma": {}}', "state.safetensors": "x"},
                "holds a run already",
            ),
            ({"adapter_config.json": '{"mlx_diffgemma": {}}'}, None),
            ({}, None),
            ({".DS_Store": "x"}, None),
        ],
    )
    def test_folders_of_others_stay(self, tmp_path, files, says):
        for name, text in files.items():
            (tmp_path / name).write_text(text)
        options = TuningOptions(adapter_path=str(tmp_path))
        if says is None:
            assert check_target(options, resume=False) == tmp_path
        else:
            with pytest.raises(UserError, match=says):
                check_target(options, resume=False)
        assert {path.name: path.read_text() for path in tmp_path.iterdir()} == files

    def test_a_home_in_a_path(self, monkeypatch, tmp_path):
        monkeypatch.setenv("HOME", str(tmp_path))
        assert check_target(TuningOptions(adapter_path="~/x"), resume=False) == tmp_path / "x"


RESUMED = {"iters": 4, "batch_size": 2, "canvas_length": 8, "num_layers": 1, "learning_rate": 1e-3}


class TestResume:
    """Only the same run goes on."""

    def prepared(self, folder, tokenizer, path, resume=True, **changes):
        given = {
            "data": str(path / "data"),
            "adapter_path": str(path / "out"),
            **RESUMED,
            **changes,
        }
        model = load_model(folder, "float32")
        if given.pop("other_base", False):
            expert = model.layers[0].experts.down_proj
            expert.weight[0, 0, 0] += 1
        return Run.prepare(model, tokenizer, TuningOptions.from_mapping(given), "m", resume)

    @pytest.fixture
    def begun(self, random_folder, random_pair, tmp_path):
        write(tmp_path / "data", train=PAIRS)
        run = self.prepared(random_folder, random_pair[1], tmp_path, resume=False)
        run.trainer.iteration = 2
        run.save()
        return lambda **changes: self.prepared(random_folder, random_pair[1], tmp_path, **changes)

    def test_the_same_goes_on(self, begun):
        assert begun(iters=6, save_every=7, steps_per_report=3).trainer.iteration == 2

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"learning_rate": 2e-3}, "learning_rate was 0.001, is 0.002"),
            ({"batch_size": 1}, "batch_size was 2, is 1"),
            ({"seed": 1}, "seed was 0, is 1"),
            ({"optimizer": "sgd"}, "optimizer was Adam, is SGD"),
            ({"other_base": True}, "model"),
            ({"lora_parameters": {"rank": 8, "dropout": 0.0, "scale": 10.0}}, "lora_parameters"),
            ({"lr_schedule": {"name": "cosine_decay", "arguments": [1e-3, 4]}}, "lr_schedule"),
            ({"optimizer_config": {"adam": {"betas": [0.8, 0.9]}}}, "optimizer_config"),
            ({"grad_accumulation_steps": 2}, "grad_accumulation_steps was 1, is 2"),
            ({"max_grad_norm": 0.5}, "max_grad_norm"),
            ({"mask_prompt": True}, "mask_prompt was False, is True"),
            ({"canvas_weight": 0.5}, "canvas was 1.0, is 0.5"),
        ],
    )
    def test_another_run_does_not(self, begun, changes, says):
        with pytest.raises(UserError, match=f"belongs to a run with other options .*{says}"):
            begun(**changes)

    def test_nor_do_other_examples(self, begun, tmp_path):
        write(tmp_path / "data", train=[*PAIRS[:-1], {**PAIRS[-1], "completion": "8"}])
        with pytest.raises(UserError, match=r"other options .data"):
            begun()

    def test_a_state_of_an_earlier_version_is_told(self, begun, tmp_path):
        tensors, metadata = read_tensors(tmp_path / "out" / "state.safetensors")
        mx.eval(tensors)
        write_tensors(tmp_path / "out" / "state.safetensors", tensors, {**metadata, "run": "[1]"})
        with pytest.raises(UserError, match="other options, or of an earlier version"):
            begun()

    def test_a_full_disk_leaves_the_last_checkpoint(self, begun, tmp_path, monkeypatch):
        run = begun()
        before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        run.trainer.iteration = 3

        def full(_descriptor):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="No space left on device"):
            run.save()
        assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
