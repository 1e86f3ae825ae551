"""A language is what ECMA-262 says that the expression matches."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_diffgemma.errors import UserError
from mlx_diffgemma.grammar import regex
from mlx_diffgemma.grammar.automaton import compile_language
from tests.grammar.strategies import ALPHABET, EXPRESSIONS, in_python
from tests.grammar.walks import walk

TABLE = json.loads(
    (Path(__file__).parent / "ecma.json").read_text(encoding="utf-8")
)  # made by ecma.mjs, with a JavaScript engine


def compiled(pattern, search=False):
    return compile_language(regex.parse(pattern, search))


SOUND = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
CASES = given(
    EXPRESSIONS,
    st.lists(st.text(ALPHABET, max_size=5), min_size=10, max_size=10),
    st.integers(0, 2**32),
)


def check(pattern, texts, seed):
    """On random texts, on texts of the automaton, and on these with one character changed."""
    expected = re.compile(in_python(pattern))
    for search, matches in ((False, expected.fullmatch), (True, expected.search)):
        try:
            automaton = compiled(pattern, search)
        except UserError as error:
            if "no text at all" not in str(error):
                raise
            continue
        rng, more = np.random.default_rng(seed), list(texts)
        for free in (0, 2, 6, 12):
            own = walk(automaton, rng, free).decode()
            assert matches(own), own
            place = rng.integers(0, len(own) + 1)
            more += [
                own[:place] + rng.choice(list(ALPHABET)) + own[place + rng.integers(0, 2) :],
                own.swapcase(),
                own + "\n",
            ]
        for text in more:
            assert automaton.accepts(text.encode()) == bool(matches(text)), (search, text)


@SOUND
@CASES
def test_language_is_that_of_an_oracle(pattern, texts, seed):
    check(pattern, texts, seed)


@pytest.mark.slow
@settings(SOUND, max_examples=1000)
@CASES
def test_language_is_that_of_an_oracle_at_length(pattern, texts, seed):
    check(pattern, texts, seed)


def codes(ranges):
    return {code for first, last in ranges for code in range(first, last + 1)}


class TestJavaScript:
    """A JavaScript engine said what matches."""

    @pytest.mark.parametrize("pattern", sorted(TABLE["characters"]))
    def test_every_character(self, pattern):
        """Of the first two planes, those that the engine's release of Unicode knows; later ones
        change a property of a few.
        """
        found = codes(regex.parse(pattern).ranges)
        differ = (found ^ codes(TABLE["characters"][pattern])) & codes(TABLE["assigned"])
        assert len(differ) <= (40 if "\\p" in pattern.lower() else 0), [
            hex(code) for code in sorted(differ)
        ]

    @pytest.mark.parametrize("pattern", sorted(TABLE["patterns"]))
    def test_texts(self, pattern):
        if not TABLE["patterns"][pattern]:
            with pytest.raises(UserError, match="no text at all"):
                compiled(pattern, search=True)
            return
        automaton = compiled(pattern, search=True)
        assert {text: automaton.accepts(text.encode()) for text in TABLE["texts"]} == {
            text: text in TABLE["patterns"][pattern] for text in TABLE["texts"]
        }

    @pytest.mark.parametrize("pattern", TABLE["errors"])
    def test_errors(self, pattern):
        with pytest.raises(UserError, match="The pattern .* at position [0-9]+"):
            regex.parse(pattern)


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        (r"(a)\1", "reference to a group at position 3"),
        (r"(?<x>a)\k<x>", "reference to a group at position 7"),
        ("(?=a)a", "looking ahead, (?=…) at position 0"),
        ("a(?<=a)b", "looking behind, (?<=…) at position 1"),
        ("(?!a)b", "looking ahead, (?!…)"),
        ("(?<!a)b", "looking behind, (?<!…)"),
        (r"\ba", r"\b, the boundary of a word, at position 0"),
        (r"a\Bb", r"\B, the boundary"),
        ("a^b", "^ within the text, at position 1"),
        ("a$b", "$ within the text, at position 1"),
        ("(^a)*", "repeat of ^ or $ at position 0"),
        ("(a$)+b", "repeat of ^ or $"),
        ("a$\n", "$ within"),
        ("x*^y", "^ within"),
        ("(?>ab?)c", "an atomic group"),
        ("(?(1)b|c)", "a conditional group"),
        ("(?m:^a)", "^ for lines"),
        ("(?i)a", "flags are given to a group, as in (?i:…) at position 0"),
        ("(?P<x>a)", "write (?<name>…)"),
        (r"\Aa", "write ^ at position 0"),
        (r"a\Z", "write $"),
        (r"a\z", "write $"),
        (r"\U0001F600", "write \\u{…}"),
        ("a{,2}", "write {0,…}"),
        (r"\a", r"write \x07"),
        ("(a", "a group that is not closed at position 0"),
        ("a)", "closes no group at position 1"),
        ("[z-a]", "out of order at position 1"),
        ("[a", "not closed at position 0"),
        ("a**", "nothing to repeat at position 2"),
        ("a*+b", "nothing to repeat"),
        ("^*", "nothing to repeat"),
        ("a{3,2}", "out of order"),
        ("a{10000000000}", "a repeat of more than"),
        (r"\p{Nonsense}", "'Nonsense' that Unicode does not have"),
        (r"\p{Greek}", "does not have"),
        (r"\p", "a property"),
        (r"\x4", "hexadecimal"),
        (r"\u12", "hexadecimal"),
        (r"\u{110000}", "beyond"),
        (r"(?<a>x)(?<a>y)", "a second group with the name 'a'"),
        (r"\ud83d", "half of a surrogate pair"),
        ("\ud800", "half of a surrogate pair"),
        (r"[\ude00]", "half of a surrogate pair"),
        ("\\", "the escape"),
        (r"\_a\q", r"\q at position 3"),
        ("(" * 2000 + "a" + ")" * 2000, "nested too deeply"),
        (5, "got int"),
    ],
)
def test_what_cannot_be_is_refused_by_name_and_position(pattern, named):
    with pytest.raises(UserError, match=re.escape(named)):
        regex.parse(pattern)


@pytest.mark.parametrize(
    ("pattern", "text", "other"),
    [
        ("", "", "a"),
        ("^$", "", "a"),
        ("(^a|b)c$", "ac", "abc"),
        (r"(?<year>\d{4})-\d\d", "2024-01", "٢٠٢٤-01"),
        ("^(?:yes|no)$", "no", "yes\n"),
        ("(?i:a)b", "Ab", "AB"),
        ("(?i:a(?-i:b))", "Ab", "AB"),
        (r"\$\{\}", "${}", "{}"),
        ("a{0}b", "b", "ab"),
        ("(?:a$)?", "a", "b"),
        ("a{2}?", "aa", "a"),
        ("(?s:.)", "\n", ""),
        (".", "a", "\u2028"),
        (r"\-\_\@\"\/", '-_@"/', ""),
        ("{a}]", "{a}]", "a"),
        (r"[\w-.]+", "a-.", "+"),
        ("[]|a", "a", ""),
        ("[^]", "\n", ""),
        (r"\ud83d\ude00+", "😀😀", ""),
        (r"[\ud83d\ude00-😃]", "😂", "a"),
        (r"\cJ\0", "\n\0", ""),
        (r"\p{L}+", "éж", "1"),
        (r"\P{L}", "1", "a"),
        (r"[\p{Lu}\d]+", "Ж9", "ж"),
        (r"\p{Script=Greek}", "α", "a"),
        ("^^a$$", "a", ""),
        ("[\\b]", "\b", "b"),
    ],
)
def test_whole_texts(pattern, text, other):
    automaton = compiled(pattern)
    assert automaton.accepts(text.encode())
    assert not automaton.accepts(other.encode())


@pytest.mark.parametrize(
    ("pattern", "inside", "outside"),
    [
        ("b", ["b", "abc", "\nb"], ["", "a"]),
        ("^b", ["b", "bc"], ["ab"]),
        ("b$", ["b", "ab"], ["ba", "b\n"]),
        ("^b$", ["b"], ["bb"]),
        ("(^|,)b(,|$)", ["b", "a,b", "b,c", "a,b,c"], ["ab", "bc", "a,bc"]),
        ("^a|b$", ["a", "ax", "xb"], ["xa", "bx"]),
        ("", ["", "a"], []),
        ("^", ["", "a"], []),
        ("a*$", ["", "b"], []),
        ("$^", [""], ["a"]),
        ("(^b)?c", ["bc", "c", "xc", "xbc"], ["b"]),
    ],
)
def test_a_search_finds_it_anywhere(pattern, inside, outside):
    automaton = compiled(pattern, search=True)
    assert all(automaton.accepts(text.encode()) for text in inside)
    assert not any(automaton.accepts(text.encode()) for text in outside)


def test_long_patterns_take_time_in_proportion():
    """A tenth of the text, a tenth of the work: counted in steps of the parser, not in seconds."""
    steps = []
    for size in (1_000, 10_000):
        with pytest.MonkeyPatch.context() as patch:
            count = []
            patch.setattr(regex.budget, "check", lambda count=count: count.append(1))
            regex.parse("a" * size)
        steps.append(len(count))
    assert steps[1] <= 10 * steps[0] + 10
    assert len(regex.parse("a" * 1000).parts) == 1000
