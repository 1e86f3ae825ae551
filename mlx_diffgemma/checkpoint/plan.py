"""What a conversion will write: every tensor, its precision and its size, before anything is read.

A :class:`Conversion` is made from headers and config alone, so a dry run prints the same plan that a
conversion carries out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

import mlx_diffgemma
from mlx_diffgemma.checkpoint.configs import set_dtype, written_configs
from mlx_diffgemma.checkpoint.layouts import CheckpointMap, arrange
from mlx_diffgemma.checkpoint.options import ConvertOptions
from mlx_diffgemma.checkpoint.outputs import (
    Merger,
    Output,
    dtype_name,
    float_output,
    quantised_output,
)
from mlx_diffgemma.device import compute_dtype
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.model.config import MARK, ModelConfig
from mlx_diffgemma.model.recipes import CLASSES
from mlx_diffgemma.safetensors import DTYPES, Stored

SHARD_SIZE = 5 * 10**9  # bytes of an output file, as in mlx-lm


@dataclass(frozen=True)
class ClassRow:
    """A line of the dry run: one class of tensors."""

    kind: str
    tensors: int
    parameters: int
    bytes_in: int
    bytes_out: int
    precision: str

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes_out / self.parameters


@dataclass(frozen=True)
class Conversion:
    """A plan: every output, in the order of the files, and the configs that go with them.

    Args:
        name: The source as the user named it.
        folder: The folder of the source's small files.
        config: The config of the source.
        options: The options of the conversion.
        outputs: What is written.
        source: The stored tensors under the model's names.
        raw_config: config.json of the result.
        generation_config: generation_config.json of the result.
        merger: The adapter to merge, or None.
    """

    name: str
    folder: Path
    config: ModelConfig
    options: ConvertOptions
    outputs: tuple[Output, ...]
    source: CheckpointMap
    raw_config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    merger: Merger | None = None

    @property
    def bytes_in(self) -> int:
        return sum(output.bytes_in for output in self.outputs)

    @property
    def bytes_out(self) -> int:
        return sum(output.bytes_out for output in self.outputs)

    @property
    def bits_per_weight(self) -> float:
        """Bits a weight of the text backbone, scales included."""
        backbone = [output for output in self.outputs if output.kind != "vision"]
        total = sum(output.bytes_out for output in backbone)
        return 8 * total / sum(output.size for output in backbone)

    @property
    def memory_bytes(self) -> int:
        """The bytes of the loaded text backbone.

        On a GPU it has its stored dtype.  On a CPU its floating-point arrays are float32.
        """
        norm = next(output for output in self.outputs if output.path == "model.decoder.norm")
        element_size = compute_dtype(norm.dtype).size
        backbone = (output for output in self.outputs if output.kind != "vision")
        return sum(output.memory_bytes(element_size) for output in backbone)

    @property
    def recipe(self) -> str | None:
        """The recipe to name in the result's config.

        It is the recipe of the options, or the source's own where its precision is kept.
        """
        if recipe := self.options.chosen():
            return recipe.name
        changed = self.merger is not None and not self.merger.requantize
        return None if self.options.dequantize or changed else self.config.recipe

    def rows(self) -> list[ClassRow]:
        """A summary of each class of tensors."""
        summaries = []
        for kind in (*CLASSES, "other"):
            outputs = [output for output in self.outputs if output.kind == kind]
            if outputs:
                summaries.append(_summary(kind, outputs))
        return summaries

    def shards(self) -> dict[str, list[Output]]:
        """The outputs of each file, by its name."""
        groups: list[list[Output]] = [[]]
        filled = 0
        for output in self.outputs:
            if groups[-1] and filled + output.bytes_out > SHARD_SIZE:
                groups.append([])
                filled = 0
            groups[-1].append(output)
            filled += output.bytes_out
        if len(groups) == 1:
            return {"model.safetensors": groups[0]}
        return {
            f"model-{i + 1:05}-of-{len(groups):05}.safetensors": group
            for i, group in enumerate(groups)
        }

    def fingerprint(self) -> str:
        """Digest of everything that decides the written bytes: sources, options, versions and
        device.
        """
        sources = set()
        for output in self.outputs:
            for tensor in output.source.values():
                sources |= {piece.stored.path for piece in tensor.pieces}
        files = []
        for path in sorted(sources):
            stat = path.stat()
            files.append((path.name, stat.st_size, stat.st_mtime_ns))
        plan = [(o.path, asdict(o.after) if o.after else None, str(o.dtype)) for o in self.outputs]
        versions = (mlx_diffgemma.__version__, mx.__version__, str(mx.default_device()))
        return hashlib.sha256(
            json.dumps([files, plan, versions, self.raw_config]).encode()
        ).hexdigest()


def plan(
    name: str,
    folder: Path,
    stored: Mapping[str, Stored],
    options: ConvertOptions,
    merger: Merger | None = None,
) -> Conversion:
    """Plan a conversion from headers and config alone.

    Args:
        name: The source as the user named it.
        folder: The folder of its configs.
        stored: Its tensors, from their headers.
        options: The options of the conversion.
        merger: The adapter to merge, or None.

    Raises:
        UserError: The checkpoint is not complete, or the options or the adapter do not fit it.
    """
    config = ModelConfig.from_folder(folder)
    source = arrange(stored, config, name)
    _check_precision(name, source, options, merger)
    outputs = _outputs(source, options, merger)
    if merger:
        _check_merges(name, merger, outputs)
    precisions = {output.path: output.after for output in outputs}
    raw, generation = written_configs(folder, config, precisions, source.config.vision is not None)
    if options.stored_dtype:
        set_dtype(raw, options.stored_dtype)
    conversion = Conversion(
        name=name,
        folder=folder,
        config=config,
        options=options,
        outputs=tuple(outputs),
        source=source,
        raw_config=raw,
        generation_config=generation,
        merger=merger,
    )
    raw[MARK] = {"version": mlx_diffgemma.__version__, "recipe": conversion.recipe}
    fused = [*config.fused, *([merger.digest] if merger else [])]
    if fused:
        raw[MARK]["fused"] = fused
    return conversion


def _check_precision(
    name: str, source: CheckpointMap, options: ConvertOptions, merger: Merger | None
) -> None:
    """Check that the options fit the precision of the source.

    Args:
        name: The source as the user named it.
        source: Its tensors.
        options: The options of the conversion.
        merger: The adapter to merge, or None.

    Raises:
        UserError: They do not.
    """
    quantised = source.precisions
    if quantised and options.chosen() is not None:
        precisions = ", ".join(sorted({str(precision) for precision in quantised.values()}))
        raise UserError(
            f"{name} is quantised already ({precisions}); convert the original checkpoint instead, "
            "or dequantise this one first with -d, which loses no more but gains nothing."
        )
    if options.dequantize and not quantised and not merger:
        raise UserError(f"{name} is not quantised; leave -d out.")


def _outputs(source: CheckpointMap, options: ConvertOptions, merger: Merger | None) -> list[Output]:
    """The outputs, in the order of the model's keys."""
    tensors = source.tensors
    default = DTYPES[tensors["model.decoder.norm.weight"].stored.dtype]
    recipe = options.chosen()
    outputs = []
    for key in sorted(tensors):
        path, dot, suffix = key.rpartition(".")
        if path not in source.precisions:
            module_path = path if dot and suffix == "weight" else key
            outputs.append(float_output(key, module_path, tensors[key], recipe, options, merger))
        elif suffix == "weight":
            before = source.precisions[path]
            outputs.append(quantised_output(path, tensors, before, options, default, merger))
    return outputs


def _check_merges(name: str, merger: Merger, outputs: Sequence[Output]) -> None:
    """Check that every tensor that the adapter changes is in the checkpoint, in the same shape.

    Args:
        name: The source as the user named it.
        merger: The adapter to merge.
        outputs: The tensors of the result.

    Raises:
        UserError: One is absent or has another shape.
    """
    shapes = {output.path: output.shape for output in outputs}
    for path, merge in merger.merges.items():
        if path not in shapes:
            raise UserError(f"{merger.name} changes {path}, which {name} does not have.")
        if merge.shape != shapes[path]:
            raise UserError(
                f"{merger.name} has an update of shape {merge.shape} for {path}, "
                f"which is {shapes[path]} in {name}."
            )


def _summary(kind: str, outputs: Sequence[Output]) -> ClassRow:
    precisions = {dtype_name(o.dtype) if o.after is None else str(o.after) for o in outputs}
    return ClassRow(
        kind=kind,
        tensors=len(outputs),
        parameters=sum(output.size for output in outputs),
        bytes_in=sum(output.bytes_in for output in outputs),
        bytes_out=sum(output.bytes_out for output in outputs),
        precision=" / ".join(sorted(precisions)),
    )
