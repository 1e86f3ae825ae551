"""What generation asks of a drafter; the package ``drafter`` has the one we train, anything of this shape will do.

Whatever a drafter proposes, the target decides.  Left to right a bad one costs time, never a token; a canvas that began from a
draft may end in another text than one that did not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import mlx.core as mx

if TYPE_CHECKING:
    from mlx_diffgemma.autoregressive import CausalSession
    from mlx_diffgemma.model import DiffusionGemma
    from mlx_diffgemma.policy import Policy
    from mlx_diffgemma.session import Session

Taps = Mapping[int, mx.array]  # hidden states [rows, hidden] after some layers, by layer


class CausalDrafter(Protocol):
    """Guesses the next tokens of answers that are decoded left to right.  What it keeps of an answer stands in the
    session's ``draft``."""

    @property
    def taps(self) -> Sequence[int]:
        """The layers of the target whose hidden states it reads."""

    @property
    def longest(self) -> int:
        """How many tokens it can propose at once."""

    def begin(self) -> Any:
        """What to keep in a session's ``draft``."""

    def read(self, sessions: Sequence[CausalSession], taps: Sequence[Taps]) -> None:
        """Take note of rows that are in the target's caches now."""

    def propose(self, sessions: Sequence[CausalSession], counts: Sequence[int]) -> list[list[int]]:
        """For each session up to so many tokens that may follow its last one, of which the target has not seen the hidden
        state yet."""


class Draft(NamedTuple):
    """What a canvas begins with: ``ids`` [length], the self-conditioning signal ``soft`` [length, hidden] of the first step or
    None, and the mask ``drafted`` [length] of the positions whose ids are guesses; the others are noise.  ``passes`` of the
    drafter were taken for it.  ``whole``: all of its text may well be right, so that a policy with a judge asks that first."""

    ids: mx.array
    soft: mx.array | None
    drafted: mx.array
    passes: int = 0
    whole: bool = False


class CanvasDrafter(Protocol):
    """Guesses what a canvas will hold before its first step.  What it keeps of an answer stands in the session's ``draft``."""

    @property
    def taps(self) -> Sequence[int]:
        """The layers of the target whose hidden states it reads."""

    def begin(self) -> Any:
        """What to keep in a session's ``draft``."""

    def read(self, sessions: Sequence[Session], taps: Sequence[Taps]) -> None:
        """Take note of rows that are in the target's caches now."""

    @property
    def refines(self) -> bool:
        """Whether ``refine`` is asked after each step."""

    def seed(self, sessions: Sequence[Session]) -> list[Draft]:
        """For sessions that have just opened a canvas of noise."""

    def refine(self, sessions: Sequence[Session], taps: Sequence[Taps]) -> list[Draft]:
        """For sessions that go on with what a step left, which had the hidden states ``taps`` on the canvas's rows: the
        canvases to go on from, and where they are guesses; ``soft`` is not used."""


class DraftModel(Protocol):
    """What ``draft_model=`` takes."""

    def causal(self, target: DiffusionGemma) -> CausalDrafter:
        """For ``mode="ar"``.  Errors: UserError when it does not fit the target."""

    def canvas(self, target: DiffusionGemma, base: Policy) -> Policy:
        """``base``, beginning its canvases from drafts.  Errors: UserError when it does not fit the target."""
