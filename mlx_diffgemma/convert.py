"""Converts and quantises a checkpoint, tensor by tensor, in a fraction of its size.

A :class:`Conversion` says what every tensor becomes; it is made from headers and config alone, so that a dry run is the
same plan not carried out.  Rows are read, quantised and written a slice at a time below ``TARGET.partial``; when all is there
the folder gets the target's name.  What is interrupted can be resumed and is never taken for a model.

    >>> convert("google/diffusiongemma-26B-A4B-it", "diffusiongemma-4bit", quantize=True)
"""

from __future__ import annotations

import contextlib
import copy
import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

import mlx_diffgemma
from mlx_diffgemma import hub, nano
from mlx_diffgemma.config import FULL, MARK, MODEL_TYPE, ModelConfig
from mlx_diffgemma.device import compute_dtype, dtype_named
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.files import (
    WriteError,
    check_folder,
    expand_name,
    expand_path,
    list_files,
    read_json,
    read_text,
    write_json,
    write_text,
)
from mlx_diffgemma.layouts import SLICE, Arrangement, Tensor, arrange, row_slices
from mlx_diffgemma.model_card import model_card
from mlx_diffgemma.recipes import CLASSES, Precision, Recipe, kind_of, recipe_named, to_config
from mlx_diffgemma.storage import DTYPES, INDEX, SafetensorsWriter, Stored, read_headers

SHARD_SIZE = 5 * 10**9  # bytes of an output file, as mlx-lm has it
# A partial folder holds the result as far as it got, and a journal: the plan's fingerprint, then what is finished.
JOURNAL, RESULT = "conversion.jsonl", "result"
COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "NOTICE*")
WRITTEN = {"config.json", "generation_config.json", INDEX, "README.md"}
LIST = "files"  # in the index's metadata: the files that were copied, so that --overwrite knows them again
HUB = {".gitattributes", ".cache"}  # what the Hub's client puts beside a checkpoint
OLDER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
         "processor_config.json", "preprocessor_config.json", "LICENSE", "NOTICE")  # of conversions without such a list
Progress = Callable[[int, int], None]  # source bytes done, of all


@dataclass(frozen=True)
class Merge:
    """A change to a tensor of ``shape``: ``rows`` takes its rows start to stop in float32 to what they become."""

    shape: tuple[int, ...]
    rows: Callable[[mx.array, int, int], mx.array]


@dataclass(frozen=True)
class Merger:
    """An adapter on its way into the weights: what becomes of the matrices and vectors in ``merges``, by key or module path.

    They are stored without quantisation, unless ``requantize`` gives them back the precision they had.  ``check`` refuses
    another base; ``digest`` tells one adapter from another, ``name`` and ``command`` are for the model card.
    """

    name: str
    digest: str
    merges: Mapping[str, Merge]
    check: Callable[[Arrangement, Sequence[str]], None]
    command: str
    requantize: bool = False


@dataclass(frozen=True)
class ConvertOptions:
    """What to make of a checkpoint, in mlx-lm's words.  Errors: UserError for words that contradict each other.

    ``recipe`` alone quantises; with ``quantize`` alone it is the one of that ``q_mode``, for affine "4bit".  ``q_bits``,
    ``q_group_size`` and ``q_mode`` set the recipe's experts (everything in a uniform recipe).  ``dtype`` is for what is
    not quantised; None leaves it as stored.
    """

    quantize: bool = False
    recipe: str | None = None
    q_bits: int | None = None
    q_group_size: int | None = None
    q_mode: str | None = None
    dtype: str | None = None
    dequantize: bool = False

    def __post_init__(self) -> None:
        wanted = self.quantize or self.recipe is not None
        if self.dequantize and wanted:
            raise UserError("Either quantise or dequantise, not both at once; leave -d out, or -q and --recipe.")
        for name in ("q_bits", "q_group_size", "q_mode"):
            if getattr(self, name) is not None and not wanted:
                raise UserError(f"--{name.replace('_', '-')} has no effect without -q; add -q, or --recipe with a name.")
        if self.dtype is not None:
            dtype_named(self.dtype)
        recipe = self.chosen()
        changes = (self.q_bits, self.q_group_size, self.q_mode)
        if recipe and not recipe.quantises and (self.quantize or changes != (None, None, None)):
            raise UserError(f"Recipe {recipe.name} quantises nothing; leave -q and the --q- options out, or take another recipe.")

    def chosen(self) -> Recipe | None:
        """The recipe with its changes; None when the precision is to stay as it is, or to be undone."""
        if self.recipe is None and not self.quantize:
            return None
        recipe = recipe_named(self.recipe or "4bit")
        return recipe.changed(self.q_bits, self.q_group_size, self.q_mode)

    @property
    def stored_dtype(self) -> str | None:
        """The dtype of what is not quantised; None leaves it as stored."""
        return self.dtype or ("bfloat16" if self.recipe == "bf16" else None)

    def command(self) -> str:
        """These options as a command line spells them."""
        words = ["-q"] if self.quantize else ["-d"] if self.dequantize else []
        for name in ("recipe", "q_bits", "q_group_size", "q_mode", "dtype"):
            if (value := getattr(self, name)) is not None:
                words.append(f"--{name.replace('_', '-')} {value}")
        return " ".join(words)


@dataclass(frozen=True)
class Output:
    """One matrix or other tensor of the result: ``source`` holds what it is made from by suffix ("" where there is none).

    ``shape`` is the unpacked one; ``arrays`` what is written, by name in the file.
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
        """What it takes when run: packed weights as they are, what is floating in the compute dtype."""
        return sum(math.prod(shape) * (element_size if mx.issubdtype(dtype, mx.floating) else dtype.size)
                   for dtype, shape in self.arrays.values())

    def slices(self) -> Iterator[dict[str, mx.array]]:
        """The arrays to write, by name, a range of rows at a time and in order.

        Errors: UserError where a weight is not finite.
        """
        for start, stop in row_slices(self.shape):
            read = {suffix: tensor.read(start, stop) for suffix, tensor in self.source.items()}
            made = self._convert(read, start, stop)
            mx.eval(made)
            yield dict(zip(self.arrays, made, strict=True))

    def _convert(self, read: Mapping[str, mx.array], start: int, stop: int) -> list[mx.array]:
        if self.before is not None and self.after is not None and self.merge is None:  # kept as it is
            kept = [read[suffix] for suffix in ("weight", "scales", "biases") if suffix in read]
            return [self._cast(v) if mx.issubdtype(v.dtype, mx.floating) else v for v in kept]
        if self.before is not None:
            values = self.before.dequantize(read, self.dtype if self.merge is None else mx.float32)
        else:
            (values,) = read.values()
        if self.merge is not None:
            values = self.merge.rows(values.astype(mx.float32), start, stop)
        values = self._cast(values) if mx.issubdtype(values.dtype, mx.floating) else values
        return [values] if self.after is None else list(self.after.quantize(values).values())

    def _cast(self, values: mx.array) -> mx.array:
        """In the dtype of the result.  Before it is quantised, because a quantiser hides what is not a number."""
        cast = values.astype(self.dtype)
        # Buffers of the vision tower may be infinite on purpose: they bound activations.
        if (self.kind != "vision" or self.after) and not mx.isfinite(cast).all().item():
            raise UserError(f"Tensor {self.path} holds numbers that are not finite" + (
                f" in {_name(self.dtype)}; leave --dtype out." if mx.isfinite(values).all().item() else
                "; download the checkpoint again."))
        return cast


@dataclass(frozen=True)
class Conversion:
    """A plan: every output, in the order of the files, and the config that goes with them.

    ``name`` is what the user called the source, ``folder`` where its small files lie.
    """

    name: str
    folder: Path
    config: ModelConfig
    options: ConvertOptions
    outputs: tuple[Output, ...]
    source: Arrangement
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
        """Of the text backbone, scales included."""
        backbone = [output for output in self.outputs if output.kind != "vision"]
        return 8 * sum(output.bytes_out for output in backbone) / sum(output.size for output in backbone)

    @property
    def memory_bytes(self) -> int:
        """What the text backbone takes when it is run here: as stored on a GPU, on a CPU with float32 for what is floating."""
        element = compute_dtype(next(o.dtype for o in self.outputs if o.path == "model.decoder.norm")).size
        return sum(o.memory_bytes(element) for o in self.outputs if o.kind != "vision")

    @property
    def recipe(self) -> str | None:
        """The name under which the result is marked: the recipe's, or the source's own where its precision is kept."""
        if recipe := self.options.chosen():
            return recipe.name
        changed = self.merger is not None and not self.merger.requantize
        return None if self.options.dequantize or changed else self.config.recipe

    def rows(self) -> list[ClassRow]:
        """What becomes of each class of tensors."""
        found = []
        for kind in (*CLASSES, "other"):
            own = [output for output in self.outputs if output.kind == kind]
            if own:
                precisions = sorted({_name(o.dtype) if o.after is None else str(o.after) for o in own})
                found.append(ClassRow(kind, len(own), sum(o.size for o in own), sum(o.bytes_in for o in own),
                                      sum(o.bytes_out for o in own), " / ".join(precisions)))
        return found

    def shards(self) -> dict[str, list[Output]]:
        """Outputs by file name."""
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
        return {f"model-{i + 1:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups)}

    def fingerprint(self) -> str:
        """Differs when anything that decides the written bytes does: sources, options, versions, device."""
        sources = {piece.stored.path for o in self.outputs for t in o.source.values() for piece in t.pieces}
        files = [(path.name, (stat := path.stat()).st_size, stat.st_mtime_ns) for path in sorted(sources)]
        plan = [(o.path, asdict(o.after) if o.after else None, str(o.dtype)) for o in self.outputs]
        versions = (mlx_diffgemma.__version__, mx.__version__, str(mx.default_device()))
        return hashlib.sha256(json.dumps([files, plan, versions, self.raw_config]).encode()).hexdigest()


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


def plan(name: str, folder: Path, stored: Mapping[str, Stored], options: ConvertOptions,
         merger: Merger | None = None) -> Conversion:
    """Errors: UserError when the checkpoint is not whole, or the options or what is merged do not fit it."""
    config = ModelConfig.from_folder(folder)
    found = arrange(stored, config, name)
    recipe = options.chosen()
    quantised = found.precisions
    if quantised and recipe is not None:
        raise UserError(f"{name} is quantised already ({', '.join(sorted({str(p) for p in quantised.values()}))}); convert the "
                        "original checkpoint instead, or dequantise this one first with -d, which loses no more but gains nothing.")
    if options.dequantize and not quantised and not merger:
        raise UserError(f"{name} is not quantised; leave -d out.")
    tensors = found.tensors
    default = DTYPES[tensors["model.decoder.norm.weight"].stored.dtype]
    outputs = []
    for key in sorted(tensors):
        path, dot, suffix = key.rpartition(".")
        if path in quantised:
            if suffix == "weight":
                outputs.append(_quantised_output(path, tensors, quantised[path], options, default, merger))
            continue
        outputs.append(_float_output(key, path if dot and suffix == "weight" else key, tensors[key], recipe, options, merger))
    if merger:
        shapes = {output.path: output.shape for output in outputs}
        for path, merge in merger.merges.items():
            if path not in shapes:
                raise UserError(f"{merger.name} changes {path}, which {name} does not have.")
            if merge.shape != shapes[path]:
                raise UserError(f"{merger.name} has an update of shape {merge.shape} for {path}, "
                                f"which is {shapes[path]} in {name}.")
    raw, generation = _configs(folder, config, {output.path: output.after for output in outputs},
                              found.config.vision is not None)
    if dtype := options.stored_dtype:
        for part in (raw, raw["text_config"]):
            part |= {key: dtype for key in ("dtype", "torch_dtype") if key in part} or {"dtype": dtype}
    conversion = Conversion(name, folder, config, options, tuple(outputs), found, raw, generation, merger)
    raw[MARK] = {"version": mlx_diffgemma.__version__, "recipe": conversion.recipe}
    if fused := [*config.fused, *([merger.digest] if merger else [])]:
        raw[MARK]["fused"] = fused
    return conversion


def convert(hf_path: str, mlx_path: str | Path = "mlx_model", quantize: bool = False, q_group_size: int | None = None,
            q_bits: int | None = None, q_mode: str | None = None, dtype: str | None = None, upload_repo: str | None = None,
            revision: str | None = None, dequantize: bool = False, recipe: str | None = None, overwrite: bool = False,
            resume: bool = False, progress: Progress | None = None) -> Path:
    """Convert the checkpoint ``hf_path`` (folder, Hub id or "nano") to the folder ``mlx_path``, which is returned.

    Options as in :class:`ConvertOptions`.  ``overwrite`` replaces an existing conversion, ``resume`` goes on with one that
    was interrupted.  Errors: UserError; nothing is left then but what ``resume`` can use.
    """
    options = ConvertOptions(quantize, recipe, q_bits, q_group_size, q_mode, dtype, dequantize)
    return carry_out(hf_path, mlx_path, options, None, upload_repo, revision, overwrite, resume, progress)


def carry_out(name: str, mlx_path: str | Path, options: ConvertOptions, merger: Merger | None = None,
              upload_repo: str | None = None, revision: str | None = None, overwrite: bool = False, resume: bool = False,
              progress: Progress | None = None) -> Path:
    """``convert``, with something to merge or without.  Errors: as there."""
    name = name if name == nano.NAME else expand_name(name)
    target = expand_path(mlx_path).resolve()
    check_target(target, overwrite, resume)
    # All that can be refused is refused from headers alone, before gigabytes are fetched or an upload is begun.
    conversion = plan(name, *hub.headers(name, revision), options, merger)
    _check_disk(conversion, target)
    if upload_repo:
        hub.check_upload(upload_repo)
    folder = hub.resolve(name, revision)
    source = folder.resolve()
    if any(_is_same(one, source) for one in (target, *target.parents)) or any(_is_same(one, target) for one in source.parents):
        raise UserError(f"{target} and the checkpoint to convert lie in each other; choose another folder to write.")
    conversion = plan(name, folder, read_headers(folder), options, merger)
    conversion.source.check_copies()
    if merger:
        merger.check(conversion.source, conversion.config.fused)
    write(conversion, target, overwrite, resume, upload_repo, progress)
    if upload_repo:
        hub.upload(target, upload_repo)
    return target


def _is_same(one: Path, other: Path) -> bool:
    """Whether both name one folder: file systems may not tell upper from lower case, or two forms of a letter."""
    try:
        return one.samefile(other)
    except OSError:  # one of them does not exist
        return one == other


def check_target(target: Path, overwrite: bool, resume: bool) -> None:
    """Errors: UserError when ``target`` may not be written."""
    partial = partial_folder(target)
    try:
        if target.exists():
            if not overwrite:
                raise UserError(f"{target} exists already; choose another folder, or add --overwrite to replace it.")
            if foreign := _foreign(target):
                raise UserError(f"{target} holds {foreign}, which this command did not write, and is not overwritten; move "
                                "that, or choose another folder.")
        if partial.exists():
            if not _is_partial(partial):
                raise UserError(f"{partial} is in the way and is not ours; move it, or choose another folder.")
            if not (resume or overwrite):
                raise UserError(f"An interrupted conversion lies in {partial}; add --resume to go on with it, or --overwrite to "
                                "begin anew.")
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error.strerror}); choose another folder.") from None
    try:
        check_folder(partial)
    except WriteError as error:
        reason = os.strerror(error.errno or 0)
        raise UserError(f"{target} cannot be written ({reason}); choose another folder.") from None


def _is_partial(folder: Path) -> bool:
    """Whether a folder is what an interrupted conversion left: a journal with a result, or nothing yet."""
    if not folder.is_dir():
        return False
    # Of a journal that was being written when the process was killed, a part is left.
    names = {path.name for path in folder.iterdir() if not path.name.startswith(f".{JOURNAL}.")}
    begun = JOURNAL in names or not (RESULT in names and any((folder / RESULT).iterdir()))
    return begun and names <= {JOURNAL, f"{JOURNAL}.new", RESULT}


def _foreign(folder: Path) -> str | None:
    """The first name in ``folder`` that no conversion wrote, by its own list of files; None where all are ours."""
    if not folder.is_dir():
        return "a file in its place"
    names = sorted(path.name for path in folder.iterdir())
    if not names:
        return None
    try:
        config = read_json(folder / "config.json")
        index = read_json(folder / INDEX)
    except UserError:
        return names[0]
    if config.get("model_type") != MODEL_TYPE or not isinstance(config.get(MARK), dict):
        return "a checkpoint"
    listed = (index.get("metadata") or {}).get(LIST, OLDER)
    ours = {*WRITTEN, *HUB, *listed, *(index.get("weight_map") or {}).values()}
    return next((name for name in names if name not in ours), None)


def write(conversion: Conversion, target: Path, overwrite: bool = False, resume: bool = False, upload_repo: str | None = None,
          progress: Progress | None = None) -> None:
    """Carry a plan out.  Errors: UserError as ``convert``."""
    partial = partial_folder(target)
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error.strerror}); choose another folder.") from None
    with _alone(partial):
        done = _finished(partial, conversion.fingerprint()) if resume else ()
        if not done:
            shutil.rmtree(partial / RESULT, ignore_errors=True)
        cache_limit = mx.set_cache_limit(4 * SLICE)
        try:
            (partial / RESULT).mkdir(exist_ok=True)
            _write_weights(conversion, partial, done, progress)
            _write_files(conversion, partial / RESULT, upload_repo)
            if not target.exists() or overwrite:
                _put_in_place(partial, target)
                return
        except (OSError, WriteError) as error:
            again = "--overwrite --resume" if target.exists() else "--resume"
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(f"The disk of {target} filled up; free {_gb(conversion.bytes_out)} in all and run again with "
                                f"{again}.") from None
            raise UserError(f"Converting stopped ({error}); when that is put right, run again with {again}.") from None
        except UserError:
            shutil.rmtree(partial, ignore_errors=True)  # the source is at fault, so resuming cannot help
            raise
        finally:
            mx.set_cache_limit(cache_limit)
    check_target(target, overwrite, resume)  # something was put there in the meantime


@contextlib.contextmanager
def _alone(partial: Path) -> Iterator[None]:
    """Hold a partial folder.  Errors: UserError when another process does."""
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"Another conversion is writing {partial}; wait for it, or choose another folder.") from None
    finally:
        os.close(descriptor)


def _float_output(key: str, path: str, tensor: Tensor, recipe: Recipe | None, options: ConvertOptions,
                  merger: Merger | None) -> Output:
    is_matrix = path != key and len(tensor.shape) > 1 and tensor.stored.is_float
    kind = "vision" if kind_of(path) == "vision" else kind_of(path) if is_matrix else "other"
    after = recipe.precision_at(key, tensor.shape) if recipe and is_matrix else None
    if after:
        after.check(path, tensor.shape[-1])
    dtype = DTYPES[tensor.stored.dtype]
    if tensor.stored.is_float and (wanted := options.stored_dtype):
        dtype = dtype_named(wanted)
    if after:
        arrays = {f"{path}.{suffix}": array for suffix, array in after.packed(tensor.shape, dtype).items()}
    else:  # experts go by the released layout's name, which every reader knows
        arrays = {path if kind == "experts" else key: (dtype, tensor.shape)}
    return Output(path, kind, tensor.shape, {"": tensor}, None, after, dtype, arrays, merger.merges.get(path) if merger else None)


def _quantised_output(path: str, tensors: Mapping[str, Tensor], before: Precision, options: ConvertOptions,
                      default: mx.Dtype, merger: Merger | None) -> Output:
    source = {suffix: tensors[f"{path}.{suffix}"] for suffix in ("weight", "scales", "biases") if f"{path}.{suffix}" in tensors}
    scales = source["scales"]
    dtype = dtype_named(options.dtype) if options.dtype else DTYPES[scales.stored.dtype] if scales.stored.is_float else default
    shape = (*scales.shape[:-1], scales.shape[-1] * before.group_size)
    kind, merge = kind_of(path), merger.merges.get(path) if merger else None
    if options.dequantize or (merger and merge and not merger.requantize):
        arrays = {path if kind == "experts" else f"{path}.weight": (dtype, shape)}
        return Output(path, kind, shape, source, before, None, dtype, arrays, merge)
    arrays = {f"{path}.{suffix}": array for suffix, array in before.packed(shape, dtype).items()}
    return Output(path, kind, shape, source, before, before, dtype, arrays, merge)


def _configs(folder: Path, config: ModelConfig, precisions: Mapping[str, Precision | None],
             has_vision: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json in the older dialect and generation_config.json with every number of the sampler: mlx-vlm needs both."""
    raw = copy.deepcopy(dict(config.raw))
    raw.pop("quantization", None)
    raw.pop("quantization_config", None)
    if any(precisions.values()):
        # the second name is where the Hub looks
        raw["quantization"] = raw["quantization_config"] = to_config(precisions)
    text = raw["text_config"]
    shapes = {kind: {(layer.head_dim, layer.num_kv_heads) for layer in config.text.layers if layer.kind == kind}
              for kind in {layer.kind for layer in config.text.layers}}
    if "per_layer_config" in text and all(len(found) == 1 for found in shapes.values()):
        del text["per_layer_config"]
        for kind, ((size, heads),) in shapes.items():
            names = ("global_head_dim", "num_global_key_value_heads") if kind == FULL else ("head_dim", "num_key_value_heads")
            text |= dict(zip(names, (size, heads), strict=True))
    if not has_vision:
        raw["vision_config"] = None  # mlx-vlm refuses a vision_config without its weights
    path = folder / "generation_config.json"
    generation = copy.deepcopy(read_json(path) if path.exists() else dict(raw.get("generation_config") or {}))
    own = config.generation
    numbers = {"max_denoising_steps": own.max_denoising_steps, "t_min": own.t_min, "t_max": own.t_max,
               "confidence_threshold": own.confidence_threshold, "stability_threshold": own.stability_threshold,
               "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": own.entropy_bound},
               "eos_token_id": list(own.eos_token_ids), "pad_token_id": own.pad_token_id}
    generation |= {key: value for key, value in numbers.items() if generation.get(key) is None}
    raw["generation_config"] = generation
    return raw, generation


def _write_weights(conversion: Conversion, partial: Path, done: Iterable[str], progress: Progress | None) -> None:
    """A resumed run begins its journal anew with what is ``done``, so that a line cut off in the last one is gone."""
    finished, total, done = 0, conversion.bytes_in, set(done)
    entries = [{"fingerprint": conversion.fingerprint()}, *({"finished": path} for path in sorted(done))]
    write_text(partial / JOURNAL, "".join(json.dumps(entry) + "\n" for entry in entries))
    with (partial / JOURNAL).open("a", encoding="utf-8") as journal:
        for name, outputs in conversion.shards().items():
            arrays = {key: array for output in outputs for key, array in output.arrays.items()}
            writer = SafetensorsWriter(partial / RESULT / name, arrays, {"format": "mlx"})
            try:
                for output in outputs:
                    if output.path not in done or not writer.resumed:
                        places = dict.fromkeys(output.arrays, 0)
                        for part in output.slices():
                            for key, values in part.items():
                                places[key] = writer.write(key, places[key], values)
                        writer.sync()
                        journal.write(json.dumps({"finished": output.path}) + "\n")
                        journal.flush()
                        os.fsync(journal.fileno())
                    finished += output.bytes_in
                    if progress:
                        progress(finished, total)
            finally:
                writer.close()


def _write_files(conversion: Conversion, folder: Path, upload_repo: str | None) -> None:
    """All but the weights."""
    for unfinished in folder.glob(".*.partial"):  # of a process that was killed here
        unfinished.unlink()
    copied = []
    for path in _small_files(conversion.folder):
        shutil.copyfile(path, folder / path.name)
        copied.append(path.name)
    mapping = {key: name for name, outputs in conversion.shards().items() for output in outputs for key in output.arrays}
    metadata = {
        "total_size": conversion.bytes_out,
        "total_parameters": sum(output.size for output in conversion.outputs),
        LIST: copied,
    }
    write_json(folder / INDEX, {"metadata": metadata, "weight_map": dict(sorted(mapping.items()))})
    write_json(folder / "generation_config.json", conversion.generation_config)
    write_text(folder / "README.md", model_card(conversion, upload_repo))
    write_json(folder / "config.json", conversion.raw_config)


def _small_files(folder: Path) -> list[Path]:
    """The files of a checkpoint that are copied as they are, sorted by name."""
    found = {path for pattern in COPIED for path in list_files(folder, pattern)}
    return sorted(path for path in found
                  if path.name not in WRITTEN and not path.name.endswith(".index.json") and path.is_file())


def _put_in_place(partial: Path, target: Path) -> None:
    """Give the result the target's name; what was there goes only when the new one is in its place."""
    old = target.with_name(f".{target.name}.replaced-by-mlx-diffgemma")
    shutil.rmtree(old, ignore_errors=True)  # of a run that was killed in the middle of this
    if target.exists():
        target.rename(old)
    (partial / RESULT).rename(target)
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(partial, ignore_errors=True)


def _finished(partial: Path, fingerprint: str) -> set[str]:
    """Outputs a partial folder holds whole.  Errors: UserError when it was made from something else."""
    journal = partial / JOURNAL
    try:
        text = read_text(journal) if journal.exists() else ""
        entries = [json.loads(line) for line in text.split("\n")[:-1]]  # a last line that was cut off does not count
        if not entries:
            return set()
        begun, done = entries[0]["fingerprint"], {entry["finished"] for entry in entries[1:]}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{journal} is damaged; add --overwrite without --resume to begin anew.") from None
    if begun != fingerprint:
        raise UserError(f"{partial} was begun from another checkpoint, with other options or another version; add --overwrite "
                        "without --resume to begin anew.")
    return done


def _check_disk(conversion: Conversion, target: Path) -> None:
    ground, partial = target.parent, partial_folder(target)
    while not ground.exists():
        ground = ground.parent
    held = sum(path.stat().st_blocks * 512 for path in partial.rglob("*")) if partial.exists() else 0
    needed, free = conversion.bytes_out + 50_000_000 - held, shutil.disk_usage(ground).free
    if needed > free:
        raise UserError(f"{target} needs {_gb(needed)} on disk, {_gb(free)} are free; make room or choose another folder.")


def partial_folder(target: Path) -> Path:
    return target.with_name(f"{target.name}.partial")


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def _gb(count: int) -> str:
    return f"{count / 1e9:,.2f} GB"
