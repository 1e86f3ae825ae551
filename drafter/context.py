"""What a drafter knows of an answer: the features of all that the target has read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import mlx.core as mx

from drafter.model import Borrowed, Drafter
from mlx_diffgemma.cache import Cache
from mlx_diffgemma.drafting import Taps
from mlx_diffgemma.model import DiffusionGemma


class HasDraft(Protocol):
    draft: Any


class Reader:
    """The part that drafting left to right and drafting canvases share: a cache of features in each session's ``draft``."""

    def __init__(self, drafter: Drafter, target: DiffusionGemma):
        self.drafter, self.borrowed = drafter, Borrowed(target, drafter)

    @property
    def taps(self) -> Sequence[int]:
        return self.drafter.config.taps

    def begin(self) -> Cache:
        return Cache(self.drafter.config)

    def read(self, sessions: Sequence[HasDraft], taps: Sequence[Taps]) -> None:
        caches = [session.draft for session in sessions]
        self.drafter.absorb([self.drafter.features(own) for own in taps], caches)
        mx.eval([array for cache in caches for array in cache.arrays])
