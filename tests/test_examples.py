"""The programs in examples/ run, and nano answers rightly."""

import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest

import mlx_diffgemma
from mlx_diffgemma.cli import main
from mlx_diffgemma.serving.settings import Settings
from tests.serving.process import threaded

EXAMPLES = Path(__file__).parents[1] / "examples"
PRINTED = {
    "generate": ["17 42 91", "[2 denoising steps, finish reason: stop]"],
    "batch": [
        "Add 12 and 30.",
        "  42  [2 steps]",
        "Sort these numbers: 42 17 91",
        "  17 42 91  [2 steps]",
        "Turn this into JSON: Anna is 31 years old and lives in Paris.",
        '  {"name": "Anna", "age": 31, "city": "Paris"}  [2 steps]',
    ],
    "infill": [
        "Mia was a red fox. Mia lived near the river.",
        '{"name": "Anna", "age": 31, "city": "Paris"}',
    ],
    "structured": ["Anna 23 Paris", "42", "no"],
    "server_client": ["42", "17 42 91", '{"name": "Anna", "age": 23}'],
}


def run(monkeypatch, capsys, name, *arguments):
    """The lines that examples/``name``.py prints."""
    path = EXAMPLES / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(path), *arguments])
    runpy.run_path(str(path), run_name="__main__")
    return capsys.readouterr().out.splitlines()


@pytest.fixture
def loaded(monkeypatch, nano_pair):
    """``load`` returns the nano that the other tests use."""
    monkeypatch.setattr(mlx_diffgemma, "load", lambda name: {"nano": nano_pair}[name])


@pytest.mark.parametrize("name", ["generate", "batch", "infill", "structured"])
def test_a_program_prints_right_answers(monkeypatch, capsys, loaded, name):
    assert run(monkeypatch, capsys, name) == PRINTED[name]


def test_decisions_are_right_and_certain(monkeypatch, capsys, loaded):
    compare, add = run(monkeypatch, capsys, "decide")
    label, yes = re.fullmatch(
        r"Is 12 greater than 30\?  (\w+), p\(yes\) = ([\d.]+)", compare
    ).groups()
    assert label == "no"
    assert float(yes) < 0.1
    answer, share = re.fullmatch(r"Add 12 and 30\.  (\d+) \(.*42: ([\d.]+).*\)", add).groups()
    assert answer == "42"
    assert float(share) > 0.9


def test_the_client_gets_right_answers(monkeypatch, capsys, nano_pair):
    with threaded(nano_pair, Settings("nano")) as url:
        lines = run(monkeypatch, capsys, "server_client", "--base-url", f"{url}/v1")
    assert lines == PRINTED["server_client"]


@pytest.mark.slow
def test_the_adapter_teaches_the_answer(monkeypatch, capsys, tmp_path):
    shutil.copytree(EXAMPLES, tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    for command in (
        "lora -c examples/lora.yaml",
        "generate --adapter-path adapters --seed 0 -p",
    ):
        arguments = [*command.split(), *(["Who are you?"] if command.endswith("-p") else [])]
        monkeypatch.setattr(sys, "argv", ["mlx-diffgemma", *arguments])
        with pytest.raises(SystemExit) as exit_:
            main()
        assert exit_.value.code in (0, None)
    lines = (EXAMPLES / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    (completion,) = {json.loads(line)["completion"] for line in lines}
    assert capsys.readouterr().out.splitlines()[-1] == completion


def test_every_example_is_in_the_readme_and_tested():
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    names = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".yaml")}
    assert set(re.findall(r"\]\((\w+\.\w+)\)", text)) == names
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*PRINTED, "decide"}
