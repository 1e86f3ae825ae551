"""Checks values against an untrusted JSON schema, within bounds of time and memory.

The rules are those of the package ``jsonschema``, with three bounds.  Patterns are matched by
automata, in time linear in the text.  References must lead to places within the schema, and nothing
is ever fetched.  The number of steps is limited, because references to references may double the
work at each level.

    >>> Checker({"type": "integer"}).fits(3)
    True
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jsonschema
import numpy as np
import referencing
import referencing.exceptions
import referencing.jsonschema
from jsonschema.exceptions import ValidationError
from jsonschema.validators import extend
from jsonschema_specifications import REGISTRY as SPECIFICATIONS

from mlx_diffgemma.errors import UserError
from mlx_diffgemma.grammar import budget, elsewhere, regex
from mlx_diffgemma.grammar.automaton import compile_language

Keyword = Callable[[Any, Any, Any, Any], Iterator[ValidationError] | None]
MAX_STEPS = 20_000  # keywords that are checked for one value; this takes some tenths of a second
MAX_PATTERN_BYTES = 64 * 2**20  # of all automata of one schema's patterns
PER_STEP = 64  # entries of a keyword, or characters of a text, that count as one more step
IN_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
IN_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
SINGLE = (
    "items",
    "additionalProperties",
    "not",
    "if",
    "then",
    "else",
    "contains",
    "propertyNames",
    "unevaluatedItems",
    "unevaluatedProperties",
    "contentSchema",
)
REFERENCES = ("$ref", "$dynamicRef")


class TooMuchWorkError(UserError):
    """A value takes more steps to check than are allowed."""


class Matcher:
    """Whether a pattern of ECMA-262 matches somewhere in a text; each byte is read once."""

    def __init__(self, pattern: str) -> None:
        automaton = compile_language(regex.parse(pattern, search=True))
        delta, letter_of = np.unique(automaton.delta, axis=1, return_inverse=True)
        self._rows = delta
        self._letters = bytes(letter_of.reshape(-1).astype(np.uint8))
        self._accepting = automaton.accepting

    @property
    def nbytes(self) -> int:
        return self._rows.nbytes + len(self._accepting)

    def matches(self, text: str) -> bool:
        state = 0
        for letter in text.encode("utf-8", "surrogatepass").translate(self._letters):
            state = int(self._rows[state, letter])
            if state < 0:
                return False
        return bool(self._accepting[state])


def check_schema(schema: Any, which: str = "") -> None:
    """Check that ``schema`` is a JSON schema of draft 2020-12.

    Raises:
        UserError: It is not; ``which`` follows the word "schema" in the message.
    """
    for error in _meta_schema().iter_errors(schema):
        where = "#/" + "/".join(str(step) for step in error.absolute_path)
        raise UserError(f"This is no JSON schema{which}: {_short(error.message)} at {where}.")


def _short(message: str) -> str:
    return message if len(message) <= 200 else f"{message[:120]} … {message[-60:]}"


@functools.cache
def _meta_schema() -> Any:
    functions = {
        name: _counted(function, budget.check)
        for name, function in jsonschema.Draft202012Validator.VALIDATORS.items()
    }
    return extend(jsonschema.Draft202012Validator, functions)(
        jsonschema.Draft202012Validator.META_SCHEMA, registry=SPECIFICATIONS
    )


def _counted(function: Keyword, step: Callable[[], None]) -> Keyword:
    def counted(
        validator: Any, value: Any, instance: Any, schema: Any
    ) -> Iterator[ValidationError] | None:
        step()
        return function(validator, value, instance, schema)

    return counted


class Checker:
    """Checks values against a schema of draft 2020-12.

    Args:
        schema: The schema.
        max_steps: The most steps for each value; None for any number.

    Raises:
        UserError: It is not a schema, a reference leads out of it or to nothing, or a pattern is
            not a regular expression.
    """

    def __init__(self, schema: Any, max_steps: int | None = MAX_STEPS) -> None:
        elsewhere.run(check_schema, schema)
        self.schema = schema
        self._max_steps = max_steps
        self._steps = 0
        self._matchers: dict[str, Matcher] = {}
        parts = list(_parts(schema))
        self._check_references(parts)
        self._compile_patterns(parts)
        functions = {
            name: _counted(function, self._step)
            for name, function in jsonschema.Draft202012Validator.VALIDATORS.items()
        }
        replaced = {
            "pattern": self._pattern,
            "patternProperties": self._pattern_properties,
            "enum": self._enum,
            "additionalProperties": self._additional_properties,
            "uniqueItems": self._unique_items,
        }
        self._validator = extend(jsonschema.Draft202012Validator, {**functions, **replaced})(
            schema, registry=referencing.Registry()
        )

    def fits(self, value: Any, part: Any = None) -> bool:
        """Whether the schema, or this ``part`` of it, admits ``value``.

        Raises:
            TooMuchWorkError: It takes too many steps.
            UserError: A reference leads nowhere, which shows only now.
        """
        self._steps = 0
        validator = self._validator if part is None else self._validator.evolve(schema=part)
        try:
            return bool(validator.is_valid(value))
        except referencing.exceptions.Unresolvable as error:
            raise UserError(
                f"The JSON schema refers to {error.ref!r:.100}, which it does not hold."
            ) from None
        except RecursionError:
            raise TooMuchWorkError(
                "The JSON schema, or a value for it, is nested too deeply to be checked; write it "
                "with fewer levels, and without references that come back to themselves."
            ) from None

    def _step(self, size: int = 0) -> None:
        budget.check()
        self._steps += 1 + size // PER_STEP
        if self._max_steps is not None and self._steps > self._max_steps:
            raise TooMuchWorkError(
                f"A value takes more than {self._max_steps:,} steps to check against the JSON schema; write it "
                "with fewer references and alternatives."
            )

    def _check_references(self, parts: Sequence[Mapping[str, Any]]) -> None:
        references = [
            part[name] for part in parts for name in REFERENCES if isinstance(part.get(name), str)
        ]
        if not references:
            return
        for reference in references:
            if not reference.startswith("#"):
                raise UserError(
                    f"The JSON schema refers to {reference!r:.100}; only places within it "
                    "(#/…) are followed, and nothing is fetched."
                )
        if any("$id" in part for part in parts if part is not self.schema):
            raise UserError(
                "The JSON schema has '$id' below its top beside references, which would be relative "
                "to it; leave it out."
            )
        resource = referencing.jsonschema.DRAFT202012.create_resource(self.schema)
        resolver = referencing.Registry().with_resource("", resource).resolver()
        for reference in dict.fromkeys(references):
            budget.check()
            try:
                resolver.lookup(reference)
            except (referencing.exceptions.Unresolvable, ValueError, TypeError, AttributeError):
                raise UserError(
                    f"The JSON schema refers to {reference!r:.100}, which it does not hold; references look like "
                    "#/$defs/name."
                ) from None

    def _compile_patterns(self, parts: Sequence[Mapping[str, Any]]) -> None:
        taken = 0
        for part in parts:
            keys = part.get("patternProperties", {})
            if keys and "unevaluatedProperties" in part:
                raise UserError(
                    "The JSON schema has 'unevaluatedProperties' beside 'patternProperties', which are not checked "
                    "together; use 'additionalProperties'."
                )
            for pattern in [part["pattern"], *keys] if "pattern" in part else keys:
                if pattern not in self._matchers:
                    self._matchers[pattern] = elsewhere.run(Matcher, pattern)
                    taken += self._matchers[pattern].nbytes
                if taken > MAX_PATTERN_BYTES:
                    raise UserError(
                        "The patterns of the JSON schema need more than "
                        f"{MAX_PATTERN_BYTES // 2**20} MiB; lower the bounds of their repeats."
                    )

    def _matches(self, pattern: str, text: str) -> bool:
        self._step(len(text))
        if pattern not in self._matchers:
            # The reference leads to a place that is not a schema by itself.
            raise UserError(
                f"The JSON schema has the pattern {pattern!r:.100} where no schema stands; "
                "move it to $defs."
            )
        return self._matchers[pattern].matches(text)

    # The keywords, under the names that jsonschema gives them

    def _pattern(
        self, validator: Any, pattern: str, instance: Any, _: Any
    ) -> Iterator[ValidationError]:
        if validator.is_type(instance, "string") and not self._matches(pattern, instance):
            yield ValidationError("does not match the pattern")

    def _pattern_properties(
        self, validator: Any, properties: Mapping[str, Any], instance: Any, _: Any
    ) -> Iterator[ValidationError]:
        if not validator.is_type(instance, "object"):
            return
        for pattern, part in properties.items():
            for name, value in instance.items():
                if self._matches(pattern, name):
                    yield from validator.descend(value, part, path=name, schema_path=pattern)

    def _additional_properties(
        self, validator: Any, part: Any, instance: Any, schema: Mapping[str, Any]
    ) -> Iterator[ValidationError]:
        if not validator.is_type(instance, "object"):
            return
        properties = schema.get("properties", {})
        patterns = schema.get("patternProperties", {})
        for name, value in instance.items():
            self._step()
            if name in properties:
                continue
            if not any(self._matches(pattern, name) for pattern in patterns):
                yield from validator.descend(value, part, path=name)

    def _enum(
        self, _: Any, values: Sequence[Any], instance: Any, __: Any
    ) -> Iterator[ValidationError]:
        self._step(len(values))
        asked = canonical(instance)
        if not any(canonical(value) == asked for value in values):
            yield ValidationError("is none of the values")

    def _unique_items(
        self, validator: Any, unique: bool, instance: Any, _: Any
    ) -> Iterator[ValidationError]:
        if unique and validator.is_type(instance, "array"):
            self._step(len(instance))
            if len({canonical(value) for value in instance}) < len(instance):
                yield ValidationError("has an item twice")


def canonical(value: Any) -> Any:
    """A hashable form of a value.

    Forms are equal for values that are equal in JSON Schema: 1 and 1.0, but not 1 and true.
    """
    if isinstance(value, bool):
        return "boolean", value
    if isinstance(value, dict):
        return "object", frozenset((key, canonical(inner)) for key, inner in value.items())
    if isinstance(value, list | tuple):
        return "array", tuple(canonical(inner) for inner in value)
    return value


def _parts(schema: Any) -> Iterator[Mapping[str, Any]]:
    """``schema`` and all schemas within it."""
    waiting = [schema]
    while waiting:
        budget.check()
        part = waiting.pop()
        if not isinstance(part, dict):
            continue
        yield part
        for name in IN_LISTS:
            if isinstance(part.get(name), list):
                waiting += part[name]
        for name in IN_MAPS:
            if isinstance(part.get(name), dict):
                waiting += part[name].values()
        waiting += [part[name] for name in SINGLE if name in part]
