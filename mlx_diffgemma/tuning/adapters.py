"""Which parameters are trained, and adapters as mlx-lm keeps them: adapter_config.json and
adapters.safetensors.

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
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.model.experts import ExpertLinear, QuantizedExpertLinear
from mlx_diffgemma.safetensors import read_tensors
from mlx_diffgemma.values import Values

TYPES = ("lora", "dora", "full")
ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkvo")
DENSE = tuple(f"mlp.{name}_proj" for name in ("gate", "up", "down"))
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
ROUTER = ("router.proj",)
CONDITIONING = tuple(
    f"model.decoder.self_conditioning.{name}_proj" for name in ("gate", "up", "down")
)
MOST_RANK = 2**16
CONFIG = "adapter_config.json"
WEIGHTS = "adapters.safetensors"
MARK = "mlx_diffgemma"  # the key in adapter_config.json for what only this package writes


@dataclass(frozen=True)
class AdapterOptions:
    """What is trained.

    ``lora_parameters`` holds ``rank``, ``scale`` and ``dropout``, as in mlx-lm, and optionally
    ``keys``, the names of the modules to train.  Without ``keys``, attention, dense MLP and
    self-conditioning are trained.

    Attributes:
        fine_tune_type: lora, dora or full.
        num_layers: Only the last ``num_layers`` layers are trained; -1 means all.
        lora_parameters: The parameters of LoRA and DoRA, as described above.
        train_experts: Without ``keys``, also train the experts.
        train_router: Without ``keys``, also train the router.
    """

    fine_tune_type: str = "lora"
    num_layers: int = 16
    lora_parameters: Mapping[str, Any] = field(
        default_factory=lambda: {"rank": 8, "dropout": 0.0, "scale": 20.0}
    )
    train_experts: bool = False
    train_router: bool = False

    def __post_init__(self) -> None:
        if self.fine_tune_type not in TYPES:
            raise UserError(
                f"Unknown fine_tune_type {self.fine_tune_type!r}; use one of {', '.join(TYPES)}."
            )
        if self.num_layers < 1 and self.num_layers != -1:
            raise UserError(f"num_layers must be -1 (all) or at least 1, got {self.num_layers}.")
        if "alpha" in self.lora_parameters:
            raise UserError(
                "lora_parameters has 'alpha', which mlx-lm's layout calls 'scale': scale = alpha / rank."
            )
        unknown = sorted(set(self.lora_parameters) - {"rank", "scale", "dropout", "keys"})
        missing = sorted({"rank", "scale", "dropout"} - set(self.lora_parameters))
        if unknown or missing:
            raise UserError(
                f"lora_parameters must hold rank, scale and dropout, and may hold keys; "
                f"{f'unknown: {unknown[0]}' if unknown else f'missing: {missing[0]}'}."
            )
        values = Values(self.lora_parameters, "options", "lora_parameters.")
        values.integer("rank", low=1, high=MOST_RANK)
        values.number("scale")
        if values.number("dropout", low=0.0, high=1.0) == 1.0:
            raise values.refuse("dropout", "below 1")
        if not all(isinstance(key, str) for key in values.sequence("keys", [])):
            raise values.refuse("keys", "a list of module names")
        if self.fine_tune_type == "dora" and set(self.keys) & set(EXPERTS):
            raise UserError(
                "DoRA of the experts is not supported; use lora, or leave the experts out."
            )

    @property
    def keys(self) -> list[str]:
        """The paths of the modules that get an adapter, from their layer or from the model's root."""
        given = self.lora_parameters.get("keys")
        if given is not None:
            return list(given)
        return [
            *ATTENTION,
            *DENSE,
            *(EXPERTS if self.train_experts else ()),
            *(ROUTER if self.train_router else ()),
            *CONDITIONING,
        ]


class LoRAExpertLinear(nn.Module):
    """:class:`ExpertLinear` with a low-rank update for each expert.

    The update is ``lora_a`` [experts, rank, inputs] and ``lora_b`` [experts, outputs, rank].
    """

    def __init__(
        self, linear: ExpertLinear | QuantizedExpertLinear, rank: int, scale: float, dropout: float
    ):
        super().__init__()
        experts, outputs, inputs = linear.shape
        self.linear = linear
        self.scale = scale
        self.dropout = nn.Dropout(dropout)
        bound = 1 / math.sqrt(inputs)
        self.lora_a = mx.random.uniform(-bound, bound, (experts, rank, inputs))
        self.lora_b = mx.zeros((experts, outputs, rank))

    def __call__(self, x: mx.array, experts: mx.array, sorted_indices: bool) -> mx.array:
        """Multiply each row by the matrix of its expert.

        Args:
            x: The rows [n, 1, inputs].
            experts: The number [n] of each row's expert.
            sorted_indices: Whether ``experts`` ascend.
        """
        y = self.linear(x, experts, sorted_indices)
        z = self.dropout(x).astype(self.lora_a.dtype)
        for matrix in (self.lora_a, self.lora_b):
            z = mx.gather_mm(
                z, matrix.swapaxes(-1, -2), rhs_indices=experts, sorted_indices=sorted_indices
            )
        return y + (self.scale * z).astype(y.dtype)


def prepare(model: DiffusionGemma, options: AdapterOptions) -> None:
    """Freeze ``model`` except for what ``options`` train; adapters are added to the model.

    Layer scalars are never trained, because they are buffers in the reference.

    Raises:
        UserError: A key names no module.
    """
    adapt(model, options)
    mx.eval(model.trainable_parameters())  # here: the model may be used on another thread


def adapt(model: DiffusionGemma, options: AdapterOptions) -> None:
    """Do what ``prepare`` does, but leave the new adapters unevaluated, so that they take no
    memory.
    """
    layers = len(model.layers)
    if options.num_layers > layers:
        raise UserError(
            f"num_layers {options.num_layers} exceeds the {layers} layers of this model; -1 means all."
        )
    model.freeze()
    count = layers if options.num_layers == -1 else options.num_layers
    if options.fine_tune_type == "full":
        _unfreeze(model, options, count)
        return
    linears_of = (nn.Linear, nn.QuantizedLinear, ExpertLinear, QuantizedExpertLinear)
    names = {
        path
        for parent in (model.layers[0], model.layers[-1], model)
        for path, module in parent.named_modules()
        if isinstance(module, linears_of)
    }
    if missing := [key for key in options.keys if key not in names]:
        raise UserError(
            f"lora_parameters.keys names {missing[0]!r}, which this model does not have; paths are those inside a "
            f"layer ({ATTENTION[0]}) or from the root ({CONDITIONING[0]})."
        )
    linears = set(options.keys) - set(EXPERTS)  # mlx-lm does not know our expert matrices
    linear_to_lora_layers(
        model, count, {**options.lora_parameters, "keys": linears}, options.fine_tune_type == "dora"
    )
    rank, scale, dropout = (options.lora_parameters[name] for name in ("rank", "scale", "dropout"))
    for layer in model.layers[-count:]:
        for path in set(options.keys) & set(EXPERTS):
            name = path.removeprefix("experts.")
            layer.experts[name] = LoRAExpertLinear(layer.experts[name], rank, scale, dropout)


def _unfreeze(model: DiffusionGemma, options: AdapterOptions, count: int) -> None:
    quantised = [path for path, module in model.named_modules() if hasattr(module, "bits")]
    if quantised:
        raise UserError(
            f"A quantised model cannot be trained in full ({quantised[0]} is packed); use lora, or dequantise it first "
            "with `mlx-diffgemma convert -d`."
        )
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
    """Digest of a base model; quantisation does not change it.

    It covers norms and scales only, which are never quantised.

    Args:
        parameter: Returns the array of a parameter by its name.
        layers: How many layers the model has.
    """
    names = [
        f"model.decoder.layers.{layer}.{name}"
        for layer in (0, layers - 1)
        for name in (
            "router.scale",
            "router.per_expert_scale",
            "input_layernorm.weight",
            "layer_scalar",
        )
    ]
    digest = hashlib.sha256()
    for name in (*names, "model.decoder.self_conditioning.pre_norm.weight"):
        digest.update(np.array(parameter(name).astype(mx.bfloat16).astype(mx.float32)).tobytes())
    return digest.hexdigest()


def model_fingerprint(model: DiffusionGemma) -> str:
    parameters = dict(tree_flatten(model.parameters()))
    return fingerprint(parameters.__getitem__, len(model.layers))


def write_config(folder: Path, base: str, layers: int, options: AdapterOptions, **run: Any) -> None:
    """Write adapter_config.json as mlx-lm reads it.

    Args:
        folder: The folder of the adapter.
        base: The fingerprint of the base model.
        layers: How many layers the base model has.
        options: What is trained.
        run: Further entries.
    """
    content = {
        **run,
        **asdict(options),
        "lora_parameters": {**options.lora_parameters, "keys": options.keys},
    }
    content["num_layers"] = layers if options.num_layers == -1 else options.num_layers
    if options.fine_tune_type == "full":
        content["lora_parameters"] = None
    content[MARK] = {"base": base}
    write_text(folder / CONFIG, json.dumps(content, indent=1, default=str) + "\n")


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk.

    ``base`` is the fingerprint of the model it was trained on; None for an adapter of mlx-lm.
    ``options`` say what it adds.
    """

    folder: Path
    options: AdapterOptions
    base: str | None
    weights: Mapping[str, mx.array]

    @classmethod
    def read(cls, folder: Path) -> Adapter:
        """Read the folder of an adapter.

        Raises:
            UserError: The adapter is incomplete or damaged.
        """
        folder = expand_path(folder)
        if not folder.is_dir():
            raise UserError(f"There is no adapter folder {folder}.")
        if not (folder / CONFIG).exists():
            raise UserError(f"{folder} has no {CONFIG}; give the folder of an adapter.")
        config = read_json(folder / CONFIG)
        path = folder / WEIGHTS
        if "peft_type" in config:
            raise UserError(
                f"{folder} holds an adapter of PEFT ({config['peft_type']!r:.40}), whose format is not "
                "read here; give one that `mlx-diffgemma lora` or mlx-lm trained."
            )
        if not path.exists():
            raise UserError(
                f"{folder} has no {WEIGHTS}; train the adapter to its first checkpoint."
            )
        values = Values(config, str(folder / CONFIG))
        given = values.part("lora_parameters").content
        names = ("rank", "scale", "dropout", "keys")
        kind = values.text("fine_tune_type", "lora", TYPES)
        layers = values.integer("num_layers", -1, low=-1)
        options = (
            AdapterOptions(kind, layers, {name: given[name] for name in names if name in given})
            if kind != "full"
            else AdapterOptions(kind, -1)
        )
        return cls(folder, options, values.part(MARK).text("base", None), read_weights(path))

    @property
    def digest(self) -> str:
        """Digest of the adapter's files."""
        found = hashlib.sha256((self.folder / CONFIG).read_bytes())
        with open_binary(self.folder / WEIGHTS) as file:
            while block := file.read(2**24):
                found.update(block)
        return found.hexdigest()

    def check(self, base: str, fused: Sequence[str]) -> None:
        """Check that the adapter can be added to a base model.

        Args:
            base: The fingerprint of the base model.
            fused: The digests of the adapters that are already merged into it.

        Raises:
            UserError: The adapter was made for another base model, or is already merged into this
                one.
        """
        if self.digest in fused:
            raise UserError(
                f"The adapter in {self.folder} is worked into this model already; leave it out."
            )
        if self.base is not None and self.base != base:
            raise UserError(
                f"The adapter in {self.folder} was trained on another base model; give --model the one it was made "
                "for."
            )


def load_adapter(model: DiffusionGemma, folder: Path) -> None:
    """Add the adapter in ``folder`` to ``model``.

    Raises:
        UserError: The adapter is incomplete, was made for another base model, or has tensors that
            do not fit this one.
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
    """Read the tensors of a file.

    Raises:
        UserError: The file is missing or damaged.
    """
    return read_tensors(path)[0]


def put_weights(
    model: DiffusionGemma,
    places: Mapping[str, mx.array],
    weights: Mapping[str, mx.array],
    path: Path,
) -> None:
    """Put weights into a model, in the dtypes that it has there.

    Args:
        model: The model.
        places: The arrays that may be replaced, by name.
        weights: The new values, by name.
        path: The file they come from, for the message.

    Raises:
        UserError: A weight is not among ``places`` or has another shape.
    """
    for name, value in weights.items():
        if name not in places or places[name].shape != value.shape:
            expected = (
                f"expected {places[name].shape}"
                if name in places
                else "which is not among what is trained there"
            )
            raise UserError(
                f"{path} does not fit this model: {name} has shape {value.shape}, {expected}."
            )
    found = {name: value.astype(places[name].dtype) for name, value in weights.items()}
    mx.eval(found)
    model.update(tree_unflatten(list(found.items())))
