"""From one step's belief to the next step's self-conditioning signal."""

from __future__ import annotations

import mlx.core as mx

from mlx_diffgemma.model import DiffusionGemma


def dense(model: DiffusionGemma, scaled: mx.array) -> mx.array:
    """Mean embedding [..., hidden] under the softmax of the temperature-scaled logits ``scaled`` [..., vocabulary].

    The reference rounds the scaled logits to the embedding dtype first; in bf16 that is decisive.
    """
    return model.soft_embed(mx.softmax(scaled.astype(model.dtype).astype(mx.float32), axis=-1))
