"""Drafters in folders, and whether one belongs to a target."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tokenizer_utils import TokenizerWrapper

from drafter.config import DrafterConfig
from drafter.model import Drafter
from mlx_diffgemma import hub
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.files import make_folder, write_tensors, write_text
from mlx_diffgemma.model import DiffusionGemma
from mlx_diffgemma.storage import read_headers, read_tensors
from mlx_diffgemma.tuning.adapters import model_fingerprint


def load_drafter(name: str, target: DiffusionGemma, revision: str | None = None,
                 tokenizer: TokenizerWrapper | None = None) -> Drafter:
    """The drafter of a folder or Hub repository, or "nano-drafter", in the target's dtype.

    Errors: UserError for what is no drafter, a damaged one, and one made for another target or ``tokenizer``.
    """
    folder = hub.resolve(name, revision, before_weights=DrafterConfig.from_folder)
    config = DrafterConfig.from_folder(folder)
    check_pairing(config, target, name)
    known = config.target.get("tokenizer")
    if known and tokenizer is not None and known != tokenizer_fingerprint(tokenizer):
        raise UserError(f"{name} was trained with another tokenizer than this model's, its tokens mean something else.")
    drafter = Drafter(config)
    stored, wanted = read_headers(folder), dict(tree_flatten(drafter.parameters()))
    if missing := sorted(wanted.keys() - stored.keys()):
        raise UserError(f"{name} lacks the tensor {missing[0]!r}; it is no whole drafter, download it again.")
    for key, value in wanted.items():
        if stored[key].shape != value.shape:
            raise UserError(f"{name}: the tensor {key!r} has shape {stored[key].shape}, its config.json says {value.shape}.")
    weights: dict[str, mx.array] = {}
    for path in {tensor.path for tensor in stored.values()}:
        weights |= read_tensors(path)[0]
    update = {key: weights[key] if value.dtype == mx.int32 else weights[key].astype(target.dtype) for key, value in wanted.items()}
    drafter.update(tree_unflatten(list(update.items())))
    drafter.eval()
    mx.eval(drafter.parameters())
    return drafter


def check_pairing(config: DrafterConfig, target: DiffusionGemma, name: str = "The drafter") -> None:
    """Errors: UserError naming in what drafter and target differ."""
    text = target.config.text
    for what, drafts, has in (("hidden size", config.hidden_size, text.hidden_size),
                              ("vocabulary", config.vocab_size, text.vocab_size),
                              ("number of target layers", config.num_target_layers, len(text.layers))):
        if drafts != has:
            raise UserError(f"{name} does not fit this model: it was made for a {what} of {drafts:,}, this one has {has:,}.")
    if (wanted := config.target.get("fingerprint")) and wanted != model_fingerprint(target):
        raise UserError(f"{name} was trained for another model than this one ({config.target.get('name', 'not named')}).")


def tokenizer_fingerprint(tokenizer: TokenizerWrapper) -> str:
    """Of what each id means."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


def save_drafter(drafter: Drafter, folder: Path, target: Mapping[str, str] | None = None, dtype: mx.Dtype | None = None) -> None:
    """Write config.json, with what ``target`` it was trained for, and model.safetensors, in ``dtype`` or as it is."""
    make_folder(folder)
    config = drafter.config if target is None else replace(drafter.config, target=dict(target))
    write_text(folder / "config.json", json.dumps(config.to_dict(), indent=2) + "\n")
    weights = {name: value.astype(dtype) if dtype and mx.issubdtype(value.dtype, mx.floating) else value
               for name, value in tree_flatten(drafter.parameters())}
    write_tensors(folder / "model.safetensors", weights, {"format": "mlx"})
