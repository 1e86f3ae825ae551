"""The table of Metal kernels, made from libraries small enough to write here."""

import json
import re
import struct
import subprocess
import zipfile
from types import SimpleNamespace

import metal_table
import pytest

from tests.metal import rules


def wheel_of(path, names, magic=b"MTLB", count=None):
    functions = b"".join(
        b"NAME" + struct.pack("<H", len(n) + 1) + n.encode() + b"\0TYPE\x01\0\x02ENDT"
        for n in names
    )
    header = magic + bytes(20) + struct.pack("<QQ", 88, len(functions)) + bytes(48)
    library = (
        header + struct.pack("<I", len(names) if count is None else count) + functions + bytes(1000)
    )
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("mlx/lib/mlx.metallib", library)
    return path


def sorts(*dtypes):
    return {
        f"{kind}_{t}_{index}_bn32_tn4"
        for t in dtypes
        for kind, index in (
            ("carg_block_sort", "uint32"),
            ("ncarg_block_sort", "uint32"),
            ("sort_mbsort", "uint32"),
            ("partition_mbsort", "uint32"),
            ("merge_mbsort", "uint32"),
        )
    }


class TestTable:
    def test_names_of_a_wheel(self, tmp_path):
        wheel = wheel_of(tmp_path / "mlx_metal-1.whl", ["v_Absint8int8", "rbits"])
        assert metal_table.kernel_names(wheel) == {"v_Absint8int8", "rbits"}

    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"magic": b"ELF!"}, "does not begin as a Metal library"),
            ({"count": 9}, "lists 9 functions, 2 names were found"),
        ],
    )
    def test_library_of_another_kind(self, tmp_path, changes, sentence):
        wheel = wheel_of(tmp_path / "mlx_metal-1.whl", ["v_Absint8int8", "rbits"], **changes)
        with pytest.raises(SystemExit, match=sentence):
            metal_table.kernel_names(wheel)

    def test_dtype_that_one_kernel_lacks(self):
        names = sorts("int8", "bool_")
        assert metal_table.Kernels(names).table()["ArgSort"] == {"dtypes": ["bool", "int8"]}
        names.remove("merge_mbsort_bool__uint32_bn32_tn4")
        assert metal_table.Kernels(names).table()["ArgSort"] == {"dtypes": ["int8"]}

    def test_elementwise(self):
        names = {f"{layout}Absint8int8" for layout in metal_table.UNARY} | {
            f"{layout}Addint8" for layout in metal_table.BINARY
        }
        table = metal_table.Kernels(names).table()
        assert table["Abs"] == {"int8": ["int8"]}
        assert table["Add"] == {"dtypes": ["int8"]}
        table = metal_table.Kernels(names - {"gn4large_Absint8int8", "vv2_Addint8"}).table()
        assert "Abs" not in table
        assert "Add" not in table

    def test_m5_needs_its_own_products(self):
        names = {
            template.replace("{t}", "float32").replace("*", "x")
            for template in metal_table.KERNELS["Matmul"]
        }
        assert metal_table.Kernels(names).table()["Matmul"] == {"dtypes": ["float32"]}
        other = "steel_gemm_fused_nax_nn_float16_float16_x"  # M5's, but not for float32
        assert metal_table.Kernels(names | {other}).table()["Matmul"] == {"dtypes": []}

    def test_what_wheels_share(self):
        tables = [
            {"A": {"dtypes": ["int8", "bool"]}, "B": {"dtypes": ["int8"]}},
            {"A": {"dtypes": ["int8"]}},
        ]
        shared = metal_table.common(tables)
        assert metal_table.tidy(shared) == {"A": {"dtypes": "int8"}}
        assert metal_table.beyond(tables[0], shared) == {
            "A": {"dtypes": ["bool"]},
            "B": {"dtypes": ["int8"]},
        }

    def test_wheel_that_cannot_be_had(self, tmp_path, monkeypatch):
        failed = SimpleNamespace(returncode=1, stderr="ERROR: no network\n")
        monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
        with pytest.raises(
            SystemExit,
            match=r"could not be downloaded, so the table .* not be checked.* ERROR: no network",
        ):
            metal_table.download("==1", "macosx_14_0_arm64", tmp_path)

    def test_committed_table_is_of_the_admitted_versions(self):
        committed = json.loads(metal_table.TABLE.read_text(encoding="utf-8"))
        assert committed["admitted"] == f"mlx{metal_table.admitted()}"
        lowest = re.match(r">=([\d.]+)", metal_table.admitted())[1]
        assert {f"{lowest} {platform}" for platform in metal_table.PLATFORMS} <= set(
            committed["wheels"]
        )

    def test_check_says_what_to_do(self, tmp_path, monkeypatch):
        (tmp_path / "table.json").write_text("{}")
        monkeypatch.setattr(metal_table, "TABLE", tmp_path / "table.json")
        monkeypatch.setattr(metal_table, "build", lambda: "{1}")
        monkeypatch.setattr("sys.argv", ["metal_table.py", "--check"])
        with pytest.raises(SystemExit, match=r"make it with `python tools/metal_table.py`"):
            metal_table.main()
        assert (tmp_path / "table.json").read_text() == "{}"


class TestRules:
    def test_every_rule_names_rows_of_the_table(self):
        rows = {
            *rules.UNARY,
            *rules.BINARY,
            *rules.ROWS.values(),
            *(f"Reduce{n}" for n in rules.REDUCTIONS),
            "Copy",
            "Update",
            "Select",
            "GatherMM",
            "GatherQMM",
            "QuantizedMatmul",
            "Quantize",
            "Dequantize",
        }
        assert rows <= set(rules.TABLE)

    @pytest.mark.parametrize(
        ("description", "why"),
        [
            ("ArgSort|uint32|bool |", "no kernel for ArgSort of bool"),
            ("Partition|bool|bool |", "no kernel for Sort of bool"),
            ("AsType|float64|float32 |", "no float64"),
            ("Matmul|int32|int32 int32 |", "no kernel for Matmul of int32"),
            ("Scatter Sum|uint64|uint64 int32 uint64 |indices=1 ", "64 bits"),
            ("Scatter Sum|uint32|uint32 int32 uint32 |indices=1 ", None),
            ("Gather|float32|float32 int32 |indices=21 ", "at most 20 index arrays, not 21"),
            (
                "QuantizedMatmul|bfloat16|bfloat16 uint32 |group=64 bits=4 mode=affine ",
                None,
            ),
            (
                "QuantizedMatmul|bfloat16|bfloat16 uint32 |group=64 bits=7 mode=affine ",
                "affine group=64 bits=7",
            ),
            (
                "GatherQMM|float32|float32 uint32 uint8 uint32 |group=32 bits=4 mode=nvfp4 ",
                "nvfp4 group=32 bits=4",
            ),
            ("Max|bool|bool |", "ReduceMax of bool"),
            ("Sum|int32|bool |", None),
            ("And|bool|uint8 |", None),
            ("CompiledAddMultiply|float32|float32 float32 |", None),
            ("CompiledAddMultiply|float64|float32 float32 |", "no float64"),
            (
                "ScaledDotProductAttention|int32|int32 int32 int32|queries=9 head=64 values=64",
                "Matmul of int32",
            ),
            (
                "ScaledDotProductAttention|bfloat16|bfloat16|queries=9 head=33 values=33",
                None,
            ),
            ("Load|float64||", None),
            ("Flubber|float32|float32 |", "no rule"),
        ],
    )
    def test_fault(self, description, why):
        found = rules.fault(description)
        assert found is None if why is None else why in found

    def test_group_size_whose_kernel_is_gone(self, monkeypatch):
        described = "GatherQMM|bfloat16|bfloat16 uint32 |group=64 bits=4 mode=affine "
        assert rules.fault(described) is None
        monkeypatch.delitem(rules.TABLE["GatherQMM"], "affine group=64 bits=4")
        assert "no kernel for GatherQMM of affine group=64 bits=4 in bfloat16" in rules.fault(
            described
        )

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_grouped_products_in_the_dtype_of_a_gpu(self, monkeypatch, dtype):
        """The CPU casts to float32 first, so its graph says nothing of the others."""
        kept = " ".join(t for t in ("float32", "bfloat16", "float16") if t != dtype)
        monkeypatch.setitem(rules.TABLE, "GatherMM", {"dtypes": kept})
        assert f"GatherMM of {dtype}" in rules.fault(
            "GatherMM|float32|float32 float32 uint32 uint32 |"
        )
