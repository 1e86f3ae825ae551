"""Imports slow modules when a test first uses them.

Their import takes seconds.  Every process of pytest-xdist collects all test modules, but few of
them run the tests that need these.
"""

from importlib import import_module
from typing import Any


class Deferred:
    """The module ``name``, imported when one of its attributes is first read."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("_"):  # pytest looks at all that a test module holds
            raise AttributeError(attribute)
        return getattr(import_module(self._name), attribute)


def Reference(folder: Any, *arguments: Any, **options: Any) -> Any:
    """The same checkpoint in transformers."""
    return Deferred("mlx_diffgemma.diagnostics.reference").Reference(folder, *arguments, **options)
