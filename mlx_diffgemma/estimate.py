"""What a step will cost on hardware one does not have: work counted from the config, ceilings from a table or measured.

A denoising step takes at least as long as its bytes at the memory's rate and its FLOPs at the rate of the matrix units;
neither is ever reached, so both have a stated share.  These are floors of the arithmetic, not promises.

    >>> estimate(config, RECIPES["4bit"], CHIPS["M3 Max"], context=8192).step_seconds
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_diffgemma import cost
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.device import compute_dtype
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.files import read_json
from mlx_diffgemma.recipes import Recipe

STEPS = (8, 12, 16, 26, 48)  # steps a canvas for which a rate is stated; 26 is the mean seen in the wild
BANDWIDTH_SHARE = 0.85  # of the memory's rate that large reads reach


# What reports of left-to-right rates are about: all weights at 4 bits, a short prompt.
REPORTED_RECIPE, REPORTED_CONTEXT = "uniform-4bit", 1024


@dataclass(frozen=True)
class Chip:
    """Ceilings: ``bandwidth`` in bytes a second, ``flops`` a second at 16 bits, and the shares of these that large reads and
    quantised products reach; ``causal`` is a reported rate of the autoregressive Gemma 4 26B with all weights at 4 bits, tokens a
    second.  ``here``: it is the chip of the machine this runs on."""

    name: str
    bandwidth: float
    flops: float
    flops_share: float
    causal: float | None
    source: str
    bandwidth_share: float = BANDWIDTH_SHARE
    here: bool = False


def _chip(row: dict[str, Any]) -> Chip:
    reported = row.get("causal")
    source = f"bandwidth: {row['bandwidth_source']['name']}; TFLOPS: {row['tflops_source']['name']}"
    if reported:
        source += f"; left to right: {reported['source']}"
    return Chip(row["name"], row["bandwidth_gb_s"] * 1e9, row["tflops"] * 1e12, row["tflops_share"],
                reported and reported["tokens_per_second"], source)


CHIPS = {row["name"]: _chip(row) for row in read_json(Path(__file__).with_name("chips.json"))["chips"]}


@dataclass(frozen=True)
class Estimate:
    """One denoising step of a whole canvas; seconds, bytes and FLOPs.

    ``bytes`` by part: the weights that are read (of the experts those that at least one row chose, were routing even) and
    the K/V cache.  ``rates`` maps steps a canvas to tokens a second, the commit counted as one more step.  ``causal_rate``
    is the floor of left-to-right decoding with the same weights, and ``break_even`` the number of steps a canvas at which both are
    equally fast; ``reported`` is the chip's reported rate left to right where that is of such weights and so little context, and
    ``reported_break_even`` the steps against it.  ``memory`` counts no vision tower.
    """

    chip: Chip
    recipe: str
    context: int
    parameters: int
    active: int
    flops: dict[str, float]
    bytes: dict[str, float]
    bandwidth_seconds: float
    compute_seconds: float
    memory: int
    rates: dict[int, float]
    causal_rate: float
    break_even: float
    reported: float | None
    reported_break_even: float | None

    @property
    def step_seconds(self) -> float:
        return max(self.bandwidth_seconds, self.compute_seconds)

    @property
    def bound_by(self) -> str:
        return "bandwidth" if self.bandwidth_seconds > self.compute_seconds else "compute"

    def record(self) -> dict[str, Any]:
        return asdict(self) | {"step_seconds": self.step_seconds, "bound_by": self.bound_by}


def chip_named(name: str) -> Chip:
    """Errors: UserError for a chip that is not in the table."""
    found = {known.lower(): chip for known, chip in CHIPS.items()}
    key = " ".join(name.lower().split()).removeprefix("apple ")
    if key not in found:
        close = difflib.get_close_matches(key, found, n=1)
        raise UserError(f"Unknown chip {name!r}{f'; did you mean {found[close[0]].name!r}?' if close else ''} Known are "
                        f"{', '.join(CHIPS)}; on the machine itself, --measure needs no name.")
    return found[key]


def estimate(config: ModelConfig, recipe: Recipe, chip: Chip, context: int, sparse: bool = True) -> Estimate:
    """Of one step after ``context`` tokens; ``sparse`` leaves out the full-vocabulary product of self-conditioning.

    Errors: UserError for a context the model does not have, or a recipe that does not fit its shapes.
    """
    text = config.text
    if not 0 <= context <= text.max_position_embeddings:
        raise UserError(f"The context must lie between 0 and {text.max_position_embeddings:,} tokens, got {context:,}.")
    flops = cost.step_flops(config, context)
    if sparse:
        flops["self_conditioning"] -= 2.0 * config.canvas_length * text.hidden_size * text.vocab_size
    sizes = cost.class_bytes(config, recipe)
    weights = sum(sizes.values())
    full, sliding = cost.cache_bytes(text, element_size=2)
    cache = full * context + sliding * min(1.0, context / max(1, max(layer.window or 1 for layer in text.layers)))
    experts, share = sizes["experts"], text.top_k_experts / text.num_experts
    touched = experts * (1 - (1 - share) ** config.canvas_length)
    read = {**sizes, "experts": touched, "cache": cache}
    causal = weights - experts + share * experts + cache
    seconds = sum(read.values()) / (chip.bandwidth_share * chip.bandwidth)
    compute = sum(flops.values()) / (chip.flops_share * chip.flops)
    step = max(seconds, compute)
    causal_rate = chip.bandwidth_share * chip.bandwidth / causal
    reported = chip.causal if recipe.name == REPORTED_RECIPE and context <= REPORTED_CONTEXT else None
    dtype = compute_dtype(mx.bfloat16) if chip.here else mx.bfloat16
    return Estimate(
        chip=chip, recipe=recipe.name, context=context, parameters=(counts := cost.count_parameters(config))[0], active=counts[1],
        flops=flops, bytes=read, bandwidth_seconds=seconds, compute_seconds=compute,
        memory=cost.run_memory(config, recipe, context, dtype).total,
        rates={steps: config.canvas_length / ((steps + 1) * step) for steps in STEPS}, causal_rate=causal_rate,
        break_even=config.canvas_length / (step * causal_rate) - 1, reported=reported,
        reported_break_even=config.canvas_length / (step * reported) - 1 if reported else None,
    )


def measure() -> Chip:
    """This machine's own ceilings, in the dtype it computes in: a pass over a large array, and a square product."""
    dtype = mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16
    on_cpu = mx.default_device() == mx.cpu  # thousands of times slower, so less is enough
    block = mx.zeros(((128 if on_cpu else 512) * 2**20 // dtype.size,), dtype=dtype)
    mx.eval(block)
    bandwidth = 2 * block.nbytes / _best(lambda: block + 1)
    size = 512 if on_cpu else 4096
    a = mx.random.normal((size, size)).astype(dtype)
    mx.eval(a)
    flops = 2.0 * size**3 / _best(lambda: a @ a)
    name = str(mx.device_info().get("device_name", "this machine"))
    known = CHIPS.get(name.removeprefix("Apple "))
    # What was measured is reached already, so nothing is taken off.
    return Chip(f"{name}, measured", bandwidth, flops, 1.0, known.causal if known else None,
                f"measured in {str(dtype).removeprefix('mlx.core.')}", bandwidth_share=1.0, here=True)


def _best(run: Callable[[], mx.array], repeats: int = 5) -> float:
    times = []
    for _ in range(repeats + 1):  # the first warms up
        began = time.perf_counter()
        mx.eval(run())
        times.append(time.perf_counter() - began)
    return min(times[1:])


def this_chip() -> Chip | None:
    """The table's row of the machine this runs on."""
    found = CHIPS.get(str(mx.device_info().get("device_name", "")).removeprefix("Apple "))
    return found and replace(found, here=True)

