"""Decisions of a denoising step in which both sides differ.

This module finds out whether rounding explains the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mlx_diffgemma.diagnostics.recorder import ReferenceCanvas, ReferenceStep
from mlx_diffgemma.diagnostics.reference import Reference
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.sampling.draws import Draws
from mlx_diffgemma.sampling.policy import ReferencePolicy

DECISION_FACTOR = 10.0


@dataclass(frozen=True)
class Sides:
    """Both models, and the random numbers and the step limit that they share for one prompt."""

    model: DiffusionGemma
    reference: Reference
    draws: Draws
    max_steps: int

    @property
    def policy(self) -> ReferencePolicy:
        return policy_with(self.model, self.max_steps)


def policy_with(model: DiffusionGemma, max_steps: int) -> ReferencePolicy:
    """The checkpoint's policy with another step limit."""
    settings = replace(model.config.generation, max_denoising_steps=max_steps)
    return ReferencePolicy.from_config(settings)


@dataclass(frozen=True)
class Outcome:
    """What our sampler makes of a step: arrays of [length], and whether the canvas converges with
    it.
    """

    argmax: np.ndarray
    accepted: np.ndarray
    canvas: np.ndarray
    stop: bool

    def differences(self, theirs: ReferenceStep) -> list[str]:
        """The decisions that differ from the reference's, the cause first.

        Another mask makes another canvas, and another argmax makes another stop.
        """
        names = []
        for name in ("argmax", "accepted", "canvas"):
            if not np.array_equal(getattr(self, name), getattr(theirs, name)):
                names.append(name)
        if self.stop != theirs.stopped:
            names.append("stop")
        return names


@dataclass(frozen=True)
class Ended:
    """A decision in which both sides differ.

    ``margin`` is how close the reference's decision was, and ``spread`` how much the same quantity
    varies between the reference's own variants.
    """

    canvas: int
    step: int
    decision: str
    margin: float
    spread: float

    @property
    def excused(self) -> bool:
        return self.margin < DECISION_FACTOR * self.spread


class Decision:
    """The margins of the decisions of one step, for each variant of the reference."""

    def __init__(
        self,
        sides: Sides,
        canvas: ReferenceCanvas,
        index: int,
        number: int,
        carried: bool = True,
    ):
        """Run every variant of the reference up to the step.

        Args:
            sides: Both models.
            canvas: The reference's canvas.
            index: The index of that canvas in its answer.
            number: The number of the step in that canvas.
            carried: Each variant runs all earlier steps with its own self-conditioning, because
                self-conditioning carries rounding errors from step to step.  False: both sides had
                the same signal, and only the step itself runs.
        """
        config = sides.model.config
        self.step = canvas.steps[number]
        self.index = index
        self.number = number
        self.generation = config.generation
        start = index * config.canvas_length
        draws = sides.draws.step(index, 0, number, start, config.canvas_length)
        self.u = draws.u.astype(np.float64)
        self.scaled: list[np.ndarray] = []
        self.router: list[np.ndarray] = []
        for variant in sides.reference.variants:
            scaled, margins = _run_variant(sides, canvas, number, variant, carried)
            self.scaled.append(scaled.astype(np.float64))
            self.router.append(margins.astype(np.float64))

    def first(self, names: Sequence[str], ours: Outcome) -> Ended:
        """The decision that caused the difference.

        It is the first of ``names``, unless an earlier decision was at a tie.  Positions are
        accepted in the order of their entropies.  When two positions change places at the edge, the
        sum of the smaller entropies moves by a whole entropy; the cause is then their order.  When
        two experts change places, the logits of a row move far, and every later decision may differ
        by any margin; the cause is then the router.  Each decision is compared with the variants'
        spread of the very same margin.
        """
        direct = self.margin(names[0], ours)
        row = int(self.router[0].argmin())
        closest = self.router[0][row]
        spread = max(abs(float(margins[row] - closest)) for margins in self.router[1:])
        candidates = [direct]
        if names[0] == "accepted":
            candidates.append(self.margin("order", ours))
        candidates.append(Ended(self.index, self.number, "router", float(closest), spread))
        for decision in candidates:
            if decision.excused:
                return decision
        return direct

    def margin(self, name: str, ours: Outcome) -> Ended:
        """The largest margin among the positions that differ, and its spread."""
        quantity: Callable[[np.ndarray], np.ndarray] = getattr(self, f"_{name}")
        values = [quantity(scaled) for scaled in self.scaled]
        if name == "stop":  # one decision for the whole canvas
            differs = np.ones(1, dtype=bool)
        else:
            attribute = "accepted" if name == "order" else name
            differs = getattr(ours, attribute) != getattr(self.step, attribute)
        margin = np.abs(values[0][differs]).max()
        spread = max(np.abs(value - values[0])[differs].max() for value in values[1:])
        return Ended(self.index, self.number, name, float(margin), float(spread))

    def _argmax(self, scaled: np.ndarray) -> np.ndarray:
        """The gap between the two best tokens [length]."""
        best = np.sort(scaled, axis=-1)
        return best[:, -1] - best[:, -2]

    def _canvas(self, scaled: np.ndarray) -> np.ndarray:
        """The distance [length] of ``u`` from the edge of the reference's token in the running sum.

        The nearer of the two edges counts.
        """
        probabilities = _softmax(scaled)
        chosen = self.step.canvas[:, None]
        upper = np.take_along_axis(np.cumsum(probabilities, axis=-1), chosen, axis=-1)[:, 0]
        token = np.take_along_axis(probabilities, chosen, axis=-1)[:, 0]
        return np.minimum(np.abs(upper - self.u), np.abs(upper - token - self.u))

    def _accepted(self, scaled: np.ndarray) -> np.ndarray:
        """The distance [length] of the sum of the smaller entropies from the bound."""
        entropy = _entropy(scaled)
        order = np.argsort(entropy)
        before = np.empty_like(entropy)
        before[order] = np.cumsum(entropy[order]) - entropy[order]
        return before - self.generation.entropy_bound

    def _order(self, scaled: np.ndarray) -> np.ndarray:
        """The distance [length] of each entropy from the nearest one on the other side of the mask."""
        entropy = _entropy(scaled)
        accepted = self.step.accepted.astype(bool)
        highest = entropy[accepted].max(initial=-np.inf)
        lowest = entropy[~accepted].min(initial=np.inf)
        return np.where(accepted, lowest - entropy, entropy - highest)

    def _stop(self, scaled: np.ndarray) -> np.ndarray:
        """The distance [1] of the mean entropy from the threshold."""
        return _entropy(scaled).mean(keepdims=True) - self.generation.confidence_threshold


def _run_variant(
    sides: Sides, canvas: ReferenceCanvas, number: int, variant: str, carried: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Run one variant of the reference up to a step.

    Args:
        sides: Both models.
        canvas: The reference's canvas.
        number: The number of the step.
        variant: The variant.
        carried: Whether all steps before it run too; see ``Decision``.

    Returns:
        (scaled logits [length, vocabulary], router margins [length]) of the step
    """
    reference = sides.reference
    policy = sides.policy
    cache = reference.encode(canvas.prefix.tolist(), variant).cache
    step = canvas.steps[number]
    if not carried:
        logits, margins = reference.denoise(cache, step.canvas_in, step.signal, variant)
        return logits / policy.schedule(number), margins
    scaled = None
    for past in range(number + 1):
        canvas_in = canvas.steps[past].canvas_in
        logits, margins = reference.denoise(cache, canvas_in, scaled, variant)
        scaled = logits / policy.schedule(past)
    assert scaled is not None, "a canvas has at least one step"
    return scaled, margins


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def _entropy(x: np.ndarray) -> np.ndarray:
    shifted = x - x.max(axis=-1, keepdims=True)
    log = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return -(np.exp(log) * log).sum(axis=-1)
