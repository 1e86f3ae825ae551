"""JSON schemas as languages: every text of the language is JSON that the schema accepts.

Not every value that a schema accepts is in the language: properties come in the order of ``properties`` and no others are
written, whitespace is at most one blank behind ``,`` and ``:``, numbers have a limited number of digits, and a value that the
schema says nothing of is nested at most ``FREE_DEPTH`` deep.  A keyword that cannot be guaranteed is refused by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote

from mlx_diffgemma.errors import UserError
from mlx_diffgemma.grammar import budget, regex
from mlx_diffgemma.grammar.checker import Checker, canonical, check_schema
from mlx_diffgemma.grammar.decimals import number
from mlx_diffgemma.grammar.language import (
    ANY,
    Chars,
    Choice,
    Concat,
    Language,
    Repeat,
    chars,
    choice,
    concat,
    optional,
    text,
    without,
)

FREE_DEPTH = 2  # of arrays and objects in a value that may be anything
TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
ANNOTATIONS = {"$schema", "$id", "$comment", "$defs", "definitions", "$anchor", "title", "description", "default", "examples",
               "deprecated", "readOnly", "writeOnly", "contentMediaType", "contentEncoding", "format"}
OF_TYPE: dict[str, tuple[str, ...]] = {
    "string": ("minLength", "maxLength", "pattern"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "object": ("properties", "required", "additionalProperties"),
}
GENERAL = {"type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref"}
KNOWN = GENERAL | ANNOTATIONS | {keyword for keywords in OF_TYPE.values() for keyword in keywords}
# Words that change nothing at these values.
NEUTRAL: dict[str, Any] = {"uniqueItems": False, "minProperties": 0, "unevaluatedProperties": True, "unevaluatedItems": True,
                           "dependentRequired": {}, "dependentSchemas": {}, "patternProperties": {}}
DATE = (r"(?:[1-9]\d{3}-"
        r"(?:(?:0[13578]|1[02])-(?:0[1-9]|[12]\d|3[01])|(?:0[469]|11)-(?:0[1-9]|[12]\d|30)|02-(?:0[1-9]|1\d|2[0-8])))")
TIME = r"(?:(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d{1,6})?(?:Z|[+-](?:[01]\d|2[0-3]):[0-5]\d))"
FORMATS = {
    "date": DATE, "time": TIME, "date-time": DATE + "T" + TIME,
    "uuid": r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    "ipv4": r"(?:(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])\.){3}(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])",
    "email": r"[a-z0-9]+(?:[._-][a-z0-9]+)*@[a-z0-9]+(?:-[a-z0-9]+)*(?:\.[a-z0-9]+(?:-[a-z0-9]+)*)+",
}
SHORT = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
ESCAPED = chars([(0, 0x1F), (ord('"'), ord('"')), (ord("\\"), ord("\\"))])
BLANK = optional(text(" "))
COMMA, COLON, QUOTE = concat([text(","), BLANK]), concat([text(":"), BLANK]), text('"')


def parse(schema: Any) -> Language:
    """The texts of JSON that ``schema``, of draft 2020-12, accepts.

    Errors: UserError for what is no schema, for keywords that cannot be guaranteed and for references that come back to themselves.
    """
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except json.JSONDecodeError as error:
            raise UserError(f"The JSON schema is not JSON ({error}).") from None
    if not isinstance(schema, dict | bool):
        raise UserError(f"A JSON schema is an object, got {type(schema).__name__}.")
    try:
        check_schema(schema)
        return _Translator(schema).value(schema, "", ())
    except RecursionError:
        raise UserError("The JSON schema is nested too deeply; write it with fewer levels.") from None


class _Translator:
    def __init__(self, root: Any) -> None:
        self.root = root
        self._known: dict[str, Language] = {}  # what references lead to
        self._checker: Checker | None = None

    def value(self, schema: Any, where: str, inside: tuple[str, ...]) -> Language:
        """``inside``: the references being followed."""
        budget.check()
        if schema is True or schema == {}:
            return _free(FREE_DEPTH)
        if schema is False:
            return Choice(())
        self._check(schema, where)
        if "const" in schema or "enum" in schema:
            return self._listed(schema, where)
        for keyword in ("$ref", "allOf", "anyOf", "oneOf"):
            if keyword in schema:
                return self._combined(keyword, schema, where, inside)
        types = schema.get("type", self._implied(schema))
        types = list(types) if isinstance(types, list) else [types]
        if "number" in types:
            types = [kind for kind in types if kind != "integer"]
        return choice([self._typed(kind, schema, where, inside) for kind in types])

    def _check(self, schema: Mapping[str, Any], where: str) -> None:
        for keyword, value in schema.items():
            if keyword not in KNOWN and not (keyword in NEUTRAL and _same(NEUTRAL[keyword], value)):
                raise UserError(f"The JSON schema uses {keyword!r} at #{where}, which cannot be guaranteed while generating; leave "
                                "it out and check it afterwards.")

    def _implied(self, schema: Mapping[str, Any]) -> list[str]:
        """The types of a schema that names none: those its other keywords speak of."""
        kinds = [kind for kind, keywords in OF_TYPE.items() if any(keyword in schema for keyword in keywords)]
        return kinds or (["string"] if "format" in schema else list(TYPES))

    def _listed(self, schema: Mapping[str, Any], where: str) -> Language:
        values = [schema["const"]] if "const" in schema else schema["enum"]
        rest = {key: value for key, value in schema.items() if key not in ANNOTATIONS and key not in ("const", "enum")}
        if "const" in schema and "enum" in schema:
            rest["enum"] = schema["enum"]
        fitting = [value for value in values if self._fits(value, rest)] if rest else values
        if not fitting:
            raise UserError(f"No value that is listed at #{where} fits the rest of the schema there; the schema admits nothing.")
        return choice([_json(value) for value in fitting])

    def _fits(self, value: Any, part: Mapping[str, Any]) -> bool:
        if self._checker is None:
            self._checker = Checker(self.root, max_steps=None)
        return self._checker.fits(value, part)

    def _combined(self, keyword: str, schema: Mapping[str, Any], where: str, inside: tuple[str, ...]) -> Language:
        beside = [key for key in schema if key not in ANNOTATIONS and key != keyword]
        if beside and not (beside == ["type"] and keyword in ("anyOf", "oneOf")):
            raise UserError(f"The JSON schema has {keyword!r} beside {beside[0]!r} at #{where}, whose intersection cannot be "
                            "guaranteed; write the combined schema out.")
        if keyword == "$ref":
            return self._referred(schema["$ref"], where, inside)
        parts = [{} if part is True else part for part in schema[keyword]]
        if beside:
            parts = [{"type": schema["type"], **part} if isinstance(part, dict) else part for part in parts]
        if beside and any(isinstance(part, dict) and not _narrows(part.get("type"), schema["type"]) for part in parts):
            raise UserError(f"The JSON schema has {keyword!r} beside another 'type' at #{where}; write the combined schema out.")
        if keyword == "allOf":
            if len(parts) != 1:
                raise UserError(f"The JSON schema uses 'allOf' with {len(parts)} parts at #{where}, whose intersection cannot be "
                                "guaranteed; write the combined schema out.")
            return self.value(parts[0], f"{where}/allOf/0", inside)
        if keyword == "oneOf":
            self._check_apart(parts, where)
        return choice([self.value(part, f"{where}/{keyword}/{place}", inside) for place, part in enumerate(parts)])

    def _check_apart(self, parts: Sequence[Any], where: str) -> None:
        """Errors: UserError unless no value can fit two of ``parts``: they name other types, other constants, or objects that
        a required property with other constants tells apart."""
        for place, one in enumerate(parts):
            for other in parts[place + 1 :]:
                budget.check()
                if not self._apart(self._resolved(one), self._resolved(other)):
                    raise UserError(f"The JSON schema uses 'oneOf' at #{where} with parts that one value could fit at once; use "
                                    "'anyOf', or give them different types or a required constant each.")

    def _apart(self, one: Any, other: Any, depth: int = 8) -> bool:
        if one is False or other is False:
            return True
        if not (isinstance(one, dict) and isinstance(other, dict)):
            return False
        left, right = _constants(one), _constants(other)
        if left is not None and right is not None:
            return {canonical(value) for value in left}.isdisjoint(canonical(value) for value in right)
        if not _kinds(one) & _kinds(other):
            return True
        if depth and one.get("type") == other.get("type") == "object":
            shared = set(one.get("required", ())) & set(other.get("required", ()))
            return any(self._apart(self._resolved(one["properties"][name]), self._resolved(other["properties"][name]), depth - 1)
                       for name in shared if name in one.get("properties", {}) and name in other.get("properties", {}))
        return False

    def _resolved(self, schema: Any) -> Any:
        seen = 0
        while isinstance(schema, dict) and "$ref" in schema and seen < 32:
            schema, seen = self._target(schema["$ref"], ""), seen + 1
        return schema

    def _target(self, reference: str, where: str) -> Any:
        found: Any = self.root
        if reference[:2] not in ("#", "#/"):
            raise UserError(f"The JSON schema refers to {reference!r} at #{where}; only paths within it (#/…) are followed.")
        for step in reference.split("/")[1:]:
            key = unquote(step).replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and key.isdigit() and int(key) < len(found):
                found = found[int(key)]
            elif isinstance(found, dict) and key in found:
                found = found[key]
            else:
                raise UserError(f"The JSON schema refers to {reference!r} at #{where}, which it does not hold.")
        return found

    def _referred(self, reference: str, where: str, inside: tuple[str, ...]) -> Language:
        if reference in inside:
            raise UserError(f"The JSON schema comes back to {reference!r} at #{where}; a constraint cannot nest without end, so "
                            "write the levels out.")
        if reference not in self._known:
            target = self._target(reference, where)
            check_schema(target, f", where {reference!r} leads")
            self._known[reference] = self.value(target, reference.removeprefix("#"), (*inside, reference))
        return self._known[reference]

    def _typed(self, kind: str, schema: Mapping[str, Any], where: str, inside: tuple[str, ...]) -> Language:
        if kind == "null":
            return text("null")
        if kind == "boolean":
            return choice([text("true"), text("false")])
        if kind in ("integer", "number"):
            return number(schema, kind == "integer", where)
        if kind == "string":
            return self._string(schema, where)
        return self._array(schema, where, inside) if kind == "array" else self._object(schema, where, inside)

    def _string(self, schema: Mapping[str, Any], where: str) -> Language:
        low, high = int(schema.get("minLength", 0)), schema.get("maxLength")
        given = [key for key in ("pattern", "format") if key in schema]
        if len(given) == 2 or (given and ("minLength" in schema or "maxLength" in schema)):
            raise UserError(f"The JSON schema has {given[0]!r} beside other bounds of a string at #{where}; say it all "
                            "in one pattern.")
        if "pattern" in schema:
            return concat([QUOTE, _quoted(regex.parse(schema["pattern"], search=True)), QUOTE])
        if "format" in schema:
            if schema["format"] not in FORMATS:
                raise UserError(f"The JSON schema uses the format {schema['format']!r} at #{where}; known are "
                                f"{', '.join(FORMATS)}.")
            return concat([QUOTE, regex.parse(FORMATS[schema["format"]]), QUOTE])
        if high is not None and high < low:
            return Choice(())
        return concat([QUOTE, Repeat(_quoted(ANY), low, None if high is None else int(high)), QUOTE])

    def _array(self, schema: Mapping[str, Any], where: str, inside: tuple[str, ...]) -> Language:
        first = [self.value(part, f"{where}/prefixItems/{place}", inside)
                 for place, part in enumerate(schema.get("prefixItems", ()))]
        rest = self.value(schema.get("items", True), f"{where}/items", inside)
        high = schema.get("maxItems")
        return _list(first, rest, int(schema.get("minItems", 0)), None if high is None else int(high))

    def _object(self, schema: Mapping[str, Any], where: str, inside: tuple[str, ...]) -> Language:
        properties, required = schema.get("properties", {}), set(schema.get("required", ()))
        others = schema.get("additionalProperties", True)
        if missing := sorted(required - properties.keys()):
            properties = properties | dict.fromkeys(missing, others)
        if not properties:
            return text("{}") if others is False else _mapping(self.value(others, f"{where}/additionalProperties", inside))
        members = []
        for name, part in properties.items():
            value = self.value(part, f"{where}/properties/{name}", inside)
            members.append((concat([_json(name), COLON, value]), name in required))
        # From the last to the first: what follows when something stands before it, and when nothing does.
        after: Language = text("}")
        begin: Language = after
        for member, needed in reversed(members):
            chosen_after, chosen_begin = concat([COMMA, member, after]), concat([member, after])
            after, begin = ((chosen_after, chosen_begin) if needed else
                            (Choice((chosen_after, after)), Choice((chosen_begin, begin))))
        return concat([text("{"), begin])


def _kinds(schema: Mapping[str, Any]) -> set[str]:
    """The types a value may have, whole numbers being numbers."""
    kinds = schema.get("type", TYPES)
    return {"number" if kind == "integer" else kind for kind in ([kinds] if isinstance(kinds, str) else kinds)}


def _constants(schema: Mapping[str, Any]) -> list[Any] | None:
    return [schema["const"]] if "const" in schema else schema.get("enum")


def _same(one: Any, other: Any) -> bool:
    return bool(canonical(one) == canonical(other))


def _narrows(inner: Any, outer: Any) -> bool:
    inner, outer = ([kind] if isinstance(kind, str) else kind for kind in (inner, outer))
    return inner is not None and all(kind in outer or (kind == "integer" and "number" in outer) for kind in inner)


def _json(value: Any) -> Language:
    """Exactly this value, compact or with a blank behind each comma and colon."""
    budget.check()
    if isinstance(value, dict):
        members = [concat([_json(key), COLON, _json(inner)]) for key, inner in value.items()]
    elif isinstance(value, list):
        members = [_json(inner) for inner in value]
    else:
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"The JSON schema lists {value}, which JSON cannot write.")
        return text(json.dumps(value, ensure_ascii=False))
    begin, end = ("{", "}") if isinstance(value, dict) else ("[", "]")
    parts = [part for member in members for part in (COMMA, member)][1:]
    return concat([text(begin), *parts, text(end)])


def _quoted(language: Language) -> Language:
    """As it is written between the quotes of a JSON string."""
    budget.check()
    if isinstance(language, Chars):
        plain = without(language, ESCAPED)
        parts: list[Language] = [plain] if plain.ranges else []
        for first, last in language.ranges:
            for low, high in ESCAPED.ranges:
                parts += [text(SHORT.get(chr(code), f"\\u{code:04x}")) for code in range(max(first, low), min(last, high) + 1)]
        return choice(parts)
    if isinstance(language, Repeat):
        return Repeat(_quoted(language.part), language.low, language.high)
    parts = [_quoted(part) for part in language.parts]
    return Concat(tuple(parts)) if isinstance(language, Concat) else Choice(tuple(parts))


def _list(first: Sequence[Language], rest: Language, low: int, high: int | None) -> Language:
    """An array of the values ``first``, as many as there are of them, and then of ``rest``."""
    if high is not None and high < low:
        return Choice(())
    ahead = first[: high if high is not None else None]
    more_low, more_high = max(0, low - len(ahead)), None if high is None else high - len(ahead)
    tail: Language = Repeat(concat([COMMA, rest]), more_low, more_high)
    if not ahead:
        if more_high == 0:
            return text("[]")
        filled = concat([rest, Repeat(concat([COMMA, rest]), max(0, low - 1), None if high is None else high - 1)])
        return concat([text("["), filled if low else optional(filled), text("]")])
    for place in reversed(range(len(ahead))):
        own = concat([COMMA, ahead[place], tail]) if place else concat([ahead[place], tail])
        tail = own if place < low else optional(own)
    return concat([text("["), tail, text("]")])


def _mapping(value: Language) -> Language:
    member = concat([QUOTE, Repeat(_quoted(ANY), 0, None), QUOTE, COLON, value])
    return concat([text("{"), optional(concat([member, Repeat(concat([COMMA, member]), 0, None)])), text("}")])


def _free(depth: int) -> Language:
    """Any value, nested at most ``depth`` deep."""
    plain = [text("null"), text("true"), text("false"), number({}, False, ""),
             concat([QUOTE, Repeat(_quoted(ANY), 0, None), QUOTE])]
    return choice(plain + ([_list([], _free(depth - 1), 0, None), _mapping(_free(depth - 1))] if depth else []))
