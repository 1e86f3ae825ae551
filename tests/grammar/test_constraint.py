"""What a constraint asks of logits, and how it is compiled and kept."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma.errors import UserError
from mlx_diffgemma.grammar import constraint as constraints
from mlx_diffgemma.grammar.constraint import ALONE, Constraint, compile_constraint
from mlx_diffgemma.grammar.tokens import TokenAutomaton
from mlx_diffgemma.sampler import StepNumbers

VOCABULARY, ENDS = 2600, (7, 2599)
SIZES = [1, 1, 2, 3, 4, 5, 8, 9, 200, ALONE + 2]  # the last stands alone, the others by powers of two; what is left is of no class


def numbers(temperature=1.0, **options):
    return StepNumbers(mx.array([temperature]), mx.array([0.1]), mx.array([0.005]), **options)


@pytest.fixture(scope="module")
def wide():
    """Ten classes of tokens scattered over the vocabulary, and tokens of none."""
    rng = np.random.default_rng(0)
    class_of = np.full(VOCABULARY, len(SIZES), dtype=np.int32)
    free = rng.permutation(np.setdiff1d(np.arange(VOCABULARY), ENDS))
    for cls, begin in enumerate(np.cumsum([0, *SIZES[:-1]])):
        class_of[free[begin : begin + SIZES[cls]]] = cls
    behind = np.zeros((1, len(SIZES)), dtype=np.int32)
    return Constraint(TokenAutomaton(behind, np.array([True]), class_of, np.zeros(1, dtype=np.int32)), ENDS, 0.0, 1)


def members(constraint, column):
    return np.arange(VOCABULARY) if column == constraint.chain.any else np.flatnonzero(constraint.column_of == column)


def logits(seed, length=7, scale=4.0):
    return np.random.default_rng(seed).normal(0, scale, (length, VOCABULARY)).astype(np.float32)


class TestMasses:
    @pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
    @pytest.mark.parametrize("scale", [4.0, 300.0])
    def test_naive_sums_column_by_column(self, wide, temperature, scale):
        given = logits(1, scale=scale)
        given[2, members(wide, 3)] = -1e5
        found = wide.masses(mx.array(given), temperature)
        assert found.mass.shape == (7, len(SIZES) + 2)
        for column in range(wide.chain.columns):
            own = members(wide, column)
            exact = np.logaddexp.reduce(given[:, own].astype(np.float64) / temperature, axis=1)
            np.testing.assert_allclose(np.array(found.mass[:, column]), exact, rtol=2e-6, atol=1e-5)
            np.testing.assert_array_equal(np.array(found.best[:, column]), given[:, own].max(axis=1))
            np.testing.assert_array_equal(np.array(found.token[:, column])[[0, 1, 3]], own[given[[0, 1, 3]][:, own].argmax(axis=1)])
            assert np.isin(np.array(found.token[:, column]), own).all()

    def test_classes_together_and_alone(self, wide):
        buckets = {ids.shape[1]: columns.tolist() for columns, ids, _ in wide._buckets}
        assert buckets == {1: [0, 1], 2: [2, len(SIZES)], 4: [3, 4], 8: [5, 6], 16: [7], 256: [8], ALONE + 2: [9]}

    def test_columns(self, wide):
        assert (wide.column_of[list(ENDS)] == wide.chain.end).all()
        assert (wide.column_of == wide.chain.any).sum() == VOCABULARY - sum(SIZES) - len(ENDS)

    def test_spread(self, wide):
        bias = np.random.default_rng(2).normal(size=(3, wide.chain.columns)).astype(np.float32)
        np.testing.assert_array_equal(np.array(wide.spread(mx.array(bias))), bias[:, wide.column_of])


class TestDraw:
    @pytest.mark.parametrize("column", [0, 3, 7, 9, len(SIZES), len(SIZES) + 1])
    def test_softmax_within_the_column(self, wide, column):
        """Stratified: as often as it is probable, up to one at either edge."""
        count, temperature = 2000, 1.6
        row = logits(3)[:1]
        u = (np.arange(count) + 0.5) / count
        drawn = np.array(wide.draw(mx.array(np.repeat(row, count, axis=0)), np.full(count, column), u, numbers(temperature)))
        own = members(wide, column)
        weights = np.exp((row[0, own].astype(np.float64) - row[0, own].max()) / temperature)
        assert np.isin(drawn, own).all()
        often = np.bincount(drawn, minlength=VOCABULARY)[own]
        np.testing.assert_allclose(often, weights / weights.sum() * count, atol=1.1)

    def test_each_position_has_its_column(self, wide):
        columns = np.array([9, 0, 3, len(SIZES), 8, 2, 1])
        drawn = np.array(wide.draw(mx.array(logits(4)), columns, np.linspace(0, 0.999, 7), numbers()))
        np.testing.assert_array_equal(wide.column_of[drawn], columns)

    def test_top_k_within_the_column(self, wide):
        given, count = logits(5)[:1], 50
        drawn = np.array(wide.draw(mx.array(np.repeat(given, count, axis=0)), np.full(count, 8), np.arange(count) / count,
                                   numbers(9.0, top_k=mx.array([3]))))
        own = members(wide, 8)
        assert set(drawn.tolist()) == set(own[np.argsort(-given[0, own])[:3]].tolist())


class TestCompile:
    def compiled(self, nano_pair, **options):
        return compile_constraint(nano_pair[1], nano_pair[0].config, **options)

    @pytest.mark.parametrize("options", [{"regex": "a+b"}, {"choices": ["yes", "no"]}, {"json_schema": {"type": "null"}}])
    def test_the_same_is_compiled_once(self, nano_pair, options):
        one = self.compiled(nano_pair, **options)
        assert self.compiled(nano_pair, **options) is one
        assert one.nbytes > 0

    def test_kinds_and_orders_are_told_apart(self, nano_pair):
        assert self.compiled(nano_pair, regex="true") is not self.compiled(nano_pair, json_schema="true")
        one, other = ({"properties": {a: {"type": "null"}, b: {"type": "null"}}} for a, b in ("ab", "ba"))
        assert self.compiled(nano_pair, json_schema=one) is not self.compiled(nano_pair, json_schema=other)

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
        for text, expected in {"fox": True, "forest": True, "a.c": True, "for": False, "abc": False, "foxfox": False}.items():
            assert automaton.accepts(np.array(nano_pair[1].encode(text, add_special_tokens=False))) == expected

    @pytest.mark.parametrize(("choices", "named"), [
        ("yes", "list of texts"), ([1], "list of texts"), ({"a"}, "list of texts"), (5, "list of texts"), ([], "at least one"),
        (["a", ""], "none of them empty"), (["a", "b", "a"], "'a' is given twice"),
    ])
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
