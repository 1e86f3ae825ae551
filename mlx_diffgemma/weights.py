"""From a checkpoint folder to a model: names, shapes and dtype are checked, tensor by tensor, before anything runs.

    >>> model = load_model(Path("diffusiongemma-26B-A4B-it"))
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from mlx_diffgemma.config import ModelConfig, read_json
from mlx_diffgemma.device import check_memory, compute_dtype
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.model import DiffusionGemma

INDEX = "model.safetensors.index.json"
ENCODER = "model.encoder.language_model."
VISION = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")


def load_model(folder: Path, dtype: str | None = None) -> DiffusionGemma:
    """The model of a checkpoint folder, its weights read lazily and cast to the compute dtype.

    Errors: UserError for anything wrong with the folder, naming the file or the tensor; and when the model would not fit
    this machine's memory.
    """
    config = check_supported(folder)
    model = DiffusionGemma(config)
    expected = {key: value.shape for key, value in tree_flatten(model.parameters())}
    weights = collect(folder, expected)
    target = compute_dtype(weights["model.decoder.embed_tokens.weight"].dtype, dtype)
    check_memory(sum(value.size for value in weights.values()) * target.size, f"{folder.name} in {target}")
    # Read and cast tensor by tensor, dropping each original, so that at no time two copies of the model are held.
    for key in expected:
        value = weights.pop(key).astype(target)
        mx.eval(value)
        model.update(tree_unflatten([(key, value)]))
    model.eval()
    return model


def check_supported(folder: Path) -> ModelConfig:
    """The config of a folder that may hold no weights yet.  Errors: UserError for what this package cannot run."""
    config = ModelConfig.from_folder(folder)
    if config.quantization:
        raise UserError(f"{folder.name} is quantised ({config.quantization.get('bits', '?')} bits); quantised checkpoints "
                        "are not supported yet, use a bf16 one.")
    if (folder / INDEX).exists():
        size = (read_json(folder / INDEX).get("metadata") or {}).get("total_size", 0)
        check_memory(int(size) if mx.default_device() == mx.gpu else 0, folder.name)
    return config


def collect(folder: Path, expected: Mapping[str, tuple[int, ...]]) -> dict[str, mx.array]:
    """The tensors of ``folder`` under the model's names, checked against the ``expected`` shapes.

    Errors: UserError naming the first missing, unexpected or wrongly shaped tensor.
    """
    weights: dict[str, mx.array] = {}
    copies: dict[str, mx.array] = {}
    for key, value in read_tensors(folder):
        name = model_name(key)
        if name is None:
            continue
        if name.startswith(ENCODER) and name not in expected:
            copies[name] = value
        elif name not in expected:
            raise UserError(f"{folder}: unexpected tensor {key!r}; this is not a DiffusionGemma checkpoint of a known layout.")
        elif tuple(value.shape) != tuple(expected[name]):
            raise UserError(f"{folder}: tensor {key!r} has shape {tuple(value.shape)}, config.json asks for "
                            f"{tuple(expected[name])}.")
        else:
            weights[name] = value
    for name, value in copies.items():
        _check_copy(folder, name, value, weights)
    missing = sorted(set(expected) - set(weights))
    if missing:
        raise UserError(f"{folder}: tensor {missing[0]!r} is missing ({len(missing)} of {len(expected)} are); download the "
                        "checkpoint again.")
    return weights


def model_name(key: str) -> str | None:
    """The model's name of a checkpoint tensor, or None for what is known and not needed.

    Not needed are the tied head, rotary and embedding-scale buffers; vision weights are set aside until images are read.
    """
    if key == "lm_head.weight" or "rotary_emb" in key or key.endswith("embed_scale") or key.startswith(VISION):
        return None
    return re.sub(r"(\.experts\.(?:gate_up_proj|down_proj))$", r"\1.weight", key)


def read_tensors(folder: Path) -> Iterator[tuple[str, mx.array]]:
    """(name, lazily read tensor) of every safetensors file the folder's index names.

    Errors: UserError for a missing, truncated or damaged file, and for a tensor the index promises but no file has.
    """
    if (folder / INDEX).exists():
        mapping = read_json(folder / INDEX).get("weight_map")
        if not isinstance(mapping, dict):
            raise UserError(f"{folder / INDEX} has no weight_map; download the file again.")
        files = sorted(set(mapping.values()))
    else:
        mapping, files = None, sorted(path.name for path in folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} holds no .safetensors file; only safetensors checkpoints are read.")
    found: set[str] = set()
    for name in files:
        path = folder / name
        if not path.is_file():
            raise UserError(f"{folder} lacks {name}, which its index names; download the checkpoint again.")
        try:
            tensors = mx.load(str(path))
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{path} is damaged or cut off ({error}); download it again.") from None
        found |= tensors.keys()
        yield from tensors.items()
    if mapping is not None and (lost := sorted(mapping.keys() - found)):
        raise UserError(f"{folder}: no file holds tensor {lost[0]!r}, which the index names; download the checkpoint again.")


def _check_copy(folder: Path, name: str, value: mx.array, weights: Mapping[str, mx.array]) -> None:
    """An untied copy of a shared tensor in the encoder must equal the decoder's; it is then dropped."""
    original = "model.decoder." + name.removeprefix(ENCODER)
    if original not in weights:
        raise UserError(f"{folder}: unexpected tensor {name!r}; this is not a DiffusionGemma checkpoint of a known layout.")
    if not mx.array_equal(value, weights[original]).item():
        raise UserError(f"{folder}: {name!r} differs from {original!r}; encoder and decoder must share their weights.")
