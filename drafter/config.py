"""What a drafter is: its shape, what it reads of its target, and which target that is (config.json).

The file is DFlash's (``dflash_config`` inside a decoder's config), so that published drafters load; what a canvas needs beyond
it stands under the key ``diffgemma_drafter``.

    >>> config = DrafterConfig.from_folder(Path("gemma-4-26B-A4B-it-DFlash"))
    >>> config.taps
    (1, 6, 11, 17, 22, 27)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_diffgemma.config import FULL, SLIDING
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.files import read_json

MARK = "diffgemma_drafter"
DEFAULT_MASK = 4  # of the published drafters for Gemma 4, which do not name it


@dataclass(frozen=True)
class DraftLayer:
    """``window`` counts the positions a row may see, itself included, None all; ``causal`` is about the block's own rows."""

    window: int | None
    causal: bool


@dataclass(frozen=True)
class DrafterConfig:
    """``taps`` are the target's layers whose hidden states are read, in the order of ``fc``'s columns.

    ``mask_token_id`` stands where a token is not known yet; None: uniform noise does, as on a canvas.  ``block_size`` counts
    the positions of a block, the known first one included.  ``head_size``: how many tokens it can draft, None all.
    ``refinement``: it can guess again from what the target's denoising made of a canvas.
    ``target`` names the checkpoint it was trained for, where that is known.
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
        """Errors: UserError for what is no drafter, or a kind that is not known."""
        raw = read_json(folder / "config.json")
        if not isinstance(raw.get("dflash_config"), Mapping):
            raise UserError(f"{folder} holds no drafter: its config.json has no dflash_config (model_type "
                            f"{raw.get('model_type')!r}); give the folder of a drafter.")
        try:
            return cls.from_dict(raw)
        except UserError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{folder}/config.json is no drafter's: a field is missing or of the wrong kind ({error}); download "
                            "it again.") from None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> DrafterConfig:
        dflash, own = raw["dflash_config"], raw.get(MARK) or {}
        if "DFlash2DraftModel" in (raw.get("architectures") or ()):
            raise UserError("The drafter is a DFlash 2, whose convolutions and candidate selector are not supported.")
        if dflash.get("attention_sink_bias") or raw.get("attention_bias"):
            raise UserError("The drafter has attention biases or sinks, which are not supported.")
        count, rope = int(raw["num_hidden_layers"]), raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        kinds = list(raw.get("layer_types") or [FULL] * count)
        if len(kinds) != count or not set(kinds) <= {SLIDING, FULL}:
            raise UserError(f"The drafter's layer_types must name {SLIDING!r} or {FULL!r} for each of its {count} layers.")
        if SLIDING in kinds and not raw.get("sliding_window"):
            raise UserError("The drafter has sliding layers and no sliding_window.")
        # Both spellings occur; where neither does, sliding layers are causal.
        causal = dflash.get("causal", raw.get("is_causal"))
        layers = tuple(DraftLayer(int(raw["sliding_window"]) if kind == SLIDING else None,
                                  kind == SLIDING if causal is None else bool(causal)) for kind in kinds)
        found = cls(
            **{name: int(raw[name]) for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
                                                 "head_dim", "vocab_size")},
            num_target_layers=int(dflash.get("num_target_layers") or raw["num_target_layers"]),
            taps=tuple(int(layer) for layer in dflash["target_layer_ids"]),
            layers=layers,
            block_size=int(dflash.get("block_size") or raw.get("block_size") or 16),
            mask_token_id=dflash.get("mask_token_id", None if own else DEFAULT_MASK),
            rms_norm_eps=float(raw.get("rms_norm_eps") or 1e-6),
            rope_theta=float(raw.get("rope_theta") or rope.get("rope_theta") or 10_000.0),
            rope_scaling=rope or None,
            max_position_embeddings=int(raw.get("max_position_embeddings") or 131_072),
            input_embedding_scale=float(dflash.get("input_embedding_scale", 1.0)),
            output_multiplier=float(dflash.get("output_multiplier", 1.0)),
            final_logit_softcapping=dflash.get("final_logit_softcapping", raw.get("final_logit_softcapping")),
            self_conditioning=bool(own.get("self_conditioning")), confidence=bool(own.get("confidence")),
            refinement=bool(own.get("refinement")),
            head_size=own.get("head_size"), target=dict(own.get("target") or {}),
        )
        if not found.taps or not all(0 <= layer < found.num_target_layers for layer in found.taps):
            raise UserError(f"The drafter taps the layers {list(found.taps)} of a target with {found.num_target_layers} layers.")
        if found.num_attention_heads % found.num_key_value_heads or found.block_size < 2:
            raise UserError(f"The drafter has {found.num_attention_heads} heads, {found.num_key_value_heads} KV heads and blocks "
                            f"of {found.block_size}; heads must be a multiple of KV heads and a block at least 2.")
        return found

    def to_dict(self) -> dict[str, Any]:
        """What ``from_dict`` reads."""
        windows = {layer.window for layer in self.layers if layer.window}
        same = {name: getattr(self, name) for name in (
            "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
            "num_target_layers", "block_size", "rms_norm_eps", "rope_theta", "max_position_embeddings")}
        return {
            "architectures": ["DFlashDraftModel"], "model_type": "qwen3", **same, "num_hidden_layers": len(self.layers),
            "layer_types": [SLIDING if layer.window else FULL for layer in self.layers],
            "sliding_window": windows.pop() if windows else None, "rope_scaling": self.rope_scaling,
            "dflash_config": {
                "target_layer_ids": list(self.taps), "mask_token_id": self.mask_token_id, "causal": self.layers[0].causal,
                "input_embedding_scale": self.input_embedding_scale, "output_multiplier": self.output_multiplier,
                "final_logit_softcapping": self.final_logit_softcapping,
            },
            MARK: {"self_conditioning": self.self_conditioning, "confidence": self.confidence, "refinement": self.refinement,
                   "head_size": self.head_size, "target": dict(self.target)},
        }
