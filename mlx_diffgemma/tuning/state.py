"""The state from which an interrupted training run continues."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
from mlx.utils import tree_flatten, tree_unflatten

from mlx_diffgemma.bounded_json import parse_json
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.safetensors import read_tensors, write_tensors

Named = Iterable[tuple[str, mx.array]]


def write_state(
    path: Path,
    weights: Named,
    optimizer: optimizers.Optimizer,
    run: Mapping[str, Any],
    counters: Mapping[str, Any],
    gradients: Named = (),
) -> None:
    """Write everything that a run needs to continue into one file.

    Args:
        path: The file.
        weights: The trained weights, by name.
        optimizer: Its state is written.
        run: What decides the run's result, by name.
        counters: What ``read_state`` returns.
        gradients: The sum of the gradients since the optimiser's last step.

    Raises:
        UserError: The file cannot be written.
    """
    tensors = {f"weights.{name}": value for name, value in weights}
    tensors |= {f"optimizer.{name}": value for name, value in tree_flatten(optimizer.state)}
    tensors |= {f"gradients.{name}": value for name, value in gradients}
    write_tensors(path, tensors, {"counters": json.dumps(counters), "run": _as_text(run)})


def read_state(
    path: Path, model: nn.Module, optimizer: optimizers.Optimizer, run: Mapping[str, Any]
) -> tuple[dict[str, Any], list[tuple[str, mx.array]]]:
    """Restore the weights and the optimiser's state.

    Args:
        path: The file that ``write_state`` wrote.
        model: Gets the weights.
        optimizer: Gets its state.
        run: What decides the result of the run that is to continue, by name.

    Returns:
        (the counters, the gradients) that were written.

    Raises:
        UserError: The file is damaged, or belongs to a run that differs; the message names the
            differences.
    """
    try:
        tensors, metadata = read_tensors(path)
    except UserError as error:
        raise UserError(f"{error} Or begin the run again in another folder.") from None
    if metadata.get("run") != _as_text(run):
        raise UserError(
            f"{path} belongs to a run with other options{_difference(metadata.get('run', ''), run)}; begin again in "
            "another folder, or repeat those options."
        )
    weights, state, gradients = (
        [
            (name.removeprefix(kind), value)
            for name, value in tensors.items()
            if name.startswith(kind)
        ]
        for kind in ("weights.", "optimizer.", "gradients.")
    )
    counters = parse_json(metadata.get("counters", ""), f"The record in {path}")
    model.update(tree_unflatten(weights))
    optimizer.state = tree_unflatten(state)
    return counters, gradients


def _as_text(run: Mapping[str, Any]) -> str:
    return json.dumps(run, sort_keys=True, default=str)


def _difference(written: str, run: Mapping[str, Any]) -> str:
    """The differences between two runs, for a message."""
    try:
        before = parse_json(written, "")
    except UserError:
        before = None
    if not isinstance(before, dict):
        return ", or of an earlier version"
    now = parse_json(_as_text(run), "")
    names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    shown = [_shown(name, before.get(name), now.get(name)) for name in names]
    return f" ({', '.join(shown)})"


def _shown(name: str, before: object, now: object) -> str:
    long = max(len(str(before)), len(str(now))) > 40
    return name if long else f"{name} was {before}, is {now}"
