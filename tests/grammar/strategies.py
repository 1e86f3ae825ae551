"""Random regular expressions and JSON schemas."""

import ipaddress
import json
import re
import uuid
from datetime import date, datetime, time
from decimal import Decimal

import jsonschema
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

ALPHABET = "aAbkKK9٣_ \n-]^.éÉſ猫😀\u2028\ufeff\x1c"
# Python's own form of what it takes otherwise than ECMA-262, so that its re is an oracle.
SPACES = "\\t-\\r \\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000\\ufeff"
IN_PYTHON = {
    r"\d": "[0-9]",
    r"\D": "[^0-9]",
    r"\w": "[A-Za-z0-9_]",
    r"\W": "[^A-Za-z0-9_]",
    r"\s": f"[{SPACES}]",
    r"\S": f"[^{SPACES}]",
    ".": "[^\\n\\r\\u2028\\u2029]",
    r"\u{1F600}": r"\U0001F600",
    "$": r"\Z",
}
INNER = {kind: IN_PYTHON[kind][1:-1] for kind in (r"\d", r"\w", r"\s")}  # within a set
LITERALS = st.sampled_from(
    [re.escape(c) if c in "-]^." else c for c in ALPHABET]
    + [r"\x41", r"\u732b", r"\u{1F600}", r"\n", r"\t"]
)
KINDS = st.sampled_from([r"\d", r"\D", r"\w", r"\W", r"\s", r"\S"])
RANGES = ["a-f", "A-Z", "0-9", "é-ſ", "一-龥", "\U0001f300-\U0001f6ff", " -~"]
MEMBERS = st.lists(st.one_of(LITERALS, st.sampled_from([*INNER, *RANGES])), min_size=1, max_size=3)
CLASSES = st.builds(
    lambda negated, members: f"[{negated}{''.join(members)}]", st.sampled_from(["", "^"]), MEMBERS
)
ATOMS = st.one_of(LITERALS, LITERALS, KINDS, CLASSES, st.just("."))
REPEATS = st.sampled_from(
    ["*", "+", "?", "{2}", "{0,2}", "{1,3}", "{2,}", "{0}", "*?", "+?", "??", "{1,2}?"]
)
GROUPS = st.sampled_from(["(", "(?:", "(?:"])


def grown(part):
    group = st.builds(lambda begin, inner: begin + inner + ")", GROUPS, part)
    return st.one_of(
        st.lists(part, max_size=3).map("".join),
        group,
        st.builds("{}{}".format, group, REPEATS),
        st.builds("({}|{})".format, part, part),
    )


EXPRESSIONS = st.builds(
    "{}{}{}".format,
    st.sampled_from(["", "", "^"]),
    st.recursive(st.one_of(ATOMS, st.builds("{}{}".format, ATOMS, REPEATS)), grown, max_leaves=6),
    st.sampled_from(["", "", "$"]),
)


def in_python(pattern):
    """The same expression as Python's ``re`` writes it."""
    found, within, place = [], False, 0
    while place < len(pattern):
        size = (
            len(r"\u{1F600}")
            if pattern.startswith(r"\u{", place)
            else 2
            if pattern[place] == "\\"
            else 1
        )
        part = pattern[place : place + size]
        within = (within or part == "[") and part != "]"
        found.append(
            (INNER if within else IN_PYTHON).get(
                part, IN_PYTHON.get(part, part) if part.startswith("\\u") else part
            )
        )
        place += size
    return "".join(found)


WORDS = st.sampled_from(["cat", "Straße", "猫", "été", "😀", "не", "a-b", "Anna"])
PIECES = st.one_of(
    st.builds(
        "{}{}".format,
        st.one_of(CLASSES, KINDS),
        st.sampled_from(["{3}", "{2,7}", "{2,}", "+", "{0,5}"]),
    ),
    st.builds(
        "{}{}".format,
        st.sampled_from(["[a-z]", "[A-Z0-9]", "[ -~]", "[à-ÿ]", "."]),
        st.sampled_from(["{12}", "{8,20}", "{5,}", "+", "{0,25}", "{30,45}"]),
    ),
    st.builds(
        "(?:{}){}".format,
        st.lists(WORDS, min_size=2, max_size=4, unique=True).map("|".join),
        st.sampled_from(["", "", "+", "{2,4}", "?"]),
    ),
    st.builds("(?:, {})*".format, WORDS),
    st.sampled_from([r" \- ", r"\(\d+\)", r"\$\d+\.\d\d", r"\n", ": "]),
)
PHRASES = st.lists(PIECES, min_size=1, max_size=4).map(
    "".join
)  # texts of a few words up to some canvases

PATTERNS = [
    ("^[a-c]{2,3}$", "abc"),
    (r"\d+ €", "about 12 €"),
    ("(?:[Yy]es|[Nn]o)", "No"),
    ('["\\\\]+', '\\"'),
    ("猫|\n", "猫"),
    ("^x.*", "x"),
]
FORMATS = {
    "date": "2024-02-28",
    "time": "23:59:59.5+01:00",
    "date-time": "1999-12-31T00:00:00Z",
    "ipv4": "192.168.0.255",
    "uuid": "01234567-89ab-cdef-0123-456789abcdef",
    "email": "ada.l@example.co.uk",
}
TEXTS = st.text(
    st.one_of(st.sampled_from('aé猫😀"\\\n\x01\x7f/'), st.characters(exclude_categories=["Cs"])),
    max_size=4,
)
NAMES = st.one_of(st.sampled_from(["a", "b", "név", "猫", 'q"', "a/b~c", "", "x y"]), TEXTS)
VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-99, 99),
        TEXTS,
        st.sampled_from([0.5, -1.25, 1e-7, 2.0]),
    ),
    lambda part: st.one_of(st.lists(part, max_size=2), st.dictionaries(NAMES, part, max_size=2)),
    max_leaves=4,
)


def iso(text):
    """As every Python reads it: before 3.11 they want no Z, and six digits behind the point."""
    return re.sub(r"\.\d+", lambda match: match[0].ljust(7, "0"), text.replace("Z", "+00:00"))


READ = {
    "date": date.fromisoformat,
    "time": lambda text: time.fromisoformat(iso(text)),
    "uuid": uuid.UUID,
    "date-time": lambda text: datetime.fromisoformat(iso(text)),
    "ipv4": ipaddress.IPv4Address,
    "email": re.compile(r"[^@\s]+@[^@\s.]+(\.[^@\s.]+)+").fullmatch,
}


def compact(value):
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def plain(value):
    """A decimal as the normal form writes it."""
    written = f"{value:f}"
    written = written.rstrip("0").rstrip(".") if "." in written else written
    return "0" if written == "-0" else written


def matched(validator, pattern, instance, schema):
    """The keyword as ECMA-262 has it, which jsonschema reads as Python's."""
    if isinstance(instance, str) and not re.search(in_python(pattern), instance):
        yield jsonschema.ValidationError(f"{instance!r} does not match {pattern!r}")


Validator = jsonschema.validators.extend(jsonschema.Draft202012Validator, {"pattern": matched})


def valid(schema, instance):
    return Validator(schema).is_valid(instance)


@st.composite
def bounded(draw, whole):
    value = Decimal(draw(st.integers(-2000, 2000)))
    if not whole:
        value = Decimal(draw(st.integers(-3 * 10**7, 3 * 10**7))).scaleb(-draw(st.integers(0, 6)))
    schema = {"type": "integer" if whole else "number"}
    for names, sign in (
        (("minimum", "exclusiveMinimum"), -1),
        (("maximum", "exclusiveMaximum"), 1),
    ):
        for name in names:
            if draw(st.booleans()):
                by = Decimal(draw(st.integers(name.startswith("e"), 1500))).scaleb(
                    -draw(st.integers(0, 3))
                )
                schema[name] = (
                    float(value + sign * by)
                    if not whole or draw(st.booleans())
                    else int(value + sign * (by + 1))
                )
    if not valid(schema, float(value)):  # rounding of a bound
        schema = {"type": schema["type"]}
    return schema, plain(value)


@st.composite
def leaves(draw):
    kind = draw(
        st.sampled_from(
            [
                "null",
                "boolean",
                "const",
                "enum",
                "integer",
                "number",
                "string",
                "string",
                "pattern",
                "format",
                "types",
                "any",
            ]
        )
    )
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
    return draw(st.sampled_from([{}, True])), draw(
        st.sampled_from(['{"a":[1,"x"]}', "1e5", '""', "[[],{}]"])
    )


@st.composite
def nested(draw, depth, defs):
    """(schema, the text of an instance); definitions are added to ``defs``."""
    kind = draw(
        st.sampled_from(
            [
                "leaf",
                "leaf",
                "object",
                "object",
                "array",
                "prefix",
                "anyOf",
                "oneOf",
                "tagged",
                "map",
                "ref",
                "allOf",
            ]
        )
    )
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
        return {"type": "object", "additionalProperties": part}, draw(
            st.sampled_from(["{}", '{"é":' + written + "}"])
        )
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
        return {"anyOf": [part for part, _ in parts]}, draw(
            st.sampled_from([text for _, text in parts])
        )
    if kind == "oneOf":
        parts = [
            draw(bounded(draw(st.booleans()))),
            ({"type": "string", "maxLength": 2}, '"猫"'),
            ({"type": ["null", "boolean"]}, "null"),
        ]
        return {"oneOf": [part for part, _ in parts]}, draw(
            st.sampled_from([text for _, text in parts])
        )
    if kind == "tagged":
        parts = [
            (
                {
                    "type": "object",
                    "properties": {"kind": {"const": tag}, "x": part},
                    "required": ["kind", "x"],
                },
                f'{{"kind":{compact(tag)},"x":{text}}}',
            )
            for tag, (part, text) in ((tag, inner()) for tag in ("a", 1, None))
        ]
        return {"oneOf": [part for part, _ in parts]}, draw(
            st.sampled_from([text for _, text in parts])
        )
    part, text = inner()
    if kind == "allOf":
        return {"allOf": [part], "description": "one"}, text
    name = draw(st.sampled_from(["d", "a/b", "t~", "é%"])) + str(len(defs))
    defs[name] = part
    return {
        "$ref": "#/$defs/" + name.replace("~", "~0").replace("/", "~1").replace("%", "%25")
    }, text


@st.composite
def cases(draw):
    defs = {}
    schema, text = draw(nested(2, defs))
    return ({"$defs": defs, **schema} if isinstance(schema, dict) and defs else schema), text


@st.composite
def fields(draw, defs):
    """What a field of a record may hold."""
    kind = draw(
        st.sampled_from(
            [
                "nested",
                "nested",
                "text",
                "text",
                "number",
                "pattern",
                "phrase",
                "words",
                "optional",
                "list",
            ]
        )
    )
    if kind == "nested":
        return draw(nested(2, defs))[0]
    if kind == "text":
        low = draw(st.integers(0, 12))
        return {"type": "string", "minLength": low, "maxLength": low + draw(st.integers(0, 25))}
    if kind == "number":
        return draw(bounded(draw(st.booleans())))[0]
    if kind in ("pattern", "phrase"):
        return {
            "type": "string",
            "pattern": f"^(?:{draw(PHRASES)})$" if kind == "phrase" else draw(EXPRESSIONS),
        }
    if kind == "words":
        return {"enum": draw(st.lists(WORDS, min_size=1, max_size=4, unique=True))}
    part = draw(fields(defs))
    if kind == "optional":
        return {"anyOf": [part, {"type": "null"}]}
    return {
        "type": "array",
        "items": part,
        "minItems": draw(st.integers(0, 2)),
        "maxItems": draw(st.integers(2, 4)),
    }


@st.composite
def records(draw):
    """Schemas of objects with several fields, some of which may be left out."""
    defs = {}
    names = draw(
        st.lists(
            st.sampled_from(["name", "age", "city", "tags", "été", "猫", "a b", 'q"']),
            min_size=2,
            max_size=5,
            unique=True,
        )
    )
    schema = {
        "type": "object",
        "properties": {name: draw(fields(defs)) for name in names},
        "required": [name for name in names if draw(st.booleans())],
    }
    if draw(st.booleans()):
        schema["additionalProperties"] = False
    return {"$defs": defs, **schema} if defs else schema


def drawn(strategy, count, number):
    """The first ``count`` different examples of a strategy, the same ones each time; ``number``
    chooses which.
    """
    found = {}

    @seed(number)
    @settings(
        max_examples=2 * count,
        database=None,
        phases=[Phase.generate],
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(example):
        if len(found) < count:
            found.setdefault(repr(example), example)

    collect()
    return list(found.values())
