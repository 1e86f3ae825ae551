"""The head in training, some rows at a time: at 262,144 tokens one row's logits take a megabyte, and its loss several.

Parts wait for each other, since MLX would run them side by side and hold them all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_diffgemma.model import DiffusionGemma

LOGITS = 2**26  # bytes of logits that are held at once


def in_parts(model: DiffusionGemma, hidden: mx.array, make: Callable[[int, mx.array], mx.array]) -> list[mx.array]:
    """``make(start, rows)`` for rows [n, hidden] in parts of LOGITS bytes of logits, one after the other."""
    step = max(1, LOGITS // (4 * model.config.text.vocab_size))
    made: list[mx.array] = []
    for start in range(0, hidden.shape[0], step):
        rows = hidden[start : start + step]
        made.append(make(start, mx.depends([rows], made[-1:])[0] if made else rows))
    return made


def cross_entropy(model: DiffusionGemma, hidden: mx.array, targets: mx.array) -> mx.array:
    """Mean in nats over rows [n, hidden] with ``targets`` [n].

    While the model trains, a part's gradient is computed at once and kept in place of its logits: per row the size of ``hidden``
    for about eleven times that of the logits.
    """
    table = model.model.decoder.embed_tokens
    names, values = zip(*flat, strict=True) if (flat := tree_flatten(table.trainable_parameters())) else ((), ())

    def part(start: int, rows: mx.array) -> mx.array:
        def loss(rows: mx.array, *values: mx.array) -> mx.array:
            table.update(tree_unflatten(list(zip(names, values, strict=True))) if names else {})
            own = targets[start : start + rows.shape[0]]
            return nn.losses.cross_entropy(model.logits(rows), own, reduction="sum")

        return _with_gradient(loss, rows, *values) if model.training else loss(rows, *values)

    total: mx.array = sum(in_parts(model, hidden, part), start=mx.array(0.0))
    return total / targets.size


def _with_gradient(loss: Callable[..., mx.array], *inputs: mx.array) -> mx.array:
    """``loss(*inputs)``, whose gradient is computed along with it."""
    @mx.custom_function
    def both(*inputs: mx.array) -> tuple[mx.array, ...]:
        (value,), gradients = mx.vjp(loss, list(inputs), [mx.array(1.0)])
        return (value, *gradients)

    @both.vjp
    def backward(inputs: Any, cotangents: Sequence[mx.array], outputs: Sequence[mx.array]) -> Any:
        found = [cotangents[0] * gradient for gradient in outputs[1:]]
        return found[0] if isinstance(inputs, mx.array) else found  # MLX unpacks what is alone

    value: mx.array = both(*inputs)[0]
    return value
