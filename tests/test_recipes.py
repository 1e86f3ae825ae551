import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from mlx_diffgemma.checkpoint.options import ConvertOptions
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.estimate import cost
from mlx_diffgemma.model.config import ModelConfig, released_config
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.model.recipes import (
    CLASSES,
    MODES,
    RECIPES,
    Precision,
    Quantization,
    kind_of,
    to_config,
)
from tests.checkpoints import DIVISIBLE, config_dict

EVERY = [
    Precision(bits, group, mode)
    for mode, (all_bits, groups) in MODES.items()
    for bits in all_bits
    for group in groups
]


@pytest.mark.parametrize("precision", EVERY, ids=lambda p: f"{p.mode}-{p.bits}-{p.group_size}")
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32], ids=str)
def test_packed_says_what_quantize_makes(precision, dtype):
    matrix = mx.random.normal((3, 8, 256)).astype(dtype)
    made = precision.quantize(matrix)
    assert {name: (a.dtype, a.shape) for name, a in made.items()} == precision.packed(
        matrix.shape, dtype
    )
    back = precision.dequantize(made, mx.float32)
    assert back.shape == matrix.shape
    assert mx.abs(back - matrix).max().item() < {2: 2.5, 3: 1.2}.get(precision.bits, 1.0)


@pytest.mark.parametrize(
    "arguments",
    [
        (7, 64, "affine"),
        (4, 48, "affine"),
        (8, 32, "mxfp4"),
        (4, 64, "mxfp4"),
        (4, 32, "nvfp4"),
        (4, 32, "mxfp8"),
        (4, 64, "gguf"),
    ],
)
def test_what_mlx_lacks_is_refused(arguments):
    with pytest.raises(UserError, match=r"Mode|mode"):
        Precision(*arguments)


def test_every_matrix_of_the_model_has_a_class():
    model = DiffusionGemma(ModelConfig.from_dict(config_dict(**DIVISIBLE)))
    kinds = {
        name: kind_of(name.removesuffix(".weight"))
        for name, value in tree_flatten(model.parameters())
        if value.ndim > 1
    }
    assert "other" not in kinds.values()
    assert set(kinds.values()) == set(CLASSES) - {"vision"}
    assert kind_of("model.encoder.vision_tower.encoder.layers.0.mlp.up_proj.linear") == "vision"


def test_no_vector_is_taken_for_a_matrix():
    for name in (
        "model.decoder.layers.0.self_attn.q_norm",
        "model.decoder.norm",
        "model.decoder.self_conditioning.pre_norm",
        "model.decoder.layers.0.router.scale",
        "model.decoder.layers.0.layer_scalar",
    ):
        assert kind_of(name) == "other"
    tower, recipe = "model.encoder.vision_tower.encoder.layers.0.", RECIPES["3bit"]
    assert recipe.precision_at(f"{tower}input_layernorm.weight", (1152,)) is None
    assert recipe.precision_at(f"{tower}mlp.up_proj.linear.weight", (4, 1152)) == Precision(8, 64)


def test_rows_that_groups_do_not_divide_are_refused():
    Precision(4, 64).check("up_proj", 128)
    for columns in (32, 96):
        with pytest.raises(UserError, match=f"up_proj has rows of {columns} weights"):
            Precision(4, 64).check("up_proj", columns)


def test_all_but_the_named_three_keep_the_core_at_eight_bits_or_better():
    for recipe in RECIPES.values():
        for kind in ("embedding", "attention", "router", "dense_mlp", "self_conditioning"):
            precision = recipe.precision(kind)
            assert (
                precision is None
                or precision == Precision(8, 64)
                or recipe.name in ("3bit-small", "uniform-4bit")
            )
    small = RECIPES["3bit-small"]
    assert small.attention == small.embedding == small.dense_mlp == Precision(6, 64)
    assert small.router == Precision(8, 64), "eleven megabytes decide which experts a row takes"
    assert RECIPES["uniform-4bit"].warning


def test_groups_are_as_wide_as_the_rows_allow():
    """At the released shape rows have 2,816 weights, or 704 and 2,112, which 128 does not divide."""
    small = RECIPES["3bit-small"]
    assert small.precision_of("experts", 2816) == Precision(3, 128)
    assert small.precision_of("experts", 704) == Precision(3, 64)
    assert small.precision_of("experts", 96) == Precision(3, 32)
    assert small.precision_of("experts", 50) == Precision(3, 128), (
        "nothing divides it, and check says so"
    )
    assert small.precision_of("dense_mlp", 2112) == Precision(6, 64)
    assert RECIPES["3bit"].precision_of("experts", 96) == Precision(3, 64), (
        "only where the recipe says so"
    )


def test_every_recipe_fits_the_released_shape():
    config = released_config()
    for recipe in RECIPES.values():
        for name, shape in cost.shapes(config).items():
            path = name.removesuffix(".weight")
            if precision := recipe.precision_of(kind_of(path), shape[-1]):
                precision.check(path, shape[-1])


class TestOptions:
    @pytest.mark.parametrize(
        ("words", "name"),
        [
            (dict(quantize=True), "4bit"),
            (dict(quantize=True, q_bits=6), "6bit"),
            (dict(quantize=True, q_bits=8), "8bit"),
            (dict(quantize=True, q_mode="mxfp4"), "mxfp4"),
            (dict(quantize=True, q_mode="nvfp4"), "nvfp4"),
            (dict(quantize=True, q_mode="mxfp8"), "mxfp8"),
            (dict(recipe="8bit", q_bits=4), "4bit"),
            (dict(recipe="3bit"), "3bit"),
            (dict(quantize=True, recipe="uniform-4bit"), "uniform-4bit"),
            (dict(), None),
        ],
    )
    def test_the_recipe_they_choose(self, words, name):
        chosen = ConvertOptions(**words).chosen()
        assert (chosen.name if chosen else None) == name

    def test_bits_change_the_experts_only(self):
        chosen = ConvertOptions(quantize=True, q_bits=2, q_group_size=128).chosen()
        assert chosen.experts == Precision(2, 128)
        assert chosen.attention == chosen.embedding == Precision(8, 64)

    def test_in_a_uniform_recipe_they_change_everything(self):
        chosen = ConvertOptions(recipe="uniform-4bit", q_bits=3).chosen()
        assert (
            chosen.experts
            == chosen.attention
            == chosen.embedding
            == chosen.router
            == Precision(3, 64)
        )
        assert chosen.vision is None

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (dict(quantize=True, dequantize=True), "not both"),
            (dict(recipe="4bit", dequantize=True), "not both"),
            (dict(q_bits=4), "--q-bits has no effect without -q"),
            (dict(q_mode="mxfp4"), "--q-mode has no effect"),
            (dict(quantize=True, recipe="bf16"), "quantises nothing"),
            (dict(recipe="bf16", q_bits=4), "quantises nothing"),
            (dict(recipe="best"), "Unknown recipe 'best'; use one of bf16"),
            (dict(quantize=True, q_bits=7), "not 7"),
            (dict(quantize=True, q_mode="mxfp4", q_bits=8), "mxfp4 has 4 bits, not 8"),
            (dict(quantize=True, q_mode="int4"), "Unknown quantisation mode 'int4'"),
            (dict(dtype="int8"), "Unknown dtype"),
            (dict(quantize=True, q_mode="nvfp4", q_group_size=64), "groups of 16, not 64"),
        ],
    )
    def test_contradictions(self, words, message):
        with pytest.raises(UserError, match=message):
            ConvertOptions(**words)


class TestConfig:
    def test_the_layout_of_mlx_community(self):
        """Overrides without a mode are affine whatever the default, and false means not quantised."""
        found = Quantization.from_config(
            {
                "group_size": 32,
                "bits": 4,
                "mode": "mxfp4",
                "a": {"group_size": 64, "bits": 8},
                "b": False,
            }
        )
        assert found.of("x", True) == Precision(4, 32, "mxfp4")
        assert found.of("x", False) is None
        assert found.of("a", True) == Precision(8, 64)
        assert found.of("b", False) is None
        with pytest.raises(UserError, match="a is quantised, the files say otherwise"):
            found.of("a", False)
        with pytest.raises(UserError, match="b is not quantised, the files say otherwise"):
            found.of("b", True)

    def test_the_precision_of_the_experts_is_the_default(self):
        layer = "model.decoder.layers.0."
        written = to_config(
            {
                f"{layer}self_attn.q_proj": Precision(8, 64),
                f"{layer}experts.down_proj": Precision(4, 64),
            }
        )
        assert (written["bits"], written[f"{layer}self_attn.q_proj"]["bits"]) == (4, 8)
        assert f"{layer}experts.down_proj" not in written

    @given(
        st.dictionaries(
            st.sampled_from(
                [
                    f"model.decoder.layers.{i}.{name}"
                    for i in range(3)
                    for name in ("experts.down_proj", "self_attn.q_proj", "router.proj")
                ]
            ),
            st.one_of(st.none(), st.sampled_from(EVERY)),
            min_size=1,
        )
    )
    def test_what_is_written_is_read(self, precisions):
        if any(precisions.values()):
            found = Quantization.from_config(to_config(precisions))
            assert {
                path: found.of(path, precision is not None)
                for path, precision in precisions.items()
            } == precisions
