"""The features of everything that the target has read, cached for each session."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from drafter.head import TargetHead
from drafter.model import DraftNetwork
from mlx_diffgemma.model.cache import Cache
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.sampling.protocols import HasDraft, Taps


class FeatureCaches:
    """Keeps a cache of features in each session's ``draft``.

    Drafting left to right and drafting canvases share it.
    """

    def __init__(self, drafter: DraftNetwork, target: DiffusionGemma):
        self.drafter = drafter
        self.head = TargetHead(target, drafter)

    @property
    def taps(self) -> Sequence[int]:
        return self.drafter.config.taps

    def begin(self) -> Cache:
        return Cache(self.drafter.config)

    def read(self, sessions: Sequence[HasDraft], taps: Sequence[Taps]) -> None:
        """Append the features of the target's hidden states ``taps`` to each session's cache."""
        caches = [session.draft for session in sessions]
        features = [self.drafter.features(hidden_states) for hidden_states in taps]
        self.drafter.append_features(features, caches)
        mx.eval([array for cache in caches for array in cache.arrays])
