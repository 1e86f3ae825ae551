"""What a checkpoint is, from its config and file headers alone: no weight is read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_diffgemma import cost
from mlx_diffgemma.config import FULL, ModelConfig
from mlx_diffgemma.cost import cache_bytes, count_parameters
from mlx_diffgemma.device import compute_dtype, memory_limit
from mlx_diffgemma.layouts import as_stored
from mlx_diffgemma.recipes import VISION, Quantization, kind_of
from mlx_diffgemma.storage import DTYPES, Stored, read_headers

CONTEXT = cost.CONTEXTS[0]


@dataclass(frozen=True)
class CheckpointInfo:
    """``active`` parameters take part in one token's forward; ``stored_bytes`` is what the files hold, per dtype too;
    ``bits_per_weight`` is the backbone's, scales included; ``memory_needed`` is that of an answer after CONTEXT tokens here."""

    folder: str
    config: ModelConfig
    parameters: int
    active: int
    stored_bytes: int
    bits_per_weight: float
    dtypes: dict[str, int]
    cache_bytes_per_token: int
    sliding_cache_bytes: int
    memory_limit: int
    memory_needed: int

    @property
    def fits(self) -> bool:
        """Whether an answer to a prompt of CONTEXT tokens fits this machine."""
        return self.memory_needed <= self.memory_limit

    @property
    def quantisation(self) -> str:
        """In words: precisions of the classes of matrices, and the recipe where the conversion is ours."""
        if not self.config.quantization:
            return "none"
        quantization = Quantization.from_config(self.config.quantization)
        kinds = {kind_of(path): str(precision) for path, precision in quantization.overrides.items() if precision}
        return f"{quantization.default}" + "".join(f", {kind} {text}" for kind, text in sorted(kinds.items())) + (
            f" (recipe {self.config.recipe})" if self.config.recipe else "")

    def record(self) -> dict[str, Any]:
        text = self.config.text
        return {
            "folder": self.folder, "parameters": self.parameters, "active_parameters": self.active,
            "stored_bytes": self.stored_bytes, "bits_per_weight": self.bits_per_weight, "dtypes": self.dtypes,
            "quantization": self.config.quantization,
            "canvas_length": self.config.canvas_length, "vision": self.config.vision is not None,
            "layers": len(text.layers), "full_layers": sum(layer.kind == FULL for layer in text.layers),
            "hidden_size": text.hidden_size, "experts": text.num_experts, "top_k_experts": text.top_k_experts,
            "vocab_size": text.vocab_size, "context": text.max_position_embeddings,
            "cache_bytes_per_token": self.cache_bytes_per_token, "sliding_cache_bytes": self.sliding_cache_bytes,
            "memory_limit": self.memory_limit, "memory_needed": self.memory_needed, "fits": self.fits,
        }


def inspect(folder: Path) -> CheckpointInfo:
    """Errors: UserError when the folder is no DiffusionGemma checkpoint or a file's header is damaged."""
    found, dtypes = read_headers(folder), Counter[str]()
    config = as_stored(ModelConfig.from_folder(folder), found)
    for tensor in found.values():
        dtypes[tensor.dtype] += tensor.nbytes
    total, active = count_parameters(config)
    per_token, sliding = cache_bytes(config.text, element_size=2)
    backbone = sum(tensor.nbytes for name, tensor in found.items() if not name.startswith(VISION))
    return CheckpointInfo(str(folder), config, total, active, sum(tensor.nbytes for tensor in found.values()),
                          8 * backbone / total, dtypes, per_token, sliding, memory_limit(), memory_needed(config, found))


def memory_needed(config: ModelConfig, stored: Mapping[str, Stored]) -> int:
    """Bytes that this machine takes for an answer after CONTEXT tokens of text.

    What is floating counts in the compute dtype, packed weights as they are.  The vision tower is read with the first image and
    not counted.
    """
    floating = Counter[str]()
    for tensor in stored.values():
        floating[tensor.dtype] += tensor.nbytes if tensor.is_float else 0
    most = max(floating, key=lambda name: floating[name], default="BF16")
    dtype = compute_dtype(DTYPES.get(most, mx.bfloat16))
    weights = sum(math.prod(tensor.shape) * dtype.size if tensor.is_float else tensor.nbytes
                  for name, tensor in stored.items() if not name.startswith(VISION))
    return weights + sum(cost.forward_bytes(config, min(CONTEXT, config.text.max_position_embeddings), dtype.size))
