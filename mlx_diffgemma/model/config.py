"""The shapes of a checkpoint (config.json).

Both dialects of config.json are read: the released one (``global_head_dim``,
``num_global_key_value_heads``) and the ``per_layer_config`` that newer transformers writes.

    >>> config = ModelConfig.from_dict(json.load(open("config.json")))
    >>> config.text.layers[5].kind
    'full_attention'
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlx_diffgemma.errors import UserError
from mlx_diffgemma.files import read_json
from mlx_diffgemma.model.generation_config import CONFIG, GenerationConfig
from mlx_diffgemma.values import Values, shown

MODEL_TYPE = "diffusion_gemma"
MARK = "mlx_diffgemma"  # the key of config.json for what the converter did
SLIDING = "sliding_attention"
FULL = "full_attention"
MOST_LAYERS = 10_000
LARGEST_SIZE = 2**20  # the largest size of a dimension
MOST_HEAD_DIM = 2**10  # with the largest number of heads, this fits MLX's 32-bit shapes
SHAPE = ("head_dim", "num_key_value_heads")  # the fields that may differ from layer to layer
# The reference's values for ids that config.json leaves out.
IMAGE_IDS = {"boi_token_id": 255_999, "image_token_id": 258_880, "eoi_token_id": 258_882}
DEFAULT_ROPES = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25},
}


@dataclass(frozen=True)
class LayerConfig:
    """The shape of one layer.

    ``window`` is the number of positions a row may see, itself included; None on full layers.
    ``rotated`` is how many of the ``head_dim / 2`` rotary pairs are rotated.  The denominator of
    the exponent is always ``head_dim``.
    """

    kind: str
    head_dim: int
    num_kv_heads: int
    window: int | None
    rope_theta: float
    rotated: int

    @property
    def has_value_projection(self) -> bool:
        """Whether the layer projects values.  Full layers use the raw key projection as values."""
        return self.kind == SLIDING


@dataclass(frozen=True)
class TextConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_experts: int
    top_k_experts: int
    num_attention_heads: int
    rms_norm_eps: float
    final_logit_softcapping: float
    max_position_embeddings: int
    pad_token_id: int
    layers: tuple[LayerConfig, ...]

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> TextConfig:
        """Read text_config; null means absent.

        Raises:
            UserError: A field is missing or not supported; the message names it and what is
                allowed.
        """
        values = Values(raw, CONFIG, "text_config.")
        for key, supported in (
            ("hidden_activation", "gelu_pytorch_tanh"),
            ("attention_bias", False),
        ):
            if values.has(key) and raw[key] != supported:
                raise UserError(
                    f"config.json: text_config.{key} is {raw[key]!r}, "
                    f"only {supported!r} is supported."
                )
        if raw.get("use_bidirectional_attention") == "all":
            raise UserError(
                'config.json: use_bidirectional_attention "all" makes the encoder bidirectional and '
                'is not supported; DiffusionGemma checkpoints have "vision" there.'
            )
        sizes = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "moe_intermediate_size",
            "num_experts",
        )
        shape = {key: values.integer(key, low=1, high=LARGEST_SIZE) for key in sizes}
        heads = values.integer("num_attention_heads", low=1, high=LARGEST_SIZE)
        return cls(
            **shape,
            top_k_experts=values.integer("top_k_experts", low=1, high=shape["num_experts"]),
            num_attention_heads=heads,
            rms_norm_eps=values.number("rms_norm_eps", 1e-6, low=0.0),
            final_logit_softcapping=values.number("final_logit_softcapping", 30.0, above=0.0),
            max_position_embeddings=values.integer("max_position_embeddings", 131_072, low=1),
            pad_token_id=values.integer("pad_token_id", 0, low=0, high=shape["vocab_size"] - 1),
            layers=_layers(values, heads),
        )


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower.

    ``pooling_kernel_size`` is the side, in patches, of the square that one soft token represents.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    patch_size: int
    pooling_kernel_size: int
    position_embedding_size: int
    rms_norm_eps: float
    rope_theta: float
    standardize: bool
    clipped: bool

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> VisionConfig:
        """Read vision_config, with the defaults of Gemma4VisionConfig.

        Raises:
            UserError: The tower is of another kind.
        """
        values = Values(raw, CONFIG, "vision_config.")
        rope = values.part("rope_parameters")
        for key, part, supported in (
            ("model_type", values, ("gemma4_vision",)),
            ("hidden_activation", values, ("gelu_pytorch_tanh",)),
            ("rope_type", rope, ("axial", "default")),
        ):
            if part.has(key) and part.content[key] not in supported:
                raise UserError(
                    f"config.json: {part.prefix}{key} is {part.content[key]!r}, "
                    f"only {supported[0]!r} is supported."
                )
        sizes = {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 16,
            "num_attention_heads": 12,
            "num_key_value_heads": 12,
            "head_dim": 64,
            "patch_size": 16,
            "pooling_kernel_size": 3,
            "position_embedding_size": 10_240,
        }
        numbers = {
            key: values.integer(key, size, low=1, high=LARGEST_SIZE) for key, size in sizes.items()
        }
        heads = numbers["num_attention_heads"]
        if numbers["head_dim"] % 4 or heads % numbers["num_key_value_heads"]:
            raise UserError(
                f"config.json: the vision tower has heads of {numbers['head_dim']} for {heads} over "
                f"{numbers['num_key_value_heads']}; the size must divide by 4, and the numbers by "
                "each other."
            )
        return cls(
            **numbers,
            rms_norm_eps=values.number("rms_norm_eps", 1e-6, above=0.0),
            rope_theta=rope.number("rope_theta", 100.0, above=0.0),
            standardize=values.flag("standardize", False),
            clipped=values.flag("use_clipped_linears", False),
        )


@dataclass(frozen=True)
class ImageTokens:
    """How an image is written in the prompt, for a model with a vision tower.

    Args:
        begin: The token before an image.
        image: The token that is repeated for every soft token.
        end: The token after an image.
        budget: The most soft tokens of an image, unless another number is asked for.
        both_ways: Whether the soft tokens of one image see each other in both directions.
    """

    begin: int
    image: int
    end: int
    budget: int
    both_ways: bool


@dataclass(frozen=True)
class ModelConfig:
    """A whole config.json, and the sampling parameters; ``raw`` is config.json as it was read."""

    text: TextConfig
    canvas_length: int
    vision: VisionConfig | None = None
    image_tokens: ImageTokens | None = None
    quantization: Mapping[str, Any] | None = None
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Read config.json.

        Raises:
            UserError: It is not of a DiffusionGemma model or lacks a field; the message names it.
        """
        model_type = raw.get("model_type")
        if model_type != MODEL_TYPE:
            advice = ""
            if str(model_type).startswith("gemma"):
                advice = " For autoregressive Gemma models use mlx-lm."
            if "dflash_config" in raw:
                advice = " It is a drafter: give it as --draft-model, beside its model."
            raise UserError(
                f"Not a DiffusionGemma checkpoint: config.json has model_type {model_type!r}, "
                f"expected {MODEL_TYPE!r}.{advice}"
            )
        values = Values(raw, CONFIG)
        if not isinstance(raw.get("text_config"), Mapping):
            raise UserError("config.json lacks text_config; download the checkpoint again.")
        if raw.get("tie_word_embeddings") is False:
            raise UserError(
                "config.json: tie_word_embeddings is false; "
                "only tied checkpoints exist and are supported."
            )
        text = TextConfig.from_dict(raw["text_config"])
        vision = values.part("vision_config")
        part = "quantization" if values.has("quantization") else "quantization_config"
        return cls(
            text=text,
            canvas_length=values.integer(
                "canvas_length", 256, low=1, high=text.max_position_embeddings
            ),
            vision=VisionConfig.from_dict(vision.content) if vision.content else None,
            image_tokens=_image_tokens(values, text.vocab_size),
            quantization=values.part(part).content or None,
            raw=raw,
        )

    @property
    def fused(self) -> list[str]:
        """The digests of the adapters that were merged into the weights."""
        mark = self.raw.get(MARK)
        return list(mark.get("fused") or ()) if isinstance(mark, Mapping) else []

    @property
    def recipe(self) -> str | None:
        """The recipe that this package's converter quantised the checkpoint by, or None."""
        mark = self.raw.get(MARK)
        return mark.get("recipe") if isinstance(mark, Mapping) else None

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        """Read the configs of a checkpoint.

        Raises:
            UserError: As ``from_dict``, or a file is missing or not JSON.
        """
        raw = read_json(folder / "config.json")
        return replace(cls.from_dict(raw), generation=GenerationConfig.from_folder(folder, raw))


def released_config() -> ModelConfig:
    """The shape of google/diffusiongemma-26B-A4B-it without its vision tower.

    It serves estimates that have no checkpoint.
    """
    return ModelConfig.from_dict(read_json(Path(__file__).with_name("released.json")))


def _image_tokens(values: Values, vocabulary: int) -> ImageTokens | None:
    """The image tokens of a checkpoint with a vision tower; None for one without.

    Absent ids get the reference's values; null switches images off.
    """
    raw = values.content
    ids = {key: raw.get(key, default) for key, default in IMAGE_IDS.items()}
    if not raw.get("vision_config") or None in ids.values():
        return None
    begin, image, end = (
        Values(ids, CONFIG).integer(key, low=0, high=vocabulary - 1) for key in ids
    )
    budget = values.integer("vision_soft_tokens_per_image", 280, low=1)
    both_ways = raw["text_config"].get("use_bidirectional_attention") == "vision"
    return ImageTokens(begin, image, end, budget, both_ways)


def _layers(values: Values, heads: int) -> tuple[LayerConfig, ...]:
    """The shape of each layer of text_config.

    Raises:
        UserError: The shapes do not fit together.
    """
    raw = values.content
    kinds = _kinds(values)
    window = values.integer("sliding_window", low=1) if SLIDING in kinds else None
    overrides = _overrides(values, kinds)
    ropes = values.part("rope_parameters")
    if not ropes.content:
        ropes = Values(DEFAULT_ROPES, CONFIG, "text_config.rope_parameters.")
    layers = []
    for index, kind in enumerate(kinds):
        shape = dict(raw) | overrides.get(index, {})
        layer = Values(shape, CONFIG, f"text_config (layer {index}): ")
        head_dim = layer.integer("head_dim", 256, low=2, high=MOST_HEAD_DIM)
        kv_heads = layer.integer("num_key_value_heads", low=1, high=LARGEST_SIZE)
        if heads % kv_heads or head_dim % 2:
            raise UserError(
                f"config.json: layer {index} has {heads} heads, {kv_heads} KV heads and head size "
                f"{head_dim}; heads must be a multiple of KV heads and the head size even."
            )
        layers.append(
            LayerConfig(
                kind=kind,
                head_dim=head_dim,
                num_kv_heads=kv_heads,
                window=window if kind == SLIDING else None,
                **_rope(ropes, kind, head_dim),
            )
        )
    return tuple(layers)


def _kinds(values: Values) -> list[str]:
    """The kind of attention of each layer; without ``layer_types`` every sixth is full."""
    count = values.integer("num_hidden_layers", low=1, high=MOST_LAYERS)
    default = [FULL if (i + 1) % 6 == 0 else SLIDING for i in range(count)]
    kinds: list[str] = values.sequence("layer_types", default)
    if len(kinds) != count or any(kind not in (SLIDING, FULL) for kind in kinds):
        raise UserError(
            f"config.json: text_config.layer_types must name {SLIDING!r} or {FULL!r} for each of "
            f"the {count} layers, got {len(kinds)} entries of "
            f"{shown(sorted(set(map(str, kinds))))}."
        )
    kinds[-1] = FULL  # as the reference forces it
    return kinds


def _overrides(values: Values, kinds: list[str]) -> dict[int, dict[str, Any]]:
    """What each layer changes in the shape of text_config.

    Newer files hold this in ``per_layer_config``, which is empty when all layers are alike.  Older
    files name the shape of full layers; the reference's defaults replace what they leave out.
    """
    if values.content.get("per_layer_config") is not None:
        layers = values.part("per_layer_config")
        overrides = {}
        for index in layers.content:
            if not str(index).isdecimal() or int(index) >= len(kinds):
                raise UserError(
                    f"config.json: text_config.per_layer_config names the layer {shown(index)}; "
                    f"the layers are 0 to {len(kinds) - 1}."
                )
            shape = layers.part(index).content
            names = [name for name in SHAPE if shape.get(name) is not None]
            overrides[int(index)] = {name: shape[name] for name in names}
        return overrides
    full = {"head_dim": values.integer("global_head_dim", 512, low=2, high=MOST_HEAD_DIM)}
    kv_heads = values.integer("num_global_key_value_heads", None, low=1, high=LARGEST_SIZE)
    if kv_heads is not None:
        full["num_key_value_heads"] = kv_heads
    return {index: full for index, kind in enumerate(kinds) if kind == FULL}


def _rope(ropes: Values, kind: str, head_dim: int) -> dict[str, Any]:
    """The rotary fields of a layer.

    Args:
        ropes: The rotary parameters by kind of layer.
        kind: The kind of the layer.
        head_dim: Its head size.

    Raises:
        UserError: The type is unknown.
    """
    if not ropes.has(kind):
        raise UserError(f"config.json: text_config.rope_parameters has no entry for {kind!r}.")
    rope = ropes.part(kind)
    factor = rope.number("partial_rotary_factor", 1.0, low=0.0, high=1.0)
    rope_type = rope.text("rope_type", "default")
    if rope_type not in ("default", "proportional") or (rope_type == "default" and factor != 1.0):
        raise UserError(
            f"config.json: rope type {rope_type!r} with partial_rotary_factor {factor} is not "
            "supported; known are 'default' and 'proportional'."
        )
    return {
        "rope_theta": rope.number("rope_theta", above=0.0),
        "rotated": int(factor * head_dim // 2),
    }
