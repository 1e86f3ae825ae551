"""What prompts left in the cache, for prompts that begin alike, whoever they come from.

A cache can only go on from where it was kept: the end of a prompt, the end of a committed canvas, and the place at which a prompt
parted from an earlier one, such as the end of a system message that many share.

    >>> prefixes = Prefixes(Cache(config.text), budget=2**30)
    >>> cache, border = prefixes.begin(ids)
    >>> prefixes.keep(ids, cache)          # when the cache holds them
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Sequence

import numpy as np

from mlx_diffgemma.cache import Cache

LEAST = 32  # tokens that two prompts must have in common before the place where they part is kept
COMPARED = 64  # prompts, the latest, with which a new one is compared


class Prefixes:
    """Copies of caches by the ids they hold (``prompt.keyed``), at most ``budget`` bytes of them; those used longest ago go first.

    Of each ``scope`` apart: what one has left is never found, and changes nothing, in another.  Else the tokens that a prompt was
    spared would tell what others have asked.

    Arrays that copies share are counted once for each, so that less is used than is counted, never more.
    """

    def __init__(self, empty: Cache, budget: int) -> None:
        self.empty, self.budget, self.nbytes = empty, budget, 0
        self._kept: OrderedDict[bytes, Cache] = OrderedDict()
        self._lengths: Counter[int] = Counter()
        self._prompts: deque[tuple[bytes, np.ndarray]] = deque(maxlen=COMPARED)

    def __len__(self) -> int:
        return len(self._kept)

    def begin(self, ids: Sequence[int], whole: bool = True, scope: bytes = b"") -> tuple[Cache, int]:
        """(A cache with the longest beginning of ``ids`` that is kept, all of them only where ``whole``; where reading should pause
        to ``keep`` what many share, 0 for nowhere).

        Never so much that a single token remains, which would take other kernels and round differently.
        """
        own = np.array(ids, dtype=np.int64)
        cache = self.empty.copy()
        for length in sorted(self._lengths, reverse=True):
            key = scope + own[:length].tobytes()
            if (length <= own.size - 2 or (whole and length == own.size)) and key in self._kept:
                self._kept.move_to_end(key)
                cache = self._kept[key].copy()
                break
        shared = max((_common(own, other) for whose, other in self._prompts if whose == scope), default=0)
        self._prompts.append((scope, own))
        shared = min(shared, own.size - 2)
        return cache, shared if self.budget and shared >= max(LEAST, cache.length + 2) else 0

    def keep(self, ids: Sequence[int], cache: Cache, scope: bytes = b"") -> None:
        """``cache`` holds as many of ``ids`` as it is long."""
        key = scope + np.array(ids[: cache.length], dtype=np.int64).tobytes()
        if key in self._kept:
            self._kept.move_to_end(key)
            return
        if not cache.length or cache.nbytes > self.budget:
            return
        self._kept[key] = twin = cache.copy()
        self._lengths[twin.length] += 1
        self.nbytes += twin.nbytes
        self.shrink(self.budget)

    def shrink(self, nbytes: int) -> None:
        """Give up those used longest ago until no more than ``nbytes`` are kept."""
        while self.nbytes > nbytes:
            _, oldest = self._kept.popitem(last=False)
            self.nbytes -= oldest.nbytes
            self._lengths[oldest.length] -= 1
            if not self._lengths[oldest.length]:
                del self._lengths[oldest.length]


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many entries the two begin with alike."""
    size = min(a.size, b.size)
    differ = a[:size] != b[:size]
    return int(differ.argmax()) if differ.any() else size
