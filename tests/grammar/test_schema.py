"""What a language of a schema holds is JSON the schema accepts, and it holds every such JSON that is written in its normal form."""

import ipaddress
import json
import re
import uuid
from datetime import date, datetime, time
from decimal import Decimal

import jsonschema
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_diffgemma.errors import UserError
from mlx_diffgemma.grammar import schema as schemas
from mlx_diffgemma.grammar.automaton import compile_language
from tests.grammar.walks import walk

PATTERNS = [("^[a-c]{2,3}$", "abc"), (r"\d+ €", "12 €"), ("(?i)yes|no", "NO"), ('["\\\\]+', '\\"'), ("猫|\n", "猫"), ("^x.*", "x")]
FORMATS = {"date": "2024-02-28", "time": "23:59:59.5+01:00", "date-time": "1999-12-31T00:00:00Z", "ipv4": "192.168.0.255",
           "uuid": "01234567-89ab-cdef-0123-456789abcdef", "email": "ada.l@example.co.uk"}
TEXTS = st.text(st.one_of(st.sampled_from('aé猫😀"\\\n\x01\x7f/'), st.characters(exclude_categories=["Cs"])), max_size=4)
NAMES = st.one_of(st.sampled_from(["a", "b", "név", "猫", 'q"', "a/b~c", "", "x y"]), TEXTS)
VALUES = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(-99, 99), TEXTS, st.sampled_from([0.5, -1.25, 1e-7, 2.0])),
                      lambda part: st.one_of(st.lists(part, max_size=2), st.dictionaries(NAMES, part, max_size=2)), max_leaves=4)
SOUND = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))


def compact(value):
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def plain(value):
    """A decimal as the normal form writes it."""
    written = f"{value:f}"
    written = written.rstrip("0").rstrip(".") if "." in written else written
    return "0" if written == "-0" else written


def compiled(schema):
    return compile_language(schemas.parse(schema))


def valid(schema, instance):
    return jsonschema.Draft202012Validator(schema).is_valid(instance)


@st.composite
def bounded(draw, whole):
    value = Decimal(draw(st.integers(-2000, 2000)))
    if not whole:
        value = Decimal(draw(st.integers(-3 * 10**7, 3 * 10**7))).scaleb(-draw(st.integers(0, 6)))
    schema = {"type": "integer" if whole else "number"}
    for names, sign in ((("minimum", "exclusiveMinimum"), -1), (("maximum", "exclusiveMaximum"), 1)):
        for name in names:
            if draw(st.booleans()):
                by = Decimal(draw(st.integers(name.startswith("e"), 1500))).scaleb(-draw(st.integers(0, 3)))
                schema[name] = float(value + sign * by) if not whole or draw(st.booleans()) else int(value + sign * (by + 1))
    if not valid(schema, float(value)):  # rounding of a bound
        schema = {"type": schema["type"]}
    return schema, plain(value)


@st.composite
def leaves(draw):
    kind = draw(st.sampled_from(["null", "boolean", "const", "enum", "integer", "number", "string", "string", "pattern", "format",
                                 "types",
                                 "any"]))
    if kind == "null":
        return {"type": "null"}, "null"
    if kind == "boolean":
        return {"type": "boolean", "title": "which"}, draw(st.sampled_from(["true", "false"]))
    if kind == "const":
        value = draw(VALUES)
        return {"const": value}, compact(value)
    if kind == "enum":
        values = draw(st.lists(VALUES, min_size=1, max_size=4))
        return {"enum": values}, compact(draw(st.sampled_from(values)))
    if kind in ("integer", "number"):
        return draw(bounded(kind == "integer"))
    if kind == "string":
        value = draw(TEXTS)
        schema = {"type": "string"}
        if draw(st.booleans()):
            schema["minLength"] = len(value) - draw(st.integers(0, len(value)))
        if draw(st.booleans()):
            schema["maxLength"] = draw(st.integers(len(value), 6))
        return schema, compact(value)
    if kind == "pattern":
        pattern, sample = draw(st.sampled_from(PATTERNS))
        return {"type": "string", "pattern": pattern}, compact(sample)
    if kind == "format":
        name = draw(st.sampled_from(sorted(FORMATS)))
        return {"type": "string", "format": name}, compact(FORMATS[name])
    if kind == "types":
        schema, written = draw(bounded(draw(st.booleans())))
        schema |= {"type": ["string", schema["type"], "null"], "maxLength": 3}
        return schema, draw(st.sampled_from([written, "null", '"é"']))
    return draw(st.sampled_from([{}, True])), draw(st.sampled_from(['{"a":[1,"x"]}', "1e5", '""', "[[],{}]"]))


@st.composite
def nested(draw, depth, defs):
    """(schema, the text of an instance); definitions are added to ``defs``."""
    kind = draw(st.sampled_from(["leaf", "leaf", "object", "object", "array", "prefix", "anyOf", "oneOf", "tagged", "map", "ref",
                                 "allOf"]))
    if kind == "leaf" or not depth:
        return draw(leaves())

    def inner():
        return draw(nested(depth - 1, defs))

    if kind == "object":
        names = draw(st.lists(NAMES, min_size=1, max_size=3, unique=True))
        properties, required, members = {}, [], []
        for name in names:
            properties[name], written = inner()
            present = draw(st.booleans())
            if present:
                members.append(f"{compact(name)}:{written}")
                required += [name] * draw(st.booleans())
        schema = {"type": "object", "properties": properties, "required": required}
        if draw(st.booleans()):
            schema["additionalProperties"] = draw(st.sampled_from([False, True, {"type": "null"}]))
        return schema, "{" + ",".join(members) + "}"
    if kind == "map":
        part, written = inner()
        return {"type": "object", "additionalProperties": part}, draw(st.sampled_from(["{}", '{"é":' + written + "}"]))
    if kind == "array":
        part, written = inner()
        count = draw(st.integers(0, 3))
        schema = {"type": "array", "items": part}
        if draw(st.booleans()):
            schema["minItems"] = draw(st.integers(0, count))
        if draw(st.booleans()):
            schema["maxItems"] = draw(st.integers(count, 4))
        return schema, "[" + ",".join([written] * count) + "]"
    if kind == "prefix":
        first = [inner() for _ in range(draw(st.integers(1, 3)))]
        rest, written = inner()
        items = [text for _, text in first][: draw(st.integers(0, 3))]
        items += [written] * draw(st.integers(0, 2)) if len(items) == len(first) else []
        schema = {"type": "array", "prefixItems": [part for part, _ in first], "items": rest}
        if draw(st.booleans()):
            schema["minItems"] = draw(st.integers(0, len(items)))
        if draw(st.booleans()):
            schema["maxItems"] = draw(st.integers(len(items), 5))
        return schema, "[" + ",".join(items) + "]"
    if kind == "anyOf":
        parts = [inner() for _ in range(draw(st.integers(1, 3)))]
        return {"anyOf": [part for part, _ in parts]}, draw(st.sampled_from([text for _, text in parts]))
    if kind == "oneOf":
        parts = [draw(bounded(draw(st.booleans()))), ({"type": "string", "maxLength": 2}, '"猫"'),
                 ({"type": ["null", "boolean"]}, "null")]
        return {"oneOf": [part for part, _ in parts]}, draw(st.sampled_from([text for _, text in parts]))
    if kind == "tagged":
        parts = [({"type": "object", "properties": {"kind": {"const": tag}, "x": part}, "required": ["kind", "x"]},
                  f'{{"kind":{compact(tag)},"x":{text}}}') for tag, (part, text) in ((tag, inner()) for tag in ("a", 1, None))]
        return {"oneOf": [part for part, _ in parts]}, draw(st.sampled_from([text for _, text in parts]))
    part, text = inner()
    if kind == "allOf":
        return {"allOf": [part], "description": "one"}, text
    name = draw(st.sampled_from(["d", "a/b", "t~", "é%"])) + str(len(defs))
    defs[name] = part
    return {"$ref": "#/$defs/" + name.replace("~", "~0").replace("/", "~1").replace("%", "%25")}, text


@st.composite
def cases(draw):
    defs = {}
    schema, text = draw(nested(2, defs))
    return ({"$defs": defs, **schema} if isinstance(schema, dict) and defs else schema), text


def check(schema, text, seed):
    automaton = compiled(schema)
    validator = jsonschema.Draft202012Validator(schema)
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
@settings(SOUND, max_examples=2000)
@given(cases(), st.integers(0, 2**32))
def test_texts_are_valid_and_normal_forms_are_texts_at_length(case, seed):
    check(*case, seed)


class TestNumbers:
    @settings(max_examples=200, deadline=None)
    @given(bounded(False), st.lists(st.tuples(st.integers(-2, 2), st.integers(0, 6)), max_size=6), st.integers(-10**8, 10**8))
    def test_decimals_are_accepted_where_valid(self, case, near, other):
        """Around the bounds, and anywhere."""
        schema, _ = case
        automaton = compiled(schema)
        bounds = [Decimal(str(bound)) for bound in schema.values() if not isinstance(bound, str)]
        for value in [bound + Decimal(by).scaleb(-places) for bound in bounds for by, places in near] + [Decimal(other).scaleb(-6)]:
            if value == round(value, 6):
                assert automaton.accepts(plain(value).encode()) == valid(schema, float(value)), value

    @settings(max_examples=200, deadline=None)
    @given(bounded(True), st.lists(st.integers(-5000, 5000), max_size=10))
    def test_whole_numbers_are_accepted_where_valid(self, case, others):
        schema, _ = case
        automaton = compiled(schema)
        bounds = [int(bound) for bound in schema.values() if not isinstance(bound, str)]
        for value in others + [bound + by for bound in bounds for by in range(-3, 4)]:
            assert automaton.accepts(str(value).encode()) == valid(schema, value), value

    @pytest.mark.parametrize(("schema", "inside", "outside"), [
        ({"type": "integer", "minimum": 10**40 + 1, "maximum": 10**40 + 3}, [10**40 + 1, 10**40 + 3], [10**40, 10**40 + 4, 1]),
        ({"type": "integer", "exclusiveMinimum": 0.5, "maximum": 2.9}, [1, 2], [0, 3, "1.0"]),
        ({"type": "integer", "exclusiveMinimum": -1, "exclusiveMaximum": 1}, [0], [-1, 1, "-0"]),
        ({"type": "number", "exclusiveMinimum": 1e25, "maximum": 2e25}, [15 * 10**24], [10**24]),
        ({"type": "number", "maximum": 1e23}, [99999999999999991611392], [10**23]),
        ({"type": "number", "minimum": 1e-9, "maximum": 2e-9}, ["0.0000000015"[:11], "0.000000002"], ["0", "0.000000003"]),
        ({"type": "number", "minimum": -0.5, "maximum": -0.25}, ["-0.5", "-0.25", "-0.300000"], ["-0.6", "-0.2", "0", "-0", "0.3"]),
        ({"type": "number"}, ["0", "-0", "1.5e-10", "1E+5", "-12.25"], ["01", "1.", ".5", "+1", "1e", "NaN", "--1", "1e100"]),
        ({"type": "integer"}, ["0", "-7", "9" * 15], ["1.0", "1e2", "9" * 16, "00"]),
        ({"type": "integer", "minimum": 0}, ["0", "12"], ["-1"]),
    ])
    def test_numbers(self, schema, inside, outside):
        automaton = compiled(schema)
        assert all(automaton.accepts(str(value).encode()) for value in inside)
        assert not any(automaton.accepts(str(value).encode()) for value in outside)

    @pytest.mark.parametrize("schema", ['{"maximum": 1e400}', '{"exclusiveMinimum": -1e400, "minimum": 1}', {"minimum": 10**400}])
    def test_bounds_beyond_float64(self, schema):
        with pytest.raises(UserError, match="beyond those of float64"):
            schemas.parse(schema)

    def test_bounds_with_too_many_places(self):
        with pytest.raises(UserError, match="30 decimal places"):
            schemas.parse({"minimum": 1e-40})


READ = {"date": date.fromisoformat, "time": lambda text: time.fromisoformat(text.replace("Z", "+00:00")), "uuid": uuid.UUID,
        "date-time": lambda text: datetime.fromisoformat(text.replace("Z", "+00:00")), "ipv4": ipaddress.IPv4Address,
        "email": re.compile(r"[^@\s]+@[^@\s.]+(\.[^@\s.]+)+").fullmatch}


@pytest.mark.parametrize("name", sorted(READ))
def test_formats(name):
    automaton, rng = compiled({"format": name}), np.random.default_rng(0)
    for _ in range(100):
        text = json.loads(walk(automaton, rng, 40).decode())
        text = re.sub(r"\.\d+", lambda match: match[0].ljust(7, "0"), text) if "time" in name else text  # of Python 3.10
        assert READ[name](text)


@pytest.mark.parametrize(("name", "text"), [
    ("date", "2023-02-29"), ("date", "0000-01-01"), ("date", "2024-13-01"), ("date", "2024-04-31"), ("time", "24:00:00Z"),
    ("time", "10:00:00"), ("date-time", "2024-01-01 00:00:00Z"), ("ipv4", "256.1.1.1"), ("ipv4", "01.1.1.1"), ("uuid", "0123"),
    ("email", "a@b"), ("email", "@b.c"), ("date", "٢٠٢٤-01-01"),
])
def test_formats_refuse(name, text):
    assert not compiled({"format": name}).accepts(compact(text).encode())


class TestForm:
    def test_blanks_behind_commas_and_colons_alone(self):
        automaton = compiled({"properties": {"a": {"type": "array", "items": {"type": "null"}}, "b": {"const": {"x": [1, 2]}}}})
        assert automaton.accepts(b'{"a": [null, null], "b": {"x": [1, 2]}}')
        for text in (b'{ "a":[]}', b'{"a" :[]}', b'{"a":  []}', b'{"a":[] }', b' {}', b'{}\n', b'{"b":{"x":[1,2]},"a":[]}',
                     b'{"a":[],}'):
            assert not automaton.accepts(text)

    def test_a_schema_may_be_its_text(self):
        assert compiled('{"const": "é"}').accepts('"é"'.encode())
        assert compiled("true").accepts(b'{"a":[]}')

    def test_any_object(self):
        automaton = compiled({"type": "object"})
        assert automaton.accepts(b'{"a":{"b":1},"c":[true]}')
        assert not any(automaton.accepts(text) for text in (b"[]", b"1", b'{"a":{"b":{"c":{"d":1}}}}'))

    def test_many_properties(self):
        names = [f"p{i}" for i in range(250)]
        automaton = compiled({"properties": {name: {"type": "null"} for name in names}})
        assert automaton.accepts(compact(dict.fromkeys(names[::2])).encode())

    def test_references_are_translated_once(self):
        defs = {"a0": {"type": "null"}} | {f"a{i}": {"prefixItems": [{"$ref": f"#/$defs/a{i - 1}"}] * 2} for i in range(1, 40)}
        schemas.parse({"$defs": defs, "$ref": "#/$defs/a39"})

    @pytest.mark.parametrize(("schema", "inside", "outside"), [
        ({"type": "string", "anyOf": [True, {"maxLength": 2}]}, '"abc"', "1"),
        ({"type": ["integer", "null"], "oneOf": [{"type": "integer"}, {"type": "null"}]}, "null", '"a"'),
        ({"type": "string", "enum": ["a", 1]}, '"a"', "1"),
        ({"enum": ["a", "abc"], "$ref": "#/$defs/s", "$defs": {"s": {"maxLength": 2}}}, '"a"', '"abc"'),
        ({"minLength": 1}, '"a"', "1"), ({"minLength": 2}, '"猫\\n"', '"a"'), ({"maxLength": 2}, '"猫\\""', '"abc"'),
        ({"minLength": 1, "maxLength": 1}, '"😀"', '""'), ({"type": "array", "maxItems": 0}, "[]", "[1]"),
        ({"type": "array", "items": False}, "[]", "[1]"), ({"type": "object", "required": ["a"]}, '{"a":1}', "{}"),
        ({"type": "array", "prefixItems": [{"const": 1}, {"const": 2}], "maxItems": 1}, "[1]", "[1,2]"),
        ({"type": "array", "minItems": 2, "prefixItems": [{"const": 1}], "items": {"const": 3}}, "[1,3]", "[1]"),
        ({"anyOf": [False, {"const": 0}]}, "0", "false"), ({"type": "object", "additionalProperties": False}, "{}", '{"a":1}'),
        ({"type": "null", "uniqueItems": False, "minProperties": 0, "patternProperties": {}}, "null", "1"),
    ])
    def test_schemas(self, schema, inside, outside):
        automaton = compiled(schema)
        assert automaton.accepts(inside.encode())
        assert not automaton.accepts(outside.encode())
        assert valid(schema, json.loads(inside))


class TestRefusals:
    @pytest.mark.parametrize(("keyword", "value"), [
        ("not", {"type": "null"}), ("if", True), ("then", True), ("else", True), ("multipleOf", 2), ("uniqueItems", True),
        ("contains", {}),
        ("minContains", 1), ("maxContains", 2), ("patternProperties", {"a": True}), ("propertyNames", {"maxLength": 3}),
        ("minProperties", 1), ("maxProperties", 3), ("dependentRequired", {"a": ["b"]}), ("dependentSchemas", {"a": {}}),
        ("unevaluatedProperties", False), ("unevaluatedItems", False), ("$dynamicRef", "#a"), ("$dynamicAnchor", "a"),
        ("colour", "red"),
        ("dependencies", {}), ("additionalItems", False), ("contentSchema", {}),
    ])
    def test_keywords_by_name_and_place(self, keyword, value):
        with pytest.raises(UserError, match=re.escape(f"uses {keyword!r} at #/properties/a")):
            schemas.parse({"properties": {"a": {"type": "object", keyword: value}}})

    @pytest.mark.parametrize(("schema", "named"), [
        ("{", "not JSON"), (5, "an object, got int"), ("[1]", "an object, got list"), ({"type": "text"}, "no JSON schema.*#/type"),
        ({"minLength": -1}, "no JSON schema"), ({"exclusiveMinimum": True}, "no JSON schema"), ({"items": [{}]}, "no JSON schema"),
        ({"pattern": "("}, "no JSON schema|no regular"), ({"pattern": "(?=a)"}, "looking ahead"),
        ({"format": "uri"}, "format 'uri'"),
        ({"pattern": "a", "maxLength": 1}, "'pattern' beside other bounds"),
        ({"format": "date", "pattern": "a"}, "beside other bounds"),
        ({"$ref": "#"}, "comes back to '#'"), ({"properties": {"a": {"$ref": "#"}}}, "comes back"),
        ({"$defs": {"a": {"items": {"$ref": "#/$defs/b"}}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "comes back"),
        ({"$ref": "other.json"}, "'other.json'.*within"), ({"$ref": "#here"}, "'#here'.*within"),
        ({"$ref": "#/$defs/x"}, "does not hold"),
        ({"$ref": "#/$comment", "$comment": "x"}, "no JSON schema, where '#/.comment' leads"),
        ({"$ref": "#/default", "default": {"minimum": "x"}}, "no JSON schema, where"),
        ({"$ref": "#/$defs/a", "type": "null", "$defs": {"a": {}}}, "'.ref' beside 'type'"),
        ({"anyOf": [{}], "minLength": 1}, "'anyOf' beside 'minLength'"), ({"allOf": [{}, {}]}, "'allOf' with 2 parts"),
        ({"type": "string", "anyOf": [{"type": "null"}]}, "beside another 'type'"),
        ({"oneOf": [{"type": "string"}, {"maxLength": 3}]}, "'oneOf'"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "'oneOf'"),
        ({"oneOf": [{"const": 1}, {"enum": [2, 1.0]}]}, "'oneOf'"), ({"oneOf": [True, {"type": "null"}]}, "'oneOf'"),
        ({"oneOf": [{"type": "object", "properties": {"k": {"const": k}}} for k in "ab"]}, "'oneOf'"),
        ({"oneOf": [{"$ref": f"#/$defs/{k}"} for k in "ab"], "$defs": {k: {"type": "object", "required": ["x"], "properties": {
            "x": {"$ref": f"#/$defs/{k}"}}} for k in "ab"}}, "'oneOf'"),
        ({"enum": [1, 2], "type": "string"}, "No value that is listed"), ({"enum": []}, "No value that is listed"),
        ({"const": float("inf")}, "JSON cannot write"),
    ])
    def test_what_cannot_be(self, schema, named):
        with pytest.raises(UserError, match=named):
            schemas.parse(schema)

    def test_too_deep(self):
        schema = {"type": "null"}
        for _ in range(900):
            schema = {"items": schema}
        with pytest.raises(UserError, match="nested too deeply"):
            schemas.parse(schema)

    @pytest.mark.parametrize("schema", [
        False, {"type": "string", "minLength": 3, "maxLength": 2}, {"type": "array", "minItems": 3, "maxItems": 2},
        {"const": "\ud800"},
        {"type": "object", "required": ["a"], "additionalProperties": False}, {"type": "integer", "minimum": 0.1, "maximum": 0.9},
        {"type": "number", "exclusiveMinimum": 1, "maximum": 1}, {"type": "array", "items": False, "minItems": 1},
    ])
    def test_what_no_value_fits(self, schema):
        with pytest.raises(UserError, match="no text at all"):
            compiled(schema)
