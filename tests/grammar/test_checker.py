"""Schemas of others: checked in bounded time, without asking anybody."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_diffgemma.errors import UserError
from mlx_diffgemma.evaluation.tasks import _question
from mlx_diffgemma.grammar import budget, checker, schema
from mlx_diffgemma.grammar.checker import Checker, TooMuchWorkError
from mlx_diffgemma.serving.jobs.functions import Functions
from tests.grammar.strategies import VALUES, cases, valid

SLOW_FOR_BACKTRACKING = {"type": "string", "pattern": "^(a+)+$"}


def doubling(levels):
    """Each definition refers to the next one twice."""
    definitions = {
        f"a{level}": {"allOf": [{"$ref": f"#/$defs/a{level + 1}"}] * 2} for level in range(levels)
    }
    return {"$defs": {**definitions, f"a{levels}": {"minLength": 3}}, "$ref": "#/$defs/a0"}


@settings(max_examples=100, deadline=None)
@given(cases(), st.lists(VALUES, max_size=5))
def test_it_says_what_the_specification_says(case, values):
    schema, text = case
    own = Checker(schema)
    assert own.fits(json.loads(text))
    for value in values:
        assert own.fits(value) == valid(schema, value)


@pytest.mark.parametrize(
    ("schema", "inside", "outside"),
    [
        (
            {"patternProperties": {"^x": {"type": "null"}}, "additionalProperties": False},
            {"x1": None},
            {"y": None},
        ),
        ({"patternProperties": {"^\\d$": {"type": "null"}}}, {"٣": 1}, {"3": 1}),
        ({"enum": [1]}, 1.0, True),
        ({"enum": [[1, {"a": 0}]]}, [1, {"a": 0}], [1]),
        ({"uniqueItems": True}, [1, True, "1", [1], {"a": 1}], [{"a": [1]}, {"a": [1.0]}]),
        ({"pattern": "^\\d$"}, "3", "٣"),
        ({"properties": {"a": {}}, "unevaluatedProperties": False}, {"a": 1}, {"b": 1}),
        ({"$defs": {"a": {"$anchor": "x", "type": "null"}}, "$ref": "#x"}, None, 1),
        (
            {"properties": {"$ref": {"type": "string"}}},
            {"$ref": "http://127.0.0.1:9/"},
            {"$ref": 1},
        ),
        ({"const": {"$ref": "http://127.0.0.1:9/"}}, {"$ref": "http://127.0.0.1:9/"}, {}),
    ],
)
def test_keywords(schema, inside, outside):
    own = Checker(schema)
    assert own.fits(inside)
    assert not own.fits(outside)


def test_patterns_are_those_of_javascript():
    """And match anywhere: Python's own expressions take digits of every script."""
    checker = Checker({"pattern": r"\d$"})
    assert [checker.fits(text) for text in ("a3", "3", "٣", "3a")] == [True, True, False, False]


class TestBounds:
    """What would take for ever is decided, or refused, after so many steps."""

    def test_patterns_do_not_backtrack(self):
        assert not Checker(SLOW_FOR_BACKTRACKING).fits("a" * 5000 + "!")
        assert not Checker(
            {"patternProperties": {"^(a+)+$": True}, "additionalProperties": False}
        ).fits({"a" * 5000 + "!": 1})

    def test_listed_values_beside_a_pattern(self):
        language = schema.parse({"enum": ["a" * 44 + "!", "aa"], "pattern": "^(a+)+$"})
        assert language.parts

    def test_work_that_doubles(self):
        with pytest.raises(TooMuchWorkError, match="more than 20,000 steps"):
            Checker(doubling(60)).fits("aaaa")

    def test_a_call_that_takes_too_many_steps_does_not_fit(self):
        functions = Functions(
            {
                "f": {
                    "type": "object",
                    "properties": {"x": doubling(60)},
                    "$defs": doubling(60)["$defs"],
                }
            }
        )
        assert not functions.fits({"name": "f", "arguments": {"x": "aaaa"}})

    def test_steps_of_values(self):
        own = Checker({"items": {"type": "integer"}}, max_steps=100)
        assert own.fits([1] * 50)
        with pytest.raises(TooMuchWorkError):
            own.fits([1] * 200)

    def test_references_that_come_back(self):
        with pytest.raises(TooMuchWorkError):
            Checker({"$ref": "#"}).fits(1)

    def test_memory_of_patterns(self, monkeypatch):
        monkeypatch.setattr(checker, "MAX_PATTERN_BYTES", 1000)
        with pytest.raises(UserError, match="patterns of the JSON schema need more than"):
            Checker({"properties": {name: {"pattern": f"^{name}{{500}}$"} for name in "abc"}})

    def test_time(self):
        wide = {"properties": {f"p{number}": {"type": "string"} for number in range(200)}}
        for own in (
            wide,
            doubling(60) | {"enum": ["aaaa"]},
            {"enum": [f"entry {number}" for number in range(500)]},
        ):
            with (
                budget.limited(-1.0),
                pytest.raises(budget.TooLongError, match="more than the 0 seconds"),
            ):
                schema.parse(own)
            with budget.limited(60.0, lambda: True), pytest.raises(budget.AbandonedError):
                schema.parse(own)

    def test_long_messages_are_shortened(self):
        with pytest.raises(UserError, match="…") as refused:
            schema.parse({"type": "x" * 100_000})
        assert len(str(refused.value)) < 500


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """(the address of a server, the paths that were asked of it, the address of a file): all serve
    a schema.
    """
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"type": "integer"}')

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    path = tmp_path_factory.mktemp("schemas") / "x.json"
    path.write_text('{"type": "integer"}')
    yield f"http://127.0.0.1:{server.server_port}", asked, path.as_uri()
    server.shutdown()
    thread.join()
    server.server_close()


def outward(http, file):
    """Schemas that lead out of themselves, in all orders of keywords."""
    schemas = []
    for target in (f"{http}/x#/type", file, "x.json", "//127.0.0.1/x"):
        for name in ("$ref", "$dynamicRef"):
            reference = {name: target}
            schemas += [
                {"enum": [1], **reference},
                {**reference, "enum": [1]},
                {"const": 1, "allOf": [reference]},
                {"not": reference, "enum": [1]},
                {"enum": [[1]], "items": reference},
                {"enum": [{"a": 1}], "properties": {"a": reference}},
                {"enum": [1], "$ref": "#/$defs/a", "$defs": {"a": reference}},
                {"type": "object", "properties": {"a": reference}},
                {"enum": [1], "$ref": "#/default", "default": reference},
                {"anyOf": [reference, {"type": "null"}]},
            ]
        schemas += [
            {"$id": f"{http}/base/", "enum": [1], "$ref": "x"},
            {"$id": f"{http}/base/", "$ref": target},
            {"enum": [1], "$defs": {"a": {"$id": target, "$ref": "#/b"}}, "$ref": "#/$defs/a"},
        ]
    for target in (f"{http}/meta", file, "x.json"):
        schemas += [
            {"$schema": target, "enum": [1], "type": "integer"},
            {"$schema": target, "$ref": "#/$defs/a", "$defs": {"a": {"$schema": target}}},
            {"$vocabulary": {target: True}, "enum": [1]},
            {"$recursiveRef": target, "enum": [1]},
        ]
    return schemas


def tried(use, own):
    """Refused or not, nothing else is raised."""
    with contextlib.suppress(UserError):
        use(own)


def test_nothing_is_fetched(elsewhere):
    http, asked, file = elsewhere
    schemas = outward(http, file)
    for own in schemas:
        tried(schema.parse, own)
        tried(lambda own: Checker(own).fits(1), own)
        tried(
            lambda own: Functions({"f": {"properties": {"a": own}}}).fits(
                {"name": "f", "arguments": {"a": 1}}
            ),
            own,
        )
        tried(lambda own: _question({"prompt": "a", "schema": own}, Path())[1].mark("1"), own)
    assert not asked
    assert len(schemas) > 100


@pytest.mark.parametrize(
    "reference",
    [
        "http://127.0.0.1:9/x",
        "file:///etc/hosts",
        "x.json",
        "#/$defs/none",
        "#nowhere",
        "#/$defs/a/0/b",
    ],
)
@pytest.mark.parametrize("keyword", ["$ref", "$dynamicRef"])
def test_references_out_of_the_schema_are_refused(keyword, reference):
    with pytest.raises(UserError, match="refers to"):
        Checker({"$defs": {"a": {}}, "properties": {"a": {keyword: reference}}})


def test_references_beside_an_identity_below_the_top():
    with pytest.raises(UserError, match="'.id' below its top"):
        Checker({"$defs": {"a": {"$id": "http://a/b", "$ref": "#/$defs/c"}}})
