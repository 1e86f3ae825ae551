"""The dynamic programme over (position, state, class): what the product of a canvas's marginals says of the texts that a
constraint admits.

The canvas mode gives each position a distribution of its own.  Their product, restricted to the texts that an automaton accepts
and renormalised, is a hidden Markov chain: backward sums over it give the exact marginals of every position, the most probable
text and a draw from all of them (Rabiner 1989, "A tutorial on hidden Markov models"; Viterbi 1967).  Everything here is numpy in
float64 on the host and sees classes of tokens only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mlx_diffgemma.grammar.tokens import TokenAutomaton

IMPOSSIBLE = -1e5  # in place of minus infinity in what goes back to logits: zero times this is zero
LOWEST = -1e300  # in place of minus infinity where it is subtracted
STRETCH = 32  # positions that share one table of steps
BLOCK = 800  # places whose work is that of one more block
NEGLIGIBLE = -230.0  # log of what is nothing beside one; far from where float64 gets slow
NOTHING = float(np.exp(np.full(64, NEGLIGIBLE))[0])


class Chain:
    """The steps of an automaton, and those that end a text: from an accepting state by an end token to the state ``done``, in which
    any token leads back to it.

    Columns stand for tokens: one for each class, then ``end`` (the end tokens) and ``other`` (those of no class).  All columns that
    lead from one state to the same other are one step, by a ``group`` of columns; there are few different ones.
    """

    def __init__(self, automaton: TokenAutomaton) -> None:
        self.automaton = automaton
        self.done, self.end, self.other = automaton.states, automaton.classes, automaton.classes + 1
        self.columns = automaton.classes + 2
        source, column, target = automaton.edges
        accepting = np.flatnonzero(automaton.accepting)
        source = np.concatenate((source, accepting, np.full(self.columns, self.done)))
        column = np.concatenate((column, np.full(len(accepting), self.end), np.arange(self.columns)))
        target = np.concatenate((target, np.full(len(accepting) + self.columns, self.done)))
        order = np.lexsort((column, target, source))
        source, column, target = source[order], column[order], target[order]
        begins = np.flatnonzero(np.append(True, (np.diff(source) != 0) | (np.diff(target) != 0)))
        self.source, self.target = source[begins], target[begins]
        groups: dict[bytes, int] = {}
        numbers = [groups.setdefault(own.tobytes(), len(groups)) for own in np.split(column, begins[1:])]
        self.group = np.array(numbers)
        self.groups = [np.frombuffer(key, dtype=column.dtype) for key in groups]
        self.holds = np.zeros((len(groups), self.columns), dtype=np.bool_)  # whether a group has a column
        for group, columns in enumerate(self.groups):
            self.holds[group, columns] = True
        self._of_groups, self._of_columns = _Sums(self.holds), _Sums(self.holds.T)

    def of_groups(self, mass: np.ndarray) -> np.ndarray:
        """[length, groups] the log of the sum, for ``mass`` [length, columns] in logarithms."""
        return self._of_groups.log_sums(mass)

    def best_of_groups(self, best: np.ndarray) -> np.ndarray:
        return self._of_groups.maxima(best)

    def of_columns(self, values: np.ndarray) -> np.ndarray:
        """[length, columns] the log of the sum over the groups that have a column, for ``values`` [length, groups]."""
        return self._of_columns.log_sums(values)


class Blocks:
    """How runs of entries are laid out so that each run is reduced at once: runs of about one length are the columns of a block,
    whose rows are their first entries, their second ones and so on; the blocks stand one behind the other.

    numpy reduces such blocks several times as fast as runs (``reduceat``).  ``entries`` [places]: the entry at each place, -1 where
    a run has none.  ``order``: the runs, as what is made of them comes.
    """

    def __init__(self, begins: np.ndarray, counts: np.ndarray, price: int = BLOCK) -> None:
        self.order = np.argsort(-counts, kind="stable")
        begins, counts = begins[self.order], counts[self.order]
        self.parts: list[tuple[slice, slice]] = []  # places and runs of each block
        entries, place = [], 0
        for first, last in _cut(counts, price):
            row = np.arange(counts[first])[:, None]
            entries.append(np.where(row < counts[first:last], begins[first:last] + row, -1).ravel())
            self.parts.append((slice(place, place + entries[-1].size), slice(first, last)))
            place += entries[-1].size
        self.entries = np.concatenate(entries)

    def run(self, number: int) -> slice:
        """The places of a run, by its number in ``order``."""
        places, runs = next(part for part in self.parts if number < part[1].stop)
        return slice(places.start + number - runs.start, places.stop, runs.stop - runs.start)

    def _views(self, x: np.ndarray) -> Iterator[tuple[np.ndarray, slice]]:
        """Of ``x`` [places, ...] each block [rows, runs, ...], and which runs these are."""
        for places, runs in self.parts:
            yield x[places].reshape(-1, runs.stop - runs.start, *x.shape[1:]), runs

    def maxima(self, x: np.ndarray) -> np.ndarray:
        """[runs, ...]"""
        found = np.empty((len(self.order), *x.shape[1:]))
        for block, runs in self._views(x):
            block.max(axis=0, out=found[runs])
        return found

    def sums(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """([runs, ...] the log of the sum of the exponentials; the sum of what ``x`` becomes, these divided by the largest of their
        run)."""
        top, total = np.maximum(self.maxima(x), LOWEST), np.empty((len(self.order), *x.shape[1:]))
        for block, runs in self._views(x):
            block -= top[runs]
        _exponentials(x)
        for block, runs in self._views(x):
            block.sum(axis=0, out=total[runs])
        with np.errstate(divide="ignore"):
            return top + np.log(total), total

    def multiply(self, x: np.ndarray, factors: np.ndarray) -> None:
        """``x`` [places], all of each run by its own of ``factors`` [runs]."""
        for block, runs in self._views(x):
            block *= factors[runs]


def _exponentials(x: np.ndarray) -> None:
    """In place, of what is at most zero; exactly zero below NEGLIGIBLE, as near underflow numpy takes ten times as long."""
    np.maximum(x, NEGLIGIBLE, out=x)
    np.exp(x, out=x)
    x -= NOTHING


def _cut(counts: np.ndarray, price: int) -> list[tuple[int, int]]:
    """The (first, last) of each block, the last one excluded, of descending ``counts``: with the fewest places, where one more
    block counts as ``price`` of them."""
    starts = np.flatnonzero(np.diff(counts, prepend=-1)).tolist()
    ends = [*starts[1:], len(counts)]
    best: list[tuple[int, list[tuple[int, int]]]] = [(0, [])]  # cost up to each of ``starts``, and the blocks
    for place, end in enumerate(ends):
        cost, begin = min((best[begin][0] + int(counts[start]) * (end - start) + price, begin)
                          for begin, start in enumerate(starts[: place + 1]))
        best.append((cost, [*best[begin][1], (starts[begin], end)]))
    return best[-1][1]


class _Sums:
    """Sums over the members [sets, members] of sets."""

    def __init__(self, holds: np.ndarray) -> None:
        sets, members = np.nonzero(holds)
        begins = np.searchsorted(sets, np.arange(len(holds) + 1))
        self.blocks = Blocks(begins[:-1], np.diff(begins), BLOCK // 200)  # a place is a row of numbers here
        self.members = np.append(members, holds.shape[1])[self.blocks.entries]
        self.back = np.argsort(self.blocks.order)

    def _taken(self, x: np.ndarray) -> np.ndarray:
        """[places, length] of ``x`` [length, members]."""
        return np.concatenate((x.T, np.full((1, len(x)), -np.inf)))[self.members]

    def log_sums(self, x: np.ndarray) -> np.ndarray:
        """[length, sets] of ``x`` [length, members] in logarithms."""
        return self.blocks.sums(self._taken(x))[0][self.back].T

    def maxima(self, x: np.ndarray) -> np.ndarray:
        return self.blocks.maxima(self._taken(x))[self.back].T


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


class Table:
    """Steps of a chain in ``blocks``, those that leave one state being a run: ``states`` [runs], and ``group`` and ``target``
    [places], which is a state that does not exist where there is no step."""

    def __init__(self, chain: Chain, steps: np.ndarray) -> None:
        states, begins, counts = np.unique(chain.source[steps], return_index=True, return_counts=True)
        self.blocks = Blocks(begins, counts)
        self.states = states[self.blocks.order]
        self.group = np.append(chain.group[steps], 0)[self.blocks.entries]
        self.target = np.append(chain.target[steps], chain.done + 1)[self.blocks.entries]
        self._numbers = np.zeros(chain.done + 1, dtype=np.int64)
        self._numbers[self.states] = np.arange(len(states))

    def put(self, out: np.ndarray, groups: np.ndarray, states: np.ndarray) -> None:
        """Into ``out`` [places] what stands in ``groups`` and in ``states`` for the group of a step and for what it leads to."""
        np.take(states, self.target, out=out, mode="clip")  # the indices are right; other modes take a copy
        out += groups.take(self.group)

    def leaving(self, state: int) -> slice:
        """The places of the steps that leave ``state``, in the order of the states they lead to."""
        return self.blocks.run(int(self._numbers[state]))


class Band:
    """The chain, as far as admitted texts reach, position by position.  Depends on no logits: made once a canvas.

    ``behind`` bool [length + 1, states]: from where an admitted text can go on.  ``tables``: the steps at each position; those of
    a stretch of positions are in one.  ``shares``: room for a number for each of them, as fresh memory takes a tenth of the time.
    ``allowed`` bool [positions, groups], where some are bound.
    """

    def __init__(self, chain: Chain, span: Span) -> None:
        self.chain, self.span = chain, span
        self.allowed: np.ndarray | None = None
        if span.forced is not None:
            self.allowed = np.ones((max(span.length + span.more, len(span.forced)), len(chain.groups)), dtype=np.bool_)
            self.allowed[: len(span.forced)] = (span.forced[:, None] < 0) | chain.holds[:, span.forced].T
        self.behind = np.zeros((span.length + 1, chain.done + 1), dtype=np.bool_)
        self.behind[-1] = self._last()
        leaving, begins = np.unique(chain.source, return_index=True)
        for t in reversed(range(span.length)):
            going: np.ndarray = self.behind[t + 1].take(chain.target)
            if self.allowed is not None:
                going &= self.allowed[t].take(chain.group)
            self.behind[t, leaving] = np.logical_or.reduceat(going, begins)
            self.behind[t] &= self._within(t)
        self.possible = bool(self.behind[0, span.state])
        self.tables: list[Table] = []
        earliest, last = self._earliest(), b""
        for begin in range(0, span.length if self.possible else 0, STRETCH):
            stop = min(begin + STRETCH, span.length)
            ahead: np.ndarray = np.logical_or.reduce(self.behind[begin + 1 : stop + 1])
            taken = (earliest[chain.source] < stop) & ahead.take(chain.target)
            if taken.tobytes() != last:
                table, last = Table(chain, np.flatnonzero(taken)), taken.tobytes()
            self.tables += [table] * (stop - begin)
        self.shares = [np.empty(len(table.target)) for table in self.tables]

    def _earliest(self) -> np.ndarray:
        """[states] the first position at which a text can be in each, as far as the steps alone say; length where in none."""
        chain, earliest = self.chain, np.full(self.chain.done + 1, self.span.length)
        reached = np.zeros(chain.done + 1, dtype=np.bool_)
        reached[self.span.state] = True
        for t in range(self.span.length):
            earliest[reached] = t
            ahead = np.zeros_like(reached)
            ahead[chain.target[reached[chain.source]]] = True
            reached = ahead & (earliest == self.span.length)
            if not reached.any():
                break
        return earliest

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
            taken: np.ndarray = behind.take(self.chain.target)
            if self.allowed is not None:
                taken &= self.allowed[t].take(self.chain.group)
            before[self.chain.source[taken]] = True
            behind = before & self._within(t)
        return behind


class Solution(NamedTuple):
    """``bias`` float64 [length, columns]: what the constraint adds to the scaled logit of every token of a column; with it the
    softmax of a position is its exact marginal.  ``path`` int [length]: columns of the most probable text.  ``drawn`` int [length]
    columns of a text drawn with the step's ``u``, and ``rest`` float64 [length] in [0, 1), what of each ``u`` is left to draw a
    token of the column."""

    bias: np.ndarray
    path: np.ndarray
    drawn: np.ndarray
    rest: np.ndarray


def solve(band: Band, mass: np.ndarray, best: np.ndarray, u: np.ndarray) -> Solution:
    """``mass`` [length, columns]: log of the sum of the exponentials of a column's scaled logits; ``best`` its largest logit; ``u``
    [length] in [0, 1).  None is NaN, and only a column without tokens is minus infinity.  The draw goes by steps in the order of
    the states they lead to, then by columns."""
    chain, length = band.chain, band.span.length
    weigh, largest = chain.of_groups(mass), chain.best_of_groups(best)
    admitted = weigh
    if band.allowed is not None:
        allowed = band.allowed[:length]
        admitted, largest = np.where(allowed, weigh, -np.inf), np.where(allowed, largest, -np.inf)
    value = np.full((length + 1, chain.done + 2), -np.inf)  # the best that can come from a state on
    after = np.full((length + 1, chain.done + 2), -np.inf)  # log of the sum of all that can
    value[length, :-1][band.behind[length]] = after[length, :-1][band.behind[length]] = 0.0
    totals: list[np.ndarray] = [np.zeros(0)] * length  # by which ``shares`` are to be divided
    for t in reversed(range(length)):
        table, shares, dead = band.tables[t], band.shares[t], ~band.behind[t]
        table.put(shares, largest[t], value[t + 1])
        value[t, table.states] = table.blocks.maxima(shares)
        table.put(shares, admitted[t], after[t + 1])
        after[t, table.states], totals[t] = table.blocks.sums(shares)
        value[t, :-1][dead] = after[t, :-1][dead] = -np.inf
    weight = np.zeros((length, len(chain.groups)))  # posterior probability of each group
    state: np.ndarray = np.zeros(chain.done + 2)
    state[band.span.state] = 1.0
    path, drawn = np.zeros((2, length), dtype=np.int64)
    rest = np.zeros(length)
    at = sampled = band.span.state
    for t, (table, shares) in enumerate(zip(band.tables, band.shares, strict=True)):
        own = table.leaving(at)
        group, target = table.group[own], table.target[own]
        step = np.argmax(largest[t, group] + value[t + 1, target])
        columns = chain.groups[group[step]]
        path[t], at = columns[np.argmax(best[t, columns])], target[step]
        own = table.leaving(sampled)
        place, left = _drawn(shares[own], u[t])
        columns, sampled = chain.groups[table.group[own][place]], table.target[own][place]
        inner = mass[t, columns]
        place, rest[t] = _drawn(np.exp(inner - inner.max()), left)
        drawn[t] = columns[place]
        probability, total = state[table.states], totals[t]
        table.blocks.multiply(shares, np.divide(probability, total, out=np.zeros_like(total), where=total > 0))
        weight[t] = np.bincount(table.group, shares, minlength=len(chain.groups))
        state = np.bincount(table.target, shares, minlength=chain.done + 2)
        state[state < NOTHING] = 0.0
    with np.errstate(divide="ignore"):
        bias = chain.of_columns(np.log(weight) - weigh)
    return Solution(np.maximum(bias, IMPOSSIBLE), path, drawn, rest)


def _drawn(weights: np.ndarray, u: float) -> tuple[int, float]:
    """(the place at which the running sum of ``weights`` passes ``u`` of it, what of ``u`` is left within the place)."""
    running = np.cumsum(weights)
    target = min(u * running[-1], np.nextafter(running[-1], 0.0))  # never at one of weight zero behind the last
    place = int(np.searchsorted(running, target, side="right"))
    left = (target - (running[place] - weights[place])) / weights[place]
    return place, min(max(left, 0.0), 1 - 2.0**-24)
