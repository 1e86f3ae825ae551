"""Which kernels an operation needs on Metal, and whether the released wheels have them.

Most rules only name the rows of ``table.json`` that an operation needs. The others are conditions
in MLX's own sources:

- no float64: Metal's shading language has no such type. No complex numbers: most operations lack
  them;
- kernels that MLX compiles at first use (``AT_FIRST_USE``) take every dtype, but scatters are
  atomic and refuse elements of 8 bytes (``Scatter::eval_gpu``), and an operation takes at most 20
  index arrays (``METAL_MAX_INDEX_ARRAYS``);
- matrix factorisations have no GPU implementation at all;
- an operation for which there is no rule here is refused, so that the next one gets a rule.

A description is what the hook reports: ``operation|dtype|dtypes of the inputs|details``.
"""

from __future__ import annotations

import json
from pathlib import Path

TABLE = json.loads((Path(__file__).parent / "table.json").read_text(encoding="utf-8"))["kernels"]

# They change an array's description, or copy elements of one dtype.
MOVES = {
    "AsStrided",
    "Broadcast",
    "BroadcastAxes",
    "Concatenate",
    "Contiguous",
    "Copy",
    "Depends",
    "CustomTransforms",
    "ExpandDims",
    "Flatten",
    "Full",
    "NumberOfElements",
    "Pad",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "StopGradient",
    "Transpose",
    "Unflatten",
    "View",
}
UPDATES = {"DynamicSlice", "DynamicSliceUpdate", "SliceUpdate"}
AT_FIRST_USE = {"Gather", "GatherAxis", "MaskedScatter", "Scatter", "ScatterAxis"}
UNARY = {
    "Abs",
    "ArcCos",
    "ArcCosh",
    "ArcSin",
    "ArcSinh",
    "ArcTan",
    "ArcTanh",
    "BitwiseInvert",
    "Ceil",
    "Cos",
    "Cosh",
    "Erf",
    "ErfInv",
    "Exp",
    "Expm1",
    "Floor",
    "FromFP8",
    "Log",
    "Log10",
    "Log1p",
    "Log2",
    "LogicalNot",
    "Negative",
    "Round",
    "Rsqrt",
    "Sigmoid",
    "Sign",
    "Sin",
    "Sinh",
    "Sqrt",
    "Square",
    "Tan",
    "Tanh",
    "ToFP8",
}
BINARY = {
    "Add",
    "ArcTan2",
    "BitwiseAnd",
    "BitwiseOr",
    "BitwiseXor",
    "DivMod",
    "Divide",
    "Equal",
    "FloorDivide",
    "Greater",
    "GreaterEqual",
    "LeftShift",
    "Less",
    "LessEqual",
    "LogAddExp",
    "LogicalAnd",
    "LogicalOr",
    "Maximum",
    "Minimum",
    "Multiply",
    "NaNEqual",
    "NotEqual",
    "Power",
    "Remainder",
    "RightShift",
    "Subtract",
}
REDUCTIONS = {"Sum", "Prod", "Max", "Min", "And", "Or"}
# The row of the table that holds the dtype of the first input.
ROWS = {
    "AddMM": "Matmul",
    "ArgPartition": "ArgSort",
    "ArgReduce": "ArgMax",
    "ArgSort": "ArgSort",
    "Convolution": "Convolution",
    "CrossEntropy": "CrossEntropy",
    "CumMax": "ScanMax",
    "CumMin": "ScanMin",
    "CumProd": "ScanProd",
    "CumSum": "ScanSum",
    "CumLogAddExp": "ScanLogAddExp",
    "LayerNorm": "LayerNorm",
    "LogSumExp": "LogSumExp",
    "Matmul": "Matmul",
    "Partition": "Sort",
    "RMSNorm": "RMSNorm",
    "RoPE": "RoPE",
    "SearchSorted": "SearchSorted",
    "SegmentedMM": "SegmentedMM",
    "Sort": "Sort",
}
# On the host, before or after all work: files, and waiting.
ON_HOST = {"Load", "Synchronize"}
# Without a GPU implementation.
CPU_ONLY = {"Cholesky", "Eig", "Eigh", "Inverse", "LUF", "QRF", "SVD"}
MAX_INDICES = 20


def fault(description: str) -> str | None:
    """Why Metal refuses the operation; None when it has what the operation needs."""
    operation, dtype, inputs, details = description.split("|")
    taken = inputs.split()
    settings = dict(word.split("=") for word in details.split())
    name = operation.split()[0]
    if name in ON_HOST:
        return None
    for impossible in ("float64", "complex64"):
        if impossible in (dtype, *taken):
            return (
                f"Metal has no {impossible}"
                if impossible == "float64"
                else f"{impossible} lacks most Metal kernels"
            )
    if name in CPU_ONLY:
        return "it has no GPU implementation"
    if name.startswith("Compiled"):
        return None  # compiled at first use, for every dtype that Metal has
    if name in AT_FIRST_USE:
        return _at_first_use(name, dtype, int(settings.get("indices", 0)))
    return _missing(_needed(name, dtype, taken, settings))


def _at_first_use(name: str, dtype: str, indices: int) -> str | None:
    if name.startswith("Scatter") and dtype in ("int64", "uint64"):
        return "Metal has no scatter into elements of 64 bits"
    return (
        f"Metal takes at most {MAX_INDICES} index arrays, not {indices}"
        if indices > MAX_INDICES
        else None
    )


def _missing(needed: list[tuple[str, str, str]] | None) -> str | None:
    if needed is None:
        return "tests/metal/rules.py has no rule for this operation; add one"
    for row, key, dtype in needed:
        if dtype not in TABLE.get(row, {}).get(key, "").split():
            kind = (
                dtype
                if key == "dtypes"
                else f"{key} to {dtype}"
                if key in TABLE["Copy"]
                else f"{key} in {dtype}"
            )
            return f"the released Metal libraries have no kernel for {row} of {kind}"
    return None


def _needed(
    name: str, dtype: str, taken: list[str], settings: dict[str, str]
) -> list[tuple[str, str, str]] | None:
    """(row, key, dtype) of the table for all that must be there; None for an operation without a
    rule.
    """
    first = taken[0] if taken else dtype
    if name in MOVES:
        return [("Copy", dtype, dtype)]
    if name in UPDATES:
        return [("Update", "dtypes", dtype)]
    if name == "AsType":
        return [("Copy", first, dtype)]
    if name in UNARY:
        return [(name, first, dtype)]
    if name in BINARY:
        return [(name, "dtypes", first)]
    if name == "Select":
        return [("Select", "dtypes", dtype)]
    if name == "Arange":
        return [("Arange", "dtypes", dtype)]
    if name == "RandomBits":
        return [("RandomBits", "dtypes", "uint32")]
    if name in REDUCTIONS:
        return _reduction(name, first, dtype)
    if name == "Softmax":
        precise = [("SoftmaxPrecise", "dtypes", dtype)] if dtype != "float32" else []
        return [("Softmax", "dtypes", dtype), *precise]
    if name == "GatherMM":
        # MLX's CPU has it in float32 only, so the dtype seen here is not the one a GPU is given.
        return [(name, "dtypes", t) for t in sorted({first, "float32", "bfloat16", "float16"})]
    if name in ("QuantizedMatmul", "GatherQMM", "Quantize"):
        return [_quantised(name, dtype, first, settings)]
    if name == "ScaledDotProductAttention":
        return _attention(first, settings)
    return [(ROWS[name], "dtypes", first)] if name in ROWS else None


def _reduction(name: str, source: str, target: str) -> list[tuple[str, str, str]]:
    """MLX reduces some dtypes as others; source: ``remap_reduce_types``."""
    seen_as = source
    if name in ("Sum", "Prod") and source == "bool":
        seen_as = "int8"
    if name in ("And", "Or"):
        widths = {
            "uint8": "bool",
            "int8": "bool",
            "uint16": "int16",
            "uint32": "int32",
            "uint64": "int64",
        }
        seen_as = widths.get(source, source)
    return [(f"Reduce{name}", "dtypes", seen_as), (f"Init{name}", "dtypes", target)]


def _quantised(name: str, dtype: str, first: str, settings: dict[str, str]) -> tuple[str, str, str]:
    key = f"{settings['mode']} group={settings['group']} bits={settings['bits']}"
    if name != "Quantize":
        return name, key, first
    return ("Dequantize", key, dtype) if settings["dequantize"] == "1" else (name, key, first)


def _attention(dtype: str, settings: dict[str, str]) -> list[tuple[str, str, str]]:
    """Head sizes without a kernel take products and a softmax; those with one must have it in this
    dtype too.
    """
    row = "AttentionFew" if int(settings["queries"]) <= 8 else "AttentionMany"
    heads = f"{settings['head']} {settings['values']}"
    fused = [(row, heads, dtype)] if heads in TABLE[row] else []
    return [("Matmul", "dtypes", dtype), ("Softmax", "dtypes", dtype), *fused]
