"""Faults are put into our code, and each is found with its line."""

import threading
import types
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_diffgemma.decoding.loop import Loop
from mlx_diffgemma.model import attention, layers
from mlx_diffgemma.sampling import self_conditioning
from tests.helpers.beliefs import belief, logits_with
from tests.helpers.sessions import session
from tests.metal.recorder import ROOT, recorder


def mutated(module, old, new):
    """(the module with ``old`` replaced in its source, the line of it); its frames carry the name
    of the real file.
    """
    source = Path(module.__file__).read_text(encoding="utf-8")
    assert source.count(old) == 1, f"{module.__file__} has no longer one {old!r}"
    copy = types.ModuleType(module.__name__)
    exec(compile(source.replace(old, new), module.__file__, "exec"), copy.__dict__)
    return copy, source[: source.index(old)].count("\n") + 1


def written(code, name="planted.py", **names):
    """The functions of ``code`` as if it stood in a file of our package."""
    exec(compile(code, str(ROOT / "mlx_diffgemma" / name), "exec"), names)
    return types.SimpleNamespace(**names)


class TestMutationsOfOurCode:
    def test_sort_of_booleans(self, tiny):
        copy, line = mutated(self_conditioning, "(~flat).view(mx.uint8)", "~flat")
        with recorder.planted() as faults:
            mx.eval(copy.soft_embedding(tiny, belief(logits_with(5))))
        assert faults == [
            f"mlx_diffgemma/sampling/self_conditioning.py:{line}: ArgSort (bool) -> uint32: "
            "the released Metal libraries have no "
            "kernel for ArgSort of bool"
        ]

    def test_scatter_of_64_bits(self, tiny):
        copy, line = mutated(
            self_conditioning,
            "mx.put_along_axis(order, ",
            "mx.put_along_axis(order.astype(mx.int64), ",
        )
        with recorder.planted() as faults:
            mx.eval(copy.soft_embedding(tiny, belief(logits_with(5))))
        assert [fault.split(": ")[0] for fault in faults] == [
            f"mlx_diffgemma/sampling/self_conditioning.py:{line}"
        ]
        assert faults[0].endswith("Metal has no scatter into elements of 64 bits")

    def test_float64_inside_a_compiled_function(self, tiny):
        copy, line = mutated(
            layers,
            "mx.tanh(logits / cap) * cap",
            "mx.tanh(logits / cap) * cap.astype(mx.float64)",
        )
        with recorder.planted() as faults:
            mx.eval(copy.soft_cap(mx.array([1.0]), mx.array(30.0)))
        assert {fault.split(": ")[0] for fault in faults} == {
            f"mlx_diffgemma/model/layers.py:{line}"
        }
        assert all(fault.endswith("Metal has no float64") for fault in faults)

    def test_frequencies_computed_on_the_cpu_in_every_step(self, tiny, monkeypatch):
        copy, line = mutated(
            attention, "layer.head_dim), 0.0)", "layer.head_dim), 0.0, stream=mx.cpu)"
        )
        monkeypatch.setattr(attention, "layer_frequencies", copy.layer_frequencies.__wrapped__)
        with recorder.planted() as faults:
            loop = Loop(tiny, [session(tiny, 0)])
            for _ in range(3):
                loop.advance()
        assert len(faults) == 1
        assert faults[0].startswith(
            f"mlx_diffgemma/model/attention.py:{line}: an operation on the CPU stream"
        )


class TestPlanted:
    @pytest.mark.parametrize(
        ("code", "why"),
        [
            ("mx.sort(x > 0)", "no kernel for Sort of bool"),
            ("mx.topk(x > 0, 1)", "no kernel for Sort of bool"),
            ("mx.argpartition(x > 0, 1)", "no kernel for ArgSort of bool"),
            (
                "mx.zeros(4, dtype=mx.int64).at[x.astype(mx.int32)].add(1)",
                "no scatter into elements of 64 bits",
            ),
            ("mx.array(1.0, dtype=mx.float64) + x", "no float64"),
            ("mx.fft.fft(x)", "complex64 lacks"),
            ("mx.linalg.inv(mx.eye(2), stream=mx.cpu)", "no GPU implementation"),
            ("mx.logsumexp(x.astype(mx.float64))", "no float64"),
            (
                "mx.quantized_matmul(mx.zeros((1, 64)), mx.zeros((64, 8), dtype=mx.uint32), "
                "mx.zeros((64, 4)), mx.zeros((64, 4)), group_size=16, bits=4)",
                "no kernel for QuantizedMatmul of affine group=16 bits=4 in float32",
            ),
            ("mx.fast.rms_norm(x.astype(mx.int32), None, 1e-6)", "no kernel for RMSNorm of int32"),
            ("x[x.astype(mx.int32)]", None),
            ("mx.argsort((x > 0).astype(mx.uint8))", None),
            ("mx.matmul(x[None].astype(mx.bfloat16), x[:, None].astype(mx.bfloat16))", None),
        ],
    )
    def test_refused_on_its_own_line(self, code, why):
        planted = written(f"def f(x):\n    y = x * 2\n    return {code}\n", mx=mx)
        with recorder.planted() as faults:
            try:
                planted.f(mx.arange(4.0))
            except ValueError:  # MLX itself refuses some, after or before
                assert faults == []
        assert all(fault.startswith("mlx_diffgemma/planted.py:3: ") for fault in faults), faults
        assert any(why in fault for fault in faults) if why else not faults, faults

    def test_every_line_that_asks(self):
        planted = written("def f(x):\n    mx.sort(x)\n    return mx.sort(x)\n", mx=mx)
        with recorder.planted() as faults:
            planted.f(mx.array([True]))
            planted.f(mx.array([True]))
        assert [fault.split(":")[1] for fault in faults] == ["2", "3"]

    def test_line_is_ours_and_not_of_the_layer_we_call(self):
        planted = written("def f(layer, x):\n    return layer(x)\n")
        with recorder.planted() as faults:
            planted.f(nn.RMSNorm(4), mx.zeros((1, 4), dtype=mx.float64))
        assert faults
        assert all(fault.startswith("mlx_diffgemma/planted.py:2: ") for fault in faults)

    def test_gradients_and_other_threads(self):
        planted = written(
            "def f(x):\n    return mx.grad(lambda y: (y.astype(mx.float64) * 2).sum())(x)\n",
            mx=mx,
        )
        with recorder.planted() as faults:
            thread = threading.Thread(target=planted.f, args=(mx.zeros(2),))
            thread.start()
            thread.join()
        assert faults
        assert all(fault.startswith("mlx_diffgemma/planted.py:2: ") for fault in faults)

    def test_tests_may_ask_what_they_like(self):
        with recorder.planted() as faults:
            mx.sort(mx.array([True]))
        assert faults == []

    def test_operation_without_a_rule(self):
        planted = written("def f(x):\n    return mx.hadamard_transform(x)\n", mx=mx)
        with recorder.planted() as faults:
            planted.f(mx.zeros(4))
        assert len(faults) == 1
        assert "has no rule" in faults[0]


class TestStreams:
    CODE = """
class Loop:
    model = None
    def advance(self, stream):
        return mx.add(1, 2, stream=stream)
    def advance_all_on(self, stream):
        with mx.stream(stream):
            return mx.add(1, 2)
"""

    @pytest.mark.parametrize("method", ["advance", "advance_all_on"])
    def test_twice_in_steps_of_one_model(self, method):
        planted = written(self.CODE, mx=mx)
        recorder.step_of(planted.Loop, method, lambda loop: loop.model)
        loop = planted.Loop()
        with recorder.planted() as faults:
            getattr(loop, method)(mx.cpu)
            getattr(loop, method)(None if method == "advance" else mx.default_device())
        assert faults == []
        with recorder.planted() as faults:
            for _ in range(3):
                getattr(loop, method)(mx.cpu)
        assert len(faults) == 1
        assert faults[0].startswith("mlx_diffgemma/planted.py:")
        assert "on the CPU stream in every step" in faults[0]

    def test_outside_of_steps(self):
        planted = written(self.CODE, mx=mx)
        with recorder.planted() as faults:
            for _ in range(3):
                planted.Loop().advance(mx.cpu)
        assert faults == []


class TestSeen:
    """What our code reaches only through others."""

    @pytest.mark.parametrize(
        ("make", "description"),
        [
            (lambda x: mx.random.normal((3,), key=mx.random.key(1)), "ErfInv|float32|float32 |"),
            (lambda x: mx.compile(lambda y: mx.sinh(y) + 1)(x), "Sinh|float32|float32 |"),
            (lambda x: mx.grad(lambda y: mx.erf(y).sum())(x), "Exp|float32|float32 |"),
            (lambda x: nn.gelu_approx(x), "Tanh|float32|float32 |"),
            (
                lambda x: mx.fast.rope(
                    x.reshape(1, 1, 1, 4), 4, traditional=False, base=1e4, scale=1.0, offset=0
                ),
                "RoPE|float32|float32|",
            ),
            (
                lambda x: mx.quantize(mx.zeros((4, 64)), 32, 3),
                "Quantize|uint32|float32 |group=32 bits=3 mode=affine dequantize=0 ",
            ),
            (
                lambda x: mx.dequantize(
                    *mx.quantize(mx.zeros((4, 64)), 32, 3), group_size=32, bits=3
                ),
                "Quantize|float32|uint32|group=32 bits=3 mode=affine dequantize=1",
            ),
            (
                lambda x: mx.fast.scaled_dot_product_attention(
                    *[mx.zeros((1, 1, 2, 512))] * 3, scale=1.0
                ),
                "ScaledDotProductAttention|float32|float32 float32 float32|"
                "queries=2 head=512 values=512",
            ),
        ],
    )
    def test_described(self, make, description):
        make(mx.arange(4.0))
        assert description in recorder.seen
