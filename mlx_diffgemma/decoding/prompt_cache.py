"""The prompt cache of one conversation: the next prompt does not encode the common prefix again.

A cache is only rewound to a snapshot: the end of a prompt, or the end of a committed canvas.
Prompts are compared by ids, and at the positions of an image by the image's content
(``prompt.cache_key``).  So it does not matter how a prompt was made.  The common prefix ends where a
chat has dropped a thought from its history.

    >>> cache = PromptCache(model)
    >>> for prompt in turns:
    ...     generate(model, tokenizer, prompt, prompt_cache=cache)
    >>> cache.encoded          # tokens the last prompt had to encode
"""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_diffgemma.bounded_json import parse_json
from mlx_diffgemma.checkpoint import fingerprint
from mlx_diffgemma.digests import digest
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.files import expand_path
from mlx_diffgemma.model.cache import Cache, Snapshot
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma

DEFAULT_BUDGET = 2 * 2**30  # the most bytes of snapshots


class Holder(Protocol):
    """The session that appends to a cache."""

    finished: bool
    pending: np.ndarray


class PromptCache:
    """The cache of one conversation, with its ids and its snapshots.

    ``budget`` bounds the bytes of the snapshots.  The newest snapshot is always kept; older ones
    are dropped when the budget is exceeded.  ``encoded`` and ``reused`` count the tokens of the
    last prompt.  If a prompt begins before the answer to another one is complete, each continues
    with a cache of its own, and the later one is kept.
    """

    def __init__(self, model: DiffusionGemma, budget: int = DEFAULT_BUDGET):
        self.budget = budget
        self.cache = Cache(model.config.text)
        self.ids: list[int] = []
        self.snapshots: list[Snapshot] = []
        self.encoded = 0
        self.reused = 0
        self._owner = _Owner(model)
        self._holder: weakref.ref[Holder] | None = None

    @property
    def model_id(self) -> str:
        """The digest of everything about the model that decides the K/V of the ids held here."""
        return self._owner.model_id(self._has_images)

    @property
    def _has_images(self) -> bool:
        return any(key < 0 for key in self.ids)

    def begin(self, model: DiffusionGemma, ids: Sequence[int], holder: Holder) -> Cache:
        """Rewind the cache to the longest snapshot that ``ids`` begin with.

        It never leaves a single token to encode: a forward of one row uses other kernels and rounds
        differently.

        Args:
            model: The model whose K/V the cache holds.
            ids: The keys of a prompt.
            holder: The session that will append to the cache.

        Returns:
            The cache.  The ids that it does not hold are still to be encoded.

        Raises:
            UserError: The cache was made with another model.
        """
        if not self._owner.is_same(model, self._has_images):
            raise UserError("This prompt cache was made with another model; make a new one.")
        if self._is_held():
            self.cache = self.cache.copy()
        self._holder = weakref.ref(holder)
        common = next(
            (i for i, (a, b) in enumerate(zip(self.ids, ids, strict=False)) if a != b),
            min(len(self.ids), len(ids)),
        )
        fitting = [s for s in self.snapshots if s.length <= common and len(ids) - s.length != 1]
        if fitting:
            self.snapshots = fitting
            self.cache.restore(fitting[-1])
        else:
            self.snapshots = []
            self.cache = Cache.like(self.cache)
        self.reused = self.cache.length
        self.encoded = len(ids) - self.reused
        self.ids = list(ids[: self.reused])
        return self.cache

    def _is_held(self) -> bool:
        """Whether another session may still append to the cache."""
        holder = self._holder() if self._holder else None
        return holder is not None and not (holder.finished and not holder.pending.size)

    def reached(self, ids: Sequence[int], cache: Cache) -> None:
        """Keep a snapshot of ``cache``, which now holds ``ids`` up to the end of a prompt or of a
        committed canvas.
        """
        if cache is not self.cache:  # another prompt took over meanwhile
            return
        if self.snapshots and self.snapshots[-1].length == self.cache.length:
            return
        self.ids = list(ids)
        self.snapshots.append(self.cache.snapshot())
        while len(self.snapshots) > 1 and sum(s.nbytes for s in self.snapshots) > self.budget:
            self.snapshots.pop(0)

    def save(self, path: Path | str, tokenizer: TokenizerWrapper) -> None:
        """Write the state of the last snapshot to ``path``.

        Raises:
            UserError: Nothing was encoded yet, or ``path`` cannot be written.
        """
        if not self.snapshots:
            raise UserError("The prompt cache is empty; there is nothing to save.")
        twin = self.cache.copy()
        twin.restore(self.snapshots[-1])
        ids = self.ids[: twin.length]
        metadata = {
            "model": self._owner.model_id(any(key < 0 for key in ids)),
            "tokenizer": tokenizer_fingerprint(tokenizer),
            "ids": json.dumps(ids),
        }
        twin.save(expand_path(path), metadata)

    @classmethod
    def load(
        cls, path: Path | str, model: DiffusionGemma, tokenizer: TokenizerWrapper
    ) -> PromptCache:
        """Read a cache that ``save`` wrote.

        Args:
            path: The file.
            model: The model whose K/V it holds.
            tokenizer: The model's tokenizer.

        Raises:
            UserError: The file is damaged, or belongs to another model, adapter, precision or
                tokenizer.
        """
        made = cls(model)
        made.cache, metadata = Cache.load(expand_path(path), model.config.text)
        made.ids = _ids(metadata.get("ids", ""), made.cache.length, path)
        if metadata.get("model") != made.model_id:
            raise UserError(
                f"{path} was made with another model, adapter or precision; delete it, or name another file."
            )
        if metadata.get("tokenizer") != tokenizer_fingerprint(tokenizer):
            raise UserError(
                f"{path} was made with another tokenizer; delete it, or name another file."
            )
        made.snapshots = [made.cache.snapshot()]
        return made


class _Owner:
    """The model whose K/V a cache holds, with its weights at that time.

    Weights are compared by identity, and by content if the identity differs.
    """

    def __init__(self, model: DiffusionGemma):
        self.structure = fingerprint.structure(model)
        self.text, self.tower = fingerprint.weights(model)
        self._digests: dict[bool, str] = {}

    def is_same(self, model: DiffusionGemma, with_tower: bool) -> bool:
        other = _Owner(model)
        if self.structure != other.structure:
            return False
        if _identical(self.text, other.text) and _identical(self.tower, other.tower):
            return True
        return self.model_id(with_tower) == other.model_id(with_tower)

    def model_id(self, with_tower: bool) -> str:
        """The digest of the model.  ``with_tower`` includes the vision tower: a gigabyte to read,
        needed only if images were encoded.
        """
        if with_tower not in self._digests:
            tensors = [*self.text, *self.tower] if with_tower else self.text
            self._digests[with_tower] = digest(tensors, self.structure)
        return self._digests[with_tower]


def _identical(one: fingerprint.Named, other: fingerprint.Named) -> bool:
    return len(one) == len(other) and all(
        name == name2 and array is array2
        for (name, array), (name2, array2) in zip(one, other, strict=True)
    )


def _ids(text: str, length: int, path: Path | str) -> list[int]:
    ids = parse_json(text, f"The list of tokens in {path}")
    if not isinstance(ids, list) or not all(type(key) is int for key in ids) or len(ids) != length:
        raise UserError(
            f"{path} is damaged: it should name the {length} tokens it holds; delete it, or name another file."
        )
    return ids


def tokenizer_fingerprint(tokenizer: TokenizerWrapper) -> str:
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
