"""Which variants of a parametrised test the fast pass takes."""

from collections.abc import Iterable
from typing import Any

import pytest


def few(values: Iterable[Any], *fast: Any) -> list[Any]:
    """``values`` for parametrize, of which only ``fast`` (themselves, or their names) run in the
    fast pass.
    """

    def name(value: Any) -> Any:
        return getattr(value, "name", getattr(value, "__name__", value))

    made = list(values)
    assert set(fast) <= set(map(name, made)), "a name that none of them has"
    return [
        value
        if name(value) in fast
        else pytest.param(*value if isinstance(value, tuple) else (value,), marks=pytest.mark.slow)
        for value in made
    ]
