"""Chat templates: foreign code, rendered as transformers renders it, within bounds of time, work
and memory.

A template comes with a checkpoint from anywhere. It runs in Jinja's sandbox; beyond that every
loop, call, filter and operator counts against a ``Budget``, and what would make a text or a list
too large is refused before it is made.

    >>> render(template, {"messages": [{"role": "user", "content": "Hello"}], "add_generation_prompt": True})
"""

from __future__ import annotations

import functools
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mlx_diffgemma.errors import UserError

SECONDS = 3.0  # of the thread's own processor time
STEPS = 2_000_000  # bodies of loops and macros, calls, filters and operators
LARGEST = 2**24  # characters of one value, or four times what the template is given
ENTRIES = (
    2**20
)  # of one list or map with all that is in it, or four times what the template is given
LARGEST_SOURCE = 2**20  # characters of the template itself
LARGEST_NUMBER = 10**6  # in the arguments of calls and filters
BITS = 4096  # of the product of two whole numbers
MAPPED = re.compile(r"%\(")
WIDE = re.compile(r"\d{4,}|\*")  # a width or precision in a format
# Their work or their result does not follow from the size of what they are given, and no chat template needs them.
DROPPED_FILTERS = ("pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr")
DROPPED_METHODS = ("format_map", "maketrans", "translate")
FAILURES = (
    jinja2.TemplateError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    RuntimeError,
    TypeError,
    ValueError,
)


class TemplateLimitError(jinja2.TemplateError):
    """A template that asks for more than its budget."""


class Budget:
    """What one rendering may still use."""

    def __init__(self, given: int = 0) -> None:
        self.largest = max(LARGEST, 4 * given)
        self.entries = max(ENTRIES, 4 * given)
        self.steps = STEPS
        self.written = 0
        self.until = time.thread_time() + SECONDS

    def step(self) -> None:
        """Errors: TemplateLimitError when the rendering has taken too many steps or too much time."""
        self.steps -= 1
        if self.steps < 0:
            raise TemplateLimitError(f"it takes more than {STEPS:,} steps")
        if not self.steps % 64:
            self.check_time()

    def check_time(self) -> None:
        """Errors: TemplateLimitError when the time is over."""
        if time.thread_time() > self.until:
            raise TemplateLimitError(f"it takes more than {SECONDS:g} seconds")

    def write(self, size: int) -> None:
        """Errors: TemplateLimitError when more is written than any conversation needs."""
        self.written += size
        if self.written > 4 * self.largest:
            raise TemplateLimitError(f"it writes more than {4 * self.largest:,} characters")

    def check(self, size: int) -> None:
        """Errors: TemplateLimitError for a value of ``size`` characters or entries that is too
        large.
        """
        if size > self.largest:
            raise TemplateLimitError(f"it makes a text of more than {self.largest:,} characters")

    def measure(self, value: Any) -> int:
        """Characters and entries of ``value``, an inner value that stands in several places counted
        in each.
        """
        size = 0
        entries = 0
        left = [value]
        while left:
            one = left.pop()
            entries += 1
            if not entries % 1024:
                self.check_time()
            if isinstance(one, str | bytes):
                size += len(one) + 1
            elif isinstance(one, Mapping):
                size += len(one) + 1
                left += [*one, *one.values()]
            elif isinstance(one, list | tuple | set | frozenset):
                size += len(one) + 1
                left += one
            else:
                size += 1
            self.check(size)
            if entries + len(left) > self.entries:
                raise TemplateLimitError(f"it makes a list of more than {self.entries:,} entries")
        return size


class _Current(threading.local):
    budget: Budget | None = None
    marks: str = ""  # characters that JSON never escapes, see ``render``


_current = _Current()


def _budget() -> Budget:
    if _current.budget is None:
        _current.budget = Budget()
    return _current.budget


def _step(size: int = 0) -> str:
    """Count a step that writes ``size`` characters of the template's own."""
    _budget().step()
    _budget().write(size)
    return ""


def _measured(value: Any) -> Any:
    """``value``, an iterator as a list, once it is known to be of a bounded size."""
    budget = _budget()
    if isinstance(value, Iterator):
        value = list(_counted(value))
    if isinstance(value, str | list | tuple | dict | set | frozenset):
        budget.measure(value)
    return value


def _counted(values: Iterable[Any]) -> Iterator[Any]:
    budget = _budget()
    for number, value in enumerate(values):
        budget.step()
        budget.check(number)
        yield value


def _cut(piece: Any) -> Any:
    """A piece of a text that was split, where half a pair of marks becomes one that only keeps
    texts apart.
    """
    if not isinstance(piece, str) or not _current.marks:
        return piece
    begin, end, split = _current.marks
    if piece.endswith(begin):
        piece = piece[:-1] + split
    return split + piece[1:] if piece.startswith(end) else piece


def _check_numbers(arguments: Iterable[Any]) -> None:
    for value in arguments:
        if isinstance(value, int) and abs(value) > LARGEST_NUMBER:
            raise TemplateLimitError(f"it calls a function with a number above {LARGEST_NUMBER:,}")


def _text_size(value: Any) -> int:
    return _budget().measure(value)


def _check_method(text: str, name: str, arguments: list[Any]) -> None:
    """Errors: TemplateLimitError where a method of ``text`` would make a text that is too large."""
    budget = _budget()
    number = max((value for value in arguments if isinstance(value, int)), default=0)
    if (
        name == "replace"
        and len(arguments) >= 2
        and isinstance(arguments[0], str)
        and isinstance(arguments[1], str)
    ):
        budget.check(len(text) + text.count(arguments[0]) * len(arguments[1]))
    elif name == "join" and arguments:
        values = arguments[0]
        budget.check(
            _text_size(values) + len(text) * (len(values) if hasattr(values, "__len__") else 0)
        )
    elif name == "format":
        if WIDE.search(text):
            raise TemplateLimitError("it formats a text with a width above 999")
        budget.check(len(text) + text.count("{") * max(map(_text_size, arguments), default=0))
    elif name == "expandtabs":
        budget.check(len(text) + text.count("\t") * number)
    elif name == "indent":
        budget.check(len(text) + (text.count("\n") + 1) * number)


def _check_percent(text: Any, values: Any) -> None:
    if not isinstance(text, str):
        return
    if WIDE.search(text):
        raise TemplateLimitError("it formats a text with a width above 999")
    times = text.count("%") if MAPPED.search(text) else 1
    _budget().check(len(text) + times * _text_size(values))


def _check_product(left: Any, right: Any) -> None:
    for value, times in ((left, right), (right, left)):
        if isinstance(value, str | bytes | list | tuple) and isinstance(times, int):
            _budget().check(_text_size(value) * max(times, 0))
    if (
        isinstance(left, int)
        and isinstance(right, int)
        and left.bit_length() + right.bit_length() > BITS
    ):
        raise TemplateLimitError("it makes a number that is too large")


def _check_power(left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() * abs(right) > BITS:
        raise TemplateLimitError("it makes a number that is too large")


class Generation(jinja2.ext.Extension):
    """``{% generation %}``, which marks what the model wrote: it is written as it is."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own way)

    def parse(self, parser: jinja2.parser.Parser) -> list[nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


class _Namespace(jinja2.utils.Namespace):
    """A namespace without names that lead into Python, as in transformers."""

    def __init__(*args: Any, **given: Any) -> None:
        self, rest = args[0], args[1:]
        attributes = dict(*rest, **given)
        for name in attributes:
            _Namespace._check_name(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._check_name(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check_name(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"it stores the name {name!r} on a namespace")

    def __repr__(self) -> str:  # a namespace may hold itself
        return "<Namespace>"


class _Dict:
    def __call__(self, *args: Any, **given: Any) -> dict[Any, Any]:
        return dict(*args, **given)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers writes it for templates."""
    budget = _budget()
    size = budget.measure(value)
    indent_size = len(indent) if isinstance(indent, str) else max(0, int(indent or 0))
    # Each entry is on a line of its own, indented by its depth.
    budget.check(size * (1 + indent_size * (_depth(value) if indent_size else 0)))
    written = json.dumps(
        value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys
    )
    return re.sub(f"[^\x00-\x7f{_current.marks}]", _escaped, written) if ensure_ascii else written


def _escaped(match: re.Match[str]) -> str:
    return json.dumps(match[0])[1:-1]


def _depth(value: Any) -> int:
    """How deep ``value`` is nested."""
    deepest, left = 0, [(value, 0)]
    while left:
        one, depth = left.pop()
        deepest = max(deepest, depth)
        if isinstance(one, Mapping):
            left += [(inner, depth + 1) for inner in one.values()]
        elif isinstance(one, list | tuple):
            left += [(inner, depth + 1) for inner in one]
    return deepest


def _raise(message: Any) -> None:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


class Environment(ImmutableSandboxedEnvironment):
    """Jinja as transformers sets it up for chat templates, counting against the thread's budget."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[Generation, "jinja2.ext.loopcontrols"],
            optimized=False,
            finalize=self._output,
            cache_size=0,
        )
        self.globals |= {
            "raise_exception": _raise,
            "strftime_now": _now,
            "dict": _Dict(),
            "namespace": _Namespace,
        }
        self.globals.pop("lipsum")
        for name in DROPPED_FILTERS:
            self.filters.pop(name)
        self.filters["tojson"] = _tojson
        self.filters = {name: _bounded_filter(name, own) for name, own in self.filters.items()}
        self.filters[STEP] = _step
        self.filters[MEASURED] = _measured
        self.filters[JOINED] = _joined

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _counting(super()._parse(source, name, filename))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in DROPPED_METHODS and super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _step()
        if operator == "*":
            _check_product(left, right)
        elif operator == "**":
            _check_power(left, right)
        elif operator == "%":
            _check_percent(left, right)
        elif isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
            _budget().check(_text_size(left) + _text_size(right))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        _step()
        arguments = [*args, *kwargs.values()]
        _check_numbers(arguments)
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str):
            args = tuple(_measured(value) for value in args)
            _check_method(owner, getattr(method, "__name__", ""), [*args, *kwargs.values()])
        made = super().call(__context, __obj, *args, **kwargs)
        if isinstance(owner, str) and isinstance(made, list | tuple):
            made = type(made)(_cut(piece) for piece in made)
        return _measured(made)

    @staticmethod
    def _output(value: Any) -> Any:
        budget = _budget()
        if not isinstance(value, jinja2.Undefined):
            budget.write(budget.measure(value))
        return value


STEP, MEASURED, JOINED = "_step", "_measured", "_joined"


def _joined(values: list[Any]) -> str:
    """``a ~ b``."""
    _step()
    _text_size(values)
    return "".join(map(str, values))


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        _step()
        # What Jinja passes first, such as its context, is no value of the template.
        skipped = 1 if hasattr(function, "jinja_pass_arg") else 0
        values = [_measured(value) for value in args[skipped:]]
        _check_numbers([*values, *kwargs.values()])
        _check_filter(name, values, kwargs)
        return _measured(function(*args[:skipped], *values, **kwargs))

    return bounded


def _check_filter(name: str, values: list[Any], kwargs: dict[str, Any]) -> None:
    """Errors: TemplateLimitError for a filter whose result would be too large."""
    if not values:
        return
    first, rest = values[0], [*values[1:], *kwargs.values()]
    if name in ("replace", "indent", "format"):
        text = str(first)
        _check_method(text, name, rest) if name != "format" else _check_percent(text, tuple(rest))
    elif name == "join":
        _check_method(str(rest[0]) if rest else "", "join", [first])
    elif name == "sum" and any(isinstance(value, str | list | tuple) for value in rest):
        raise TemplateLimitError("it sums what are no numbers")


def _counting(tree: nodes.Template) -> nodes.Template:
    """The template with a step at each turn of a loop and each call of a macro, and with joined
    texts and new lists measured.
    """
    for node in list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock))):
        size = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        step = nodes.ExprStmt(
            nodes.Filter(nodes.Const(size), STEP, [], [], None, None), lineno=node.lineno
        )
        node.body.insert(0, step)
    _replace(tree)
    return tree


def _replace(node: nodes.Node) -> None:
    """Wrap what makes new texts and lists, from the inside out."""
    for field, value in node.iter_fields():
        if isinstance(value, list):
            setattr(
                node,
                field,
                [_wrapped(inner) if isinstance(inner, nodes.Node) else inner for inner in value],
            )
        elif isinstance(value, nodes.Node):
            setattr(node, field, _wrapped(value))


def _wrapped(node: nodes.Node) -> nodes.Node:
    _replace(node)
    if isinstance(node, nodes.Concat):
        parts = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(parts, JOINED, [], [], None, None, lineno=node.lineno)
    if isinstance(node, nodes.List | nodes.Dict) or (
        isinstance(node, nodes.Tuple) and node.ctx == "load"
    ):
        return nodes.Filter(node, MEASURED, [], [], None, None, lineno=node.lineno)
    return node


@functools.lru_cache(maxsize=8)
def compiled(source: str) -> jinja2.Template:
    """Errors: UserError for a template that cannot be read, in one sentence."""
    if len(source) > LARGEST_SOURCE:
        raise UserError(
            f"The chat template has {len(source):,} characters, and at most {LARGEST_SOURCE:,} are read; "
            "take the model's own template."
        )
    try:
        return _environment().from_string(source)
    except (
        jinja2.TemplateError,
        RecursionError,
        ValueError,
        OverflowError,
        SyntaxError,
        MemoryError,
    ) as error:
        raise UserError(
            f"The chat template cannot be read ({reason(error)}); take the model's own template."
        ) from None


def syntax(source: str) -> nodes.Template:
    """The syntax tree of a template as it is written.  Errors: UserError for one that cannot be
    read.
    """
    compiled(source)
    return ImmutableSandboxedEnvironment(extensions=[Generation, "jinja2.ext.loopcontrols"]).parse(
        source
    )


@functools.lru_cache(maxsize=1)
def _environment() -> Environment:
    return Environment()


def render(source: str, variables: Mapping[str, Any], marks: str = "") -> str:
    """The text of a template.

    Args:
        source: the template.
        variables: what it reads.
        marks: the characters of ``literal.Marks``, which stay as they are even where the template
        writes JSON in ASCII.

    Raises:
        UserError: for whatever goes wrong in the template, in one sentence.
    """
    template = compiled(source)
    _current.budget = None
    try:
        given = Budget().measure(variables)
    except TemplateLimitError:
        raise UserError(
            f"The conversation has more than {LARGEST:,} characters; shorten it."
        ) from None
    _current.budget = Budget(given)
    _current.marks = marks
    try:
        return template.render(variables)
    except TemplateLimitError as error:
        raise UserError(
            f"The chat template was stopped: {error}; take the model's own template."
        ) from None
    except jinja2.exceptions.UndefinedError as error:
        raise UserError(
            f"The chat template needs what this conversation does not have: {reason(error)}."
        ) from None
    except FAILURES as error:
        kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
        raise UserError(
            f"The chat template refuses this conversation: {kind}{reason(error)}"
        ) from None
    finally:
        _current.budget = None


def reason(error: BaseException) -> str:
    """The first line of an error's text, at most 300 characters of it."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
