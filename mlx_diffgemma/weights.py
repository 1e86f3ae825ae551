"""From a checkpoint folder to a model: names, shapes and dtypes are checked before anything is read.

    >>> model = load_model(Path("diffusiongemma-26B-A4B-it-4bit"))
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_unflatten

from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.device import check_memory, claim_process, compute_dtype, exact_float32
from mlx_diffgemma.errors import CheckpointWarning, UserError
from mlx_diffgemma.files import read_json
from mlx_diffgemma.images import BUDGETS
from mlx_diffgemma.layouts import arrange, quantized_module
from mlx_diffgemma.machine import check_machine
from mlx_diffgemma.macs import would_fit
from mlx_diffgemma.model import DiffusionGemma
from mlx_diffgemma.recipes import VISION, Quantization
from mlx_diffgemma.storage import DTYPES, INDEX, read_headers, read_tensors
from mlx_diffgemma.values import Values


def load_model(folder: Path, dtype: str | None = None) -> DiffusionGemma:
    """The model of a checkpoint folder, its weights read lazily and cast to the compute dtype.

    Packed weights stay packed; what is floating (norms, scales, matrices that are not quantised) is cast.  Errors:
    UserError for anything wrong with the folder, naming the file or the tensor; and when the model would not fit this
    machine's memory.
    """
    check_machine()
    claim_process()
    config = check_supported(folder)
    warn_of_low_attention(config, folder.name)
    found = arrange(read_headers(folder), config, str(folder))
    found.check_copies()
    model = quantized_module(found.config, found.precisions)
    stored = found.tensors["model.decoder.norm.weight"].stored
    target = compute_dtype(DTYPES.get(stored.dtype, mx.bfloat16), dtype)
    if target == mx.float32:
        exact_float32()
    needed = sum(tensor.nbytes(target) for tensor in found.tensors.values())
    what = f"{folder.name} in {str(target).removeprefix('mlx.core.')}"
    check_memory(needed, what, lambda: would_fit(config))
    files = sorted({piece.stored.path for tensor in found.tensors.values() for piece in tensor.pieces})
    whole = {name: array for path in files for name, array in read_tensors(path)[0].items()}
    # The tower stays unread until the first image, which may come on another thread.
    tower = _of_any_thread(files) if any(name.startswith(VISION) for name in found.tensors) else {}
    # Read and cast tensor by tensor, dropping each original, so that at no time two copies of the model are held.
    for name, tensor in found.tensors.items():
        if name.startswith(VISION):
            with mx.stream(_shared_stream()):
                value = _cast(tensor.assemble(tower), target)
        else:
            value = _cast(tensor.assemble(whole), target)
            mx.eval(value)
        for piece in tensor.pieces:
            whole.pop(piece.stored.name, None)
            tower.pop(piece.stored.name, None)
        model.update(tree_unflatten([(name, value)]))
    model.join()
    model.eval()
    return model


def check_supported(folder: Path) -> ModelConfig:
    """The config of a folder that may hold no weights yet.  Errors: UserError for what this package cannot run."""
    config = ModelConfig.from_folder(folder)
    if config.quantization:
        Quantization.from_config(config.quantization)
    if config.image_tokens and config.image_tokens.budget not in BUDGETS:
        raise UserError(f"config.json: vision_soft_tokens_per_image is {config.image_tokens.budget}; an image takes at most "
                        f"{', '.join(map(str, BUDGETS[:-1]))} or {BUDGETS[-1]}, so set one of these.")
    if (folder / INDEX).exists():
        size = Values(read_json(folder / INDEX), INDEX).part("metadata").number("total_size", 0, low=0.0)
        # On a CPU what is floating is held in float32, which the size of the files does not tell.
        check_memory(int(size) if on_gpu() else 0, folder.name, lambda: would_fit(config))
    return config


def on_gpu() -> bool:
    return bool(mx.default_device() == mx.gpu)


def warn_of_low_attention(config: ModelConfig, name: str) -> None:
    """Conversions made before mlx-vlm's fix of June 2026 hold everything at their lowest precision.

    Source: https://github.com/Blaizzy/mlx-vlm/pull/1359
    """
    if not config.quantization or config.recipe:
        return
    quantization = Quantization.from_config(config.quantization)
    paths = [f"model.decoder.layers.{index}.self_attn.{name}"
             for index in range(len(config.text.layers)) for name in ("q_proj", "k_proj", "o_proj")]
    lowest = min((p.bits for path in paths if (p := quantization.overrides.get(path, quantization.default))), default=16)
    if lowest < 8:
        warnings.warn(CheckpointWarning(
            f"{name} holds attention at {lowest} bits, as conversions from before mlx-vlm's fix of June 2026 do: canvases converge "
            "late or not at all. Download the current mlx-community conversion again (`hf download --force-download`), or make one "
            "with `mlx-diffgemma convert -q`."), stacklevel=2)


def _cast(value: mx.array, target: mx.Dtype) -> mx.array:
    return value.astype(target) if mx.issubdtype(value.dtype, mx.floating) else value


@functools.cache
def _shared_stream() -> mx.Stream:
    """A stream that belongs to no thread, where others belong to the one that made them, as do arrays that are still to be
    computed on them.  One for all models; ``DiffusionGemma.see`` takes care that only one thread at a time uses it."""
    return mx.new_thread_unsafe_stream(mx.cpu)


def _of_any_thread(files: Sequence[Path]) -> dict[str, mx.array]:
    """The tensors of these files, to be read by whichever thread needs them first."""
    return {name: array for path in files for name, array in read_tensors(path, _shared_stream())[0].items()}
