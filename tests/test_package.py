"""What the wheel holds: nano's data, and none of the torch code that trained it."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TORCH = re.compile(r"^\s*(import|from) (torch|transformers)\b", re.MULTILINE)


def test_nano_is_data_and_names():
    assert [path.name for path in (ROOT / "mlx_diffgemma/nano").rglob("*.py")] == ["__init__.py"]


def test_only_the_reference_needs_torch():
    users = set()
    for package in ("mlx_diffgemma", "drafter"):
        for path in (ROOT / package).rglob("*.py"):
            if TORCH.search(path.read_text(encoding="utf-8")):
                users.add(path.relative_to(ROOT).as_posix())
    assert users == {
        "mlx_diffgemma/diagnostics/recorder.py",
        "mlx_diffgemma/diagnostics/reference.py",
        "mlx_diffgemma/diagnostics/reference_variants.py",
    }
