"""The dynamic programme against all sequences of small vocabularies, one by one."""

import itertools

import numpy as np
import pytest

from mlx_diffgemma.grammar.automaton import NEVER, distances
from mlx_diffgemma.grammar.program import Band, Chain, Span, solve
from mlx_diffgemma.grammar.tokens import TokenAutomaton
from tests.variants import few

V, END = 6, 5


def automaton(rng):
    """A random one over five tokens and an end token, or None where it has no text."""
    states, classes = rng.integers(1, 5), rng.integers(1, 4)
    behind = np.where(
        rng.random((states, classes)) < 0.6, rng.integers(0, states, (states, classes)), -1
    ).astype(np.int32)
    accepting = rng.random(states) < 0.5
    source, cls = np.nonzero(behind >= 0)
    distance = distances(source, behind[source, cls], accepting)
    behind = np.where((behind >= 0) & (distance[behind] < NEVER), behind, -1).astype(np.int32)
    class_of = np.append(
        rng.permutation(np.append(np.arange(classes), rng.integers(0, classes + 1, END - classes))),
        classes,
    )
    return (
        None
        if distance[0] == NEVER
        else TokenAutomaton(behind, accepting, class_of.astype(np.int32), distance)
    )


def behind(auto, span, pins, state, t, token):
    """The state behind a token at place ``t``, END behind an end token, or None where the token may
    not come.
    """
    if t < len(pins) and pins[t] not in (-1, token):
        return None
    if state == END:
        return END
    if token == END:
        return None if span.closed or not auto.accepting[state] or t < span.unended else END
    cls = auto.class_of[token]
    target = int(auto.behind[state, cls]) if cls < auto.classes else -1
    return (
        None
        if target < 0 or (not span.closed and auto.distance[target] > span.budget - t - 1)
        else target
    )


def admitted(auto, span, pins, sequence):
    """Whether the canvas may hold it: as to its own tokens, and as to some that could follow up to
    the last that is asked for.
    """
    states = {span.state}
    for t in range(max(len(pins), span.length + span.more)):
        tokens = [sequence[t]] if t < span.length else range(V)
        states = {
            behind(auto, span, pins, state, t, token) for state in states for token in tokens
        } - {None}
    return any(not span.closed or auto.accepting[state] for state in states)


class Case:
    """A random automaton, span and logits; ``possible``: [texts, length] all admitted ones,
    ``probability`` of each.
    """

    def __init__(self, seed, scale=3.0):
        rng = np.random.default_rng(seed)
        self.auto = None
        while self.auto is None:
            self.auto = automaton(rng)
        auto, length = self.auto, int(rng.integers(1, 5))
        self.column_of = np.where(
            np.arange(V) == END,
            auto.classes,
            np.where(auto.class_of < auto.classes, auto.class_of, auto.classes + 1),
        )
        closed, more = bool(rng.random() < 0.4), int(rng.integers(0, 4))
        bound = length + more if rng.random() < 0.7 else length
        pins = (
            np.where(rng.random(bound) < 0.3, rng.integers(0, V, bound), -1)
            if rng.random() < 0.6
            else np.full(bound, -1)
        )
        self.span = Span(
            int(rng.integers(0, auto.states)) if rng.random() < 0.3 else 0,
            length,
            budget=int(rng.integers(0, 8)),
            closed=closed,
            more=more if closed else 0,
            forced=None if (pins < 0).all() else np.where(pins < 0, -1, self.column_of[pins]),
            unended=0
            if closed
            else int(rng.integers(0, (length if (pins < 0).all() else bound) + 1)),
        )
        self.band, self.pins = Band(Chain(auto), self.span), pins[:length]
        self.logits = rng.normal(0, scale, (length, V))
        self.logits[(self.pins[:, None] >= 0) & (np.arange(V) != self.pins[:, None])] = -1e5
        every = [
            sequence
            for sequence in itertools.product(range(V), repeat=length)
            if admitted(auto, self.span, pins, sequence)
        ]
        if auto.distance[self.span.state] > self.span.budget and not closed:
            every = []  # it is never begun
        self.possible = np.array(every, dtype=np.int64).reshape(-1, length)
        self.weights = self.logits[np.arange(length), self.possible].sum(axis=1)
        top = self.weights.max(initial=-np.inf)
        self.probability = np.exp(self.weights - top) if len(every) else np.zeros(0)
        self.probability /= self.probability.sum() if len(every) else 1.0

    def of_columns(self, reduce):
        return np.stack(
            [
                reduce(self.logits[:, self.column_of == column])
                for column in range(self.band.chain.columns)
            ],
            axis=1,
        )

    def solve(self, u):
        mass = self.of_columns(lambda x: np.logaddexp.reduce(x, axis=1))
        return solve(self.band, mass, self.of_columns(lambda x: x.max(axis=1, initial=-np.inf)), u)

    def marginals(self):
        found = np.zeros((self.span.length, V))
        for sequence, probability in zip(self.possible, self.probability):
            found[np.arange(len(sequence)), sequence] += probability
        return found


def check(case, atol=1e-12):
    solution = case.solve(np.full(case.span.length, 0.5))
    biased = case.logits + solution.bias[:, case.column_of]
    assert np.isfinite(biased).all()
    weights = np.exp(biased - biased.max(axis=1, keepdims=True))
    np.testing.assert_allclose(
        weights / weights.sum(axis=1, keepdims=True), case.marginals(), atol=atol
    )
    best = case.of_columns(lambda x: x.max(axis=1, initial=-np.inf))[
        np.arange(case.span.length), solution.path
    ].sum()
    assert best == pytest.approx(case.weights.max(), abs=1e-9, rel=1e-12)
    assert ((solution.rest >= 0) & (solution.rest < 1)).all()


def test_marginals_and_best_path_equal_brute_force():
    solved = {
        "closed with more": 0,
        "unended": 0,
        "pinned": 0,
        "pinned later": 0,
        "impossible": 0,
        "any": 0,
    }
    for seed in range(600):
        case = Case(seed)
        begun = case.span.closed or case.auto.distance[case.span.state] <= case.span.budget
        if begun:
            assert case.band.possible == bool(len(case.possible)), seed
        if not len(case.possible):
            solved["impossible"] += begun
            continue
        check(case)
        solved["any"] += 1
        solved["closed with more"] += case.span.more > 0
        solved["unended"] += case.span.unended > 0
        solved["pinned"] += case.span.forced is not None
        solved["pinned later"] += (
            case.span.forced is not None and (case.span.forced[case.span.length :] >= 0).any()
        )
    assert min(solved.values()) >= 20, solved


@pytest.mark.parametrize("scale", [300.0, 5000.0, 30000.0])
def test_masses_thousands_of_nats_apart(scale):
    """Probabilities are as exact as sums of such numbers are."""
    cases = [case for case in (Case(seed, scale) for seed in range(150)) if len(case.possible)]
    assert len(cases) > 50
    for case in cases:
        check(case, atol=1e-13 * scale)


def test_all_that_is_admitted_is_nearly_impossible():
    """As where end tokens may not come: everything else stands far above."""
    for seed in range(100):
        case = Case(seed)
        if len(case.possible):
            case.logits[case.pins < 0, :END] -= 1e5
            case.weights = case.logits[np.arange(case.span.length), case.possible].sum(axis=1)
            case.probability = np.exp(case.weights - case.weights.max())
            case.probability /= case.probability.sum()
            check(case, atol=1e-9)


def draw(case, u):
    """A text, the token within its columns taken by what is left of each ``u``."""
    solution, found = case.solve(u), []
    for logits, column, left in zip(case.logits, solution.drawn, solution.rest):
        members = np.flatnonzero(case.column_of == column)
        running = np.cumsum(np.exp(logits[members] - logits[members].max()))
        found.append(int(members[np.searchsorted(running, left * running[-1], side="right")]))
    return tuple(found)


TELLING = [seed for seed in range(60) if 2 <= len(Case(seed, 1.0).possible) <= 60][:10]


@pytest.mark.parametrize("seed", few(TELLING, *TELLING[:4]))
def test_draws_follow_the_exact_distribution(seed):
    """Stratified in the first position; each is a text of the constraint."""
    case, rng, count = Case(seed, 1.0), np.random.default_rng(seed), 1500
    u = rng.random((count, case.span.length))
    u[:, 0] = (np.arange(count) + u[:, 0]) / count
    drawn = [draw(case, row) for row in u]
    texts = [tuple(one) for one in case.possible.tolist()]
    assert set(drawn) <= set(texts)
    for one, probability in zip(texts, case.probability):
        assert (
            abs(drawn.count(one) / count - probability)
            < 5 * np.sqrt(probability * (1 - probability) / count) + 2 / count
        )
    first = np.bincount([one[0] for one in drawn], minlength=V) / count
    np.testing.assert_allclose(first, case.marginals()[0], atol=(V + 2) / count)


@pytest.mark.parametrize("u", [0.0, 1 - 2.0**-24, 1 - 2.0**-53])
def test_draws_at_the_edges_of_u(u):
    for seed in range(60):
        case = Case(seed)
        if len(case.possible):
            assert draw(case, np.full(case.span.length, u)) in {
                tuple(one) for one in case.possible.tolist()
            }
