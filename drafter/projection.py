"""What a drafter measured on one model would do for another on a chip one does not have: a projection, no measurement.

It takes from a record of ``draft evaluate`` what does not depend on the model's size (by what share the steps of a canvas fell, how
many passes of drafter and judge that took, how many tokens a forward gives left to right), and from
:mod:`mlx_diffgemma.estimate` what does: the multiply-adds and bytes of each pass at the ceilings of the chip.  That another model's
drafter guesses as well is an assumption; both shares that were measured are given, of all canvases and of the longest ones.

    >>> project(config, RECIPES["4bit"], CHIPS["M3 Max"], 512, record).drafted_as_all[26]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drafter.config import DrafterConfig
from drafter.run import DraftShape, macs
from mlx_diffgemma import cost
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.estimate import STEPS, Chip, estimate
from mlx_diffgemma.files import expand_path, read_json
from mlx_diffgemma.recipes import Recipe

HALF = 2  # bytes of a drafter's weight


@dataclass(frozen=True)
class Projection:
    """Tokens a second by steps a canvas: without a drafter, and with one if the steps fell as on ``all`` canvases of the record
    or as on its ``longest``; and left to right, plain and drafted.  What is plain is what ``estimate`` says without a record."""

    plain: dict[int, float]
    drafted_as_all: dict[int, float]
    drafted_as_longest: dict[int, float]
    causal: float
    causal_drafted: float


def read_record(path: Path) -> dict[str, Any]:
    """Errors: UserError for a file that is not there, or no record of ``draft evaluate`` with its part "ar"."""
    path = expand_path(path)
    if not path.is_file():
        raise UserError(f"There is no file {path}; `mlx-diffgemma draft evaluate --output-dir` writes one.")
    record = read_json(path)
    if not isinstance(record.get("ways"), list) or not isinstance(record.get("ar"), list):
        raise UserError(f"{path} is no record of `mlx-diffgemma draft evaluate` with the part ar; give its drafting.json.")
    return record


def project(config: ModelConfig, recipe: Recipe, chip: Chip, context: int, record: Mapping[str, Any]) -> Projection:
    """For a model of ``config`` and a drafter of the default shape for it, with sparse self-conditioning."""
    found, own = estimate(config, recipe, chip, context), DraftShape().config(config)
    rate, memory, length = chip.flops_share * chip.flops, chip.bandwidth_share * chip.bandwidth, config.canvas_length

    def causal(rows: float, head: bool) -> float:
        """Seconds of a causal pass of so many rows."""
        parts = ("attention", "scores", "dense_mlp", "experts") + (("head",) if head else ())
        return max(_read(config, recipe, rows, found.bytes["cache"]) / memory,
                   sum(found.flops[part] for part in parts) * rows / length / rate)

    def draft(rows: float) -> float:
        return max(HALF * _parameters(own) / memory, 2 * macs(own) * rows / rate)

    reference, drafter = ({way["name"]: way for way in record["ways"]}[name] for name in ("reference", "drafter"))
    # A commit counts as one more step, as it does in ``estimate``; a drafter may save some of them.
    commits = drafter["commits"] / reference["commits"] if reference["commits"] else 0.0
    passes = drafter["passes"] * draft(length)
    if drafter["judged_passes"]:
        passes += drafter["judged_passes"] * causal(drafter["judged_rows"] / drafter["judged_passes"] * length, head=True)

    def drafted(share: float) -> dict[int, float]:
        return {steps: length / ((steps * share + commits) * found.step_seconds + passes) for steps in STEPS}

    quick = {way["name"]: way for way in record["ar"] if not way["temperature"]}["drafted"]
    rows = quick["rows"] / quick["forwards"]
    block = causal(rows, head=True) + draft(rows)
    return Projection(
        plain=found.rates,
        drafted_as_all=drafted(drafter["steps"] / reference["steps"]), drafted_as_longest=drafted(drafter["longest_steps"]),
        causal=found.causal_rate, causal_drafted=quick["tokens"] / quick["forwards"] / block)


def _read(config: ModelConfig, recipe: Recipe, rows: float, cache: float) -> float:
    """Bytes that a pass of so many rows reads, were routing even."""
    sizes = cost.class_bytes(config, recipe)
    share = config.text.top_k_experts / config.text.num_experts
    return sum(sizes.values()) - sizes["experts"] * (1 - share) ** rows + cache


def _parameters(config: DrafterConfig) -> int:
    """Of its own that a pass reads; the rows of the target's head, which are stored as that is, are not among them."""
    return macs(config) - config.hidden_size * (config.head_size or config.vocab_size)
