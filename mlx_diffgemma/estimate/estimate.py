"""A roofline estimate of the time of a step on other hardware.

The work is counted from the config.  The rates come from a table or a measurement.  A denoising
step takes at least the time to read its bytes at the memory bandwidth, and at least the time of its
FLOPs at the rate of the matrix units.  Neither rate is ever reached, so a stated share of it is
assumed.  The results are lower bounds, not promises.

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

from mlx_diffgemma.device import compute_dtype
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.estimate import cost
from mlx_diffgemma.files import read_json
from mlx_diffgemma.model.config import ModelConfig
from mlx_diffgemma.model.recipes import Recipe

STEPS = (8, 12, 16, 26, 48)  # steps a canvas for which rates are stated; users see 26 on average
BANDWIDTH_SHARE = 0.85  # the share of the memory bandwidth that large reads reach
# The conditions of reported left-to-right rates: all weights at 4 bits, a short prompt.
REPORTED_RECIPE = "uniform-4bit"
REPORTED_CONTEXT = 1024


@dataclass(frozen=True)
class Chip:
    """The rates of a chip.

    Args:
        name: The name of the chip.
        bandwidth: The memory's bytes a second.
        flops: FLOPs a second at 16 bits.
        flops_share: The share of these that quantised products reach.
        causal: A reported rate of the autoregressive Gemma 4 26B with all weights at 4 bits, in
            tokens a second; None if there is none.
        source: Where the numbers come from.
        bandwidth_share: The share of the bandwidth that large reads reach.
        here: Whether it is the chip of this machine.
    """

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
    return Chip(
        row["name"],
        row["bandwidth_gb_s"] * 1e9,
        row["tflops"] * 1e12,
        row["tflops_share"],
        reported and reported["tokens_per_second"],
        source,
    )


CHIPS = {
    row["name"]: _chip(row) for row in read_json(Path(__file__).with_name("chips.json"))["chips"]
}


@dataclass(frozen=True)
class Estimate:
    """One denoising step of a whole canvas, in seconds, bytes and FLOPs.

    Args:
        chip: The chip.
        recipe: The name of the recipe.
        context: The tokens before the canvas.
        parameters: The parameters of the text backbone.
        active: Those that are active in one row's forward.
        flops: FLOPs by part.
        bytes: The bytes that are read, by part: the weights and the K/V cache.  Of the experts,
            those that at least one row chose if routing were even.
        bandwidth_seconds: The time of the bytes.
        compute_seconds: The time of the FLOPs.
        memory: The bytes that an answer takes, without a vision tower.
        rates: Tokens a second by steps a canvas; the commit counts as one more step.
        causal_rate: The upper bound of left-to-right decoding with the same weights.
        break_even: The steps a canvas at which both are equally fast.
        reported: The chip's reported left-to-right rate, if it is for such weights and context.
        reported_break_even: The steps a canvas at which that rate is reached.
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
    """The chip with this name.  Raises UserError if it is not in the table."""
    chips = {chip.name.lower(): chip for chip in CHIPS.values()}
    key = " ".join(name.lower().split()).removeprefix("apple ")
    if key not in chips:
        close = difflib.get_close_matches(key, chips, n=1)
        hint = f"; did you mean {chips[close[0]].name!r}?" if close else "."
        raise UserError(
            f"Unknown chip {name!r}{hint} Known are {', '.join(CHIPS)}; "
            "on the machine itself, --measure needs no name."
        )
    return chips[key]


def estimate(
    config: ModelConfig, recipe: Recipe, chip: Chip, context: int, sparse: bool = True
) -> Estimate:
    """Estimate one denoising step.

    Args:
        config: The model's config.
        recipe: The recipe of its weights.
        chip: The chip.
        context: The tokens before the canvas.
        sparse: Whether self-conditioning leaves out its product over the full vocabulary.

    Raises:
        UserError: The context is longer than the model's, or the recipe does not fit the shapes.
    """
    text = config.text
    if not 0 <= context <= text.max_position_embeddings:
        raise UserError(
            f"The context must lie between 0 and {text.max_position_embeddings:,} tokens, "
            f"got {context:,}."
        )
    flops = cost.step_flops(config, context)
    if sparse:
        product = 2.0 * config.canvas_length * text.hidden_size * text.vocab_size
        flops["self_conditioning"] -= product
    sizes = cost.class_bytes(config, recipe)
    weights = sum(sizes.values())
    full, sliding = cost.cache_bytes(text, element_size=2)
    window = max(1, max(layer.window or 1 for layer in text.layers))
    cache = full * context + sliding * min(1.0, context / window)
    experts = sizes["experts"]
    share = text.top_k_experts / text.num_experts
    touched = experts * (1 - (1 - share) ** config.canvas_length)
    read = {**sizes, "experts": touched, "cache": cache}
    causal = weights - experts + share * experts + cache
    seconds = sum(read.values()) / (chip.bandwidth_share * chip.bandwidth)
    compute = sum(flops.values()) / (chip.flops_share * chip.flops)
    step = max(seconds, compute)
    causal_rate = chip.bandwidth_share * chip.bandwidth / causal
    applies = recipe.name == REPORTED_RECIPE and context <= REPORTED_CONTEXT
    reported = chip.causal if applies else None
    parameters, active = cost.count_parameters(config)
    dtype = compute_dtype(mx.bfloat16) if chip.here else mx.bfloat16
    return Estimate(
        chip=chip,
        recipe=recipe.name,
        context=context,
        parameters=parameters,
        active=active,
        flops=flops,
        bytes=read,
        bandwidth_seconds=seconds,
        compute_seconds=compute,
        memory=cost.run_memory(config, recipe, context, dtype).total,
        rates={steps: config.canvas_length / ((steps + 1) * step) for steps in STEPS},
        causal_rate=causal_rate,
        break_even=config.canvas_length / (step * causal_rate) - 1,
        reported=reported,
        reported_break_even=config.canvas_length / (step * reported) - 1 if reported else None,
    )


def measure() -> Chip:
    """Measure this machine in its compute dtype: a pass over a large array and a square product."""
    dtype = mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16
    on_cpu = mx.default_device() == mx.cpu  # thousands of times slower, so the sizes are smaller
    block = mx.zeros(((128 if on_cpu else 512) * 2**20 // dtype.size,), dtype=dtype)
    mx.eval(block)
    bandwidth = 2 * block.nbytes / _best(lambda: block + 1)
    size = 512 if on_cpu else 4096
    a = mx.random.normal((size, size)).astype(dtype)
    mx.eval(a)
    flops = 2.0 * size**3 / _best(lambda: a @ a)
    name = str(mx.device_info().get("device_name", "this machine"))
    listed = CHIPS.get(name.removeprefix("Apple "))
    return Chip(
        name=f"{name}, measured",
        bandwidth=bandwidth,
        flops=flops,
        flops_share=1.0,  # a measured rate has been reached
        causal=listed.causal if listed else None,
        source=f"measured in {str(dtype).removeprefix('mlx.core.')}",
        bandwidth_share=1.0,
        here=True,
    )


def _best(run: Callable[[], mx.array], repeats: int = 5) -> float:
    times = []
    for _ in range(repeats + 1):  # the first one is a warm-up
        began = time.perf_counter()
        mx.eval(run())
        times.append(time.perf_counter() - began)
    return min(times[1:])


def this_chip() -> Chip | None:
    """The chip of this machine, or None if the table does not have it."""
    name = str(mx.device_info().get("device_name", "")).removeprefix("Apple ")
    return replace(CHIPS[name], here=True) if name in CHIPS else None
