"""The drafter as left-to-right decoding asks for it: a block behind the last token, guessed in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from drafter.context import Reader
from mlx_diffgemma.autoregressive import CausalSession, draw_positions
from mlx_diffgemma.model import Segment


class CausalDraft(Reader):
    """Implements :class:`mlx_diffgemma.drafting.CausalDrafter`.

    A guess is drawn with the very ``u`` with which the target will draw that position: where both distributions are alike, so
    are the tokens, also at high temperatures.
    """

    @property
    def longest(self) -> int:
        return self.drafter.config.block_size - 1

    def propose(self, sessions: Sequence[CausalSession], counts: Sequence[int]) -> list[list[int]]:
        blocks, segments, start = [], [], 0
        for session, count in zip(sessions, counts, strict=True):
            block = [*session.pending, *self._unknown(session, count)]
            segments.append(Segment(start, start + len(block), session.draft, canvas=True))
            blocks.append(mx.array(block))
            start += len(block)
        hidden = self.drafter(self.borrowed.embed(mx.concatenate(blocks)), segments)
        if not any(counts):
            return [[] for _ in sessions]
        unknown = mx.concatenate([hidden[segment.start + 1 : segment.stop] for segment in segments])
        guesses = self.borrowed.tokens(draw_positions(self.borrowed.logits(unknown), sessions, counts)).tolist()
        return [[guesses.pop(0) for _ in range(count)] for count in counts]

    def _unknown(self, session: CausalSession, count: int) -> list[int]:
        """What stands where the tokens are not known yet."""
        mask = self.drafter.config.mask_token_id
        if mask is not None:
            return [mask] * count
        noise: list[int] = session.draws.step(0, 0, 0, len(session.tokens), count).initial.tolist()
        return noise
