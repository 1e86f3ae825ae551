"""The output head in training, a few rows at a time.

At 262,144 tokens the logits of one row take a megabyte, and its loss takes several.  Each part
waits for the one before it, because MLX would otherwise run the parts side by side and hold all of
them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma

LOGITS = 2**26  # bytes of logits that are held at once


def in_parts(
    model: DiffusionGemma, hidden: mx.array, make: Callable[[int, mx.array], mx.array]
) -> list[mx.array]:
    """Compute something from rows of hidden states, one part after the other.

    The logits of a part take at most LOGITS bytes.

    Args:
        model: The model.
        hidden: The rows [n, hidden].
        make: Called with the first row's index and the rows of a part.

    Returns:
        What ``make`` returned for each part.
    """
    step = max(1, LOGITS // (4 * model.config.text.vocab_size))
    made: list[mx.array] = []
    for start in range(0, hidden.shape[0], step):
        rows = hidden[start : start + step]
        made.append(make(start, mx.depends([rows], made[-1:])[0] if made else rows))
    return made


def cross_entropy(model: DiffusionGemma, hidden: mx.array, targets: mx.array) -> mx.array:
    """The mean cross-entropy in nats.

    While the model trains, the gradient of a part is computed at once and kept instead of its
    logits. For each row this keeps an array as large as ``hidden``; otherwise about eleven times
    the size of the logits would be kept.

    Args:
        model: The model.
        hidden: The rows [n, hidden].
        targets: The right token [n] of each row.
    """
    table = model.model.decoder.embed_tokens
    names, values = (
        zip(*flat, strict=True)
        if (flat := tree_flatten(table.trainable_parameters()))
        else ((), ())
    )

    def part(start: int, rows: mx.array) -> mx.array:
        def loss(rows: mx.array, *values: mx.array) -> mx.array:
            table.update(tree_unflatten(list(zip(names, values, strict=True))) if names else {})
            own = targets[start : start + rows.shape[0]]
            return nn.losses.cross_entropy(model.logits(rows), own, reduction="sum")

        return _with_gradient(loss, rows, *values) if model.training else loss(rows, *values)

    total: mx.array = sum(in_parts(model, hidden, part), start=mx.array(0.0))
    return total / targets.size


def _with_gradient(loss: Callable[..., mx.array], *inputs: mx.array) -> mx.array:
    """``loss(*inputs)``, with its gradient computed at the same time."""

    @mx.custom_function
    def both(*inputs: mx.array) -> tuple[mx.array, ...]:
        (value,), gradients = mx.vjp(loss, list(inputs), [mx.array(1.0)])
        return (value, *gradients)

    @both.vjp
    def backward(inputs: Any, cotangents: Sequence[mx.array], outputs: Sequence[mx.array]) -> Any:
        found = [cotangents[0] * gradient for gradient in outputs[1:]]
        return found[0] if isinstance(inputs, mx.array) else found  # MLX unpacks a single one

    value: mx.array = both(*inputs)[0]
    return value
