"""What a drafter must be better than, and drafts that are wrong on purpose: nothing here is trained, all goes through the loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from drafter.canvas import DraftPolicy
from drafter.model import Drafter
from mlx_diffgemma.drafting import Draft, Taps
from mlx_diffgemma.draws import Draws
from mlx_diffgemma.policy import ReferencePolicy, Standing
from mlx_diffgemma.sampler import Before, Marginals, SamplerStep
from mlx_diffgemma.session import Session

Known = Mapping[tuple[int, int], np.ndarray]  # ids by request seed and canvas, -1 where nothing is drafted


class Untrained:
    """A canvas drafter that reads nothing of the target and guesses once, and is sure of it."""

    taps: Sequence[int] = ()
    refines = False

    def begin(self) -> None:
        return None

    def read(self, sessions: Sequence[Session], taps: Sequence[Taps]) -> None:
        """There is nothing to note."""

    def refine(self, sessions: Sequence[Session], taps: Sequence[Taps]) -> list[Draft]:
        raise TypeError(f"{len(sessions)} sessions with {len(taps)} taps: it does not refine")

    def guess(self, session: Session) -> np.ndarray:
        """Up to a canvas of ids, -1 where the noise stays."""
        raise NotImplementedError

    def seed(self, sessions: Sequence[Session]) -> list[Draft]:
        drafts = []
        for session in sessions:
            canvas = session.canvas
            assert canvas is not None
            found = self.guess(session)[: canvas.size]
            ids = mx.array(np.pad(found, (0, canvas.size - found.size), constant_values=-1).astype(np.int32))
            drafts.append(Draft(mx.where(ids < 0, canvas, ids), None, ids >= 0, whole=bool((ids >= 0).any())))
        return drafts


class FixedDraft(Untrained):
    """Is told beforehand what to guess."""

    def __init__(self, known: Known):
        self.known = known

    def guess(self, session: Session) -> np.ndarray:
        assert isinstance(session.draws, Draws)
        return self.known.get((session.draws.seed, session.canvas_index), np.zeros(0, dtype=np.int32))


class NgramDraft(Untrained):
    """Copies what the text has before: the causal mode's next token, then again and again what followed the last two tokens, or the
    last one, where they stood last.  Source: prompt lookup decoding."""

    def guess(self, session: Session) -> np.ndarray:
        assert session.next_logits is not None
        text, found = list(session.ids), [int(mx.argmax(session.next_logits).item())]
        while len(found) < session.length and found[-1] not in session.eos_ids:
            behind = [*text, *found]
            places = [i for i in range(1, len(text)) if text[i - 1] == behind[-1]]
            both = [i for i in places if i > 1 and text[i - 2] == behind[-2]]
            if not (both or places):
                break
            found.append(text[(both or places)[-1]])
        return np.array(found, dtype=np.int32)


def disturbed(drafter: Drafter, by: float, seed: int = 0) -> Drafter:
    """``drafter`` with noise on its weights, ``by`` times as large as they are: one that was made for something else."""
    twin, key = Drafter(drafter.config), [mx.random.key(seed)]

    def noisy(x: mx.array) -> mx.array:
        if x.dtype == mx.int32:
            return x
        key[0], own = mx.random.split(key[0])
        size = mx.sqrt((x.astype(mx.float32) ** 2).mean())
        return (x + by * size * mx.random.normal(x.shape, key=own)).astype(x.dtype)

    twin.update(tree_map(noisy, drafter.parameters()))
    twin.eval()
    return twin


@dataclass(frozen=True)
class VetoPolicy(DraftPolicy):
    """A drafted canvas ends as soon as the judge has nothing against it, however uncertain the target is."""

    def confident(self, standing: Standing) -> bool:
        return standing.steps > 0


@dataclass(frozen=True)
class JudgedPolicy(DraftPolicy):
    """The judge decides without a draft as well: what the drafts of a drafter gain is what they gain beyond this."""

    def consults(self, standing: Standing) -> bool:
        return super().consults(replace(standing, drafted=not standing.retry))


@dataclass(frozen=True)
class UnverifiedPolicy(ReferencePolicy):
    """Commits what stands on the canvas when it begins.  The step that the loop takes all the same counts for nothing."""

    @classmethod
    def sample(cls, policies: Sequence[Any], steps: Sequence[int], positions: Sequence[int], logits: mx.array, u: np.ndarray,
               renoise: np.ndarray, before: Before, eos_ids: mx.array, forced: Marginals | None = None) -> SamplerStep:
        made = super().sample(policies, steps, positions, logits, u, renoise, before, eos_ids, forced)
        return made._replace(argmax=before.canvas)

    def judge(self, standing: Standing) -> str | None:
        return "converged" if standing.steps else None
