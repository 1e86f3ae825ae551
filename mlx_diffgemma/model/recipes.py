"""The recipes: which tensors get which precision, and the ``quantization`` entry of config.json.

A recipe has a precision for every class of matrices, or None where a class is not quantised. Norms,
scales and scalars are never quantised.

Precision decides how many denoising steps a canvas needs.  So every recipe keeps embedding,
attention, router and dense MLP at 8 bits, apart from three recipes that say otherwise.  Others
measured 63 forwards in bf16 and 167 in uniform 4 bits for the same four canvases; docs/recipes.md
has the measurements on nano.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import mlx.core as mx

from mlx_diffgemma.errors import UserError

VISION = ("model.encoder.vision_tower.", "model.encoder.embed_vision.")
CLASSES = (
    "embedding",
    "attention",
    "router",
    "dense_mlp",
    "experts",
    "self_conditioning",
    "vision",
)
_PATTERNS = {
    "embedding": re.compile(r"\.embed_tokens$"),
    "attention": re.compile(r"\.self_attn\.[qkvo]_proj$"),
    "router": re.compile(r"\.router\.proj$"),
    "dense_mlp": re.compile(r"\.mlp\.(gate|up|down)_proj$"),
    "experts": re.compile(r"\.experts\.(gate_up|down)_proj$"),
    "self_conditioning": re.compile(r"\.self_conditioning\.(gate|up|down)_proj$"),
}

# The precisions that MLX can store: (bits, group sizes) of each mode.  The first group size is the
# mode's default.
MODES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((2, 3, 4, 5, 6, 8), (64, 32, 128)),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}


@dataclass(frozen=True)
class Precision:
    """One way to store a matrix; ``group_size`` weights of a row share a scale.

    Raises:
        UserError: MLX has no such precision.
    """

    bits: int
    group_size: int
    mode: str = "affine"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(
                f"Unknown quantisation mode {self.mode!r}; use one of {', '.join(MODES)}."
            )
        bits, groups = MODES[self.mode]
        if self.bits not in bits:
            raise UserError(f"Mode {self.mode} has {_or(bits)} bits, not {self.bits}.")
        if self.group_size not in groups:
            raise UserError(
                f"Mode {self.mode} has groups of {_or(sorted(groups))}, not {self.group_size}."
            )

    def __str__(self) -> str:
        return f"{self.bits} bits" if self.mode == "affine" else self.mode

    def check(self, path: str, columns: int) -> None:
        """Check that rows of ``columns`` weights can be stored this way.

        Raises:
            UserError: They cannot.
        """
        if columns % self.group_size:
            raise UserError(
                f"{path} has rows of {columns} weights, which groups of {self.group_size} do not "
                "divide; choose another group size or recipe."
            )

    def narrowed(self, columns: int) -> Precision:
        """The same precision with the largest group size, up to this one, that divides ``columns``.

        It is unchanged if no group size does.
        """
        smaller = [size for size in MODES[self.mode][1] if size <= self.group_size]
        sizes = [size for size in smaller if columns % size == 0]
        return replace(self, group_size=max(sizes)) if sizes else self

    def packed(
        self, shape: tuple[int, ...], dtype: mx.Dtype
    ) -> dict[str, tuple[mx.Dtype, tuple[int, ...]]]:
        """The arrays that a matrix becomes.

        Args:
            shape: The shape of the matrix, [..., columns].
            dtype: Its dtype.

        Returns:
            (dtype, shape) of each array, by suffix.
        """
        *leading, columns = shape
        groups = (*leading, columns // self.group_size)
        arrays = {"weight": (mx.uint32, (*leading, columns * self.bits // 32))}
        if self.mode == "affine":
            return arrays | {"scales": (dtype, groups), "biases": (dtype, groups)}
        return arrays | {"scales": (mx.uint8, groups)}

    def quantize(self, rows: mx.array) -> dict[str, mx.array]:
        """Quantise ``rows``; the result has the arrays of ``packed``."""
        arrays = mx.quantize(rows, self.group_size, self.bits, mode=self.mode)
        return dict(zip(("weight", "scales", "biases"), arrays, strict=False))

    def dequantize(self, arrays: Mapping[str, mx.array], dtype: mx.Dtype) -> mx.array:
        """The values of packed arrays, computed in float32 and rounded once."""
        scales = arrays["scales"]
        if mx.issubdtype(scales.dtype, mx.floating):
            scales = scales.astype(mx.float32)
        biases = arrays.get("biases")
        if biases is not None:
            biases = biases.astype(mx.float32)
        return mx.dequantize(
            arrays["weight"],
            scales,
            biases,
            self.group_size,
            self.bits,
            mode=self.mode,
            dtype=mx.float32,
        ).astype(dtype)


@dataclass(frozen=True)
class Recipe:
    """A precision for every class of matrices; None where a class is not quantised.

    Args:
        name: The name of the recipe.
        summary: One line about it.
        uniform: Whether it has one precision for the whole backbone, also after changes.
        narrows: Whether rows that a group does not divide get the largest smaller group that does.
        warning: What to tell the user of this recipe.
    """

    name: str
    summary: str
    embedding: Precision | None
    attention: Precision | None
    router: Precision | None
    dense_mlp: Precision | None
    experts: Precision | None
    self_conditioning: Precision | None
    vision: Precision | None
    uniform: bool = False
    narrows: bool = False
    warning: str = ""

    def precision(self, kind: str) -> Precision | None:
        """The precision of a class of matrices; None for any other name too."""
        precision = getattr(self, kind) if kind in CLASSES else None
        assert precision is None or isinstance(precision, Precision)
        return precision

    def precision_of(self, kind: str, columns: int) -> Precision | None:
        """The precision of a matrix of that class whose rows have ``columns`` weights."""
        precision = self.precision(kind)
        return precision.narrowed(columns) if precision and self.narrows else precision

    def precision_at(self, name: str, shape: tuple[int, ...]) -> Precision | None:
        """The precision of the parameter ``name`` of the model.

        It is None for vectors, for tables of positions, and for two cases in the tower.  One is
        rows that groups do not divide: the 4,304 inputs of the released tower divide by 16 only.
        The other is the patch embedder: mlx-vlm casts pixels to the dtype of its weights, and would
        make integers of them.
        """
        path = name.removesuffix(".weight")
        if path == name or len(shape) < 2:
            return None
        kind = kind_of(path)
        precision = self.precision_of(kind, shape[-1])
        if precision is None or kind != "vision":
            return precision
        if shape[-1] % precision.group_size or path.endswith("patch_embedder.input_proj"):
            return None
        return precision

    @property
    def quantises(self) -> bool:
        return any(self.precision(kind) for kind in CLASSES)

    def changed(self, bits: int | None, group_size: int | None, mode: str | None) -> Recipe:
        """The recipe with other experts; a uniform recipe changes everywhere.

        None keeps a value, or takes the new mode's default.

        Args:
            bits: The bits.
            group_size: The group size.
            mode: The quantisation mode.

        Raises:
            UserError: As :class:`Precision`.
        """
        if self.experts is None or (bits, group_size, mode) == (None, None, None):
            return self
        new = self.experts
        if mode and mode != new.mode:
            if mode not in MODES:
                raise UserError(
                    f"Unknown quantisation mode {mode!r}; use one of {', '.join(MODES)}."
                )
            mode_bits, mode_groups = MODES[mode]
            default_bits = new.bits if new.bits in mode_bits else mode_bits[0]
            new = Precision(
                default_bits if bits is None else bits,
                mode_groups[0] if group_size is None else group_size,
                mode,
            )
        new = Precision(
            new.bits if bits is None else bits,
            new.group_size if group_size is None else group_size,
            new.mode,
        )
        kinds = [kind for kind in CLASSES if self.precision(kind)] if self.uniform else ["experts"]
        precisions: dict[str, Any] = dict.fromkeys(kinds, new)
        what = "everything" if self.uniform else "experts"
        name = f"{self.name} with {what} at {new} in groups of {new.group_size}"
        changed = replace(self, **precisions, name=name, summary=name)
        return next((recipe for recipe in RECIPES.values() if recipe.same_rows(changed)), changed)

    def same_rows(self, other: Recipe) -> bool:
        """Whether both recipes store every matrix alike."""
        if (self.uniform, self.narrows) != (other.uniform, other.narrows):
            return False
        return all(self.precision(kind) == other.precision(kind) for kind in CLASSES)


def _core(
    name: str,
    summary: str,
    experts: Precision,
    core: Precision | None = Precision(8, 64),  # noqa: B008 (frozen)
    vision: Precision | None = None,
) -> Recipe:
    """A recipe with one precision for everything except the experts.

    Args:
        name: The name of the recipe.
        summary: One line about it.
        experts: The precision of the experts.
        core: The precision of everything else.
        vision: The precision of the vision tower.
    """
    return Recipe(
        name,
        summary,
        embedding=core,
        attention=core,
        router=core,
        dense_mlp=core,
        experts=experts,
        self_conditioning=core,
        vision=vision,
    )


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "bf16",
            "nothing quantised, stored in bfloat16",
            None,
            None,
            None,
            None,
            None,
            None,
            None,
        ),
        _core("8bit", "all matrices of the backbone at 8 bits", Precision(8, 64)),
        _core("6bit", "experts 6 bits, the rest 8", Precision(6, 64)),
        _core("5bit", "experts 5 bits, the rest 8", Precision(5, 64)),
        _core("4bit", "experts 4 bits, the rest 8: the default of -q", Precision(4, 64)),
        _core(
            "4bit-bf16-core", "experts 4 bits, the rest not quantised", Precision(4, 64), core=None
        ),
        _core("mxfp8", "experts mxfp8, the rest 8 bits", Precision(8, 32, "mxfp8")),
        _core("mxfp4", "experts mxfp4, the rest 8 bits", Precision(4, 32, "mxfp4")),
        _core("nvfp4", "experts nvfp4, the rest 8 bits", Precision(4, 16, "nvfp4")),
        _core(
            "3bit",
            "experts 3 bits, the rest and vision 8",
            Precision(3, 64),
            vision=Precision(8, 64),
        ),
        # Groups of 128 for rows that divide by 128.  The rows of down_proj, which have 704 weights
        # at the released shape, do not.
        replace(
            _core(
                "3bit-small",
                "experts 3 bits in wide groups, the rest 6, vision 8: the smallest, for a Mac of 18 GB",
                Precision(3, 128),
                core=Precision(6, 64),
                vision=Precision(8, 64),
            ),
            router=Precision(8, 64),
            narrows=True,
        ),
        replace(
            _core(
                "uniform-4bit",
                "everything 4 bits, for comparison only",
                Precision(4, 64),
                core=Precision(4, 64),
            ),
            uniform=True,
            warning="uniform-4bit is for comparison only: embedding, attention and router at 4 bits "
            "make canvases converge late or not at all; take 4bit.",
        ),
    )
}


def recipe_named(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        UserError: There is no such recipe.
    """
    if name not in RECIPES:
        raise UserError(f"Unknown recipe {name!r}; use one of {', '.join(RECIPES)}.")
    return RECIPES[name]


@lru_cache(maxsize=8192)
def kind_of(path: str) -> str:
    """The class of the matrix at a module path, or "other"."""
    if path.startswith(VISION):
        return "vision"
    return next((kind for kind, pattern in _PATTERNS.items() if pattern.search(path)), "other")


@dataclass(frozen=True)
class Quantization:
    """The ``quantization`` entry of a config.json.

    ``overrides`` holds the precision of each module that differs from the default, by path; None
    means not quantised.
    """

    default: Precision
    overrides: Mapping[str, Precision | None]

    @classmethod
    def from_config(cls, raw: Mapping[str, Any]) -> Quantization:
        """Read the entry.  An override without ``mode`` is affine, as MLX tools read it.

        Raises:
            UserError: An entry gives no bits or group size.
        """

        def precision(entry: Mapping[str, Any], where: str) -> Precision:
            if not isinstance(entry, Mapping) or not all(
                isinstance(entry.get(key), int) for key in ("bits", "group_size")
            ):
                raise UserError(
                    f"config.json: {where} must give bits and group_size, got {str(entry)[:200]}; "
                    "only checkpoints quantised by MLX tools are read."
                )
            return Precision(entry["bits"], entry["group_size"], entry.get("mode") or "affine")

        default = precision(raw, "quantization")
        overrides: dict[str, Precision | None] = {}
        for path, value in raw.items():
            if isinstance(value, Mapping):
                overrides[path] = precision(value, f"quantization.{path}")
            elif value is False:
                overrides[path] = None
        return cls(default, overrides)

    def of(self, path: str, has_scales: bool) -> Precision | None:
        """The precision of the module at ``path``; ``has_scales`` says whether its file has any.

        Raises:
            UserError: The config and the file disagree.
        """
        precision = self.overrides.get(path, self.default if has_scales else None)
        if (precision is not None) != has_scales:
            raise UserError(
                f"config.json says that {path} is {'' if precision else 'not '}quantised, the files "
                "say otherwise; download the checkpoint again."
            )
        return precision


def to_config(precisions: Mapping[str, Precision | None]) -> dict[str, Any]:
    """The ``quantization`` entry for modules of these precisions.

    The default is the precision of the experts.  Modules that are not quantised are left out,
    because every reader sees that they have no scales.
    """
    used = {path: precision for path, precision in precisions.items() if precision}
    default = next(
        (p for path, p in used.items() if kind_of(path) == "experts"), next(iter(used.values()))
    )
    return asdict(default) | {path: asdict(p) for path, p in sorted(used.items()) if p != default}


def _or(values: Iterable[object]) -> str:
    *first, last = map(str, values)
    return f"{', '.join(first)} or {last}" if first else last
