"""Record what the reference's ``generate`` does, while it draws our random numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from unittest import mock

import numpy as np
import torch
from transformers import DiffusionGemmaForBlockDiffusion

from mlx_diffgemma.diagnostics.reference_variants import to_numpy
from mlx_diffgemma.sampling.draws import DrawSource

SIGNAL_LIMIT = 2**24  # the most bytes of the signals of a step's rows; larger signals are not kept


@dataclass(frozen=True)
class ReferenceStep:
    """One denoising step of one row; all arrays are [length] unless stated.

    ``signal`` [length, vocabulary] holds the scaled logits of the step before, unless they were too
    large to keep (see ``SIGNAL_LIMIT``).
    """

    canvas_in: np.ndarray
    canvas: np.ndarray
    argmax: np.ndarray
    accepted: np.ndarray
    stopped: bool
    signal: np.ndarray | None = None


@dataclass
class ReferenceCanvas:
    """One canvas of one row: the ids it follows and its steps."""

    prefix: np.ndarray
    steps: list[ReferenceStep] = field(default_factory=list)


class Recorder:
    """Gives the reference our random numbers and records every step."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        draws: Sequence[DrawSource],
        length: int,
        device: str,
    ):
        self.prompts = prompts
        self.draws = draws
        self.length = length
        self.device = device
        self.canvas_index = -1
        self.step = 0
        self.in_step = False
        self.steps: list[list[dict[str, object]]] = []  # the steps of each canvas

    @contextlib.contextmanager
    def installed(self, model: DiffusionGemmaForBlockDiffusion) -> Iterator[None]:
        make_sampler = model._prepare_sampler
        step = model._denoising_step

        def prepare(config: object) -> object:
            self.sampler = make_sampler(config)
            self.sampler.initialize_canvas = self._initialize
            return self.sampler

        def denoise(**inputs: object) -> object:
            self.in_step = True
            before = inputs["finished_denoising"].clone()
            with mock.patch.object(torch, "multinomial", self._multinomial):
                out = step(**inputs)
            signal = inputs["self_conditioning_logits"] if self.step else None
            kept = signal is not None and signal.numel() * signal.element_size() <= SIGNAL_LIMIT
            self.steps[-1].append(
                {
                    "signal": signal if kept else None,
                    "canvas_in": inputs["current_canvas"],
                    "canvas": out[0],
                    "argmax": out[1],
                    "before": before,
                    "finished": out[3].clone(),
                    "accepted": self.sampler.accepted_token_mask,
                }
            )
            self.in_step = False
            self.step += 1
            return out

        with (
            mock.patch.object(model, "_prepare_sampler", prepare),
            mock.patch.object(model, "_denoising_step", denoise),
        ):
            yield

    def _numbers(self, name: str) -> torch.Tensor:
        """Our random numbers [rows, length] for the present step."""
        start = self.canvas_index * self.length
        rows = []
        for draws in self.draws:
            numbers = draws.step(self.canvas_index, 0, self.step, start, self.length)
            rows.append(getattr(numbers, name))
        return torch.from_numpy(np.stack(rows)).to(self.device)

    def _initialize(self, batch_size: int, device: torch.device) -> torch.Tensor:  # noqa: ARG002 (the reference's call)
        if self.in_step:
            return self._numbers("renoise").long()
        self.canvas_index += 1
        self.step = 0
        self.steps.append([])
        return self._numbers("initial").long()

    def _multinomial(self, probabilities: torch.Tensor, num_samples: int) -> torch.Tensor:  # noqa: ARG002
        """The inverse CDF at our ``u``, in place of torch's own draw from the same distribution."""
        u = self._numbers("u").flatten()[:, None].double()
        running = probabilities.double().cumsum(-1)
        chosen = (running <= u * running[:, -1:]).sum(-1, keepdim=True)
        return torch.minimum(chosen, (running < running[:, -1:]).sum(-1, keepdim=True))

    def row(self, row: int, ends: set[int]) -> list[ReferenceCanvas]:
        """The canvases of one row, up to the one that holds one of the end tokens ``ends``."""
        canvases = []
        for steps in self.steps:
            committed = to_numpy(steps[-1]["argmax"][row])
            prefix = np.concatenate(
                [np.asarray(self.prompts[row]), *(c.steps[-1].argmax for c in canvases)]
            )
            canvas = ReferenceCanvas(prefix.astype(np.int64))
            for step in steps:
                if step["before"][row]:
                    break
                signal = None if step["signal"] is None else to_numpy(step["signal"][row])
                canvas.steps.append(
                    ReferenceStep(
                        canvas_in=to_numpy(step["canvas_in"][row]),
                        canvas=to_numpy(step["canvas"][row]),
                        argmax=to_numpy(step["argmax"][row]),
                        accepted=to_numpy(step["accepted"][row]),
                        stopped=bool(step["finished"][row]),
                        signal=signal,
                    )
                )
            canvases.append(canvas)
            if ends & set(committed.tolist()):
                break
        return canvases
