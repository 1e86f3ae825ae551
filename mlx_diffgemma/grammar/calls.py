"""JSON schemas as languages of Gemma's own syntax for the arguments of calls:
``{city:<|"|>Rome<|"|>,days:3}``.

Texts stand between ``<|"|>`` tokens without escapes, keys are bare and sorted, and nothing stands
between the signs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from mlx_diffgemma.calls import BARE
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.grammar import regex, schema
from mlx_diffgemma.grammar.decimals import number
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

QUOTE = Chars(((TOKEN, TOKEN),))  # the token <|"|>
COMMA, COLON = text(","), text(":")
KEY = Repeat(
    chars([(ord("0"), ord("9")), (ord("A"), ord("Z")), (ord("a"), ord("z")), (ord("_"), ord("_"))]),
    1,
    None,
)


def parse(parameters: Any) -> Language:
    """The arguments that the JSON schema ``parameters`` accepts, in Gemma's syntax.  Errors:
    UserError as ``schema.parse``.
    """
    schema.parse(parameters)  # what is no schema, or cannot be guaranteed, is refused as there
    return _Translator(parameters).value(parameters, "", ())


class _Translator(schema._Translator):
    """As that of JSON, but for how texts, keys and signs are written."""

    def value(self, schema_: Any, where: str, inside: tuple[str, ...]) -> Language:
        if schema_ is True or schema_ == {}:
            return _free(schema.FREE_DEPTH)
        return super().value(schema_, where, inside)

    def _listed(self, schema_: Mapping[str, Any], where: str) -> Language:
        values = [schema_["const"]] if "const" in schema_ else schema_["enum"]
        rest = {name: value for name, value in schema_.items() if name != "const"}
        fitting = [value for value in values if self._admits(rest | {"enum": [value]}, where)]
        return choice([_written(value) for value in fitting])

    def _admits(self, schema_: Mapping[str, Any], where: str) -> bool:
        try:
            super()._listed(schema_, where)
        except UserError:
            return False
        return True

    def _string(self, schema_: Mapping[str, Any], where: str) -> Language:
        super()._string(schema_, where)  # for what it refuses
        if "pattern" in schema_:
            inner = regex.parse(schema_["pattern"], search=True)
        elif "format" in schema_:
            inner = regex.parse(schema.FORMATS[schema_["format"]])
        else:
            low = int(schema_.get("minLength", 0))
            high = schema_.get("maxLength")
            if high is not None and high < low:
                return Choice(())
            inner = Repeat(ANY, low, None if high is None else int(high))
        return concat([QUOTE, inner, QUOTE])

    def _array(self, schema_: Mapping[str, Any], where: str, inside: tuple[str, ...]) -> Language:
        return _tight(super()._array(schema_, where, inside), {})

    def _object(self, schema_: Mapping[str, Any], where: str, inside: tuple[str, ...]) -> Language:
        properties = dict(schema_.get("properties", {}))
        required = set(schema_.get("required", ()))
        others = schema_.get("additionalProperties", True)
        properties |= dict.fromkeys(sorted(required - properties.keys()), others)
        if not properties:
            if others is False:
                return text("{}")
            return _mapping(self.value(others, f"{where}/additionalProperties", inside))
        members = [
            (
                concat(
                    [
                        _key(name),
                        COLON,
                        self.value(properties[name], f"{where}/properties/{name}", inside),
                    ]
                ),
                name in required,
            )
            for name in sorted(properties, key=lambda name: (name.lower(), name))
        ]
        return concat([text("{"), _members(members)])


def _members(members: Sequence[tuple[Language, bool]]) -> Language:
    """Members of a map, of which some may be missing, and its end."""
    after: Language = text("}")  # what follows a member
    begin: Language = after  # what follows the beginning of the map
    for member, needed in reversed(members):
        chosen_after = concat([COMMA, member, after])
        chosen_begin = concat([member, after])
        begin = chosen_begin if needed else Choice((chosen_begin, begin))
        after = chosen_after if needed else Choice((chosen_after, after))
    return begin


def _tight(language: Language, known: dict[int, Language]) -> Language:
    """``language`` of JSON without the blank that may stand after a comma."""
    if language is schema.COMMA:
        return COMMA
    if isinstance(language, Chars):
        return language
    if id(language) not in known:
        if isinstance(language, Repeat):
            known[id(language)] = Repeat(_tight(language.part, known), language.low, language.high)
        else:
            known[id(language)] = type(language)(
                tuple(_tight(part, known) for part in language.parts)
            )
    return known[id(language)]


def _key(name: str) -> Language:
    return text(name) if BARE.fullmatch(name) else concat([QUOTE, text(name), QUOTE])


def _mapping(value: Language) -> Language:
    member = concat([KEY, COLON, value])
    return concat(
        [text("{"), optional(concat([member, Repeat(concat([COMMA, member]), 0, None)])), text("}")]
    )


def _free(depth: int) -> Language:
    """Any value, nested at most ``depth`` deep."""
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
    """Exactly this value."""
    if isinstance(value, str):
        return concat([QUOTE, text(value), QUOTE])
    if isinstance(value, dict):
        items = sorted(value.items(), key=lambda item: (item[0].lower(), item[0]))
        return _between(
            "{", [concat([_key(name), COLON, _written(inner)]) for name, inner in items], "}"
        )
    if isinstance(value, list):
        return _between("[", [_written(inner) for inner in value], "]")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"The JSON schema lists {value}, which cannot be written.")
    return text(json.dumps(value))


def _between(begin: str, members: Sequence[Language], end: str) -> Language:
    parts = [part for member in members for part in (COMMA, member)][1:]
    return Concat((text(begin), *parts, text(end)))
