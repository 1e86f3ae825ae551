"""A command's options from parts that several commands share.

A command is a function whose parameters are single options and parts.  A part is a dataclass of
options (``part_option``), or the options of a generation (``Generation``).  In the signature that
typer reads, ``command`` replaces the parameter of each part by the options of the part.  When the
command is called, it makes the part from their values.

    @command
    def shout(model: ModelOptions, options: Annotated[dict[str, Any], Generation("seed")]) -> None:
        ...
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from mlx_diffgemma.cli.values import constraints_of, json_object
from mlx_diffgemma.generation.options import CONSTRAINTS, DESCRIBED, GenerationOptions

KEY = "typer"  # the key in the metadata of a part's field
# Options that a trace records in fields of their own, and options that only affect the display.
NOT_SETTINGS = ("prompt", "question", "model", "seed", "show", "trace", "as_json", "verbose")
DEFAULTS = GenerationOptions()


class Settings(dict[str, Any]):
    """The options whose values differ from their defaults, as JSON can hold them.

    A command that has a parameter of this type receives them.
    """


def part_option(default: Any, *names: str, **typer_options: Any) -> Any:
    """A field of a part: an option with its default and the arguments of ``typer.Option``."""
    metadata = {KEY: typer.Option(*names, **typer_options)}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Generation:
    """The annotation of a parameter that takes options of a generation, by name.

    Attributes:
        names: the fields of ``GenerationOptions`` that the command offers.
        help: texts in place of the fields' own.
        unset: whether no option has a default, so that only options that were given are passed.
        check: whether wrong values are refused here, before anything is loaded.
    """

    names: tuple[str, ...]
    help: Mapping[str, str] = field(default_factory=dict)
    unset: bool = False
    check: bool = True


def generation(
    *names: str, groups: Iterable[str] = (), without: Iterable[str] = (), **choices: Any
) -> Generation:
    """The options ``names``, and those of the ``groups``, except those in ``without``."""
    grouped = [
        name
        for name, own in DESCRIBED.items()
        if own.group in groups and name not in (*without, *names, "prefill_step_size")
    ]
    return Generation((*names, *grouped), **choices)


class _Option(NamedTuple):
    """An option of a part: the name of its parameter, and that of the part's field."""

    parameter: inspect.Parameter
    field: str


class _Part(NamedTuple):
    """A part of a command: its options, and the function that makes the part from their values."""

    options: list[_Option]
    make: Callable[[dict[str, Any]], Any]


def command(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with the signature that the command line shows."""
    hints = typing.get_type_hints(function, include_extras=True)
    parts = dict[str, _Part]()
    shown = list[inspect.Parameter]()
    settings: str | None = None
    for name, parameter in inspect.signature(function).parameters.items():
        if hints[name] is Settings:
            settings = name
        elif part := _part(hints[name]):
            parts[name] = part
            shown += [option.parameter for option in part.options]
        else:
            shown.append(
                parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
            )

    @functools.wraps(function)
    def called(**values: Any) -> Any:
        arguments = dict(values)
        if settings:
            arguments[settings] = _settings(shown, values)
        for name, part in parts.items():
            arguments[name] = part.make(
                {option.field: arguments.pop(option.parameter.name) for option in part.options}
            )
        return function(**arguments)

    called.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
    return called


def _settings(shown: Iterable[inspect.Parameter], values: Mapping[str, Any]) -> Settings:
    changed = Settings()
    for parameter in shown:
        value = values[parameter.name]
        if parameter.name not in NOT_SETTINGS and value != parameter.default:
            changed[parameter.name] = str(value) if isinstance(value, Path) else value
    return changed


def _part(hint: Any) -> _Part | None:
    """The part that a parameter of this type stands for; None for an option."""
    if is_dataclass(hint):
        kind: Any = hint
        return _Part(_options_of(kind), lambda values: kind(**values))
    for mark in getattr(hint, "__metadata__", ()):
        if isinstance(mark, Generation):
            options = [_generation_option(name, mark) for name in mark.names]
            return _Part(options, functools.partial(_generation_values, mark))
    return None


def _options_of(kind: Any) -> list[_Option]:
    """The options of a dataclass, under the heading ``kind.PANEL``."""
    hints = typing.get_type_hints(kind)
    options = list[_Option]()
    for own in fields(kind):
        info = own.metadata[KEY]
        info.rich_help_panel = info.rich_help_panel or getattr(kind, "PANEL", None)
        default = own.default if own.default is not MISSING else own.default_factory()  # type: ignore[misc]
        options.append(
            _Option(_parameter(own.name, Annotated[hints[own.name], info], default), own.name)
        )
    return options


def _generation_option(name: str, mark: Generation) -> _Option:
    own = DESCRIBED[name]
    shown = own.name or name
    default = None if mark.unset or own.text else getattr(DEFAULTS, name)
    letter = (f"-{own.letter}",) if own.letter else ()
    info = typer.Option(
        _flag(shown),
        *letter,
        help=mark.help.get(name) or own.help_for(FLAGS),
        rich_help_panel=own.group,
    )
    kind = str if own.text else _kind(name)
    if default is None:
        kind = kind | None
    return _Option(_parameter(shown, Annotated[kind, info], default), name)


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


FLAGS = {name: _flag(own.name or name) for name, own in DESCRIBED.items()}


def _kind(name: str) -> Any:
    """The type of a field, without None."""
    hint = typing.get_type_hints(GenerationOptions)[name]
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return next(part for part in typing.get_args(hint) if part is not type(None))
    return hint


def _generation_values(mark: Generation, values: dict[str, Any]) -> dict[str, Any]:
    """Keywords of ``GenerationOptions``.

    Raises:
        UserError: a text cannot be read, or a value is wrong and ``mark.check`` is set.
    """
    options = {name: value for name, value in values.items() if not mark.unset or value is not None}
    if options.get("canvas_length") is not None:
        with contextlib.suppress(ValueError):
            options["canvas_length"] = int(options["canvas_length"])
    if "logit_bias" in options:
        options["logit_bias"] = json_object(options["logit_bias"], "--logit-bias") or None
    if set(CONSTRAINTS) <= options.keys():
        options |= constraints_of(options["json_schema"], options["regex"], options["choices"])
    if mark.check:
        GenerationOptions.from_keywords(options)
    return options
