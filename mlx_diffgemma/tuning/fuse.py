"""Works an adapter into the weights of its base, as a conversion: row by row, with the same care and the same resumption.

    >>> fuse("diffusiongemma-4bit", "adapters", "fused")       # what the adapter changed is stored without quantisation
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import mlx.core as mx

from mlx_diffgemma.convert import ConvertOptions, Merge, Merger, Progress, carry_out
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.files import expand_path
from mlx_diffgemma.layouts import Arrangement
from mlx_diffgemma.tuning.adapters import Adapter, fingerprint


def fuse(model: str, adapter_path: str | Path = "adapters", save_path: str | Path = "fused_model", dequantize: bool = False,
         requantize: bool = False, dtype: str | None = None, upload_repo: str | None = None, revision: str | None = None,
         overwrite: bool = False, resume: bool = False, progress: Progress | None = None) -> Path:
    """Write ``model`` with the adapter in ``adapter_path`` worked in to ``save_path``, which is returned.

    What the adapter changes is stored in the checkpoint's float dtype (or ``dtype``), so that the result answers as the model
    with its adapter does; ``requantize`` gives it back the precision it had, which is smaller and loses part of what was learnt;
    ``dequantize`` stores everything unquantised.  Other options as in ``convert``.  Errors: UserError.
    """
    if dequantize and requantize:
        raise UserError("Either --dequantize or --requantize, not both at once.")
    adapter = Adapter.read(expand_path(adapter_path))
    options = ConvertOptions(dtype=dtype, dequantize=dequantize)
    return carry_out(model, save_path, options, merger(adapter, requantize, options), upload_repo, revision, overwrite, resume,
                     progress)


def merger(adapter: Adapter, requantize: bool, options: ConvertOptions) -> Merger:
    """What ``adapter`` does to each matrix."""
    def check(base: Arrangement, fused: Sequence[str]) -> None:
        layers = sum(name.endswith("router.scale") for name in base.tensors)
        adapter.check(fingerprint(lambda name: base.tensors[name].read_all(), layers), fused)

    command = " ".join(filter(None, [f"--adapter-path {adapter.folder.name}", "--requantize" if requantize else "",
                                     "--dequantize" if options.dequantize else "",
                                     f"--dtype {options.dtype}" if options.dtype else ""]))
    return Merger(str(adapter.folder), adapter.digest, _merges(adapter), check, command, requantize)


def _merges(adapter: Adapter) -> dict[str, Merge]:
    if adapter.options.fine_tune_type == "full":
        return {name.removesuffix(".weight"): Merge(value.shape, partial(_replace, value))
                for name, value in adapter.weights.items()}
    scale, modules = adapter.options.lora_parameters["scale"], dict[str, dict[str, mx.array]]()
    for name, value in adapter.weights.items():
        path, _, part = name.rpartition(".")
        modules.setdefault(path, {})[part] = value.astype(mx.float32)
    wanted = {"lora_a", "lora_b", "m"} if adapter.options.fine_tune_type == "dora" else {"lora_a", "lora_b"}
    for path, parts in modules.items():
        if set(parts) != wanted:
            raise UserError(f"{adapter.folder} holds {', '.join(sorted(parts))} for {path}, expected {', '.join(sorted(wanted))}; "
                            "copy or train it again.")
    return {path: Merge(_shape(parts), partial(_add, parts, scale)) for path, parts in modules.items()}


def _shape(parts: Mapping[str, mx.array]) -> tuple[int, ...]:
    a, b = parts["lora_a"].shape, parts["lora_b"].shape
    return (b[1], a[0]) if len(a) == 2 else (b[0], b[1], a[2])


def _replace(value: mx.array, rows: mx.array, start: int, stop: int) -> mx.array:
    return value.reshape(-1, rows.shape[-1])[start:stop].astype(mx.float32)


def _add(parts: Mapping[str, mx.array], scale: float, rows: mx.array, start: int, stop: int) -> mx.array:
    """The low-rank update to rows start to stop, and with DoRA their new length; of experts all axes but the last are one."""
    a, b = parts["lora_a"], parts["lora_b"]
    if a.ndim == 3:  # [experts, rank, inputs] and [experts, outputs, rank]
        outputs = b.shape[1]
        first, last = start // outputs, -(-stop // outputs)
        update = (b[first:last] @ a[first:last]).reshape(-1, rows.shape[-1])[start - first * outputs : stop - first * outputs]
    else:  # mlx-lm's [inputs, rank] and [rank, outputs]
        update = b[:, start:stop].T @ a.T
    changed = rows + scale * update
    if "m" not in parts:
        return changed
    return changed * (parts["m"][start:stop] / mx.linalg.norm(changed, axis=1))[:, None]
