"""Loads a model from a checkpoint folder.

Names, shapes and dtypes are checked before any weight is read.

>>> model = load_model(Path("diffusiongemma-26B-A4B-it-4bit"))
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_unflatten

from mlx_diffgemma.checkpoint.layouts import arrange, quantized_module
from mlx_diffgemma.device import check_memory, claim_process, compute_dtype, exact_float32
from mlx_diffgemma.errors import CheckpointWarning, UserError
from mlx_diffgemma.estimate.macs import would_fit
from mlx_diffgemma.files import read_json
from mlx_diffgemma.machine import check_machine
from mlx_diffgemma.media.images import BUDGETS
from mlx_diffgemma.model.config import ModelConfig
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.model.recipes import VISION, Quantization
from mlx_diffgemma.safetensors import DTYPES, INDEX, read_headers, read_tensors
from mlx_diffgemma.values import Values


def load_model(folder: Path, dtype: str | None = None) -> DiffusionGemma:
    """Load the model of a checkpoint folder.

    Packed weights stay packed.  Floating-point weights (norms, scales, matrices that are not
    quantised) are cast to the compute dtype.

    Args:
        folder: The folder.
        dtype: The compute dtype; None for the one that suits this machine.

    Raises:
        UserError: Something is wrong with the folder, and the message names the file or the tensor;
            or the model would not fit this machine's memory.
    """
    check_machine()
    claim_process()
    config = check_supported(folder)
    warn_of_low_attention(config, folder.name)
    checkpoint = arrange(read_headers(folder), config, str(folder))
    checkpoint.check_copies()
    model = quantized_module(checkpoint.config, checkpoint.precisions)
    tensors = checkpoint.tensors
    stored = tensors["model.decoder.norm.weight"].stored
    target = compute_dtype(DTYPES.get(stored.dtype, mx.bfloat16), dtype)
    if target == mx.float32:
        exact_float32()
    needed = sum(tensor.nbytes(target) for tensor in tensors.values())
    what = f"{folder.name} in {str(target).removeprefix('mlx.core.')}"
    check_memory(needed, what, lambda: would_fit(config))
    files = sorted({piece.stored.path for tensor in tensors.values() for piece in tensor.pieces})
    whole: dict[str, mx.array] = {}
    for path in files:
        whole.update(read_tensors(path)[0])
    # The tower stays unread until the first image, which may come on another thread.
    has_tower = any(name.startswith(VISION) for name in tensors)
    tower = _of_any_thread(files) if has_tower else {}
    # Tensors are read and cast one by one, and each original is dropped, so that the model is never
    # in memory twice.
    for name, tensor in tensors.items():
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
    """The config of a folder, which need not have weights yet.

    Raises:
        UserError: This package cannot run such a model, or it would not fit this machine.
    """
    config = ModelConfig.from_folder(folder)
    if config.quantization:
        Quantization.from_config(config.quantization)
    if config.image_tokens and config.image_tokens.budget not in BUDGETS:
        raise UserError(
            f"config.json: vision_soft_tokens_per_image is {config.image_tokens.budget}; an image "
            f"takes at most {', '.join(map(str, BUDGETS[:-1]))} or {BUDGETS[-1]}, so set one of these."
        )
    if (folder / INDEX).exists():
        metadata = Values(read_json(folder / INDEX), INDEX).part("metadata")
        size = metadata.number("total_size", 0, low=0.0)
        # On a CPU floating-point weights are held in float32, so the size of the files says little.
        check_memory(int(size) if on_gpu() else 0, folder.name, lambda: would_fit(config))
    return config


def on_gpu() -> bool:
    return bool(mx.default_device() == mx.gpu)


def warn_of_low_attention(config: ModelConfig, name: str) -> None:
    """Warn of conversions from before mlx-vlm's fix of June 2026.

    They hold everything at their lowest precision.  Source:
    https://github.com/Blaizzy/mlx-vlm/pull/1359
    """
    if not config.quantization or config.recipe:
        return
    quantization = Quantization.from_config(config.quantization)
    lowest = 16
    for index in range(len(config.text.layers)):
        for projection in ("q_proj", "k_proj", "o_proj"):
            path = f"model.decoder.layers.{index}.self_attn.{projection}"
            precision = quantization.overrides.get(path, quantization.default)
            if precision:
                lowest = min(lowest, precision.bits)
    if lowest < 8:
        warnings.warn(
            CheckpointWarning(
                f"{name} holds attention at {lowest} bits, as conversions from before mlx-vlm's "
                "fix of June 2026 do: canvases converge late or not at all. Download the current "
                "mlx-community conversion again (`hf download --force-download`), or make one "
                "with `mlx-diffgemma convert -q`."
            ),
            stacklevel=2,
        )


def _cast(value: mx.array, target: mx.Dtype) -> mx.array:
    return value.astype(target) if mx.issubdtype(value.dtype, mx.floating) else value


@functools.cache
def _shared_stream() -> mx.Stream:
    """A stream for all models that belongs to no thread.

    Other streams belong to the thread that made them, and so do the unevaluated arrays on them.
    ``DiffusionGemma.encode_image`` lets only one thread at a time use this stream.
    """
    return mx.new_thread_unsafe_stream(mx.cpu)


def _of_any_thread(files: Sequence[Path]) -> dict[str, mx.array]:
    """The tensors of these files, which any thread may read first."""
    tensors: dict[str, mx.array] = {}
    for path in files:
        tensors.update(read_tensors(path, _shared_stream())[0])
    return tensors
