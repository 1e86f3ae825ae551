"""The dynamic programme over (position, state, class): what the product of a canvas's marginals says of the texts that a
constraint admits.

The canvas mode gives each position a distribution of its own.  Their product, restricted to the texts that an automaton accepts
and renormalised, is a hidden Markov chain: backward sums over it give the exact marginals of every position, the most probable
text and a draw from all of them (Rabiner 1989, "A tutorial on hidden Markov models"; Viterbi 1967).  Everything here is numpy in
float64 on the host and sees classes of tokens only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mlx_diffgemma.grammar.tokens import TokenAutomaton

IMPOSSIBLE = -1e5  # in place of minus infinity in what goes back to logits: zero times this is zero


class Chain:
    """The steps of an automaton, and those that end a text: from an accepting state by an end token to the state ``done``, in which
    any token leads back to it.

    Columns stand for tokens: one for each class, then ``end`` (the end tokens) and ``any`` (every token).  All columns that lead
    from one state to the same other are one step, by a ``group`` of columns; there are few different ones.
    """

    def __init__(self, automaton: TokenAutomaton) -> None:
        self.automaton = automaton
        self.done, self.end, self.any = automaton.states, automaton.classes, automaton.classes + 1
        self.columns = automaton.classes + 2
        source, column, target = automaton.edges
        accepting = np.flatnonzero(automaton.accepting)
        source = np.concatenate((source, accepting, [self.done]))
        column = np.concatenate((column, np.full(len(accepting), self.end), [self.any]))
        target = np.concatenate((target, np.full(len(accepting), self.done), [self.done]))
        order = np.lexsort((column, target, source))
        source, column, target = source[order], column[order], target[order]
        begins = np.flatnonzero(np.append(True, (np.diff(source) != 0) | (np.diff(target) != 0)))
        self.source, self.target = source[begins].astype(np.int32), target[begins].astype(np.int32)
        groups: dict[bytes, int] = {}
        numbers = [groups.setdefault(own.tobytes(), len(groups)) for own in np.split(column, begins[1:])]
        self.group = np.array(numbers, dtype=np.int32)
        self.groups = [np.frombuffer(key, dtype=column.dtype) for key in groups]
        self.holds = np.zeros((len(groups), self.columns), dtype=np.bool_)  # whether a group has a column
        for group, columns in enumerate(self.groups):
            self.holds[group, columns] = True
        self._by_group, self._by_column = np.nonzero(self.holds), np.nonzero(self.holds.T)

    def of_groups(self, mass: np.ndarray) -> np.ndarray:
        """[length, groups] the log of the sum, for ``mass`` [length, columns] in logarithms."""
        groups, columns = self._by_group
        return np.logaddexp.reduceat(mass[:, columns], np.searchsorted(groups, np.arange(len(self.groups))), axis=1)

    def best_of_groups(self, best: np.ndarray) -> np.ndarray:
        groups, columns = self._by_group
        return np.maximum.reduceat(best[:, columns], np.searchsorted(groups, np.arange(len(self.groups))), axis=1)

    def of_columns(self, values: np.ndarray) -> np.ndarray:
        """[length, columns] the log of the sum over the groups that have a column, for ``values`` [length, groups]."""
        columns, groups = self._by_column
        used = np.unique(columns)
        out = np.full((len(values), self.columns), -np.inf)
        out[:, used] = np.logaddexp.reduceat(values[:, groups], np.searchsorted(columns, used), axis=1)
        return out


class Live(NamedTuple):
    """The steps that some admitted text takes at one position, ordered by the state they leave: indices of the chain's; where
    each state's begin among them and how many they are; these states."""

    edges: np.ndarray
    begins: np.ndarray
    counts: np.ndarray
    states: np.ndarray


@dataclass(frozen=True)
class Span:
    """Which texts a canvas of ``length`` positions may hold, from ``state`` on.

    ``budget``: how many tokens the text may still have; it ends with an end token, or goes on in a next canvas, but never so that
    the budget could not hold it.  ``closed``: the text takes no end token, it fills these positions and as many ``more`` exactly.
    ``forced`` int: the column each position is bound to, -1 where none; there may be more of them than the canvas has positions,
    and what it holds leaves room for those.  ``unended``: before so many positions no text ends.
    """

    state: int
    length: int
    budget: int = 0
    closed: bool = False
    more: int = 0
    forced: np.ndarray | None = None
    unended: int = 0


class Band:
    """The chain, as far as admitted texts reach, position by position.  Depends on no logits: made once a canvas."""

    def __init__(self, chain: Chain, span: Span) -> None:
        self.chain, self.span = chain, span
        states = chain.done + 1
        ahead = np.zeros((span.length + 1, states), dtype=np.bool_)
        ahead[0, span.state] = True
        for t in range(span.length):
            taken = ahead[t, chain.source] & self._within(t + 1)[chain.target] & self._allowed(t)
            ahead[t + 1, chain.target[taken]] = True
        behind = ahead[span.length] & self._last()
        self.live: list[Live] = []
        shared: dict[bytes, Live] = {}  # most positions have the same steps as the one before
        for t in reversed(range(span.length)):
            taken = ahead[t, chain.source] & behind[chain.target] & self._allowed(t)
            key = np.packbits(taken).tobytes()
            if key not in shared:
                edges = np.flatnonzero(taken)
                leaving, begins, counts = np.unique(chain.source[edges], return_index=True, return_counts=True)
                shared[key] = Live(edges.astype(np.int32), begins, counts, leaving)
            self.live.append(shared[key])
            behind = np.zeros(states, dtype=np.bool_)
            behind[shared[key].states] = True
        self.live.reverse()
        self.possible = bool(behind[span.state]) if span.length else bool(self._last()[span.state])

    def _within(self, t: int) -> np.ndarray:
        """States in which the text can still be finished within the budget when ``t`` of its tokens are written."""
        if self.span.closed:
            return np.append(np.ones(self.chain.done, dtype=np.bool_), False)
        return np.append(self.chain.automaton.distance <= self.span.budget - t, t > self.span.unended)

    def _last(self) -> np.ndarray:
        """States at the end of the canvas from which what is asked of the positions behind it can be met."""
        span, bound = self.span, 0 if self.span.forced is None else len(self.span.forced)
        until = span.length + span.more if span.closed else max(span.length, bound)
        behind = np.append(self.chain.automaton.accepting, False) if span.closed else self._within(until)
        for t in reversed(range(span.length, until)):
            before = np.zeros_like(behind)
            before[self.chain.source[behind[self.chain.target] & self._allowed(t)]] = True
            behind = before & self._within(t)
        return behind

    def _allowed(self, t: int) -> np.ndarray | bool:
        forced = -1 if self.span.forced is None or t >= len(self.span.forced) else self.span.forced[t]
        return True if forced < 0 else (self.chain.holds[:, forced] | self.chain.holds[:, self.chain.any])[self.chain.group]


class Solution(NamedTuple):
    """``bias`` float64 [length, classes + 2]: what the constraint adds to the scaled logit of every token of a class, of the end
    tokens, and of the tokens that are in no class; with it the softmax of a position is its exact marginal.  ``path`` int
    [length]: columns of the most probable text.  ``drawn`` int [length] columns of a text drawn with the step's ``u``, and ``rest``
    float64 [length] in [0, 1), what of each ``u`` is left to draw a token of the column."""

    bias: np.ndarray
    path: np.ndarray
    drawn: np.ndarray
    rest: np.ndarray


def solve(band: Band, mass: np.ndarray, best: np.ndarray, u: np.ndarray) -> Solution:
    """``mass`` [length, columns]: log of the sum of the exponentials of a column's scaled logits; ``best`` its largest logit; ``u``
    [length] in [0, 1).  All finite.  The draw goes by steps in the order of the states they lead to, then by columns."""
    chain, length = band.chain, band.span.length
    weigh, largest = chain.of_groups(mass), chain.best_of_groups(best)
    value = np.full((length + 1, chain.done + 1), -np.inf)  # the best that can come from a state on
    after = np.full((length + 1, chain.done + 1), -np.inf)  # log of the sum of all that can
    ends = chain.target[band.live[-1].edges]
    value[length, ends] = after[length, ends] = 0.0
    shares: list[np.ndarray] = [np.zeros(0)] * length  # of each step in what leaves its state
    for t in reversed(range(length)):
        live = band.live[t]
        group, target = chain.group[live.edges], chain.target[live.edges]
        x = weigh[t, group] + after[t + 1, target]
        top = np.maximum.reduceat(x, live.begins)
        e = np.exp(x - np.repeat(top, live.counts))
        total = np.add.reduceat(e, live.begins)
        after[t, live.states] = top + np.log(total)
        shares[t] = e / np.repeat(total, live.counts)
        value[t, live.states] = np.maximum.reduceat(largest[t, group] + value[t + 1, target], live.begins)
    weight = np.zeros((length, len(chain.groups)))  # posterior probability of each group
    state: np.ndarray = np.zeros(chain.done + 1)
    state[band.span.state] = 1.0
    for t, live in enumerate(band.live):
        share = state[chain.source[live.edges]] * shares[t]
        weight[t] = np.bincount(chain.group[live.edges], share, minlength=len(chain.groups))
        state = np.bincount(chain.target[live.edges], share, minlength=chain.done + 1)
    path, drawn = np.zeros((2, length), dtype=np.int64)
    rest = np.zeros(length)
    at = sampled = band.span.state
    for t, live in enumerate(band.live):
        edges, _ = _leaving(live, at)
        step = edges[np.argmax(largest[t, chain.group[edges]] + value[t + 1, chain.target[edges]])]
        columns = chain.groups[chain.group[step]]
        path[t], at = columns[np.argmax(best[t, columns])], chain.target[step]
        edges, own = _leaving(live, sampled)
        place, left = _drawn(shares[t][own], u[t])
        columns, sampled = chain.groups[chain.group[edges[place]]], chain.target[edges[place]]
        inner = mass[t, columns]
        place, rest[t] = _drawn(np.exp(inner - inner.max()), left)
        drawn[t] = columns[place]
    with np.errstate(divide="ignore"):
        found = chain.of_columns(np.log(weight) - weigh)
    # A token of a class is met in it and, behind the end, among all.
    behind = found[:, chain.any :]
    bias = np.concatenate((np.logaddexp(found[:, : chain.any], behind), behind), axis=1)
    return Solution(np.maximum(bias, IMPOSSIBLE), path, drawn, rest)


def _drawn(weights: np.ndarray, u: float) -> tuple[int, float]:
    """(the place at which the running sum of ``weights`` passes ``u`` of it, what of ``u`` is left within the place)."""
    running = np.cumsum(weights)
    target = u * running[-1]
    place = min(int(np.searchsorted(running, target, side="right")), len(weights) - 1)
    left = (target - (running[place] - weights[place])) / max(weights[place], np.finfo(np.float64).tiny)
    return place, min(max(left, 0.0), 1 - 2.0**-24)


def _leaving(live: Live, state: int) -> tuple[np.ndarray, slice]:
    """Of the live steps those that leave ``state``, and where they stand."""
    place = int(np.searchsorted(live.states, state))
    own = slice(int(live.begins[place]), int(live.begins[place] + live.counts[place]))
    return live.edges[own], own
