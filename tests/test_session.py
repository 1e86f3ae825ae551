"""The loop: what it commits, when it stops, and that rows do not touch each other."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma.decoding.batch import run as run_sessions
from mlx_diffgemma.decoding.canvas_state import Attempts
from mlx_diffgemma.decoding.loop import Loop
from mlx_diffgemma.decoding.session import Session
from mlx_diffgemma.decoding.verifier import VerifyResult
from mlx_diffgemma.errors import NonFiniteLogitsError, UserError
from mlx_diffgemma.sampling.draws import Draws
from tests.helpers.sessions import PROMPTS, UNSURE, Scripted, certain, policy, session


def run(model, sessions, chunk=2048):
    """For each session what left the loop, as plain values."""
    records, loop = {id(s): [] for s in sessions}, Loop(model, sessions, chunk)
    while loop.active:
        for s, step in loop.advance():
            records[id(s)].append(
                (
                    step.canvas_index,
                    step.step,
                    step.canvas.tolist(),
                    step.argmax.tolist(),
                    step.accepted.tolist(),
                    step.mean_entropy,
                    step.reason,
                )
            )
    return [records[id(s)] for s in sessions]


def test_rows_of_a_batch_equal_the_same_rows_alone(tiny):
    together = run(tiny, [session(tiny, row) for row in range(4)])
    for row in range(4):
        assert run(tiny, [session(tiny, row)]) == [together[row]]


def test_a_session_may_join_at_any_step(tiny):
    alone = [run(tiny, [session(tiny, row)])[0] for row in range(2)]
    first, second = session(tiny, 0), session(tiny, 1)
    loop, seen = Loop(tiny, [first]), {id(first): [], id(second): []}
    for turn in range(100):
        if turn == 3:
            loop.sessions.append(second)
        for s, step in loop.advance():
            seen[id(s)].append(step.argmax.tolist())
        if first.finished and second.finished:
            break
    assert seen[id(first)] == [r[3] for r in alone[0]]
    assert seen[id(second)] == [r[3] for r in alone[1]]


def test_a_session_may_be_taken_out_at_any_step(tiny):
    expected = run(tiny, [session(tiny, 1)])[0]
    gone, stays = session(tiny, 0), session(tiny, 1)
    loop, seen = Loop(tiny, [gone, stays]), []
    while not stays.finished:
        for s, step in loop.advance():
            assert s is stays or len(seen) <= 3
            seen += [step.argmax.tolist()] if s is stays else []
        if len(seen) == 3:
            loop.sessions = [stays]
    assert seen == [r[3] for r in expected]
    assert gone.step == 3


class TestFusedCommit:
    """A finished canvas is encoded in the forward of the next one's first step."""

    def test_identical_to_encoding_it_apart(self, tiny):
        for fuses in (True, False):  # the rows of this batch commit at different steps
            sessions = [session(tiny, row, max_tokens=96, fuses_commit=fuses) for row in range(3)]
            records = run(tiny, sessions)
            if fuses:
                fused, caches = records, [s.cache for s in sessions]
        assert records == fused
        assert max(r[0] for r in records[0]) == 3, "four canvases"
        for s, cache in zip(sessions, caches):
            assert s.cache.length == cache.length
            assert all(mx.array_equal(a, b) for a, b in zip(s.cache.arrays, cache.arrays))

    def test_nothing_is_encoded_but_the_prompt(self, tiny, monkeypatch):
        encoded, encode = [], type(tiny).encode

        def count(self, ids, *arguments, **options):
            encoded.append(ids[0].size)
            return encode(self, ids, *arguments, **options)

        monkeypatch.setattr(type(tiny), "encode", count)
        s = session(tiny, 1, max_tokens=96)
        run(tiny, [s])
        assert encoded == [len(PROMPTS[1])]
        assert s.cache.length == len(PROMPTS[1]) + 3 * 24, "the last canvas is never encoded"


def test_a_commit_finds_room_in_the_cache(tiny):
    s = session(tiny, 1, max_tokens=48, eos=())
    loop = Loop(tiny, [s])
    loop.advance()
    before = s.cache.nbytes
    while loop.active:
        loop.advance()
    assert s.cache.length == len(PROMPTS[1]) + 24
    assert s.cache.nbytes == before, "no full layer was copied for it"


def test_prefill_in_chunks_changes_nothing(tiny):
    whole = run(tiny, [session(tiny, 1)])
    for chunk in (2, 7, 39):
        assert run(tiny, [session(tiny, 1)], chunk) == whole


def test_two_loops_may_be_interleaved(tiny):
    expected = [run(tiny, [session(tiny, row)])[0] for row in (0, 1)]
    loops = [Loop(tiny, [session(tiny, 0)]), Loop(tiny, [session(tiny, 1)])]
    seen = [[], []]
    while any(loop.active for loop in loops):
        for index, loop in enumerate(loops):
            seen[index] += [step.argmax.tolist() for _, step in loop.advance()]
    assert seen == [[r[3] for r in rows] for rows in expected]


def test_canvases_until_the_limit(tiny):
    s = session(tiny, 0, max_tokens=49, eos=())
    run(tiny, [s])
    assert [c.tokens.size for c in s.canvases] == [24, 24, 24], (
        "the limit is rounded up to whole canvases"
    )
    assert s.cache.length == 5 + 48, "the last canvas is never encoded"


def test_a_batch_is_as_wide_as_asked(tiny):
    seen = dict[int, set[int]]()
    waiting = [session(tiny, row, max_tokens=24) for row in range(4)]
    for s, step in run_sessions(tiny, waiting, 3):
        seen.setdefault(id(s), set()).add(step.step)
        running = sum(not other.finished and other.step > 0 for other in waiting)
        assert running <= 3
    assert len(seen) == 4


def test_numbers_are_those_of_the_place_in_the_answer(tiny):
    class Noting(Draws):
        def step(self, canvas_index, retry, step, start, length):
            noted.append((canvas_index, step, start))
            return super().step(canvas_index, retry, step, start, length)

    noted = []
    s = Session(tiny, PROMPTS[0], policy(max_steps=2), Noting(0, 301), (), 48)
    run(tiny, [s])
    assert noted == [(0, 0, 0), (0, 0, 0), (0, 1, 0), (1, 0, 24), (1, 0, 24), (1, 1, 24)]


def test_the_history_is_that_of_the_argmax(tiny):
    s = session(tiny, 0, max_tokens=24, eos=(), stability=2)
    loop, argmaxes = Loop(tiny, [s]), []
    while s.step < 3:
        ((_, step),) = loop.advance()
        argmaxes.append(step.argmax.tolist())
        assert step.canvas.tolist() != argmaxes[-1]
    assert [own.tolist() for own in s.canvas.history] == argmaxes[-2:]


def test_the_argmax_of_the_last_step_is_committed(tiny):
    s = session(tiny, 0, max_tokens=24, eos=())
    (records,) = run(tiny, [s])
    assert s.canvases[0].tokens.tolist() == records[-1][3]
    assert s.canvases[0].tokens.tolist() != records[-1][2], "not the sampled canvas"
    assert s.canvases[0].steps == 6
    assert not s.canvases[0].converged
    assert records[-1][-1] == "max_steps"


def test_the_answer_ends_at_the_first_end_token(tiny):
    plain = session(tiny, 2, eos=())
    run(tiny, [plain])
    committed = plain.canvases[0].tokens.tolist()
    ended = session(tiny, 2, eos=(committed[10],))
    run(tiny, [ended])
    assert ended.canvases[-1].ended
    assert ended.canvases[-1].tokens.tolist() == committed[: committed.index(committed[10]) + 1]
    assert len(ended.canvases) == 1


def test_no_forward_runs_past_a_stop(tiny):
    model = Scripted(tiny, [certain(9), certain(9), certain(9)])
    s = session(model, 0, max_tokens=24)
    run(model, [s])
    assert model.forwards == 2, "the second equals the first and is certain"
    assert s.canvases[0].converged


def test_the_stop_rule_starts_anew_with_each_canvas(tiny):
    model = Scripted(tiny, [certain(9)] * 4)
    s = session(model, 0, max_tokens=48)
    run(model, [s])
    assert [c.steps for c in s.canvases] == [2, 2]


def test_a_longer_history_takes_longer(tiny):
    model = Scripted(tiny, [certain(9)] * 4)
    s = session(model, 0, max_tokens=24, stability=3)
    run(model, [s])
    assert s.canvases[0].steps == 4


def test_no_history_stops_at_once(tiny):
    model = Scripted(tiny, [certain(9)])
    s = session(model, 0, max_tokens=24, stability=0)
    run(model, [s])
    assert s.canvases[0].steps == 1


def test_temperatures_of_the_schedule():
    p = policy(max_steps=4)
    assert [p.schedule(step) for step in range(4)] == pytest.approx([0.8, 0.7, 0.6, 0.5])
    assert policy(max_steps=4, temperature=0.5).schedule(0) == pytest.approx(0.4)
    assert policy(max_steps=4, temperature=0.0).schedule(0) == pytest.approx(0.8), (
        "greedy keeps the schedule"
    )


@pytest.mark.parametrize(
    "options", [{"top_p": 0.95}, {"top_p": 0.5}, {"top_k": 5}, {"top_k": 90, "top_p": 0.9}]
)
def test_a_truncated_draw_is_one_of_the_masked_distribution(tiny, options):
    """Token by token the inverse cumulative distribution of what top_k and top_p leave, at the
    request's own numbers.
    """
    s = session(tiny, 0, max_tokens=24, entropy_bound=1e9, **options)
    logits = np.random.default_rng(0).normal(0, 2, (24, 301)).astype(np.float32)
    canvas = np.array(run(Scripted(tiny, [logits[None]] * 6), [s])[0][0][2])
    scaled = logits.astype(np.float64) / 0.8
    weights = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    rising = np.sort(weights, axis=-1)
    below = (np.cumsum(rising, axis=-1) - rising <= 1 - options.get("top_p", 1.0) + 1e-12).sum(
        axis=-1
    ) - 1
    least = np.take_along_axis(rising, below[:, None], axis=-1)
    least = np.maximum(least, rising[:, [-options.get("top_k", 301)]])
    weights[weights < least] = 0
    running = np.cumsum(weights, axis=-1)
    u = Draws(0, 301).step(0, 0, 0, 0, 24).u[:, None] * running[:, -1:]
    assert np.abs(running - u).min() > 1e-6, "no draw hangs on rounding"
    assert canvas.tolist() == (running <= u).sum(axis=-1).tolist()
    assert (canvas != scaled.argmax(axis=-1)).sum() > 6, "varied"


def test_non_finite_logits_stop_the_run(tiny):
    bad = UNSURE.copy()
    bad[0, 3, 4] = np.nan
    model = Scripted(tiny, [UNSURE, bad])
    with pytest.raises(NonFiniteLogitsError, match="canvas 0, step 1"):
        run(model, [session(model, 0)])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 2.1),
        ("temperature", -0.1),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("max_steps", 0),
        ("entropy_bound", 0.0),
        ("stability", -1),
        ("confidence_threshold", 0.0),
        ("t_min", 0.9),
    ],
)
def test_numbers_out_of_range_are_refused(name, value):
    with pytest.raises(UserError):
        policy(**{name: value})


def test_a_token_surprises_where_it_is_less_likely_than_was_to_be_expected():
    verdict = VerifyResult(
        [3, 4], mx.array([-2.0, -0.5]), mx.array([1.5, 0.75]), mx.zeros((5,)), {}, False
    )
    assert verdict.surprises.tolist() == [0.5, -0.25]


def test_what_a_canvas_took_is_counted_for_each_canvas_alone(tiny):
    """Drafter passes and judged rows of one canvas are not those of the next."""
    own = session(tiny, 0, max_tokens=48, eos=())
    taken = {"passes": 3, "verified": 2, "verified_rows": 48}
    loop = Loop(tiny, [own])
    while loop.active:
        if own.canvas is not None and own.step == 1:
            for name, value in taken.items():
                setattr(own.attempts, name, value * (1 + own.canvas_index))
        loop.advance()
    counts = [(canvas.passes, canvas.judged, canvas.judged_rows) for canvas in own.canvases]
    assert counts == [(3, 2, 48), (6, 4, 96)]
    assert own.attempts == Attempts(), "the next canvas starts from nothing"
