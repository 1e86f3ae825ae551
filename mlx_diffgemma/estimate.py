"""What a step will cost on hardware one does not have: work counted from the config, ceilings from a table or measured.

A denoising step takes at least as long as its bytes at the memory's rate and its FLOPs at the rate of the matrix units;
neither is ever reached, so both have a stated share.  These are floors of the arithmetic, not promises.

    >>> estimate(config, RECIPES["4bit"], CHIPS["M3 Max"], context=8192).step_seconds
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx

from mlx_diffgemma import cost
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.recipes import Recipe

STEPS = (8, 12, 16, 26, 48)  # steps a canvas for which a rate is stated; 26 is the mean seen in the wild
BANDWIDTH_SHARE = 0.85  # of the memory's rate that large reads reach


@dataclass(frozen=True)
class Chip:
    """Ceilings: ``bandwidth`` in bytes a second, ``flops`` a second at 16 bits, and the share of these that quantised
    products reach; ``causal`` is a reported rate of the autoregressive Gemma 4 26B at 4 bits, tokens a second."""

    name: str
    bandwidth: float
    flops: float
    flops_share: float
    causal: float | None
    source: str


_APPLE = "Apple's announcement"
_SPEC = "vendor-class figures"
CHIPS = {chip.name: chip for chip in (
    Chip("M1", 68e9, 2.6e12, 0.6, None, _APPLE),
    Chip("M1 Pro", 200e9, 5.2e12, 0.6, None, _APPLE),
    Chip("M1 Max", 400e9, 10.4e12, 0.6, None, _APPLE),
    Chip("M1 Ultra", 800e9, 21e12, 0.6, 71.3, f"{_APPLE}; causal: mlxcel #218"),
    Chip("M2", 100e9, 3.6e12, 0.6, None, _APPLE),
    Chip("M2 Pro", 200e9, 6.8e12, 0.6, None, _APPLE),
    Chip("M2 Max", 400e9, 13.6e12, 0.6, None, _APPLE),
    Chip("M2 Ultra", 800e9, 27.2e12, 0.6, None, _APPLE),
    Chip("M3 Pro", 150e9, 6.4e12, 0.6, None, f"{_SPEC}; MLX's quantised product reaches 4.0 TFLOP/s there (diffgemma)"),
    Chip("M3 Max", 400e9, 14.2e12, 0.6, 56, f"{_SPEC}; causal: user report"),
    Chip("M3 Ultra", 819e9, 28.4e12, 0.7, 92, f"{_SPEC}; 20.5 TFLOP/s measured; causal: Rapid-MLX"),
    Chip("M4 Max", 546e9, 18.4e12, 0.6, None, _SPEC),
    Chip("M5 Pro", 307e9, 31e12, 0.5, 85, "1.54 TFLOP/s a core measured on the base M5 (mlx #4023); causal: llmfit"),
    Chip("M5 Max", 614e9, 62e12, 0.5, 142, "1.54 TFLOP/s a core measured on the base M5 (mlx #4023); causal: llmfit"),
    Chip("H200", 4.8e12, 989e12, 0.5, None, "NVIDIA's data sheet, dense bf16"),
)}


@dataclass(frozen=True)
class Estimate:
    """One denoising step of a whole canvas; seconds, bytes and FLOPs.

    ``bytes`` by part: the weights that are read (of the experts those that at least one row chose, were routing even) and
    the K/V cache.  ``rates`` maps steps a canvas to tokens a second, the commit counted as one more step.  ``causal_rate``
    is the floor of left-to-right decoding with the same weights, and ``break_even`` the number of steps a canvas at which both are
    equally fast; ``reported_break_even`` the same against the chip's reported rate.
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
    key = name.lower().removeprefix("apple ").strip()
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
    seconds = sum(read.values()) / (BANDWIDTH_SHARE * chip.bandwidth)
    compute = sum(flops.values()) / (chip.flops_share * chip.flops)
    step = max(seconds, compute)
    causal_rate = BANDWIDTH_SHARE * chip.bandwidth / causal
    return Estimate(
        chip=chip, recipe=recipe.name, context=context, parameters=(counts := cost.count_parameters(config))[0], active=counts[1],
        flops=flops, bytes=read, bandwidth_seconds=seconds, compute_seconds=compute,
        memory=cost.run_bytes(config, int(weights), context, 2),
        rates={steps: config.canvas_length / ((steps + 1) * step) for steps in STEPS}, causal_rate=causal_rate,
        break_even=config.canvas_length / (step * causal_rate) - 1,
        reported_break_even=config.canvas_length / (step * chip.causal) - 1 if chip.causal else None,
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
    # What was measured is reached already, so nothing is taken off for compute.
    return Chip(f"{name}, measured", bandwidth / BANDWIDTH_SHARE, flops, 1.0, known.causal if known else None,
                f"measured in {str(dtype).removeprefix('mlx.core.')}")


def _best(run: Callable[[], mx.array], repeats: int = 5) -> float:
    times = []
    for _ in range(repeats + 1):  # the first warms up
        began = time.perf_counter()
        mx.eval(run())
        times.append(time.perf_counter() - began)
    return min(times[1:])


def this_chip() -> Chip | None:
    """The table's row of the machine this runs on."""
    return CHIPS.get(str(mx.device_info().get("device_name", "")).removeprefix("Apple "))

