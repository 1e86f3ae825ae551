"""Files that a run of training leaves behind, each there whole or not at all, and the state it goes on from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
from mlx.utils import tree_flatten, tree_unflatten

from mlx_diffgemma.errors import UserError


def write_safely(path: Path, tensors: dict[str, mx.array], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file that is there whole or not at all."""
    unfinished = path.with_name(f".{path.stem}.partial.safetensors")
    mx.save_safetensors(str(unfinished), tensors, metadata or {})
    unfinished.replace(path)


def write_state(path: Path, weights: Iterable[tuple[str, mx.array]], optimizer: optimizers.Optimizer, run: str,
                counters: Mapping[str, Any]) -> None:
    """``weights`` by name, the optimiser's state and the counters, in one file; ``run`` is the fingerprint of the run."""
    tensors = {f"weights.{name}": value for name, value in weights}
    tensors |= {f"optimizer.{name}": value for name, value in tree_flatten(optimizer.state)}
    write_safely(path, tensors, {"counters": json.dumps(counters), "run": run})


def read_state(path: Path, model: nn.Module, optimizer: optimizers.Optimizer, run: str) -> dict[str, Any]:
    """Put what ``write_state`` wrote back in place; the counters.  Errors: UserError for a damaged file or that of another run."""
    try:
        tensors, metadata = mx.load(str(path), return_metadata=True)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); start the run anew.") from None
    if metadata.get("run") != run:
        raise UserError(f"{path} belongs to a run with other options; start anew in another folder, or repeat those options.")
    weights, state = ([(name.removeprefix(kind), value) for name, value in tensors.items() if name.startswith(kind)]
                      for kind in ("weights.", "optimizer."))
    model.update(tree_unflatten(weights))
    optimizer.state = tree_unflatten(state)
    counters: dict[str, Any] = json.loads(metadata["counters"])
    return counters
