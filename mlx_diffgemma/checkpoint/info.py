"""A summary of a checkpoint from its config and file headers alone; no weight is read.

>>> inspect(folder).fits
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_diffgemma.checkpoint.layouts import as_stored
from mlx_diffgemma.device import compute_dtype, memory_limit
from mlx_diffgemma.estimate import cost
from mlx_diffgemma.estimate.cost import cache_bytes, count_parameters
from mlx_diffgemma.model.config import FULL, ModelConfig
from mlx_diffgemma.model.recipes import VISION, Quantization, kind_of
from mlx_diffgemma.safetensors import DTYPES, Stored, read_headers

CONTEXT = cost.CONTEXTS[0]


@dataclass(frozen=True)
class CheckpointInfo:
    """A summary of a checkpoint.

    Args:
        folder: Its folder.
        config: Its config.
        parameters: The parameters of the text backbone.
        active: Those that take part in one token's forward.
        stored_bytes: The bytes of all tensors in the files.
        bits_per_weight: Bits a weight of the text backbone, scales included.
        dtypes: The stored bytes by dtype.
        cache_bytes_per_token: Bytes of the full layers' K/V cache for each token.
        sliding_cache_bytes: Bytes of the sliding layers' K/V cache once their windows are full.
        memory_limit: The memory that this machine allows.
        memory_needed: What an answer after CONTEXT tokens takes on this machine.
    """

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
        """The precisions of the classes of matrices in words, and the recipe where it is known."""
        if not self.config.quantization:
            return "none"
        quantization = Quantization.from_config(self.config.quantization)
        kinds = {}
        for path, precision in quantization.overrides.items():
            if precision:
                kinds[kind_of(path)] = str(precision)
        words = str(quantization.default)
        for kind, precision_words in sorted(kinds.items()):
            words += f", {kind} {precision_words}"
        return f"{words} (recipe {self.config.recipe})" if self.config.recipe else words

    def record(self) -> dict[str, Any]:
        text = self.config.text
        return {
            "folder": self.folder,
            "parameters": self.parameters,
            "active_parameters": self.active,
            "stored_bytes": self.stored_bytes,
            "bits_per_weight": self.bits_per_weight,
            "dtypes": self.dtypes,
            "quantization": self.config.quantization,
            "canvas_length": self.config.canvas_length,
            "vision": self.config.vision is not None,
            "layers": len(text.layers),
            "full_layers": sum(layer.kind == FULL for layer in text.layers),
            "hidden_size": text.hidden_size,
            "experts": text.num_experts,
            "top_k_experts": text.top_k_experts,
            "vocab_size": text.vocab_size,
            "context": text.max_position_embeddings,
            "cache_bytes_per_token": self.cache_bytes_per_token,
            "sliding_cache_bytes": self.sliding_cache_bytes,
            "memory_limit": self.memory_limit,
            "memory_needed": self.memory_needed,
            "fits": self.fits,
        }


def inspect(folder: Path) -> CheckpointInfo:
    """Summarise a checkpoint folder.

    Raises:
        UserError: The folder is not a DiffusionGemma checkpoint, or a file's header is damaged.
    """
    stored = read_headers(folder)
    config = as_stored(ModelConfig.from_folder(folder), stored)
    dtypes = Counter[str]()
    for tensor in stored.values():
        dtypes[tensor.dtype] += tensor.nbytes
    total, active = count_parameters(config)
    per_token, sliding = cache_bytes(config.text, element_size=2)
    backbone = sum(tensor.nbytes for name, tensor in stored.items() if not name.startswith(VISION))
    return CheckpointInfo(
        folder=str(folder),
        config=config,
        parameters=total,
        active=active,
        stored_bytes=sum(tensor.nbytes for tensor in stored.values()),
        bits_per_weight=8 * backbone / total,
        dtypes=dtypes,
        cache_bytes_per_token=per_token,
        sliding_cache_bytes=sliding,
        memory_limit=memory_limit(),
        memory_needed=memory_needed(config, stored),
    )


def memory_needed(config: ModelConfig, stored: Mapping[str, Stored]) -> int:
    """The bytes that an answer after CONTEXT tokens of text takes on this machine.

    Floating-point weights count in the compute dtype, packed weights as they are stored.  The
    vision tower is read with the first image and not counted.
    """
    floating = Counter[str]()
    for tensor in stored.values():
        floating[tensor.dtype] += tensor.nbytes if tensor.is_float else 0
    most = max(floating, key=lambda name: floating[name], default="BF16")
    dtype = compute_dtype(DTYPES.get(most, mx.bfloat16))
    weights = 0
    for name, tensor in stored.items():
        if not name.startswith(VISION):
            is_float = tensor.is_float
            weights += math.prod(tensor.shape) * dtype.size if is_float else tensor.nbytes
    context = min(CONTEXT, config.text.max_position_embeddings)
    cache, work = cost.forward_bytes(config, context, dtype.size)
    return weights + cache + work
