"""The baselines that a drafter must beat, and drafts that are wrong on purpose.

Nothing here is trained.  Everything runs through the denoising loop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from drafter.drafter import Drafter
from drafter.policy import DraftPolicy
from mlx_diffgemma.sampling.draws import Draws
from mlx_diffgemma.sampling.policy import ReferencePolicy
from mlx_diffgemma.sampling.protocols import CanvasContext, Draft, HasDraft, Taps
from mlx_diffgemma.sampling.sampler import Before, Marginals, SamplerStep
from mlx_diffgemma.sampling.stopping import StopContext

# Ids by request seed and canvas, -1 where nothing is drafted.
Known = Mapping[tuple[int, int], np.ndarray]


class Untrained:
    """A canvas drafter that does not read the target's hidden states, guesses once and is always
    sure.
    """

    taps: Sequence[int] = ()
    refines = False

    def begin(self) -> None:
        return None

    def read(self, sessions: Sequence[HasDraft], taps: Sequence[Taps]) -> None:
        """Do nothing: no hidden states are needed."""

    def refine(self, sessions: Sequence[CanvasContext], taps: Sequence[Taps]) -> list[Draft]:
        raise TypeError(f"{len(sessions)} sessions with {len(taps)} taps: it does not refine")

    def guess(self, session: CanvasContext) -> np.ndarray:
        """Guess up to a canvas of ids; -1 keeps the noise at that position."""
        raise NotImplementedError

    def seed(self, sessions: Sequence[CanvasContext]) -> list[Draft]:
        drafts = []
        for session in sessions:
            assert session.canvas is not None
            canvas = session.canvas.ids
            guess = self.guess(session)[: canvas.size]
            padded = np.pad(guess, (0, canvas.size - guess.size), constant_values=-1)
            ids = mx.array(padded.astype(np.int32))
            drafted = ids >= 0
            whole = bool(drafted.any())
            drafts.append(Draft(mx.where(drafted, ids, canvas), None, drafted, whole=whole))
        return drafts


class FixedDraft(Untrained):
    """Guesses the ids that it was given."""

    def __init__(self, known: Known):
        self.known = known

    def guess(self, session: CanvasContext) -> np.ndarray:
        assert isinstance(session.draws, Draws)
        return self.known.get(
            (session.draws.seed, session.canvas_index), np.zeros(0, dtype=np.int32)
        )


class NgramDraft(Untrained):
    """Copies from the text before the canvas.

    The first token is the causal mode's next token.  Each further token copies what followed the
    most recent occurrence of the last two tokens, or else of the last one.  Source: prompt lookup
    decoding.
    """

    def guess(self, session: CanvasContext) -> np.ndarray:
        assert session.next_logits is not None
        assert session.canvas is not None
        text = list(session.ids)
        guess = [int(mx.argmax(session.next_logits).item())]
        while len(guess) < session.canvas.length and guess[-1] not in session.eos_ids:
            last_two = [*text, *guess][-2:]
            after_one = [i for i in range(1, len(text)) if text[i - 1] == last_two[-1]]
            after_two = [i for i in after_one if i > 1 and text[i - 2] == last_two[0]]
            if not after_one:
                break
            guess.append(text[(after_two or after_one)[-1]])
        return np.array(guess, dtype=np.int32)


def disturbed(drafter: Drafter, by: float, seed: int = 0) -> Drafter:
    """``drafter`` with noise on its weights.

    The result stands for a drafter that was made for another model.

    Args:
        drafter: The drafter.
        by: The size of the noise, relative to that of the weights.
        seed: The seed of the noise.
    """
    twin = Drafter(drafter.config)
    key = mx.random.key(seed)

    def noisy(x: mx.array) -> mx.array:
        nonlocal key
        if x.dtype == mx.int32:
            return x
        key, noise_key = mx.random.split(key)
        size = mx.sqrt((x.astype(mx.float32) ** 2).mean())
        return (x + by * size * mx.random.normal(x.shape, key=noise_key)).astype(x.dtype)

    twin.update(tree_map(noisy, drafter.parameters()))
    twin.eval()
    return twin


@dataclass(frozen=True)
class VetoPolicy(DraftPolicy):
    """Ends a drafted canvas as soon as the verifier accepts it, however uncertain the target is."""

    def is_confident(self, context: StopContext) -> bool:
        return context.steps > 0


@dataclass(frozen=True)
class JudgedPolicy(DraftPolicy):
    """Lets the verifier end canvases that were not drafted as well.

    The gain of a drafter is what it gains beyond this policy.
    """

    def needs_verification(self, context: StopContext) -> bool:
        return super().needs_verification(replace(context, drafted=not context.retry))


@dataclass(frozen=True)
class UnverifiedPolicy(ReferencePolicy):
    """Commits the ids that the canvas starts with.  The one step that the loop takes has no effect."""

    @classmethod
    def sample(
        cls,
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
        made = super().sample(
            policies, steps, positions, logits, u, renoise, before, eos_ids, forced
        )
        return made._replace(argmax=before.canvas)

    def stop_reason(self, context: StopContext) -> str | None:
        return "converged" if context.steps else None
