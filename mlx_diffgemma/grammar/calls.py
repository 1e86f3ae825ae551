"""JSON schemas as languages of Gemma's own syntax for the arguments of calls.

An example is ``{city:<|"|>Rome<|"|>,days:3}``.  Texts are between ``<|"|>`` tokens without escapes,
keys have no quotes and are sorted, and there is no whitespace.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from mlx_diffgemma.errors import UserError
from mlx_diffgemma.grammar import json_text, regex
from mlx_diffgemma.grammar.decimals import number
from mlx_diffgemma.grammar.json_text import object_members
from mlx_diffgemma.grammar.language import (
    ANY,
    TOKEN,
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
)
from mlx_diffgemma.grammar.schema import FORMATS, FREE_DEPTH, Translator
from mlx_diffgemma.grammar.schema import parse as parse_schema
from mlx_diffgemma.text.calls import BARE

QUOTE = Chars(((TOKEN, TOKEN),))  # the token <|"|>
COMMA = text(",")
COLON = text(":")
KEY = Repeat(
    chars([(ord("0"), ord("9")), (ord("A"), ord("Z")), (ord("a"), ord("z")), (ord("_"), ord("_"))]),
    1,
    None,
)


def parse(parameters: Any) -> Language:
    """The arguments that the JSON schema ``parameters`` accepts, in Gemma's syntax.

    Raises:
        UserError: As ``schema.parse``.
    """
    parse_schema(parameters)  # refuses what cannot be guaranteed
    return _Translator(parameters).value(parameters, "", ())


class _Translator(Translator):
    """Translates as for JSON, except for the way that texts, keys and signs are written."""

    def value(self, schema: Any, where: str, inside: tuple[str, ...]) -> Language:
        if schema is True or schema == {}:
            return _free(FREE_DEPTH)
        return super().value(schema, where, inside)

    def _listed(self, schema: Mapping[str, Any], where: str) -> Language:
        values = [schema["const"]] if "const" in schema else schema["enum"]
        rest = {name: value for name, value in schema.items() if name != "const"}
        fitting = [value for value in values if self._admits(rest | {"enum": [value]}, where)]
        return choice([_written(value) for value in fitting])

    def _admits(self, schema: Mapping[str, Any], where: str) -> bool:
        try:
            super()._listed(schema, where)
        except UserError:
            return False
        return True

    def _string(self, schema: Mapping[str, Any], where: str) -> Language:
        super()._string(schema, where)  # called for its refusals
        if "pattern" in schema:
            inner = regex.parse(schema["pattern"], search=True)
        elif "format" in schema:
            inner = regex.parse(FORMATS[schema["format"]])
        else:
            low = int(schema.get("minLength", 0))
            high = schema.get("maxLength")
            if high is not None and high < low:
                return Choice(())
            inner = Repeat(ANY, low, None if high is None else int(high))
        return concat([QUOTE, inner, QUOTE])

    def _array(self, schema: Mapping[str, Any], where: str, inside: tuple[str, ...]) -> Language:
        return _tight(super()._array(schema, where, inside), {})

    def _object(self, schema: Mapping[str, Any], where: str, inside: tuple[str, ...]) -> Language:
        properties = dict(schema.get("properties", {}))
        required = set(schema.get("required", ()))
        others = schema.get("additionalProperties", True)
        properties |= dict.fromkeys(sorted(required - properties.keys()), others)
        if not properties:
            if others is False:
                return text("{}")
            return _mapping(self.value(others, f"{where}/additionalProperties", inside))
        members = []
        for name in sorted(properties, key=_sort_key):
            value = self.value(properties[name], f"{where}/properties/{name}", inside)
            members.append((concat([_key(name), COLON, value]), name in required))
        return concat([text("{"), object_members(members, COMMA)])


def _sort_key(name: str) -> tuple[str, str]:
    return name.lower(), name


def _tight(language: Language, tightened: dict[int, Language]) -> Language:
    """``language`` of JSON without the blank that may follow a comma.

    ``tightened`` holds the results so far, by the id of their source.
    """
    if language is json_text.COMMA:
        return COMMA
    if isinstance(language, Chars):
        return language
    if id(language) not in tightened:
        if isinstance(language, Repeat):
            part = _tight(language.part, tightened)
            tightened[id(language)] = Repeat(part, language.low, language.high)
        else:
            parts = tuple(_tight(part, tightened) for part in language.parts)
            tightened[id(language)] = type(language)(parts)
    return tightened[id(language)]


def _key(name: str) -> Language:
    return text(name) if BARE.fullmatch(name) else concat([QUOTE, text(name), QUOTE])


def _mapping(value: Language) -> Language:
    member = concat([KEY, COLON, value])
    members = concat([member, Repeat(concat([COMMA, member]), 0, None)])
    return concat([text("{"), optional(members), text("}")])


def _free(depth: int) -> Language:
    """The language of any value, nested at most ``depth`` deep."""
    plain = [
        text("null"),
        text("true"),
        text("false"),
        number({}, False, ""),
        concat([QUOTE, Repeat(ANY, 0, None), QUOTE]),
    ]
    if not depth:
        return choice(plain)
    inner = _free(depth - 1)
    members = concat([inner, Repeat(concat([COMMA, inner]), 0, None)])
    return choice([*plain, concat([text("["), optional(members), text("]")]), _mapping(inner)])


def _written(value: Any) -> Language:
    """The language with exactly this value."""
    if isinstance(value, str):
        return concat([QUOTE, text(value), QUOTE])
    if isinstance(value, dict):
        names = sorted(value, key=_sort_key)
        members = [concat([_key(name), COLON, _written(value[name])]) for name in names]
        return _between("{", members, "}")
    if isinstance(value, list):
        return _between("[", [_written(item) for item in value], "]")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"The JSON schema lists {value}, which cannot be written.")
    return text(json.dumps(value))


def _between(begin: str, members: Sequence[Language], end: str) -> Language:
    parts: list[Language] = []
    for member in members:
        parts += [COMMA, member]
    return Concat((text(begin), *parts[1:], text(end)))
