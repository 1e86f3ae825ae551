"""What a checkpoint is: its shapes (config.json) and its sampling numbers (generation_config.json).

First in the flow; imports nothing of this package but the error type.  Both dialects of config.json are read: the
released one (``global_head_dim``, ``num_global_key_value_heads``) and the ``per_layer_config`` that newer transformers
writes.

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
from mlx_diffgemma.values import Values, shown

CONFIG, GENERATION = "config.json", "generation_config.json"
MODEL_TYPE = "diffusion_gemma"
MARK = "mlx_diffgemma"  # the key of config.json under which our converter says what it did
SLIDING, FULL = "sliding_attention", "full_attention"
MOST_STEPS = 10_000  # a larger number of denoising steps is a mistake: a canvas keeps records of each
MOST_LAYERS = 10_000
LARGEST_SIZE = 2**20  # of a dimension
MOST_HEAD_DIM = 2**10  # times the largest number of heads this fits MLX's 32-bit shapes
# What the reference takes where config.json leaves them out.
IMAGE_IDS = {"boi_token_id": 255_999, "image_token_id": 258_880, "eoi_token_id": 258_882}
DEFAULT_ROPES = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25},
}


@dataclass(frozen=True)
class LayerConfig:
    """What differs from layer to layer.

    ``window`` is the number of positions a row may see, itself included, or None on full layers.  ``rotated`` is how
    many of the ``head_dim / 2`` rotary pairs turn; the exponent's denominator stays ``head_dim``.
    """

    kind: str
    head_dim: int
    num_kv_heads: int
    window: int | None
    rope_theta: float
    rotated: int

    @property
    def has_value_projection(self) -> bool:
        """Full layers take the raw key projection as values."""
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
        """Read text_config; null means absent.  Errors: UserError naming the field and what is allowed."""
        values = Values(raw, CONFIG, "text_config.")
        for key, supported in (("hidden_activation", "gelu_pytorch_tanh"), ("attention_bias", False)):
            if values.has(key) and raw[key] != supported:
                raise UserError(f"config.json: text_config.{key} is {raw[key]!r}, only {supported!r} is supported.")
        if raw.get("use_bidirectional_attention") == "all":
            raise UserError('config.json: use_bidirectional_attention "all" makes the encoder bidirectional and is not '
                            'supported; DiffusionGemma checkpoints have "vision" there.')
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_experts")
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
    """The vision tower.  ``pooling_kernel_size`` is the side of the square of patches that one soft token stands for."""

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
        """With the defaults of Gemma4VisionConfig.  Errors: UserError for a tower of another kind."""
        values = Values(raw, CONFIG, "vision_config.")
        rope = values.part("rope_parameters")
        for key, part, supported in (
            ("model_type", values, ("gemma4_vision",)),
            ("hidden_activation", values, ("gelu_pytorch_tanh",)),
            ("rope_type", rope, ("axial", "default")),
        ):
            if part.has(key) and part.content[key] not in supported:
                raise UserError(f"config.json: {part.prefix}{key} is {part.content[key]!r}, "
                                f"only {supported[0]!r} is supported.")
        sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 16, "num_attention_heads": 12,
                 "num_key_value_heads": 12, "head_dim": 64, "patch_size": 16, "pooling_kernel_size": 3,
                 "position_embedding_size": 10_240}
        numbers = {key: values.integer(key, size, low=1, high=LARGEST_SIZE) for key, size in sizes.items()}
        heads = numbers["num_attention_heads"]
        if numbers["head_dim"] % 4 or heads % numbers["num_key_value_heads"]:
            raise UserError(f"config.json: the vision tower has heads of {numbers['head_dim']} for {heads} over "
                            f"{numbers['num_key_value_heads']}; the size must divide by 4, and the numbers by each other.")
        return cls(
            **numbers,
            rms_norm_eps=values.number("rms_norm_eps", 1e-6, above=0.0),
            rope_theta=rope.number("rope_theta", 100.0, above=0.0),
            standardize=values.flag("standardize", False),
            clipped=values.flag("use_clipped_linears", False),
        )


@dataclass(frozen=True)
class ImageTokens:
    """What stands for an image in the prompt: a begin token, ``image`` once for every soft token, an end token.

    Of a model with a tower only: without one the image token is text.  ``budget`` is how many soft tokens an image may take unless
    another number is asked for; ``both_ways``: those of one image see each other in both directions.
    """

    begin: int
    image: int
    end: int
    budget: int
    both_ways: bool


@dataclass(frozen=True)
class GenerationConfig:
    """Sampling numbers of the reference algorithm; these are the defaults where a checkpoint names none.

    ``entropy_bound`` and ``confidence_threshold`` are in nats.
    """

    max_denoising_steps: int = 48
    entropy_bound: float = 0.1
    t_min: float = 0.4
    t_max: float = 0.8
    confidence_threshold: float = 0.005
    stability_threshold: int = 1
    eos_token_ids: tuple[int, ...] = (1, 106, 50)
    pad_token_id: int = 0

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> GenerationConfig:
        """null means absent, since transformers writes it for every unset field."""
        values = Values(raw, GENERATION)
        sampler = values.part("sampler_config")
        if (name := sampler.text("_cls_name", "EntropyBoundSamplerConfig")) != "EntropyBoundSamplerConfig":
            raise UserError(f"generation_config.json asks for the sampler {name!r}; only EntropyBoundSamplerConfig is known.")
        default = cls()
        found = cls(
            max_denoising_steps=values.integer("max_denoising_steps", default.max_denoising_steps, 1, MOST_STEPS),
            entropy_bound=sampler.number("entropy_bound", default.entropy_bound, low=0.0),
            t_min=values.number("t_min", default.t_min, low=0.0),
            t_max=values.number("t_max", default.t_max, low=0.0),
            confidence_threshold=values.number("confidence_threshold", default.confidence_threshold, low=0.0),
            stability_threshold=values.integer("stability_threshold", default.stability_threshold, 0, MOST_STEPS),
            eos_token_ids=_end_tokens(values) or default.eos_token_ids,
            pad_token_id=values.integer("pad_token_id", default.pad_token_id, low=0),
        )
        if found.t_min > found.t_max:
            raise UserError(f"generation_config.json: t_min {found.t_min:g} exceeds t_max {found.t_max:g}; "
                            "the temperature falls from t_max to t_min.")
        return found

    @classmethod
    def from_folder(cls, folder: Path, config: Mapping[str, Any]) -> GenerationConfig:
        """generation_config.json, or the copy some conversions keep in ``config`` (config.json), or the defaults.

        Without either, the end tokens are those of config.json, as transformers takes them.
        """
        path = folder / GENERATION
        if path.exists():
            return cls.from_dict(read_json(path))
        own = Values(config, CONFIG)
        if own.has("generation_config"):
            return cls.from_dict(own.part("generation_config").content)
        ends = _end_tokens(own) or _end_tokens(own.part("text_config"))
        return replace(cls(), eos_token_ids=ends) if ends else cls()


@dataclass(frozen=True)
class ModelConfig:
    """A whole config.json, and the checkpoint's sampling numbers; ``raw`` is config.json as read."""

    text: TextConfig
    canvas_length: int
    vision: VisionConfig | None = None
    image_tokens: ImageTokens | None = None
    quantization: Mapping[str, Any] | None = None
    generation: GenerationConfig = GenerationConfig()
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Errors: UserError when this is not a DiffusionGemma config or lacks a field, naming it."""
        model_type = raw.get("model_type")
        if model_type != MODEL_TYPE:
            advice = " For autoregressive Gemma models use mlx-lm." if str(model_type).startswith("gemma") else ""
            if "dflash_config" in raw:
                advice = " It is a drafter: give it as --draft-model, beside its model."
            raise UserError(f"Not a DiffusionGemma checkpoint: config.json has model_type {model_type!r}, "
                            f"expected {MODEL_TYPE!r}.{advice}")
        values = Values(raw, CONFIG)
        if not isinstance(raw.get("text_config"), Mapping):
            raise UserError("config.json lacks text_config; download the checkpoint again.")
        if raw.get("tie_word_embeddings") is False:
            raise UserError("config.json: tie_word_embeddings is false; only tied checkpoints exist and are supported.")
        text = TextConfig.from_dict(raw["text_config"])
        vision = values.part("vision_config")
        part = "quantization" if values.has("quantization") else "quantization_config"
        return cls(
            text=text,
            canvas_length=values.integer("canvas_length", 256, low=1, high=text.max_position_embeddings),
            vision=VisionConfig.from_dict(vision.content) if vision.content else None,
            image_tokens=_image_tokens(values, text.vocab_size),
            quantization=values.part(part).content or None,
            raw=raw,
        )

    @property
    def fused(self) -> list[str]:
        """Digests of the adapters that were worked in."""
        mark = self.raw.get(MARK)
        return list(mark.get("fused") or ()) if isinstance(mark, Mapping) else []

    @property
    def recipe(self) -> str | None:
        """The recipe this was quantised by, where our converter did it."""
        mark = self.raw.get(MARK)
        return mark.get("recipe") if isinstance(mark, Mapping) else None

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        """Errors: UserError as ``from_dict``, and for files that are missing or no JSON."""
        raw = read_json(folder / "config.json")
        return replace(cls.from_dict(raw), generation=GenerationConfig.from_folder(folder, raw))


def released_config() -> ModelConfig:
    """The shape of google/diffusiongemma-26B-A4B-it without its vision tower, for counting where there is no checkpoint."""
    return ModelConfig.from_dict(read_json(Path(__file__).with_name("released.json")))


def _end_tokens(values: Values) -> tuple[int, ...]:
    """eos_token_id, which is one id or a list of them; empty when it is absent."""
    given = values.content.get("eos_token_id")
    if given is None:
        return ()
    ids = given if isinstance(given, list | tuple) else [given]
    if not ids or not all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in ids):
        raise values.refuse("eos_token_id", "a token id or a list of token ids")
    return tuple(ids)


def _image_tokens(values: Values, vocabulary: int) -> ImageTokens | None:
    """The image tokens of a checkpoint with a tower; absent ids are the reference's, null switches images off."""
    raw = values.content
    ids = {key: raw.get(key, default) for key, default in IMAGE_IDS.items()}
    if not raw.get("vision_config") or None in ids.values():
        return None
    begin, image, end = (Values(ids, CONFIG).integer(key, low=0, high=vocabulary - 1) for key in ids)
    budget = values.integer("vision_soft_tokens_per_image", 280, low=1)
    return ImageTokens(begin, image, end, budget, raw["text_config"].get("use_bidirectional_attention") == "vision")


def _layers(values: Values, heads: int) -> tuple[LayerConfig, ...]:
    raw = values.content
    count = values.integer("num_hidden_layers", low=1, high=MOST_LAYERS)
    kinds = values.sequence("layer_types", [FULL if (i + 1) % 6 == 0 else SLIDING for i in range(count)])
    if len(kinds) != count or any(kind not in (SLIDING, FULL) for kind in kinds):
        raise UserError(f"config.json: text_config.layer_types must name {SLIDING!r} or {FULL!r} for each of the "
                        f"{count} layers, got {len(kinds)} entries of {shown(sorted(set(map(str, kinds))))}.")
    kinds[-1] = FULL  # as the reference forces it
    window = values.integer("sliding_window", low=1) if SLIDING in kinds else None
    overrides = _overrides(values, kinds)
    ropes = values.part("rope_parameters")
    if not ropes.content:
        ropes = Values(DEFAULT_ROPES, CONFIG, "text_config.rope_parameters.")
    layers = []
    for index, kind in enumerate(kinds):
        own = Values(dict(raw) | overrides.get(index, {}), CONFIG, f"text_config (layer {index}): ")
        head_dim = own.integer("head_dim", 256, low=2, high=MOST_HEAD_DIM)
        kv_heads = own.integer("num_key_value_heads", low=1, high=LARGEST_SIZE)
        if heads % kv_heads or head_dim % 2:
            raise UserError(f"config.json: layer {index} has {heads} heads, {kv_heads} KV heads and head size {head_dim}; "
                            "heads must be a multiple of KV heads and the head size even.")
        layers.append(LayerConfig(kind=kind, head_dim=head_dim, num_kv_heads=kv_heads,
                                  window=window if kind == SLIDING else None, **_rope(ropes, kind, head_dim)))
    return tuple(layers)


def _overrides(values: Values, kinds: list[str]) -> dict[int, dict[str, Any]]:
    """What differs from text_config's own shape, by layer.

    Newer files hold it in ``per_layer_config``, which is empty when all layers are alike.  Older ones name the shape of
    full layers; the reference's defaults stand for what they leave out.
    """
    known = ("head_dim", "num_key_value_heads")
    if values.content.get("per_layer_config") is not None:
        layers = values.part("per_layer_config")
        found = {}
        for index in layers.content:
            if not str(index).isdecimal() or int(index) >= len(kinds):
                raise UserError(f"config.json: text_config.per_layer_config names the layer {shown(index)}; "
                                f"the layers are 0 to {len(kinds) - 1}.")
            own = layers.part(index).content
            found[int(index)] = {key: own[key] for key in known if own.get(key) is not None}
        return found
    full = {"head_dim": values.integer("global_head_dim", 512, low=2, high=MOST_HEAD_DIM),
            "num_key_value_heads": values.integer("num_global_key_value_heads", None, low=1, high=LARGEST_SIZE)}
    full = {key: value for key, value in full.items() if value is not None}
    return {index: full for index, kind in enumerate(kinds) if kind == FULL}


def _rope(ropes: Values, kind: str, head_dim: int) -> dict[str, Any]:
    if not ropes.has(kind):
        raise UserError(f"config.json: text_config.rope_parameters has no entry for {kind!r}.")
    rope = ropes.part(kind)
    factor = rope.number("partial_rotary_factor", 1.0, low=0.0, high=1.0)
    rope_type = rope.text("rope_type", "default")
    if rope_type not in ("default", "proportional") or (rope_type == "default" and factor != 1.0):
        raise UserError(f"config.json: rope type {rope_type!r} with partial_rotary_factor {factor} is not supported; "
                        "known are 'default' and 'proportional'.")
    return {"rope_theta": rope.number("rope_theta", above=0.0), "rotated": int(factor * head_dim // 2)}
