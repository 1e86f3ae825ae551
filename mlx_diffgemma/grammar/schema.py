"""JSON schemas as languages: every text of the language is JSON that the schema accepts.

Not every value that a schema accepts is in the language.  Properties come in the order of
``properties`` and no others are written.  Whitespace is at most one blank after ``,`` and ``:``.
Numbers have a limited number of digits.  A value that the schema does not restrict is nested at
most ``FREE_DEPTH`` deep.  A keyword that cannot be guaranteed is refused by name.

    >>> parse({"type": "object", "properties": {"age": {"type": "integer"}}})
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import unquote

from mlx_diffgemma.bounded_json import parse_json
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.grammar import budget, regex
from mlx_diffgemma.grammar.checker import Checker, canonical, check_schema
from mlx_diffgemma.grammar.decimals import number
from mlx_diffgemma.grammar.json_text import (
    COLON,
    COMMA,
    QUOTE,
    any_value,
    json_array,
    json_mapping,
    json_string,
    json_value,
    object_members,
    quoted,
)
from mlx_diffgemma.grammar.language import Choice, Language, choice, concat, text

FREE_DEPTH = 2  # the depth of arrays and objects in a value that may be anything
TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
ANNOTATIONS = {
    "$schema",
    "$id",
    "$comment",
    "$defs",
    "definitions",
    "$anchor",
    "title",
    "description",
    "default",
    "examples",
    "deprecated",
    "readOnly",
    "writeOnly",
    "contentMediaType",
    "contentEncoding",
    "format",
}
OF_TYPE: dict[str, tuple[str, ...]] = {
    "string": ("minLength", "maxLength", "pattern"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "object": ("properties", "required", "additionalProperties"),
}
GENERAL = {"type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref"}
KNOWN = GENERAL | ANNOTATIONS | {keyword for keywords in OF_TYPE.values() for keyword in keywords}
# Keywords that have no effect with these values.
NEUTRAL: dict[str, Any] = {
    "uniqueItems": False,
    "minProperties": 0,
    "unevaluatedProperties": True,
    "unevaluatedItems": True,
    "dependentRequired": {},
    "dependentSchemas": {},
    "patternProperties": {},
}
DATE = (
    r"(?:[1-9]\d{3}-"
    r"(?:(?:0[13578]|1[02])-(?:0[1-9]|[12]\d|3[01])"
    r"|(?:0[469]|11)-(?:0[1-9]|[12]\d|30)|02-(?:0[1-9]|1\d|2[0-8])))"
)
TIME = r"(?:(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d{1,6})?(?:Z|[+-](?:[01]\d|2[0-3]):[0-5]\d))"
BYTE = r"(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
DOMAIN_PART = r"[a-z0-9]+(?:-[a-z0-9]+)*"
FORMATS = {
    "date": DATE,
    "time": TIME,
    "date-time": DATE + "T" + TIME,
    "uuid": r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    "ipv4": rf"(?:{BYTE}\.){{3}}{BYTE}",
    "email": rf"[a-z0-9]+(?:[._-][a-z0-9]+)*@{DOMAIN_PART}(?:\.{DOMAIN_PART})+",
}


def parse(schema: Any) -> Language:
    """The JSON texts that ``schema``, of draft 2020-12, accepts.

    Raises:
        UserError: It is not a schema, has a keyword that cannot be guaranteed, or a reference that
            leads back to itself.
    """
    if isinstance(schema, str):
        schema = parse_json(schema, "The JSON schema")
    if not isinstance(schema, dict | bool):
        raise UserError(f"A JSON schema is an object, got {type(schema).__name__}.")
    try:
        check_schema(schema)
        return Translator(schema).value(schema, "", ())
    except RecursionError:
        raise UserError(
            "The JSON schema is nested too deeply; write it with fewer levels."
        ) from None


class Translator:
    """Translates the parts of one schema.

    In its methods, ``where`` is the path of a part, for messages, and ``inside`` holds the
    references that are being followed.
    """

    def __init__(self, root: Any) -> None:
        self.root = root
        self._translated: dict[str, Language] = {}  # the translated parts, by reference
        self._checker: Checker | None = None

    def value(self, schema: Any, where: str, inside: tuple[str, ...]) -> Language:
        """The texts that the part ``schema`` accepts.

        Args:
            schema: The part.
            where: Its path, for messages.
            inside: The references that are being followed.
        """
        budget.check()
        if schema is True or schema == {}:
            return any_value(FREE_DEPTH)
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
                raise UserError(
                    f"The JSON schema uses {keyword!r} at #{where}, which cannot be guaranteed "
                    "while generating; leave it out and check it afterwards."
                )

    def _implied(self, schema: Mapping[str, Any]) -> list[str]:
        """The types of a schema that names none: the types that its other keywords apply to."""
        kinds = [
            kind for kind, keywords in OF_TYPE.items() if not schema.keys().isdisjoint(keywords)
        ]
        if kinds:
            return kinds
        return ["string"] if "format" in schema else list(TYPES)

    def _listed(self, schema: Mapping[str, Any], where: str) -> Language:
        values = [schema["const"]] if "const" in schema else schema["enum"]
        ignored = ANNOTATIONS | {"const", "enum"}
        rest = {key: value for key, value in schema.items() if key not in ignored}
        if "const" in schema and "enum" in schema:
            rest["enum"] = schema["enum"]
        fitting = [value for value in values if self._fits(value, rest)] if rest else values
        if not fitting:
            raise UserError(
                f"No value that is listed at #{where} fits the rest of the schema there; "
                "the schema admits nothing."
            )
        return choice([json_value(value) for value in fitting])

    def _fits(self, value: Any, part: Mapping[str, Any]) -> bool:
        if self._checker is None:
            self._checker = Checker(self.root, max_steps=None)
        return self._checker.fits(value, part)

    def _combined(
        self, keyword: str, schema: Mapping[str, Any], where: str, inside: tuple[str, ...]
    ) -> Language:
        beside = [key for key in schema if key not in ANNOTATIONS and key != keyword]
        if beside and not (beside == ["type"] and keyword in ("anyOf", "oneOf")):
            raise UserError(
                f"The JSON schema has {keyword!r} beside {beside[0]!r} at #{where}, whose "
                "intersection cannot be guaranteed; write the combined schema out."
            )
        if keyword == "$ref":
            return self._referred(schema["$ref"], where, inside)
        parts = [{} if part is True else part for part in schema[keyword]]
        if beside:
            parts = _typed_parts(parts, schema["type"], keyword, where)
        if keyword == "allOf":
            if len(parts) != 1:
                raise UserError(
                    f"The JSON schema uses 'allOf' with {len(parts)} parts at #{where}, whose "
                    "intersection cannot be guaranteed; write the combined schema out."
                )
            return self.value(parts[0], f"{where}/allOf/0", inside)
        if keyword == "oneOf":
            self._check_apart(parts, where)
        choices = []
        for index, part in enumerate(parts):
            choices.append(self.value(part, f"{where}/{keyword}/{index}", inside))
        return choice(choices)

    def _check_apart(self, parts: Sequence[Any], where: str) -> None:
        """Check that no value fits two of the ``parts``.

        Parts are known to be apart if they name different types or constants, or if they are
        objects with different constants for a required property.

        Raises:
            UserError: A value might fit two parts.
        """
        for index, part in enumerate(parts):
            for other in parts[index + 1 :]:
                budget.check()
                if not self._apart(self._resolved(part), self._resolved(other)):
                    raise UserError(
                        f"The JSON schema uses 'oneOf' at #{where} with parts that one value could "
                        "fit at once; use 'anyOf', or give them different types or a required "
                        "constant each."
                    )

    def _apart(self, left: Any, right: Any, depth: int = 8) -> bool:
        """Whether no value fits both schemas.

        Args:
            left: One schema.
            right: The other.
            depth: How many levels of properties are compared.
        """
        if left is False or right is False:
            return True
        if not (isinstance(left, dict) and isinstance(right, dict)):
            return False
        left_constants = _constants(left)
        right_constants = _constants(right)
        if left_constants is not None and right_constants is not None:
            left_values = {canonical(value) for value in left_constants}
            return left_values.isdisjoint(canonical(value) for value in right_constants)
        if not _kinds(left) & _kinds(right):
            return True
        if not depth or not left.get("type") == right.get("type") == "object":
            return False
        left_properties = left.get("properties", {})
        right_properties = right.get("properties", {})
        required = set(left.get("required", ())) & set(right.get("required", ()))
        for name in required & left_properties.keys() & right_properties.keys():
            left_part = self._resolved(left_properties[name])
            right_part = self._resolved(right_properties[name])
            if self._apart(left_part, right_part, depth - 1):
                return True
        return False

    def _resolved(self, schema: Any) -> Any:
        """The schema that a chain of at most 32 references leads to."""
        for _ in range(32):
            if not (isinstance(schema, dict) and "$ref" in schema):
                break
            schema = self._target(schema["$ref"], "")
        return schema

    def _target(self, reference: str, where: str) -> Any:
        """The part of the schema that a reference leads to.

        Raises:
            UserError: There is no such part.
        """
        if reference[:2] not in ("#", "#/"):
            raise UserError(
                f"The JSON schema refers to {reference!r} at #{where}; "
                "only paths within it (#/…) are followed."
            )
        part: Any = self.root
        for step in reference.split("/")[1:]:
            key = unquote(step).replace("~1", "/").replace("~0", "~")
            if isinstance(part, list) and key.isdigit() and int(key) < len(part):
                part = part[int(key)]
            elif isinstance(part, dict) and key in part:
                part = part[key]
            else:
                raise UserError(
                    f"The JSON schema refers to {reference!r} at #{where}, which it does not hold."
                )
        return part

    def _referred(self, reference: str, where: str, inside: tuple[str, ...]) -> Language:
        if reference in inside:
            raise UserError(
                f"The JSON schema comes back to {reference!r} at #{where}; a constraint cannot nest "
                "without end, so write the levels out."
            )
        if reference not in self._translated:
            target = self._target(reference, where)
            check_schema(target, f", where {reference!r} leads")
            path = reference.removeprefix("#")
            self._translated[reference] = self.value(target, path, (*inside, reference))
        return self._translated[reference]

    def _typed(
        self, kind: str, schema: Mapping[str, Any], where: str, inside: tuple[str, ...]
    ) -> Language:
        if kind == "null":
            return text("null")
        if kind == "boolean":
            return choice([text("true"), text("false")])
        if kind in ("integer", "number"):
            return number(schema, kind == "integer", where)
        if kind == "string":
            return self._string(schema, where)
        if kind == "array":
            return self._array(schema, where, inside)
        return self._object(schema, where, inside)

    def _string(self, schema: Mapping[str, Any], where: str) -> Language:
        low = int(schema.get("minLength", 0))
        high = schema.get("maxLength")
        rules = [key for key in ("pattern", "format") if key in schema]
        if len(rules) == 2 or (rules and ("minLength" in schema or "maxLength" in schema)):
            raise UserError(
                f"The JSON schema has {rules[0]!r} beside other bounds of a string at #{where}; "
                "say it all in one pattern."
            )
        if "pattern" in schema:
            return concat([QUOTE, quoted(regex.parse(schema["pattern"], search=True)), QUOTE])
        if "format" in schema:
            if schema["format"] not in FORMATS:
                raise UserError(
                    f"The JSON schema uses the format {schema['format']!r} at #{where}; known are "
                    f"{', '.join(FORMATS)}."
                )
            return concat([QUOTE, regex.parse(FORMATS[schema["format"]]), QUOTE])
        if high is not None and high < low:
            return Choice(())
        return json_string(low, None if high is None else int(high))

    def _array(self, schema: Mapping[str, Any], where: str, inside: tuple[str, ...]) -> Language:
        first = []
        for index, part in enumerate(schema.get("prefixItems", ())):
            first.append(self.value(part, f"{where}/prefixItems/{index}", inside))
        rest = self.value(schema.get("items", True), f"{where}/items", inside)
        low = int(schema.get("minItems", 0))
        high = schema.get("maxItems")
        return json_array(first, rest, low, None if high is None else int(high))

    def _object(self, schema: Mapping[str, Any], where: str, inside: tuple[str, ...]) -> Language:
        properties = schema.get("properties", {})
        required = set(schema.get("required", ()))
        others = schema.get("additionalProperties", True)
        missing = sorted(required - properties.keys())
        if missing:
            properties = properties | dict.fromkeys(missing, others)
        if not properties:
            if others is False:
                return text("{}")
            return json_mapping(self.value(others, f"{where}/additionalProperties", inside))
        members = []
        for name, part in properties.items():
            value = self.value(part, f"{where}/properties/{name}", inside)
            members.append((concat([json_value(name), COLON, value]), name in required))
        return concat([text("{"), object_members(members, COMMA)])


def _typed_parts(
    parts: Sequence[Any], kinds: str | Sequence[str], keyword: str, where: str
) -> list[Any]:
    """The parts of a keyword, each limited to the types beside the keyword.

    Args:
        parts: The parts.
        kinds: The types beside the keyword.
        keyword: The keyword.
        where: Its path, for messages.

    Raises:
        UserError: A part admits other types.
    """
    typed = [{"type": kinds, **part} if isinstance(part, dict) else part for part in parts]
    for part in typed:
        if isinstance(part, dict) and not _narrows(part.get("type"), kinds):
            raise UserError(
                f"The JSON schema has {keyword!r} beside another 'type' at #{where}; "
                "write the combined schema out."
            )
    return typed


def _kinds(schema: Mapping[str, Any]) -> set[str]:
    """The types a value may have; integers count as numbers."""
    kinds = _as_list(schema.get("type", TYPES))
    return {"number" if kind == "integer" else kind for kind in kinds}


def _as_list(kinds: str | Sequence[str]) -> Sequence[str]:
    return [kinds] if isinstance(kinds, str) else kinds


def _constants(schema: Mapping[str, Any]) -> list[Any] | None:
    return [schema["const"]] if "const" in schema else schema.get("enum")


def _same(left: Any, right: Any) -> bool:
    return bool(canonical(left) == canonical(right))


def _narrows(inner: Any, outer: Any) -> bool:
    """Whether all of the types ``inner`` are among ``outer``."""
    if inner is None:
        return False
    admitted = set(_as_list(outer))
    if "number" in admitted:
        admitted.add("integer")
    return admitted.issuperset(_as_list(inner))
