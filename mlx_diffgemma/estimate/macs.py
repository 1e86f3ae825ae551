"""Which recipe fits which Mac, and with how much context.

>>> longest_context(released_with_tower(), RECIPES["4bit"], gpu_memory(24), tower=False)
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from mlx_diffgemma import device
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.estimate import cost
from mlx_diffgemma.estimate.cost import RunMemory
from mlx_diffgemma.model.config import ModelConfig
from mlx_diffgemma.model.recipes import RECIPES, Recipe

MACS = (16, 18, 24, 32, 36, 48, 64, 96, 128)  # GB of memory of the Macs in the table
LADDER = ("8bit", "6bit", "5bit", "4bit", "3bit", "3bit-small")  # for --fit, the largest first
FIT_CONTEXT = 8192  # tokens of context that must fit next to a recipe that --fit chooses
PATCHES = 9 * 280  # patches of an image with the default 280 soft tokens, 3 x 3 patches each
AUTO = "auto"
_SIZE = re.compile(r"(\d+)\s*(?:gb|gib|g)?", re.IGNORECASE)


def gpu_memory(gigabytes: int) -> int:
    """The bytes that macOS lets the GPU of a Mac take.

    They are two thirds of the memory up to 32 GB, and three quarters above.  This is Metal's
    recommendedMaxWorkingSetSize as users logged it, in MiB: 10,922.67 of 16 GB
    (llama-cpp-python issue 687), 21,845.34 of 32 GB (ollama issue 434), 49,152 of 64 GB (llama.cpp
    issue 1870), 73,728 of 96 GB (llama.cpp issue 3213). `sudo sysctl iogpu.wired_limit_mb` raises
    it.
    """
    total = gigabytes * 2**30
    return total * 2 // 3 if gigabytes <= 32 else total * 3 // 4


def smallest_mac(needed: int) -> int | None:
    """The size in GB of the smallest Mac whose GPU may take ``needed`` bytes, or None."""
    return next((mac for mac in MACS if needed <= gpu_memory(mac)), None)


def longest_context(config: ModelConfig, recipe: Recipe, limit: int, tower: bool) -> int:
    """The most tokens of context that fit, in steps of 1,024; 0 where not even 1,024 do.

    Args:
        config: The model's config.
        recipe: The recipe of its weights.
        limit: The bytes that may be taken.
        tower: Whether the vision tower and an image of 280 soft tokens are counted.
    """
    empty = cost.run_memory(config, recipe, 0, mx.bfloat16, tower, PATCHES)

    def fits(step: int) -> bool:
        cache, work = cost.forward_bytes(config, 1024 * step, mx.bfloat16.size)
        return empty.weights + empty.tower + cache + max(work, empty.work) <= limit

    low = 0
    high = config.text.max_position_embeddings // 1024
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return 1024 * low


def table(config: ModelConfig) -> dict[str, dict[int, tuple[int, int]]]:
    """The longest context without and with the tower, by recipe and Mac."""
    rows: dict[str, dict[int, tuple[int, int]]] = {}
    for recipe in RECIPES.values():
        row = rows[recipe.name] = {}
        for mac in MACS:
            text_only = longest_context(config, recipe, gpu_memory(mac), tower=False)
            row[mac] = (text_only, longest_context(config, recipe, gpu_memory(mac), tower=True))
    return rows


def cell(contexts: tuple[int, int]) -> str:
    """A cell of the table: thousands of tokens without and with the tower, once if both agree."""
    words = [f"{tokens // 1024}k" if tokens else "–" for tokens in contexts]
    return "/".join(dict.fromkeys(words))


@dataclass(frozen=True)
class Fit:
    """The recipe that fits a limit, and the reasons.

    Args:
        recipe: The recipe.
        where: The name of the machine.
        limit: The bytes its GPU may take.
        context: The tokens of context that were counted.
        memory: What the recipe takes.
        with_tower: What it takes with an image; None without a vision tower.
        larger: The next larger recipe, which does not fit, and what it takes.
    """

    recipe: Recipe
    where: str
    limit: int
    context: int
    memory: RunMemory
    with_tower: int | None
    larger: tuple[str, int] | None

    def __str__(self) -> str:
        text = (
            f"{self.recipe.name} takes {self.memory.total / 1e9:.1f} GB at {self.context:,} tokens "
            f"of context, and {self.where} allows {self.limit / 1e9:.1f} GB"
        )
        if self.larger:
            text += f"; {self.larger[0]} would take {self.larger[1] / 1e9:.1f} GB"
        if self.with_tower is not None:
            fits = "fits too" if self.with_tower <= self.limit else "does not fit"
            text += f"; with an image it takes {self.with_tower / 1e9:.1f} GB, which {fits}"
        return f"{text}."


def limit_of(size: str) -> tuple[str, int, mx.Dtype]:
    """The limit of a machine: "24GB" for a Mac of that size, "auto" for this machine.

    Returns:
        (its name, the bytes its GPU may take, the dtype it computes in)

    Raises:
        UserError: ``size`` is not a size.
    """
    if size.strip().lower() == AUTO:
        return "this machine", device.memory_limit(), device.compute_dtype(mx.bfloat16)
    match = _SIZE.fullmatch(size.strip())
    gigabytes = int(match[1]) if match else 0
    if not gigabytes:
        raise UserError(
            f"--fit takes the memory of a Mac, such as 24GB, or {AUTO} for this machine, "
            f"and got {size!r}."
        )
    return f"a Mac of {gigabytes} GB", gpu_memory(gigabytes), mx.bfloat16


def fit(config: ModelConfig, size: str) -> Fit:
    """The largest recipe that fits a machine with FIT_CONTEXT tokens of context.

    Args:
        config: The model's config.
        size: The machine, as ``limit_of`` takes it.

    Raises:
        UserError: ``size`` is not a size, not even the smallest recipe fits, or the recipes do not
            divide the shapes.
    """
    where, limit, dtype = limit_of(size)
    needs = _needs(config, dtype)
    larger: tuple[str, int] | None = None
    for name in LADDER:
        memory = needs(name, False)
        if memory.total <= limit:
            with_tower = needs(name, True).total if config.vision else None
            return Fit(RECIPES[name], where, limit, context_of(config), memory, with_tower, larger)
        larger = (name, memory.total)
    smallest = needs(LADDER[-1], False)
    mac = smallest_mac(smallest.total)
    remedy = "no Mac of the table holds it"
    if mac:
        remedy = f"a Mac with {mac} GB is the smallest that holds it"
    raise UserError(
        f"No recipe fits: {LADDER[-1]}, the smallest, takes {smallest.total / 1e9:.1f} GB at "
        f"{context_of(config):,} tokens of context, and {where} allows {limit / 1e9:.1f} GB; "
        f"{remedy}, and --recipe makes one for another machine."
    )


def context_of(config: ModelConfig) -> int:
    """FIT_CONTEXT, or all the context a model has."""
    return min(FIT_CONTEXT, config.text.max_position_embeddings)


def would_fit(config: ModelConfig) -> str:
    """The part of an error about recipes: which one fits this machine, or that none does."""
    try:
        best = fit(config, AUTO)
    except UserError:
        return (
            "no recipe of this model fits this machine "
            "(`mlx-diffgemma estimate --macs` lists what fits which Mac)"
        )
    return (
        f"the recipe {best.recipe.name} would fit ({best.memory.total / 1e9:.1f} GB with "
        f"{best.context:,} tokens of context): take such a conversion, or make one from the "
        f"original with `mlx-diffgemma convert -q --fit {AUTO}`"
    )


def _needs(config: ModelConfig, dtype: mx.Dtype) -> Callable[[str, bool], RunMemory]:
    def count(name: str, tower: bool) -> RunMemory:
        return cost.run_memory(config, RECIPES[name], context_of(config), dtype, tower, PATCHES)

    return count
