"""What a checkpoint is, from its config and file headers alone: no weight is read."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx.utils import tree_flatten

from mlx_diffgemma.config import FULL, ModelConfig, TextConfig
from mlx_diffgemma.device import memory_limit
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.model import DiffusionGemma


@dataclass(frozen=True)
class CheckpointInfo:
    """``active`` parameters take part in one token's forward; ``stored_bytes`` is what the files hold, per dtype too."""

    folder: str
    config: ModelConfig
    parameters: int
    active: int
    stored_bytes: int
    dtypes: dict[str, int]
    cache_bytes_per_token: int
    sliding_cache_bytes: int
    memory_limit: int

    def record(self) -> dict[str, Any]:
        text = self.config.text
        return {
            "folder": self.folder, "parameters": self.parameters, "active_parameters": self.active,
            "stored_bytes": self.stored_bytes, "dtypes": self.dtypes, "quantization": self.config.quantization,
            "canvas_length": self.config.canvas_length, "vision": self.config.vision is not None,
            "layers": len(text.layers), "full_layers": sum(layer.kind == FULL for layer in text.layers),
            "hidden_size": text.hidden_size, "experts": text.num_experts, "top_k_experts": text.top_k_experts,
            "vocab_size": text.vocab_size, "context": text.max_position_embeddings,
            "cache_bytes_per_token": self.cache_bytes_per_token, "sliding_cache_bytes": self.sliding_cache_bytes,
            "memory_limit": self.memory_limit, "fits": self.stored_bytes <= self.memory_limit,
        }


def inspect(folder: Path) -> CheckpointInfo:
    """Errors: UserError when the folder is no DiffusionGemma checkpoint or a file's header is damaged."""
    config = ModelConfig.from_folder(folder)
    stored, dtypes = _stored(folder)
    total, active = count_parameters(config)
    per_token, sliding = cache_bytes(config.text, element_size=2)
    return CheckpointInfo(str(folder), config, total, active, stored, dtypes, per_token, sliding, memory_limit())


def count_parameters(config: ModelConfig) -> tuple[int, int]:
    """(all, active in one row's canvas forward) parameters of the text backbone."""
    # Building the tree allocates nothing: MLX arrays are lazy.
    sizes = {key: value.size for key, value in tree_flatten(DiffusionGemma(config).parameters())}
    experts = sum(size for key, size in sizes.items() if ".experts." in key)
    used = experts * config.text.top_k_experts // config.text.num_experts
    return sum(sizes.values()), sum(sizes.values()) - experts + used


def cache_bytes(text: TextConfig, element_size: int) -> tuple[int, int]:
    """(bytes a token on the full layers, bytes of all sliding layers once their windows are full)."""
    per_layer = [2 * layer.num_kv_heads * layer.head_dim * element_size for layer in text.layers]
    full = sum(size for size, layer in zip(per_layer, text.layers, strict=True) if layer.window is None)
    sliding = sum(size * (layer.window - 1) for size, layer in zip(per_layer, text.layers, strict=True) if layer.window)
    return full, sliding


def _stored(folder: Path) -> tuple[int, dict[str, int]]:
    total, dtypes = 0, dict[str, int]()
    for path in sorted(folder.glob("*.safetensors")):
        for name, entry in read_header(path).items():
            if name != "__metadata__":
                size = entry["data_offsets"][1] - entry["data_offsets"][0]
                dtypes[entry["dtype"]] = dtypes.get(entry["dtype"], 0) + size
                total += size
    return total, dtypes


def read_header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file.  Errors: UserError when it is damaged."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size:
                raise ValueError("header longer than the file")
            header = json.loads(file.read(length))
    except (struct.error, ValueError) as error:
        raise UserError(f"{path} is damaged or cut off ({error}); download it again.") from None
    return header
