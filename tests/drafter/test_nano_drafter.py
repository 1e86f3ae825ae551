"""The drafter that is shipped beside nano."""

import json

import numpy as np
import pytest

from drafter import DrafterConfig, load_drafter
from drafter.answers import answer
from drafter.measures import Shares
from drafter.pairing import tokenizer_fingerprint
from drafter.run import share
from mlx_diffgemma import load, nano, stream_generate
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.evaluation.nano_prompts import prompts
from mlx_diffgemma.evaluation.nano_tasks import TASKS, held_out_examples
from mlx_diffgemma.evaluation.tasks import tasks_named
from mlx_diffgemma.text.tokenizer import chat_ids
from mlx_diffgemma.tuning.adapters import model_fingerprint
from tests.helpers.drafted import base_of
from tests.helpers.in_process import run

FOLDER = nano.FOLDERS[nano.DRAFTER]


def test_it_is_small_and_says_whose_it_is(nano_pair):
    model, tokenizer = nano_pair
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 2**20
    config = DrafterConfig.from_folder(FOLDER)
    assert 0.10 < share(config, model.config) < 0.15
    assert config.target == {
        "name": nano.VERSION,
        "fingerprint": model_fingerprint(model),
        "tokenizer": tokenizer_fingerprint(tokenizer),
    }
    assert nano.VERSION in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_another_tokenizer_is_refused(nano_pair):
    class Other:
        def get_vocab(self):
            return {"a": 0}

    with pytest.raises(UserError, match="another tokenizer"):
        load_drafter(nano.DRAFTER, nano_pair[0], tokenizer=Other())


def test_it_is_no_model():
    with pytest.raises(UserError, match="a drafter"):
        load(nano.DRAFTER)


@pytest.mark.parametrize("mode", ["diffusion", "ar"])
def test_the_command(mode, monkeypatch, capsys):
    options = ["-p", "Sort 87 37 14 84", "--seed", "1", "--mode", mode, "--json"]
    plain = json.loads(run(monkeypatch, capsys, "generate", *options)[1].splitlines()[-1])
    code, out, err = run(
        monkeypatch, capsys, "generate", *options, "--draft-model", "nano-drafter", "--verbose"
    )
    drafted = json.loads(out.splitlines()[-1])
    assert (code, drafted["text"], "drafted tokens accepted" in err) == (0, plain["text"], True)
    if mode == "ar":
        assert drafted["tokens_per_forward"] > 1.5 * plain["tokens_per_forward"]
    else:
        assert drafted["steps"] < plain["steps"]
        assert "causal" in drafted["canvases"][0]["certificate"]


def test_rules_from_the_command_line(monkeypatch, capsys):
    options = ["generate", "-p", "Add 12 and 30.", "--seed", "1", "--json"]
    off = ["--draft-model", "nano-drafter", "--draft-rules", "gate=2"]
    plain, silent = (
        json.loads(run(monkeypatch, capsys, *options, *more)[1].splitlines()[-1])
        for more in ([], off)
    )
    assert (silent["steps"], silent["tokens"], silent["proposed"]) == (
        plain["steps"],
        plain["tokens"],
        0,
    )
    for wrong, message in (
        (["--draft-rules", "gate=2"], "leave them out"),
        ([*off, "--mode", "ar"], "leave them out"),
        ([*off[:3], "gates=2"], "Unknown draft rule 'gates'"),
    ):
        code, out, err = run(monkeypatch, capsys, *options, *wrong)
        assert (code, out, message in err) == (2, "", True), err


def test_with_a_quantised_target(tmp_path, monkeypatch, capsys):
    code, _, err = run(
        monkeypatch, capsys, "convert", "--hf-path", "nano", "--mlx-path", str(tmp_path / "q"), "-q"
    )
    assert code == 0, err
    model, tokenizer = load(str(tmp_path / "q"))
    drafter = load_drafter(nano.DRAFTER, model, tokenizer=tokenizer)
    ids = chat_ids(tokenizer, [{"role": "user", "content": "20 + 55 ="}])
    pieces = list(stream_generate(model, tokenizer, ids, seed=0, draft_model=drafter))
    assert ("".join(piece.text for piece in pieces).strip(), "causal" in pieces[0].certificate) == (
        "75",
        True,
    )


@pytest.mark.slow
def test_it_saves_and_loses_nothing(nano_pair):
    """The full figures: docs/drafting.md."""
    model, tokenizer = nano_pair
    questions = [question for task in tasks_named("nano") for question in task.questions(6)]
    drafter = load_drafter(nano.DRAFTER, model)
    shares = Shares.of(drafter.config, model.config)
    plain = answer(model, tokenizer, questions, base_of(model), 0, 256)
    drafted = answer(model, tokenizer, questions, drafter.canvas(model, base_of(model)), 0, 256)
    assert sum(map(shares.spent, drafted)) < 0.75 * sum(map(shares.spent, plain))
    assert np.mean([a.score for a in drafted]) >= np.mean([a.score for a in plain]) - 0.02


def test_prompts_are_of_all_tasks_and_not_held_out():
    found = list(prompts(400, seed=3))
    assert found == list(prompts(400, seed=3)) != list(prompts(400, seed=4))
    assert not {
        example.prompt
        for task in TASKS.values()
        for example in held_out_examples(task, 200, seed=0)
    } & set(found)
