"""Prefix reuse: what one prompt left in the cache, the next prompt that begins alike does not encode again.

A cache is only rewound to a snapshot: the end of a prompt, or the end of a committed canvas.  Histories are compared by
ids, at the places of an image by its content (``prompt.keyed``), so it does not matter how they came about; thoughts that a
chat drops from its history simply end the common prefix.

    >>> cache = PromptCache(model)
    >>> for prompt in turns:
    ...     generate(model, tokenizer, prompt, prompt_cache=cache)
    >>> cache.encoded          # tokens the last prompt had to encode
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_diffgemma.cache import Cache, Snapshot
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.model import DiffusionGemma

DEFAULT_BUDGET = 2 * 2**30  # bytes of snapshots


class PromptCache:
    """The cache of one conversation, its ids and its snapshots; ``budget`` bounds the bytes of the snapshots.

    The newest snapshot is always kept; older ones go when the budget is passed.  ``encoded`` and ``reused`` count the
    tokens of the last prompt.
    """

    def __init__(self, model: DiffusionGemma, budget: int = DEFAULT_BUDGET):
        self.budget = budget
        self.cache = Cache(model.config.text)
        self.ids: list[int] = []
        self.snapshots: list[Snapshot] = []
        self.encoded = self.reused = 0
        self.model_id = fingerprint(model)

    def begin(self, model: DiffusionGemma, ids: Sequence[int]) -> Cache:
        """The cache, rewound to the last snapshot on the way of ``ids``; what lies behind is to be encoded.

        Never so far that a single token remains, which would take other kernels and round differently.  Errors: UserError
        for another model.
        """
        if fingerprint(model) != self.model_id:
            raise UserError("This prompt cache was made with another model; make a new one.")
        common = next((i for i, (a, b) in enumerate(zip(self.ids, ids, strict=False)) if a != b), min(len(self.ids), len(ids)))
        fitting = [s for s in self.snapshots if s.length <= common and len(ids) - s.length != 1]
        if fitting:
            self.snapshots = fitting
            self.cache.restore(fitting[-1])
        else:
            self.snapshots, self.cache = [], Cache.like(self.cache)
        self.reused = self.cache.length
        self.encoded = len(ids) - self.reused
        self.ids = list(ids[: self.reused])
        return self.cache

    def reached(self, ids: Sequence[int]) -> None:
        """The cache holds ``ids`` now, the end of a prompt or of a committed canvas: keep a snapshot of it."""
        if self.snapshots and self.snapshots[-1].length == self.cache.length:
            return
        self.ids = list(ids)
        self.snapshots.append(self.cache.snapshot())
        while len(self.snapshots) > 1 and sum(s.nbytes for s in self.snapshots) > self.budget:
            self.snapshots.pop(0)

    def save(self, path: Path | str, tokenizer: TokenizerWrapper) -> None:
        """Write the state at the last snapshot.  Errors: UserError when nothing was encoded yet, or ``path`` cannot be written."""
        if not self.snapshots:
            raise UserError("The prompt cache is empty; there is nothing to save.")
        twin = self.cache.copy()
        twin.restore(self.snapshots[-1])
        metadata = {"model": self.model_id, "tokenizer": tokenizer_fingerprint(tokenizer),
                    "ids": json.dumps(self.ids[: twin.length])}
        try:
            twin.save(path, metadata)
        except (OSError, RuntimeError) as error:
            raise UserError(f"{path} cannot be written ({error}).") from None

    @classmethod
    def load(cls, path: Path | str, model: DiffusionGemma, tokenizer: TokenizerWrapper) -> PromptCache:
        """Errors: UserError for a file that is damaged, or of another model or tokenizer."""
        made = cls(model)
        made.cache, metadata = Cache.load(path, model.config.text)
        if metadata.get("model") != made.model_id:
            raise UserError(f"{path} was made with another model; make it anew.")
        if metadata.get("tokenizer") != tokenizer_fingerprint(tokenizer):
            raise UserError(f"{path} was made with another tokenizer; make it anew.")
        made.ids = json.loads(metadata.get("ids", "[]"))
        if len(made.ids) != made.cache.length:
            raise UserError(f"{path} is damaged: it names {len(made.ids)} tokens and holds {made.cache.length}; make it anew.")
        made.snapshots = [made.cache.snapshot()]
        return made


def fingerprint(model: DiffusionGemma) -> str:
    """Of shapes, dtype and a few weights: two models that share it are one for all that matters to a cache."""
    text = hashlib.sha256(repr((model.config.text, model.dtype)).encode())
    layer = model.model.decoder.layers[0]
    few = [model.model.decoder.norm.weight, layer.router.scale, layer.input_layernorm.weight, layer.self_attn.k_norm.weight,
           layer.self_attn.k_proj.weight[0]]
    if model.config.vision:
        few.append(model.model.encoder.vision_tower.encoder.layers[-1].input_layernorm.weight)  # small: it alone is read for this
    for array in few:
        text.update(np.array(array.astype(mx.float32)).tobytes())
    return text.hexdigest()


def tokenizer_fingerprint(tokenizer: TokenizerWrapper) -> str:
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
