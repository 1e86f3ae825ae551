"""What a constraint asks of logits, and how it is compiled and kept."""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from transformers import AutoTokenizer

from mlx_diffgemma import nano
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.grammar import constraint as constraints
from mlx_diffgemma.grammar.constraint import Constraint, compile_constraint
from mlx_diffgemma.grammar.pieces import ALONE, PIECE
from mlx_diffgemma.grammar.program import IMPOSSIBLE, Solution
from mlx_diffgemma.grammar.tokens import TokenAutomaton
from mlx_diffgemma.sampling.sampler import StepNumbers, independent

VOCABULARY, ENDS = 2600, (7, 19)
SIZES = [
    1,
    1,
    2,
    3,
    15,
    16,
    17,
    50,
    200,
    ALONE * PIECE + 2,
]  # of the classes; what is left is of none


def numbers(temperature=1.0, **options):
    return StepNumbers(mx.array([temperature]), mx.array([0.1]), mx.array([0.005]), **options)


def constraint(vocabulary):
    """Ten classes of tokens scattered over the vocabulary, and tokens of none."""
    rng = np.random.default_rng(0)
    class_of = np.full(vocabulary, len(SIZES), dtype=np.int32)
    free = rng.permutation(np.setdiff1d(np.arange(vocabulary), ENDS))
    for cls, begin in enumerate(np.cumsum([0, *SIZES[:-1]])):
        class_of[free[begin : begin + SIZES[cls]]] = cls
    behind = np.zeros((1, len(SIZES)), dtype=np.int32)
    return Constraint(
        TokenAutomaton(behind, np.array([True]), class_of, np.zeros(1, dtype=np.int32)),
        ENDS,
        0.0,
        1,
    )


@pytest.fixture(scope="module")
def wide():
    return constraint(VOCABULARY)


def members(constraint, column):
    return np.flatnonzero(constraint.column_of == column)


def logits(seed, length=7, scale=4.0):
    return np.random.default_rng(seed).normal(0, scale, (length, VOCABULARY)).astype(np.float32)


class TestMasses:
    @pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
    @pytest.mark.parametrize("scale", [4.0, 300.0])
    def test_naive_sums_column_by_column(self, wide, temperature, scale):
        given = logits(1, scale=scale)
        given[2, members(wide, 3)] = -1e5
        found = wide.masses(mx.array(given), temperature)
        mass, best = found.read()
        assert mass.shape == best.shape == (7, len(SIZES) + 2)
        for column in range(wide.chain.columns):
            own = members(wide, column)
            scaled = given[:, own].astype(np.float64) / temperature
            exact = np.logaddexp.reduce(scaled, axis=1)
            np.testing.assert_allclose(mass[:, column], exact, rtol=2e-7, atol=2e-6)
            np.testing.assert_array_equal(best[:, column], given[:, own].max(axis=1))
            share = np.exp(scaled - exact[:, None])
            np.testing.assert_allclose(
                np.array(found.entropy[:, column]),
                -(share * (scaled - exact[:, None])).sum(axis=1),
                rtol=1e-5,
                atol=1e-5,
            )
            token = np.array(wide.best(mx.array(given), found, np.full(7, column)))
            np.testing.assert_array_equal(token, own[given[:, own].argmax(axis=1)])

    def test_a_column_without_tokens(self):
        """Where every token is of a class."""
        full = constraint(sum(SIZES) + len(ENDS))
        found = full.masses(mx.array(logits(1)[:, : sum(SIZES) + len(ENDS)]), 1.0)
        mass, best = found.read()
        assert (mass[:, full.chain.other] < -1e29).all()
        assert (best[:, full.chain.other] < -1e29).all()
        assert np.isfinite(mass).all()
        assert np.isfinite(np.array(found.entropy)).all()

    def test_no_number_is_noticed(self, wide):
        """Wherever it stands; what the programme reads is numbers all the same."""
        for value in (np.nan, np.inf, -np.inf):
            given = logits(1)
            given[3, 5] = value
            found = wide.masses(mx.array(given), 1.0)
            assert np.isfinite(np.array(found.read())).all()
            assert (
                np.isnan(np.array(found.entropy)).any(axis=1).tolist()
                == [False] * 3 + [True] + [False] * 3
            )

    def test_columns(self, wide):
        assert (wide.column_of[list(ENDS)] == wide.chain.end).all()
        assert (wide.column_of == wide.chain.other).sum() == VOCABULARY - sum(SIZES) - len(ENDS)


class TestMarginals:
    @pytest.mark.parametrize("temperature", [0.4, 1.0])
    def test_are_those_of_the_biased_logits(self, wide, temperature):
        """Entropy, probabilities and the most probable tokens, as they are taken of logits alone."""
        rng, given = np.random.default_rng(6), logits(6)
        options = numbers(temperature, tail=mx.array([1e-6]))
        found = wide.masses(mx.array(given), temperature)
        bias = np.where(
            rng.random((7, wide.chain.columns)) < 0.3,
            IMPOSSIBLE,
            rng.normal(0, 3, (7, wide.chain.columns)),
        )
        bias[:, 9] = 2.0
        mass, _ = found.read()
        bias = np.maximum(
            bias - np.logaddexp.reduce(bias + mass, axis=1)[:, None], IMPOSSIBLE
        )  # as those of marginals
        path, drawn, rest = (bias + mass).argmax(axis=1), np.full(7, 9), rng.random(7)
        added, marginals = wide.marginals(
            mx.array(given), found, Solution(bias, path, drawn, rest), options
        )
        np.testing.assert_allclose(np.array(added), temperature * bias, rtol=1e-6)
        biased = given + temperature * bias[:, wide.column_of]
        naive = independent(mx.array(biased.astype(np.float32))[None], mx.zeros((1, 7)), options)
        np.testing.assert_allclose(
            np.array(marginals.entropy), np.array(naive.entropy), rtol=1e-4, atol=1e-5
        )
        np.testing.assert_allclose(np.array(marginals.covered), np.array(naive.covered), atol=2e-5)
        probability = np.exp(
            biased / temperature - np.logaddexp.reduce(biased / temperature, axis=1, keepdims=True)
        )
        for name, own in (
            ("argmax", np.exp(np.array(marginals.logprob))),
            ("drawn", np.array(marginals.probability)),
        ):
            tokens = np.array(getattr(marginals, name))
            np.testing.assert_allclose(own[0], probability[np.arange(7), tokens[0]], rtol=1e-4)
        kept = np.array(marginals.kept)[0]
        assert [len(set(row)) for row in kept.tolist()] == [64] * 7
        np.testing.assert_allclose(
            np.sort(np.take_along_axis(biased, kept, axis=1)), np.sort(biased)[:, -64:], rtol=1e-5
        )


def test_so_many_positions_at_once_change_nothing(wide, monkeypatch):
    logits = mx.array(
        np.random.default_rng(3).normal(0, 4, (21, len(wide.column_of))).astype(np.float32)
    )
    found = []
    for count in (4, 64):
        monkeypatch.setattr(constraints, "AT_ONCE", dict.fromkeys(constraints.AT_ONCE, count))
        found.append(wide.masses(logits, 0.7))
    for a, b in zip(*found):
        assert np.array_equal(np.array(a), np.array(b), equal_nan=True)


def drawn_of(constraint, given, columns, u, options):
    logits = mx.array(given)
    found = constraint.masses(logits, options.temperature.item())
    return map(np.array, constraint.draw(logits, found, columns, u, options))


class TestDraw:
    @pytest.mark.parametrize("column", [0, 3, 7, 8, 9, len(SIZES), len(SIZES) + 1])
    def test_softmax_within_the_column(self, wide, column):
        """Stratified: as often as it is probable, up to one at either edge."""
        count, temperature = 2000, 1.6
        row = logits(3)[:1]
        u = (np.arange(count) + 0.5) / count
        drawn, weight = drawn_of(
            wide, np.repeat(row, count, axis=0), np.full(count, column), u, numbers(temperature)
        )
        own = members(wide, column)
        weights = np.exp((row[0, own].astype(np.float64) - row[0, own].max()) / temperature)
        assert np.isin(drawn, own).all()
        np.testing.assert_allclose(weight, weights[np.searchsorted(own, drawn)], rtol=1e-5)
        often = np.bincount(drawn, minlength=VOCABULARY)[own]
        np.testing.assert_allclose(often, weights / weights.sum() * count, atol=1.1)

    def test_each_position_has_its_column(self, wide):
        columns = np.array([9, 0, 3, len(SIZES), 8, 2, 1])
        drawn, _ = drawn_of(wide, logits(4), columns, np.linspace(0, 0.999, 7), numbers())
        np.testing.assert_array_equal(wide.column_of[drawn], columns)

    def test_top_k_within_the_column(self, wide):
        given, count = logits(5)[:1], 50
        drawn, _ = drawn_of(
            wide,
            np.repeat(given, count, axis=0),
            np.full(count, 8),
            np.arange(count) / count,
            numbers(9.0, top_k=mx.array([3])),
        )
        own = members(wide, 8)
        assert set(drawn.tolist()) == set(own[np.argsort(-given[0, own])[:3]].tolist())

    @pytest.mark.parametrize("column", [8, 9])
    def test_top_p_within_the_column(self, wide, column):
        """Stratified, as the softmax of what holds that share of the column's mass."""
        given, count = logits(6)[:1], 2000
        own = members(wide, column)
        shares = np.exp((given[0, own].astype(np.float64) - given[0, own].max()) / 5.0)
        shares /= shares.sum()
        rising = np.sort(shares)
        shares[shares < rising[(np.cumsum(rising) - rising <= 0.05).sum() - 1]] = 0
        u = (np.arange(count) + 0.5) / count
        drawn, _ = drawn_of(
            wide,
            np.repeat(given, count, axis=0),
            np.full(count, column),
            u,
            numbers(5.0, top_p=mx.array([0.95])),
        )
        often = np.bincount(drawn, minlength=VOCABULARY)[own]
        assert (often > 0).sum() > 5
        np.testing.assert_allclose(often, shares / shares.sum() * count, atol=1.1)


class TestCompile:
    def compiled(self, nano_pair, **options):
        return compile_constraint(nano_pair[1], nano_pair[0].config, **options)

    @pytest.mark.parametrize(
        "options", [{"regex": "a+b"}, {"choices": ["yes", "no"]}, {"json_schema": {"type": "null"}}]
    )
    def test_the_same_is_compiled_once(self, nano_pair, options):
        one = self.compiled(nano_pair, **options)
        assert self.compiled(nano_pair, **options) is one
        assert one.nbytes > 0

    def test_kinds_and_orders_are_told_apart(self, nano_pair):
        assert self.compiled(nano_pair, regex="true") is not self.compiled(
            nano_pair, json_schema="true"
        )
        one, other = (
            {"properties": {a: {"type": "null"}, b: {"type": "null"}}} for a, b in ("ab", "ba")
        )
        assert self.compiled(nano_pair, json_schema=one) is not self.compiled(
            nano_pair, json_schema=other
        )

    def test_tokenizers_are_told_apart(self, nano_pair):
        """Each by its own tokens, also where the constraint is the same and the other's was
        compiled before.
        """
        model, tokenizer = nano_pair
        other = AutoTokenizer.from_pretrained(nano.FOLDER)
        swapped = {"a": tokenizer.get_vocab()["b"], "b": tokenizer.get_vocab()["a"]}
        state = json.loads(other.backend_tokenizer.to_str())
        state["model"]["vocab"] = {**state["model"]["vocab"], **swapped}
        other._tokenizer = type(other.backend_tokenizer).from_str(json.dumps(state))
        other = TokenizerWrapper(other)
        one, two = (compile_constraint(own, model.config, regex="a") for own in (tokenizer, other))
        assert one is not two
        for own, constraint in ((tokenizer, one), (other, two)):
            token = own.get_vocab()["a"]
            assert constraint.automaton.accepts(np.array([token]))
            assert not constraint.automaton.accepts(np.array([own.get_vocab()["b"]]))

    def test_the_latest_are_kept(self, nano_pair, monkeypatch):
        monkeypatch.setattr(constraints, "REMEMBERED", 2)
        monkeypatch.setattr(constraints, "_compiled", type(constraints._compiled)())
        first, second = (self.compiled(nano_pair, regex=pattern) for pattern in "ab")
        assert self.compiled(nano_pair, regex="a") is first  # used again, so that b is the oldest
        self.compiled(nano_pair, regex="c")
        assert self.compiled(nano_pair, regex="a") is first
        assert self.compiled(nano_pair, regex="b") is not second

    def test_choices_are_just_these_texts(self, nano_pair):
        automaton = self.compiled(nano_pair, choices=["fox", "forest", "a.c"]).automaton
        for text, expected in {
            "fox": True,
            "forest": True,
            "a.c": True,
            "for": False,
            "abc": False,
            "foxfox": False,
        }.items():
            assert (
                automaton.accepts(np.array(nano_pair[1].encode(text, add_special_tokens=False)))
                == expected
            )

    @pytest.mark.parametrize(
        ("choices", "named"),
        [
            ("yes", "list of texts"),
            ([1], "list of texts"),
            ({"a"}, "list of texts"),
            (5, "list of texts"),
            ([], "at least one"),
            (["a", ""], "none of them empty"),
            (["a", "b", "a"], "'a' is given twice"),
        ],
    )
    def test_choices_that_are_none(self, nano_pair, choices, named):
        with pytest.raises(UserError, match=named):
            self.compiled(nano_pair, choices=choices)

    def test_one_of_three(self, nano_pair):
        with pytest.raises(UserError, match="got none"):
            self.compiled(nano_pair)
        with pytest.raises(UserError, match="got regex and choices"):
            self.compiled(nano_pair, regex="a", choices=["a"])

    def test_time_is_limited(self, nano_pair):
        with pytest.raises(UserError, match="too long"):
            self.compiled(nano_pair, regex="(a|b){20}c", seconds=0)
