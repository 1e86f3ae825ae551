"""How a field of ``GenerationOptions`` describes itself to the front ends.

The description is the metadata of the dataclass field.  The command line makes its options from it
(``cli/signature.py``), and a server its request body (``request_fields``), so that a name, a range
and a help text are written once.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

KEY = "option"  # the key in the field's metadata


@dataclass(frozen=True)
class OptionField:
    """The description of one option.

    Attributes:
        help: what it does, in sentences that stand alone.  ``{name}`` names another option: each
            front end writes it its own way.
        group: the heading under which a list of options shows it.
        name: its name on the command line, if that is not the field's.
        letter: its short form on the command line.
        low, high, above: its range; ``above`` is a lower bound that is not itself allowed.
        text: whether the command line takes a text, which it parses.
        json_type: its type in a request body, if that is not the field's.
        policy: what it sets in the policy of a canvas.
        rule: whether ``policy`` is a field of ``rules.RulesPolicy``.
    """

    help: str
    group: str
    name: str | None = None
    letter: str | None = None
    low: float | None = None
    high: float | None = None
    above: float | None = None
    text: bool = False
    json_type: Any = None
    policy: str | None = None
    rule: bool = False

    def help_for(self, named: Mapping[str, str]) -> str:
        """The help text.  ``named`` gives the written form of other options."""
        return self.help.format_map(named)

    def holds(self, value: float) -> bool:
        """Whether ``value`` is in range."""
        return (
            (self.low is None or value >= self.low)
            and (self.above is None or value > self.above)
            and (self.high is None or value <= self.high)
        )


def option(default: Any, help: str, group: str, **description: Any) -> Any:
    """Make a dataclass field with an ``OptionField``.

    Args:
        default: The default of the field.
        help, group: As in ``OptionField``.
        description: Further attributes of the ``OptionField``.
    """
    return field(default=default, metadata={KEY: OptionField(help, group, **description)})


def described(options: type) -> dict[str, OptionField]:
    """The descriptions of a dataclass's fields, by name."""
    return {f.name: f.metadata[KEY] for f in fields(options) if KEY in f.metadata}


def request_fields(
    options: type, replaced: Mapping[Any, Any] | None = None
) -> dict[str, tuple[Any, dict[str, Any]]]:
    """The options as fields of a request body.  Null or absence leaves the default.

        fields = {name: (kind, Field(None, **limits)) for name, (kind, limits) in
                  request_fields(GenerationOptions).items()}
        Sampling = pydantic.create_model("Sampling", **fields)

    Args:
        options: a dataclass whose fields have descriptions.
        replaced: types to write in place of others, such as ``{int: StrictInt}``.

    Returns:
        By name: the type, and the keywords of pydantic's ``Field`` for range and description.
    """
    hints = typing.get_type_hints(options)
    bodies = dict[str, tuple[Any, dict[str, Any]]]()
    for name, own in described(options).items():
        kind = own.json_type or _not_none(hints[name])
        limits: dict[str, Any] = {"description": own.help_for(_SameNames())}
        for keyword, bound in (("ge", own.low), ("le", own.high), ("gt", own.above)):
            if bound is not None:
                limits[keyword] = bound
        bodies[name] = (_replaced(kind, replaced or {}) | None, limits)
    return bodies


class _SameNames(dict[str, str]):
    """A mapping that writes every name as it is."""

    def __missing__(self, name: str) -> str:
        return name


def _not_none(kind: Any) -> Any:
    """``kind`` without None."""
    others = [part for part in typing.get_args(kind) if part is not type(None)]
    return others[0] if _is_union(kind) and len(others) == 1 else kind


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _replaced(kind: Any, others: Mapping[Any, Any]) -> Any:
    if not _is_union(kind):
        return others.get(kind, kind)
    first, *rest = (others.get(part, part) for part in typing.get_args(kind))
    for part in rest:
        first = first | part
    return first
