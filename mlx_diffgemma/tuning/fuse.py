"""Merge an adapter into the weights of its base model.

This is a conversion: it runs row by row and can be resumed.

>>> fuse("diffusiongemma-4bit", "adapters", "fused")  # changed weights are stored unquantised
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import mlx.core as mx

from mlx_diffgemma.checkpoint.convert import run_conversion
from mlx_diffgemma.checkpoint.layouts import CheckpointMap
from mlx_diffgemma.checkpoint.options import ConvertOptions
from mlx_diffgemma.checkpoint.outputs import Merge, Merger
from mlx_diffgemma.checkpoint.writer import Destination, Progress
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.files import expand_path
from mlx_diffgemma.tuning.adapters import Adapter, fingerprint


def fuse(
    model: str,
    adapter_path: str | Path = "adapters",
    save_path: str | Path = "fused_model",
    dequantize: bool = False,
    requantize: bool = False,
    dtype: str | None = None,
    upload_repo: str | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write a model with an adapter merged into its weights.

    The weights that the adapter changes are stored in a float dtype, so that the result answers as
    the model with its adapter does.

    Args:
        model: The base model.
        adapter_path: The folder of the adapter.
        save_path: The folder to write.
        dequantize: Store all weights unquantised.
        requantize: Quantise the changed weights as they were.  The result is smaller, and loses
            part of what was learnt.
        dtype: The float dtype.  None: that of the checkpoint.
        upload_repo: As in ``convert``.
        revision: As in ``convert``.
        overwrite: As in ``convert``.
        resume: As in ``convert``.
        progress: As in ``convert``.

    Returns:
        ``save_path``.

    Raises:
        UserError: Adapter, model or options cannot be used.
    """
    if dequantize and requantize:
        raise UserError("Either --dequantize or --requantize, not both at once.")
    adapter = Adapter.read(expand_path(adapter_path))
    options = ConvertOptions(dtype=dtype, dequantize=dequantize)
    destination = Destination.at(save_path, overwrite, resume, upload_repo)
    changes = merger(adapter, requantize, options)
    return run_conversion(model, revision, options, destination, changes, progress)


def merger(adapter: Adapter, requantize: bool, options: ConvertOptions) -> Merger:
    """The changes that an adapter makes to each matrix.

    Args:
        adapter: The adapter.
        requantize: Quantise the changed weights as they were.
        options: The options of the conversion.

    Returns:
        What the conversion needs to merge it.
    """

    def check(base: CheckpointMap, fused: Sequence[str]) -> None:
        layers = sum(name.endswith("router.scale") for name in base.tensors)
        adapter.check(fingerprint(lambda name: base.tensors[name].read_all(), layers), fused)

    command = " ".join(
        filter(
            None,
            [
                f"--adapter-path {adapter.folder.name}",
                "--requantize" if requantize else "",
                "--dequantize" if options.dequantize else "",
                f"--dtype {options.dtype}" if options.dtype else "",
            ],
        )
    )
    return Merger(str(adapter.folder), adapter.digest, _merges(adapter), check, command, requantize)


def _merges(adapter: Adapter) -> dict[str, Merge]:
    if adapter.options.fine_tune_type == "full":
        return {
            name.removesuffix(".weight"): Merge(value.shape, partial(_replace, value))
            for name, value in adapter.weights.items()
        }
    scale = adapter.options.lora_parameters["scale"]
    modules = dict[str, dict[str, mx.array]]()
    for name, value in adapter.weights.items():
        path, _, part = name.rpartition(".")
        modules.setdefault(path, {})[part] = value.astype(mx.float32)
    wanted = (
        {"lora_a", "lora_b", "m"}
        if adapter.options.fine_tune_type == "dora"
        else {"lora_a", "lora_b"}
    )
    for path, parts in modules.items():
        if set(parts) != wanted:
            raise UserError(
                f"{adapter.folder} holds {', '.join(sorted(parts))} for {path}, expected {', '.join(sorted(wanted))}; "
                "copy or train it again."
            )
    return {
        path: Merge(_shape(parts), partial(_add, parts, scale)) for path, parts in modules.items()
    }


def _shape(parts: Mapping[str, mx.array]) -> tuple[int, ...]:
    a = parts["lora_a"].shape
    b = parts["lora_b"].shape
    return (b[1], a[0]) if len(a) == 2 else (b[0], b[1], a[2])


def _replace(value: mx.array, rows: mx.array, start: int, stop: int) -> mx.array:
    return value.reshape(-1, rows.shape[-1])[start:stop].astype(mx.float32)


def _add(
    parts: Mapping[str, mx.array], scale: float, rows: mx.array, start: int, stop: int
) -> mx.array:
    """Add the low-rank update to some rows; with DoRA, also set their length.

    Experts count as one matrix: all their axes but the last are joined.

    Args:
        parts: The arrays of the adapter.
        scale: The factor of the update.
        rows: The rows.
        start: The number of the first row in the matrix.
        stop: The number after the last row.
    """
    a = parts["lora_a"]
    b = parts["lora_b"]
    if a.ndim == 3:  # [experts, rank, inputs] and [experts, outputs, rank]
        outputs = b.shape[1]
        first = start // outputs
        last = -(-stop // outputs)
        update = (b[first:last] @ a[first:last]).reshape(-1, rows.shape[-1])[
            start - first * outputs : stop - first * outputs
        ]
    else:  # mlx-lm's [inputs, rank] and [rank, outputs]
        update = b[:, start:stop].T @ a.T
    changed = rows + scale * update
    if "m" not in parts:
        return changed
    return changed * (parts["m"][start:stop] / mx.linalg.norm(changed, axis=1))[:, None]
