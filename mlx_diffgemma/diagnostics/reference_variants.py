"""Runs the reference as one of its variants, and reads router margins during the run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch


@contextlib.contextmanager
def stay_double() -> Iterator[None]:
    """Keep a float64 copy in float64, although the reference casts to float32 in norms and softmax."""
    functions = torch.nn.functional
    to_float = torch.Tensor.float
    softmax = functions.softmax
    one_hot = functions.one_hot

    def keep(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self if self.dtype == torch.float64 else to_float(self, *args, **kwargs)

    def double_one_hot(*args: Any, **kwargs: Any) -> torch.Tensor:
        return one_hot(*args, **kwargs).double()

    def double_softmax(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if x.dtype == torch.float64:
            kwargs["dtype"] = x.dtype
        return softmax(x, *args, **kwargs)

    with (
        mock.patch.object(torch.Tensor, "float", keep),
        mock.patch.object(functions, "softmax", double_softmax),
        mock.patch.object(functions, "one_hot", double_one_hot),
    ):
        yield


@contextlib.contextmanager
def router_margins(model: torch.nn.Module) -> Iterator[Callable[[], np.ndarray]]:
    """Yield a function that returns the router margin of each row.

    The margin is the smallest gap, over the layers, between the probability of the last chosen
    expert and that of the first one not chosen.
    """
    gaps: list[torch.Tensor] = []

    def hook(module: torch.nn.Module, _: object, outputs: tuple[torch.Tensor, ...]) -> None:
        top_k = module.config.top_k_experts
        if top_k < outputs[0].shape[-1]:
            best = outputs[0].topk(top_k + 1, dim=-1).values
            gaps.append(best[:, -2] - best[:, -1])

    handles = [
        m.register_forward_hook(hook)
        for m in model.modules()
        if type(m).__name__ == "DiffusionGemmaTextRouter"
    ]
    try:
        yield lambda: to_numpy(torch.stack(gaps).min(dim=0).values) if gaps else np.array([np.inf])
    finally:
        for handle in handles:
            handle.remove()


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
