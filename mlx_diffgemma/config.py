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

MODEL_TYPE = "diffusion_gemma"
MARK = "mlx_diffgemma"  # the key of config.json under which our converter says what it did
SLIDING, FULL = "sliding_attention", "full_attention"


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
        for key, supported in (("hidden_activation", "gelu_pytorch_tanh"), ("attention_bias", False)):
            if raw.get(key, supported) != supported:
                raise UserError(f"config.json: text_config.{key} is {raw[key]!r}, only {supported!r} is supported.")
        if raw.get("use_bidirectional_attention") == "all":
            raise UserError('config.json: use_bidirectional_attention "all" makes the encoder bidirectional and is not '
                            'supported; DiffusionGemma checkpoints have "vision" there.')
        heads = _positive(raw, "num_attention_heads")
        return cls(
            **{key: _positive(raw, key) for key in ("vocab_size", "hidden_size", "intermediate_size",
                                                    "moe_intermediate_size", "num_experts", "top_k_experts")},
            num_attention_heads=heads,
            rms_norm_eps=float(raw.get("rms_norm_eps") or 1e-6),
            final_logit_softcapping=float(raw.get("final_logit_softcapping") or 30.0),
            max_position_embeddings=int(raw.get("max_position_embeddings") or 131_072),
            pad_token_id=int(raw.get("pad_token_id") or 0),
            layers=_layers(raw, heads),
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
        rope = raw.get("rope_parameters") or {}
        for key, value, supported in (
                ("model_type", raw.get("model_type", "gemma4_vision"), ("gemma4_vision",)),
                ("hidden_activation", raw.get("hidden_activation", "gelu_pytorch_tanh"), ("gelu_pytorch_tanh",)),
                ("rope_parameters.rope_type", rope.get("rope_type", "axial"), ("axial", "default"))):
            if value not in supported:
                raise UserError(f"config.json: vision_config.{key} is {value!r}, only {supported[0]!r} is supported.")
        heads = raw.get("num_attention_heads", 12)
        given = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 16, "num_attention_heads": 12,
                 "num_key_value_heads": heads, "head_dim": 64, "patch_size": 16, "pooling_kernel_size": 3,
                 "position_embedding_size": 10_240} | dict(raw)
        numbers = {key: _positive(given, key, "vision_config.") for key in (
            "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
            "patch_size", "pooling_kernel_size", "position_embedding_size")}
        if not (theta := float(rope.get("rope_theta", 100.0))) > 0 or not (eps := float(raw.get("rms_norm_eps") or 1e-6)) > 0:
            raise UserError("config.json: vision_config needs a rope_theta and a rms_norm_eps above 0; download the file again.")
        if numbers["head_dim"] % 4 or heads % numbers["num_key_value_heads"]:
            raise UserError(f"config.json: the vision tower has heads of {numbers['head_dim']} for {heads} over "
                            f"{numbers['num_key_value_heads']}; the size must divide by 4, and the numbers by each other.")
        return cls(**numbers, rms_norm_eps=eps, rope_theta=theta, standardize=bool(raw.get("standardize")),
                   clipped=bool(raw.get("use_clipped_linears")))


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
        sampler = raw.get("sampler_config") or {}
        if not isinstance(sampler, Mapping):
            raise UserError(f"generation_config.json: sampler_config must be an object, got {sampler!r}.")
        if (name := sampler.get("_cls_name", "EntropyBoundSamplerConfig")) != "EntropyBoundSamplerConfig":
            raise UserError(f"generation_config.json asks for the sampler {name!r}; only EntropyBoundSamplerConfig is known.")
        eos = raw.get("eos_token_id")
        found: dict[str, Any] = {
            **{key: raw.get(key) for key in ("max_denoising_steps", "t_min", "t_max", "confidence_threshold",
                                             "stability_threshold", "pad_token_id")},
            "entropy_bound": sampler.get("entropy_bound"),
            "eos_token_ids": None if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
        }
        return replace(cls(), **{key: value for key, value in found.items() if value is not None})

    @classmethod
    def from_folder(cls, folder: Path, config: Mapping[str, Any]) -> GenerationConfig:
        """generation_config.json, or the copy some conversions keep in ``config`` (config.json), or the defaults."""
        path = folder / "generation_config.json"
        return cls.from_dict(read_json(path) if path.exists() else config.get("generation_config") or {})


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
        if not isinstance(raw.get("text_config"), Mapping):
            raise UserError("config.json lacks text_config; download the checkpoint again.")
        if raw.get("tie_word_embeddings") is False:
            raise UserError("config.json: tie_word_embeddings is false; only tied checkpoints exist and are supported.")
        try:
            return cls(text=TextConfig.from_dict(raw["text_config"]), canvas_length=int(raw.get("canvas_length") or 256),
                       vision=VisionConfig.from_dict(raw["vision_config"]) if raw.get("vision_config") else None,
                       image_tokens=_image_tokens(raw),
                       quantization=raw.get("quantization") or raw.get("quantization_config"), raw=raw)
        except UserError:
            raise
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise UserError(f"config.json has a field of the wrong kind ({error}); download the file again.") from None

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


def _image_tokens(raw: Mapping[str, Any]) -> ImageTokens | None:
    ids = [raw.get(f"{name}_token_id") for name in ("boi", "image", "eoi")]
    if not raw.get("vision_config") or None in ids:
        return None
    begin, image, end = map(int, ids)  # type: ignore[arg-type]
    budget = raw.get("vision_soft_tokens_per_image")
    return ImageTokens(begin, image, end, 280 if budget is None else _positive(raw, "vision_soft_tokens_per_image", ""),
                       raw["text_config"].get("use_bidirectional_attention") == "vision")


def _positive(raw: Mapping[str, Any], key: str, where: str = "text_config.") -> int:
    value = raw.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise UserError(f"config.json: {where}{key} must be a positive integer, got {value!r}.")
    return value


def _layers(raw: Mapping[str, Any], heads: int) -> tuple[LayerConfig, ...]:
    count = _positive(raw, "num_hidden_layers")
    kinds = list(raw.get("layer_types") or [FULL if (i + 1) % 6 == 0 else SLIDING for i in range(count)])
    if len(kinds) != count or not set(kinds) <= {SLIDING, FULL}:
        raise UserError(f"config.json: text_config.layer_types must name {SLIDING!r} or {FULL!r} for each of the "
                        f"{count} layers, got {len(kinds)} entries of {sorted(set(map(str, kinds)))}.")
    kinds[-1] = FULL  # as the reference forces it
    ropes = raw.get("rope_parameters") or {
        SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
        FULL: {"rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25},
    }
    overrides = {int(index): values for index, values in (raw.get("per_layer_config") or {}).items()}
    layers = []
    for index, kind in enumerate(kinds):
        shape = {"head_dim": raw.get("head_dim", 256), "num_key_value_heads": _positive(raw, "num_key_value_heads")}
        if kind == FULL and not overrides:
            shape = {"head_dim": raw.get("global_head_dim") or 512,
                     "num_key_value_heads": raw.get("num_global_key_value_heads") or shape["num_key_value_heads"]}
        shape |= {key: value for key, value in overrides.get(index, {}).items() if key in shape}
        head_dim, kv_heads = int(shape["head_dim"]), int(shape["num_key_value_heads"])
        if heads % kv_heads or head_dim % 2:
            raise UserError(f"config.json: layer {index} has {heads} heads, {kv_heads} KV heads and head size {head_dim}; "
                            "heads must be a multiple of KV heads and the head size even.")
        layers.append(LayerConfig(kind=kind, head_dim=head_dim, num_kv_heads=kv_heads,
                                  window=_positive(raw, "sliding_window") if kind == SLIDING else None,
                                  **_rope(ropes, kind, head_dim)))
    return tuple(layers)


def _rope(ropes: Mapping[str, Any], kind: str, head_dim: int) -> dict[str, Any]:
    rope = ropes.get(kind)
    if rope is None:
        raise UserError(f"config.json: text_config.rope_parameters has no entry for {kind!r}.")
    factor, rope_type = float(rope.get("partial_rotary_factor", 1.0)), rope.get("rope_type", "default")
    if rope_type not in ("default", "proportional") or (rope_type == "default" and factor != 1.0):
        raise UserError(f"config.json: rope type {rope_type!r} with partial_rotary_factor {factor} is not supported; "
                        "known are 'default' and 'proportional'.")
    return {"rope_theta": float(rope["rope_theta"]), "rotated": int(factor * head_dim // 2)}
