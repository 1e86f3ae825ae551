"""Project what a drafter that was measured on one model would do for another model and chip.

This is not a measurement.  A record of ``draft evaluate`` gives what does not depend on the size of
the model: the share by which the steps of a canvas fell, the passes of drafter and verifier that
this took, and the tokens a forward left to right.  :mod:`mlx_diffgemma.estimate.estimate` gives the
multiply-adds and bytes of each pass, at the ceilings of the chip.  The projection assumes that the
other model's drafter guesses equally well.  It is made with both measured shares: that of all
canvases and that of the longest ones.
    >>> project(config, RECIPES["4bit"], CHIPS["M3 Max"], 512, record).drafted_as_all[26]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drafter.config import DrafterConfig
from drafter.run import DraftShape, macs
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.estimate import cost
from mlx_diffgemma.estimate.estimate import STEPS, Chip, estimate
from mlx_diffgemma.files import expand_path, read_json
from mlx_diffgemma.model.config import ModelConfig
from mlx_diffgemma.model.recipes import Recipe

HALF = 2  # bytes of a weight of the drafter


@dataclass(frozen=True)
class Projection:
    """Tokens a second.

    Attributes:
        plain: Without a drafter, by steps a canvas; as ``estimate`` says.
        drafted_as_all: With a drafter, if the steps fall as on all canvases of the record.
        drafted_as_longest: The same, if they fall as on the longest canvases of the record.
        causal: Left to right, without a drafter.
        causal_drafted: Left to right, with a drafter.
    """

    plain: dict[int, float]
    drafted_as_all: dict[int, float]
    drafted_as_longest: dict[int, float]
    causal: float
    causal_drafted: float


def read_record(path: Path) -> dict[str, Any]:
    """Read a record of ``draft evaluate``.

    Raises:
        UserError: The file does not exist, or is no record with the part "ar".
    """
    path = expand_path(path)
    if not path.is_file():
        raise UserError(
            f"There is no file {path}; `mlx-diffgemma draft evaluate --output-dir` writes one."
        )
    record = read_json(path)
    if not isinstance(record.get("ways"), list) or not isinstance(record.get("ar"), list):
        raise UserError(
            f"{path} is no record of `mlx-diffgemma draft evaluate` with the part ar; give its drafting.json."
        )
    return record


def project(
    config: ModelConfig, recipe: Recipe, chip: Chip, context: int, record: Mapping[str, Any]
) -> Projection:
    """Project the speed of a model with a drafter of the default shape for it.

    Args:
        config: The model; its self-conditioning is sparse.
        recipe: How its weights are stored.
        chip: The chip.
        context: The tokens before the canvas.
        record: What ``draft evaluate`` measured on another model.

    Returns:
        Tokens a second.
    """
    target = estimate(config, recipe, chip, context)
    drafter_config = DraftShape().config(config)
    rate = chip.flops_share * chip.flops
    memory = chip.bandwidth_share * chip.bandwidth
    length = config.canvas_length

    def causal(rows: float, head: bool) -> float:
        """Seconds of a causal pass of ``rows`` rows."""
        parts = ("attention", "scores", "dense_mlp", "experts") + (("head",) if head else ())
        flops = sum(target.flops[part] for part in parts) * rows / length
        return max(_read(config, recipe, rows, target.bytes["cache"]) / memory, flops / rate)

    def draft(rows: float) -> float:
        return max(
            HALF * _parameters(drafter_config) / memory, 2 * macs(drafter_config) * rows / rate
        )

    ways = {way["name"]: way for way in record["ways"]}
    reference = ways["reference"]
    drafter = ways["drafter"]
    # A commit counts as one more step, as it does in ``estimate``; a drafter may save some of them.
    commits = drafter["commits"] / reference["commits"] if reference["commits"] else 0.0
    passes = drafter["passes"] * draft(length)
    if drafter["judged_passes"]:
        passes += drafter["judged_passes"] * causal(
            drafter["judged_rows"] / drafter["judged_passes"] * length, head=True
        )

    def drafted(share: float) -> dict[int, float]:
        rates = {}
        for steps in STEPS:
            seconds = (steps * share + commits) * target.step_seconds + passes
            rates[steps] = length / seconds
        return rates

    quick = {way["name"]: way for way in record["ar"] if not way["temperature"]}["drafted"]
    rows = quick["rows"] / quick["forwards"]
    block = causal(rows, head=True) + draft(rows)
    return Projection(
        plain=target.rates,
        drafted_as_all=drafted(drafter["steps"] / reference["steps"]),
        drafted_as_longest=drafted(drafter["longest_steps"]),
        causal=target.causal_rate,
        causal_drafted=quick["tokens"] / quick["forwards"] / block,
    )


def _read(config: ModelConfig, recipe: Recipe, rows: float, cache: float) -> float:
    """The bytes that a pass of ``rows`` rows reads if the router spreads rows evenly over the
    experts.

    Args:
        config: The model.
        recipe: How its weights are stored.
        rows: The rows of the pass.
        cache: The bytes of K/V that the pass reads.
    """
    sizes = cost.class_bytes(config, recipe)
    share = config.text.top_k_experts / config.text.num_experts
    return sum(sizes.values()) - sizes["experts"] * (1 - share) ** rows + cache


def _parameters(config: DrafterConfig) -> int:
    """The drafter's own parameters that a pass reads; the target's head is not counted."""
    return macs(config) - config.hidden_size * (config.head_size or config.vocab_size)
