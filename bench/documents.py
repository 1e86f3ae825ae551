"""Writes the tables in docs/ from the records in bench/results/.

Each table is between two marks, so that a figure is kept in one place only.
"""

from __future__ import annotations

from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def put_table(document: str, script: str, table: str) -> None:
    """Replace what ``script`` made in docs/``document``."""
    path, begin, end = DOCS / document, f"<!-- made by bench/{script} -->", "<!-- end -->"
    before, rest = path.read_text(encoding="utf-8").split(begin)
    path.write_text(f"{before}{begin}\n{table}\n{end}{rest.split(end, 1)[1]}", encoding="utf-8")
