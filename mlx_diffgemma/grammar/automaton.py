"""From a language to the smallest automaton over the bytes of its texts in UTF-8.

Positions of the language become states of an automaton with several ways, which sets of states make one with a single way
(Rabin and Scott 1959); states that no text tells apart are merged (Moore 1956).
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import numpy as np

from mlx_diffgemma.errors import UserError
from mlx_diffgemma.grammar.language import LAST, Chars, Choice, Concat, Language, Repeat

MAX_STATES = 20_000
MAX_POSITIONS = 400_000  # of the automaton with several ways, before it has a single one
MAX_SECONDS = 60.0
MERGE_WORK = 4_000_000  # states times rounds, of which there are up to as many as a text without a loop has bytes


@dataclass(frozen=True, eq=False)
class Automaton:
    """``delta`` int32 [states, 256]: the state behind each byte, -1 where no text goes on so; state 0 is the first.
    ``accepting`` bool [states]: whether a text may end there.  From every state some text can be finished."""

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
    """Errors: UserError for a language without texts, or one that needs more than MAX_STATES states or ``seconds``."""
    deadline = time.monotonic() + seconds
    ways = _Ways(deadline)
    final = ways.state()
    start = ways.build(language, final)
    delta, accepting = _single_way(ways, start, final, deadline)
    automaton = _trimmed(delta, accepting)
    if automaton is None:
        raise UserError("The constraint admits no text at all; widen it.")
    return _merged(automaton)


def _too_large(deadline: float) -> UserError:
    return UserError(f"The constraint is too large: it needs more than {MAX_STATES:,} states; lower the bounds of its repeats "
                     "(maxLength, maxItems), or split it." if time.monotonic() < deadline else
                     "The constraint takes too long to compile; lower the bounds of its repeats (maxLength, maxItems), or "
                     "split it.")


_Building: TypeAlias = Generator[tuple[Language, int], int, int]  # asks for parts that lead to states, and returns the first state


class _Ways:
    """An automaton with several ways, built from the end of the language to its begin."""

    def __init__(self, deadline: float) -> None:
        self.bytes: list[list[tuple[int, int, int]]] = []  # (first byte, last byte, state behind) of each state
        self.jumps: list[list[int]] = []  # states that take no byte to reach
        self.deadline = deadline
        self._known: dict[tuple[int, int], int] = {}
        self._kept: list[Language] = []  # so that no id is taken twice

    def state(self) -> int:
        if len(self.bytes) >= MAX_POSITIONS or time.monotonic() > self.deadline:
            raise _too_large(self.deadline)
        self.bytes.append([])
        self.jumps.append([])
        return len(self.bytes) - 1

    def build(self, language: Language, end: int) -> int:
        """The state from which ``language`` leads to ``end``; shared parts of a language that lead to one end are built once."""
        running, built = [self._build(language, end)], -1  # not by recursion, which objects of many properties would exhaust
        while running:
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
            # x{0,3} as (x(x(x)?)?)?: each may jump to the end, and no further than that.
            final = end
            for _ in range(language.high - language.low):
                start = self.state()
                self.jumps[start] = [(yield language.part, end), final]
                end = start
        for _ in range(language.low):
            before = end
            end = yield language.part, end
            if end == before:  # a part that is empty
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
    """Ranges of bytes, one a place, that together are the UTF-8 of the characters from ``first`` to ``last``."""
    if first > last:
        return
    if first > LAST:  # no text in UTF-8 holds this byte
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


def _single_way(ways: _Ways, start: int, final: int, deadline: float) -> tuple[np.ndarray, np.ndarray]:
    closures: dict[frozenset[int], frozenset[int]] = {}

    def closure(states: frozenset[int]) -> frozenset[int]:
        if states not in closures:
            seen, waiting = set(states), list(states)
            while waiting:
                for target in ways.jumps[waiting.pop()]:
                    if target not in seen:
                        seen.add(target)
                        waiting.append(target)
            closures[states] = frozenset(s for s in seen if ways.bytes[s] or s == final)
        return closures[states]

    numbers = {closure(frozenset([start])): 0}
    waiting, rows, accepting = list(numbers), list[np.ndarray](), list[bool]()
    for states in waiting:  # grows while it is read
        row = np.full(256, -1, dtype=np.int32)
        edges = [edge for state in states for edge in ways.bytes[state]]
        cuts = sorted({place for low, high, _ in edges for place in (low, high + 1)})
        for low, high in pairwise(cuts):
            targets = frozenset(target for a, b, target in edges if a <= low and high - 1 <= b)
            if targets:
                behind = closure(targets)
                if behind not in numbers:
                    if len(numbers) >= MAX_STATES or time.monotonic() > deadline:
                        raise _too_large(deadline)
                    numbers[behind] = len(numbers)
                    waiting.append(behind)
                row[low:high] = numbers[behind]
        rows.append(row)
        accepting.append(final in states)
    return np.stack(rows), np.array(accepting)


def _trimmed(delta: np.ndarray, accepting: np.ndarray) -> Automaton | None:
    """Without the states from which no text can be finished; None where that leaves nothing."""
    sources, _ = np.nonzero(delta >= 0)
    targets = delta[delta >= 0]
    alive = accepting.copy()
    while True:
        grown = alive.copy()
        grown[sources[alive[targets]]] = True
        if (grown == alive).all():
            break
        alive = grown
    if not alive[0]:
        return None
    return _renumbered(delta, accepting, np.where(alive, np.cumsum(alive) - 1, -1), alive)


def _renumbered(delta: np.ndarray, accepting: np.ndarray, numbers: np.ndarray, kept: np.ndarray) -> Automaton:
    return Automaton(np.where(delta[kept] >= 0, numbers[delta[kept]], -1).astype(np.int32), accepting[kept])


def _merged(automaton: Automaton) -> Automaton:
    """With states merged that no text tells apart; as it is, where that would take long, since it is no more than smaller."""
    delta = np.unique(automaton.delta, axis=1)  # bytes that all states treat alike are one
    factors = np.random.default_rng(0).integers(1, 2**63, size=(2, delta.shape[1] + 1), dtype=np.uint64) | np.uint64(1)
    labels, count = automaton.accepting.astype(np.int64), 0
    for _ in range(1 + MERGE_WORK // automaton.states):
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
    # In the order in which the states first occur, so that the first stays the first.
    _, representatives = np.unique(labels, return_index=True)
    order = np.argsort(representatives)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return _renumbered(automaton.delta, automaton.accepting, place[labels], np.sort(representatives))


