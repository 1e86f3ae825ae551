"""How clients share the scheduler: who gets the next slot, and which slots take the next step.

A denoising step takes about as long as it has canvases.  So each client has the same number of
canvases in a step, whatever number of answers it asks for.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from mlx_diffgemma.decoding.job import Run, Slot

CLIENTS = 1000  # the number of clients whose last slot is remembered
# Seconds for which a client counts as asking after its answer has ended.  Most ask again, and
# would otherwise wait for a step that was begun meanwhile with all slots of another client.
RECENT = 2.0


class Shares:
    """Decides which client is next."""

    def __init__(self) -> None:
        # By client: when it last had ready slots, and how many.
        self._asking: dict[str, tuple[float, int]] = {}
        self._encoded: dict[str, int] = {}  # by client, the step in which a prompt was encoded
        self._served: dict[str, int] = {}  # by client, the number of its last slot
        self._granted = 0  # slots so far

    def priority(self, run: Run, held: Counter[str]) -> tuple[int, int]:
        """Smallest for the run that gets the next slot.

        The client that holds the fewest slots comes first; of equals, the one that got its last
        slot first.
        """
        client = run.job.client
        return held[client], self._served.get(client, 0)

    def granted(self, client: str) -> None:
        """Note that ``client`` got a slot."""
        self._granted += 1
        self._served.pop(client, None)
        self._served[client] = self._granted
        while len(self._served) > CLIENTS:
            self._served.pop(next(iter(self._served)))

    def next_prompt(self, reading: Sequence[Slot]) -> Slot:
        """The slot whose prompt is encoded next.  Its client is the one that waited longest."""
        return min(reading, key=lambda slot: self._encoded.get(slot.run.job.client, -1))

    def encoded(self, taken: Iterable[Slot], left: Iterable[Slot], step: int) -> None:
        """Note which prompts were encoded in a step.

        Args:
            taken: The slots whose prompts were encoded.
            left: The slots whose prompts still wait.
            step: The number of the scheduler step.
        """
        now = {slot.run.job.client for slot in taken}
        reading = now | {slot.run.job.client for slot in left}
        self._encoded = {
            client: earlier for client, earlier in self._encoded.items() if client in reading
        }
        self._encoded |= dict.fromkeys(now, step)

    def choose(self, ready: Sequence[Slot]) -> list[Slot]:
        """The slots that take the next denoising step, in their order.

        Each client has as many as the client with the fewest, those first whose last step is
        longest ago.  A client whose answer ended less than RECENT seconds ago counts with the
        slots it had.
        """
        now = time.monotonic()
        by_client: dict[str, list[Slot]] = {}
        for slot in ready:
            by_client.setdefault(slot.run.job.client, []).append(slot)
        self._asking = {
            client: asked for client, asked in self._asking.items() if now - asked[0] < RECENT
        }
        self._asking |= {client: (now, len(slots)) for client, slots in by_client.items()}
        each = min((count for _, count in self._asking.values()), default=0)
        chosen = set[int]()
        for slots in by_client.values():
            chosen.update(id(slot) for slot in sorted(slots, key=_last_step)[:each])
        return [slot for slot in ready if id(slot) in chosen]


def surplus(
    ready: Sequence[Slot], held: Counter[str], waiting: Collection[str], places: int
) -> list[Slot]:
    """The slots that clients with more than their share give up when the batch is full.

    Args:
        ready: the slots that could be given up.
        held: the number of slots by client.
        waiting: the clients that wait for a slot.
        places: the number of slots there are.

    Returns:
        Slots for the waiting clients that have less than their share, those between two canvases
        first.
    """
    left = Counter(held)
    share = max(1, places // len(waiting | left.keys()))
    wanted = sum(left[client] < share for client in waiting)
    given_up = list[Slot]()
    for slot in sorted(ready, key=lambda slot: slot.session.canvas is not None):
        client = slot.run.job.client
        if wanted and left[client] > share:
            given_up.append(slot)
            left[client] -= 1
            wanted -= 1
    return given_up


def _last_step(slot: Slot) -> int:
    return slot.last_step
