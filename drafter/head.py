"""The target's embedding and head, as a drafter uses them."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from drafter.model import DraftNetwork
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.model.layers import soft_cap
from mlx_diffgemma.sampling.sampler import largest

KEPT = 16  # the mean embedding that conditions the next pass covers this many tokens


class TargetHead:
    """The target's embedding, and its head for the tokens that the drafter can draft."""

    def __init__(self, target: DiffusionGemma, drafter: DraftNetwork):
        config = drafter.config
        self.target = target
        self.scale = config.input_embedding_scale
        self.multiplier = config.output_multiplier
        self.cap = config.final_logit_softcapping
        self.ids: mx.array | None = drafter.head_ids if config.head_size else None
        table = target.model.decoder.embed_tokens
        self._head: Callable[[mx.array], mx.array] = table.as_linear
        if self.ids is not None:
            self._head = _some_rows(table, self.ids)

    def embed(self, ids: mx.array) -> mx.array:
        """The scaled embeddings of ids of any shape."""
        return self.target.embed(ids) * self.scale

    def soft_embed(self, probabilities: mx.array, ids: mx.array | None = None) -> mx.array:
        """The mean of the scaled embeddings under ``probabilities``.

        The probabilities are those of all tokens, or those of the tokens ``ids``.
        """
        return self.target.soft_embed(probabilities, ids) * self.scale

    def logits(self, hidden: mx.array) -> mx.array:
        """The logits [..., tokens], float32, for the tokens that the drafter can draft."""
        logits = self._head(hidden.astype(self.target.dtype)).astype(mx.float32) * self.multiplier
        if not self.cap:
            return logits
        return soft_cap(logits, mx.array(self.cap, dtype=mx.float32))

    def tokens(self, indices: mx.array) -> mx.array:
        """Token ids of indices into ``logits``."""
        return (indices if self.ids is None else self.ids[indices]).astype(mx.int32)

    def mean_embedding(self, logits: mx.array) -> mx.array:
        """The mean embedding [rows, hidden] under the ``KEPT`` most probable tokens.

        ``logits`` are [rows, tokens].
        """
        indices = largest(logits, min(KEPT, logits.shape[-1]))
        shares = mx.softmax(mx.take_along_axis(logits, indices, axis=-1), axis=-1)
        return self.soft_embed(shares, self.tokens(indices))


def _some_rows(
    table: nn.Embedding | nn.QuantizedEmbedding, ids: mx.array
) -> Callable[[mx.array], mx.array]:
    """The head for the tokens ``ids`` alone.

    It is evaluated here, because the first draft may be made on another thread.
    """
    if isinstance(table, nn.QuantizedEmbedding):
        weight = table.weight[ids]
        scales = table.scales[ids]
        biases = table.get("biases")
        if biases is not None:
            biases = biases[ids]
        mx.eval(weight, scales, [] if biases is None else biases)
        return lambda x: mx.quantized_matmul(
            x,
            weight,
            scales,
            biases,
            transpose=True,
            group_size=table.group_size,
            bits=table.bits,
            mode=table.mode,
        )
    rows = table.weight[ids]
    mx.eval(rows)
    return lambda x: x @ rows.T
