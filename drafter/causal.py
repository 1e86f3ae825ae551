"""Proposals for left-to-right decoding: a block after the last token, guessed in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from drafter.context import FeatureCaches
from mlx_diffgemma.decoding.autoregressive import draw_positions
from mlx_diffgemma.model.attention import Segment
from mlx_diffgemma.sampling.protocols import CausalContext


class CausalDraft(FeatureCaches):
    """Implements :class:`mlx_diffgemma.sampling.protocols.CausalDrafter`.

    A guess is drawn with the same ``u`` as the target's token at that position: where both
    distributions are alike, so are the tokens, even at high temperatures.
    """

    @property
    def longest(self) -> int:
        return self.drafter.config.block_size - 1

    def propose(self, sessions: Sequence[CausalContext], counts: Sequence[int]) -> list[list[int]]:
        """Propose ``counts`` tokens for each session."""
        blocks = []
        segments = []
        start = 0
        for session, count in zip(sessions, counts, strict=True):
            block = [*session.pending, *self._unknown(session, count)]
            segments.append(Segment(start, start + len(block), session.draft, canvas=True))
            blocks.append(mx.array(block))
            start += len(block)
        hidden = self.drafter(self.head.embed(mx.concatenate(blocks)), segments)
        if not any(counts):
            return [[] for _ in sessions]
        unknown = mx.concatenate([hidden[segment.start + 1 : segment.stop] for segment in segments])
        drawn = draw_positions(self.head.logits(unknown), sessions, counts)
        guesses = self.head.tokens(drawn).tolist()
        return [[guesses.pop(0) for _ in range(count)] for count in counts]

    def _unknown(self, session: CausalContext, count: int) -> list[int]:
        """The ids at positions whose tokens are not known yet."""
        mask = self.drafter.config.mask_token_id
        if mask is not None:
            return [mask] * count
        noise: list[int] = session.draws.step(0, 0, 0, len(session.tokens), count).initial.tolist()
        return noise
