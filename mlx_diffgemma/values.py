"""Typed reading of values from files that people and tools wrote.

config.json, generation_config.json, adapter_config.json and the YAML of ``lora`` are read through
``Values``.  A value of the wrong kind is an error that names the file, the key, the value and what
is allowed.  null counts as absent, because transformers writes it for every field that is not set.

    >>> values = Values({"top_k_experts": 2, "rms_norm_eps": None}, "config.json", "text_config.")
    >>> values.integer("top_k_experts", low=1), values.number("rms_norm_eps", 1e-6)
    (2, 1e-06)
    >>> values.integer("num_experts", low=1)
    Traceback (most recent call last):
    mlx_diffgemma.errors.UserError: config.json: text_config.num_experts must be a whole number of
    at least 1, got none.
"""

from __future__ import annotations

import math
import numbers
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any, TypeVar

from mlx_diffgemma.errors import UserError

T = TypeVar("T")
REQUIRED: Any = object()
LARGEST = 2**53  # above this, a JSON number may be read as another number


@dataclass(frozen=True)
class Values:
    """A mapping from a file.  ``source`` is the file's name; ``prefix`` is the path of the mapping
    inside the file.
    """

    content: Mapping[str, Any]
    source: str
    prefix: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.content, Mapping):
            where = f"{self.prefix.rstrip('.')} must hold" if self.prefix else "it must hold"
            raise UserError(f"{self.source}: {where} named values, got {shown(self.content)}.")

    def has(self, key: str) -> bool:
        return self.content.get(key) is not None

    def integer(
        self, key: str, default: Any = REQUIRED, low: int | None = None, high: int | None = None
    ) -> Any:
        """Read a whole number.

        Args:
            key: The key in this mapping.
            default: The value when the key is absent; without one the key is required.
            low: The smallest allowed value.
            high: The largest allowed value.

        Returns:
            An int, or ``default``.

        Raises:
            UserError: The value is absent, of another kind, or out of range.
        """
        most = LARGEST if high is None else high
        return self._read(
            key,
            default,
            lambda value: _integer(value, low, most),
            _range("a whole number", low, high),
        )

    def number(
        self,
        key: str,
        default: Any = REQUIRED,
        low: float | None = None,
        above: float | None = None,
        high: float | None = None,
    ) -> Any:
        """Read a finite number.

        The arguments are those of ``integer``; ``above`` is a lower bound that is not allowed
        itself.
        """
        allowed = _range("a number", low, high)
        if above is not None:
            allowed = f"a number above {above:g}"
        return self._read(key, default, lambda value: _number(value, low, above, high), allowed)

    def flag(self, key: str, default: Any = REQUIRED) -> Any:
        """Read true or false."""
        return self._read(
            key, default, lambda value: value if isinstance(value, bool) else None, "true or false"
        )

    def text(self, key: str, default: Any = REQUIRED, allowed: tuple[str, ...] = ()) -> Any:
        """Read a text.

        Args:
            key: The key in this mapping.
            default: The value when the key is absent; without one the key is required.
            allowed: The allowed texts; empty: all.
        """
        words = f"one of {', '.join(allowed)}" if allowed else "a text"

        def check(value: Any) -> str | None:
            return value if isinstance(value, str) and (not allowed or value in allowed) else None

        return self._read(key, default, check, words)

    def part(self, key: str) -> Values:
        """The mapping under ``key``, empty when it is absent."""
        value = self.content.get(key)
        return Values({} if value is None else value, self.source, f"{self.prefix}{key}.")

    def sequence(self, key: str, default: Any = REQUIRED) -> Any:
        """Read a list."""
        return self._read(
            key,
            default,
            lambda value: list(value) if isinstance(value, list | tuple) else None,
            "a list",
        )

    def refuse(self, key: str, allowed: str) -> UserError:
        """The error for the value under ``key``, which must be ``allowed``."""
        value = shown(self.content.get(key))
        return UserError(f"{self.source}: {self.prefix}{key} must be {allowed}, got {value}.")

    def kinds_of(self, kind: type[Any], names: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Read the values whose keys are fields of the dataclass ``kind``, each with the kind of
        its annotation.

        Args:
            kind: A dataclass whose annotations are bool, int, float, str, a mapping, a list, or one
                of these or None.
            names: The key of each field that has another name in the mapping.

        Returns:
            The values that are present, by field name.  Absent fields and null are left out.

        Raises:
            UserError: A value is of another kind.
        """
        assert is_dataclass(kind)
        values = {}
        for name, annotation in typing.get_type_hints(kind).items():
            key = (names or {}).get(name, name)
            reader = self._reader(annotation)
            if reader is not None and self.has(key):
                values[name] = reader(key)
        return values

    def _reader(self, annotation: Any) -> Callable[[str], Any] | None:
        bare = _without_none(annotation)
        readers: dict[Any, Callable[[str], Any]] = {
            bool: self.flag,
            int: self.integer,
            float: self.number,
            str: self.text,
        }
        if bare in readers:
            return readers[bare]
        origin = typing.get_origin(bare) or bare
        if isinstance(origin, type) and issubclass(origin, Mapping):
            return lambda key: self.part(key).content
        if isinstance(origin, type) and issubclass(origin, list | tuple):
            return self.sequence
        return None

    def _read(self, key: str, default: Any, check: Callable[[Any], Any], allowed: str) -> Any:
        value = self.content.get(key)
        if value is None:
            if default is REQUIRED:
                raise UserError(f"{self.source}: {self.prefix}{key} must be {allowed}, got none.")
            return default
        checked = check(value)
        if checked is None:
            raise self.refuse(key, allowed)
        return checked


def shown(value: Any) -> str:
    """``value`` as an error shows it: its kind is visible, and a long text is cut."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write an int of more than 4,300 digits
        text = "a number of thousands of digits"
    except RecursionError:
        text = "a deeply nested value"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _integer(value: Any, low: int | None, high: int) -> int | None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        return None
    value = int(value)
    if (low is not None and value < low) or not -LARGEST <= value <= high:
        return None
    return value


def _number(value: Any, low: float | None, above: float | None, high: float | None) -> float | None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    if isinstance(value, int) and abs(value) > LARGEST:
        return None
    fits = (
        math.isfinite(value)
        and (low is None or value >= low)
        and (above is None or value > above)
        and (high is None or value <= high)
    )
    return float(value) if fits else None


def _range(kind: str, low: float | None, high: float | None) -> str:
    form = ",g" if isinstance(low, float) else ","
    if low is not None and high is not None:
        return f"{kind} from {low:{form}} to {high:{form}}"
    if low is not None:
        return f"{kind} of at least {low:{form}}"
    return f"{kind} of at most {high:,}" if high is not None else kind


def _without_none(annotation: Any) -> Any:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        kinds = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
        return kinds[0] if len(kinds) == 1 else annotation
    return annotation
