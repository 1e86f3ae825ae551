"""The prefix cache: encoded prompts that later prompts with the same beginning reuse.

A copy is kept at the end of a prompt, at the end of a committed canvas, and where a prompt first
differs from an earlier one, for example after a system message that many prompts share.  A cache
can only continue from one of these positions.

    >>> prefixes = PrefixCache(Cache(config.text), budget=2**30)
    >>> cache, border = prefixes.begin(ids)
    >>> prefixes.keep(ids, cache)          # when the cache holds them
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Sequence

import numpy as np

from mlx_diffgemma.model.cache import Cache

LEAST = 32  # a copy is kept where two prompts differ if they share at least this many tokens
COMPARED = 64  # a new prompt is compared with this many of the latest ones


class PrefixCache:
    """Copies of caches, found by the ids they hold (``prompt.cache_key``).

    They take at most ``budget`` bytes.  The least recently used copies are evicted first.

    Each ``scope`` is separate: a copy of one scope is never found in another and changes nothing
    there.  Otherwise the number of reused tokens would reveal what others have asked.

    An array that several copies share is counted for each of them.  So the memory in use is never
    more than the count.
    """

    def __init__(self, empty: Cache, budget: int) -> None:
        self.empty, self.budget, self.nbytes = empty, budget, 0
        self._kept: OrderedDict[bytes, Cache] = OrderedDict()
        self._lengths: Counter[int] = Counter()
        self._prompts: deque[tuple[bytes, np.ndarray]] = deque(maxlen=COMPARED)

    def __len__(self) -> int:
        return len(self._kept)

    def begin(
        self, ids: Sequence[int], whole: bool = True, scope: bytes = b""
    ) -> tuple[Cache, int]:
        """Find the longest kept prefix of ``ids``.

        It never leaves a single token: a forward of one row uses other kernels and rounds
        differently.

        Args:
            ids: The keys of a prompt.
            whole: Whether the prefix may hold all of the ids.
            scope: The scope of the request.

        Returns:
            (a cache that holds the prefix; the position at which encoding should pause to ``keep``
            a prefix that many prompts share, 0 for none).
        """
        own = np.array(ids, dtype=np.int64)
        cache = self.empty.copy()
        for length in sorted(self._lengths, reverse=True):
            key = scope + own[:length].tobytes()
            if (length <= own.size - 2 or (whole and length == own.size)) and key in self._kept:
                self._kept.move_to_end(key)
                cache = self._kept[key].copy()
                break
        shared = max(
            (_common(own, other) for whose, other in self._prompts if whose == scope), default=0
        )
        self._prompts.append((scope, own))
        shared = min(shared, own.size - 2)
        return cache, shared if self.budget and shared >= max(LEAST, cache.length + 2) else 0

    def keep(self, ids: Sequence[int], cache: Cache, scope: bytes = b"") -> None:
        """Keep a copy of a cache.

        Args:
            ids: The keys of a prompt.
            cache: Holds the first of ``ids``: as many as it is long.
            scope: The scope of the request.
        """
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
        """Evict the least recently used copies until at most ``nbytes`` are kept."""
        while self.nbytes > nbytes:
            _, oldest = self._kept.popitem(last=False)
            self.nbytes -= oldest.nbytes
            self._lengths[oldest.length] -= 1
            if not self._lengths[oldest.length]:
                del self._lengths[oldest.length]


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """The length of the common prefix of the two arrays."""
    size = min(a.size, b.size)
    differ = a[:size] != b[:size]
    return int(differ.argmax()) if differ.any() else size
