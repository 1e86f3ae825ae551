"""Which recipe fits which Mac, and how much context beside it.

    >>> longest_context(released_with_tower(), RECIPES["4bit"], gpu_memory(24), tower=False)
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from mlx_diffgemma import cost, device
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.cost import RunMemory
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.recipes import RECIPES, Recipe

MACS = (16, 18, 24, 32, 36, 48, 64, 96, 128)  # GB of memory of the Macs in the table
LADDER = ("8bit", "6bit", "5bit", "4bit", "3bit", "3bit-small")  # what --fit chooses from, the largest first
FIT_CONTEXT = 8192  # tokens that must fit beside a recipe that --fit chooses
PATCHES = 9 * 280  # of an image of the default 280 soft tokens, 3 x 3 patches each
AUTO = "auto"
_SIZE = re.compile(r"(\d+)\s*(?:gb|gib|g)?", re.IGNORECASE)


def gpu_memory(gigabytes: int) -> int:
    """Bytes that macOS lets the GPU of a Mac with so much memory take: two thirds up to 32 GB, three quarters above.

    This is Metal's recommendedMaxWorkingSetSize as users logged it, in MiB: 10,922.67 of 16 GB (llama-cpp-python issue 687),
    21,845.34 of 32 GB (ollama issue 434), 49,152 of 64 GB (llama.cpp issue 1870), 73,728 of 96 GB (llama.cpp issue 3213).
    `sudo sysctl iogpu.wired_limit_mb` raises it.
    """
    return gigabytes * 2**30 * 2 // 3 if gigabytes <= 32 else gigabytes * 2**30 * 3 // 4


def smallest_mac(needed: int) -> int | None:
    """GB of the smallest Mac of the table whose GPU may take so many bytes."""
    return next((mac for mac in MACS if needed <= gpu_memory(mac)), None)


def longest_context(config: ModelConfig, recipe: Recipe, limit: int, tower: bool) -> int:
    """The most tokens of context that fit ``limit`` bytes, in steps of 1,024; 0 where not even that many do.

    ``tower``: with the weights of the vision tower, and an image of 280 soft tokens.
    """
    empty = cost.run_memory(config, recipe, 0, mx.bfloat16, tower, PATCHES)

    def fits(step: int) -> bool:
        cache, work = cost.forward_bytes(config, 1024 * step, mx.bfloat16.size)
        return empty.weights + empty.tower + cache + max(work, empty.work) <= limit

    low, high = 0, config.text.max_position_embeddings // 1024
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return 1024 * low


def table(config: ModelConfig) -> dict[str, dict[int, tuple[int, int]]]:
    """For each recipe and Mac the longest context without and with the tower."""
    return {recipe.name: {mac: (longest_context(config, recipe, gpu_memory(mac), tower=False),
                                longest_context(config, recipe, gpu_memory(mac), tower=True)) for mac in MACS}
            for recipe in RECIPES.values()}


def cell(contexts: tuple[int, int]) -> str:
    """As the table shows it: tokens in thousands, without and with the tower, or one figure for both."""
    words = [f"{tokens // 1024}k" if tokens else "–" for tokens in contexts]
    return "/".join(dict.fromkeys(words))


@dataclass(frozen=True)
class Fit:
    """The recipe that fits a limit, and why: the memory it takes, and that of the next larger one, which does not fit."""

    recipe: Recipe
    where: str
    limit: int
    context: int
    memory: RunMemory
    with_tower: int | None
    larger: tuple[str, int] | None

    def __str__(self) -> str:
        text = (f"{self.recipe.name} takes {self.memory.total / 1e9:.1f} GB at {self.context:,} tokens of context, and "
                f"{self.where} allows {self.limit / 1e9:.1f} GB")
        if self.larger:
            text += f"; {self.larger[0]} would take {self.larger[1] / 1e9:.1f} GB"
        if self.with_tower is not None:
            fits = "fits too" if self.with_tower <= self.limit else "does not fit"
            text += f"; with an image it takes {self.with_tower / 1e9:.1f} GB, which {fits}"
        return f"{text}."


def limit_of(size: str) -> tuple[str, int, mx.Dtype]:
    """(its name, bytes the GPU may take, the dtype it computes in) of "24GB", or of this machine for "auto".

    Errors: UserError for what is no size.
    """
    if size.strip().lower() == AUTO:
        return "this machine", device.memory_limit(), device.compute_dtype(mx.bfloat16)
    found = _SIZE.fullmatch(size.strip())
    if not found or not int(found[1]):
        raise UserError(f"--fit takes the memory of a Mac, such as 24GB, or {AUTO} for this machine, and got {size!r}.")
    return f"a Mac of {int(found[1])} GB", gpu_memory(int(found[1])), mx.bfloat16


def fit(config: ModelConfig, size: str) -> Fit:
    """The largest recipe of the ladder that fits a Mac or this machine with FIT_CONTEXT tokens of context.

    Errors: UserError for what is no size, where not even the smallest recipe fits, or for shapes the recipes do not divide.
    """
    where, limit, dtype = limit_of(size)
    needs = _needs(config, dtype)
    larger: tuple[str, int] | None = None
    for name in LADDER:
        memory = needs(name, False)
        if memory.total <= limit:
            seen = needs(name, True).total if config.vision else None
            return Fit(RECIPES[name], where, limit, context_of(config), memory, seen, larger)
        larger = name, memory.total
    smallest = needs(LADDER[-1], False)
    mac = smallest_mac(smallest.total)
    remedy = f"a Mac with {mac} GB is the smallest that holds it" if mac else "no Mac of the table holds it"
    raise UserError(f"No recipe fits: {LADDER[-1]}, the smallest, takes {smallest.total / 1e9:.1f} GB at "
                    f"{context_of(config):,} tokens of context, and {where} allows {limit / 1e9:.1f} GB; {remedy}, and "
                    "--recipe makes one for another machine.")


def context_of(config: ModelConfig) -> int:
    """FIT_CONTEXT, or all the context a model has."""
    return min(FIT_CONTEXT, config.text.max_position_embeddings)


def would_fit(config: ModelConfig) -> str:
    """What a refusal says about recipes: which one fits this machine, or that none does."""
    try:
        found = fit(config, AUTO)
    except UserError:
        return "no recipe of this model fits this machine (`mlx-diffgemma estimate --macs` lists what fits which Mac)"
    return (f"the recipe {found.recipe.name} would fit ({found.memory.total / 1e9:.1f} GB with {found.context:,} tokens of "
            f"context): take such a conversion, or make one from the original with `mlx-diffgemma convert -q --fit {AUTO}`")


def _needs(config: ModelConfig, dtype: mx.Dtype) -> Callable[[str, bool], RunMemory]:
    def count(name: str, tower: bool) -> RunMemory:
        return cost.run_memory(config, RECIPES[name], context_of(config), dtype, tower, PATCHES)

    return count
