"""`mlx-diffgemma info`: what a checkpoint is."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.table import Table

from mlx_diffgemma import nano
from mlx_diffgemma.checkpoint import hub
from mlx_diffgemma.checkpoint.info import CONTEXT, CheckpointInfo, inspect
from mlx_diffgemma.cli.options import Json, Revision
from mlx_diffgemma.cli.output import print_table
from mlx_diffgemma.model.config import ModelConfig


def info(
    model: Annotated[
        str, typer.Argument(help=f"'{nano.NAME}', a folder, or a Hub id.")
    ] = nano.NAME,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Print what a checkpoint is.

    Shown are its shapes, parameters, memory and quantisation.
    """
    inspected = inspect(hub.resolve(model, revision, before_weights=ModelConfig.from_folder))
    if as_json:
        print(json.dumps(inspected.record()))
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in (*_sizes(inspected), *_shapes(inspected)):
        table.add_row(name, value)
    print_table(table)


def _sizes(inspected: CheckpointInfo) -> list[tuple[str, str]]:
    """Names and values: where the checkpoint is, and how much it takes."""
    dtypes = ", ".join(f"{dtype} {size / 1e9:,.3f}" for dtype, size in inspected.dtypes.items())
    return [
        ("folder", str(inspected.folder)),
        (
            "parameters",
            f"{inspected.parameters / 1e6:,.1f} M, {inspected.active / 1e6:,.1f} M active",
        ),
        ("stored", f"{inspected.stored_bytes / 1e9:,.3f} GB ({dtypes})"),
        (
            "needs here",
            f"{inspected.memory_needed / 1e9:,.3g} GB with {CONTEXT:,} tokens of context; this "
            f"machine allows {inspected.memory_limit / 1e9:,.1f} GB",
        ),
        ("quantisation", inspected.quantisation),
        ("bits per weight", f"{inspected.bits_per_weight:.2f}"),
    ]


def _shapes(inspected: CheckpointInfo) -> list[tuple[str, str]]:
    """Names and values of the shapes of the network."""
    text = inspected.config.text
    kinds = "".join("F" if layer.window is None else "s" for layer in text.layers)
    heads = ", ".join(
        f"{layer.num_kv_heads} x {layer.head_dim} {layer.kind.split('_')[0]}"
        for layer in dict.fromkeys(text.layers)
    )
    return [
        ("layers", f"{len(text.layers)}: {kinds} (s sliding, F full)"),
        (
            "hidden / dense MLP / expert",
            f"{text.hidden_size} / {text.intermediate_size} / {text.moe_intermediate_size}",
        ),
        ("experts", f"{text.num_experts}, {text.top_k_experts} a row"),
        ("attention heads", f"{text.num_attention_heads}; KV {heads}"),
        ("sliding window", str(max((layer.window or 0) for layer in text.layers))),
        ("vocabulary", f"{text.vocab_size:,}"),
        (
            "canvas / context",
            f"{inspected.config.canvas_length} / {text.max_position_embeddings:,} tokens",
        ),
        (
            "K/V cache, 16 bits",
            f"{inspected.cache_bytes_per_token / 1e3:,.1f} KB a token + "
            f"{inspected.sliding_cache_bytes / 1e6:,.1f} MB",
        ),
        ("images", "yes" if inspected.config.vision else "no"),
    ]
