"""The list of breaks fits the code; whether their tests notice them is found out by ``python -m
tests.mutants``.
"""

from pathlib import Path

import pytest

from tests.mutants import breaks
from tests.mutants.__main__ import ROOT, broken
from tests.mutants.breaks import BREAKS, PARTS


def test_names_are_unique():
    assert len({one.name for one in BREAKS}) == len(BREAKS)


def test_every_part_is_in_the_list():
    modules = {path.stem for path in Path(breaks.__file__).parent.glob("*.py")} - {"__init__"}
    assert modules == PARTS.keys()
    assert len(BREAKS) >= 160


@pytest.mark.parametrize("one", BREAKS, ids=lambda one: one.name)
def test_a_break_fits_the_code(one):
    text = (ROOT / one.file).read_text(encoding="utf-8")
    assert broken(one, text) != text
    compile(broken(one, text), one.file, "exec")
    named = [word for word in one.tests.split() if word.startswith("tests/")]
    assert named
    assert all(Path(ROOT / word.split("::")[0]).exists() for word in named)
