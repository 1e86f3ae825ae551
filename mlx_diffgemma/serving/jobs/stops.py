"""Stop strings in a text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class Stops:
    """Shows text up to the first of some stop strings.

    Text that may be the beginning of a stop string is held back until this is known.  ``found``
    says whether a stop string has come.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.found = False
        self._held = ""

    def feed(self, text: str, last: bool) -> str:
        """Take in ``text`` and return what can be shown.  With ``last``, no more text follows."""
        if self.found:
            return ""
        self._held += text
        # The stop string that is complete first ends the text, so that the result does not depend
        # on how the text was cut into pieces.
        ends = []
        for stop in self.stops:
            start = self._held.find(stop)
            if start >= 0:
                ends.append((start + len(stop), start))
        if ends:
            self.found = True
            return self._held[: min(ends)[1]]
        shown = len(self._held) - (0 if last else self._undecided())
        text = self._held[:shown]
        self._held = self._held[shown:]
        return text

    def _undecided(self) -> int:
        """The number of characters at the end that may begin a stop string."""
        longest = 0
        for stop in self.stops:
            # A stop string may be as long as a body, but what is held is as short as a canvas.
            for size in range(1, min(len(stop), len(self._held) + 1)):
                if self._held.endswith(stop[:size]):
                    longest = max(longest, size)
        return longest
