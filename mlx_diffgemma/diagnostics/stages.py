"""The errors of one stage of the computation, and whether they are within the bounds of parity.

``mlx_diffgemma.diagnostics.parity`` states the bounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

ROUTER_MARGIN = 1e-4
# Bounds in units of the reference's own distance to float64.
MEDIAN_FACTOR = 2.0
P90_FACTOR = 3.0


@dataclass(frozen=True)
class StageResult:
    """One line of the table: our errors, and the reference's own.

    ``spread`` and ``own_p90`` belong to the reference.  ``exact`` means that both sides are
    compared with float64.  ``beyond`` counts the rows above the bound of a single row;
    ``unexplained`` counts those of them without a tie in a router.
    """

    stage: str
    rows: int
    median: float
    p90: float
    p99: float
    largest: float
    spread: float
    own_p90: float
    exact: bool
    beyond: int
    unexplained: int

    @property
    def median_bound(self) -> float:
        return max(1e-5, (MEDIAN_FACTOR if self.exact else 1.0) * self.spread)

    @property
    def bound(self) -> float:
        return max(2e-5, 4 * self.spread)

    @property
    def ok(self) -> bool:
        if self.unexplained or not self.median <= self.median_bound:
            return False
        if self.exact:
            return bool(self.p90 <= max(2e-5, P90_FACTOR * self.own_p90))
        return bool(self.p99 <= self.bound)


@dataclass
class StageErrors:
    """Collects the rows of one stage over many inputs."""

    stage: str
    errors: list[np.ndarray] = field(default_factory=list)
    spreads: list[np.ndarray] = field(default_factory=list)
    margins: list[np.ndarray] = field(default_factory=list)
    exact: bool = False

    def add(
        self,
        ours: np.ndarray,
        variants: Sequence[np.ndarray],
        margins: np.ndarray | None = None,
        exact: bool = False,
    ) -> None:
        """Add the rows of one input.

        Args:
            ours: Our values [rows, ...].
            variants: The values of the reference and of its other implementations.
            margins: Margins [rows] of the router.  None: no row is at a tie.
            exact: The last of ``variants`` is float64.
        """
        self.exact = exact
        others = list(variants)
        truth = others.pop(-1 if exact else 0)
        errors = row_errors(ours, truth)
        self.errors.append(errors)
        spreads = [row_errors(other, truth) for other in others]
        self.spreads.append(np.max(spreads, axis=0) if spreads else np.zeros_like(errors))
        self.margins.append(np.full(len(errors), np.inf) if margins is None else margins)

    def result(self) -> StageResult:
        errors = np.concatenate(self.errors)
        spreads = np.concatenate(self.spreads)
        median = float(np.median(spreads))
        p90 = float(np.quantile(spreads, 0.9))
        # A row that is hard for the reference's float32 is hard for ours.
        allowed = 4 * np.maximum(spreads, p90) if self.exact else np.full(errors.shape, 4 * median)
        beyond = ~(errors <= np.maximum(2e-5, allowed))
        unexplained = beyond & (np.concatenate(self.margins) >= ROUTER_MARGIN)
        return StageResult(
            stage=self.stage,
            rows=errors.size,
            median=float(np.median(errors)),
            p90=float(np.quantile(errors, 0.9)),
            p99=float(np.quantile(errors, 0.99)),
            largest=float(errors.max()),
            spread=median,
            own_p90=p90,
            exact=self.exact,
            beyond=int(beyond.sum()),
            unexplained=int(unexplained.sum()),
        )


def row_errors(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """The largest absolute difference of each row; infinite where the shapes differ."""
    if ours.shape != theirs.shape:  # for example a cache that keeps another number of entries
        return np.full(len(theirs), np.inf)
    difference = np.abs(ours.astype(np.float64) - theirs.astype(np.float64))
    return difference.reshape(len(difference), -1).max(axis=1)
