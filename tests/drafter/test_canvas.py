"""Drafted canvases: no draft is the reference, the target decides whatever the draft says, and the
watchdog bounds the cost.
"""

import itertools
import json
from types import MethodType, SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from drafter import save_drafter
from drafter.canvas import CanvasDraft
from drafter.rules import DraftRules
from mlx_diffgemma import batch_generate, stream_generate
from mlx_diffgemma.checkpoint.loading import load_model
from mlx_diffgemma.decoding.loop import Loop
from mlx_diffgemma.decoding.prompt_cache import PromptCache
from mlx_diffgemma.decoding.session import Session
from mlx_diffgemma.decoding.verifier import VerifyResult
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.evaluation.run import evaluate
from mlx_diffgemma.evaluation.tasks import tasks_named
from mlx_diffgemma.model.attention import Segment
from mlx_diffgemma.model.cache import Cache
from mlx_diffgemma.sampling.draws import Draws
from mlx_diffgemma.sampling.policy import ReferencePolicy
from mlx_diffgemma.sampling.rules import RulesPolicy
from mlx_diffgemma.sampling.sampler import Before
from mlx_diffgemma.sampling.stopping import StopContext
from mlx_diffgemma.text.tokenizer import chat_ids
from tests.checkpoints import make_checkpoint
from tests.drafter.drafters import random_drafter
from tests.helpers.drafted import LENGTH, Fixed, answers, base_of, committed, drafted, numbers, run
from tests.helpers.images import prompt_of, small
from tests.helpers.in_process import run as run_command
from tests.helpers.knowing import prompts_of
from tests.helpers.prompts import nano_prompts
from tests.variants import few


@pytest.fixture(scope="module")
def reference(knowing_pair):
    """Four prompts, the first and the third of which are answered by two canvases."""
    model, _ = knowing_pair
    prompts = prompts_of(4)
    return (prompts, *run(model, prompts, base_of(model)))


def test_nothing_drafted_is_the_reference(knowing_pair, reference):
    model, _ = knowing_pair
    prompts, sessions, steps = reference
    found, own = run(model, prompts, drafted(base_of(model), {}, watchdog=1))
    assert (answers(found), numbers(own)) == (answers(sessions), numbers(steps))
    found, own = run(
        model, prompts, random_drafter(model).canvas(model, base_of(model), DraftRules(gate=1.5))
    )
    assert (answers(found), numbers(own)) == (answers(sessions), numbers(steps))


def test_a_right_draft_saves_steps(knowing_pair, reference):
    model, _ = knowing_pair
    prompts, sessions, steps = reference
    found, own = run(model, prompts, drafted(base_of(model), committed(steps)))
    assert answers(found) == answers(sessions)
    assert sum(map(len, own)) < 0.9 * sum(map(len, steps))
    canvases = [canvas for session in found for canvas in session.canvases]
    assert all(c.proposed == c.accepted == c.tokens.size for c in canvases if not c.retries)
    assert all(
        np.array_equal(step.draft, committed(steps)[i, step.canvas_index])
        for i, of in enumerate(own)
        for step in of
        if not step.retry
    )


def test_later_canvases_are_drafted_behind_their_commits(knowing_pair):
    model, _ = knowing_pair
    policy = drafted(base_of(model, max_steps=4), {(0, 1): np.full(LENGTH, -1)})
    (session,), _ = run(model, prompts_of(1), policy)
    assert len(session.canvases) > 1


def test_what_is_not_sure_stays_noise(nano_pair):
    model, _ = nano_pair
    drafter = random_drafter(model)
    drafter.norm.weight = -drafter.norm.weight  # else a random one mostly says what it reads
    policy = drafter.canvas(model, base_of(model), DraftRules(gate=0.5, passes=2))
    session = Session(model, nano_prompts(1)[0], policy, Draws(0, 1024), (1,), 64)
    policy.drafter.read(
        [session], [{layer: mx.random.normal((5, 128)) for layer in policy.drafter.taps}]
    )
    session.open_canvas()
    (draft,) = policy.drafter.seed([session])
    sure, kept = np.array(draft.drafted), np.array(draft.ids) == np.array(session.canvas.ids)
    assert 0 < sure.sum() < sure.size
    assert kept[~sure].all()
    assert not kept[sure].all()


@pytest.mark.parametrize("wrong", few(["another's", "ends", "noise"], "noise"))
def test_a_wrong_draft_costs_no_more_than_the_watchdog_allows(
    wrong, knowing_pair, nano_pair, reference
):
    model, _ = knowing_pair
    prompts, _, steps = reference
    if wrong != "noise":  # texts that a real model may believe
        model, prompts = nano_pair[0], nano_prompts(4)
        _, steps = run(model, prompts, base_of(model))
    guesses = committed(steps)
    if wrong == "another's":
        guesses = {key: guesses[(key[0] + 1) % len(prompts), 0] for key in guesses}
    else:
        noise = np.random.default_rng(0)
        guesses = {
            key: np.full(LENGTH, 1) if wrong == "ends" else noise.integers(0, 1024, LENGTH)
            for key in guesses
        }
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


def test_after_the_watchdog_comes_the_reference_with_other_draws(knowing_pair, reference):
    model, _ = knowing_pair
    prompts, _, steps = reference
    hard = next(i for i, own in enumerate(steps) if len(own) > 3)
    guess = {(0, 0): np.random.default_rng(1).integers(0, 1024, LENGTH)}
    _, (own,) = run(
        model, [prompts[hard]], drafted(base_of(model), guess, watchdog=1), max_tokens=LENGTH
    )
    assert [step.reason for step in own][:1] == ["watchdog"]

    class Shifted(ReferencePolicy):  # the reference, begun with the numbers of a second attempt
        def initial_canvas(self, draws, canvas_index, retry, start, length):
            return super().seed(draws, canvas_index, 1, start, length)

    class Second(Draws):
        def step(self, canvas_index, retry, step, start, length):
            return super().step(canvas_index, 1, step, start, length)

    again = Session(
        model,
        prompts[hard],
        base_of(model),
        Second(0, 1024),
        model.config.generation.eos_token_ids,
        LENGTH,
    )
    loop = Loop(model, [again])
    wanted = []
    while loop.active:
        wanted += [step.argmax.tolist() for _, step in loop.advance()]
    assert [step.argmax.tolist() for step in own[1:]] == wanted


def test_the_drafters_own_passes(nano_pair):
    """Sampler and schedule are those of the policy underneath, over the tokens it can draft; its
    draws are its own.
    """
    model, _ = nano_pair
    drafter = random_drafter(model, head_size=200)
    drafter.norm.weight, drafter.confidence.bias = -2 * drafter.norm.weight, mx.array([2.0])
    policy = drafter.canvas(model, base_of(model), DraftRules(passes=4, gate=1e-6))
    own, head = policy.drafter, np.array(drafter.head_ids)
    session = Session(model, nano_prompts(1)[0], policy, Draws(3, 1024), (1,), 64)
    own.read(
        [session],
        [{layer: mx.random.normal((5, 128), key=mx.random.key(layer)) for layer in own.taps}],
    )
    session.open_canvas()
    noise = np.array(session.canvas.ids)
    (draft,) = own.seed([session])
    x, before = own.head.embed(mx.array(noise)), np.full(64, -1)
    for number in range(3):
        logits = own.head.logits(drafter(x, [Segment(0, 64, session.draft, canvas=True)]))
        draws = Draws(3, 1024).step(0, 0, 2**32 + number, 0, 64)
        step = base_of(model).sample(
            [base_of(model)],
            [number * 48 // 4],
            [64],
            logits[None],
            draws.u[None],
            np.full((1, 64), -1),
            Before(
                mx.array(before)[None],
                mx.zeros((1, 64), dtype=mx.bool_),
                mx.zeros((1, 0, 64), dtype=mx.int32),
            ),
            mx.array([-1]),
        )
        before = np.array(step.canvas[0])
        assert 0 < (before < 0).sum() < 64, "some of it is accepted"
        ids = (
            np.where(before < 0, draws.renoise, head[before])
            if number < 2
            else head[np.array(step.argmax[0])]
        )
        x = drafter.condition(own.head.embed(mx.array(ids)), own.head.mean_embedding(logits))
    wanted = head[
        np.array(
            mx.argmax(
                own.head.logits(drafter(x, [Segment(0, 64, session.draft, canvas=True)])),
                axis=-1,
            )
        )
    ]
    assert np.array(draft.ids).tolist() == wanted.tolist()
    assert draft.passes == 4
    drafter.confidence.bias = mx.array([50.0])
    assert own.seed([session])[0].passes == 1, "sure of all of it, it takes no more"


def test_refining_leaves_what_is_accepted(nano_pair):
    model, _ = nano_pair
    drafter = random_drafter(model, refinement=True)
    drafter.norm.weight = -drafter.norm.weight
    own = drafter.canvas(model, base_of(model), DraftRules(refine=True, gate=0.5)).drafter
    session = Session(
        model, nano_prompts(1)[0], drafter.canvas(model, base_of(model)), Draws(0, 1024), (1,), 64
    )
    own.read([session], [{layer: mx.random.normal((5, 128)) for layer in own.taps}])
    session.open_canvas()
    session.canvas.accepted = mx.arange(64) % 3 == 0
    taps = {layer: mx.random.normal((64, 128), key=mx.random.key(layer)) for layer in own.taps}
    (draft,) = own.refine([session], [taps])
    sure, kept = np.array(draft.drafted), np.array(draft.ids) == np.array(session.canvas.ids)
    assert 0 < sure.sum() < 43
    assert not sure[::3].any()
    assert kept[~sure].all()
    assert not kept[sure].all()
    (other,) = own.refine([session], [{layer: -rows for layer, rows in taps.items()}])
    assert not mx.array_equal(other.ids, draft.ids), "it reads what the step made of the canvas"


@pytest.mark.slow
def test_refined_in_a_batch_is_as_alone(nano_pair):
    model, _ = nano_pair
    prompts, drafter = nano_prompts(5), random_drafter(model, head_size=200, refinement=True)
    drafter.norm.weight = -drafter.norm.weight
    base = RulesPolicy.from_config(model.config.generation, drop_tail=1, max_steps=8)
    policy = drafter.canvas(model, base, DraftRules(gate=0.5, refine=True, watchdog=5))
    alone, alone_steps = run(model, prompts, policy, together=False)
    together, steps = run(model, prompts, policy)
    assert (answers(alone), numbers(alone_steps)) == (answers(together), numbers(steps))
    _, plain = run(model, prompts, drafter.canvas(model, base, DraftRules(gate=0.5, watchdog=5)))
    assert numbers(plain) != numbers(steps)
    for own in steps:
        for a, b in itertools.pairwise(own):
            if (
                a.draft is not None
                and b.draft is not None
                and a.canvas_index == b.canvas_index
                and a.retry == b.retry
            ):
                size = b.draft.size
                guessed = (np.array(b.draft) >= 0) & (np.array(a.draft[:size]) < 0)
                assert not (guessed & np.array(a.accepted[:size])).any()


class TestJudge:
    def test_surprise(self, knowing_pair, reference):
        model, _ = knowing_pair
        prompts, _, steps = reference
        _, own = run(model, prompts, drafted(base_of(model), committed(steps), judge=2.0))
        seen = 0
        for ids, of in zip(prompts, own):
            prefix = list(ids)
            for step in of:
                if step.surprise is not None:
                    argmax = step.argmax.tolist()
                    ends = np.flatnonzero(np.isin(argmax, model.config.generation.eos_token_ids))
                    text = argmax[: ends[0] + 1] if ends.size else argmax
                    logits = np.array(
                        model.encode(
                            [mx.array(prefix + text)], [Cache(model.config.text)], logits="all"
                        ).logits[0],
                        dtype=np.float64,
                    )[len(prefix) - 1 : -1]
                    logprobs = (
                        logits
                        - np.log(
                            np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)
                        )
                        - logits.max(-1, keepdims=True)
                    )
                    entropy = -(np.exp(logprobs) * logprobs).sum(-1)
                    own_logprob = logprobs[np.arange(len(text)), text]
                    assert step.surprise == pytest.approx((-entropy - own_logprob).max(), abs=2e-3)
                    seen += 1
                if step.committed:
                    prefix += step.argmax.tolist()
        assert seen >= len(prompts)

    def test_what_it_committed_is_in_the_cache(self, knowing_pair):
        model, _ = knowing_pair
        (ids,) = prompts_of(1)
        _, steps = run(model, [ids], base_of(model, max_steps=8), max_tokens=128)
        (session,), own = run(
            model, [ids], drafted(base_of(model), committed(steps), judge=2.0), max_tokens=128
        )
        assert len(session.canvases) == 2
        first = session.canvases[0]
        assert (
            first.certificate in ("causal", "stable-and-confident-and-causal"),
            first.judged_rows,
        ) == (True, 64 * first.judged)
        cache = Cache(model.config.text)
        output = model.encode(
            [mx.array(session.ids[: session.cache.length])], [cache], logits="last"
        )
        assert mx.allclose(session.next_logits, output.logits[0][-1], atol=1e-3)
        assert session.cache.length == len(ids) + 64
        for layer in range(len(model.layers)):
            for a, b in zip(session.cache.view(layer), cache.view(layer)):
                assert mx.allclose(a, b, atol=1e-4)
        # Fixed.seed has asserted that the drafter read it too.
        assert [step.certificate for step in own[0] if step.committed] == [
            canvas.certificate for canvas in session.canvases
        ]

    @pytest.mark.parametrize("wrong", few(["another's", "ends"], "ends"))
    def test_what_was_only_believed_begins_anew(self, wrong, knowing_pair, nano_pair, reference):
        model, _ = knowing_pair
        prompts, plainly, steps = reference
        if wrong == "another's":  # which is seldom believed: a real model, and more of them
            model, prompts = nano_pair[0], nano_prompts(6)
            plainly, steps = run(model, prompts, base_of(model))
        guesses = committed(steps)
        guesses = {
            key: np.full(LENGTH, 1) if wrong == "ends" else guesses[(key[0] + 1) % len(prompts), 0]
            for key in guesses
        }
        believed, _ = run(model, prompts, drafted(base_of(model), guesses))
        judged, own = run(model, prompts, drafted(base_of(model), guesses, judge=2.0))
        plain = answers(plainly)
        assert sum(a != b for a, b in zip(answers(believed), plain)) >= 2
        assert sum(a != b for a, b in zip(answers(judged), plain)) < sum(
            a != b for a, b in zip(answers(believed), plain)
        )
        rejected = [step for of in own for step in of if step.reason == "judge"]
        assert rejected
        assert all(step.rejected and step.surprise > 2 for step in rejected)
        for step in (
            step for of in own for step in of if step.committed and step.draft is not None
        ):
            assert step.surprise <= 2
        for step in (step for of in own for step in of if step.retry):
            assert step.retry <= 2
            assert (step.draft is None) or step.retry == 1, (
                "what stood before the first surprise gets one more attempt"
            )
            assert step.draft is not None or step.surprise is None, "the reference is not judged"

    def test_the_certificate_says_who_agreed(self, nano_pair):
        policy = drafted(base_of(nano_pair[0]), {}, judge=2.0)
        for stop, surprise, name in (
            (True, None, "stable-and-confident"),
            (True, 0.1, "stable-and-confident-and-causal"),
            (False, 0.1, "causal"),
        ):
            context = StopContext(0, 0, LENGTH, stop, (0.0,), (9,), True, surprise=surprise)
            assert (policy.stop_reason(context), policy.certificate(context)) == (
                "converged" if stop or surprise else None,
                name,
            )
        context = StopContext(0, 0, LENGTH, True, (0.0,), (9,), True, surprise=2.1)
        assert (policy.stop_reason(context), policy.should_retry(context, "judge")) == (
            "judge",
            True,
        )

    def test_drafted_attempts_are_not_those_the_rules_count(self, nano_pair):
        policy = drafted(
            RulesPolicy.from_config(nano_pair[0].config.generation, reroll_empty=1), {}
        )
        for retry, drafts, again in ((1, 1, True), (2, 2, True), (2, 1, False), (1, 0, False)):
            context = StopContext(0, retry, LENGTH, True, (0.0,), (0,), drafts=drafts)
            assert policy.should_retry(context, "converged") == again

    def test_a_judge_that_nothing_pleases_gives_way(self, knowing_pair, reference):
        model, _ = knowing_pair
        prompts, _, steps = reference
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                VerifyResult,
                "surprises",
                property(lambda self: mx.where(mx.arange(len(self.ids)) < 1, 0.0, 9.0)),
            )
            found, own = run(model, prompts, drafted(base_of(model), committed(steps), judge=2.0))
        assert any(canvas.retries == 2 for session in found for canvas in session.canvases)
        for step in (step for of in own for step in of if step.retry):
            assert (step.retry <= 2, step.retry == 1 or step.draft is None) == (True, True)

    def test_a_batch_is_as_alone(self, knowing_pair, reference):
        model, _ = knowing_pair
        prompts, _, steps = reference
        guesses = committed(steps)
        guesses = {key: guesses[(key[0] + key[1] % 2) % len(prompts), 0] for key in guesses}
        alone, alone_steps = run(
            model, prompts, drafted(base_of(model), guesses, judge=2.0), together=False
        )
        together, own = run(model, prompts, drafted(base_of(model), guesses, judge=2.0))
        assert (answers(alone), numbers(alone_steps)) == (answers(together), numbers(own))

    def test_it_certifies_before_the_stop_rule_may(self, knowing_pair, reference):
        model, _ = knowing_pair
        prompts, sessions, steps = reference
        found, own = run(model, prompts, drafted(base_of(model), committed(steps), judge=2.0))
        assert answers(found) == answers(sessions)
        assert any(len(of) == 1 and of[0].certificate == "causal" for of in own)
        slow = RulesPolicy.from_config(model.config.generation, min_steps=3)
        _, own = run(model, prompts, drafted(slow, committed(steps), judge=2.0))
        assert all(step.step >= 2 for of in own for step in of if step.committed)
        _, own = run(model, prompts, drafted(base_of(model), {}, judge=2.0))
        assert numbers(own) == numbers(steps), "what is not drafted is not judged"


class TestAtOnce:
    """Drafts of which the judge is asked before any step."""

    def test_what_does_not_surprise_is_committed_without_a_step(self, knowing_pair, reference):
        model, _ = knowing_pair
        prompts, sessions, steps = reference
        policy = drafted(base_of(model), committed(steps), judge=2.0, whole=True)
        found, own = run(model, prompts, policy)
        assert answers(found) == answers(sessions)
        canvases = [canvas for session in found for canvas in session.canvases]
        free = [canvas for canvas in canvases if not canvas.steps]
        assert len(free) >= len(canvases) / 2
        assert all(
            (canvas.certificate, canvas.judged, canvas.converged) == ("causal", 1, True)
            for canvas in free
        )
        for step in (step for of in own for step in of if step.step == -1):
            assert (step.reason, step.committed, step.draft.tolist()) == (
                "converged",
                True,
                step.argmax.tolist(),
            )
            assert step.logprob.size == step.entropy.size == step.argmax.size
        alone, alone_steps = run(model, prompts, policy, together=False)
        assert (answers(alone), numbers(alone_steps)) == (answers(found), numbers(own))
        slow = RulesPolicy.from_config(model.config.generation, min_steps=2)
        _, own = run(model, prompts, drafted(slow, committed(steps), judge=2.0, whole=True))
        assert all(step.step >= 1 for of in own for step in of if step.committed)

    def test_what_stands_before_the_first_surprise_is_left(self, knowing_pair, reference):
        model, _ = knowing_pair
        prompts, _, steps = reference
        guess, number = committed(steps)[0, 0].copy(), 3
        right = guess[:number].tolist()
        guess[number : number + 2] = [900, 901]
        policy = drafted(base_of(model), {(0, 0): guess}, judge=2.0, whole=True)
        (session,), (own,) = run(model, prompts[:1], policy)
        assert own[0].draft.tolist() == right + [-1] * (LENGTH - number)
        assert session.canvases[0].proposed == session.canvases[0].accepted == number
        fresh = Session(model, prompts[0], policy, Draws(0, 1024), (1,), 64)
        fresh.open_canvas()
        noise = fresh.canvas.ids.tolist()
        loop = Loop(model, [again := Session(model, prompts[0], policy, Draws(0, 1024), (1,), 64)])
        seen, denoise = [], model.denoise

        def watched(self, canvas, *rest, **options):
            seen.append(canvas.tolist())
            return denoise(canvas, *rest, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(model), "denoise", watched)
            loop.advance()
        assert seen[0] == right + noise[number:]
        assert again.cache.length == len(prompts[0]), (
            "what was asked about a wrong text is not kept"
        )
        with pytest.raises(ValueError, match="fewer than 1"):
            again.cache.accept(1)

    def test_answers_without_a_step(self, knowing_pair, reference):
        model, tokenizer = knowing_pair
        prompts, sessions, steps = reference
        short = next(i for i, session in enumerate(sessions) if len(session.canvases) == 1)
        drafter = Fixed({(7, 0): committed(steps)[short, 0]}, whole=True)
        (response,) = batch_generate(
            model, tokenizer, [prompts[short]], seeds=[7], draft_model=drafter
        )
        tokens = sessions[short].canvases[0].tokens
        assert (response.steps, response.judged, response.certificate) == (0, 1, "causal")
        assert response.tokens == tuple(tokens.tolist())
        assert response.tokens_per_forward == tokens.size
        assert (response.is_canvas, response.logprobs.size) == (True, tokens.size)


@pytest.mark.parametrize(
    ("length", "confidence", "whole"),
    [
        (
            5,
            0.65,
            True,
        ),  # 0.65 ** 6 = 0.075 with the end token, above 0.1 times six tenths of the canvas
        (5, 0.60, False),  # 0.047
        (10, 0.79, False),  # 0.095, of a text that fills the canvas
        (10, 0.80, True),  # 0.107
    ],
)
def test_trust_is_scaled_by_the_texts_share_of_the_canvas(length, confidence, whole):
    canvas = SimpleNamespace(ids=mx.zeros((10,), dtype=mx.int32), length=10)
    session = SimpleNamespace(canvas=canvas, eos_ids=(1,))
    drafts = SimpleNamespace(
        rules=DraftRules(trust=0.1), head=SimpleNamespace(tokens=lambda places: places)
    )
    drafts._text_probability = MethodType(CanvasDraft._text_probability, drafts)
    places = mx.array([7] * length + [1] * (10 - length))
    draft = CanvasDraft._draft(
        drafts, session, places, mx.full((10,), confidence), mx.zeros((10, 1)), 1
    )
    assert draft.whole == whole


def test_rules_from_text():
    assert DraftRules.parse("") == DraftRules()
    assert DraftRules.parse(
        "gate=0.5, passes=3,refine=on,judge=off,watchdog=9,handoff=off"
    ) == DraftRules(0.5, 3, False, True, None, 0.1, 9)
    assert DraftRules.parse("judge=1.5").judge == 1.5
    assert DraftRules.parse("trust=off").trust is None
    for text, message in (
        ("speed=9", "Unknown draft rule 'speed'"),
        ("gate=much", "cannot be 'much'; give a number"),
        ("judge=maybe", "a number or off"),
        ("refine=1", "give on or off"),
        ("passes=0", "at least 1"),
        ("gate", "cannot be ''"),
        ("judge=0", "judge must be above 0"),
    ):
        with pytest.raises(UserError, match=message):
            DraftRules.parse(text)


def test_a_batch_is_as_alone_also_beside_undrafted_ones(knowing_pair):
    model, _ = knowing_pair
    prompts = prompts_of(4)
    base = base_of(model, max_steps=6, entropy_bound=20.0)  # so that what is drawn shows
    rules = DraftRules(gate=0.5, handoff=True, watchdog=3)
    policy = random_drafter(model, head_size=200).canvas(model, base, rules)
    alone, alone_steps = run(model, prompts, policy, together=False)
    together, steps = run(model, prompts, policy)
    assert answers(alone) == answers(together)
    assert numbers(alone_steps) == numbers(steps)
    assert sum(c.proposed for s in alone for c in s.canvases) > 0
    assert len({len(own) for own in steps}) > 1, "rows leave the batch at different steps"
    mixed = [
        Session(
            model,
            ids,
            policy if i % 2 else base,
            Draws(i, 1024),
            model.config.generation.eos_token_ids,
            256,
        )
        for i, ids in enumerate(prompts)
    ]
    loop = Loop(model, mixed)
    while loop.active:
        loop.advance()
    assert answers(mixed)[1::2] == answers(alone)[1::2]


def test_rules_underneath_keep_their_meaning(knowing_pair):
    model, _ = knowing_pair
    prompts = prompts_of(4)
    base = RulesPolicy.from_config(model.config.generation, drop_tail=1, length=32)
    _, steps = run(model, prompts, base)
    _, own = run(model, prompts, drafted(base, {}))
    assert numbers(own) == numbers(steps)
    _, own = run(model, prompts, drafted(base, {(i, 0): np.full(LENGTH, 7) for i in range(4)}))
    assert all(
        step.draft is None or step.draft.size == step.argmax.size for of in own for step in of
    )
    assert any(step.draft is not None and step.draft.size < 32 for of in own for step in of), (
        "a tail left"
    )


class TestFromOutside:
    def test_generate(self, nano_pair):
        model, tokenizer = nano_pair
        drafter, prompts = random_drafter(model), nano_prompts(3)
        drafter.confidence.bias = mx.array([9.0])  # sure of everything
        drafter.rules = DraftRules(judge=None)
        steps = []
        pieces = list(
            stream_generate(
                model, tokenizer, prompts[2], seed=5, draft_model=drafter, on_step=steps.append
            )
        )
        assert pieces[-1].finish_reason
        assert any(step.draft is not None for step in steps)
        (whole,) = batch_generate(model, tokenizer, prompts[2:], seeds=[5], draft_model=drafter)
        assert whole.tokens == tuple(t for piece in pieces for t in piece.tokens)
        assert (whole.proposed, whole.accepted) == (pieces[-1].proposed, pieces[-1].accepted)

    @pytest.mark.parametrize("mode", ["diffusion", "ar"])
    def test_evaluate(self, mode, knowing_pair):
        model, tokenizer = knowing_pair
        drafter, tasks = random_drafter(model), tasks_named("add,copy")
        drafter.confidence.bias = mx.array([3.0])
        options = {"max_tokens": 40} | ({"max_denoising_steps": 4} if mode == "diffusion" else {})
        report = evaluate(
            model, tokenizer, tasks, 2, [3], draft_model=drafter, mode=mode, **options
        )
        for task, result in zip(tasks, report.results):
            prompts = [chat_ids(tokenizer, question.messages) for question in task.questions(2)]
            own = batch_generate(
                model,
                tokenizer,
                prompts,
                seeds=[3_000_009, 3_000_010],
                draft_model=drafter,
                mode=mode,
                **options,
            )
            proposed, accepted = (
                sum(getattr(r, name) for r in own) for name in ("proposed", "accepted")
            )
            assert result.accepted == (accepted / proposed if proposed else None)
            if mode == "ar":
                forwards = sum(len(r.tokens) / r.tokens_per_forward for r in own)
                assert result.tokens_per_forward == pytest.approx(
                    sum(len(r.tokens) for r in own) / forwards
                )

    def test_drafters_and_rules_that_do_not_fit_are_refused(self, nano_pair):
        model, tokenizer = nano_pair
        for drafter, message in (
            (random_drafter(model, confidence=False), "left to right only"),
            (random_drafter(model, mask_token_id=4), "left to right only"),
        ):
            with pytest.raises(UserError, match=message):
                next(stream_generate(model, tokenizer, "Hi", draft_model=drafter))
        with pytest.raises(UserError, match="prompt_cache does not keep"):
            list(
                stream_generate(
                    model,
                    tokenizer,
                    "Hi",
                    draft_model=random_drafter(model),
                    prompt_cache=PromptCache(model),
                )
            )
        with pytest.raises(UserError, match="not trained to refine"):
            random_drafter(model).canvas(model, base_of(model), DraftRules(refine=True))
        for rules in ({"gate": 0.0}, {"passes": 0}, {"watchdog": 0}):
            with pytest.raises(UserError, match=next(iter(rules))):
                DraftRules(**rules)

    def test_the_command_reports_what_was_drafted(self, monkeypatch, capsys, nano_pair, tmp_path):
        save_drafter(random_drafter(nano_pair[0]), tmp_path)
        options = ["-p", "Add 12 and 30.", "--json", "--draft-model", str(tmp_path)]
        code, out, _ = run_command(monkeypatch, capsys, "generate", *options)
        record = json.loads(out.splitlines()[-1])
        assert (code, record["finish_reason"]) == (0, "stop")
        assert {"proposed", "accepted", "retries"} <= record.keys()


def test_prompts_with_images_in_a_batch_are_as_alone(tmp_path):
    """The drafter reads the hidden states of the images' rows too, in any chunk."""
    target = load_model(make_checkpoint(tmp_path, calm=False, vision="plain"), "float32")
    policy = random_drafter(target).canvas(target, base_of(target, max_steps=3))

    def sessions():
        made = []
        for seed, parts in enumerate(((5, small(target, 0), 3), (small(target, 1, 9), 7), (20,))):
            ids, placed = prompt_of(target, *parts)
            made.append(Session(target, ids, policy, Draws(seed, 301), (1,), 48, images=placed))
        return made

    def told(group, chunk=2048):
        loop = Loop(target, group, chunk)
        while loop.active:
            loop.advance()
        return [[canvas.tokens.tolist() for canvas in session.canvases] for session in group]

    alone = [told([session])[0] for session in sessions()]
    assert told(sessions()) == alone
    assert told(sessions(), chunk=11) == alone
