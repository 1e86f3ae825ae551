"""The tensors that a conversion writes, and how each is made from the stored ones.

>>> output = float_output(key, path, tensor, recipe, options, None)
>>> for arrays in output.slices():        # rows to write, a slice at a time
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_diffgemma.checkpoint.layouts import CheckpointMap, Tensor, row_slices
from mlx_diffgemma.checkpoint.options import ConvertOptions
from mlx_diffgemma.device import dtype_named
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.model.recipes import Precision, Recipe, kind_of
from mlx_diffgemma.safetensors import DTYPES

SUFFIXES = ("weight", "scales", "biases")  # the arrays of a quantised matrix


@dataclass(frozen=True)
class Merge:
    """A change to a tensor of ``shape``.

    ``rows`` maps its rows start to stop, in float32, to their new values.
    """

    shape: tuple[int, ...]
    rows: Callable[[mx.array, int, int], mx.array]


@dataclass(frozen=True)
class Merger:
    """An adapter to merge into the weights.

    Args:
        name: The name of the adapter, for the model card.
        digest: Tells this adapter from others.
        merges: The change to each matrix and vector, by key or module path.
        check: Refuses a checkpoint that is not the adapter's base.
        command: The options of the command, for the model card.
        requantize: Whether changed matrices get back the precision they had.  Without it they are
            stored unquantised.
    """

    name: str
    digest: str
    merges: Mapping[str, Merge]
    check: Callable[[CheckpointMap, Sequence[str]], None]
    command: str
    requantize: bool = False


@dataclass(frozen=True)
class Output:
    """One matrix or other tensor of the result.

    Args:
        path: The path of its module, or its key.
        kind: The class of the matrix in recipes, or "other".
        shape: Its unpacked shape.
        source: The tensors it is made from, by suffix; "" where there is only one.
        before: The precision it is stored in; None where it is not quantised.
        after: The precision of the result.
        dtype: The dtype of its floating-point arrays.
        arrays: The dtype and shape of each array to write, by its name in the file.
        merge: The change to its values, where an adapter is merged.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    source: Mapping[str, Tensor]
    before: Precision | None
    after: Precision | None
    dtype: mx.Dtype
    arrays: Mapping[str, tuple[mx.Dtype, tuple[int, ...]]]
    merge: Merge | None = None

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes_in(self) -> int:
        return sum(tensor.nbytes(DTYPES[tensor.stored.dtype]) for tensor in self.source.values())

    @property
    def bytes_out(self) -> int:
        return sum(math.prod(shape) * dtype.size for dtype, shape in self.arrays.values())

    def memory_bytes(self, element_size: int) -> int:
        """Its bytes in a loaded model, whose floating-point elements take ``element_size``."""
        total = 0
        for dtype, shape in self.arrays.values():
            is_floating = mx.issubdtype(dtype, mx.floating)
            total += math.prod(shape) * (element_size if is_floating else dtype.size)
        return total

    def slices(self) -> Iterator[dict[str, mx.array]]:
        """The arrays to write, by name, a range of rows at a time and in order.

        Raises:
            UserError: A weight is not finite.
        """
        for start, stop in row_slices(self.shape):
            rows = {suffix: tensor.read(start, stop) for suffix, tensor in self.source.items()}
            converted = self._convert(rows, start, stop)
            mx.eval(converted)
            yield dict(zip(self.arrays, converted, strict=True))

    def _convert(self, rows: Mapping[str, mx.array], start: int, stop: int) -> list[mx.array]:
        is_kept = self.before is not None and self.after is not None and self.merge is None
        if is_kept:
            return [self._cast(rows[suffix]) for suffix in SUFFIXES if suffix in rows]
        if self.before is not None:
            values = self.before.dequantize(rows, self.dtype if self.merge is None else mx.float32)
        else:
            (values,) = rows.values()
        if self.merge is not None:
            values = self.merge.rows(values.astype(mx.float32), start, stop)
        values = self._cast(values)
        return [values] if self.after is None else list(self.after.quantize(values).values())

    def _cast(self, values: mx.array) -> mx.array:
        """Floating-point values in the dtype of the result; integers as they are.

        They are checked before they are quantised, because a quantiser hides values that are not
        finite.

        Raises:
            UserError: A value is not finite.
        """
        if not mx.issubdtype(values.dtype, mx.floating):
            return values
        cast = values.astype(self.dtype)
        # Buffers of the vision tower may be infinite on purpose: they bound activations.
        if (self.kind != "vision" or self.after) and not mx.isfinite(cast).all().item():
            advice = "; download the checkpoint again."
            if mx.isfinite(values).all().item():
                advice = f" in {dtype_name(self.dtype)}; leave --dtype out."
            raise UserError(f"Tensor {self.path} holds numbers that are not finite{advice}")
        return cast


def float_output(
    key: str,
    path: str,
    tensor: Tensor,
    recipe: Recipe | None,
    options: ConvertOptions,
    merger: Merger | None,
) -> Output:
    """The output of a tensor that is not quantised in the source.

    Args:
        key: The tensor's key in the model.
        path: The path of its module where it is a weight, else its key.
        tensor: The stored tensor.
        recipe: The recipe to quantise by, or None.
        options: The options of the conversion.
        merger: The adapter to merge, or None.
    """
    is_matrix = path != key and len(tensor.shape) > 1 and tensor.stored.is_float
    kind = kind_of(path)
    if kind != "vision" and not is_matrix:
        kind = "other"
    after = recipe.precision_at(key, tensor.shape) if recipe and is_matrix else None
    dtype = DTYPES[tensor.stored.dtype]
    if tensor.stored.is_float and options.stored_dtype:
        dtype = dtype_named(options.stored_dtype)
    if after:
        after.check(path, tensor.shape[-1])
        arrays = _packed_arrays(path, after, tensor.shape, dtype)
    else:  # experts go by the released layout's name, which every reader knows
        arrays = {path if kind == "experts" else key: (dtype, tensor.shape)}
    return Output(
        path=path,
        kind=kind,
        shape=tensor.shape,
        source={"": tensor},
        before=None,
        after=after,
        dtype=dtype,
        arrays=arrays,
        merge=merger.merges.get(path) if merger else None,
    )


def quantised_output(
    path: str,
    tensors: Mapping[str, Tensor],
    before: Precision,
    options: ConvertOptions,
    default: mx.Dtype,
    merger: Merger | None,
) -> Output:
    """The output of a matrix that is quantised in the source.

    Args:
        path: The path of its module.
        tensors: The stored tensors by key.
        before: The precision it is stored in.
        options: The options of the conversion.
        default: The dtype of its values where neither the options nor its scales have one.
        merger: The adapter to merge, or None.
    """
    source = {}
    for suffix in SUFFIXES:
        if f"{path}.{suffix}" in tensors:
            source[suffix] = tensors[f"{path}.{suffix}"]
    scales = source["scales"]
    if options.dtype:
        dtype = dtype_named(options.dtype)
    elif scales.stored.is_float:
        dtype = DTYPES[scales.stored.dtype]
    else:
        dtype = default
    shape = (*scales.shape[:-1], scales.shape[-1] * before.group_size)
    kind = kind_of(path)
    merge = merger.merges.get(path) if merger else None
    after: Precision | None = before
    arrays = _packed_arrays(path, before, shape, dtype)
    if options.dequantize or (merger and merge and not merger.requantize):
        after = None
        arrays = {path if kind == "experts" else f"{path}.weight": (dtype, shape)}
    return Output(
        path=path,
        kind=kind,
        shape=shape,
        source=source,
        before=before,
        after=after,
        dtype=dtype,
        arrays=arrays,
        merge=merge,
    )


def dtype_name(dtype: mx.Dtype) -> str:
    """The name of a dtype without the module's."""
    return str(dtype).removeprefix("mlx.core.")


def _packed_arrays(
    path: str, precision: Precision, shape: tuple[int, ...], dtype: mx.Dtype
) -> dict[str, tuple[mx.Dtype, tuple[int, ...]]]:
    packed = precision.packed(shape, dtype)
    return {f"{path}.{suffix}": array for suffix, array in packed.items()}
