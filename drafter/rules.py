"""The rules by which drafts are made and used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mlx_diffgemma.errors import UserError


@dataclass(frozen=True)
class DraftRules:
    """How drafts are made and used.

    - ``gate``: a guess enters the canvas if its confidence is at least this.  Above 1 no guess
      does.
    - ``passes``: the most passes of the drafter.  Each pass starts from the result of the one
      before. The drafter stops early when it is sure of the whole text.
    - ``handoff``: the drafter's most probable tokens are the first step's self-conditioning signal.
    - ``refine``: the drafter guesses again after each of the target's steps, at the positions that
      are not accepted.
    - ``judge``: the verifier rejects tokens whose surprisal excess is above this, in nats.  The
      excess is -log p - entropy, in the causal mode.  None: drafts are not verified.
    - ``trust``: a draft is verified before the target's first step if the confidences say that its
      whole text is right with at least this probability times the text's share of the canvas.  That
      share is the cost of the pass.  An accepted draft is committed.  For a rejected draft the
      tokens before the first rejected one are kept.  None: drafts are never verified before a step.
    - ``watchdog``: a drafted canvas that has not ended after this many steps starts again from
      noise.
    """

    gate: float = 0.01
    passes: int = 2
    handoff: bool = False
    refine: bool = False
    judge: float | None = 1.0
    trust: float | None = 0.1
    watchdog: int = 24

    def __post_init__(self) -> None:
        for name in ("gate", "judge", "trust"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise UserError(f"{name} must be above 0, got {value}.")
        for name in ("passes", "watchdog"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}.")

    @classmethod
    def parse(cls, text: str) -> DraftRules:
        """Read ``gate=0.95,passes=3,judge=off``.

        Raises:
            UserError: A rule is unknown, or its value is invalid.
        """
        kinds: dict[str, Any] = {
            "gate": float,
            "passes": int,
            "handoff": _switch,
            "refine": _switch,
            "judge": _number_or_off,
            "trust": _number_or_off,
            "watchdog": int,
        }
        values: dict[str, Any] = {}
        for part in filter(None, text.split(",")):
            name, _, value = (piece.strip() for piece in part.partition("="))
            if name not in kinds:
                raise UserError(f"Unknown draft rule {name!r}; known are {', '.join(kinds)}.")
            try:
                values[name] = kinds[name](value)
            except ValueError:
                right = {_switch: "on or off", _number_or_off: "a number or off"}.get(
                    kinds[name], "a number"
                )
                raise UserError(
                    f"The draft rule {name} cannot be {value!r}; give {right}."
                ) from None
        return cls(**values)


def _switch(value: str) -> bool:
    if value not in ("on", "off"):
        raise ValueError(value)
    return value == "on"


def _number_or_off(value: str) -> float | None:
    return None if value == "off" else float(value)
