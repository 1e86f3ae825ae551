"""From the names a checkpoint stores to the model's own, whoever wrote it.

Known are the released layout (``experts.gate_up_proj`` without ``.weight``), mlx-community's (fused experts with
``.weight``, ``.scales`` and ``.biases``), and experts with gate and up apart, one tensor an expert, or transposed
[experts, inputs, outputs].

    >>> arrangement = arrange(read_headers(folder), config, folder.name)
    >>> arrangement.tensors["model.decoder.layers.0.experts.gate_up_proj.weight"].pieces
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.model import DiffusionGemma
from mlx_diffgemma.recipes import VISION, Precision, Quantization
from mlx_diffgemma.storage import DTYPES, Stored

ENCODER = "model.encoder.language_model."
DECODER = "model.decoder."
BOUNDS = (".input_min", ".input_max", ".output_min", ".output_max")
SLICE = 64 * 2**20  # bytes of a tensor that are in memory at once when it is converted
_EXPERTS = re.compile(r"^(model\.decoder\.layers\.\d+\.experts)\.(?:switch_glu\.|switch_mlp\.)?(?:(\d+)\.)?"
                      r"(gate_up_proj|gate_proj|up_proj|down_proj)(?:\.(weight|scales|biases))?$")


@dataclass(frozen=True)
class Piece:
    """Rows of a stored tensor, its leading axes taken as one; ``transposed`` pieces are matrices that lie on their side."""

    stored: Stored
    start: int
    stop: int
    transposed: bool = False

    @property
    def rows(self) -> int:
        return self.stored.columns if self.transposed else self.stop - self.start

    def read(self, start: int, stop: int) -> mx.array:
        """Rows start to stop of the piece, from the file."""
        if self.transposed:
            return self.stored.rows(self.start, self.stop).T[start:stop]
        return self.stored.rows(self.start + start, self.start + stop)

    def take(self, array: mx.array) -> mx.array:
        """The piece out of the whole stored tensor."""
        rows = array.reshape(-1, self.stored.columns)[self.start : self.stop]
        return rows.T if self.transposed else rows


@dataclass(frozen=True)
class Tensor:
    """A tensor of the model and the pieces it is made of, in the order of its rows."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def stored(self) -> Stored:
        return self.pieces[0].stored

    def nbytes(self, dtype: mx.Dtype) -> int:
        """Its size when what is floating is held in ``dtype``."""
        return math.prod(self.shape) * (dtype.size if self.stored.is_float else DTYPES[self.stored.dtype].size)

    def read(self, start: int, stop: int) -> mx.array:
        """Rows [stop - start, columns], from the files."""
        parts, first = [], 0
        for piece in self.pieces:
            low, high = max(start - first, 0), min(stop - first, piece.rows)
            if low < high:
                parts.append(piece.read(low, high))
            first += piece.rows
        return parts[0] if len(parts) == 1 else mx.concatenate(parts)

    def read_all(self) -> mx.array:
        return self.read(0, sum(piece.rows for piece in self.pieces))

    def assemble(self, whole: Mapping[str, mx.array]) -> mx.array:
        """The tensor, from whole stored tensors by name."""
        if len(self.pieces) == 1 and self.stored.shape == self.shape:
            return whole[self.stored.name]
        return mx.concatenate([piece.take(whole[piece.stored.name]) for piece in self.pieces]).reshape(self.shape)


@dataclass
class Arrangement:
    """A checkpoint under the model's names.

    ``config`` is the checkpoint's, without a vision tower where there are no weights for it.  ``precisions`` holds every
    quantised module's path; ``copies`` pairs encoder tensors with the decoder's they must equal.
    """

    config: ModelConfig
    tensors: dict[str, Tensor] = field(default_factory=dict)
    precisions: dict[str, Precision] = field(default_factory=dict)
    copies: list[tuple[Stored, Stored]] = field(default_factory=list)

    def check_copies(self) -> None:
        """Untied copies of shared tensors in the encoder must equal the decoder's.  Errors: UserError."""
        for copy, original in self.copies:
            for start, stop in row_slices(original.shape):
                if not mx.array_equal(copy.rows(start, stop), original.rows(start, stop)).item():
                    raise UserError(f"{copy.path}: {copy.name!r} differs from {original.name!r}; encoder and decoder must share "
                                    "their weights.")


def row_slices(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Ranges of rows of a matrix, all axes but the last taken as one, that take at most SLICE bytes in float32, or one row."""
    columns = max(1, shape[-1] if shape else 1)
    rows, step = math.prod(shape) // columns, max(1, SLICE // (4 * columns))
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def as_stored(config: ModelConfig, names: Iterable[str]) -> ModelConfig:
    """``config`` without a vision tower where no tensor of those ``names`` is one's: conversions of the text alone keep the
    description of the eyes they left out."""
    return config if any(name.startswith(VISION) for name in names) else replace(config, vision=None, image_tokens=None)


def arrange(stored: Mapping[str, Stored], config: ModelConfig, where: str) -> Arrangement:
    """Find every tensor of the model among ``stored``; ``where`` names the checkpoint in messages.

    Errors: UserError naming the first tensor that is unexpected, missing or of the wrong shape or kind.
    """
    found = _Finder(where)
    encoder: list[Stored] = []
    config = as_stored(config, stored)
    arrangement = Arrangement(config)
    for name, entry in stored.items():
        if name == "lm_head.weight" or "rotary_emb" in name or name.endswith("embed_scale"):
            continue  # the tied head, and buffers the config determines
        if name.startswith(VISION) and (config.vision is None or (name.endswith(BOUNDS) and not config.vision.clipped)):
            continue  # a tower, or bounds of its linear maps, that the config says are not used
        if entry.dtype not in DTYPES:
            raise UserError(f"{where}: tensor {name!r} is stored as {entry.dtype}, which is not supported; known are "
                            f"{', '.join(DTYPES)}.")
        if name.startswith(ENCODER):
            encoder.append(entry)
        else:
            found.add(name, entry)
    scaled = {key.removesuffix(".scales") for key in found.names if key.endswith(".scales")}
    arrangement.precisions = _precisions(config, scaled)
    expected = _expected(config, arrangement.precisions)
    for entry in encoder:
        if entry.name in expected:
            found.add(entry.name, entry)
    if unexpected := sorted(found.names - expected.keys()):
        raise UserError(f"{where}: unexpected tensor {found.original(unexpected[0])!r}; this is not a DiffusionGemma checkpoint "
                        "of a known layout.")
    if missing := sorted(expected.keys() - found.names):
        raise UserError(f"{where}: tensor {missing[0]!r} is missing ({len(missing)} of {len(expected)} are); download the "
                        "checkpoint again.")
    transposed = {key for key, value in expected.items() if key in found.groups and key.removesuffix(".weight") not in
                  arrangement.precisions and found.lies_on_its_side(key, value.shape)}
    for key, value in expected.items():
        sides = key in transposed or _sibling(key) in transposed
        tensor = Tensor(key, value.shape, found.pieces(key, value.shape, sides))
        if tensor.stored.is_float != mx.issubdtype(value.dtype, mx.floating):
            raise UserError(f"{where}: tensor {tensor.stored.name!r} is stored as {tensor.stored.dtype}, which does not go with "
                            "the quantisation in config.json; download the checkpoint again.")
        arrangement.tensors[key] = tensor
    for entry in encoder:
        if entry.name not in expected:
            original = stored.get(DECODER + entry.name.removeprefix(ENCODER))
            if original is None or (original.shape, original.dtype) != (entry.shape, entry.dtype):
                raise UserError(f"{where}: unexpected tensor {entry.name!r}; this is not a DiffusionGemma checkpoint of a known "
                                "layout.")
            arrangement.copies.append((entry, original))
    return arrangement


def quantized_module(config: ModelConfig, precisions: Mapping[str, Precision]) -> DiffusionGemma:
    """The model whose modules at these paths are quantised; its weights are zeros until they are loaded."""
    model = DiffusionGemma(config)
    if precisions:
        def predicate(path: str, module: nn.Module) -> bool | dict[str, object]:
            if path not in precisions or not hasattr(module, "to_quantized"):
                return False
            precisions[path].check(path, module.weight.shape[-1])
            return vars(precisions[path])

        nn.quantize(model, class_predicate=predicate)
    return model


class _Finder:
    """Stored tensors by the model's name; experts in parts are collected first."""

    def __init__(self, where: str):
        self.where = where
        self.groups: dict[str, dict[tuple[str, int | None], Stored]] = {}  # the parts of an expert tensor
        self.single: dict[str, Stored] = {}

    @property
    def names(self) -> set[str]:
        return {*self.groups, *self.single}

    def original(self, key: str) -> str:
        return self.single[key].name if key in self.single else next(iter(self.groups[key].values())).name

    def add(self, name: str, entry: Stored) -> None:
        if match := _EXPERTS.match(name):
            prefix, number, projection, suffix = match.groups()
            key = f"{prefix}.{'down_proj' if projection == 'down_proj' else 'gate_up_proj'}.{suffix or 'weight'}"
            self.groups.setdefault(key, {})[projection, None if number is None else int(number)] = entry
        else:
            self.single[name] = entry

    def pieces(self, key: str, shape: tuple[int, ...], transposed: bool) -> tuple[Piece, ...]:
        if key in self.single:
            entry = self.single[key]
            self._check(entry, shape)
            return (Piece(entry, 0, _row_count(entry)),)
        group, (experts, outputs, inputs) = self.groups[key], shape
        parts = {projection for projection, _ in group}
        order = list(parts) if len(parts) == 1 and parts <= {"gate_up_proj", "down_proj"} else ["gate_proj", "up_proj"]
        if parts != set(order):
            raise UserError(f"{self.where}: {key.removesuffix('.weight')} is incomplete, there is only {', '.join(sorted(parts))}; "
                            "download the checkpoint again.")
        matrix = (outputs // len(order), inputs)
        lying = matrix[::-1] if transposed else matrix
        whole = all(number is None for _, number in group)
        pieces = []
        for expert in range(experts):
            for projection in order:
                number = None if whole else expert
                if (projection, number) not in group:
                    raise UserError(f"{self.where}: expert {expert} of {key.removesuffix('.weight')} is missing; download the "
                                    "checkpoint again.")
                entry = group[projection, number]
                self._check(entry, (experts, *lying) if whole else lying)
                first = expert * lying[0] if whole else 0
                pieces.append(Piece(entry, first, first + lying[0], transposed))
        if len(group) == 1 and not transposed:  # the whole tensor as it is
            return (Piece(pieces[0].stored, 0, experts * outputs),)
        return tuple(pieces)

    def lies_on_its_side(self, key: str, shape: tuple[int, ...]) -> bool:
        """Whether the experts of ``key`` are stored [inputs, outputs]; False where a square does not tell."""
        group = self.groups[key]
        outputs, inputs = shape[-2:]
        if {projection for projection, _ in group} == {"gate_proj", "up_proj"}:
            outputs //= 2
        return outputs != inputs and next(iter(group.values())).shape[-2:] == (inputs, outputs)

    def _check(self, entry: Stored, shape: tuple[int, ...]) -> None:
        if entry.shape != shape:
            raise UserError(f"{self.where}: tensor {entry.name!r} has shape {entry.shape}, config.json asks for {shape}.")


def _precisions(config: ModelConfig, scaled: set[str]) -> dict[str, Precision]:
    if not config.quantization:
        if scaled:
            raise UserError(f"config.json names no quantisation, but {min(scaled)} has scales; download the checkpoint again.")
        return {}
    quantization = Quantization.from_config(config.quantization)
    modules = tree_flatten(DiffusionGemma(config).leaf_modules(), is_leaf=nn.Module.is_module)
    found = {path: quantization.of(path, path in scaled) for path, module in modules if hasattr(module, "to_quantized")}
    return {path: precision for path, precision in found.items() if precision}


def _expected(config: ModelConfig, precisions: Mapping[str, Precision]) -> dict[str, mx.array]:
    return dict(tree_flatten(quantized_module(config, precisions).parameters()))


def _sibling(key: str) -> str:
    """The other projection of the same experts, stored the same way round."""
    return key.replace("gate_up_proj", "down_proj") if "gate_up_proj" in key else key.replace("down_proj", "gate_up_proj")


def _row_count(entry: Stored) -> int:
    return math.prod(entry.shape) // entry.columns if entry.columns else 0
