"""What generation asks of a drafter; the package ``drafter`` has the one we train, anything of this shape will do.

Whatever a drafter proposes, the target decides: a bad one costs time, never a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import mlx.core as mx

if TYPE_CHECKING:
    from mlx_diffgemma.autoregressive import CausalSession
    from mlx_diffgemma.model import DiffusionGemma

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


class DraftModel(Protocol):
    """What ``draft_model=`` takes."""

    def causal(self, target: DiffusionGemma) -> CausalDrafter:
        """For ``mode="ar"``.  Errors: UserError when it does not fit the target."""
