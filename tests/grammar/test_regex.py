"""A language is what ``re.fullmatch`` accepts."""

import re
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_diffgemma.errors import UserError
from mlx_diffgemma.grammar import regex
from mlx_diffgemma.grammar.automaton import compile_language
from tests.grammar.strategies import ALPHABET, EXPRESSIONS
from tests.grammar.walks import walk


def compiled(pattern):
    return compile_language(regex.parse(pattern))


SOUND = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
CASES = given(EXPRESSIONS, st.lists(st.text(ALPHABET, max_size=5), min_size=10, max_size=10), st.integers(0, 2**32))


def check(pattern, texts, seed):
    """On random texts, on texts of the automaton, and on these with one character changed."""
    with warnings.catch_warnings(record=True):
        try:
            automaton = compiled(pattern)
        except UserError as error:
            if "no text at all" not in str(error):
                raise
            return
        expected = re.compile(pattern)
    rng = np.random.default_rng(seed)
    for free in (0, 2, 6, 12):
        own = walk(automaton, rng, free).decode()
        assert expected.fullmatch(own), own
        place = rng.integers(0, len(own) + 1)
        texts += [own[:place] + rng.choice(list(ALPHABET)) + own[place + rng.integers(0, 2) :], own.swapcase(), own + "\n"]
    for text in texts:
        assert automaton.accepts(text.encode()) == bool(expected.fullmatch(text)), text


@SOUND
@CASES
def test_language_is_that_of_fullmatch(pattern, texts, seed):
    check(pattern, texts, seed)


@pytest.mark.slow
@settings(SOUND, max_examples=1000)
@CASES
def test_language_is_that_of_fullmatch_at_length(pattern, texts, seed):
    check(pattern, texts, seed)


@pytest.mark.parametrize("pattern",
                         [r"\d+", "a.c", "[^a-z]", "(?i)straße", "(?i)[k]", "(?a)(?u:\\w)", "(?a)\\w", "(?u:(?a:\\d))", "."])
def test_every_character(pattern):
    """Of all planes, one for one."""
    automaton, expected = compiled(pattern), re.compile(pattern)
    for code in [*range(0x3000), *range(0xFF00, 0x10500), 0xD7FF, 0xE000, *range(0x1D7C0, 0x1D800), 0x10FFFF]:
        if not 0xD800 <= code <= 0xDFFF:
            assert automaton.accepts(chr(code).encode()) == bool(expected.fullmatch(chr(code))), hex(code)


@pytest.mark.parametrize(("pattern", "named"), [
    (r"(a)\1", "references to groups"), (r"(?P<x>a)(?P=x)", "references to groups"), (r"(a)?(?(1)b|c)", "conditional groups"),
    ("(?=a)a", "looking ahead or behind"), ("(?<=a)b", "looking ahead or behind"), ("(?!a)b", "looking ahead or behind"),
    ("(?<!a)b", "looking ahead or behind"), (r"\ba", r"\b"), (r"a\Bb", r"\B"), ("a^b", "^ within"), ("a$b", "$ within"),
    (r"a\Ab", r"\A within"), (r"a\Zb", r"\Z within"), ("(^a)*", "^ within"), ("(a$)+b", "$ within"), ("a$\n", "$ within"),
    ("(?L)a", "no regular expression"), ("(a", "no regular expression"), ("[z-a]", "no regular expression"),
    ("a**", "multiple repeat"),
    ("\ud800", "surrogate"), ("(" * 2000 + "a" + ")" * 2000, "nested too deeply"), (5, "got int"),
])
def test_what_cannot_be_is_refused_by_name(pattern, named):
    with pytest.raises(UserError, match=re.escape(named)):
        regex.parse(pattern)


@pytest.mark.skipif(not hasattr(re, "NOFLAG"), reason="Python 3.10 knows neither")
@pytest.mark.parametrize(("pattern", "named"), [("(?>ab?)c", "atomic groups"), ("a*+b", "possessive repeats")])
def test_what_cannot_be_is_refused_by_name_from_python_3_11_on(pattern, named):
    with pytest.raises(UserError, match=named):
        regex.parse(pattern)


@pytest.mark.parametrize(("pattern", "text"), [
    ("", ""), ("^$", ""), ("(^a|b)c$", "ac"), ("(?x) a b  # both", "ab"), ("(?P<year>\\d{4})-\\d\\d", "2024-01"), ("(?m)^a$", "a"),
    ("(?:|a)*b", "aab"), ("^(?:yes|no)$", "no"), ("(?i:a)b", "Ab"), (r"\$\{\}", "${}"), ("a{0}b", "b"), ("(?:a$)?", "a"),
    ("a{,2}", "aa"),
])
def test_plain_patterns(pattern, text):
    assert re.fullmatch(pattern, text)
    assert compiled(pattern).accepts(text.encode())
    assert not compiled(pattern).accepts(text.encode() + b"\n")
