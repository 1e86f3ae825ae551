"""Formats a record of ``draft evaluate`` as a table and a plot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_diffgemma.files import replacing

COLUMNS = (
    "way",
    "score",
    "loss, points (at most, 95 %)",
    "steps a canvas",
    "all costs",
    "of the reference's",
    "the longest third's",
    "drafted tokens",
    "right",
    "begun anew",
    "same text",
    "drift x 1000",
    "variety",
)


def table(record: Mapping[str, Any]) -> str:
    """The configurations of a record as a Markdown table."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for way in record["ways"]:
        right = "-" if way["right"] is None else f"{way['right']:.0%}"
        lines.append(
            f"| {way['name']} | {way['score']:.1%} | {way['loss']:+.1f} ({way['loss_bound']:+.1f}) | {way['steps']:.2f} | "
            f"{way['cost']:.2f} | {way['ratio']:.2f} | {way['longest']:.2f} | {way['drafted']:.1f} | {right} | "
            f"{way['retries']:.1%} | {way['same']:.0%} | {1000 * way['drift']:.1f} | {way['variety']:.3f} |"
        )
    if "ar" in record:
        lines += [
            "",
            "| left to right | temperature | score | tokens an answer | forwards | rows |",
            "|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {way['name']} | {way['temperature']:g} | {way['score']:.1%} | {way['tokens']:.1f} | {way['forwards']:.1f} | "
            f"{way['rows']:.1f} |"
            for way in record["ar"]
        ]
    return "\n".join(lines)


def plot(record: Mapping[str, Any], path: Path) -> None:
    """Plot the oracle curve, and the cost and loss of each configuration.  This needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (axis, ways) = plt.subplots(1, 2, figsize=(12, 4.5))
    for kind in dict.fromkeys(point["wrong"] for point in record["oracle"]):
        own = [point for point in record["oracle"] if point["wrong"] == kind]
        axis.plot(
            [point["right"] for point in own],
            [point["steps"] for point in own],
            "o-",
            label=f"the rest {kind}",
        )
    axis.axhline(record["ways"][0]["steps"], color="grey", linestyle="--", label="reference")
    axis.set(
        xlabel="share of right positions in the draft",
        ylabel="denoising steps a canvas",
        ylim=(0, None),
    )
    axis.legend()
    for place, way in enumerate(reversed(record["ways"])):
        ways.barh(place, way["ratio"], color="tab:blue" if way["loss_bound"] < 2 else "tab:red")
    ways.set(
        yticks=range(len(record["ways"])),
        yticklabels=[way["name"] for way in reversed(record["ways"])],
        xlabel="cost of the reference's (red: may lose 2 points or more)",
    )
    ways.axvline(1, color="grey", linestyle="--")
    figure.tight_layout()
    with replacing(path) as file:
        figure.savefig(file, dpi=110, format="png")
    plt.close(figure)
