"""The forward–backward programme over (position, state, class) of a canvas under a constraint.

The canvas mode gives each position an independent distribution.  Their product, restricted to the
texts that an automaton accepts and renormalised, is a hidden Markov chain.  Backward sums over the
chain give the exact marginals of every position, the most probable text and a draw from all texts
(Rabiner 1989, "A tutorial on hidden Markov models"; Viterbi 1967).  Everything here is numpy in
float64 on the host, and uses classes of tokens only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mlx_diffgemma.grammar.blocks import NOTHING, Blocks, SetSums
from mlx_diffgemma.grammar.tokens import TokenAutomaton

IMPOSSIBLE = -1e5  # stands for minus infinity in what is added to logits: zero times this is zero
STRETCH = 32  # positions that share one table of steps


class Chain:
    """The steps of an automaton, and the steps that end a text.

    An end token leads from an accepting state to the state ``done``; from there any token leads
    back to ``done``.  Columns stand for tokens: one for each class, then ``end`` (the end tokens)
    and ``other`` (the tokens of no class).  All columns that lead from one state to the same next
    state are one step, by a ``group`` of columns; few different groups exist.
    """

    def __init__(self, automaton: TokenAutomaton) -> None:
        self.automaton = automaton
        self.done = automaton.states
        self.end = automaton.classes
        self.other = automaton.classes + 1
        self.columns = automaton.classes + 2
        source, column, target = automaton.edges
        accepting = np.flatnonzero(automaton.accepting)
        source = np.concatenate((source, accepting, np.full(self.columns, self.done)))
        column = np.concatenate(
            (column, np.full(len(accepting), self.end), np.arange(self.columns))
        )
        target = np.concatenate((target, np.full(len(accepting) + self.columns, self.done)))
        order = np.lexsort((column, target, source))
        source = source[order]
        column = column[order]
        target = target[order]
        begins = np.flatnonzero(np.append(True, (np.diff(source) != 0) | (np.diff(target) != 0)))
        self.source = source[begins]
        self.target = target[begins]
        groups: dict[bytes, int] = {}
        numbers = []
        for columns in np.split(column, begins[1:]):
            numbers.append(groups.setdefault(columns.tobytes(), len(groups)))
        self.group = np.array(numbers)
        self.groups = [np.frombuffer(key, dtype=column.dtype) for key in groups]
        # Whether each group has each column.
        self.holds = np.zeros((len(groups), self.columns), dtype=np.bool_)
        for group, columns in enumerate(self.groups):
            self.holds[group, columns] = True
        self._of_groups = SetSums(self.holds)
        self._of_columns = SetSums(self.holds.T)

    def of_groups(self, mass: np.ndarray) -> np.ndarray:
        """The log of the sum over each group [length, groups].

        ``mass`` [length, columns] holds logarithms.
        """
        return self._of_groups.log_sums(mass)

    def best_of_groups(self, best: np.ndarray) -> np.ndarray:
        return self._of_groups.maxima(best)

    def of_columns(self, values: np.ndarray) -> np.ndarray:
        """The log of the sum over the groups that have a column [length, columns].

        ``values`` [length, groups] holds logarithms.
        """
        return self._of_columns.log_sums(values)


@dataclass(frozen=True)
class Span:
    """The texts that a canvas may hold.

    Args:
        state: The state in which the canvas begins.
        length: The positions of the canvas.
        budget: How many more tokens the text may have.  It ends with an end token or continues in a
            next canvas, but never so that it could not be finished within the budget.
        closed: Whether the text takes no end token and fills exactly these and ``more`` positions.
        more: Positions after the canvas that a closed text fills too.
        forced: The column that each position is bound to, -1 where it is free.  There may be more
            of them than positions; the canvas then leaves room for the rest.
        unended: No text ends before this many positions.
    """

    state: int
    length: int
    budget: int = 0
    closed: bool = False
    more: int = 0
    forced: np.ndarray | None = None
    unended: int = 0


class Table:
    """Steps of a chain, laid out in blocks; the steps that leave one state are a run.

    Attributes:
        blocks: The layout.
        states: The state of each run [runs].
        group: The group of the step at each place [places].
        target: The state that the step leads to [places]; one that does not exist where there is no
            step.
    """

    def __init__(self, chain: Chain, steps: np.ndarray) -> None:
        states, begins, counts = np.unique(
            chain.source[steps], return_index=True, return_counts=True
        )
        self.blocks = Blocks(begins, counts)
        self.states = states[self.blocks.order]
        self.group = np.append(chain.group[steps], 0)[self.blocks.entries]
        self.target = np.append(chain.target[steps], chain.done + 1)[self.blocks.entries]
        self._numbers = np.zeros(chain.done + 1, dtype=np.int64)
        self._numbers[self.states] = np.arange(len(states))

    def put(self, out: np.ndarray, groups: np.ndarray, states: np.ndarray) -> None:
        """Write the sum of two values for each step.

        Args:
            out: The result [places].
            groups: A value for each group; that of the step's group counts.
            states: A value for each state; that of the step's target counts.
        """
        # The indices are in range; the other modes would copy.
        np.take(states, self.target, out=out, mode="clip")
        out += groups.take(self.group)

    def leaving(self, state: int) -> slice:
        """The places of the steps that leave ``state``, in the order of the states that they lead
        to.
        """
        return self.blocks.run(int(self._numbers[state]))


class Band:
    """The part of a chain that admitted texts can reach, position by position.

    It depends on no logits and is made once for each canvas.

    Attributes:
        behind: From which states an admitted text can continue, bool [length + 1, states].
        tables: The steps at each position; a stretch of positions shares one table.
        shares: Room for a number for each of these steps; allocating it at every step of the canvas
            would take a tenth of the time.
        allowed: Which groups each position allows, bool [positions, groups]; None where all are
            allowed.
    """

    def __init__(self, chain: Chain, span: Span) -> None:
        self.chain = chain
        self.span = span
        self.allowed: np.ndarray | None = None
        if span.forced is not None:
            positions = max(span.length + span.more, len(span.forced))
            self.allowed = np.ones((positions, len(chain.groups)), dtype=np.bool_)
            is_free = span.forced[:, None] < 0
            self.allowed[: len(span.forced)] = is_free | chain.holds[:, span.forced].T
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
        earliest = self._earliest()
        last = b""
        for begin in range(0, span.length if self.possible else 0, STRETCH):
            stop = min(begin + STRETCH, span.length)
            ahead = np.logical_or.reduce(self.behind[begin + 1 : stop + 1])
            taken = (earliest[chain.source] < stop) & ahead.take(chain.target)
            if taken.tobytes() != last:
                table = Table(chain, np.flatnonzero(taken))
                last = taken.tobytes()
            self.tables += [table] * (stop - begin)
        self.shares = [np.empty(len(table.target)) for table in self.tables]

    def _earliest(self) -> np.ndarray:
        """The first position at which a text can be in each state [states], by the steps alone.

        For a state that is not reached it is the length of the canvas.
        """
        chain = self.chain
        earliest = np.full(chain.done + 1, self.span.length)
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
        """Whether the text can be finished within the budget after ``t`` tokens, for each state."""
        if self.span.closed:
            return np.append(np.ones(self.chain.done, dtype=np.bool_), False)
        return np.append(
            self.chain.automaton.distance <= self.span.budget - t, t > self.span.unended
        )

    def _last(self) -> np.ndarray:
        """Whether the positions after the canvas can be filled as the span asks.

        The result is for each state at the end of the canvas.
        """
        span = self.span
        if span.closed:
            until = span.length + span.more
            behind = np.append(self.chain.automaton.accepting, False)
        else:
            bound = 0 if span.forced is None else len(span.forced)
            until = max(span.length, bound)
            behind = self._within(until)
        for t in reversed(range(span.length, until)):
            before = np.zeros_like(behind)
            taken: np.ndarray = behind.take(self.chain.target)
            if self.allowed is not None:
                taken &= self.allowed[t].take(self.chain.group)
            before[self.chain.source[taken]] = True
            behind = before & self._within(t)
        return behind


class Solution(NamedTuple):
    """The result of the programme.

    Args:
        bias: What the constraint adds to the scaled logit of every token of a column, float64
            [length, columns].  With it the softmax of a position is its exact marginal.
        path: The columns of the most probable text, int [length].
        drawn: The columns of a text drawn with the step's ``u``, int [length].
        rest: What is left of each ``u`` to draw a token of the column, float64 [length] in [0, 1).
    """

    bias: np.ndarray
    path: np.ndarray
    drawn: np.ndarray
    rest: np.ndarray


def solve(band: Band, mass: np.ndarray, best: np.ndarray, u: np.ndarray) -> Solution:
    """Solve a step by a backward and a forward pass.

    No number may be NaN, and only a column without tokens is minus infinity.

    Args:
        band: The reachable part of the chain.
        mass: The log of the sum of the exponentials of a column's scaled logits [length, columns].
        best: The largest logit of each column [length, columns].
        u: A uniform random number for each position [length], in [0, 1).  The draw takes steps in
            the order of the states they lead to, then columns.

    Returns:
        The marginals, the most probable text and a draw.
    """
    chain = band.chain
    length = band.span.length
    weigh = chain.of_groups(mass)
    largest = chain.best_of_groups(best)
    admitted = weigh
    if band.allowed is not None:
        allowed = band.allowed[:length]
        admitted = np.where(allowed, weigh, -np.inf)
        largest = np.where(allowed, largest, -np.inf)
    value, totals = _backward(band, largest, admitted)
    weight = np.zeros((length, len(chain.groups)))  # posterior probability of each group
    state: np.ndarray = np.zeros(chain.done + 2)
    state[band.span.state] = 1.0
    path, drawn = np.zeros((2, length), dtype=np.int64)
    rest = np.zeros(length)
    at = sampled = band.span.state
    for t, (table, shares) in enumerate(zip(band.tables, band.shares, strict=True)):
        steps = table.leaving(at)
        group = table.group[steps]
        target = table.target[steps]
        step = np.argmax(largest[t, group] + value[t + 1, target])
        columns = chain.groups[group[step]]
        path[t] = columns[np.argmax(best[t, columns])]
        at = target[step]
        steps = table.leaving(sampled)
        place, left = _drawn(shares[steps], u[t])
        columns = chain.groups[table.group[steps][place]]
        sampled = table.target[steps][place]
        inner = mass[t, columns]
        place, rest[t] = _drawn(np.exp(inner - inner.max()), left)
        drawn[t] = columns[place]
        probability = state[table.states]
        total = totals[t]
        factors = np.divide(probability, total, out=np.zeros_like(total), where=total > 0)
        table.blocks.multiply(shares, factors)
        weight[t] = np.bincount(table.group, shares, minlength=len(chain.groups))
        state = np.bincount(table.target, shares, minlength=chain.done + 2)
        state[state < NOTHING] = 0.0
    with np.errstate(divide="ignore"):
        bias = chain.of_columns(np.log(weight) - weigh)
    return Solution(np.maximum(bias, IMPOSSIBLE), path, drawn, rest)


def _backward(
    band: Band, largest: np.ndarray, admitted: np.ndarray
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The backward pass; it leaves the weights of the steps in ``band.shares``.

    Args:
        band: The reachable part of the chain.
        largest: The largest logit of each group [length, groups].
        admitted: The log of the sum of the exponentials of each group [length, groups].

    Returns:
        (the best that can follow each state [length + 1, states], the sums of the weights of the
        steps that leave each state, for each position)
    """
    length = band.span.length
    value = np.full((length + 1, band.chain.done + 2), -np.inf)
    after = np.full((length + 1, band.chain.done + 2), -np.inf)  # log of the sum of what follows
    value[length, :-1][band.behind[length]] = after[length, :-1][band.behind[length]] = 0.0
    totals: list[np.ndarray] = [np.zeros(0)] * length
    for t in reversed(range(length)):
        table = band.tables[t]
        shares = band.shares[t]
        dead = ~band.behind[t]
        table.put(shares, largest[t], value[t + 1])
        value[t, table.states] = table.blocks.maxima(shares)
        table.put(shares, admitted[t], after[t + 1])
        after[t, table.states], totals[t] = table.blocks.sums(shares)
        value[t, :-1][dead] = after[t, :-1][dead] = -np.inf
    return value, totals


def _drawn(weights: np.ndarray, u: float) -> tuple[int, float]:
    """Draw a place by weight.

    Returns:
        (the place at which the running sum passes ``u`` of the total, what is left of ``u`` within
        the place)
    """
    running = np.cumsum(weights)
    # The place is never one of weight zero after the last place with weight.
    target = min(u * running[-1], np.nextafter(running[-1], 0.0))
    place = int(np.searchsorted(running, target, side="right"))
    left = (target - (running[place] - weights[place])) / weights[place]
    return place, min(max(left, 0.0), 1 - 2.0**-24)
