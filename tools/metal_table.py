"""Makes tests/metal/table.json: the operations that the released macOS wheels of MLX have a kernel
for.

    python tools/metal_table.py            download the wheels and write the table
    python tools/metal_table.py --check    download the wheels and fail where the table differs

The wheels are those of the lowest and the highest version of MLX that pyproject.toml admits on a
Mac, built for macOS 14, 15 and 26.  ``mlx/lib/mlx.metallib`` names the kernels that were compiled
ahead of time.  An operation is listed for a dtype when all kernels that it may choose from
(contiguous, strided, large, one block or several) have that dtype, in every wheel.  Where a wheel
has kernels for the matrix units of M5 (``nax``), products need those too.  What only some wheels
have is listed under ``only``.

Operations that MLX compiles at first use (gather, scatter, fused elementwise operations) have no
kernel in the wheel.  ``tests/metal/rules.py`` has their rules.
"""

from __future__ import annotations

import argparse
import bisect
import hashlib
import itertools
import json
import re
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "tests" / "metal" / "table.json"
PLATFORMS = ("macosx_14_0_arm64", "macosx_15_0_arm64", "macosx_26_0_arm64")

# The name of each dtype in kernel names, and in kernel names of attention and quantised products.
NAMES = {
    "bool": "bool_",
    "uint8": "uint8",
    "uint16": "uint16",
    "uint32": "uint32",
    "uint64": "uint64",
    "int8": "int8",
    "int16": "int16",
    "int32": "int32",
    "int64": "int64",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "float32": "float32",
    "complex64": "complex64",
}
FLOATS = {"float16": "float16_t", "bfloat16": "bfloat16_t", "float32": "float"}

# These kernels differ in layout alone, and an operation needs all of them.
UNARY = ("v_", "v2_", "gn1_", "gn4large_")
BINARY = (
    "ss_",
    "sv_",
    "vs_",
    "vv_",
    "sv2_",
    "vs2_",
    "vv2_",
    "g1_",
    "g2_",
    "g3_",
    "gn2_",
    "gn4large_",
)
TERNARY = ("v_", "v2_", "sv_", "vs_", "g1_", "g2_", "g3_", "gn2_", "gn4large_")
COPY = ("s_", "v_", "s2_", "v2_", "g1_", "g2_", "g3_", "gn2_", "gn4large_")
UPDATE = ("gg1_", "gg2_", "gg3_", "ggn2_", "gg3large_", "gg2_dynamic_")
REDUCTIONS = (
    "all_reduce_{op}{t}",
    "row_reduce_simple_{op}{t}",
    "row_reduce_small_1_reduce_{op}{t}",
    "row_reduce_looped_1_reduce_{op}{t}",
    "col_reduce_small_1_reduce_{op}{t}",
    "col_reduce_looped_1_32_32_reduce_{op}{t}",
    "col_reduce_longcolumn_1_reduce_{op}{t}",
    "col_reduce_2pass_1_32_32_reduce_{op}{t}",
)
# For each operation, the kernels it may choose from for dtype {t}.  A "*" at the end matches any
# rest.
KERNELS: dict[str, tuple[str, ...]] = {
    "Arange": ("arange{t}",),
    "ArgMax": ("argmax_{t}",),
    "ArgMin": ("argmin_{t}",),
    "ArgSort": (
        "carg_block_sort_{t}_uint32_*",
        "ncarg_block_sort_{t}_uint32_*",
        "sort_mbsort_{t}_uint32_*",
        "partition_mbsort_{t}_uint32_*",
        "merge_mbsort_{t}_uint32_*",
    ),
    "Sort": (
        "c_block_sort_{t}_{t}_*",
        "nc_block_sort_{t}_{t}_*",
        "sort_mbsort_{t}_uint32_*",
        "partition_mbsort_{t}_uint32_*",
        "merge_mbsort_{t}_uint32_*",
    ),
    "SearchSorted": ("searchsorted_{t}_left", "searchsorted_{t}_right"),
    "Softmax": ("block_softmax_{t}", "looped_softmax_{t}"),
    "SoftmaxPrecise": ("block_softmax_precise_{t}", "looped_softmax_precise_{t}"),
    "LogSumExp": ("block_logsumexp_{t}", "looped_logsumexp_{t}"),
    "RMSNorm": ("rms{t}", "rms_looped{t}", "vjp_rms{t}", "vjp_rms_looped{t}"),
    "LayerNorm": (
        "layer_norm{t}",
        "layer_norm_looped{t}",
        "vjp_layer_norm{t}",
        "vjp_layer_norm_looped{t}",
    ),
    "RoPE": (
        "rope_{t}",
        "rope_large_{t}",
        "rope_single_{t}",
        "rope_freqs_{t}",
        "rope_single_freqs_{t}",
    ),
    "Matmul": (
        "steel_gemm_fused_nn_{t}_{t}_*",
        "steel_gemm_fused_nt_{t}_{t}_*",
        "steel_gemm_fused_tn_{t}_{t}_*",
        "steel_gemm_fused_tt_{t}_{t}_*",
        "gemv_{t}_*",
        "gemv_t_{t}_*",
        "steel_gemm_splitk_nt_{t}_*",
    ),
    "GatherMM": (
        "steel_gather_mm_nn_{t}_{t}_*",
        "steel_gather_mm_nt_{t}_{t}_*",
        "steel_gather_mm_rhs_nn_{t}_{t}_*",
        "steel_gather_mm_rhs_nt_{t}_{t}_*",
        "gemv_gather_{t}_*",
        "gemv_t_gather_{t}_*",
    ),
    "SegmentedMM": ("steel_segmented_mm_nn_{t}_{t}_*", "steel_segmented_mm_nt_{t}_{t}_*"),
    "Convolution": (
        "naive_unfold_nd_{t}_*",
        "implicit_gemm_conv_2d_{t}_*",
        "steel_gemm_fused_nt_{t}_{t}_*",
    ),
    "CrossEntropy": ("cross_entropy_{t}", "cross_entropy_vjp_{t}"),
}
for _name in ("Sum", "Prod", "Max", "Min", "And", "Or"):
    KERNELS[f"Reduce{_name}"] = tuple(k.replace("{op}", _name.lower()) for k in REDUCTIONS)
    KERNELS[f"Init{_name}"] = (f"init_reduce_{_name.lower()}{{t}}",)
for _name in ("Sum", "Prod", "Max", "Min", "LogAddExp"):
    KERNELS[f"Scan{_name}"] = tuple(
        f"{layout}_scan_{end}_{_name.lower()}_{{t}}_{{t}}"
        for layout in ("contig", "strided")
        for end in ("inclusive", "exclusive", "reverse_inclusive", "reverse_exclusive")
    )
# The same for the matrix units of M5.
NAX: dict[str, tuple[str, ...]] = {
    "Matmul": (
        "steel_gemm_fused_nax_nn_{t}_{t}_*",
        "steel_gemm_fused_nax_nt_{t}_{t}_*",
        "steel_gemm_splitk_nax_nt_{t}_*",
    ),
    "GatherMM": ("steel_gather_mm_rhs_nax_nn_{t}_{t}_*", "steel_gather_mm_rhs_nax_nt_{t}_{t}_*"),
    "SegmentedMM": ("steel_segmented_mm_nax_nn_{t}_{t}_*",),
}
# The same for a quantisation {q} = "MODE" and {g} = "gs_GROUP_b_BITS".
QUANTISED: dict[str, tuple[str, ...]] = {
    "Quantize": ("{q}_quantize_{t}_{g}*",),
    "Dequantize": ("{q}_dequantize_{t}_{g}*",),
    "QuantizedMatmul": (
        "{q}_qmm_t_{t}_{g}_*",
        "{q}_qmm_n_{t}_{g}_*",
        "{q}_qmm_t_splitk_{t}_{g}_*",
        "{q}_qmv_{t}_{g}_*",
        "{q}_qmv_fast_{t}_{g}_*",
        "{q}_qmv_quad_{t}_{g}_d_64_*",
        "{q}_qmv_quad_{t}_{g}_d_128_*",
        "{q}_qmv_wide_{t}_{g}_*",
        "{q}_qvm_{t}_{g}_*",
        "{q}_qvm_split_k_{t}_{g}_*",
    ),
    "GatherQMM": (
        "{q}_gather_qmm_t_{t}_{g}_alN_true*",
        "{q}_gather_qmm_t_{t}_{g}_alN_false*",
        "{q}_gather_qmm_n_{t}_{g}*",
        "{q}_gather_qmm_rhs_nt_{t}_{g}_*",
        "{q}_gather_qmm_rhs_nn_{t}_{g}_*",
        "{q}_gather_qmv_{t}_{g}*",
        "{q}_gather_qmv_fast_{t}_{g}*",
        "{q}_gather_qvm_{t}_{g}*",
    ),
}
QUANTISED_NAX: dict[str, tuple[str, ...]] = {
    "QuantizedMatmul": ("{q}_qmm_t_nax_{t}_{g}_*",),
    "GatherQMM": ("{q}_gather_qmm_t_nax_{t}_{g}_*", "{q}_gather_qmm_rhs_nax_nt_{t}_{g}_*"),
}

Table = dict[str, dict[str, list[str]]]


def admitted() -> str:
    """The versions of MLX that pyproject.toml admits on a Mac, such as ">=0.32.4,<0.33"."""
    found = re.search(
        r'"mlx(>=[^;"]+); *sys_platform == \'darwin\'"',
        (ROOT / "pyproject.toml").read_text(encoding="utf-8"),
    )
    if found is None:
        raise SystemExit(
            "pyproject.toml has no dependency \"mlx>=…; sys_platform == 'darwin'\", which names "
            "the versions to look at."
        )
    return found[1].strip()


def download(requirement: str, platform: str, folder: Path) -> Path:
    """Download the newest wheel of mlx-metal that meets a requirement.

    Args:
        requirement: The versions that are admitted.
        platform: The platform of the wheel.
        folder: The folder to download to.
    """
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--only-binary=:all:",
        "--platform",
        platform,
        "--dest",
        str(folder),
        f"mlx-metal{requirement}",
    ]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if ran.returncode or len(wheels) != 1:
        raise SystemExit(
            f"The wheel mlx-metal{requirement} for {platform} could not be downloaded, so the "
            f"table of Metal kernels could not be checked. {sys.executable} -m pip said: "
            f"{ran.stderr.strip()[-600:] or 'nothing'}"
        )
    return wheels[0]


def kernel_names(wheel: Path) -> set[str]:
    """The names in the function list of the wheel's metallib."""
    with zipfile.ZipFile(wheel).open("mlx/lib/mlx.metallib") as library:
        header = library.read(88)
        start, size = struct.unpack("<QQ", header[24:40])
        if header[:4] != b"MTLB" or start != len(header):
            raise SystemExit(
                f"{wheel.name}: mlx.metallib does not begin as a Metal library of the known kind."
            )
        functions = library.read(4 + size)
    (count,) = struct.unpack("<I", functions[:4])
    names = re.findall(rb"NAME..([^\x00]+)\x00", functions, re.DOTALL)
    if len(names) != count:
        raise SystemExit(
            f"{wheel.name}: mlx.metallib lists {count} functions, {len(names)} names were found."
        )
    return {name.decode() for name in names}


class Kernels:
    """The kernel names of one library."""

    def __init__(self, names: set[str]):
        self.names = names
        self.sorted = sorted(names)
        self.nax = any("_nax_" in name for name in names)

    def has(self, template: str) -> bool:
        if not template.endswith("*"):
            return template in self.names
        return any(name.startswith(template[:-1]) for name in self.names_from(template[:-1]))

    def names_from(self, prefix: str) -> list[str]:
        """The first names at or after ``prefix`` in alphabetical order."""
        place = bisect.bisect_left(self.sorted, prefix)
        return self.sorted[place : place + 1]

    def has_all(self, templates: tuple[str, ...], **parts: str) -> bool:
        return all(self.has(template.format(**parts)) for template in templates)

    def table(self) -> Table:
        """What each operation supports: its dtypes under "dtypes", or dtypes under other keys."""
        table: Table = {}
        self._elementwise(table)
        for operation, templates in KERNELS.items():
            needed = templates + (NAX.get(operation, ()) if self.nax else ())
            table[operation] = {
                "dtypes": [t for t, name in NAMES.items() if self.has_all(needed, t=name)]
            }
        self._quantised(table)
        self._attention(table)
        table["RandomBits"] = {"dtypes": ["uint32"] if {"rbits", "rbitsc"} <= self.names else []}
        return table

    def _elementwise(self, table: Table) -> None:
        called = {name: t for t, name in NAMES.items()}
        types = "|".join(NAMES.values())
        for name in self.sorted:
            if unary := re.fullmatch(rf"v_([A-Z]\w*?)({types})({types})", name):
                op, source, target = unary.groups()
                if all(f"{layout}{op}{source}{target}" in self.names for layout in UNARY):
                    table.setdefault(op, {}).setdefault(called[source], []).append(called[target])
            if binary := re.fullmatch(rf"ss_([A-Z]\w*?)({types})", name):
                op, t = binary.groups()
                if all(f"{layout}{op}{t}" in self.names for layout in BINARY):
                    table.setdefault(op, {}).setdefault("dtypes", []).append(called[t])
        table["Select"] = {
            "dtypes": [
                t for t, n in NAMES.items() if all(f"{k}Select{n}" in self.names for k in TERNARY)
            ]
        }
        table["Copy"] = {
            a: [b for b in NAMES if all(f"{k}copy{NAMES[a]}{NAMES[b]}" in self.names for k in COPY)]
            for a in NAMES
        }
        table["Update"] = {
            "dtypes": [
                t for t, n in NAMES.items() if all(f"{k}copy{n}{n}" in self.names for k in UPDATE)
            ]
        }

    def _quantised(self, table: Table) -> None:
        kinds = {
            m.groups()
            for name in self.sorted
            if (m := re.match(r"([a-z]+\d?)_quantize_\w+?_(gs_(\d+)_b_(\d+))", name))
        }
        for operation, templates in QUANTISED.items():
            needed = templates + (QUANTISED_NAX.get(operation, ()) if self.nax else ())
            table[operation] = {
                f"{mode} group={group} bits={bits}": [
                    t for t, name in FLOATS.items() if self.has_all(needed, q=mode, g=key, t=name)
                ]
                for mode, key, group, bits in sorted(
                    kinds, key=lambda k: (k[0], int(k[2]), int(k[3]))
                )
            }

    def _attention(self, table: Table) -> None:
        """Add the head sizes that attention supports, for up to eight queries and for more."""
        vector: dict[str, list[str]] = defaultdict(list)
        full: dict[str, list[str]] = defaultdict(list)
        for t, name in FLOATS.items():
            heads = [re.fullmatch(rf"sdpa_vector_{name}_(\d+)_(\d+)", n) for n in self.sorted]
            for q, v in sorted({(int(m[1]), int(m[2])) for m in heads if m}):
                if all(
                    self.has(f"sdpa_vector_2pass_{part}")
                    for part in (f"1_{name}_{q}_{v}*", f"2_{name}_{v}")
                ):
                    vector[f"{q} {v}"].append(t)
            blocks = [
                re.fullmatch(
                    rf"steel_attention_{NAMES[t]}_bq\d+_bk\d+_bd(\d+)_bv(\d+)_\w+_mask({NAMES[t]}|bool_)",
                    n,
                )
                for n in self.sorted
            ]
            masks = {(int(m[1]), int(m[2]), m[3]) for m in blocks if m}
            for q, v in sorted({mask[:2] for mask in masks}):
                if {(q, v, NAMES[t]), (q, v, "bool_")} <= masks:
                    full[f"{q} {v}"].append(t)
        table["AttentionFew"] = dict(vector)
        table["AttentionMany"] = dict(full)


def common(tables: list[Table]) -> Table:
    """The entries that all tables have."""
    first, *others = tables
    return {
        operation: {
            key: [
                t
                for t in dtypes
                if all(t in other.get(operation, {}).get(key, ()) for other in others)
            ]
            for key, dtypes in keys.items()
        }
        for operation, keys in sorted(first.items())
    }


def beyond(table: Table, shared: Table) -> Table:
    """The entries of ``table`` that ``shared`` does not have."""
    more: Table = {}
    for operation, key in ((operation, key) for operation, keys in table.items() for key in keys):
        added = [
            t for t in table[operation][key] if t not in shared.get(operation, {}).get(key, ())
        ]
        if added:
            more.setdefault(operation, {})[key] = added
    return more


def tidy(table: Table) -> dict[str, dict[str, str]]:
    """``table`` without operations that have no kernel.

    Each list of dtypes becomes one text, so that a line of JSON is a line of the table.
    """
    lines = {
        operation: {key: " ".join(dtypes) for key, dtypes in keys.items() if dtypes}
        for operation, keys in table.items()
    }
    return {operation: keys for operation, keys in lines.items() if keys}


def build() -> str:
    """The text of the table, from freshly downloaded wheels."""
    versions = admitted()
    lowest = re.match(r">=([\d.]+)", versions)
    if lowest is None:
        raise SystemExit(
            f"pyproject.toml admits mlx{versions}; it needs a lower bound, such as >=0.32.4."
        )
    tables: dict[str, Table] = {}
    wheels: dict[str, dict[str, object]] = {}
    for requirement, platform in itertools.product((f"=={lowest[1]}", versions), PLATFORMS):
        with tempfile.TemporaryDirectory() as folder:
            wheel = download(requirement, platform, Path(folder))
            name = f"{wheel.name.split('-')[1]} {platform}"
            if name in tables:
                continue
            names = kernel_names(wheel)
        tables[name] = Kernels(names).table()
        digest = hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()
        wheels[name] = {"kernels": len(names), "sha256 of their names": digest}
    shared = common(list(tables.values()))
    content = {
        "made by": "python tools/metal_table.py",
        "admitted": f"mlx{versions}",
        "wheels": wheels,
        "kernels": tidy(shared),
        "only": {
            name: tidy(more) for name, table in tables.items() if (more := beyond(table, shared))
        },
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare with the table in the repository, write nothing",
    )
    check = parser.parse_args().check
    made = build()
    if not check:
        TABLE.write_text(made, encoding="utf-8")
        print(f"{TABLE.relative_to(ROOT)}: {len(made)} bytes")
        return
    if made != TABLE.read_text(encoding="utf-8"):
        raise SystemExit(
            "tests/metal/table.json is not what the released wheels hold; make it with "
            "`python tools/metal_table.py`, read what changed, and commit it."
        )
    print(f"tests/metal/table.json is what the wheels of mlx{admitted()} hold")


if __name__ == "__main__":
    main()
