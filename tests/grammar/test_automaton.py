"""The automaton over bytes: the encoding of characters, its size and its limits."""

import itertools
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_diffgemma.errors import UserError
from mlx_diffgemma.grammar import automaton as automata
from mlx_diffgemma.grammar import budget
from mlx_diffgemma.grammar.automaton import compile_language, utf8
from mlx_diffgemma.grammar.language import (
    ANY,
    EMPTY,
    Chars,
    Choice,
    Concat,
    Repeat,
    chars,
    text,
    without,
)

EDGES = [
    0,
    0x7F,
    0x80,
    0x7FF,
    0x800,
    0xD7FF,
    0xD800,
    0xDFFF,
    0xE000,
    0xFFFF,
    0x10000,
    0x3FFFF,
    0x40000,
    0x10FFFF,
]
CODES = st.one_of(
    st.sampled_from(EDGES),
    st.builds(
        lambda edge, by: min(max(edge + by, 0), 0x10FFFF),
        st.sampled_from(EDGES),
        st.integers(-70, 70),
    ),
    st.integers(0, 0x10FFFF),
)
LETTERS = st.sampled_from("abé").map(text)
LANGUAGES = st.recursive(
    st.one_of(LETTERS, st.just(EMPTY), st.just(Chars(((97, 98),))), st.just(Choice(()))),
    lambda part: st.one_of(
        st.lists(part, max_size=3).map(lambda parts: Concat(tuple(parts))),
        st.lists(part, max_size=3).map(lambda parts: Choice(tuple(parts))),
        st.builds(Repeat, part, st.integers(0, 2), st.none()),
        st.builds(
            lambda part, low, more: Repeat(part, low, low + more),
            part,
            st.integers(0, 2),
            st.integers(0, 2),
        ),
    ),
    max_leaves=8,
)


def encodable(code):
    return not 0xD800 <= code <= 0xDFFF


class TestUtf8:
    @settings(max_examples=150, deadline=None)
    @given(CODES, CODES, st.lists(CODES, max_size=20))
    def test_ranges_equal_the_encoder(self, one, other, more):
        first, last = sorted((one, other))
        sequences = list(utf8(first, last))
        near = [
            edge + by
            for edge in (first, last, *EDGES)
            for by in (-1, 0, 1)
            if 0 <= edge + by <= 0x10FFFF
        ]
        for code in filter(encodable, [*near, *more]):
            content = chr(code).encode()
            hits = sum(
                len(sequence) == len(content)
                and all(low <= byte <= high for byte, (low, high) in zip(content, sequence))
                for sequence in sequences
            )
            assert hits == (first <= code <= last)

    @settings(max_examples=50, deadline=None)
    @given(CODES, CODES)
    def test_as_many_as_there_are_characters(self, one, other):
        first, last = sorted((one, other))
        count = sum(
            np.prod([high - low + 1 for low, high in sequence], dtype=np.int64)
            for sequence in utf8(first, last)
        )
        assert count == last - first + 1 - max(0, min(last, 0xDFFF) - max(first, 0xD800) + 1)

    def test_sets_of_characters(self):
        assert chars([(5, 9), (1, 3), (4, 4), (8, 12), (20, 21)]).ranges == ((1, 12), (20, 21))
        assert without(chars([(1, 12), (20, 21)]), chars([(0, 1), (5, 6), (12, 20)])).ranges == (
            (2, 4),
            (7, 11),
            (21, 21),
        )
        assert compile_language(Repeat(ANY, 0, None)).accepts("a猫😀".encode())
        assert not compile_language(ANY).accepts(b"\xed\xa0\x80")


def told_apart(delta, accepting):
    """bool [states, states]: whether some text tells two apart, pair by pair until nothing changes."""
    apart = accepting[:, None] != accepting[None]
    while True:
        alive = delta >= 0
        both = alive[:, None] & alive[None]
        behind = (both & apart[delta[:, None], delta[None]]) | (alive[:, None] != alive[None])
        grown = apart | behind.any(axis=-1)
        if (grown == apart).all():
            return apart
        apart = grown


def texts(language, most=5):
    """All the texts of ``language`` of at most ``most`` bytes."""
    if isinstance(language, Chars):
        return {
            chr(code).encode() for low, high in language.ranges for code in range(low, high + 1)
        }
    if isinstance(language, Choice):
        return set().union(*(texts(part, most) for part in language.parts))
    if isinstance(language, Concat):
        found = {b""}
        for part in language.parts:
            found = {
                one + two for one in found for two in texts(part, most) if len(one + two) <= most
            }
        return found
    part, found, layer = texts(language.part, most), set(), {b""}
    for count in range(language.low + most + 1 if language.high is None else language.high + 1):
        found |= layer if count >= language.low else set()
        layer = {one + two for one in layer for two in part if len(one + two) <= most}
    return found


class TestCompile:
    @settings(max_examples=80, deadline=None)
    @given(LANGUAGES)
    def test_smallest_automaton_of_just_these_texts(self, language):
        expected = texts(language)
        try:
            automaton = compile_language(language)
        except UserError:
            assert not expected
            return
        for length in range(6):
            for content in itertools.product(b"ab\xc3\xa9", repeat=length):
                assert automaton.accepts(bytes(content)) == (bytes(content) in expected)
        apart = told_apart(automaton.delta, automaton.accepting)
        assert apart.sum() == automaton.states * (automaton.states - 1)
        finished, begun = automaton.accepting.copy(), np.arange(automaton.states) == 0
        for _ in range(automaton.states):
            finished |= ((automaton.delta >= 0) & finished[automaton.delta]).any(axis=1)
            begun[automaton.delta[begun][automaton.delta[begun] >= 0]] = True
        assert finished.all()
        assert begun.all()

    @settings(max_examples=50, deadline=None)
    @given(LANGUAGES)
    def test_merging_changes_no_text(self, language):
        with pytest.MonkeyPatch.context() as patch:
            try:
                merged = compile_language(language)
                patch.setattr(automata, "MERGE_WORK", -(10**9))
                plain = compile_language(language)
            except UserError:
                return
        assert plain.states >= merged.states
        for length in range(5):
            for content in itertools.product(b"ab\xc3\xa9", repeat=length):
                assert merged.accepts(bytes(content)) == plain.accepts(bytes(content))

    def test_merging_merges(self, monkeypatch):
        language = Choice((text("ax"), text("bx"), text("cx")))
        assert compile_language(language).states == 3
        monkeypatch.setattr(automata, "MERGE_WORK", -(10**9))
        assert compile_language(language).states > 3

    def test_no_text_at_all(self):
        with pytest.raises(UserError, match="no text at all"):
            compile_language(Concat((text("a"), Choice(()))))

    def test_too_many_states(self, monkeypatch):
        monkeypatch.setattr(automata, "MAX_STATES", 50)
        assert compile_language(Repeat(text("a"), 0, 40)).states == 41
        with pytest.raises(UserError, match="more than 50 states"):
            compile_language(Repeat(text("a"), 0, 60))

    def test_too_many_positions(self, monkeypatch):
        monkeypatch.setattr(automata, "MAX_POSITIONS", 100)
        with pytest.raises(UserError, match="too large"):
            compile_language(Repeat(text("a"), 0, 60))

    @pytest.mark.parametrize("language", [Repeat(text("a"), 0, 300), text("a" * 300)])
    def test_too_long(self, language):
        with pytest.raises(UserError, match="too long to compile"):
            compile_language(language, seconds=-1.0)

    def test_positions_alone_may_take_too_long(self):
        with pytest.raises(UserError, match="too long to compile"), budget.limited(-1.0):
            automata._Ways().build(text("a"), 0)

    def test_deep_languages(self):
        """Deeper than Python's recursion goes."""
        language, depth = text(""), sys.getrecursionlimit() + 100
        for _ in range(depth):
            language = Concat((text("a"), Repeat(language, 0, 1)))
        automaton = compile_language(language)
        assert automaton.accepts(b"a" * depth)
        assert not automaton.accepts(b"a" * (depth + 1))
