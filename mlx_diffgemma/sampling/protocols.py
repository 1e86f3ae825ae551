"""The protocols of a policy and of a drafter, as the decoding loop uses them.

A ``Policy`` decides how a canvas begins, which tokens are accepted and when it ends.  A drafter
proposes tokens.  The package ``drafter`` has the one we train; any object with these methods works.
The target model verifies every proposal.  With ``mode="ar"`` a bad proposal costs time but never
changes a token.  A canvas that began from a draft may end in another text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import mlx.core as mx
import numpy as np

from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.sampling.draws import DrawSource
from mlx_diffgemma.sampling.sampler import Before, Marginals, SamplerStep, StepNumbers
from mlx_diffgemma.sampling.stopping import StopContext

Taps = Mapping[int, mx.array]  # hidden states [rows, hidden] after some layers, by layer


class Policy(Protocol):
    """The decisions about a canvas.

    Rows whose policies have the same class are sampled together, each with its own numbers.
    """

    @property
    def name(self) -> str: ...

    @property
    def max_steps(self) -> int: ...

    @property
    def stability(self) -> int:
        """How many argmax canvases of earlier steps the stop rule compares with."""

    @property
    def fuses_commit(self) -> bool:
        """Whether a finished canvas may be encoded together with the first step of the next one."""

    @property
    def drafter(self) -> CanvasDrafter | None:
        """Drafts the first attempt at a canvas.  None: canvases begin with ``initial_canvas``."""

    @property
    def surprise_limit(self) -> float | None:
        """The surprise in nats (see ``StopContext``) above which a token is rejected.  None: the
        causal mode never verifies.
        """

    @property
    def sampling(self) -> Policy:
        """The policy whose ``sample`` this one uses: itself, or what it wraps."""

    def canvas_length(self, canvas_index: int, remaining: int, full: int) -> int:
        """The length of a canvas.

        Args:
            canvas_index: The number of the canvas in its answer, from 0.
            remaining: The most tokens that the answer may still have.
            full: The most positions of a canvas.
        """

    def initial_canvas(
        self, draws: DrawSource, canvas_index: int, retry: int, start: int, length: int
    ) -> np.ndarray:
        """The ids [length] of a new canvas.

        Args:
            draws: The random numbers.
            canvas_index: The number of the canvas in its answer, from 0.
            retry: The attempts before this one.
            start: The position in the answer at which the canvas begins.
            length: The positions of the canvas.
        """

    def schedule(self, step: int) -> float:
        """The temperature of step 0, 1, …"""

    @staticmethod
    def numbers(policies: Sequence[Any], steps: Sequence[int]) -> StepNumbers:
        """The numbers of a step, for one policy and one step index a row."""

    @staticmethod
    def sample(
        policies: Sequence[Any],
        steps: Sequence[int],
        positions: Sequence[int],
        logits: mx.array,
        u: np.ndarray,
        renoise: np.ndarray,
        before: Before,
        eos_ids: mx.array,
        forced: Marginals | None = None,
    ) -> SamplerStep:
        """Take one sampler step of a batch whose rows may be at different steps.

        Args:
            policies: The policy of each row.
            steps: The step index of each row.
            positions: The number of free positions with which each canvas began.  The canvas may
                have other positions now.
            logits, u, renoise, before, eos_ids, forced: As in ``sample_step``.
        """

    def is_confident(self, context: StopContext) -> bool:
        """Whether the entropy of this step is low enough for the canvas to converge."""

    def needs_verification(self, context: StopContext) -> bool:
        """Whether the causal mode should verify the argmax."""

    def stop_reason(self, context: StopContext) -> str | None:
        """Why the canvas ends with this step: "converged", "plateau", "max_steps", "watchdog" or
        "judge".  None if it continues.
        """

    def certificate(self, context: StopContext) -> str:
        """The name of the rule under which a canvas has converged."""

    def should_retry(self, context: StopContext, reason: str) -> bool:
        """Whether the canvas that ended is discarded and tried again with other draws."""

    def trim_to(self, context: StopContext, rows: int) -> int:
        """How many of the canvas's ``rows`` continue to the next step, counted from the first."""


class CausalNumbers(Protocol):
    """The sampling parameters of left-to-right decoding."""

    @property
    def temperature(self) -> float: ...

    @property
    def top_k(self) -> int: ...

    @property
    def top_p(self) -> float: ...

    @property
    def min_p(self) -> float: ...


class HasDraft(Protocol):
    """An answer as every drafter sees it: ``draft`` is what the drafter keeps of it."""

    draft: Any


class CausalContext(HasDraft, Protocol):
    """An answer that is decoded left to right, as a drafter sees it.

    ``pending`` are the ids that the target has not read yet, including the last one drawn.
    ``tokens`` are those of the answer.
    """

    pending: list[int]
    tokens: list[int]
    draws: DrawSource

    @property
    def policy(self) -> CausalNumbers: ...


class OpenCanvas(Protocol):
    """A canvas in progress: ``ids`` and the mask ``accepted`` [length now], and the ``length`` with
    which it started.
    """

    ids: mx.array
    accepted: mx.array
    length: int


class CanvasContext(HasDraft, Protocol):
    """An answer that is decoded by canvases, as a drafter sees it.

    ``ids`` are all ids that the target has read or written.  ``start`` is the position in the
    answer at which the current canvas begins.  ``next_logits`` [vocabulary] are the logits of the
    causal mode after ``ids``.
    """

    ids: list[int]
    next_logits: mx.array | None
    draws: DrawSource
    policy: Policy
    eos_ids: tuple[int, ...]
    start: int
    demands: Any

    @property
    def canvas(self) -> OpenCanvas | None:
        """The canvas in progress; None between two canvases."""

    @property
    def retry(self) -> int:
        """Attempts at this canvas before the current one."""

    @property
    def canvas_index(self) -> int: ...


class CausalDrafter(Protocol):
    """Proposes the next tokens of answers that are decoded left to right."""

    @property
    def taps(self) -> Sequence[int]:
        """The layers of the target whose hidden states it reads."""

    @property
    def longest(self) -> int:
        """The most tokens it can propose at once."""

    def begin(self) -> Any:
        """The initial value of a session's ``draft``."""

    def read(self, sessions: Sequence[HasDraft], taps: Sequence[Taps]) -> None:
        """Read the hidden states of rows that are in the target's caches now."""

    def propose(self, sessions: Sequence[CausalContext], counts: Sequence[int]) -> list[list[int]]:
        """Propose at most ``counts[i]`` tokens to follow the last token of session i.  The target
        has no hidden state of that last token yet.
        """


class Draft(NamedTuple):
    """What a canvas begins with.

    Attributes:
        ids: The ids [length].
        soft: The self-conditioning signal [length, hidden] of the first step, or None.
        drafted: Mask [length] of the positions whose ids are proposals.  The others are noise.
        passes: The forward passes of the drafter that made the draft.
        whole: Whether the whole text is probably right, so that a policy that verifies may ask the
            verifier before the first step.
    """

    ids: mx.array
    soft: mx.array | None
    drafted: mx.array
    passes: int = 0
    whole: bool = False


class CanvasDrafter(Protocol):
    """Proposes what a canvas will hold before its first step."""

    @property
    def taps(self) -> Sequence[int]:
        """The layers of the target whose hidden states it reads."""

    def begin(self) -> Any:
        """The initial value of a session's ``draft``."""

    def read(self, sessions: Sequence[HasDraft], taps: Sequence[Taps]) -> None:
        """Read the hidden states of rows that are in the target's caches now."""

    @property
    def refines(self) -> bool:
        """Whether ``refine`` is called after each step."""

    def seed(self, sessions: Sequence[CanvasContext]) -> list[Draft]:
        """Drafts for sessions that have just opened a canvas of noise."""

    def refine(self, sessions: Sequence[CanvasContext], taps: Sequence[Taps]) -> list[Draft]:
        """Drafts for sessions that continue after a step.

        Args:
            sessions: Those whose canvas continues.
            taps: The hidden states that the step had on each canvas's rows.

        Returns:
            The canvases to continue from, and where they are proposals; ``soft`` is not used.
        """


class DraftModel(Protocol):
    """What ``draft_model=`` takes."""

    def causal(self, target: DiffusionGemma) -> CausalDrafter:
        """Return the drafter for ``mode="ar"``.  Raises UserError if it does not fit the target."""

    def canvas(self, target: DiffusionGemma, base: Policy) -> Policy:
        """Return ``base`` changed so that its canvases begin from drafts.  Raises UserError if the
        drafter does not fit the target.
        """
