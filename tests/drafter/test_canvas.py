"""Drafted canvases: no draft is the reference, the target decides whatever the draft says, and the watchdog bounds the cost."""

import json

import mlx.core as mx
import numpy as np
import pytest

from drafter import save_drafter
from drafter.canvas import DraftPolicy, DraftRules
from mlx_diffgemma import batch_generate, stream_generate
from mlx_diffgemma.drafting import Draft
from mlx_diffgemma.draws import Draws
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.evaluation.run import evaluate
from mlx_diffgemma.evaluation.tasks import tasks_named
from mlx_diffgemma.policy import ReferencePolicy
from mlx_diffgemma.prompt_cache import PromptCache
from mlx_diffgemma.rules import RulesPolicy
from mlx_diffgemma.session import Loop, Session
from mlx_diffgemma.tokenizer import chat_ids
from tests.drafter.drafters import random_drafter
from tests.parity.test_trajectories import nano_prompts
from tests.test_cli import run as run_command

LENGTH = 64


class Fixed:
    """A canvas drafter that knows by heart what to put where; -1 leaves the noise."""

    taps = (2,)

    def __init__(self, guesses, soft=None):
        self.guesses, self.soft, self.rows = guesses, soft, {}

    def begin(self):
        return []

    def read(self, sessions, taps):
        for session, own in zip(sessions, taps):
            session.draft.append(own[2].shape[0])

    def seed(self, sessions):
        drafts = []
        for session in sessions:
            assert sum(session.draft) == session.cache.length, "all that the target has read"
            assert not session.pending.size, "and nothing is left to read"
            guess = self.guesses.get((session.draws.seed, session.canvas_index))
            guess = mx.full((session.canvas.size,), -1) if guess is None else mx.array(guess[: session.canvas.size])
            drafts.append(Draft(mx.where(guess < 0, session.canvas, guess), None, guess >= 0))
        return drafts


def run(model, prompts, policy, max_tokens=256, together=True):
    """(sessions, their steps) of prompt i with seed i."""
    sessions = [Session(model, ids, policy, Draws(i, 1024), model.config.generation.eos_token_ids, max_tokens)
                for i, ids in enumerate(prompts)]
    steps = {id(session): [] for session in sessions}
    for group in [sessions] if together else [[s] for s in sessions]:
        loop = Loop(model, group)
        while loop.active:
            for session, step in loop.advance():
                steps[id(session)].append(step)
    return sessions, [steps[id(session)] for session in sessions]


def answers(sessions):
    return [[c.tokens.tolist() for c in s.canvases] for s in sessions]


def numbers(steps):
    return [[(s.canvas_index, s.retry, s.argmax.tolist(), s.canvas.tolist(), s.reason) for s in own] for own in steps]


def base_of(model, **own):
    return ReferencePolicy.from_config(model.config.generation, coverage=1 - 1e-6, **own)


def drafted(base, guesses, watchdog=8):
    return DraftPolicy(base, Fixed(guesses), watchdog)


@pytest.fixture(scope="module")
def reference(nano_pair):
    model, _ = nano_pair
    prompts = nano_prompts(6)
    return (prompts, *run(model, prompts, base_of(model)))


def test_nothing_drafted_is_the_reference(nano_pair, reference):
    model, _ = nano_pair
    prompts, sessions, steps = reference
    found, own = run(model, prompts, drafted(base_of(model), {}, watchdog=1))
    assert (answers(found), numbers(own)) == (answers(sessions), numbers(steps))
    found, own = run(model, prompts, random_drafter(model).canvas(model, base_of(model), DraftRules(gate=1.5)))
    assert (answers(found), numbers(own)) == (answers(sessions), numbers(steps))


def committed(steps):
    return {(i, s.canvas_index): np.array(s.argmax) for i, own in enumerate(steps) for s in own if s.committed}


def test_a_right_draft_saves_steps(nano_pair, reference):
    model, _ = nano_pair
    prompts, sessions, steps = reference
    found, own = run(model, prompts, drafted(base_of(model), committed(steps)))
    assert answers(found) == answers(sessions)
    assert sum(map(len, own)) < 0.9 * sum(map(len, steps))
    canvases = [canvas for session in found for canvas in session.canvases]
    assert all(c.proposed == c.accepted == c.tokens.size for c in canvases if not c.retries)
    assert all(np.array_equal(step.draft, committed(steps)[i, step.canvas_index]) for i, of in enumerate(own) for step in of
               if not step.retry)


def test_later_canvases_are_drafted_behind_their_commits(nano_pair):
    model, tokenizer = nano_pair
    (question,) = tasks_named("story")[0].questions(1)
    (session,), _ = run(model, [chat_ids(tokenizer, question.messages)], drafted(base_of(model), {(0, 1): np.full(LENGTH, -1)}))
    assert len(session.canvases) > 1


def test_what_is_not_sure_stays_noise(nano_pair):
    model, _ = nano_pair
    drafter = random_drafter(model)
    drafter.norm.weight = -drafter.norm.weight  # else a random one mostly says what it reads
    policy = drafter.canvas(model, base_of(model), DraftRules(gate=0.5, passes=2))
    session = Session(model, nano_prompts(1)[0], policy, Draws(0, 1024), (1,), 64)
    policy.drafter.read([session], [{layer: mx.random.normal((5, 128)) for layer in policy.drafter.taps}])
    session.open_canvas()
    (draft,) = policy.drafter.seed([session])
    sure, kept = np.array(draft.drafted), np.array(draft.ids) == np.array(session.canvas)
    assert 0 < sure.sum() < sure.size
    assert kept[~sure].all()
    assert not kept[sure].all()


@pytest.mark.parametrize("wrong", ["another's", "ends", "noise"])
def test_a_wrong_draft_costs_no_more_than_the_watchdog_allows(wrong, nano_pair, reference):
    model, _ = nano_pair
    prompts, _, steps = reference
    guesses = committed(steps)
    if wrong == "another's":
        guesses = {key: guesses[(key[0] + 1) % len(prompts), 0] for key in guesses}
    else:
        noise = np.random.default_rng(0)
        guesses = {key: np.full(LENGTH, 1) if wrong == "ends" else noise.integers(0, 1024, LENGTH) for key in guesses}
    _, own = run(model, prompts, drafted(base_of(model, max_steps=12), guesses, watchdog=4))
    for of in own:
        for index in {step.canvas_index for step in of}:
            first = [step for step in of if step.canvas_index == index and step.retry == 0]
            assert len(first) <= 4
            assert all(step.draft is not None for step in first)
            assert (first[-1].reason == "watchdog") == first[-1].rejected
            again = [step for step in of if step.canvas_index == index and step.retry]
            assert len(again) <= 12
            assert all(step.draft is None for step in again)
    assert any(step.reason == "watchdog" for of in own for step in of)


def test_after_the_watchdog_comes_the_reference_with_other_draws(nano_pair, reference):
    model, _ = nano_pair
    prompts, _, steps = reference
    hard = next(i for i, own in enumerate(steps) if len(own) > 3)
    guess = {(0, 0): np.random.default_rng(1).integers(0, 1024, LENGTH)}
    _, (own,) = run(model, [prompts[hard]], drafted(base_of(model), guess, watchdog=1), max_tokens=LENGTH)
    assert [step.reason for step in own][:1] == ["watchdog"]

    class Shifted(ReferencePolicy):  # the reference, begun with the numbers of a second attempt
        def seed(self, draws, canvas_index, retry, start, length):
            return super().seed(draws, canvas_index, 1, start, length)

    class Second(Draws):
        def step(self, canvas_index, retry, step, start, length):
            return super().step(canvas_index, 1, step, start, length)

    again = Session(model, prompts[hard], base_of(model), Second(0, 1024), model.config.generation.eos_token_ids, LENGTH)
    loop = Loop(model, [again])
    wanted = []
    while loop.active:
        wanted += [step.argmax.tolist() for _, step in loop.advance()]
    assert [step.argmax.tolist() for step in own[1:]] == wanted


def test_a_batch_is_as_alone_also_beside_undrafted_ones(nano_pair):
    model, _ = nano_pair
    prompts = nano_prompts(6)
    rules = DraftRules(gate=0.5, handoff=True, watchdog=4)
    policy = random_drafter(model, head_size=200).canvas(model, base_of(model, max_steps=10), rules)
    alone, alone_steps = run(model, prompts, policy, together=False)
    together, steps = run(model, prompts, policy)
    assert answers(alone) == answers(together)
    assert numbers(alone_steps) == numbers(steps)
    assert sum(c.proposed + c.retries for s in alone for c in s.canvases) > 0
    mixed = [Session(model, ids, policy if i % 2 else base_of(model, max_steps=10), Draws(i, 1024),
                     model.config.generation.eos_token_ids, 256) for i, ids in enumerate(prompts)]
    loop = Loop(model, mixed)
    while loop.active:
        loop.advance()
    assert answers(mixed)[1::2] == answers(alone)[1::2]


def test_rules_underneath_keep_their_meaning(nano_pair):
    model, _ = nano_pair
    prompts = nano_prompts(6)
    base = RulesPolicy.from_config(model.config.generation, drop_tail=1, length=32)
    _, steps = run(model, prompts, base)
    _, own = run(model, prompts, drafted(base, {}))
    assert numbers(own) == numbers(steps)
    _, own = run(model, prompts, drafted(base, {(i, 0): np.full(LENGTH, 7) for i in range(6)}))
    assert all(step.draft is None or step.draft.size == step.argmax.size for of in own for step in of)
    assert any(step.draft is not None and step.draft.size < 32 for of in own for step in of), "a tail left"


class TestFromOutside:
    def test_generate(self, nano_pair):
        model, tokenizer = nano_pair
        drafter, prompts = random_drafter(model), nano_prompts(3)
        drafter.confidence.bias = mx.array([9.0])  # sure of everything
        steps = []
        pieces = list(stream_generate(model, tokenizer, prompts[2], seed=5, draft_model=drafter, on_step=steps.append))
        assert pieces[-1].finish_reason
        assert any(step.draft is not None for step in steps)
        (whole,) = batch_generate(model, tokenizer, prompts[2:], seeds=[5], draft_model=drafter)
        assert whole.tokens == tuple(t for piece in pieces for t in piece.tokens)
        assert (whole.proposed, whole.accepted) == (pieces[-1].proposed, pieces[-1].accepted)

    @pytest.mark.parametrize("mode", ["diffusion", "ar"])
    def test_evaluate(self, mode, nano_pair):
        model, tokenizer = nano_pair
        drafter, tasks = random_drafter(model), tasks_named("add,copy")
        drafter.confidence.bias = mx.array([3.0])
        report = evaluate(model, tokenizer, tasks, 2, [3], draft_model=drafter, mode=mode, max_tokens=40)
        for task, result in zip(tasks, report.results):
            prompts = [chat_ids(tokenizer, question.messages) for question in task.questions(2)]
            own = batch_generate(model, tokenizer, prompts, seeds=[3_000_009, 3_000_010], draft_model=drafter, mode=mode,
                                 max_tokens=40)
            proposed, accepted = (sum(getattr(r, name) for r in own) for name in ("proposed", "accepted"))
            assert result.accepted == (accepted / proposed if proposed else None)
            if mode == "ar":
                forwards = sum(len(r.tokens) / r.tokens_per_forward for r in own)
                assert result.tokens_per_forward == pytest.approx(sum(len(r.tokens) for r in own) / forwards)

    def test_refused(self, nano_pair):
        model, tokenizer = nano_pair
        for drafter, message in ((random_drafter(model, confidence=False), "left to right only"),
                                 (random_drafter(model, mask_token_id=4), "left to right only")):
            with pytest.raises(UserError, match=message):
                next(stream_generate(model, tokenizer, "Hi", draft_model=drafter))
        with pytest.raises(UserError, match="prompt_cache does not keep"):
            list(stream_generate(model, tokenizer, "Hi", draft_model=random_drafter(model), prompt_cache=PromptCache(model)))
        for rules in ({"gate": 0.0}, {"passes": 0}, {"watchdog": 0}):
            with pytest.raises(UserError, match=next(iter(rules))):
                DraftRules(**rules)

    def test_command(self, monkeypatch, capsys, nano_pair, tmp_path):
        save_drafter(random_drafter(nano_pair[0]), tmp_path)
        options = ["-p", "Add 12 and 30.", "--json", "--draft-model", str(tmp_path)]
        code, out, _ = run_command(monkeypatch, capsys, "generate", *options)
        record = json.loads(out.splitlines()[-1])
        assert (code, record["finish_reason"]) == (0, "stop")
        assert {"proposed", "accepted", "retries"} <= record.keys()
