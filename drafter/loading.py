"""Load drafters from folders and the Hub, and save them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tokenizer_utils import TokenizerWrapper

from drafter.config import DrafterConfig
from drafter.drafter import Drafter
from drafter.model import DraftNetwork
from drafter.pairing import check_pairing, tokenizer_fingerprint
from mlx_diffgemma.checkpoint import hub
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.files import expand_path, make_folder, write_text
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.safetensors import read_headers, read_tensors, write_tensors


def load_drafter(
    name: str,
    target: DiffusionGemma,
    revision: str | None = None,
    tokenizer: TokenizerWrapper | None = None,
) -> Drafter:
    """Load a drafter, in the target's dtype.

    Args:
        name: A folder, a Hub repository or "nano-drafter".
        target: The model that will verify its guesses.
        revision: The revision of the repository.
        tokenizer: The target's tokenizer.  None: it is not compared.

    Returns:
        The drafter, ready for use.

    Raises:
        UserError: It is no drafter, is damaged, or was made for another target or tokenizer.
    """
    folder = hub.resolve(name, revision, before_weights=DrafterConfig.from_folder)
    config = DrafterConfig.from_folder(folder)
    check_pairing(config, target, name)
    known = config.target.get("tokenizer")
    if known and tokenizer is not None and known != tokenizer_fingerprint(tokenizer):
        raise UserError(
            f"{name} was trained with another tokenizer than this model's, its tokens mean something else."
        )
    drafter = Drafter(config)
    stored = read_headers(folder)
    wanted = dict(tree_flatten(drafter.parameters()))
    if missing := sorted(wanted.keys() - stored.keys()):
        raise UserError(
            f"{name} lacks the tensor {missing[0]!r}; it is no whole drafter, download it again."
        )
    for key, value in wanted.items():
        if stored[key].shape != value.shape:
            raise UserError(
                f"{name}: the tensor {key!r} has shape {stored[key].shape}, its config.json says {value.shape}."
            )
    weights: dict[str, mx.array] = {}
    for path in {tensor.path for tensor in stored.values()}:
        weights |= read_tensors(path)[0]
    update = {
        key: weights[key] if value.dtype == mx.int32 else weights[key].astype(target.dtype)
        for key, value in wanted.items()
    }
    drafter.update(tree_unflatten(list(update.items())))
    drafter.eval()
    mx.eval(drafter.parameters())
    return drafter


def save_drafter(
    drafter: DraftNetwork,
    folder: str | Path,
    target: Mapping[str, str] | None = None,
    dtype: mx.Dtype | None = None,
) -> None:
    """Write config.json and model.safetensors.

    Args:
        drafter: The drafter.
        folder: Where it is written.
        target: The target it was trained for.  None: as the drafter's config says.
        dtype: The dtype of the weights.  None: as they are.
    """
    folder = expand_path(folder)
    make_folder(folder)
    config = drafter.config if target is None else replace(drafter.config, target=dict(target))
    write_text(folder / "config.json", json.dumps(config.to_dict(), indent=2) + "\n")
    weights = {
        name: value.astype(dtype) if dtype and mx.issubdtype(value.dtype, mx.floating) else value
        for name, value in tree_flatten(drafter.parameters())
    }
    write_tensors(folder / "model.safetensors", weights, {"format": "mlx"})
