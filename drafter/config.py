"""A drafter's config.json: its shape, the layers of the target that it reads, and its target.

The format is DFlash's (``dflash_config`` inside a decoder's config), so that published drafters
load.  What a canvas needs beyond it is under the key ``diffgemma_drafter``.

    >>> config = DrafterConfig.from_folder(Path("gemma-4-26B-A4B-it-DFlash"))
    >>> config.taps
    (1, 6, 11, 17, 22, 27)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_diffgemma.errors import UserError
from mlx_diffgemma.files import read_json
from mlx_diffgemma.model.config import FULL, SLIDING

MARK = "diffgemma_drafter"
DEFAULT_MASK = 4  # for published drafters for Gemma 4, whose config does not name it
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)


@dataclass(frozen=True)
class DraftLayer:
    """The shape of one layer.

    Attributes:
        window: How many positions a row sees, itself included.  None: all.
        causal: Whether rows of the block see only earlier rows of it.
    """

    window: int | None
    causal: bool


@dataclass(frozen=True)
class DrafterConfig:
    """The shape of a drafter.

    Attributes:
        taps: The target's layers whose hidden states are read, in the order of ``fc``'s columns.
        block_size: The positions of a block, including the first one, which is known.
        mask_token_id: The id at positions whose token is not known yet.  None: uniform noise, as on
            a canvas.
        refinement: Whether it can guess again from the target's hidden states of a canvas.
        head_size: How many tokens it can draft.  None: all.
        target: The checkpoint it was trained for, if that is known.
    """

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    num_target_layers: int
    taps: tuple[int, ...]
    layers: tuple[DraftLayer, ...]
    block_size: int = 16
    mask_token_id: int | None = None
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: Mapping[str, Any] | None = None
    max_position_embeddings: int = 131_072
    input_embedding_scale: float = 1.0
    output_multiplier: float = 1.0
    final_logit_softcapping: float | None = None
    self_conditioning: bool = False
    confidence: bool = False
    refinement: bool = False
    head_size: int | None = None
    target: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_folder(cls, folder: Path) -> DrafterConfig:
        """Read config.json.

        Raises:
            UserError: The folder holds no drafter, or one of a kind that is not supported.
        """
        raw = read_json(folder / "config.json")
        if not isinstance(raw.get("dflash_config"), Mapping):
            raise UserError(
                f"{folder} holds no drafter: its config.json has no dflash_config (model_type "
                f"{raw.get('model_type')!r}); give the folder of a drafter."
            )
        try:
            return cls.from_dict(raw)
        except UserError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{folder}/config.json is no drafter's: a field is missing or of the wrong kind ({error}); download "
                "it again."
            ) from None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> DrafterConfig:
        """Read the content of a config.json.

        Raises:
            UserError: The drafter is of a kind that is not supported, or a value is invalid.
        """
        dflash = raw["dflash_config"]
        ours = raw.get(MARK) or {}
        _check_kind(raw)
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        soft_cap = dflash.get("final_logit_softcapping", raw.get("final_logit_softcapping"))
        config = cls(
            **{name: int(raw[name]) for name in SIZES},
            num_target_layers=int(dflash.get("num_target_layers") or raw["num_target_layers"]),
            taps=tuple(int(layer) for layer in dflash["target_layer_ids"]),
            layers=_layers(raw),
            block_size=int(dflash.get("block_size") or raw.get("block_size") or 16),
            mask_token_id=dflash.get("mask_token_id", None if ours else DEFAULT_MASK),
            rms_norm_eps=float(raw.get("rms_norm_eps") or 1e-6),
            rope_theta=float(raw.get("rope_theta") or rope.get("rope_theta") or 10_000.0),
            rope_scaling=rope or None,
            max_position_embeddings=int(raw.get("max_position_embeddings") or 131_072),
            input_embedding_scale=float(dflash.get("input_embedding_scale", 1.0)),
            output_multiplier=float(dflash.get("output_multiplier", 1.0)),
            final_logit_softcapping=soft_cap,
            self_conditioning=bool(ours.get("self_conditioning")),
            confidence=bool(ours.get("confidence")),
            refinement=bool(ours.get("refinement")),
            head_size=ours.get("head_size"),
            target=dict(ours.get("target") or {}),
        )
        config.check()
        return config

    def check(self) -> None:
        """Check the values that depend on each other.

        Raises:
            UserError: The target lacks a layer in ``taps``, or heads or block size are invalid.
        """
        if not self.taps or not all(0 <= layer < self.num_target_layers for layer in self.taps):
            raise UserError(
                f"The drafter taps the layers {list(self.taps)} of a target with {self.num_target_layers} layers."
            )
        if self.num_attention_heads % self.num_key_value_heads or self.block_size < 2:
            raise UserError(
                f"The drafter has {self.num_attention_heads} heads, {self.num_key_value_heads} KV heads and blocks "
                f"of {self.block_size}; heads must be a multiple of KV heads and a block at least 2."
            )

    def to_dict(self) -> dict[str, Any]:
        """The content of config.json, as ``from_dict`` reads it."""
        windows = {layer.window for layer in self.layers if layer.window}
        same = {
            name: getattr(self, name)
            for name in (
                *SIZES,
                "num_target_layers",
                "block_size",
                "rms_norm_eps",
                "rope_theta",
                "max_position_embeddings",
            )
        }
        return {
            "architectures": ["DFlashDraftModel"],
            "model_type": "qwen3",
            **same,
            "num_hidden_layers": len(self.layers),
            "layer_types": [SLIDING if layer.window else FULL for layer in self.layers],
            "sliding_window": windows.pop() if windows else None,
            "rope_scaling": self.rope_scaling,
            "dflash_config": {
                "target_layer_ids": list(self.taps),
                "mask_token_id": self.mask_token_id,
                "causal": self.layers[0].causal,
                "input_embedding_scale": self.input_embedding_scale,
                "output_multiplier": self.output_multiplier,
                "final_logit_softcapping": self.final_logit_softcapping,
            },
            MARK: {
                "self_conditioning": self.self_conditioning,
                "confidence": self.confidence,
                "refinement": self.refinement,
                "head_size": self.head_size,
                "target": dict(self.target),
            },
        }


def _check_kind(raw: Mapping[str, Any]) -> None:
    """Check that the drafter is of a supported kind.

    Raises:
        UserError: It is not.
    """
    if "DFlash2DraftModel" in (raw.get("architectures") or ()):
        raise UserError(
            "The drafter is a DFlash 2, whose convolutions and candidate selector are not supported."
        )
    if raw["dflash_config"].get("attention_sink_bias") or raw.get("attention_bias"):
        raise UserError("The drafter has attention biases or sinks, which are not supported.")


def _layers(raw: Mapping[str, Any]) -> tuple[DraftLayer, ...]:
    """The layers of a config.json.

    Raises:
        UserError: ``layer_types`` does not fit, or a sliding layer has no window.
    """
    count = int(raw["num_hidden_layers"])
    kinds = list(raw.get("layer_types") or [FULL] * count)
    if len(kinds) != count or not set(kinds) <= {SLIDING, FULL}:
        raise UserError(
            f"The drafter's layer_types must name {SLIDING!r} or {FULL!r} for each of its {count} layers."
        )
    if SLIDING in kinds and not raw.get("sliding_window"):
        raise UserError("The drafter has sliding layers and no sliding_window.")
    # Both spellings occur; where neither does, sliding layers are causal.
    causal = raw["dflash_config"].get("causal", raw.get("is_causal"))
    layers = []
    for kind in kinds:
        is_sliding = kind == SLIDING
        window = int(raw["sliding_window"]) if is_sliding else None
        layers.append(DraftLayer(window, is_sliding if causal is None else bool(causal)))
    return tuple(layers)
