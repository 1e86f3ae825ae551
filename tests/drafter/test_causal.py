"""Drafted left-to-right decoding: whatever the drafter says, the tokens are those of plain
decoding.
"""

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma import batch_generate, stream_generate
from mlx_diffgemma.decoding.autoregressive import (
    CausalLoop,
    CausalPolicy,
    CausalSession,
    causal_sessions,
)
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.model.cache import Cache
from mlx_diffgemma.sampling.draws import Draws
from tests.drafter.drafters import Oracle, random_drafter
from tests.helpers.prompts import nano_prompts
from tests.variants import few

WAYS = {
    "greedy": {},
    "sampled": {"temperature": 1.0},
    "cut": {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
}


def prompts_of(count):
    """Held-out questions of every task; each third has four others before it and passes the window
    of 64.
    """
    asked = nano_prompts(count)
    return [
        [token for before in asked[max(0, i - 4) : i] for token in before] + ids
        if i % 3 == 2
        else ids
        for i, ids in enumerate(asked)
    ]


def plain(model, tokenizer, prompts, **options):
    return [
        r.tokens
        for r in batch_generate(
            model, tokenizer, prompts, mode="ar", seeds=range(len(prompts)), **options
        )
    ]


def oracle(model, answers, wrong, seed=0):
    found = Oracle(wrong, model.config.text.vocab_size, seed)
    found.answers = dict(enumerate(answers))
    return found


@pytest.mark.parametrize(
    ("way", "batch_size"),
    few([("greedy", 1), ("greedy", 5), ("sampled", 5), ("cut", 5)], ("greedy", 1), ("sampled", 5)),
)
def test_a_random_drafter_changes_nothing(way, batch_size, random_pair):
    model, tokenizer = random_pair
    prompts = prompts_of(6)
    assert max(map(len, prompts)) > 64, "some pass the window"
    wanted = plain(model, tokenizer, prompts, max_tokens=40, **WAYS[way])
    drafter = random_drafter(model)
    found = batch_generate(
        model,
        tokenizer,
        prompts,
        mode="ar",
        seeds=range(6),
        draft_model=drafter,
        batch_size=batch_size,
        max_tokens=40,
        **WAYS[way],
    )
    assert [r.tokens for r in found] == wanted
    assert all(r.proposed > 0 for r in found if len(r.tokens) > 2)


@pytest.mark.parametrize(
    ("way", "wrong"),
    few(
        [("greedy", 0.0), ("greedy", 0.2), ("sampled", 0.2), ("cut", 0.2), ("sampled", 1.0)],
        ("greedy", 0.2),
        ("cut", 0.2),
    ),
)
def test_a_drafter_that_is_partly_right_changes_nothing(way, wrong, random_pair):
    model, tokenizer = random_pair
    prompts = prompts_of(6)
    wanted = plain(model, tokenizer, prompts, max_tokens=40, **WAYS[way])
    found = batch_generate(
        model,
        tokenizer,
        prompts,
        mode="ar",
        seeds=range(6),
        batch_size=4,
        max_tokens=40,
        draft_model=oracle(model, wanted, wrong),
        **WAYS[way],
    )
    assert [r.tokens for r in found] == wanted
    proposed, accepted = (sum(getattr(r, name) for r in found) for name in ("proposed", "accepted"))
    assert proposed > 0
    assert (
        accepted == proposed
        if wrong == 0.0
        else accepted < 0.1 * proposed
        if wrong == 1.0
        else 0 < accepted < proposed
    )


@pytest.mark.slow
def test_five_hundred_prompts(nano_pair, capsys):
    """A difference may come only from two best tokens that rounding tells apart."""
    model, tokenizer = nano_pair
    prompts, options = prompts_of(500), {"max_tokens": 40, "batch_size": 32}
    wanted = plain(model, tokenizer, prompts, **options)
    for name, drafter in (
        ("random", random_drafter(model, seed=1)),
        ("partly right", oracle(model, wanted, 0.15)),
    ):
        found = [
            r.tokens
            for r in batch_generate(
                model,
                tokenizer,
                prompts,
                mode="ar",
                seeds=range(500),
                draft_model=drafter,
                **options,
            )
        ]
        differing = [index for index in range(500) if found[index] != wanted[index]]
        for index in differing:
            place = next(i for i, (a, b) in enumerate(zip(found[index], wanted[index])) if a != b)
            ids = mx.array([*prompts[index], *wanted[index][:place]])
            best = mx.sort(
                model.encode([ids], [Cache(model.config.text)], logits="last").logits[0][0]
            )[-2:]
            assert (best[1] - best[0]).item() < 1e-3, (index, place)
        with capsys.disabled():
            print(f"\n{name}: {len(differing)} of 500 prompts differ, at ties")
        assert len(differing) <= 5


def test_what_is_read_are_the_rows_in_the_cache(random_pair):
    """The drafter sees the hidden state of every position once, in order, and of no rejected one."""
    model, tokenizer = random_pair
    prompt = prompts_of(6)[5]
    (wanted,) = plain(model, tokenizer, [prompt], max_tokens=24)
    drafter = oracle(model, [wanted], 0.4)
    list(
        stream_generate(
            model,
            tokenizer,
            prompt,
            mode="ar",
            seed=0,
            draft_model=drafter,
            max_tokens=24,
            prefill_step_size=16,
        )
    )
    (rows,) = drafter.embed_inputs.values()
    states = model.encode(
        [mx.array([*prompt, *wanted[:-1]])], [Cache(model.config.text)], taps=(1,)
    ).taps[1][0]
    read = mx.concatenate(rows)
    assert read.shape == states.shape
    assert mx.abs(read - states).max().item() < 1e-3


def test_responses_tell_what_came_from_the_draft(random_pair):
    model, tokenizer = random_pair
    prompt = nano_prompts(1)[0]
    (wanted,) = plain(model, tokenizer, [prompt], max_tokens=30)
    pieces = list(
        stream_generate(
            model,
            tokenizer,
            prompt,
            mode="ar",
            seed=0,
            draft_model=oracle(model, [wanted], 0.3),
            max_tokens=30,
        )
    )
    assert tuple(t for piece in pieces for t in piece.tokens) == wanted
    assert sum(piece.from_draft for piece in pieces) == pieces[-1].accepted > 0
    assert pieces[-1].proposed > pieces[-1].accepted
    assert pieces[-1].tokens_per_forward > 1
    assert [piece.finish_reason is not None for piece in pieces] == [False] * (len(pieces) - 1) + [
        True
    ]


def test_the_block_follows_the_acceptance(random_pair):
    session = CausalSession(
        [1],
        Cache(random_pair[0].config.text),
        CausalPolicy(),
        Draws(0, 10),
        frozenset(),
        100,
        block=4,
    )
    assert session.take([1, 2, 3, 4, 5], [1, 2, 3, 4]) == 5
    assert session.block == 6
    assert session.take([1, 9, 3, 4, 5], [7, 2, 3, 4]) == 1
    assert session.block == 2
    assert session.take([1, 2, 7], [1, 3]) == 2
    assert session.block == 2
    assert (session.tokens[-2:], session.pending, session.proposed, session.accepted) == (
        [1, 2],
        [2],
        10,
        5,
    )


@pytest.mark.parametrize("eos", [frozenset({3}), frozenset()])
def test_nothing_comes_after_the_end(eos, random_pair):
    session = CausalSession(
        [1], Cache(random_pair[0].config.text), CausalPolicy(), Draws(0, 10), eos, 3
    )
    assert session.take([1, 3, 5, 6, 7], [1, 3, 5, 6]) == (2 if eos else 3)
    assert session.accepted == len(session.tokens)


def test_bad_options(random_pair):
    model, tokenizer = random_pair
    drafter = random_drafter(model)
    for options, message in (
        ({"draft_model": drafter, "num_draft_tokens": 3}, "mode 'ar'"),
        ({"mode": "ar", "num_draft_tokens": 3}, "without a draft"),
        ({"mode": "ar", "draft_model": drafter, "num_draft_tokens": 0}, "at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            next(stream_generate(model, tokenizer, "Hi", **options))


class Believer(CausalSession):
    """The broken rule: what is proposed for the next position is believed."""

    def take(self, drawn, proposal):
        return super().take([*(proposal or drawn)[:1], *drawn[1:]], proposal)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [CausalSession, Believer], ids=["ours", "broken"])
def test_the_distribution_of_samples(kind):
    """1e5 answers of three tokens over a vocabulary that can be enumerated."""
    from tests.drafter.tiny import tiny_vocabulary_model

    model, vocabulary, count = (
        tiny_vocabulary_model(),
        7,
        100_000 if kind is CausalSession else 10_000,
    )
    prompt, policy = [1, 5, 2, 6, 3], CausalPolicy(temperature=1.0)
    prefix = Cache(model.config.text)
    model.encode([mx.array(prompt[:-1])], [prefix])

    class Guess:  # sometimes likely, sometimes not, and never asking the target
        longest, taps = 4, ()

        def causal(self, target):
            return self

        def begin(self):
            return None

        def read(self, sessions, taps):
            pass

        def propose(self, sessions, counts):
            return [
                [(s.draws.seed + sum(s.tokens) + i) % vocabulary for i in range(n)]
                for s, n in zip(sessions, counts)
            ]

    seen = np.zeros((vocabulary,) * 3)
    for first in range(0, count, 200):
        sessions = [
            kind([prompt[-1]], prefix.copy(), policy, Draws(seed, vocabulary), frozenset(), 3)
            for seed in range(first, first + 200)
        ]
        loop = CausalLoop(model, sessions, 512, Guess())
        while loop.active:
            loop.advance()
        np.add.at(seen, tuple(np.array([s.tokens for s in sessions]).T), 1)

    def next_token(ids):
        logits = model.encode(
            [mx.array([*prompt, *ids])], [Cache(model.config.text)], logits="last"
        ).logits[0][0]
        return np.array(mx.softmax(logits), dtype=np.float64)

    expected = np.zeros_like(seen)
    for a, p in enumerate(next_token([])):
        for b, q in enumerate(next_token([a])):
            expected[a, b] = count * p * q * next_token([a, b])
    enough = expected >= 5
    cells = np.append(expected[enough], expected[~enough].sum())
    counts = np.append(seen[enough], seen[~enough].sum())
    statistic, freedom = ((counts - cells) ** 2 / cells).sum(), cells.size - 1
    assert freedom > 50
    # The chi-square distribution is near normal here; five deviations are one chance in three
    # million.
    assert (statistic < freedom + 5 * (2 * freedom) ** 0.5) == (kind is CausalSession), (
        statistic,
        freedom,
    )


def test_sessions_of_a_drafted_loop_are_those_asked_for(random_pair):
    model, _ = random_pair
    sessions = causal_sessions(model, [[1, 2, 3]], CausalPolicy(), [Draws(0, 10)], [1], [5])
    loop = CausalLoop(model, sessions, 512, random_drafter(model).causal(model), 3)
    assert (loop.longest, sessions[0].block) == (3, 1)
