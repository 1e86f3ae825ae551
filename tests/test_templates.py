"""Chat templates are foreign code: bounded in time, work and memory, and every failure is one
sentence.
"""

import resource
import time

import pytest
from jinja2 import meta

from mlx_diffgemma.errors import UserError
from mlx_diffgemma.text.sandbox import DROPPED_FILTERS, Environment
from mlx_diffgemma.text.templates import compiled, render, syntax


def grown(first, step):
    """A template that takes a step from one value to the next 60 times."""
    loop = "{% for i in range(60) %}{% set n.a = " + step + " %}{% endfor %}"
    return "{% set n = namespace(a=" + first + ") %}" + loop


MESSAGES = {"messages": [{"role": "user", "content": "Hi"}], "tools": None}
LOOPS = {
    "nested ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops that only filter": "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    "macros that call themselves twice": (
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}"
    ),
    "filters over long lists": "{% for a in range(99999) %}{{ range(99999) | map('string') | join | length }}{% endfor %}",
}
TEXTS = {
    "a product": "{{ 'a' * 10 ** 10 }}",
    "a product of a list": "{{ [1] * 10 ** 10 }}",
    "an indent": "{{ messages | tojson(indent=10 ** 9) }}",
    "an indent as text": "{{ messages | tojson(indent='a' * 10 ** 7) }}",
    "joined texts": grown("'a'", "n.a ~ n.a"),
    "added texts": grown("'a'", "n.a + n.a"),
    "added lists": grown("[1]", "n.a + n.a"),
    "lists that hold a list twice": grown("[1]", "[n.a, n.a]"),
    "maps that hold a map twice": grown("{}", "{'x': n.a, 'y': n.a}"),
    "maps made by a call": grown("{}", "dict(x=n.a, y=n.a)"),
    "a width": "{{ '%1000000000d' % 3 }}",
    "a named width": "{{ '%(a)1000000000d' % {'a': 3} }}",
    "a starred width": "{{ '%*d' % (9999999, 1) }}",
    "a width of format": "{{ '{:1000000000}'.format(3) }}",
    "a width of the filter": "{{ '%1000000000d' | format(3) }}",
    "an argument written often": "{{ ('{0}' * 100000).format('a' * 100000) }}",
    "a long separator": "{{ ('a' * 1000000).join(range(100000) | map('string') | list) }}",
    "a long separator of the filter": "{{ range(100000) | join('a' * 1000000) }}",
    "a long replacement": "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
    "a long replacement of the filter": "{{ ('a' * 1000000) | replace('a', 'b' * 1000000) }}",
    "centred": "{{ 'a' | center(10 ** 9) }}",
    "justified": "{{ 'a'.ljust(10 ** 9) }}",
    "tabs": "{{ ('\t' * 1000).expandtabs(1000000) }}",
    "indented": "{{ ('\n' * 100000) | indent(100000) }}",
    "a power": "{{ 10 ** 99999 }}",
    "a sum of lists": "{{ [[1]] | sum(start=[]) }}",
    "literal text in loops": "{% for a in range(9999) %}{% for b in range(9999) %}"
    + "a" * 9999
    + "{% endfor %}{% endfor %}",
    "output in loops": "{% for a in range(9999) %}{{ 'a' * 99999 }}{% endfor %}",
    "a block that is set": "{% set x %}{% for a in range(99999) %}"
    + "a" * 9999
    + "{% endfor %}{% endset %}",
}
FAILURES = {
    "a division": "{{ 1 / 0 }}",
    "an unknown name": "{{ messages[0].foo.bar }}",
    "an unknown method": "{{ 'x'.foo() }}",
    "another file": "{% include 'x' %}",
    "wrong kinds": "{{ messages + 3 }}",
    "its own message": "{{ raise_exception('No.') }}",
    "its own message of two lines": "{{ raise_exception('No.\nNo.') }}",
    "an index": "{{ [1].index(5) }}",
    "a private name": "{{ messages.__class__.__mro__ }}",
    "an open block": "{% if %}",
    "an unknown filter": "{{ 1 | strange }}",
    "brackets": "{{ " + "(" * 5000 + ")" * 5000 + " }}",
    "open brackets": "{{" * 5000,
    "an endless macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "a private name kept": "{% set n = namespace(_a=1) %}",
    "a changed list": "{{ messages.append(1) }}",
    "a long template": "a" * (2**20 + 1),
    "a format": "{{ '%d' % 'a' }}",
    "an argument": "{{ range('a') }}",
    "too many": "{{ 'a'.upper(1, 2) }}",
    "a translation": "{{ 'a'.translate({97: 'b' * 10}) }}",
    **{f"the filter {name}": "{{ 'a' | " + name + " }}" for name in DROPPED_FILTERS},
}


@pytest.mark.parametrize("source", LOOPS.values(), ids=LOOPS)
def test_loops_end(source, monkeypatch):
    monkeypatch.setattr("mlx_diffgemma.text.budget.SECONDS", 0.2)
    began = time.thread_time()
    with pytest.raises(UserError, match="The chat template was stopped: it takes more than"):
        render(source, MESSAGES)
    assert time.thread_time() - began < 1


@pytest.mark.parametrize("source", TEXTS.values(), ids=TEXTS)
def test_texts_and_lists_are_refused_before_they_are_made(source, monkeypatch):
    monkeypatch.setattr("mlx_diffgemma.text.budget.LARGEST", 2**20)
    monkeypatch.setattr("mlx_diffgemma.text.budget.ENTRIES", 2**17)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError) as refused:
        render(source, MESSAGES)
    assert "\n" not in str(refused.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "kilobytes"


@pytest.mark.parametrize("source", FAILURES.values(), ids=FAILURES)
def test_every_failure_is_one_sentence(source):
    with pytest.raises(UserError) as refused:
        render(source, MESSAGES)
    assert "The chat template" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500


def test_a_conversation_that_is_too_long(monkeypatch):
    monkeypatch.setattr("mlx_diffgemma.text.budget.LARGEST", 1000)
    with pytest.raises(UserError, match="more than 1,000 characters"):
        render("{{ messages }}", {"messages": "a" * 1001})


def test_a_long_conversation_may_be_written_whole(monkeypatch):
    monkeypatch.setattr("mlx_diffgemma.text.budget.LARGEST", 1000)
    text = "a" * 900
    assert (
        render("{% for m in messages %}{{ m ~ m }}{% endfor %}", {"messages": [text]}) == text * 2
    )


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (
            "{{ [1, 2] | join(',') }} {{ (1, 2) | list }} {{ {'a': 1} | tojson }} {{ 'a' ~ 1 }}",
            '1,2 [1, 2] {"a": 1} a1',
        ),
        (
            "{% for k, v in {'x': 1} | dictsort %}{{ k }}{{ v }}{{ loop.last }}{% endfor %}",
            "x1True",
        ),
        (
            "{% for m in messages if m.role == 'user' %}{{ loop.length }}{% else %}none{% endfor %}",
            "1",
        ),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "Hi"),
        ("{{ '%s-%s' % (1, 2) }}", "1-2"),
        ("{% set x %}abc{% endset %}{{ x | upper }}", "ABC"),
        ("{{ '{}{}'.format('a', 1) }}", "a1"),
        (
            "{% for a in range(5) %}{% if a == 1 %}{% continue %}{% endif %}"
            "{% if a == 3 %}{% break %}{% endif %}{{ a }}{% endfor %}",
            "02",
        ),
        ("{{ messages | map(attribute='content') | list }}", "['Hi']"),
        ("{{ 'é' | tojson }}{{ 'é' | tojson(ensure_ascii=true) }}", '"é""\\u00e9"'),
        (
            "{% macro m(a) %}[{{ a }}{{ caller() }}]{% endmacro %}{% call m(1) %}x{% endcall %}",
            "[1x]",
        ),
        ("{{ strftime_now('%Y') | length }}", "4"),
        (
            "{% for a in [1, [2, [3]]] recursive %}{{ loop(a) if a is iterable else a }}{% endfor %}",
            "123",
        ),
    ],
)
def test_what_templates_do_is_done(source, text):
    assert render(source, MESSAGES) == text


def test_a_template_is_read_once():
    assert compiled("{{ 1 }} once") is compiled("{{ 1 }} once")


def test_the_variables_of_a_template_are_told_within_bounds():
    """Jinja computes constants while it looks for variables."""
    template = "{% set x = 9 ** 9 ** 9 ** 9 %}{{ mood }}"
    tree = syntax(template)
    assert isinstance(tree.environment, Environment)
    assert meta.find_undeclared_variables(tree) == {"mood"}
