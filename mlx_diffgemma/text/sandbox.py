"""Jinja as transformers sets it up for chat templates, in a sandbox with a budget.

>>> Environment().from_string(source).render(variables)
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mlx_diffgemma.text.budget import (
    check_filter,
    check_method,
    check_numbers,
    check_percent,
    check_power,
    check_product,
    check_sum,
    count_step,
    current_budget,
    current_marks,
    cut_marks,
    measured,
    text_size,
)

# The size of their input does not bound the work of these filters, and no chat template needs them.
DROPPED_FILTERS = ("pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr")
DROPPED_METHODS = ("format_map", "maketrans", "translate")
# The filters that are added to the syntax tree of a template.
STEP = "_step"
MEASURED = "_measured"
JOINED = "_joined"


class Generation(jinja2.ext.Extension):
    """The tag ``{% generation %}`` around the model's text; its content is rendered unchanged."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own way)

    def parse(self, parser: jinja2.parser.Parser) -> list[nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


class _Namespace(jinja2.utils.Namespace):
    """A namespace without names that lead into Python, as in transformers."""

    def __init__(*args: Any, **values: Any) -> None:  # so that every other name can be an attribute
        self = args[0]
        attributes = dict(*args[1:], **values)
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

    def __repr__(self) -> str:  # a namespace may contain itself
        return "<Namespace>"


class _Dict:
    """The global ``dict`` of templates."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON as transformers does for templates."""
    budget = current_budget()
    size = budget.measure(value)
    indent_size = len(indent) if isinstance(indent, str) else max(0, int(indent or 0))
    # Each entry is on a line of its own, indented by its depth.
    budget.check(size * (1 + indent_size * (_depth(value) if indent_size else 0)))
    text = json.dumps(
        value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys
    )
    if not ensure_ascii:
        return text
    return re.sub(f"[^\x00-\x7f{current_marks()}]", _escaped, text)


def _escaped(match: re.Match[str]) -> str:
    return json.dumps(match[0])[1:-1]


def _depth(value: Any) -> int:
    """How deeply ``value`` is nested."""
    deepest = 0
    left = [(value, 0)]
    while left:
        container, depth = left.pop()
        deepest = max(deepest, depth)
        if isinstance(container, Mapping):
            left += [(inner, depth + 1) for inner in container.values()]
        elif isinstance(container, list | tuple):
            left += [(inner, depth + 1) for inner in container]
    return deepest


def _raise(message: Any) -> None:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


class Environment(ImmutableSandboxedEnvironment):
    """Jinja as transformers sets it up for chat templates; it counts against the thread's budget."""

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
        self.filters = {
            name: _bounded_filter(name, function) for name, function in self.filters.items()
        }
        self.filters[STEP] = count_step
        self.filters[MEASURED] = measured
        self.filters[JOINED] = _joined

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _counting(super()._parse(source, name, filename))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in DROPPED_METHODS and super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        count_step()
        if operator == "*":
            check_product(left, right)
        elif operator == "**":
            check_power(left, right)
        elif operator == "%":
            check_percent(left, right)
        else:
            check_sum(left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        count_step()
        arguments = [*args, *kwargs.values()]
        check_numbers(arguments)
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str):
            args = tuple(measured(value) for value in args)
            check_method(owner, getattr(method, "__name__", ""), [*args, *kwargs.values()])
        result = super().call(__context, __obj, *args, **kwargs)
        if isinstance(owner, str) and isinstance(result, list | tuple):
            result = type(result)(cut_marks(piece) for piece in result)
        return measured(result)

    @staticmethod
    def _output(value: Any) -> Any:
        budget = current_budget()
        if not isinstance(value, jinja2.Undefined):
            budget.write(budget.measure(value))
        return value


def _joined(values: list[Any]) -> str:
    """The result of ``a ~ b``."""
    count_step()
    text_size(values)
    return "".join(map(str, values))


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a filter so that it counts as a step, and its input and output are measured."""

    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        count_step()
        # Jinja may pass one of its own objects first, such as its context.
        skipped = 1 if hasattr(function, "jinja_pass_arg") else 0
        values = [measured(value) for value in args[skipped:]]
        check_numbers([*values, *kwargs.values()])
        check_filter(name, values, kwargs)
        return measured(function(*args[:skipped], *values, **kwargs))

    return bounded


def _counting(tree: nodes.Template) -> nodes.Template:
    """Add counting to a template.

    The body of each loop and macro counts as a step, and joined texts and new lists are measured.
    """
    repeating: list[nodes.For | nodes.Macro | nodes.CallBlock] = [
        *tree.find_all(nodes.For),
        *tree.find_all(nodes.Macro),
        *tree.find_all(nodes.CallBlock),
    ]
    for node in repeating:
        size = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        step = nodes.ExprStmt(
            nodes.Filter(nodes.Const(size), STEP, [], [], None, None), lineno=node.lineno
        )
        node.body.insert(0, step)
    _replace(tree)
    return tree


def _replace(node: nodes.Node) -> None:
    """Wrap the nodes that make new texts and lists, starting with the innermost."""
    for field, value in node.iter_fields():
        if isinstance(value, list):
            items = [_wrapped(item) if isinstance(item, nodes.Node) else item for item in value]
            setattr(node, field, items)
        elif isinstance(value, nodes.Node):
            setattr(node, field, _wrapped(value))


def _wrapped(node: nodes.Node) -> nodes.Node:
    _replace(node)
    if isinstance(node, nodes.Concat):
        parts = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(parts, JOINED, [], [], None, None, lineno=node.lineno)
    is_tuple = isinstance(node, nodes.Tuple) and node.ctx == "load"
    if isinstance(node, nodes.List | nodes.Dict) or is_tuple:
        return nodes.Filter(node, MEASURED, [], [], None, None, lineno=node.lineno)
    return node
