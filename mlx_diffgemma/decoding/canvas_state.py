"""The canvas that a session has open: its state between two steps, and the totals of all attempts."""

from __future__ import annotations

from dataclasses import dataclass, field

import mlx.core as mx

from mlx_diffgemma.decoding.records import CanvasStep
from mlx_diffgemma.sampling.penalties import Adjustment
from mlx_diffgemma.sampling.protocols import Draft
from mlx_diffgemma.sampling.stopping import StopContext


@dataclass
class CanvasState:
    """One attempt at one canvas, between two denoising steps.

    Attributes:
        ids: The canvas [length now].
        accepted: Mask [length now] of the positions whose tokens the last step kept.
        history: The argmax canvases of the last ``Policy.stability`` steps, oldest first.
        length: Positions at the start.  A rule may have dropped some at the end since.
        free: Positions at the start that no pin fixes.
        adjustment: What penalties do to the logits; None without penalties.
        entropies: Mean entropy of each step, in nats.
        ends: Position of the first end token in the argmax of each step.
        guess: The ids that a drafter proposed [length now], -1 for no proposal; None without a
            drafter.
        signal: Self-conditioning of the next step [length now, hidden]; None: zeros.
        argmax: The argmax of the last step, if the penalties need it.
        stop_context: What the stop rules know of the last step.
    """

    ids: mx.array
    accepted: mx.array
    history: tuple[mx.array, ...]
    length: int
    free: int
    adjustment: Adjustment | None = None
    entropies: list[float] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    guess: mx.array | None = None
    signal: mx.array | None = None
    argmax: mx.array | None = None
    stop_context: StopContext | None = None

    @property
    def step(self) -> int:
        """How many steps this attempt has taken."""
        return len(self.entropies)

    @property
    def nbytes(self) -> int:
        """The bytes of the state from which the next step starts."""
        arrays = (self.ids, self.signal, self.argmax)
        return sum(array.nbytes for array in arrays if array is not None)

    def use_draft(self, draft: Draft) -> None:
        """Continue from ``draft``, or do nothing if it proposes nothing."""
        if draft.soft is None and not draft.drafted.any().item():
            return
        before = mx.full((draft.ids.size,), -1) if self.guess is None else self.guess
        self.ids = draft.ids
        self.signal = draft.soft
        self.guess = mx.where(draft.drafted, draft.ids, before)

    def take(self, step: CanvasStep, rows: int) -> None:
        """Continue from ``step`` with the first ``rows`` positions."""
        self.ids = step.canvas[:rows]
        self.accepted = step.accepted[:rows]
        self.signal = None
        if self.guess is not None:
            self.guess = self.guess[:rows]
        if self.adjustment:
            self.argmax = step.argmax[:rows]
        if self.history:
            later = (*self.history, step.argmax)[1:]
            self.history = tuple(argmax[:rows] for argmax in later)


@dataclass
class Attempts:
    """The totals of all attempts at the current canvas.  A commit starts new ones.

    Attributes:
        retry: Attempts before the current one.
        drafted: How many of those contained a drafter's proposals.
        steps: Denoising steps.
        rows: Canvas rows of these steps.
        passes: Forward passes of the drafter.
        verified: Causal passes over the text of the argmax.
        verified_rows: Rows of these passes.
        rejected: The last steps of attempts that did not converge.
    """

    retry: int = 0
    drafted: int = 0
    steps: int = 0
    rows: int = 0
    passes: int = 0
    verified: int = 0
    verified_rows: int = 0
    rejected: list[CanvasStep] = field(default_factory=list)
