"""Compiles a language to the smallest automaton over the bytes of its texts in UTF-8.

Positions of the language become the states of a nondeterministic automaton.  Sets of these states
become the states of a deterministic one (Rabin and Scott 1959).  States that no text tells apart
are merged (Moore 1956).
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from mlx_diffgemma.errors import UserError
from mlx_diffgemma.grammar import budget
from mlx_diffgemma.grammar.budget import MAX_SECONDS
from mlx_diffgemma.grammar.language import LAST, Chars, Choice, Concat, Language, Repeat

MAX_STATES = 20_000
MAX_POSITIONS = 400_000  # positions of the nondeterministic automaton
MAX_MEMBERS = 20_000_000  # members of all sets that become deterministic states; 4 bytes each
NEVER = np.iinfo(np.int32).max  # stands for the steps from a state that reaches no end
# The states times the rounds.  There are up to as many rounds as a text without a loop has bytes.
MERGE_WORK = 4_000_000


@dataclass(frozen=True, eq=False)
class Automaton:
    """A deterministic automaton over bytes; from every state some text can be finished.

    Args:
        delta: The state after each byte, int32 [states, 256]; -1 where no text continues with that
            byte.  State 0 is the first.
        accepting: Whether a text may end, bool [states].
    """

    delta: np.ndarray
    accepting: np.ndarray

    @property
    def states(self) -> int:
        return len(self.accepting)

    def accepts(self, content: bytes) -> bool:
        state = 0
        for byte in content:
            state = int(self.delta[state, byte])
            if state < 0:
                return False
        return bool(self.accepting[state])


def compile_language(language: Language, seconds: float = MAX_SECONDS) -> Automaton:
    """The deterministic automaton of a language, made small where that is quick.

    Raises:
        UserError: The language has no texts, or needs more than MAX_STATES states or ``seconds``.
    """
    with budget.limited(seconds):
        ways = _Ways()
        final = ways.state()
        start = ways.build(language, final)
        delta, accepting = _single_way(ways, start, final)
        automaton = _trimmed(delta, accepting)
        if automaton is None:
            raise UserError("The constraint admits no text at all; widen it.")
        return _merged(automaton)


def _too_large() -> UserError:
    return UserError(
        f"The constraint is too large: it needs more than {MAX_STATES:,} states; "
        "lower the bounds of its repeats (maxLength, maxItems), or split it."
    )


_Building: TypeAlias = Generator[
    tuple[Language, int], int, int
]  # asks for parts that lead to states, and returns the first state


class _Ways:
    """A nondeterministic automaton, built from the end of the language to its start."""

    def __init__(self) -> None:
        # The steps from each state: (first byte, last byte, next state).
        self.bytes: list[list[tuple[int, int, int]]] = []
        self.jumps: list[list[int]] = []  # the states that each state reaches without a byte
        self._known: dict[tuple[int, int], int] = {}
        self._kept: list[Language] = []  # keeps the languages alive, so that no id is used twice

    def state(self) -> int:
        budget.check()
        if len(self.bytes) >= MAX_POSITIONS:
            raise _too_large()
        self.bytes.append([])
        self.jumps.append([])
        return len(self.bytes) - 1

    def build(self, language: Language, end: int) -> int:
        """The state from which ``language`` leads to the state ``end``.

        Parts that a language uses several times before the same end are built once.
        """
        # This does not recurse, because objects of many properties would exhaust the stack.
        running = [self._build(language, end)]
        built = -1
        while running:
            budget.check()
            try:
                part, behind = next(running[-1]) if built < 0 else running[-1].send(built)
            except StopIteration as finished:
                running.pop()
                built = finished.value
            else:
                built = self._known.get((id(part), behind), -1)
                if built < 0:
                    running.append(self._build(part, behind))
        return built

    def _build(self, language: Language, end: int) -> _Building:
        if isinstance(language, Chars):
            start = self._chars(language, end)
        elif isinstance(language, Concat):
            start = end
            for part in reversed(language.parts):
                start = yield part, start
        elif isinstance(language, Choice):
            start = self.state()
            for part in language.parts:
                self.jumps[start].append((yield part, end))
        else:
            start = yield from self._repeat(language, end)
        self._known[id(language), end] = start
        self._kept.append(language)
        return start

    def _repeat(self, language: Repeat, end: int) -> _Building:
        if language.high is None:
            last = self.state()
            self.jumps[last] = [(yield language.part, last), end]
            end = last
        else:
            # x{0,3} is (x(x(x)?)?)?: each part may jump to the end only.
            final = end
            for _ in range(language.high - language.low):
                start = self.state()
                self.jumps[start] = [(yield language.part, end), final]
                end = start
        for _ in range(language.low):
            before = end
            end = yield language.part, end
            if end == before:  # an empty part
                break
        return end

    def _chars(self, language: Chars, end: int) -> int:
        start = self.state()
        shared: dict[tuple[int, int, int], int] = {}
        for first, last in language.ranges:
            for sequence in utf8(first, last):
                target = end
                for low, high in reversed(sequence[1:]):
                    if (low, high, target) not in shared:
                        shared[low, high, target] = self.state()
                        self.bytes[shared[low, high, target]].append((low, high, target))
                    target = shared[low, high, target]
                self.bytes[start].append((*sequence[0], target))
        return start


def utf8(first: int, last: int) -> Iterator[list[tuple[int, int]]]:
    """The UTF-8 of the characters from ``first`` to ``last``, as sequences of ranges of bytes."""
    if first > last:
        return
    if first > LAST:  # no text in UTF-8 has this byte
        yield [(0xFF, 0xFF)]
        return
    for bound in (0x7F, 0x7FF, 0xD7FF, 0xDFFF, 0xFFFF):
        if first <= bound < last:
            yield from utf8(first, bound)
            yield from utf8(bound + 1, last)
            return
    if 0xD800 <= first <= 0xDFFF:
        return
    for place in range(1, len(chr(first).encode())):
        mask = (1 << 6 * place) - 1
        if first & ~mask != last & ~mask:
            if first & mask:
                yield from utf8(first, first | mask)
                yield from utf8((first | mask) + 1, last)
                return
            if last & mask != mask:
                yield from utf8(first, (last & ~mask) - 1)
                yield from utf8(last & ~mask, last)
                return
    yield list(zip(chr(first).encode(), chr(last).encode(), strict=True))


class _Closures:
    """Sets of states together with the states that they reach without a byte.

    A set is stored as the bytes of its sorted numbers, which take little memory.
    """

    def __init__(self, ways: _Ways, final: int) -> None:
        self._ways = ways
        self._final = final
        self._known: dict[bytes, bytes] = {}
        self._members = 0

    def of(self, states: set[int]) -> bytes:
        """The closure of ``states``, without the states that have no step over a byte."""
        key = _packed(states)
        if key not in self._known:
            self._known[key] = _packed(self._reached(states))
            self._members += (len(key) + len(self._known[key])) // 4
            if self._members > MAX_MEMBERS:
                raise _too_large()
        return self._known[key]

    def _reached(self, states: set[int]) -> list[int]:
        seen = set(states)
        waiting = list(states)
        while waiting:
            for target in self._ways.jumps[waiting.pop()]:
                if target not in seen:
                    seen.add(target)
                    waiting.append(target)
                    if len(seen) % 1024 == 0:
                        budget.check()
        return [state for state in seen if self._ways.bytes[state] or state == self._final]


def _packed(states: set[int] | list[int]) -> bytes:
    return array("i", sorted(states)).tobytes()


def _unpacked(states: bytes) -> array[int]:
    numbers = array("i")
    numbers.frombytes(states)
    return numbers


def _single_way(ways: _Ways, start: int, final: int) -> tuple[np.ndarray, np.ndarray]:
    """The deterministic automaton, by the subset construction.

    Args:
        ways: The nondeterministic automaton.
        start: Its first state.
        final: Its accepting state.

    Returns:
        (next state by state and byte, whether each state accepts)
    """
    closures = _Closures(ways, final)
    numbers = {closures.of({start}): 0}
    waiting = list(numbers)
    rows: list[np.ndarray] = []
    accepting: list[bool] = []
    for packed in waiting:  # grows during the loop
        budget.check()
        row = np.full(256, -1, dtype=np.int32)
        states = _unpacked(packed)
        edges: list[tuple[int, int, int]] = []
        for state in states:
            edges += ways.bytes[state]
        for low, high, targets in _by_byte(edges):
            closure = closures.of(targets)
            if closure not in numbers:
                budget.check()
                if len(numbers) >= MAX_STATES:
                    raise _too_large()
                numbers[closure] = len(numbers)
                waiting.append(closure)
            row[low:high] = numbers[closure]
        rows.append(row)
        accepting.append(final in states)
    return np.stack(rows), np.array(accepting)


def _by_byte(edges: list[tuple[int, int, int]]) -> Iterator[tuple[int, int, set[int]]]:
    """Divide the bytes into runs with the same targets.

    Yields:
        (first byte, byte after the last, targets) of each run.
    """
    cuts = sorted({low for low, _, _ in edges} | {high + 1 for _, high, _ in edges})
    targets: list[set[int]] = [set() for _ in cuts]
    for number, (low, high, target) in enumerate(edges):
        if number % 1024 == 0:
            budget.check()
        for run in range(bisect_left(cuts, low), bisect_left(cuts, high + 1)):
            targets[run].add(target)
    for run, reached in enumerate(targets):
        if reached:
            yield cuts[run], cuts[run + 1], reached


def distances(source: np.ndarray, target: np.ndarray, accepting: np.ndarray) -> np.ndarray:
    """The fewest steps from each state to an accepting one; NEVER where none is reached.

    Args:
        source: The state that each step leaves.
        target: The state that it leads to.
        accepting: Whether each state accepts.

    Returns:
        int32 [states]
    """
    pairs = np.unique(source.astype(np.int64) * len(accepting) + target)
    source = pairs // len(accepting)
    target = pairs % len(accepting)
    order = np.argsort(target, kind="stable")
    source = source[order]
    first = np.searchsorted(target[order], np.arange(len(accepting) + 1))
    fewest = np.where(accepting, 0, NEVER).astype(np.int32)
    frontier = np.flatnonzero(accepting)
    steps = 0
    while frontier.size:
        budget.check()
        steps += 1
        before = np.unique(
            np.concatenate([source[first[state] : first[state + 1]] for state in frontier.tolist()])
        )
        frontier = before[fewest[before] == NEVER]
        fewest[frontier] = steps
    return fewest


def _trimmed(delta: np.ndarray, accepting: np.ndarray) -> Automaton | None:
    """The automaton without states from which no text can be finished; None if no state is left."""
    sources, _ = np.nonzero(delta >= 0)
    alive = distances(sources, delta[delta >= 0], accepting) < NEVER
    if not alive[0]:
        return None
    return _renumbered(delta, accepting, np.where(alive, np.cumsum(alive) - 1, -1), alive)


def _renumbered(
    delta: np.ndarray, accepting: np.ndarray, numbers: np.ndarray, kept: np.ndarray
) -> Automaton:
    """The automaton of some states under new numbers.

    Args:
        delta: The next state by state and byte, -1 for none.
        accepting: Whether each state accepts.
        numbers: The new number of each state.
        kept: The states to keep, in their new order.
    """
    renumbered = np.where(delta[kept] >= 0, numbers[delta[kept]], -1)
    return Automaton(renumbered.astype(np.int32), accepting[kept])


def _merged(automaton: Automaton) -> Automaton:
    """The automaton with equivalent states merged.

    It is unchanged if merging would take long, because merging only makes it smaller.
    """
    delta = np.unique(automaton.delta, axis=1)  # bytes that all states treat alike become one
    shape = (2, delta.shape[1] + 1)
    factors = np.random.default_rng(0).integers(1, 2**63, size=shape, dtype=np.uint64)
    factors |= np.uint64(1)
    labels = automaton.accepting.astype(np.int64)
    count = 0
    for _ in range(1 + MERGE_WORK // automaton.states):
        budget.check()
        behind = np.where(delta >= 0, labels[delta] + 1, 0)
        rows = np.concatenate((labels[:, None], behind), axis=1).astype(np.uint64)
        mixed = rows * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
        keys = np.stack([(mixed * factor).sum(axis=1) for factor in factors], axis=1)
        _, labels = np.unique(keys, axis=0, return_inverse=True)
        labels = labels.reshape(-1)
        if labels.max() + 1 == count:
            break
        count = labels.max() + 1
    else:
        return automaton
    # The states are in the order of their first members, so that the first state remains the first.
    _, representatives = np.unique(labels, return_index=True)
    order = np.argsort(representatives)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return _renumbered(
        automaton.delta, automaton.accepting, place[labels], np.sort(representatives)
    )
