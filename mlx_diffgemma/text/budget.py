"""Limits what one rendering of a chat template may use: time, steps, and the sizes of its values.

Values are measured before they grow: a method, filter or operator whose result would be too large
is refused before it runs.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jinja2

SECONDS = 3.0  # seconds of the thread's own processor time
STEPS = 2_000_000  # bodies of loops and macros, calls, filters and operators
# The largest size of one value: its characters, or the entries of a list or map with everything in
# it. Where four times the size of the template's input is more, that is the limit.
LARGEST = 2**24
ENTRIES = 2**20
LARGEST_NUMBER = 10**6  # the largest number in the arguments of calls and filters
BITS = 4096  # the most bits of the product of two whole numbers
MAPPED = re.compile(r"%\(")
WIDE = re.compile(r"\d{4,}|\*")  # a width or precision in a format


class TemplateLimitError(jinja2.TemplateError):
    """A template asks for more than its budget."""


class Budget:
    """What one rendering may still use.  ``input_size`` is the size of the template's variables."""

    def __init__(self, input_size: int = 0) -> None:
        self.largest = max(LARGEST, 4 * input_size)
        self.entries = max(ENTRIES, 4 * input_size)
        self.steps = STEPS
        self.written = 0
        self.until = time.thread_time() + SECONDS

    def step(self) -> None:
        """Count one step.

        Raises:
            TemplateLimitError: The rendering has taken too many steps or too long.
        """
        self.steps -= 1
        if self.steps < 0:
            raise TemplateLimitError(f"it takes more than {STEPS:,} steps")
        if not self.steps % 64:
            self.check_time()

    def check_time(self) -> None:
        """Check the time.

        Raises:
            TemplateLimitError: The time is over.
        """
        if time.thread_time() > self.until:
            raise TemplateLimitError(f"it takes more than {SECONDS:g} seconds")

    def write(self, size: int) -> None:
        """Count text that is written.

        Raises:
            TemplateLimitError: More is written than any conversation needs.
        """
        self.written += size
        if self.written > 4 * self.largest:
            raise TemplateLimitError(f"it writes more than {4 * self.largest:,} characters")

    def check(self, size: int) -> None:
        """Check the size of a value, in characters or entries.

        Raises:
            TemplateLimitError: The value is too large.
        """
        if size > self.largest:
            raise TemplateLimitError(f"it makes a text of more than {self.largest:,} characters")

    def measure(self, value: Any) -> int:
        """Count the characters and entries of ``value``; an inner value counts once for each place
        it is in.

        Raises:
            TemplateLimitError: The value is too large.
        """
        size = 0
        entries = 0
        left = [value]
        while left:
            inner = left.pop()
            entries += 1
            if not entries % 1024:
                self.check_time()
            if isinstance(inner, str | bytes):
                size += len(inner) + 1
            elif isinstance(inner, Mapping):
                size += len(inner) + 1
                left += [*inner, *inner.values()]
            elif isinstance(inner, list | tuple | set | frozenset):
                size += len(inner) + 1
                left += inner
            else:
                size += 1
            self.check(size)
            if entries + len(left) > self.entries:
                raise TemplateLimitError(f"it makes a list of more than {self.entries:,} entries")
        return size


class _Current(threading.local):
    budget: Budget | None = None
    marks: str = ""


_current = _Current()


@contextlib.contextmanager
def rendering(budget: Budget, marks: str) -> Iterator[None]:
    """Use ``budget`` on this thread.  ``marks`` are characters that JSON must not escape."""
    _current.budget = budget
    _current.marks = marks
    try:
        yield
    finally:
        _current.budget = None


def current_budget() -> Budget:
    """The budget of the rendering on this thread; a new one outside of a rendering."""
    if _current.budget is None:
        _current.budget = Budget()
    return _current.budget


def current_marks() -> str:
    """The characters that JSON must not escape."""
    return _current.marks


def count_step(size: int = 0) -> str:
    """Count a step that writes ``size`` characters of the template's own text."""
    budget = current_budget()
    budget.step()
    budget.write(size)
    return ""


def measured(value: Any) -> Any:
    """Check the size of ``value`` and return it, with an iterator as a list.

    Raises:
        TemplateLimitError: The value is too large.
    """
    budget = current_budget()
    if isinstance(value, Iterator):
        value = list(_counted(value))
    if isinstance(value, str | list | tuple | dict | set | frozenset):
        budget.measure(value)
    return value


def _counted(values: Iterable[Any]) -> Iterator[Any]:
    budget = current_budget()
    for number, value in enumerate(values):
        budget.step()
        budget.check(number)
        yield value


def cut_marks(piece: Any) -> Any:
    """Repair a piece of a text that was split.

    If the split cut a pair of marks in half, the half becomes the mark that only separates texts.
    """
    if not isinstance(piece, str) or not _current.marks:
        return piece
    begin, end, split = list(_current.marks)
    if piece.endswith(begin):
        piece = piece[:-1] + split
    return split + piece[1:] if piece.startswith(end) else piece


def check_numbers(arguments: Iterable[Any]) -> None:
    """Check the numbers among ``arguments``.

    Raises:
        TemplateLimitError: One of them is very large.
    """
    for value in arguments:
        if isinstance(value, int) and abs(value) > LARGEST_NUMBER:
            raise TemplateLimitError(f"it calls a function with a number above {LARGEST_NUMBER:,}")


def text_size(value: Any) -> int:
    return current_budget().measure(value)


def check_method(text: str, name: str, arguments: list[Any]) -> None:
    """Check the result of a method of ``text`` before the method is called.

    Args:
        text: The text.
        name: The name of the method.
        arguments: Its arguments.

    Raises:
        TemplateLimitError: The method would make a text that is too large.
    """
    budget = current_budget()
    number = max((value for value in arguments if isinstance(value, int)), default=0)
    if name == "replace":
        texts = [value for value in arguments[:2] if isinstance(value, str)]
        if len(texts) == 2:
            budget.check(len(text) + text.count(texts[0]) * len(texts[1]))
    elif name == "join" and arguments:
        values = arguments[0]
        count = len(values) if hasattr(values, "__len__") else 0
        budget.check(text_size(values) + len(text) * count)
    elif name == "format":
        if WIDE.search(text):
            raise TemplateLimitError("it formats a text with a width above 999")
        budget.check(len(text) + text.count("{") * max(map(text_size, arguments), default=0))
    elif name == "expandtabs":
        budget.check(len(text) + text.count("\t") * number)
    elif name == "indent":
        budget.check(len(text) + (text.count("\n") + 1) * number)


def check_filter(name: str, values: list[Any], options: dict[str, Any]) -> None:
    """Check the result of a filter before the filter runs.

    Args:
        name: The name of the filter.
        values: Its positional arguments.
        options: Its named arguments.

    Raises:
        TemplateLimitError: The result would be too large.
    """
    if not values:
        return
    value = values[0]
    arguments = [*values[1:], *options.values()]
    if name in ("replace", "indent"):
        check_method(str(value), name, arguments)
    elif name == "format":
        check_percent(str(value), tuple(arguments))
    elif name == "join":
        check_method(str(arguments[0]) if arguments else "", "join", [value])
    elif name == "sum" and any(isinstance(start, str | list | tuple) for start in arguments):
        raise TemplateLimitError("it sums what are no numbers")


def check_percent(text: Any, values: Any) -> None:
    """Check ``text % values``.

    Raises:
        TemplateLimitError: The result would be too large.
    """
    if not isinstance(text, str):
        return
    if WIDE.search(text):
        raise TemplateLimitError("it formats a text with a width above 999")
    times = text.count("%") if MAPPED.search(text) else 1
    current_budget().check(len(text) + times * text_size(values))


def check_product(left: Any, right: Any) -> None:
    """Check ``left * right``.

    Raises:
        TemplateLimitError: The result would be too large.
    """
    for value, times in ((left, right), (right, left)):
        if isinstance(value, str | bytes | list | tuple) and isinstance(times, int):
            current_budget().check(text_size(value) * max(times, 0))
    are_numbers = isinstance(left, int) and isinstance(right, int)
    if are_numbers and left.bit_length() + right.bit_length() > BITS:
        raise TemplateLimitError("it makes a number that is too large")


def check_power(left: Any, right: Any) -> None:
    """Check ``left ** right``.

    Raises:
        TemplateLimitError: The result would be too large.
    """
    are_numbers = isinstance(left, int) and isinstance(right, int)
    if are_numbers and left.bit_length() * abs(right) > BITS:
        raise TemplateLimitError("it makes a number that is too large")


def check_sum(left: Any, right: Any) -> None:
    """Check ``left + right``.

    Raises:
        TemplateLimitError: The result would be too large.
    """
    if isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
        current_budget().check(text_size(left) + text_size(right))
