"""Which parameters are trained, and adapters as mlx-lm keeps them: adapter_config.json and adapters.safetensors.

    >>> prepare(model, AdapterOptions(num_layers=-1))       # LoRA on attention, dense MLP and self-conditioning
    >>> load_adapter(model, Path("adapters"))
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_diffgemma.errors import UserError
from mlx_diffgemma.files import expand_path, open_binary, read_json, write_text
from mlx_diffgemma.model import DiffusionGemma, ExpertLinear, QuantizedExpertLinear
from mlx_diffgemma.storage import read_tensors
from mlx_diffgemma.values import Values

TYPES = ("lora", "dora", "full")
ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkvo")
DENSE = tuple(f"mlp.{name}_proj" for name in ("gate", "up", "down"))
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
ROUTER = ("router.proj",)
CONDITIONING = tuple(f"model.decoder.self_conditioning.{name}_proj" for name in ("gate", "up", "down"))
MOST_RANK = 2**16
CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"
MARK = "mlx_diffgemma"  # in adapter_config.json: what only this package writes


@dataclass(frozen=True)
class AdapterOptions:
    """What is trained: ``fine_tune_type`` lora, dora or full, in the last ``num_layers`` layers (-1: all).

    ``lora_parameters`` as in mlx-lm: rank, scale, dropout, and ``keys`` naming the modules; without keys it is attention,
    dense MLP and self-conditioning, with ``train_experts`` the experts too, with ``train_router`` the router.
    """

    fine_tune_type: str = "lora"
    num_layers: int = 16
    lora_parameters: Mapping[str, Any] = field(default_factory=lambda: {"rank": 8, "dropout": 0.0, "scale": 20.0})
    train_experts: bool = False
    train_router: bool = False

    def __post_init__(self) -> None:
        if self.fine_tune_type not in TYPES:
            raise UserError(f"Unknown fine_tune_type {self.fine_tune_type!r}; use one of {', '.join(TYPES)}.")
        if self.num_layers < 1 and self.num_layers != -1:
            raise UserError(f"num_layers must be -1 (all) or at least 1, got {self.num_layers}.")
        if "alpha" in self.lora_parameters:
            raise UserError("lora_parameters has 'alpha', which mlx-lm's layout calls 'scale': scale = alpha / rank.")
        unknown = sorted(set(self.lora_parameters) - {"rank", "scale", "dropout", "keys"})
        missing = sorted({"rank", "scale", "dropout"} - set(self.lora_parameters))
        if unknown or missing:
            raise UserError(f"lora_parameters must hold rank, scale and dropout, and may hold keys; "
                            f"{f'unknown: {unknown[0]}' if unknown else f'missing: {missing[0]}'}.")
        values = Values(self.lora_parameters, "options", "lora_parameters.")
        values.integer("rank", low=1, high=MOST_RANK)
        values.number("scale")
        if values.number("dropout", low=0.0, high=1.0) == 1.0:
            raise values.refuse("dropout", "below 1")
        if not all(isinstance(key, str) for key in values.sequence("keys", [])):
            raise values.refuse("keys", "a list of module names")
        if self.fine_tune_type == "dora" and set(self.keys) & set(EXPERTS):
            raise UserError("DoRA of the experts is not supported; use lora, or leave the experts out.")

    @property
    def keys(self) -> list[str]:
        """Paths of the modules that get an adapter: within a layer, or from the model's root."""
        given = self.lora_parameters.get("keys")
        if given is not None:
            return list(given)
        return [*ATTENTION, *DENSE, *(EXPERTS if self.train_experts else ()), *(ROUTER if self.train_router else ()), *CONDITIONING]


class LoRAExpertLinear(nn.Module):
    """:class:`ExpertLinear` with a low-rank update for each expert: ``lora_a`` [experts, rank, inputs], ``lora_b`` [experts,
    outputs, rank]."""

    def __init__(self, linear: ExpertLinear | QuantizedExpertLinear, rank: int, scale: float, dropout: float):
        super().__init__()
        experts, outputs, inputs = linear.shape
        self.linear, self.scale, self.dropout = linear, scale, nn.Dropout(dropout)
        bound = 1 / math.sqrt(inputs)
        self.lora_a = mx.random.uniform(-bound, bound, (experts, rank, inputs))
        self.lora_b = mx.zeros((experts, outputs, rank))

    def __call__(self, x: mx.array, experts: mx.array, sorted_indices: bool) -> mx.array:
        """Rows [n, 1, inputs] through the expert of each; ``experts`` [n]."""
        y = self.linear(x, experts, sorted_indices)
        z = self.dropout(x).astype(self.lora_a.dtype)
        for matrix in (self.lora_a, self.lora_b):
            z = mx.gather_mm(z, matrix.swapaxes(-1, -2), rhs_indices=experts, sorted_indices=sorted_indices)
        return y + (self.scale * z).astype(y.dtype)


def prepare(model: DiffusionGemma, options: AdapterOptions) -> None:
    """Freeze ``model`` but for what ``options`` ask to train, which is added where it is an adapter.

    Layer scalars are buffers of the reference and are never trained.  Errors: UserError for keys that name no module.
    """
    layers = len(model.layers)
    if options.num_layers > layers:
        raise UserError(f"num_layers {options.num_layers} exceeds the {layers} layers of this model; -1 means all.")
    model.freeze()
    count = layers if options.num_layers == -1 else options.num_layers
    if options.fine_tune_type == "full":
        _unfreeze(model, options, count)
        return
    linears_of = (nn.Linear, nn.QuantizedLinear, ExpertLinear, QuantizedExpertLinear)
    names = {path for parent in (model.layers[0], model.layers[-1], model) for path, module in parent.named_modules()
             if isinstance(module, linears_of)}
    if missing := [key for key in options.keys if key not in names]:
        raise UserError(f"lora_parameters.keys names {missing[0]!r}, which this model does not have; paths are those inside a "
                        f"layer ({ATTENTION[0]}) or from the root ({CONDITIONING[0]}).")
    linears = set(options.keys) - set(EXPERTS)  # mlx-lm does not know our expert matrices
    linear_to_lora_layers(model, count, {**options.lora_parameters, "keys": linears}, options.fine_tune_type == "dora")
    rank, scale, dropout = (options.lora_parameters[name] for name in ("rank", "scale", "dropout"))
    for layer in model.layers[-count:]:
        for path in set(options.keys) & set(EXPERTS):
            name = path.removeprefix("experts.")
            layer.experts[name] = LoRAExpertLinear(layer.experts[name], rank, scale, dropout)


def _unfreeze(model: DiffusionGemma, options: AdapterOptions, count: int) -> None:
    quantised = [path for path, module in model.named_modules() if hasattr(module, "bits")]
    if quantised:
        raise UserError(f"A quantised model cannot be trained in full ({quantised[0]} is packed); use lora, or dequantise it first "
                        "with `mlx-diffgemma convert -d`.")
    for layer in model.layers[-count:]:
        layer.unfreeze()
        if not options.train_experts:
            layer.experts.freeze()
        if not options.train_router:
            layer.router.freeze()
    if count == len(model.layers):
        model.model.decoder.self_conditioning.unfreeze()
        model.model.decoder.norm.unfreeze()
    model.freeze(keys=["layer_scalar"])


def fingerprint(parameter: Callable[[str], mx.array], layers: int) -> str:
    """Of a base model of so many ``layers``, the same in every quantisation: norms and scales are never quantised.

    ``parameter`` gives the array of a name.
    """
    names = [f"model.decoder.layers.{layer}.{name}" for layer in (0, layers - 1)
             for name in ("router.scale", "router.per_expert_scale", "input_layernorm.weight", "layer_scalar")]
    digest = hashlib.sha256()
    for name in (*names, "model.decoder.self_conditioning.pre_norm.weight"):
        digest.update(np.array(parameter(name).astype(mx.bfloat16).astype(mx.float32)).tobytes())
    return digest.hexdigest()


def model_fingerprint(model: DiffusionGemma) -> str:
    parameters = dict(tree_flatten(model.parameters()))
    return fingerprint(parameters.__getitem__, len(model.layers))


def write_config(folder: Path, base: str, layers: int, options: AdapterOptions, **run: Any) -> None:
    """adapter_config.json, as mlx-lm reads it, for a ``base`` of so many ``layers``; ``run`` is the rest of the record."""
    content = {**run, **asdict(options), "lora_parameters": {**options.lora_parameters, "keys": options.keys}}
    content["num_layers"] = layers if options.num_layers == -1 else options.num_layers
    if options.fine_tune_type == "full":
        content["lora_parameters"] = None
    content[MARK] = {"base": base}
    write_text(folder / CONFIG, json.dumps(content, indent=1, default=str) + "\n")


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk.  ``base`` is the fingerprint of what it was trained on, None for one of mlx-lm's; ``options`` say
    what it adds."""

    folder: Path
    options: AdapterOptions
    base: str | None
    weights: Mapping[str, mx.array]

    @classmethod
    def read(cls, folder: Path) -> Adapter:
        """Errors: UserError when it is not whole."""
        folder = expand_path(folder)
        if not folder.is_dir():
            raise UserError(f"There is no adapter folder {folder}.")
        config, path = read_json(folder / CONFIG), folder / WEIGHTS
        if not path.exists():
            raise UserError(f"{folder} has no {WEIGHTS}; train the adapter to its first checkpoint.")
        values = Values(config, str(folder / CONFIG))
        given = values.part("lora_parameters").content
        names = ("rank", "scale", "dropout", "keys")
        kind = values.text("fine_tune_type", "lora", TYPES)
        layers = values.integer("num_layers", -1, low=-1)
        options = (AdapterOptions(kind, layers, {name: given[name] for name in names if name in given})
                   if kind != "full" else AdapterOptions(kind, -1))
        return cls(folder, options, values.part(MARK).text("base", None), read_weights(path))

    @property
    def digest(self) -> str:
        """Of its files."""
        found = hashlib.sha256((self.folder / CONFIG).read_bytes())
        with open_binary(self.folder / WEIGHTS) as file:
            while block := file.read(2**24):
                found.update(block)
        return found.hexdigest()

    def check(self, base: str, fused: Sequence[str]) -> None:
        """Errors: UserError when it was made for another base model, or is among the ``fused`` of this one already."""
        if self.digest in fused:
            raise UserError(f"The adapter in {self.folder} is worked into this model already; leave it out.")
        if self.base is not None and self.base != base:
            raise UserError(f"The adapter in {self.folder} was trained on another base model; give --model the one it was made "
                            "for.")


def load_adapter(model: DiffusionGemma, folder: Path) -> None:
    """Add the adapter in ``folder`` to ``model``.

    Errors: UserError when it is not whole, was made for another base model, or holds tensors that this one has no place for.
    """
    folder = expand_path(folder)
    adapter = Adapter.read(folder)
    adapter.check(model_fingerprint(model), model.config.fused)
    if adapter.options.fine_tune_type != "full":
        prepare(model, adapter.options)
    put_weights(model, dict(tree_flatten(model.parameters())), adapter.weights, folder / WEIGHTS)
    model.freeze()
    model.eval()


def read_weights(path: Path) -> dict[str, mx.array]:
    """Errors: UserError when the file is missing or damaged."""
    return read_tensors(path)[0]


def put_weights(model: DiffusionGemma, places: Mapping[str, mx.array], weights: Mapping[str, mx.array], path: Path) -> None:
    """Into the ``places`` of ``model``; ``path`` is where they come from.  Errors: UserError for one that has no place there."""
    for name, value in weights.items():
        if name not in places or places[name].shape != value.shape:
            expected = f"expected {places[name].shape}" if name in places else "which is not among what is trained there"
            raise UserError(f"{path} does not fit this model: {name} has shape {value.shape}, {expected}.")
    model.update(tree_unflatten([(name, value.astype(places[name].dtype)) for name, value in weights.items()]))
