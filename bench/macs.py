"""Writes the table of recipes and Macs in docs/recipes.md.

The figures are those of `mlx-diffgemma estimate --macs`.

    python bench/macs.py
"""

from __future__ import annotations

from documents import put_table

from mlx_diffgemma.estimate import macs
from mlx_diffgemma.estimate.cost import released_with_tower


def table() -> str:
    lines = [
        f"| recipe | {' | '.join(f'{mac} GB' for mac in macs.MACS)} |",
        f"|---|{'---|' * len(macs.MACS)}",
    ]
    lines += [
        f"| {name} | {' | '.join(map(macs.cell, row.values()))} |"
        for name, row in macs.table(released_with_tower()).items()
    ]
    allowed = " | ".join(f"{macs.gpu_memory(mac) / 1e9:.1f} GB" for mac in macs.MACS)
    return "\n".join([*lines, f"| the GPU may take | {allowed} |"])


if __name__ == "__main__":
    put_table("recipes.md", "macs.py", table())
