"""What drafting is worth: the figures add up, and right drafts and wrong ones are told apart."""

import json
import re

import numpy as np
import pytest

from drafter import save_drafter
from drafter.evaluation import Answered, _result, answer, commit_share, oracle
from drafter.run import DraftShape, share
from mlx_diffgemma.config import released_config
from mlx_diffgemma.evaluation.tasks import tasks_named
from tests.drafter.drafters import random_drafter
from tests.drafter.test_canvas import base_of
from tests.test_cli import run as run_command


def test_shares_of_the_released_model():
    """docs: a commit is 0.67 of a denoising step whose self-conditioning is dense."""
    assert commit_share(released_config()) == pytest.approx(0.67, abs=0.005)
    assert share(DraftShape().config(released_config()), released_config()) == pytest.approx(0.136, abs=0.002)


def one(score, steps, canvases=1, ids=(1, 2), proposed=0, accepted=0, retries=0):
    return Answered(score, steps, canvases - 1, canvases, retries, proposed, accepted, len(ids), (np.array(ids),))


def test_the_figures_of_a_way():
    reference = [[one(1.0, 4), one(1.0, 12, 3)], [one(0.0, 6), one(1.0, 10, 2)]]
    own = [[one(1.0, 2, proposed=6, accepted=3), one(0.0, 6, 2, ids=(3, 4))], [one(0.0, 3, retries=1), one(1.0, 5, 2)]]
    found = _result("x", own, reference, draft=0.25, commit=0.5)
    assert (found.score, found.steps) == (0.5, 16 / 6)
    assert found.cost == pytest.approx((16 + 2 * 0.5 + 6 * 0.25) / 6)
    assert found.ratio == pytest.approx(found.cost / ((32 + 3 * 0.5) / 7))
    assert found.loss == pytest.approx(25.0)
    assert 25.0 <= found.loss_bound <= 50.0
    assert (found.drafted, found.right, found.retries, found.same) == (1.0, 0.5, pytest.approx(1 / 6), 0.75)
    itself = _result("reference", reference, reference, 0.0, 0.5)
    assert (itself.ratio, itself.loss, itself.loss_bound, itself.same, itself.right) == (1.0, 0.0, 0.0, 1.0, None)


def test_answers_are_scored_and_kept_whole(nano_pair):
    model, tokenizer = nano_pair
    (task,) = tasks_named("story")
    (question,) = task.questions(1)
    (found,) = answer(model, tokenizer, [question], base_of(model), 0, 256)
    assert (found.canvases, found.commits) == (len(found.committed), len(found.committed) - 1)
    assert all(canvas.size == 64 for canvas in found.committed)
    assert found.score > 0.5
    assert found.tokens < sum(canvas.size for canvas in found.committed)


@pytest.fixture
def two_shares(monkeypatch):
    monkeypatch.setattr("drafter.evaluation.SHARES", (1.0, 0.0))


@pytest.mark.slow
def test_the_oracle_curve_falls(nano_pair, two_shares):
    model, tokenizer = nano_pair
    questions = [question for task in tasks_named("sort,story") for question in task.questions(1)]
    seen = []
    points = oracle(model, tokenizer, questions, base_of(model), 7, 64, seen.append)
    assert len(points) == len(seen) == 4
    for kind in ("noise", "another's answer"):
        steps = {point["right"]: point["steps"] for point in points if point["wrong"] == kind}
        assert steps[1.0] < steps[0.0]
        assert steps[1.0] <= 3


def test_the_command(monkeypatch, capsys, nano_pair, two_shares, tmp_path):
    save_drafter(random_drafter(nano_pair[0]), tmp_path / "drafter")
    options = ["draft", "evaluate", "--draft-model", str(tmp_path / "drafter"), "--tasks", "compare", "--limit", "1"]
    code, out, _ = run_command(monkeypatch, capsys, *options, "--num-seeds", "2", "--output-dir", str(tmp_path / "out"))
    assert code == 0
    assert re.search(r"\| reference \| 100.0% \| \+0.0 \(\+0.0\) \| 2.00 \| 2.00 \| 1.00 ", out), out
    record = json.loads((tmp_path / "out" / "drafting.json").read_text())
    assert {"reference", "all end tokens", "another's answer"} < {way["name"] for way in record["ways"]}
    assert (record["model"], record["seeds"], len(record["oracle"])) == ("nano-1", [0, 1], 4)
    for wrong, message in ((["--num-seeds", "1"], "two seeds"), (["--tasks", "none"], "Unknown task")):
        code, out, err = run_command(monkeypatch, capsys, *options, *wrong)
        assert (code, out, message in err) == (2, "", True), err
