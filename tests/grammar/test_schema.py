"""What a language of a schema holds is JSON the schema accepts, and it holds every such JSON that
is written in its normal form.
"""

import json
import re
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_diffgemma.errors import UserError
from mlx_diffgemma.grammar import schema as schemas
from mlx_diffgemma.grammar.automaton import compile_language
from tests.grammar.strategies import READ, Validator, bounded, cases, compact, plain, valid
from tests.grammar.walks import walk

SOUND = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))


def compiled(schema):
    return compile_language(schemas.parse(schema))


def check(schema, text, seed):
    automaton = compiled(schema)
    validator = Validator(schema)
    assert validator.is_valid(json.loads(text))
    assert automaton.accepts(text.encode()), text
    rng = np.random.default_rng(seed)
    for free in (0, 5, 15, 40):
        own = walk(automaton, rng, free, stop=0.02).decode()
        validator.validate(json.loads(own))


@SOUND
@given(cases(), st.integers(0, 2**32))
def test_texts_are_valid_and_normal_forms_are_texts(case, seed):
    check(*case, seed)


@pytest.mark.slow
@settings(SOUND, max_examples=1500)
@given(cases(), st.integers(0, 2**32))
def test_texts_are_valid_and_normal_forms_are_texts_at_length(case, seed):
    check(*case, seed)


class TestNumbers:
    @settings(max_examples=80, deadline=None)
    @given(
        bounded(False),
        st.lists(st.tuples(st.integers(-2, 2), st.integers(0, 6)), max_size=6),
        st.integers(-(10**8), 10**8),
    )
    def test_decimals_are_accepted_where_valid(self, case, near, other):
        """Around the bounds, and anywhere."""
        schema, _ = case
        automaton = compiled(schema)
        bounds = [Decimal(str(bound)) for bound in schema.values() if not isinstance(bound, str)]
        for value in [
            bound + Decimal(by).scaleb(-places) for bound in bounds for by, places in near
        ] + [Decimal(other).scaleb(-6)]:
            if value == round(value, 6):
                assert automaton.accepts(plain(value).encode()) == valid(schema, float(value)), (
                    value
                )

    @settings(max_examples=80, deadline=None)
    @given(bounded(True), st.lists(st.integers(-5000, 5000), max_size=10))
    def test_whole_numbers_are_accepted_where_valid(self, case, others):
        schema, _ = case
        automaton = compiled(schema)
        bounds = [int(bound) for bound in schema.values() if not isinstance(bound, str)]
        for value in others + [bound + by for bound in bounds for by in range(-3, 4)]:
            assert automaton.accepts(str(value).encode()) == valid(schema, value), value

    @pytest.mark.parametrize(
        ("schema", "inside", "outside"),
        [
            (
                {"type": "integer", "minimum": 10**40 + 1, "maximum": 10**40 + 3},
                [10**40 + 1, 10**40 + 3],
                [10**40, 10**40 + 4, 1],
            ),
            ({"type": "integer", "exclusiveMinimum": 0.5, "maximum": 2.9}, [1, 2], [0, 3, "1.0"]),
            (
                {"type": "integer", "exclusiveMinimum": -1, "exclusiveMaximum": 1},
                [0],
                [-1, 1, "-0"],
            ),
            (
                {"type": "number", "exclusiveMinimum": 1e25, "maximum": 2e25},
                [15 * 10**24],
                [10**24],
            ),
            ({"type": "number", "maximum": 1e23}, [99999999999999991611392], [10**23]),
            (
                {"type": "number", "minimum": 1e-9, "maximum": 2e-9},
                ["0.0000000015"[:11], "0.000000002"],
                ["0", "0.000000003"],
            ),
            (
                {"type": "number", "minimum": -0.5, "maximum": -0.25},
                ["-0.5", "-0.25", "-0.300000"],
                ["-0.6", "-0.2", "0", "-0", "0.3"],
            ),
            (
                {"type": "number"},
                ["0", "-0", "1.5e-10", "1E+5", "-12.25"],
                ["01", "1.", ".5", "+1", "1e", "NaN", "--1", "1e100"],
            ),
            ({"type": "integer"}, ["0", "-7", "9" * 15], ["1.0", "1e2", "9" * 16, "00"]),
            ({"type": "integer", "minimum": 0}, ["0", "12"], ["-1"]),
        ],
    )
    def test_numbers(self, schema, inside, outside):
        automaton = compiled(schema)
        assert all(automaton.accepts(str(value).encode()) for value in inside)
        assert not any(automaton.accepts(str(value).encode()) for value in outside)

    @pytest.mark.parametrize(
        "schema",
        ['{"maximum": 1e400}', '{"exclusiveMinimum": -1e400, "minimum": 1}', {"minimum": 10**400}],
    )
    def test_bounds_beyond_float64(self, schema):
        with pytest.raises(UserError, match="beyond those of float64|is out of range"):
            schemas.parse(schema)

    def test_bounds_with_too_many_places(self):
        with pytest.raises(UserError, match="30 decimal places"):
            schemas.parse({"minimum": 1e-40})


@pytest.mark.parametrize("name", sorted(READ))
def test_formats(name):
    automaton, rng = compiled({"format": name}), np.random.default_rng(0)
    for _ in range(100):
        text = json.loads(walk(automaton, rng, 40).decode())
        assert READ[name](text)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("date", "2023-02-29"),
        ("date", "0000-01-01"),
        ("date", "2024-13-01"),
        ("date", "2024-04-31"),
        ("time", "24:00:00Z"),
        ("time", "10:00:00"),
        ("date-time", "2024-01-01 00:00:00Z"),
        ("ipv4", "256.1.1.1"),
        ("ipv4", "01.1.1.1"),
        ("uuid", "0123"),
        ("email", "a@b"),
        ("email", "@b.c"),
        ("date", "٢٠٢٤-01-01"),
    ],
)
def test_formats_refuse(name, text):
    assert not compiled({"format": name}).accepts(compact(text).encode())


class TestForm:
    def test_blanks_behind_commas_and_colons_alone(self):
        automaton = compiled(
            {
                "properties": {
                    "a": {"type": "array", "items": {"type": "null"}},
                    "b": {"const": {"x": [1, 2]}},
                }
            }
        )
        assert automaton.accepts(b'{"a": [null, null], "b": {"x": [1, 2]}}')
        for text in (
            b'{ "a":[]}',
            b'{"a" :[]}',
            b'{"a":  []}',
            b'{"a":[] }',
            b" {}",
            b"{}\n",
            b'{"b":{"x":[1,2]},"a":[]}',
            b'{"a":[],}',
        ):
            assert not automaton.accepts(text)

    def test_a_schema_may_be_its_text(self):
        assert compiled('{"const": "é"}').accepts('"é"'.encode())
        assert compiled("true").accepts(b'{"a":[]}')

    def test_any_object(self):
        automaton = compiled({"type": "object"})
        assert automaton.accepts(b'{"a":{"b":1},"c":[true]}')
        assert not any(
            automaton.accepts(text) for text in (b"[]", b"1", b'{"a":{"b":{"c":{"d":1}}}}')
        )

    def test_many_properties(self):
        names = [f"p{i}" for i in range(250)]
        automaton = compiled({"properties": {name: {"type": "null"} for name in names}})
        assert automaton.accepts(compact(dict.fromkeys(names[::2])).encode())

    def test_references_are_translated_once(self):
        defs = {"a0": {"type": "null"}} | {
            f"a{i}": {"prefixItems": [{"$ref": f"#/$defs/a{i - 1}"}] * 2} for i in range(1, 12)
        }
        with pytest.MonkeyPatch.context() as patch:
            translated, value = [], schemas.Translator.value

            def counted(self, schema, where, inside):
                translated.append(where)
                return value(self, schema, where, inside)

            patch.setattr(schemas.Translator, "value", counted)
            schemas.parse({"$defs": defs, "$ref": "#/$defs/a11"})
        # Each definition, its two references, and the items after them; the root.
        assert len(translated) == 1 + 11 * 4 + 1

    def test_references_that_are_shared_mean_what_they_say(self):
        pair = {
            "prefixItems": [{"$ref": "#/$defs/a"}] * 2,
            "type": "array",
            "minItems": 2,
            "items": False,
        }
        defs = {"a": {"enum": [1, 2]}, "b": pair}
        automaton = compiled({"$defs": defs, "$ref": "#/$defs/b"})
        texts = ("[1,1]", "[1,2]", "[2,1]", "[2,2]", "[1,3]", "[1]", "1", "[[1],1]")
        found = [text for text in texts if automaton.accepts(text.encode())]
        assert found == ["[1,1]", "[1,2]", "[2,1]", "[2,2]"]

    @pytest.mark.parametrize(
        "schema",
        [
            {"type": "string"},
            {"type": "string", "pattern": "(?s:.)"},
            {"type": "string", "minLength": 1, "maxLength": 1},
        ],
    )
    def test_every_character_that_json_escapes(self, schema):
        """As it is, an escaped one is refused; escaped, it is admitted and read back as itself."""
        automaton = compiled(schema)
        for code in [*range(0x30), 0x5B, 0x5C, 0x5D, 0x7E, 0x7F, 0x80, 0x2028]:
            raw, written = f'"{chr(code)}"', json.dumps(chr(code), ensure_ascii=False)
            assert automaton.accepts(written.encode()), hex(code)
            assert automaton.accepts(raw.encode()) == (raw == written), hex(code)

    def test_a_pattern_is_searched_for(self):
        automaton = compiled({"type": "string", "pattern": "b[\\n]c"})
        assert automaton.accepts(rb'"ab\ncd"')
        assert not automaton.accepts(rb'"ab\rcd"')

    @pytest.mark.parametrize(
        ("schema", "inside", "outside"),
        [
            ({"type": "string", "anyOf": [True, {"maxLength": 2}]}, '"abc"', "1"),
            (
                {"type": ["integer", "null"], "oneOf": [{"type": "integer"}, {"type": "null"}]},
                "null",
                '"a"',
            ),
            ({"type": "string", "enum": ["a", 1]}, '"a"', "1"),
            (
                {"enum": ["a", "abc"], "$ref": "#/$defs/s", "$defs": {"s": {"maxLength": 2}}},
                '"a"',
                '"abc"',
            ),
            ({"minLength": 1}, '"a"', "1"),
            ({"minLength": 2}, '"猫\\n"', '"a"'),
            ({"maxLength": 2}, '"猫\\""', '"abc"'),
            ({"minLength": 1, "maxLength": 1}, '"😀"', '""'),
            ({"type": "array", "maxItems": 0}, "[]", "[1]"),
            ({"type": "array", "items": False}, "[]", "[1]"),
            ({"type": "object", "required": ["a"]}, '{"a":1}', "{}"),
            (
                {"type": "array", "prefixItems": [{"const": 1}, {"const": 2}], "maxItems": 1},
                "[1]",
                "[1,2]",
            ),
            (
                {
                    "type": "array",
                    "minItems": 2,
                    "prefixItems": [{"const": 1}],
                    "items": {"const": 3},
                },
                "[1,3]",
                "[1]",
            ),
            ({"anyOf": [False, {"const": 0}]}, "0", "false"),
            ({"type": "object", "additionalProperties": False}, "{}", '{"a":1}'),
            (
                {"type": "null", "uniqueItems": False, "minProperties": 0, "patternProperties": {}},
                "null",
                "1",
            ),
        ],
    )
    def test_schemas(self, schema, inside, outside):
        automaton = compiled(schema)
        assert automaton.accepts(inside.encode())
        assert not automaton.accepts(outside.encode())
        assert valid(schema, json.loads(inside))


class TestRefusals:
    @pytest.mark.parametrize(
        ("keyword", "value"),
        [
            ("not", {"type": "null"}),
            ("if", True),
            ("then", True),
            ("else", True),
            ("multipleOf", 2),
            ("uniqueItems", True),
            ("contains", {}),
            ("minContains", 1),
            ("maxContains", 2),
            ("patternProperties", {"a": True}),
            ("propertyNames", {"maxLength": 3}),
            ("minProperties", 1),
            ("maxProperties", 3),
            ("dependentRequired", {"a": ["b"]}),
            ("dependentSchemas", {"a": {}}),
            ("unevaluatedProperties", False),
            ("unevaluatedItems", False),
            ("$dynamicRef", "#a"),
            ("$dynamicAnchor", "a"),
            ("colour", "red"),
            ("dependencies", {}),
            ("additionalItems", False),
            ("contentSchema", {}),
        ],
    )
    def test_keywords_by_name_and_place(self, keyword, value):
        with pytest.raises(UserError, match=re.escape(f"uses {keyword!r} at #/properties/a")):
            schemas.parse({"properties": {"a": {"type": "object", keyword: value}}})

    @pytest.mark.parametrize(
        ("schema", "named"),
        [
            ("{", "not valid JSON"),
            (5, "an object, got int"),
            ("[1]", "an object, got list"),
            ({"type": "text"}, "no JSON schema.*#/type"),
            ({"minLength": -1}, "no JSON schema"),
            ({"exclusiveMinimum": True}, "no JSON schema"),
            ({"items": [{}]}, "no JSON schema"),
            ({"pattern": "("}, "no JSON schema|no regular"),
            ({"pattern": "(?=a)"}, "looking ahead"),
            ({"format": "uri"}, "format 'uri'"),
            ({"pattern": "a", "maxLength": 1}, "'pattern' beside other bounds"),
            ({"format": "date", "pattern": "a"}, "beside other bounds"),
            ({"$ref": "#"}, "comes back to '#'"),
            ({"properties": {"a": {"$ref": "#"}}}, "comes back"),
            (
                {
                    "$defs": {"a": {"items": {"$ref": "#/$defs/b"}}, "b": {"$ref": "#/$defs/a"}},
                    "$ref": "#/$defs/a",
                },
                "comes back",
            ),
            ({"enum": [1], "$ref": "http://127.0.0.1:9/x"}, "refers to 'http"),
            ({"$ref": "other.json"}, "'other.json'.*within"),
            ({"$ref": "#here"}, "'#here'.*within"),
            ({"$ref": "#/$defs/x"}, "does not hold"),
            ({"$ref": "#/$comment", "$comment": "x"}, "no JSON schema, where '#/.comment' leads"),
            ({"$ref": "#/default", "default": {"minimum": "x"}}, "no JSON schema, where"),
            ({"$ref": "#/$defs/a", "type": "null", "$defs": {"a": {}}}, "'.ref' beside 'type'"),
            ({"anyOf": [{}], "minLength": 1}, "'anyOf' beside 'minLength'"),
            ({"allOf": [{}, {}]}, "'allOf' with 2 parts"),
            ({"type": "string", "anyOf": [{"type": "null"}]}, "beside another 'type'"),
            ({"oneOf": [{"type": "string"}, {"maxLength": 3}]}, "'oneOf'"),
            ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "'oneOf'"),
            ({"oneOf": [{"const": 1}, {"enum": [2, 1.0]}]}, "'oneOf'"),
            ({"oneOf": [True, {"type": "null"}]}, "'oneOf'"),
            (
                {"oneOf": [{"type": "object", "properties": {"k": {"const": k}}} for k in "ab"]},
                "'oneOf'",
            ),
            (
                {
                    "oneOf": [{"$ref": f"#/$defs/{k}"} for k in "ab"],
                    "$defs": {
                        k: {
                            "type": "object",
                            "required": ["x"],
                            "properties": {"x": {"$ref": f"#/$defs/{k}"}},
                        }
                        for k in "ab"
                    },
                },
                "'oneOf'",
            ),
            ({"enum": [1, 2], "type": "string"}, "No value that is listed"),
            ({"enum": []}, "No value that is listed"),
            ({"const": float("inf")}, "JSON cannot write"),
        ],
    )
    def test_what_cannot_be(self, schema, named):
        with pytest.raises(UserError, match=named):
            schemas.parse(schema)

    def test_too_deep(self):
        schema = {"type": "null"}
        for _ in range(900):
            schema = {"items": schema}
        with pytest.raises(UserError, match="nested too deeply"):
            schemas.parse(schema)

    @pytest.mark.parametrize(
        "schema",
        [
            False,
            {"type": "string", "minLength": 3, "maxLength": 2},
            {"type": "array", "minItems": 3, "maxItems": 2},
            {"const": "\ud800"},
            {"type": "object", "required": ["a"], "additionalProperties": False},
            {"type": "integer", "minimum": 0.1, "maximum": 0.9},
            {"type": "number", "exclusiveMinimum": 1, "maximum": 1},
            {"type": "array", "items": False, "minItems": 1},
        ],
    )
    def test_what_no_value_fits(self, schema):
        with pytest.raises(UserError, match="no text at all"):
            compiled(schema)
