"""Imports point one way: a package imports those below it, never those above, and no circle exists.

CONTRIBUTING.md explains the order.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the lowest to the highest.  Names on one line do not import each other's package.
LAYERS = (
    ("errors", "heap"),
    (
        "values",
        "bounded_json",
        "files",
        "safetensors",
        "digests",
        "device",
        "machine",
        "failures",
        "nano",
    ),
    ("text",),
    ("model",),
    ("sampling",),
    ("media", "grammar"),
    ("estimate",),
    ("checkpoint",),
    ("decoding",),
    ("tuning",),
    ("generation",),
    ("evaluation",),
    ("serving",),
    ("drafter",),
    ("diagnostics",),
    ("cli",),
    ("__main__",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
BASE = {*LAYERS[0], *LAYERS[1]}  # single modules, which may import each other


def modules() -> dict[str, Path]:
    """Every module of both packages, by its dotted name."""
    found = {}
    for package in ("mlx_diffgemma", "drafter"):
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported(source: str) -> set[str]:
    """The modules of this project that ``source`` imports anywhere, also in functions and for
    types alone.
    """
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            if any(f"{node.module}.{alias.name}" not in MODULES for alias in node.names):
                names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name.split(".")[0] in ("mlx_diffgemma", "drafter")}


# The root resolves its public names lazily: it imports everything for types, and nothing else.
ARROWS = {
    name: imported(path.read_text(encoding="utf-8")) - {"mlx_diffgemma"}
    for name, path in MODULES.items()
    if name != "mlx_diffgemma"
}


def layer(module: str) -> str:
    parts = module.split(".")
    return parts[0] if parts[0] == "drafter" else parts[1]


def against(module: str, target: str) -> bool:
    """Whether an import of ``target`` in ``module`` points upwards."""
    here, there = layer(module), layer(target)
    if here == there or {here, there} <= BASE:
        return False
    return RANK[there] >= RANK[here]


@pytest.mark.parametrize("module", sorted(ARROWS))
def test_imports_point_downwards(module):
    assert [target for target in sorted(ARROWS[module]) if against(module, target)] == []


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """A circle of imports, or an empty list."""
    done: set[str] = set()

    def search(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module in done:
            return []
        for target in sorted(arrows.get(module, ())):
            if found := search(target, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(arrows) if (found := search(module, []))), [])


def test_no_circle():
    assert circle(ARROWS) == []


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_every_package_has_its_layer():
    assert {layer(name) for name in ARROWS} == RANK.keys()
    assert against("mlx_diffgemma.model.cache", "mlx_diffgemma.decoding.session")
    assert not against("mlx_diffgemma.decoding.session", "mlx_diffgemma.model.cache")
