"""Maps the names in a checkpoint of any known layout to the model's own names.

These layouts are known: the released one (``experts.gate_up_proj`` without ``.weight``),
mlx-community's (fused experts with ``.weight``, ``.scales`` and ``.biases``), and experts with gate
and up apart, one tensor an expert, or transposed [experts, inputs, outputs].

    >>> checkpoint = arrange(read_headers(folder), config, folder.name)
    >>> checkpoint.tensors["model.decoder.layers.0.experts.gate_up_proj.weight"].pieces
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field, replace

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_diffgemma.errors import UserError
from mlx_diffgemma.model.config import ModelConfig
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.model.recipes import VISION, Precision, Quantization
from mlx_diffgemma.safetensors import DTYPES, Stored

ENCODER = "model.encoder.language_model."
DECODER = "model.decoder."
BOUNDS = (".input_min", ".input_max", ".output_min", ".output_max")
SLICE = 64 * 2**20  # bytes of a tensor that are in memory at once when it is converted
_EXPERTS = re.compile(
    r"^(model\.decoder\.layers\.\d+\.experts)\.(?:switch_glu\.|switch_mlp\.)?(?:(\d+)\.)?"
    r"(gate_up_proj|gate_proj|up_proj|down_proj)(?:\.(weight|scales|biases))?$"
)


@dataclass(frozen=True)
class Piece:
    """Rows ``start`` to ``stop`` of a stored tensor; all its axes but the last count as one.

    A ``transposed`` piece is a matrix that is stored [inputs, outputs].
    """

    stored: Stored
    start: int
    stop: int
    transposed: bool = False

    @property
    def rows(self) -> int:
        return self.stored.columns if self.transposed else self.stop - self.start

    def read(self, start: int, stop: int) -> mx.array:
        """Read rows ``start`` to ``stop`` of the piece from the file."""
        if self.transposed:
            return self.stored.rows(self.start, self.stop).T[start:stop]
        return self.stored.rows(self.start + start, self.start + stop)

    def take(self, array: mx.array) -> mx.array:
        """The piece of the whole stored tensor ``array``."""
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
        """Its bytes; floating-point elements are held in ``dtype``."""
        element = dtype if self.stored.is_float else DTYPES[self.stored.dtype]
        return math.prod(self.shape) * element.size

    def read(self, start: int, stop: int) -> mx.array:
        """Read rows [stop - start, columns] from the files."""
        parts = []
        first = 0
        for piece in self.pieces:
            low = max(start - first, 0)
            high = min(stop - first, piece.rows)
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
        parts = [piece.take(whole[piece.stored.name]) for piece in self.pieces]
        return mx.concatenate(parts).reshape(self.shape)


@dataclass
class CheckpointMap:
    """A checkpoint's tensors under the model's names.

    Args:
        config: The checkpoint's config, without a vision tower where it has no weights for one.
        tensors: The tensors by the model's keys.
        precisions: The precision of each quantised module, by path.
        copies: Pairs of an encoder tensor and the decoder tensor that it must equal.
    """

    config: ModelConfig
    tensors: dict[str, Tensor] = field(default_factory=dict)
    precisions: dict[str, Precision] = field(default_factory=dict)
    copies: list[tuple[Stored, Stored]] = field(default_factory=list)

    def check_copies(self) -> None:
        """Compare the encoder's copies of shared tensors with the decoder's tensors.

        Raises:
            UserError: One of them differs.
        """
        for copy, original in self.copies:
            for start, stop in row_slices(original.shape):
                if not mx.array_equal(copy.rows(start, stop), original.rows(start, stop)).item():
                    raise UserError(
                        f"{copy.path}: {copy.name!r} differs from {original.name!r}; encoder and "
                        "decoder must share their weights."
                    )


def row_slices(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Ranges of rows of a tensor that take at most SLICE bytes in float32, or one row each.

    All axes but the last are taken as one.
    """
    columns = max(1, shape[-1] if shape else 1)
    rows = math.prod(shape) // columns
    step = max(1, SLICE // (4 * columns))
    return ((start, min(start + step, rows)) for start in range(0, rows, step))


def as_stored(config: ModelConfig, names: Iterable[str]) -> ModelConfig:
    """``config``, without a vision tower where none of the tensors ``names`` belongs to one.

    Conversions of the text backbone alone keep the description of the tower they left out.
    """
    if any(name.startswith(VISION) for name in names):
        return config
    return replace(config, vision=None, image_tokens=None)


def arrange(stored: Mapping[str, Stored], config: ModelConfig, where: str) -> CheckpointMap:
    """Find every tensor of the model among the stored ones.

    Args:
        stored: The stored tensors by name.
        config: The checkpoint's config.
        where: The name of the checkpoint in messages.

    Raises:
        UserError: A tensor is unexpected, missing, or of the wrong shape or kind; the message names
            the first.
    """
    checkpoint = CheckpointMap(as_stored(config, stored))
    # 1) the decoder's tensors and the tower's, and what is quantised among them
    entries = [entry for entry in stored.values() if not _is_unused(entry.name, checkpoint.config)]
    _check_dtypes(entries, where)
    encoder = [entry for entry in entries if entry.name.startswith(ENCODER)]
    tensors = _StoredTensors(where)
    for entry in entries:
        if not entry.name.startswith(ENCODER):
            tensors.add(entry.name, entry)
    scaled = {name.removesuffix(".scales") for name in tensors.names if name.endswith(".scales")}
    checkpoint.precisions = _precisions(checkpoint.config, scaled)
    # 2) the encoder's own tensors
    expected = _expected(checkpoint.config, checkpoint.precisions)
    for entry in encoder:
        if entry.name in expected:
            tensors.add(entry.name, entry)
    # 3) everything that the model has, and nothing else
    _check_names(tensors, expected.keys())
    checkpoint.tensors = _tensors(tensors, expected, checkpoint.precisions)
    # 4) the encoder's copies of shared tensors
    copies = [entry for entry in encoder if entry.name not in expected]
    checkpoint.copies = [(entry, _original(entry, stored, where)) for entry in copies]
    return checkpoint


def _is_unused(name: str, config: ModelConfig) -> bool:
    """Whether a stored tensor is one that the model does not need."""
    if name == "lm_head.weight" or "rotary_emb" in name or name.endswith("embed_scale"):
        return True  # the tied head, and buffers that the config determines
    if not name.startswith(VISION):
        return False
    # a tower, or bounds of its linear maps, that the config says are not used
    return config.vision is None or (name.endswith(BOUNDS) and not config.vision.clipped)


def _check_dtypes(entries: Iterable[Stored], where: str) -> None:
    for entry in entries:
        if entry.dtype not in DTYPES:
            raise UserError(
                f"{where}: tensor {entry.name!r} is stored as {entry.dtype}, which is not "
                f"supported; known are {', '.join(DTYPES)}."
            )


def _check_names(tensors: _StoredTensors, expected: Set[str]) -> None:
    """Check that the stored tensors are exactly those the model expects.

    Raises:
        UserError: One is missing, or one is unexpected.
    """
    if unexpected := sorted(tensors.names - expected):
        raise _unexpected(tensors.where, tensors.original(unexpected[0]))
    if missing := sorted(expected - tensors.names):
        raise UserError(
            f"{tensors.where}: tensor {missing[0]!r} is missing ({len(missing)} of "
            f"{len(expected)} are); download the checkpoint again."
        )


def _unexpected(where: str, name: str) -> UserError:
    return UserError(
        f"{where}: unexpected tensor {name!r}; this is not a DiffusionGemma checkpoint of a known "
        "layout."
    )


def _tensors(
    tensors: _StoredTensors,
    expected: Mapping[str, mx.array],
    precisions: Mapping[str, Precision],
) -> dict[str, Tensor]:
    """The model's tensors by key, each with the pieces it is made of.

    Args:
        tensors: The stored tensors.
        expected: The arrays that the model expects, by key.
        precisions: The precision of each quantised module, by path.
    """
    transposed = set()
    for key, value in expected.items():
        is_group = key in tensors.groups and key.removesuffix(".weight") not in precisions
        if is_group and tensors.is_transposed(key, value.shape):
            transposed |= {key, _sibling(key)}
    mapped = {}
    for key, value in expected.items():
        tensor = Tensor(key, value.shape, tensors.pieces(key, value.shape, key in transposed))
        if tensor.stored.is_float != mx.issubdtype(value.dtype, mx.floating):
            raise UserError(
                f"{tensors.where}: tensor {tensor.stored.name!r} is stored as "
                f"{tensor.stored.dtype}, which does not go with the quantisation in config.json; "
                "download the checkpoint again."
            )
        mapped[key] = tensor
    return mapped


def _original(copy: Stored, stored: Mapping[str, Stored], where: str) -> Stored:
    """Find the decoder's tensor that an encoder's copy must equal.

    Args:
        copy: The encoder's tensor.
        stored: All stored tensors, by name.
        where: The name of the checkpoint in messages.

    Raises:
        UserError: There is no such tensor.
    """
    original = stored.get(DECODER + copy.name.removeprefix(ENCODER))
    if original is None or (original.shape, original.dtype) != (copy.shape, copy.dtype):
        raise _unexpected(where, copy.name)
    return original


def quantized_module(config: ModelConfig, precisions: Mapping[str, Precision]) -> DiffusionGemma:
    """The model with the modules in ``precisions`` quantised.

    Its weights are zeros until they are loaded.
    """
    model = DiffusionGemma(config)
    if precisions:

        def predicate(path: str, module: nn.Module) -> bool | dict[str, object]:
            if path not in precisions or not hasattr(module, "to_quantized"):
                return False
            precisions[path].check(path, module.weight.shape[-1])
            return vars(precisions[path])

        nn.quantize(model, class_predicate=predicate)
    return model


class _StoredTensors:
    """Stored tensors by the model's keys.

    ``groups`` holds the parts of each expert tensor, by projection and number of the expert (None
    where a part holds all experts); ``single`` everything else.
    """

    def __init__(self, where: str):
        self.where = where
        self.groups: dict[str, dict[tuple[str, int | None], Stored]] = {}
        self.single: dict[str, Stored] = {}

    @property
    def names(self) -> set[str]:
        return {*self.groups, *self.single}

    def original(self, key: str) -> str:
        """The stored name of ``key``, or of its first part."""
        if key in self.single:
            return self.single[key].name
        return next(iter(self.groups[key].values())).name

    def add(self, name: str, entry: Stored) -> None:
        match = _EXPERTS.match(name)
        if not match:
            self.single[name] = entry
            return
        prefix, number, projection, suffix = match.groups()
        matrix = "down_proj" if projection == "down_proj" else "gate_up_proj"
        group = self.groups.setdefault(f"{prefix}.{matrix}.{suffix or 'weight'}", {})
        group[projection, None if number is None else int(number)] = entry

    def pieces(self, key: str, shape: tuple[int, ...], transposed: bool) -> tuple[Piece, ...]:
        """The pieces that a tensor of the model is made of, in the order of its rows.

        Args:
            key: The model's key.
            shape: The shape that the model expects.
            transposed: Whether its experts are stored [inputs, outputs].

        Raises:
            UserError: A part is missing or of another shape.
        """
        if key in self.single:
            entry = self.single[key]
            self._check(entry, shape)
            return (Piece(entry, 0, _row_count(entry)),)
        group = self.groups[key]
        experts, outputs, inputs = shape
        order = self._projections(key)
        matrix = (outputs // len(order), inputs)
        stored_matrix = matrix[::-1] if transposed else matrix
        whole = all(number is None for _, number in group)
        pieces = []
        for expert in range(experts):
            for projection in order:
                number = None if whole else expert
                if (projection, number) not in group:
                    raise UserError(
                        f"{self.where}: expert {expert} of {key.removesuffix('.weight')} is "
                        "missing; download the checkpoint again."
                    )
                entry = group[projection, number]
                self._check(entry, (experts, *stored_matrix) if whole else stored_matrix)
                first = expert * stored_matrix[0] if whole else 0
                pieces.append(Piece(entry, first, first + stored_matrix[0], transposed))
        if len(group) == 1 and not transposed:  # the whole tensor, unchanged
            return (Piece(pieces[0].stored, 0, experts * outputs),)
        return tuple(pieces)

    def _projections(self, key: str) -> list[str]:
        """The projections that an expert's rows come from, in order.

        Raises:
            UserError: One of gate and up is missing.
        """
        stored = {projection for projection, _ in self.groups[key]}
        if len(stored) == 1 and stored <= {"gate_up_proj", "down_proj"}:
            return list(stored)
        order = ["gate_proj", "up_proj"]
        if stored != set(order):
            raise UserError(
                f"{self.where}: {key.removesuffix('.weight')} is incomplete, there is only "
                f"{', '.join(sorted(stored))}; download the checkpoint again."
            )
        return order

    def is_transposed(self, key: str, shape: tuple[int, ...]) -> bool:
        """Whether the experts of ``key`` are stored [inputs, outputs]; False for square matrices,
        which do not show it.
        """
        group = self.groups[key]
        outputs, inputs = shape[-2:]
        if {projection for projection, _ in group} == {"gate_proj", "up_proj"}:
            outputs //= 2
        return outputs != inputs and next(iter(group.values())).shape[-2:] == (inputs, outputs)

    def _check(self, entry: Stored, shape: tuple[int, ...]) -> None:
        if entry.shape != shape:
            raise UserError(
                f"{self.where}: tensor {entry.name!r} has shape {entry.shape}, "
                f"config.json asks for {shape}."
            )


def _precisions(config: ModelConfig, scaled: set[str]) -> dict[str, Precision]:
    """The precision of each quantised module; ``scaled`` are the paths that have scales."""
    if not config.quantization:
        if scaled:
            raise UserError(
                f"config.json names no quantisation, but {min(scaled)} has scales; "
                "download the checkpoint again."
            )
        return {}
    quantization = Quantization.from_config(config.quantization)
    modules = tree_flatten(DiffusionGemma(config).leaf_modules(), is_leaf=nn.Module.is_module)
    precisions = {}
    for path, module in modules:
        if hasattr(module, "to_quantized"):
            precision = quantization.of(path, path in scaled)
            if precision:
                precisions[path] = precision
    return precisions


def _expected(config: ModelConfig, precisions: Mapping[str, Precision]) -> dict[str, mx.array]:
    return dict(tree_flatten(quantized_module(config, precisions).parameters()))


def _sibling(key: str) -> str:
    """The other projection of the same experts, stored the same way round."""
    if "gate_up_proj" in key:
        return key.replace("gate_up_proj", "down_proj")
    return key.replace("down_proj", "gate_up_proj")


def _row_count(entry: Stored) -> int:
    return math.prod(entry.shape) // entry.columns if entry.columns else 0
