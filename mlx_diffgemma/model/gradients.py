"""Gradients of a forward that computes its inner values twice instead of keeping them.

>>> checkpoint(run, layer.trainable_parameters(), x)      # run(parameters, x)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten


def checkpoint(run: Callable[[Any, mx.array], mx.array], parameters: Any, x: mx.array) -> mx.array:
    """Compute ``run(parameters, x)`` without keeping its inner values for the backward pass.

    The backward pass computes them a second time.  MLX is free to choose an order of evaluation in
    which it would hold the inner values of all layers at once.  Two dependencies prevent that,
    unlike in mx.checkpoint: the second computation waits for the incoming gradient, and the
    outgoing gradient waits for those of the parameters.

    Args:
        run: The function; its first argument is a tree of arrays.
        parameters: That tree.
        x: The input.

    Returns:
        ``run(parameters, x)``, with gradients for ``x`` and for every array in ``parameters``.
    """
    flat = tree_flatten(parameters)
    names = [name for name, _ in flat]
    values = [value for _, value in flat]

    def on_values(x: mx.array, *values: mx.array) -> mx.array:
        return run(tree_unflatten(list(zip(names, values, strict=True))) if names else {}, x)

    function = mx.custom_function(on_values)

    @function.vjp
    def backward(inputs: Sequence[mx.array] | mx.array, cotangent: mx.array, _: mx.array) -> Any:
        if isinstance(inputs, mx.array):  # MLX unpacks a single input
            return mx.vjp(on_values, mx.depends([inputs], [cotangent]), [cotangent])[1][0]
        _, gradients = mx.vjp(on_values, mx.depends(list(inputs), [cotangent]), [cotangent])
        x_gradient, *parameter_gradients = gradients
        return [*mx.depends([x_gradient], parameter_gradients), *parameter_gradients]

    out: mx.array = function(x, *values)
    return out
