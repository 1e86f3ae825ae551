"""What drafting is worth: the figures add up, and right drafts and wrong ones are told apart."""

import json
import re

import mlx.core as mx
import numpy as np
import pytest

from drafter import save_drafter
from drafter.answers import answer, answer_causally
from drafter.baselines import (
    FixedDraft,
    JudgedPolicy,
    NgramDraft,
    UnverifiedPolicy,
    VetoPolicy,
    disturbed,
)
from drafter.evaluation import EvaluationOptions, evaluate_drafter
from drafter.measures import Answered, Shares, drift, way_result
from drafter.oracle import oracle
from drafter.rules import DraftRules
from drafter.run import DraftShape, share
from mlx_diffgemma.decoding.records import Canvas
from mlx_diffgemma.decoding.session import Session
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.evaluation.tasks import tasks_named
from mlx_diffgemma.model.config import released_config
from mlx_diffgemma.sampling.draws import Draws
from tests.drafter.drafters import random_drafter
from tests.helpers.drafted import base_of, drafted, run
from tests.helpers.in_process import run as run_command
from tests.helpers.knowing import prompts_of
from tests.helpers.prompts import nano_prompts


def test_shares_of_the_released_model():
    """docs: of a denoising step whose self-conditioning is dense a commit is 0.67, with the head
    0.83.
    """
    drafter = DraftShape().config(released_config())
    shares = Shares.of(drafter, released_config())
    assert (shares.commit, shares.judge) == (
        pytest.approx(0.67, abs=0.005),
        pytest.approx(0.83, abs=0.01),
    )
    assert shares.draft == share(drafter, released_config()) == pytest.approx(0.136, abs=0.002)


def one(score, steps, canvases=1, ids=(1, 2), certificate="stable-and-confident", **counts):
    """An answer of ``canvases`` canvases with two tokens each, whose first one took all but a step
    of each other.
    """
    made = [
        Canvas(
            np.array(ids),
            np.zeros(2),
            steps - canvases + 1 if not i else 1,
            4,
            True,
            True,
            certificate=certificate,
            **(counts if not i else {}),
        )
        for i in range(canvases)
    ]
    return Answered(score, tuple(made), (np.array([*ids, 0, 0]),) * canvases)


SHARES = Shares(draft=0.25, commit=0.5, judge=0.75)


def test_the_cost_of_an_answer():
    assert SHARES.spent(one(1.0, 4)) == 4.0
    assert SHARES.spent(one(1.0, 12, 3)) == 12 + 2 * 0.5
    assert (
        SHARES.spent(one(1.0, 4, passes=3, judged=2, judged_rows=6)) == 4 + 3 * 0.25 + 0.75 * 6 / 4
    )
    # The judge's pass is the commit of the first canvas, and of the second one, which is not the
    # last.
    assert SHARES.spent(one(1.0, 12, 3, certificate="causal", judged=1, judged_rows=4)) == 12 + 0.75
    assert SHARES.spent(one(1.0, 4, passes=3), free_steps=True) == 0.75


def test_the_figures_of_a_way():
    reference = [[one(1.0, 4), one(1.0, 12, 3)], [one(0.0, 6), one(1.0, 10, 2)]]
    own = [
        [one(1.0, 2, proposed=6, accepted=3, passes=2), one(0.0, 6, 2, ids=(3, 4))],
        [one(0.0, 3, retries=1), one(1.0, 5, 2)],
    ]
    found = way_result("x", own, reference, SHARES, False)
    assert (found.score, found.steps) == (0.5, 16 / 6)
    assert found.forwards == (16 + 2) / 6
    assert found.rows == 4 * found.forwards
    assert found.cost == pytest.approx((16 + 2 * 0.5 + 2 * 0.25) / 6)
    assert found.ratio == pytest.approx(found.cost / ((32 + 3 * 0.5) / 7))
    assert found.longest == pytest.approx(((11 + 2 * 0.5) / 4) / ((22 + 3 * 0.5) / 5)), (
        "the second question takes most"
    )
    assert found.longest_steps == pytest.approx((11 / 4) / (22 / 5))
    assert (found.passes, found.judged_passes, found.commits) == (2 / 6, 0, 2 / 6)
    assert found.loss == pytest.approx(25.0)
    assert 25.0 <= found.loss_bound <= 50.0
    assert (found.drafted, found.right, found.retries, found.same) == (
        1.0,
        0.5,
        pytest.approx(1 / 6),
        0.75,
    )
    itself = way_result("reference", reference, reference, SHARES, False)
    assert (itself.ratio, itself.loss, itself.loss_bound, itself.same, itself.right) == (
        1.0,
        0.0,
        0.0,
        1.0,
        None,
    )


def test_the_interval_of_a_loss_is_that_of_its_mean():
    """400 questions, a loss of 0 or 100 points each: the mean's upper bound lies 1.96 standard
    errors above it.
    """

    def runs(scores):
        return [
            [
                Answered(
                    score, (Canvas(np.array([7]), np.zeros(1), 1, 2, True, True),), (np.zeros(2),)
                )
                for score in scores
            ]
        ]

    found = way_result("x", runs([0.0, 1.0] * 200), runs([1.0] * 400), SHARES, False)
    assert found.loss == 50.0
    assert found.loss_bound - found.loss == pytest.approx(100 * 1.96 * 0.5 / 20, rel=0.15)


def test_drift():
    """It is sum (p - q)^2, whatever the spread inside of each."""
    rng = np.random.default_rng(0)

    def runs(p):
        def canvas():
            return Canvas(np.array([rng.random() < p, 7]), np.zeros(2), 1, 2, True, True)

        return [[Answered(0.0, (canvas(),), (np.zeros(2),)) for _ in range(300)] for _ in range(8)]

    for p, q in ((0.5, 0.5), (0.2, 0.9), (0.0, 1.0), (0.3, 0.4)):
        wanted = 2 * (p - q) ** 2 / 2  # two tokens differ, at one place of two
        assert drift(runs(p), runs(q), lambda a: a.text) == pytest.approx(wanted, abs=0.02)
    assert drift(runs(0.0), runs(1.0), lambda a: [a.text]) == 2.0
    found = way_result("x", runs(0.3), runs(0.3), SHARES, False)
    assert found.variety == pytest.approx(2 * 0.3 * 0.7 / 2, abs=0.02)


def test_questions_with_images_are_refused(nano_pair):
    with pytest.raises(UserError, match="Drafters are measured on questions in text only"):
        evaluate_drafter(
            *nano_pair,
            random_drafter(nano_pair[0]),
            tasks_named("add,pictures-one"),
            EvaluationOptions(limit=1, seeds=(0, 1)),
        )


def test_answers_are_scored_and_kept_whole(nano_pair):
    model, tokenizer = nano_pair
    (task,) = tasks_named("story")
    (question,) = task.questions(1)
    (found,) = answer(model, tokenizer, [question], base_of(model, max_steps=12), 0, 256)
    assert len(found.canvases) > 1
    assert (len(found.canvases), found.commits) == (len(found.committed), len(found.committed) - 1)
    assert all(canvas.size == 64 for canvas in found.committed)
    assert found.score > 0.5
    assert len(found.text) < sum(canvas.size for canvas in found.committed)


def test_answers_left_to_right(nano_pair):
    model, tokenizer = nano_pair
    questions = [question for task in tasks_named("add,sort") for question in task.questions(1)]
    plain = answer_causally(model, tokenizer, questions, 0.0, 3, 64)
    drafter = random_drafter(model)
    own = answer_causally(model, tokenizer, questions, 0.0, 3, 64, drafter)
    assert (plain["score"], plain["forwards"], plain["rows"]) == (
        1.0,
        plain["tokens"],
        plain["tokens"],
    )
    assert (own["score"], own["tokens"]) == (plain["score"], plain["tokens"])
    assert own["rows"] > own["forwards"]


class TestBaselines:
    def test_ngrams_copy_what_followed(self, nano_pair):
        model, _ = nano_pair
        session = Session(
            model, [5, 6, 7, 8, 9, 6, 7, 3, 6], base_of(model), Draws(0, 1024), (9,), 64
        )
        session.open_canvas()
        session.next_logits = mx.eye(1024)[7]
        # 7 behind 6: what followed "6 7" last is 3, behind "7 3" stood 6, behind "3 6" nothing,
        # behind 6 last 7, …
        assert NgramDraft().guess(session).tolist()[:4] == [7, 3, 6, 7]
        session.next_logits = mx.eye(1024)[8]
        assert NgramDraft().guess(session).tolist() == [8, 9], "an end token ends it"
        (draft,) = NgramDraft().seed([session])
        assert (np.array(draft.drafted).sum(), draft.ids[:2].tolist()) == (2, [8, 9])
        assert draft.ids[2:].tolist() == session.canvas.ids[2:].tolist()

    def test_not_verified_commits_the_draft(self, knowing_pair):
        model, _ = knowing_pair
        base = base_of(model)
        guess = np.random.default_rng(0).integers(2, 1024, 64)
        policy = drafted(
            UnverifiedPolicy(**{name: getattr(base, name) for name in base.__dataclass_fields__}),
            {(0, 0): guess},
        )
        (session,), _ = run(model, prompts_of(1), policy, 64)
        assert session.ids[-64:] == guess.tolist()

    def test_the_judge_alone_ends_it_at_once(self, knowing_pair):
        model, _ = knowing_pair
        prompts = prompts_of(3)
        _, steps = run(model, prompts, base_of(model))
        guesses = {
            (i, s.canvas_index): np.array(s.argmax)
            for i, own in enumerate(steps)
            for s in own
            if s.committed
        }
        plain = drafted(base_of(model), guesses, judge=2.0)
        _, own = run(model, prompts, VetoPolicy(plain.base, plain.drafter, 8, 2.0))
        assert all(step.surprise is not None for of in own for step in of if step.draft is not None)
        _, both = run(model, prompts, plain)
        assert sum(map(len, own)) <= sum(map(len, both))

    def test_judged_without_a_draft(self, nano_pair):
        model, _ = nano_pair
        prompts = nano_prompts(4)
        _, steps = run(model, prompts, base_of(model))
        _, own = run(model, prompts, JudgedPolicy(base_of(model), FixedDraft({}), 8, 2.0))
        assert all(step.draft is None for of in own for step in of)
        assert any("causal" in (step.certificate or "") for of in own for step in of)
        assert sum(map(len, own)) < sum(map(len, steps))

    def test_disturbed(self, nano_pair):
        drafter = random_drafter(nano_pair[0], head_size=200)
        other = disturbed(drafter, 0.5)
        assert other.head_ids.tolist() == drafter.head_ids.tolist()
        change = (
            other.fc.weight - drafter.fc.weight
        ).square().mean() / drafter.fc.weight.square().mean()
        assert change.item() == pytest.approx(0.25, rel=0.05)


@pytest.fixture
def two_shares(monkeypatch):
    monkeypatch.setattr("drafter.oracle.SHARES", (1.0, 0.0))


@pytest.mark.slow
def test_the_oracle_curve_falls(nano_pair, two_shares):
    model, tokenizer = nano_pair
    questions = [question for task in tasks_named("sort,story") for question in task.questions(1)]
    seen = []
    points = oracle(
        model, tokenizer, questions, base_of(model), 7, 64, random_drafter(model), seen.append
    )
    assert len(points) == len(seen) == 6
    for kind in ("noise", "another's answer", "the drafter's"):
        steps = {point["right"]: point["steps"] for point in points if point["wrong"] == kind}
        assert steps[1.0] < steps[0.0]
        assert steps[1.0] <= 3


@pytest.mark.slow
def test_all_ways(monkeypatch, capsys, nano_pair, two_shares, tmp_path):
    save_drafter(random_drafter(nano_pair[0], refinement=True), tmp_path / "drafter")
    options = [
        "draft",
        "evaluate",
        "--draft-model",
        str(tmp_path / "drafter"),
        "--tasks",
        "compare",
        "--limit",
        "1",
    ]
    code, out, _ = run_command(
        monkeypatch,
        capsys,
        *options,
        "--num-seeds",
        "2",
        "--output-dir",
        str(tmp_path / "out"),
        "--also",
        str(tmp_path / "drafter"),
        "--draft-rules",
        "gate=0.8",
    )
    assert code == 0
    assert re.search(r"\| reference \| 100.0% \| \+0.0 \(\+0.0\) \| 2.00 \| 2.00 \| 1.00 ", out), (
        out
    )
    assert re.search(r"\| plain \| 0 \| 100.0% \| 2.0 \| 2.0 \| 2.0 ", out), out
    record = json.loads((tmp_path / "out" / "drafting.json").read_text())
    ways = [way["name"] for way in record["ways"]]
    assert {
        "reference",
        "all end tokens",
        "another's answer, no judge",
        "drafter, refine on",
        "n-gram draft",
        "drafter, not verified",
        str(tmp_path / "drafter"),
    } < set(ways)
    assert (record["model"], record["seeds"], len(record["oracle"]), len(record["ar"])) == (
        "nano-1",
        [0, 1],
        6,
        4,
    )
    assert record["rules"] == vars(DraftRules(gate=0.8))


def test_the_command(monkeypatch, capsys, nano_pair, tmp_path):
    save_drafter(random_drafter(nano_pair[0], refinement=True), tmp_path / "drafter")
    options = [
        "draft",
        "evaluate",
        "--draft-model",
        str(tmp_path / "drafter"),
        "--tasks",
        "compare",
        "--limit",
        "1",
    ]
    code, out, _ = run_command(
        monkeypatch, capsys, *options, "--num-seeds", "2", "--parts", "", "--json"
    )
    assert [way["name"] for way in json.loads(out)["ways"]] == ["reference", "drafter"]
    for wrong, message in (
        (["--num-seeds", "1"], "two seeds"),
        (["--tasks", "none"], "Unknown task"),
        (["--parts", "all"], "Unknown part 'all'"),
        (["--draft-rules", "gate=x"], "cannot be 'x'"),
    ):
        code, out, err = run_command(monkeypatch, capsys, *options, *wrong)
        assert (code, out, message in err) == (2, "", True), err
