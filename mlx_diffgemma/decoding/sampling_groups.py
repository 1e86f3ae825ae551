"""Which rows of a forward are sampled together, and their sampler step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import mlx.core as mx
import numpy as np

from mlx_diffgemma.decoding.session import Session
from mlx_diffgemma.grammar.constraint import Masses
from mlx_diffgemma.sampling.protocols import CanvasContext, OpenCanvas
from mlx_diffgemma.sampling.sampler import Before, SamplerStep
from mlx_diffgemma.sampling.self_conditioning import Bias

Context = TypeVar("Context", bound=CanvasContext)


def sampled_together(sessions: Sequence[Context]) -> list[list[Context]]:
    """Group the sessions whose policies have one class and whose canvases have one length.

    A session with constraints is alone in its group, since it has its own dynamic programme.
    """
    groups: dict[tuple[type, int, int, int], list[Context]] = {}
    for session in sessions:
        alone = id(session) if session.demands else 0
        sampling = session.policy.sampling
        size = open_canvas(session).ids.size
        key = (type(sampling), session.policy.stability, size, alone)
        groups.setdefault(key, []).append(session)
    return list(groups.values())


def open_canvas(session: CanvasContext) -> OpenCanvas:
    """The canvas of a session that has one open."""
    assert session.canvas is not None, "a canvas is open"
    return session.canvas


def constrained_logits(
    group: Sequence[Session], logits: mx.array
) -> tuple[mx.array, list[Masses | None]]:
    """Apply penalties, and exclude what pins and constraints rule out.

    Args:
        group: Sessions that are sampled together.
        logits: [group, length, vocabulary].

    Returns:
        (the logits, what the constraints need of them).  The latter is empty without constraints.
    """
    logits = _penalised(group, logits)
    demands = group[0].demands  # a session with demands is alone in its group
    if not demands:
        return logits, []
    own = demands.restrict(logits.squeeze(0))  # logits[0] would copy
    return own[None], demands.masses(own, group[0].policy.schedule(group[0].step))


def _penalised(group: Sequence[Session], logits: mx.array) -> mx.array:
    canvases = [session.canvas for session in group]
    if not any(canvas.adjustment for canvas in canvases if canvas):
        return logits
    return mx.stack(
        [
            canvas.adjustment.adjust(own, canvas.argmax) if canvas and canvas.adjustment else own
            for canvas, own in zip(canvases, logits, strict=True)
        ]
    )


def sample_group(
    group: Sequence[Session], logits: mx.array, masses: Sequence[Masses | None]
) -> tuple[SamplerStep, Bias | None]:
    """Take one sampler step.

    Args:
        group: Sessions that are sampled together.
        logits: [group, length, vocabulary].
        masses: What the constraints need of the logits.

    Returns:
        (the outcome, the bias that gives the logits the marginals under the constraints).
    """
    length = logits.shape[1]
    canvases = [session.canvas for session in group if session.canvas]
    draws = [s.draws.step(s.canvas_index, s.retry, s.step, s.start, length) for s in group]
    before = Before(
        canvas=mx.stack([canvas.ids for canvas in canvases]),
        accepted=mx.stack([canvas.accepted for canvas in canvases]),
        history=mx.stack([_stacked(canvas.history, length) for canvas in canvases]),
    )
    policies = [session.policy.sampling for session in group]
    steps = [session.step for session in group]
    bias = forced = None
    if group[0].demands and any(masses):
        numbers = policies[0].numbers(policies, steps)
        bias, forced = group[0].demands.force(logits.squeeze(0), masses, draws[0].u, numbers)
    outcome = policies[0].sample(
        policies,
        steps,
        [max(1, canvas.free) for canvas in canvases],
        logits,
        np.stack([draw.u for draw in draws]),
        np.stack([draw.renoise for draw in draws]),
        before,
        mx.array(group[0].eos_ids),
        forced,
    )
    return outcome, bias


def _stacked(history: Sequence[mx.array], length: int) -> mx.array:
    """The argmax canvases of earlier steps [steps, length]."""
    return mx.stack(list(history)) if history else mx.zeros((0, length), dtype=mx.int32)
