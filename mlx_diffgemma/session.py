"""One request, and the loop that takes a batch of them forward step by step.

A ``Session`` holds what belongs to one answer: ids, cache, draws, policy, canvas.  ``Loop.advance`` runs one denoising
step for every unfinished session; a session opens and closes its canvases on its own, so rows of one forward may stand
at different steps and canvases, and a session may join or leave between any two steps.  What leaves the loop is a
``CanvasStep``; live view, server, drafter and tests read nothing else.

    >>> loop = Loop(model, [Session(model, prompt_ids, policy, Draws(0, vocab), eos_ids, max_tokens=256)])
    >>> while loop.active:
    ...     for session, step in loop.advance():
    ...         print(step.canvas_index, step.step, step.mean_entropy)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_diffgemma import conditioning
from mlx_diffgemma.cache import Cache
from mlx_diffgemma.draws import DrawSource
from mlx_diffgemma.errors import NonFiniteLogitsError
from mlx_diffgemma.model import DiffusionGemma
from mlx_diffgemma.policy import Policy
from mlx_diffgemma.prompt_cache import PromptCache
from mlx_diffgemma.sampler import Flag, SamplerStep

PREFILL_STEP_SIZE = 2048
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class CanvasStep:
    """One denoising step of one session, as it leaves the loop.

    ``canvas`` is what the next step would start from, ``argmax`` what would be committed now; with the ``accepted``
    mask, the ``entropy`` in nats and the ``logprob`` of the argmax under the scaled distribution all are [length].
    ``reason`` is None while the canvas goes on, then "converged" or "max_steps"; ``certificate`` names the rule that
    stopped it.
    """

    canvas_index: int
    step: int
    max_steps: int
    canvas: mx.array
    argmax: mx.array
    accepted: mx.array
    entropy: mx.array
    logprob: mx.array
    mean_entropy: float
    reason: str | None = None
    certificate: str | None = None

    @property
    def stopped(self) -> bool:
        return self.reason is not None


@dataclass(frozen=True)
class Canvas:
    """A finished canvas: its ids up to and including the end token, and how it came about."""

    tokens: np.ndarray
    logprobs: np.ndarray
    steps: int
    converged: bool
    ended: bool


class Session:
    """One answer in the making.

    ``max_tokens`` limits the answer; the canvases needed for it run whole, and cutting the text is the caller's part.
    ``draws`` gives the random numbers; parity and tests put their own in its place.  ``ids`` are all it has read or
    written.  With a ``prompt_cache`` only what that does not hold of the prompt is encoded.
    """

    def __init__(self, model: DiffusionGemma, ids: Sequence[int], policy: Policy, draws: DrawSource,
                 eos_ids: Iterable[int], max_tokens: int, canvas_length: int | None = None,
                 prompt_cache: PromptCache | None = None):
        self.policy, self.draws = policy, draws
        self.eos_ids = tuple(eos_ids)
        self.max_tokens = max_tokens
        self.length = canvas_length or model.config.canvas_length
        self.prompt_cache, self.ids = prompt_cache, list(ids)
        self.cache = prompt_cache.begin(model, self.ids) if prompt_cache else Cache(model.config.text)
        self.pending = np.array(self.ids[self.cache.length :], dtype=np.int32)  # ids the cache does not hold yet
        self.prefill_seconds = 0.0  # the prompt's share of the time, with those that were encoded beside it
        self.canvases: list[Canvas] = []
        self.finished = False
        self.canvas: mx.array | None = None  # None between two canvases
        self.step = 0
        self.history: tuple[mx.array, ...] = ()

    @property
    def canvas_index(self) -> int:
        return len(self.canvases)

    @property
    def start(self) -> int:
        """The position in the answer at which the current canvas begins."""
        return self.canvas_index * self.length

    def open_canvas(self) -> None:
        self.canvas = mx.array(self.policy.seed(self.draws, self.canvas_index, 0, self.start, self.length))
        self.history = (mx.full((self.length,), -1, dtype=mx.int32),) * self.policy.stability

    def encoded(self) -> None:
        """All that was pending is in the cache now."""
        self.pending = self.pending[:0]
        if self.prompt_cache:
            self.prompt_cache.reached(self.ids)

    def take(self, step: CanvasStep) -> None:
        """Go on from ``step``, or commit its argmax: the next canvas encodes it, unless it ends the answer."""
        self.step += 1
        if not step.stopped:
            self.canvas = step.canvas
            self.history = (*self.history, step.argmax)[1:] if self.history else ()
            return
        argmax = np.array(step.argmax)
        ends = np.flatnonzero(np.isin(argmax, self.eos_ids))
        kept = argmax[: ends[0] + 1] if ends.size else argmax
        self.canvases.append(Canvas(kept, np.array(step.logprob)[: kept.size], self.step,
                                    step.reason == "converged", ends.size > 0))
        self.pending, self.canvas, self.step = argmax, None, 0
        self.ids += argmax.tolist()
        self.finished = ends.size > 0 or self.start >= self.max_tokens


def prefill(model: DiffusionGemma, sessions: Sequence[Session], chunk: int, progress: Progress | None = None) -> None:
    """Encode what is pending in each session, at most ``chunk`` positions of each at a time."""
    total, done = sum(s.pending.size for s in sessions), 0
    while waiting := [s for s in sessions if s.pending.size]:
        # A last chunk of one row joins the one before it: a single row takes other kernels and rounds differently.
        sizes = [chunk if s.pending.size > chunk + 1 else s.pending.size for s in waiting]
        model.encode([mx.array(s.pending[:size]) for s, size in zip(waiting, sizes, strict=True)],
                     [s.cache for s in waiting])
        for session, size in zip(waiting, sizes, strict=True):
            session.pending = session.pending[size:]
        mx.eval([array for s in waiting for array in s.cache.arrays])
        mx.clear_cache()
        done += sum(sizes)
        if progress:
            progress(done, total)


class Loop:
    """Runs sessions side by side.  All share policy class, canvas length and end tokens."""

    def __init__(self, model: DiffusionGemma, sessions: Iterable[Session] = (), prefill_step_size: int = PREFILL_STEP_SIZE,
                 progress: Progress | None = None):
        self.model, self.prefill_step_size, self.progress = model, prefill_step_size, progress
        self.sessions = list(sessions)
        self._carried: list[Session] = []  # the sessions of the rows of the last step
        self._belief: conditioning.Belief | None = None  # what the last step believed, row by row

    @property
    def active(self) -> list[Session]:
        return [session for session in self.sessions if not session.finished]

    def advance(self) -> list[tuple[Session, CanvasStep]]:
        """One denoising step of every active session; those between two canvases open the next one first."""
        active = self.active
        opening = [session for session in active if session.canvas is None]
        # A finished canvas is encoded in the same forward as the first step of the next one, unless the policy wants it apart.
        if apart := [session for session in opening if not (session.canvases and session.policy.fuses_commit)]:
            began = time.perf_counter()
            prefill(self.model, apart, self.prefill_step_size, self.progress)
            for session in apart:
                session.encoded()
                session.prefill_seconds = session.prefill_seconds or time.perf_counter() - began
        for session in opening:
            session.open_canvas()
        # Rows that go on come first, in the order of the last step's logits; a session taken out of the loop drops out.
        kept = [index for index, session in enumerate(self._carried) if session.step and session in active]
        rows = [self._carried[index] for index in kept] + [session for session in active if session.step == 0]
        if not rows:
            return []
        logits, outcome = self._step(rows, self._soft_embedding(kept, len(rows)))
        flags = outcome.flags.tolist()  # the one host read of a step
        steps = [self._record(session, index, outcome, flags[index]) for index, session in enumerate(rows)]
        self._carried = rows
        temperature = mx.array([session.policy.schedule(session.step) for session in rows])
        self._belief = conditioning.Belief(logits, temperature, outcome.kept, outcome.uncovered,
                                           [int(row[Flag.UNCOVERED]) for row in flags])
        for session, step in zip(rows, steps, strict=True):
            session.take(step)
        if any(step.stopped for step in steps):
            mx.clear_cache()
        if not self.active:
            self._carried, self._belief = [], None
        return list(zip(rows, steps, strict=True))

    def _soft_embedding(self, kept: Sequence[int], rows: int) -> mx.array | None:
        """The signal [rows, length, hidden]: of the last step for its ``kept`` rows, and zero for rows that begin."""
        if not kept or self._belief is None:
            return None
        soft = conditioning.soft_embedding(self.model, self._belief.rows(kept))
        if len(kept) == rows:
            return soft
        return mx.concatenate((soft, mx.zeros((rows - len(kept), *soft.shape[1:]), dtype=soft.dtype)))

    def _step(self, rows: Sequence[Session], soft: mx.array | None) -> tuple[mx.array, SamplerStep]:
        """(logits [rows, length, vocabulary], what the sampler made of them)"""
        canvas = mx.stack([session.canvas for session in rows])
        caches, fused = [session.cache for session in rows], [session for session in rows if session.pending.size]
        commits = [mx.array(session.pending) if session.pending.size else None for session in rows] if fused else ()
        logits = self.model.denoise(canvas, caches, soft, commits=commits).logits
        for session in fused:
            session.encoded()
        draws = [s.draws.step(s.canvas_index, 0, s.step, s.start, s.length) for s in rows]
        history = mx.stack([mx.stack(s.history) if s.history else mx.zeros((0, s.length), dtype=mx.int32) for s in rows])
        outcome = rows[0].policy.sample(
            [s.policy for s in rows], [s.step for s in rows], logits, np.stack([d.u for d in draws]),
            np.stack([d.renoise for d in draws]), history, mx.array(rows[0].eos_ids),
        )
        mx.eval([array for array in outcome if array is not None], [session.cache.arrays for session in fused])
        return logits, outcome

    @staticmethod
    def _record(session: Session, row: int, outcome: SamplerStep, flags: list[float]) -> CanvasStep:
        if flags[Flag.NON_FINITE]:
            raise NonFiniteLogitsError(
                f"The model returned NaN or infinity at canvas {session.canvas_index}, step {session.step}: the checkpoint "
                "is damaged or the dtype too narrow; try --dtype float32 and compare with `mlx-diffgemma doctor`.")
        converged = bool(flags[Flag.STOP])
        last = session.step + 1 >= session.policy.max_steps
        return CanvasStep(
            canvas_index=session.canvas_index, step=session.step, max_steps=session.policy.max_steps,
            canvas=outcome.canvas[row], argmax=outcome.argmax[row].astype(mx.int32), accepted=outcome.accepted[row],
            entropy=outcome.entropy[row], logprob=outcome.logprob[row], mean_entropy=flags[Flag.MEAN_ENTROPY],
            reason="converged" if converged else "max_steps" if last else None,
            certificate=session.policy.certificate if converged else None,
        )
