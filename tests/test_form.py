"""The form of the code: short files and functions, few parameters, one statement a line.

``tests/form_debt.json`` lists the code that is above a limit, with its figure.  The list may only
shrink: ``python tools/measure_code.py --shrink`` removes what is mended.
"""

import json

import pytest
from measure_code import ANCHORS, DEBT, LIMITS, OURS, ROOT, Code, add_file, measure, shrunk, table

CODE = measure(OURS)
ABOVE = CODE.above_limits()
KNOWN = json.loads(DEBT.read_text(encoding="utf-8"))
LISTED = "is mended; run `python tools/measure_code.py --shrink`"


def test_nothing_passes_a_limit_that_did_not_before():
    assert {name: figure for name, figure in ABOVE.items() if name not in KNOWN} == {}


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_known_debt_shrinks(name):
    assert name in ABOVE, f"{name} {LISTED}"
    assert ABOVE[name] <= KNOWN[name], f"{name} grew from {KNOWN[name]} to {ABOVE[name]}"


def test_what_is_measured():
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "drafter").glob("*.py")}
    assert modules <= {name for name, _ in CODE.files}


def code_of(source):
    code = Code()
    add_file(code, source, "a.py")
    return code


def test_a_long_file_and_a_long_function_are_found():
    body = "    x = 1\n" * LIMITS["lines of a function"]
    assert code_of(f"def f():\n{body}").above_limits() == {
        "lines of a function: a.py::f": LIMITS["lines of a function"] + 1
    }
    assert code_of("x = 1\n" * 451).above_limits() == {"lines of a file: a.py": 451}
    assert code_of("x = 1\n" * 450).above_limits() == {}


def test_parameters_are_counted_with_self_and_by_name():
    filler = "x = 1\n" * 100
    nine = code_of(f"class C:\n    def f(self, a, b, c, d, /, e, f, *, g, h): ...\n{filler}")
    assert nine.above_limits() == {"parameters: a.py::C.f": 9}
    assert code_of(f"def f(a, b, c, d, e, f, g, h): ...\n{filler}").above_limits() == {}


def test_attributes_are_those_declared_and_those_assigned():
    declared = "".join(f"    a{i}: int\n" for i in range(20))
    assigned = "".join(f"        self.b{i}, self.c{i} = 1, 2\n" for i in range(3))
    code = code_of(f"class C:\n{declared}\n    def f(self):\n{assigned}" + "x = 1\n" * 400)
    assert code.above_limits() == {"attributes of a class: a.py::C": 26}


def test_densities():
    plain = "x = f(1)\n" * 992
    assert code_of(plain + "a, b = 1, 2\n" * 8).above_limits().keys() == {"lines of a file: a.py"}
    code = code_of("a, b = 1, 2\n" * 9 + "c = [x for x in y]\n" * 26 + "x = 1  # why\n" * 965)
    assert code.above_limits() == {
        "lines of a file: a.py": 1000,
        "tuple assignments per 1,000 lines": 9,
        "comprehensions per 1,000 lines": 26,
    }
    assert code.comments == 965
    assert code_of("a, b = f()\na, b = b, a\n").tuples == 1


def test_wide_lines():
    code = code_of("x = 1\n" * 89 + f"y = {'1' * 92}\n" * 11)
    assert code.above_limits() == {"line width, 90th percentile": 96}


def test_mended_code_leaves_the_list():
    known = {"a": 10, "b": 20, "c": 30}
    assert shrunk(known, {"b": 18, "c": 31, "d": 5}) == {"b": 18, "c": 30}


def test_the_table_has_a_column_a_project():
    lines = table(ANCHORS).splitlines()
    assert len(lines) == 12
    assert {line.count("|") for line in lines} == {len(ANCHORS) + 2}
