"""Measures the form of our code, and compares it with projects that are known for theirs.

    python tools/measure_code.py             print the table, and what is above a limit
    python tools/measure_code.py FOLDER …    measure other folders, for a new line of ANCHORS
    python tools/measure_code.py --shrink    lower or remove entries of tests/form_debt.json

``tests/test_form.py`` fails when code passes a limit of ``LIMITS`` that it did not pass before.
``tests/form_debt.json`` lists the code that is above a limit today; that list may only shrink.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import statistics
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

ROOT = Path(__file__).parent.parent
DEBT = ROOT / "tests" / "form_debt.json"
OURS = (ROOT / "mlx_diffgemma", ROOT / "drafter", ROOT / "convert.py")

LIMITS = {
    "lines of a file": 450,
    "lines of a function": 60,
    "parameters": 8,
    "attributes of a class": 25,
    "tuple assignments per 1,000 lines": 8,
    "comprehensions per 1,000 lines": 25,
    "line width, 90th percentile": 95,
}


# Functions whose signature is public: their keywords must not change.
PUBLIC = {
    "mlx_diffgemma/checkpoint/convert.py::convert",
    "mlx_diffgemma/generation/decide.py::decide",
    "mlx_diffgemma/generation/generate.py::batch_generate",
    "mlx_diffgemma/generation/generate.py::stream_generate",
    "mlx_diffgemma/tuning/fuse.py::fuse",
}


@dataclass(frozen=True)
class Summary:
    """One line of the table. Shares are in percent of all files, functions or classes."""

    median_file: float
    long_files: float
    long_functions: float
    many_parameters: float
    large_classes: float
    width_p50: int
    width_p90: int
    tuples: float
    comprehensions: float
    comments: float


HEADINGS = (
    "median file, lines",
    f"files > {LIMITS['lines of a file']} lines, %",
    f"functions > {LIMITS['lines of a function']} lines, %",
    f"functions > {LIMITS['parameters']} parameters, %",
    f"classes > {LIMITS['attributes of a class']} attributes, %",
    "line width p50",
    "line width p90",
    "tuple assignments / 1,000 lines",
    "comprehensions / 1,000 lines",
    "comments / 1,000 lines",
)

# Measured with this script. Each entry names the repository on GitHub, its commit and the folder.
ANCHORS = {
    "ml-explore/mlx-lm@d78bf58: mlx_lm": Summary(
        median_file=218.5,
        long_files=14.77,
        long_functions=3.16,
        many_parameters=0.73,
        large_classes=3.23,
        width_p50=34,
        width_p90=70,
        tuples=1.96,
        comprehensions=9.08,
        comments=19.6,
    ),
    "GeeeekExplorer/nano-vllm@bb823b3: nanovllm": Summary(
        median_file=59,
        long_files=0,
        long_functions=0,
        many_parameters=0.94,
        large_classes=0,
        width_p50=36,
        width_p90=73,
        tuples=2.89,
        comprehensions=10.1,
        comments=6.5,
    ),
    "karpathy/nanochat@92d63d4: nanochat": Summary(
        median_file=228.5,
        long_files=14.29,
        long_functions=6.06,
        many_parameters=2.27,
        large_classes=0,
        width_p50=47,
        width_p90=88,
        tuples=5.86,
        comprehensions=13.8,
        comments=156.7,
    ),
    "simonw/llm@f3f4f29: llm": Summary(
        median_file=182,
        long_files=36.84,
        long_functions=8.87,
        many_parameters=4.25,
        large_classes=1.18,
        width_p50=34,
        width_p90=69,
        tuples=0.06,
        comprehensions=11.7,
        comments=50.5,
    ),
    "meta-pytorch/gpt-fast@6ecad9b: .": Summary(
        median_file=174,
        long_files=12.5,
        long_functions=4.08,
        many_parameters=2.55,
        large_classes=0,
        width_p50=40,
        width_p90=84,
        tuples=2.23,
        comprehensions=7.2,
        comments=68.6,
    ),
    "ml-explore/mlx-examples@7ddca42: flux": Summary(
        median_file=176.5,
        long_files=0,
        long_functions=1.38,
        many_parameters=1.38,
        large_classes=0,
        width_p50=33,
        width_p90=69,
        tuples=0.71,
        comprehensions=5.0,
        comments=49.8,
    ),
}


@dataclass
class Code:
    """Counts from the syntax trees and tokens of some files.

    Each list holds pairs of a unique name and a figure.
    """

    files: list[tuple[str, int]] = field(default_factory=list)
    functions: list[tuple[str, int]] = field(default_factory=list)
    parameters: list[tuple[str, int]] = field(default_factory=list)
    classes: list[tuple[str, int]] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    tuples: int = 0
    comprehensions: int = 0
    comments: int = 0

    @property
    def lines(self) -> int:
        return sum(count for _, count in self.files)

    def per_thousand(self, count: int) -> float:
        return 1000 * count / self.lines

    def width(self, percent: int) -> int:
        """The given percentile of the width of lines that are not blank."""
        return sorted(self.widths)[len(self.widths) * percent // 100]

    def summary(self) -> Summary:
        return Summary(
            median_file=statistics.median(count for _, count in self.files),
            long_files=_share(self.files, LIMITS["lines of a file"]),
            long_functions=_share(self.functions, LIMITS["lines of a function"]),
            many_parameters=_share(self.parameters, LIMITS["parameters"]),
            large_classes=_share(self.classes, LIMITS["attributes of a class"]),
            width_p50=self.width(50),
            width_p90=self.width(90),
            tuples=self.per_thousand(self.tuples),
            comprehensions=self.per_thousand(self.comprehensions),
            comments=self.per_thousand(self.comments),
        )

    def above_limits(self) -> dict[str, float]:
        """Everything above a limit, as ``"kind: name"`` and its figure."""
        lists = {
            "lines of a file": self.files,
            "lines of a function": self.functions,
            "parameters": self.parameters,
            "attributes of a class": self.classes,
        }
        totals = {
            "tuple assignments per 1,000 lines": self.per_thousand(self.tuples),
            "comprehensions per 1,000 lines": self.per_thousand(self.comprehensions),
            "line width, 90th percentile": self.width(90),
        }
        above: dict[str, float] = {}
        for kind, entries in lists.items():
            for name, count in entries:
                if count > LIMITS[kind]:
                    above[f"{kind}: {name}"] = count
        for kind, total in totals.items():
            if total > LIMITS[kind]:
                above[kind] = round(total, 1)
        return above


def _share(entries: Sequence[tuple[str, int]], limit: int) -> float:
    """How many percent of the entries are above the limit."""
    if not entries:
        return 0.0
    return 100 * sum(count > limit for _, count in entries) / len(entries)


def measure(paths: Sequence[Path], root: Path = ROOT) -> Code:
    """Measure all Python files at or below ``paths``, named relative to ``root``."""
    code = Code()
    for path in paths:
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            add_file(code, file.read_text(encoding="utf-8"), file.relative_to(root).as_posix())
    return code


def add_file(code: Code, source: str, name: str) -> None:
    """Add the counts of one file.

    Args:
        code: The counts.
        source: The content of the file.
        name: Its name.
    """
    code.files.append((name, source.count("\n")))
    code.widths += [len(line) for line in source.split("\n") if line.strip()]
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        code.comments += token.type == tokenize.COMMENT
    for qualified, node in _walk(ast.parse(source), name):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            code.functions.append((qualified, _line_count(node)))
            if not _is_command(node) and qualified not in PUBLIC:
                code.parameters.append((qualified, _parameter_count(node.args)))
        elif isinstance(node, ast.ClassDef):
            code.classes.append((qualified, len(_attributes(node))))
        elif isinstance(node, ast.Assign):
            code.tuples += _assigns_a_tuple(node)
        elif isinstance(node, ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
            code.comprehensions += 1


def _walk(node: ast.AST, name: str) -> Iterator[tuple[str, ast.AST]]:
    """All nodes below ``node``. Functions and classes come with their dotted name."""
    for child in ast.iter_child_nodes(node):
        below = name
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            separator = "::" if name.endswith(".py") else "."
            below = f"{name}{separator}{child.name}"
        yield below, child
        yield from _walk(child, below)


def _is_command(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether the signature is a list of command-line options, which ``@command`` expands."""
    return any(isinstance(name, ast.Name) and name.id == "command" for name in node.decorator_list)


def _line_count(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The lines of a function; for a command, those after its list of options."""
    first = node.body[0].lineno if _is_command(node) else node.lineno
    return (node.end_lineno or 0) - first + 1


def _parameter_count(arguments: ast.arguments) -> int:
    """How many parameters a caller may pass by position or by name, ``self`` included."""
    return len(arguments.posonlyargs) + len(arguments.args) + len(arguments.kwonlyargs)


def _attributes(node: ast.ClassDef) -> set[str]:
    """Attributes that the class declares, and those that its methods assign to ``self``."""
    names = set()
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            names.add(statement.target.id)
    for child in ast.walk(node):
        if not isinstance(child, ast.Attribute) or not isinstance(child.ctx, ast.Store):
            continue
        if isinstance(child.value, ast.Name) and child.value.id == "self":
            names.add(child.attr)
    return names


def _assigns_a_tuple(node: ast.Assign) -> bool:
    """Whether the statement is ``a, b = x, y``."""
    (target, *others) = node.targets
    return not others and isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)


def table(rows: dict[str, Summary]) -> str:
    """The table as Markdown, with a row for each figure and a column for each project."""
    lines = ["| | " + " | ".join(rows) + " |", "|---" * (len(rows) + 1) + "|"]
    for heading, attribute in zip(HEADINGS, fields(Summary), strict=True):
        figures = [f"{getattr(row, attribute.name):.4g}" for row in rows.values()]
        lines.append(f"| {heading} | " + " | ".join(figures) + " |")
    return "\n".join(lines)


def shrunk(debt: dict[str, float], above: dict[str, float]) -> dict[str, float]:
    """The list of known debt, without mended entries, and with lower figures where code shrank."""
    return {name: min(figure, above[name]) for name, figure in debt.items() if name in above}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure the form of the code.")
    parser.add_argument("folders", nargs="*", type=Path, help="folders to measure; ours if none")
    parser.add_argument("--shrink", action="store_true", help=f"shrink {DEBT.relative_to(ROOT)}")
    options = parser.parse_args(arguments)
    if options.folders:
        rows = {}
        for folder in options.folders:
            rows[folder.name] = measure([folder], folder).summary()
            print(rows[folder.name])
        print(table(rows))
        return
    code = measure(OURS)
    above = code.above_limits()
    print(table({"ours": code.summary(), **ANCHORS}))
    print("\nAbove a limit:")
    for name, figure in sorted(above.items()):
        print(f"  {figure:g}  {name}")
    if options.shrink:
        debt = shrunk(json.loads(DEBT.read_text(encoding="utf-8")), above)
        DEBT.write_text(json.dumps(debt, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
