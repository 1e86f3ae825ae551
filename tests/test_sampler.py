"""One rule a test, on hand-made logits and entropies."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma.sampling import truncation
from mlx_diffgemma.sampling.sampler import (
    CHUNK,
    Before,
    Flag,
    StepNumbers,
    accept,
    draw_next,
    few_candidates,
    first_position,
    inverse_cdf,
    is_stable,
    largest,
    sample_step,
    truncate,
)

NEVER = -mx.ones((1, 1, 4), dtype=mx.int32)


def numbers(
    temperature=1.0,
    bound=0.1,
    confidence=0.005,
    greedy=False,
    top_k=None,
    top_p=None,
    min_p=None,
    rows=1,
):
    return StepNumbers(
        mx.full((rows,), temperature),
        mx.full((rows,), bound),
        mx.full((rows,), confidence),
        mx.array([greedy] * rows),
        None if top_k is None else mx.array([top_k] * rows),
        None if top_p is None else mx.array([top_p] * rows),
        min_p=None if min_p is None else mx.array([min_p] * rows),
    )


def before(shape, history, canvas=None, accepted=None):
    return Before(
        mx.zeros(shape, dtype=mx.int32) if canvas is None else mx.array(canvas),
        mx.zeros(shape, dtype=mx.bool_) if accepted is None else mx.array(accepted),
        history,
    )


def step(logits, u=0.5, renoise=9, history=NEVER, eos=(1,), **options):
    logits = mx.array(logits, dtype=mx.float32)
    shape = logits.shape[:2]
    return sample_step(
        logits,
        mx.full(shape, u),
        mx.full(shape, renoise, dtype=mx.int32),
        before(shape, history),
        numbers(rows=shape[0], **options),
        mx.array(eos),
    )


class TestAccept:
    def test_sum_of_the_smaller_ones_decides_not_the_own_entropy(self):
        # ascending 0.02 0.05 0.04…: sums before each are 0, 0.02, 0.06, 0.12
        got = accept(mx.array([[0.05, 0.02, 0.06, 9.0]]), mx.array([0.1]))
        assert got.tolist() == [[True, True, True, False]]

    def test_a_sum_exactly_at_the_bound_is_accepted(self):
        assert accept(mx.array([[0.25, 0.25, 5.0]]), mx.array([0.5])).tolist() == [
            [True, True, True]
        ]
        assert accept(mx.array([[0.25, 0.25, 5.0]]), mx.array([0.4999])).tolist() == [
            [True, True, False]
        ]

    def test_the_most_certain_position_is_always_accepted(self):
        assert accept(mx.array([[7.0, 6.0, 8.0]]), mx.array([1e-9])).tolist() == [
            [False, True, False]
        ]

    def test_the_mask_is_in_the_order_of_the_positions(self):
        """Of a cycle of three, which is not its own inverse."""
        got = accept(mx.array([[0.3, 0.05, 0.2]]), mx.array([0.1]))
        assert got.tolist() == [[False, True, True]]

    def test_each_row_has_its_own_bound(self):
        got = accept(mx.array([[0.3, 0.4], [0.3, 0.4]]), mx.array([0.1, 0.35]))
        assert got.tolist() == [[True, False], [True, True]]


class TestInverseCdf:
    def test_intervals_are_half_open(self):
        p = mx.array([[0.25, 0.5, 0.25]] * 5)
        assert inverse_cdf(p, mx.array([0.0, 0.2499, 0.25, 0.7499, 0.75])).tolist() == [
            0,
            0,
            1,
            1,
            2,
        ]

    def test_never_a_token_of_probability_zero(self):
        p = mx.array([[0.0, 1.0, 0.0], [0.0, 0.3, 0.0]])
        largest = float(np.nextafter(np.float32(1), np.float32(0)))
        for u in (0.0, largest):
            assert inverse_cdf(p, mx.array([u, u])).tolist() == [1, 1]

    def test_an_uneven_running_sum_cannot_pick_an_impossible_token(self, monkeypatch):
        uneven = mx.concatenate(
            [mx.array([[0.5, 0.4999, 0.5001]]), mx.ones((1, CHUNK - 3))], axis=-1
        )
        real = mx.cumsum
        monkeypatch.setattr(
            mx, "cumsum", lambda x, axis: uneven if x.shape[-1] == CHUNK else real(x, axis=axis)
        )
        assert inverse_cdf(mx.array([[0.5, 0.0, 0.0, 0.5]]), mx.array([0.5])).tolist() == [3]

    @pytest.mark.parametrize("vocabulary", [CHUNK, CHUNK + 1, 1000, 4096])
    def test_chunks_do_not_show(self, vocabulary):
        """Against one running sum in float64, except where u lies within rounding of an edge."""
        rng = np.random.default_rng(vocabulary)
        p = np.exp(rng.normal(0, 3, (400, vocabulary))).astype(np.float32)
        p[rng.random(p.shape) < 0.3] = 0
        u = rng.random(400).astype(np.float32)
        running = np.cumsum(p.astype(np.float64), axis=-1)
        target = u * running[:, -1]
        clear = np.abs(running - target[:, None]).min(-1) > 1e-5 * running[:, -1]
        got = np.array(inverse_cdf(mx.array(p), mx.array(u)))
        assert clear.mean() > 0.9
        assert (got == (running <= target[:, None]).sum(-1))[clear].all()
        assert (p[np.arange(400), got] > 0).all()

    def test_any_total(self):
        assert inverse_cdf(mx.array([[1.0, 3.0]]), mx.array([0.24])).tolist() == [0]
        assert inverse_cdf(mx.array([[1.0, 3.0]]), mx.array([0.26])).tolist() == [1]
        many = mx.ones((1, 4 * CHUNK)) * 7
        assert inverse_cdf(many, mx.array([0.8])).tolist() == [int(0.8 * 4 * CHUNK)]

    def test_distribution(self):
        p, u = np.array([0.1, 0.2, 0.3, 0.4]), (np.arange(20_000) + 0.5) / 20_000
        got = np.array(
            inverse_cdf(
                mx.array(np.tile(p, (20_000, 1)).astype(np.float32)), mx.array(u.astype(np.float32))
            )
        )
        np.testing.assert_allclose(np.bincount(got) / 20_000, p, atol=2e-4)


@pytest.mark.parametrize("vocabulary", [5, CHUNK, 1000, 20_000])
@pytest.mark.parametrize("k", [1, 4, 64])
def test_the_largest_are_found_exactly(vocabulary, k):
    k = min(k, vocabulary)
    x = np.random.default_rng(k).normal(size=(3, 2, vocabulary)).astype(np.float32)
    x[0] = -np.abs(x[0])  # the filling of the last chunk must not win
    got = np.sort(np.array(largest(mx.array(x), k)), axis=-1)
    assert (got == np.sort(np.argsort(-x, axis=-1)[..., :k], axis=-1)).all()


class TestTruncate:
    P = mx.array([[[0.1, 0.4, 0.2, 0.3]]])

    def test_top_k(self):
        assert truncate(self.P, numbers(top_k=2)).tolist()[0][0] == pytest.approx([0, 0.4, 0, 0.3])

    def test_top_p_keeps_the_token_that_passes_the_mass(self):
        assert (np.array(truncate(self.P, numbers(top_p=0.5)))[0, 0] > 0).tolist() == [
            False,
            True,
            False,
            True,
        ]
        assert (np.array(truncate(self.P, numbers(top_p=0.39)))[0, 0] > 0).tolist() == [
            False,
            True,
            False,
            False,
        ]

    def test_zero_is_off_for_a_row(self):
        rows = mx.concatenate([self.P, self.P])
        got = truncate(
            rows, StepNumbers(*[mx.ones((2,))] * 3, mx.array([False, False]), mx.array([0, 1]))
        )
        assert (np.array(got) > 0).sum(-1).tolist() == [[4], [1]]

    @pytest.mark.parametrize("total", [1e-3, 2.5, 40.0])
    def test_weights_of_any_total(self, total):
        for top_p, kept in ((0.95, 4), (0.85, 3), (0.5, 2), (0.39, 1)):
            assert (np.array(truncate(self.P * total, numbers(top_p=top_p))) > 0).sum() == kept

    def test_equal_weights_stay_or_go_together(self):
        equal = mx.array([[[0.125, 0.375, 0.125, 0.375]]])
        kept = [False, True, False, True]
        for options in ({"top_k": 1}, {"top_p": 0.1}, {"top_p": 0.75}, {"min_p": 0.5}):
            assert (np.array(truncate(equal, numbers(**options)))[0, 0] > 0).tolist() == kept, (
                options
            )
        assert (np.array(truncate(equal, numbers(top_p=0.76))) > 0).all()

    @pytest.mark.parametrize("vocabulary", [5, 301, 2048, 5000])
    @pytest.mark.parametrize("top_k", [[0] * 4, [3, 0, 64, 1], [100, 65, 200, 0], [1, 2, 3, 4]])
    @pytest.mark.parametrize(
        "top_p", [[1.0] * 4, [0.95, 0.5, 1.0, 0.01], [0.999999, 0.9, 0.25, 0.1]]
    )
    def test_as_by_sorting(self, vocabulary, top_k, top_p):
        """What sorting all weights in float64 keeps, each row by its own numbers, equal weights
        among them.
        """
        rng = np.random.default_rng(vocabulary)
        weights = np.exp(rng.normal(0, 4, (4, 4, vocabulary))).astype(np.float32)
        weights /= weights.max(axis=-1, keepdims=True)
        weights[:, :2] = np.round(weights[:, :2] * 64) / 64
        min_p = [0.0, 0.1, 0.0, 1.0]
        got = truncate(
            mx.array(weights),
            StepNumbers(
                *[mx.ones((4,))] * 3,
                top_k=mx.array(top_k),
                top_p=mx.array(top_p),
                min_p=mx.array(min_p),
                few=few_candidates(top_k),
            ),
        )
        for row, (k, p, share) in enumerate(zip(top_k, top_p, min_p)):
            for own, found in zip(weights[row].astype(np.float64), np.array(got)[row]):
                rising = np.sort(own)
                least = max(
                    rising[-min(k, vocabulary)] if k else 0.0, float(np.float32(share)) * rising[-1]
                )
                dropped = np.cumsum(rising) - rising
                if p < 1:
                    least = max(
                        least, rising[(dropped <= (1 - float(np.float32(p))) * own.sum()).sum() - 1]
                    )
                np.testing.assert_array_equal(found, np.where(own >= least, own, 0))

    def test_nothing_is_sorted_as_a_whole(self, monkeypatch):
        sizes, sort = [], mx.sort
        monkeypatch.setattr(
            mx, "sort", lambda x, axis: sizes.append(x.shape[-1]) or sort(x, axis=axis)
        )
        monkeypatch.setattr(mx, "argsort", None)
        weights = mx.random.uniform(shape=(1, 2, 9000))
        for options in ({"top_k": 70}, {"top_p": 0.9}):
            mx.eval(truncate(weights, numbers(**options)))
        assert max(sizes) <= truncation.SLICE

    def test_acceptance_looks_at_the_whole_distribution(self):
        logits = np.zeros((1, 4, 50))
        assert step(logits, top_k=1).entropy.tolist()[0] == pytest.approx([np.log(50)] * 4)


class TestStop:
    CERTAIN = np.eye(4)[None, [2, 3, 2, 3]] * 40

    def test_stable_and_confident(self):
        out = step(self.CERTAIN, history=mx.array([[[2, 3, 2, 3]]]))
        assert out.flags[0, Flag.STOP].item() == 1

    def test_not_at_the_first_step(self):
        assert step(self.CERTAIN).flags[0, Flag.STOP].item() == 0

    def test_not_when_the_argmax_changed(self):
        assert (
            step(self.CERTAIN, history=mx.array([[[2, 3, 2, 2]]])).flags[0, Flag.STOP].item() == 0
        )

    def test_not_when_unsure(self):
        logits = np.eye(4)[None, [2, 3, 2, 3]] * 2.0
        assert step(logits, history=mx.array([[[2, 3, 2, 3]]])).flags[0, Flag.STOP].item() == 0

    def test_mean_entropy_exactly_at_the_threshold_goes_on(self):
        logits = np.zeros((1, 4, 2))
        entropy = step(logits).flags[0, Flag.MEAN_ENTROPY].item()
        same = mx.array([[[0, 0, 0, 0]]])
        assert step(logits, history=same, confidence=entropy).flags[0, Flag.STOP].item() == 0
        assert (
            step(logits, history=same, confidence=entropy * 1.001).flags[0, Flag.STOP].item() == 1
        )

    def test_two_canvases_of_history_must_both_agree(self):
        now = mx.array([[2, 3]])
        assert is_stable(now, mx.array([[[2, 3], [2, 3]]])).tolist() == [True]
        assert is_stable(now, mx.array([[[2, 2], [2, 3]]])).tolist() == [False]

    def test_no_history_asked_for_is_stable(self):
        assert is_stable(mx.array([[2, 3]]), mx.zeros((1, 0, 2), dtype=mx.int32)).tolist() == [True]


def test_entropy_is_that_of_the_scaled_logits():
    logits = np.random.default_rng(0).normal(0, 3, (1, 4, 30))
    p = np.exp(logits / 0.7) / np.exp(logits / 0.7).sum(-1, keepdims=True)
    np.testing.assert_allclose(
        np.array(step(logits, temperature=0.7).entropy), -(p * np.log(p)).sum(-1), rtol=1e-4
    )


def test_entropy_survives_probabilities_that_underflow():
    logits = np.zeros((1, 4, 3))
    logits[..., 0] = 500.0
    assert step(logits).entropy.tolist() == [[0.0] * 4]


def test_every_position_not_accepted_now_is_renoised():
    logits = np.zeros((1, 4, 20))
    logits[0, 2, 7] = 60.0
    out = step(logits, bound=1e-6, renoise=9)
    assert out.accepted.tolist() == [[True, False, True, False]], (
        "nothing comes before the second in the sum"
    )
    assert out.canvas.tolist() == [[10, 9, 7, 9]]
    again = sample_step(
        mx.array(logits, dtype=mx.float32),
        mx.full((1, 4), 0.5),
        mx.full((1, 4), 9, dtype=mx.int32),
        before((1, 4), NEVER, accepted=[[True] * 4]),
        numbers(bound=1e-6),
        mx.array([1]),
    )
    assert again.canvas.tolist() == [[10, 9, 7, 9]], "also what the step before accepted"


def test_greedy_takes_the_argmax_but_keeps_the_entropies():
    logits = np.random.default_rng(1).normal(0, 1, (1, 4, 12))
    greedy, drawn = (
        step(logits, u=0.99, bound=100.0, greedy=True),
        step(logits, u=0.99, bound=100.0),
    )
    assert greedy.canvas.tolist() == logits.argmax(-1).tolist()
    assert drawn.canvas.tolist() != greedy.canvas.tolist()
    assert greedy.entropy.tolist() == drawn.entropy.tolist()


def test_logprob_is_that_of_the_argmax():
    logits = np.random.default_rng(2).normal(0, 1, (1, 4, 12))
    p = np.exp(logits / 0.5) / np.exp(logits / 0.5).sum(-1, keepdims=True)
    np.testing.assert_allclose(
        np.exp(np.array(step(logits, temperature=0.5).logprob)), p.max(-1), rtol=1e-5
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_logits_are_flagged(bad):
    logits = np.zeros((2, 4, 5))
    logits[1, 2, 3] = bad
    assert step(logits, history=-mx.ones((2, 1, 4), dtype=mx.int32)).flags[
        :, Flag.NON_FINITE
    ].tolist() == [0, 1]


def test_first_position_of_an_end_token():
    assert first_position(mx.array([[5, 3, 1, 3], [5, 5, 5, 5]]), mx.array([1, 3])).tolist() == [
        1,
        4,
    ]


def test_rows_do_not_influence_each_other():
    logits = np.random.default_rng(3).normal(0, 4, (3, 6, 40))
    history = -mx.ones((3, 1, 6), dtype=mx.int32)
    together = step(logits, history=history)
    for row in range(3):
        alone = step(logits[row : row + 1], history=history[:1])
        for name in ("canvas", "argmax", "accepted", "entropy", "flags"):
            assert mx.array_equal(getattr(together, name)[row], getattr(alone, name)[0]), name


class TestDrawNext:
    LOGITS = mx.array([[0.0, 2.0, 1.0]])

    def test_greedy(self):
        assert draw_next(self.LOGITS, mx.array([0.99]), 0.0).tolist() == [1]

    def test_sampled(self):
        assert draw_next(self.LOGITS, mx.array([0.01]), 1.0).tolist() == [0]
        assert draw_next(self.LOGITS, mx.array([0.99]), 1.0).tolist() == [2]

    def test_at_the_temperature(self):
        """The first token has 9 % at temperature 1 and 0.2 % at 0.3."""
        assert draw_next(self.LOGITS, mx.array([0.05]), 1.0).tolist() == [0]
        assert draw_next(self.LOGITS, mx.array([0.05]), 0.3).tolist() == [1]

    def test_truncated(self):
        assert draw_next(self.LOGITS, mx.array([0.01]), 1.0, top_k=1).tolist() == [1]
        assert draw_next(self.LOGITS, mx.array([0.99]), 1.0, top_p=0.3).tolist() == [1]
