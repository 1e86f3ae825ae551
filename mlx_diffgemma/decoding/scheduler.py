"""The scheduler: jobs come in, their sessions share forwards, and each leaves when it is done.

A scheduler step encodes one chunk of the prompts that are being read and takes one denoising step
of the canvases.  So a long prompt delays the others by one chunk at a time.  Sessions join between
two of their own canvases.  A job that fails or is cancelled gives up its slots at the next step and
affects no other.

    >>> queue = RunQueue()
    >>> scheduler = Scheduler(model, queue, SchedulerLimits())
    >>> queue.append(Run(job))
    >>> while scheduler.has_work:
    ...     scheduler.step()
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from mlx.utils import tree_flatten

from mlx_diffgemma.decoding.job import ClosedError, Run, RunQueue, Slot, SlotState
from mlx_diffgemma.decoding.loop import Loop
from mlx_diffgemma.decoding.prefill import encode_chunk
from mlx_diffgemma.decoding.prefix_cache import PrefixCache
from mlx_diffgemma.decoding.records import CanvasStep
from mlx_diffgemma.decoding.session import Session
from mlx_diffgemma.decoding.shares import Shares, surplus
from mlx_diffgemma.device import memory_limit
from mlx_diffgemma.errors import NonFiniteLogitsError
from mlx_diffgemma.estimate import cost
from mlx_diffgemma.media.prompt import cache_key, next_chunk
from mlx_diffgemma.model.cache import Cache
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SchedulerLimits:
    """The limits of a scheduler.

    Attributes:
        max_batch: The most sessions that run at once.  Fewer run if memory does not hold them.
        prefill_step_size: Prompt positions that are encoded per step.
        prefix_bytes: The most bytes of the prefix cache.
    """

    max_batch: int = 8
    prefill_step_size: int = 512
    prefix_bytes: int = 2 * 2**30


@dataclass
class Stats:
    """What the scheduler has done since it started.  Other threads read it."""

    scheduler_steps: int = 0
    steps: int = 0  # denoising steps, of all slots
    encoded: int = 0  # prompt tokens
    reused: int = 0  # prompt tokens that were cached
    rows: int = 0  # slots that are taken now
    waiting: int = 0  # jobs that have not begun
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    seconds: float = 0.0  # from the first to the last step, summed over finished jobs


class Scheduler:
    """Runs the jobs of ``queue``.  It belongs to one thread; see ``RunQueue`` for others.

    ``slots`` holds the sessions in the batch, by id.  Slots in the same state are in the order of
    their turns.  ``on_failure`` is called with the error of each job that fails.
    """

    def __init__(
        self,
        model: DiffusionGemma,
        queue: RunQueue,
        limits: SchedulerLimits,
        stats: Stats | None = None,
    ) -> None:
        self.model = model
        self.queue = queue
        self.limits = limits
        self.stats = stats or Stats()
        self.slots: dict[int, Slot] = {}
        self.prefix_cache = PrefixCache(Cache(model.config.text), limits.prefix_bytes)
        self.longest_step = 0.0  # seconds of the longest recent step
        weights = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
        self.room = memory_limit() - weights  # bytes for caches
        self.on_failure: Callable[[Exception], None] = lambda _: None
        self._shares = Shares()
        self._loop = Loop(model, (), limits.prefill_step_size)

    @property
    def has_work(self) -> bool:
        return bool(self.queue or self.slots)

    def step(self) -> None:
        """Admit, encode a chunk, take a denoising step, deliver it, and retire what has ended.

        A job that raises, or whose logits are not finite, ends alone.

        Raises:
            Exception: a bug, or a device out of memory.  The running jobs are lost: call
                ``drop_all`` before the next step.
        """
        began = time.monotonic()
        self._drop_cancelled()
        self._admit()
        self._prefill()
        for session, step in self._advance():
            self._deliver(session, step)
        self._retire()
        self._share()
        self.longest_step = max(time.monotonic() - began, 0.9 * self.longest_step)
        self.stats.scheduler_steps += 1
        self.stats.rows = len(self.slots)

    def finish(self, run: Run, error: Exception | None) -> None:
        """Free what the run holds, and notify its job."""
        for slot in [slot for slot in self.slots.values() if slot.run is run]:
            del self.slots[id(slot.session)]
        self.queue.discard(run)
        if error is None:
            self.stats.finished += 1
            self.stats.seconds += time.perf_counter() - run.began
        elif run.job.cancelled:
            self.stats.cancelled += 1
        else:
            self.stats.failed += 1
            self.on_failure(error)
        tell(run, error)

    def drop_all(self, error: Exception, running: bool = False) -> None:
        """End every run with ``error``.  With ``running``, end only those that have begun."""
        queued = [run for run in self.queue.snapshot() if run.has_begun or not running]
        runs = [*(slot.run for slot in self.slots.values()), *queued]
        for run in dict.fromkeys(runs):
            self.finish(run, error)
        self.slots.clear()
        self.stats.rows = 0
        self._loop = Loop(self.model, (), self.limits.prefill_step_size)

    def _drop_cancelled(self) -> None:
        runs = [*self.queue.snapshot(), *(slot.run for slot in self.slots.values())]
        for run in dict.fromkeys(run for run in runs if run.job.cancelled):
            self.finish(run, ClosedError("The request was cancelled."))

    # Admission

    def _admit(self) -> None:
        """Give free slots to runs in turn, one at a time."""
        had_their_turn = list[Run]()
        while len(self.slots) < self.limits.max_batch:
            run = self.queue.take(partial(self._shares.priority, held=self._held()))
            if run is None:
                break
            if not run.todo:
                if not self._next_round(run):
                    continue
                if not run.todo:
                    had_their_turn.append(run)
                    continue
            slot = run.todo.popleft()
            slot.nbytes = self._needed_bytes(slot.session)
            if not self._fits(slot):
                run.todo.appendleft(slot)
                self.queue.append_left(run)
                break  # until others have left
            if run.todo:
                self.queue.append(run)
            self._shares.granted(run.job.client)
            self._place(slot)
        for run in had_their_turn:
            self.queue.append(run)
        self.stats.waiting = len(self.queue.waiting())

    def _held(self) -> Counter[str]:
        """The number of slots by client."""
        return Counter(slot.run.job.client for slot in self.slots.values())

    def _next_round(self, run: Run) -> bool:
        """Ask the job for its next sessions; False where it has ended."""
        try:
            if run.rounds is None:
                run.began = time.perf_counter()
                run.rounds = run.job.rounds(self.model)
            sessions = next(run.rounds, None)
        except Exception as error:  # affects this request alone
            self.finish(run, error)
            return False
        if sessions is None:
            self.finish(run, None)
            return False
        run.todo.extend(Slot(run, session) for session in sessions)
        run.unfinished = len(run.todo)
        return True

    def _needed_bytes(self, session: Session) -> int:
        config = self.model.config
        length = len(session.ids) + max(session.max_tokens, config.canvas_length)
        return cost.run_bytes(config, 0, length, self.model.dtype.size)

    def _fits(self, slot: Slot) -> bool:
        """Whether the slot fits in memory, after evicting cached prefixes.  A single slot always
        fits.
        """
        needed = slot.nbytes + sum(other.nbytes for other in self.slots.values())
        for run in [slot.run, *self.queue.snapshot()]:
            needed += sum(waiting.session.held_bytes for waiting in run.todo)
        self.prefix_cache.shrink(max(0, self.room - needed))
        return not self.slots or needed <= self.room

    def _place(self, slot: Slot) -> None:
        """Put a session into the batch."""
        session = slot.session
        was_parked = slot.state is SlotState.PARKED
        if was_parked or session.canvases or session.canvas is not None:
            self._set_ready(slot)
            return
        if not session.cache.length and not session.policy.drafter:
            slot.shareable = True
            cache, slot.boundary = self.prefix_cache.begin(
                cache_key(session.ids, session.images),
                whole=not session.wants_next,
                scope=slot.run.job.scope,
            )
            session.use_cache(cache)
            self.stats.reused += cache.length
        if session.pending.size:
            session.reserve()
            self._set_last(slot, SlotState.READING)
        else:
            self._set_ready(slot)

    def _set_last(self, slot: Slot, state: SlotState) -> None:
        """Set the state of a slot, and put it after all others in that state."""
        slot.state = state
        self.slots.pop(id(slot.session), None)
        self.slots[id(slot.session)] = slot

    def _set_ready(self, slot: Slot) -> None:
        """Mark the slot as ready: its prompt is in the cache."""
        self._set_last(slot, SlotState.READY)
        if slot.session.finished:
            self._leave(slot)

    def _in_state(self, state: SlotState) -> list[Slot]:
        return [slot for slot in self.slots.values() if slot.state is state]

    # Prompts

    def _prefill(self) -> None:
        """Encode one chunk of the prompt whose turn it is, and of others that fit in the chunk."""
        taken, sizes = self._next_chunk()
        if not taken:
            return
        began = time.perf_counter()
        encode_chunk(self.model, [slot.session for slot in taken], sizes)
        seconds = time.perf_counter() - began
        self._shares.encoded(taken, self._in_state(SlotState.READING), self.stats.scheduler_steps)
        self.stats.encoded += sum(sizes)
        for slot in taken:
            session = slot.session
            session.prefill_seconds += seconds
            at_boundary = session.cache.length in (slot.boundary, session.repeated)
            if slot.shareable and (not session.pending.size or at_boundary):
                self._keep_prefix(slot)
            if session.pending.size:
                self._set_last(slot, SlotState.READING)
            else:
                self._set_ready(slot)

    def _next_chunk(self) -> tuple[list[Slot], list[int]]:
        """The slots whose prompts are encoded in this step, and the number of positions of each."""
        taken = list[Slot]()
        sizes = list[int]()
        left = self.limits.prefill_step_size
        reading = self._in_state(SlotState.READING)
        while reading:
            slot = self._shares.next_prompt(reading)
            size = self._chunk_size(slot)
            if taken and size > left:
                break
            reading.remove(slot)
            taken.append(slot)
            sizes.append(size)
            left -= size
        return taken, sizes

    def _chunk_size(self, slot: Slot) -> int:
        """The number of prompt positions to encode next.

        A chunk ends at the boundary of the shared part, and at the position from which the next
        turn of the conversation continues, so that the caches there can be kept.
        """
        session = slot.session
        size = next_chunk(
            session.pending.size,
            session.cache.length,
            session.images,
            self.limits.prefill_step_size,
        )
        boundaries = [slot.boundary]
        if slot.shareable and self.prefix_cache.budget:
            boundaries.append(session.repeated)
        for boundary in sorted(boundaries):
            ahead = boundary - session.cache.length
            splits_image = any(image.start < boundary < image.stop for image in session.images)
            if 1 < ahead < size and not splits_image:
                return ahead
        return size

    def _keep_prefix(self, slot: Slot) -> None:
        session = slot.session
        ids = cache_key(session.ids, session.images)
        self.prefix_cache.keep(ids, session.cache, slot.run.job.scope)

    # Canvases

    def _advance(self) -> Sequence[tuple[Session, CanvasStep]]:
        """Take one denoising step.  If a session has non-finite logits, only its own job ends."""
        chosen = self._shares.choose(self._in_state(SlotState.READY))
        for slot in chosen:
            slot.last_step = self.stats.scheduler_steps
        self._loop.sessions = [slot.session for slot in chosen]
        while self._loop.active:
            try:
                return self._loop.advance()
            except NonFiniteLogitsError as error:
                if not error.sessions:
                    raise
                for session in error.sessions:
                    failed = self.slots.get(id(session))
                    if failed is not None:
                        self.finish(failed.run, error)
                self._loop.sessions = [
                    session for session in self._loop.sessions if id(session) in self.slots
                ]
        return []

    def _deliver(self, session: Session, step: CanvasStep) -> None:
        """Pass a step to the job of its session."""
        slot = self.slots.get(id(session))
        if slot is None:  # its job failed at another of its sessions
            return
        self.stats.steps += 1
        try:
            slot.run.job.step(session, step)
        except Exception as error:  # affects this request alone
            self.finish(slot.run, error)
            return
        if session.finished:
            if slot.shareable:
                self._keep_prefix(slot)
            self._leave(slot)

    def _retire(self) -> None:
        """Drop the sessions that their job ended in a step in which they took no part."""
        self._loop.sessions = []  # an ended session is not kept alive
        for slot in self._in_state(SlotState.READY):
            if slot.session.finished:
                self._leave(slot)

    def _leave(self, slot: Slot) -> None:
        """Remove a session that has ended.  After the last one of its round, the job continues."""
        del self.slots[id(slot.session)]
        slot.run.unfinished -= 1
        if not slot.run.unfinished and self._next_round(slot.run):
            self.queue.append_left(slot.run)

    def _share(self) -> None:
        """If the batch is full and another client waits, take slots from clients that have more
        than their share.  Their sessions continue later, as if they had not been interrupted.
        """
        waiting = {run.job.client for run in self.queue.snapshot()}
        if not waiting or len(self.slots) < self.limits.max_batch:
            return
        ready = self._in_state(SlotState.READY)
        for slot in surplus(ready, self._held(), waiting, self.limits.max_batch):
            self._park(slot)

    def _park(self, slot: Slot) -> None:
        """Take a session out of the batch; it waits with its cache."""
        del self.slots[id(slot.session)]
        slot.state = SlotState.PARKED
        slot.run.todo.append(slot)
        if slot.run not in self.queue.snapshot():
            self.queue.append(slot.run)


def tell(run: Run, error: Exception | None) -> None:
    """Notify a job that it has ended."""
    try:
        run.job.done(error)
    except Exception:  # nobody waits for the job any more
        log.exception("A job could not be told of its end.")
