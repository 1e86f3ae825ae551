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

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_diffgemma import conditioning
from mlx_diffgemma.cache import ROOM, Cache
from mlx_diffgemma.conditioning import Bias
from mlx_diffgemma.demands import Demands
from mlx_diffgemma.drafting import CanvasDrafter, Draft, Taps
from mlx_diffgemma.draws import Draws, DrawSource
from mlx_diffgemma.errors import NonFiniteLogitsError, UserError
from mlx_diffgemma.grammar.constraint import Masses
from mlx_diffgemma.judge import Verdict, consult, settle, text_of
from mlx_diffgemma.model import DiffusionGemma
from mlx_diffgemma.policy import Policy, ReferencePolicy, Standing
from mlx_diffgemma.prompt import PlacedImage, keyed, next_chunk, read_rows
from mlx_diffgemma.prompt_cache import PromptCache
from mlx_diffgemma.sampler import Before, Flag, SamplerStep

PREFILL_STEP_SIZE = 2048
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class CanvasStep:
    """One denoising step of one session, as it leaves the loop.

    ``canvas`` is what the next step would start from, ``argmax`` what would be committed now; with the ``accepted``
    mask, the ``entropy`` in nats and the ``logprob`` of the argmax under the scaled distribution all are [length].
    ``step`` -1 is that of a draft which was committed before any step; entropy and log-probability are the causal mode's then.
    ``reason`` is None while the canvas goes on, then "converged", "plateau", "max_steps", "watchdog" or "judge"; ``certificate``
    names the rule under which it converged.  A ``rejected`` canvas is not committed, the next step begins it anew as attempt
    ``retry`` + 1.  ``draft`` holds what a drafter guessed at each position, -1 where it made no guess; ``surprise`` what the causal
    mode said of the argmax, where it was asked (see ``Standing``).  ``top``, of a stopped step where the session asks for it: ids
    and log-probabilities [length, n] of the most probable tokens under the same distribution as ``logprob``, in their order.
    """

    canvas_index: int
    retry: int
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
    rejected: bool = False
    draft: mx.array | None = None
    surprise: float | None = None
    top: tuple[mx.array, mx.array] | None = None

    @property
    def stopped(self) -> bool:
        return self.reason is not None

    @property
    def committed(self) -> bool:
        return self.stopped and not self.rejected


@dataclass(frozen=True)
class Canvas:
    """A finished canvas: its ids up to and including the end token, and how it came about.

    ``steps`` counts those of all attempts, the ``retries`` included; ``rows`` the canvas rows they computed; ``judged`` the causal
    passes over the text of its argmax, ``judged_rows`` long, of which the last is also its commit where the ``certificate`` says
    "causal"; ``passes`` those of a drafter.  Of what that ``proposed`` for the part that is kept, ``accepted`` was committed.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    steps: int
    rows: int
    converged: bool
    ended: bool
    retries: int = 0
    proposed: int = 0
    accepted: int = 0
    certificate: str | None = None
    passes: int = 0
    judged: int = 0
    judged_rows: int = 0


class Session:
    """One answer in the making.

    ``max_tokens`` limits the answer; the canvases needed for it run whole, and cutting the text is the caller's part.
    ``draws`` gives the random numbers; parity and tests put their own in its place.  ``ids`` are all it has read or
    written; where ``images`` stand in them, those are read.  With a ``prompt_cache`` only what that does not hold of the prompt
    is encoded, and with a ``cache``, which becomes the session's own, what lies behind it.  ``demands`` are what its canvases must
    hold.  Errors: UserError for a drafter beside a prompt_cache, as it reads
    the hidden states of the whole prompt, or beside demands, which it does not know.
    """

    def __init__(self, model: DiffusionGemma, ids: Sequence[int], policy: Policy, draws: DrawSource,
                 eos_ids: Iterable[int], max_tokens: int, canvas_length: int | None = None,
                 prompt_cache: PromptCache | None = None, images: Sequence[PlacedImage] = (), demands: Demands | None = None,
                 cache: Cache | None = None, repeated: int = 0):
        if policy.drafter and prompt_cache:
            raise UserError("A prompt_cache does not keep what a drafter reads; leave one of them out.")
        if policy.drafter and demands:
            raise UserError("A drafter knows nothing of pins and constraints; leave one of them out.")
        self.demands = demands
        self.policy, self.draws = policy, draws
        self.eos_ids = tuple(eos_ids)
        self.max_tokens = max_tokens
        self.full_length, self.context = canvas_length or model.config.canvas_length, model.config.text.max_position_embeddings
        self.prompt_cache, self.ids, self.images = prompt_cache, list(ids), tuple(images)
        own = cache or Cache(model.config.text)
        self.cache: Cache = prompt_cache.begin(model, keyed(self.ids, self.images), self) if prompt_cache else own
        self.reused = self.cache.length  # of the ids, that need not be encoded
        self.repeated = repeated  # how many of the ids the next turn of a conversation repeats, see ``tokenizer.repeated``
        self.pending: np.ndarray = np.array(self.ids[self.cache.length :], dtype=np.int32)  # ids the cache does not hold yet
        self.prefill_seconds = 0.0  # the prompt's share of the time, with those that were encoded beside it
        self.canvases: list[Canvas] = []
        self.finished: bool = False
        self.start = 0  # the position in the answer at which the current canvas begins
        self.length = self.full_length  # with how many positions the current canvas began
        self.retry = self.steps = self.rows = self.passes = 0  # of the current canvas: attempts before, what all took
        self.judged = self.judged_rows = 0
        self.canvas: mx.array | None = None  # None between two canvases
        self.rejected: list[CanvasStep] = []  # the last steps of attempts that did not converge
        self.draft = policy.drafter.begin() if policy.drafter else None  # the drafter's own
        self.guess: mx.array | None = None  # what it put into the current canvas, -1 where nothing
        self.signal: mx.array | None = None  # the next step's self-conditioning, [length, hidden]
        self.drafts = 0  # how many attempts at the current canvas before this one had guesses
        self.wants_next = policy.drafter is not None
        self.wants_top = 0  # how many of the most probable tokens a stopped step is to name
        self.next_logits: mx.array | None = None  # where it wants them, [vocabulary] of the causal mode behind what it has read
        self.verdict: Verdict | None = None  # what it last said about this canvas

    @classmethod
    def reading(cls, model: DiffusionGemma, ids: Sequence[int], **given: Any) -> Session:
        """One that only reads, and is finished when nothing is pending any more; ``given`` is what else a session takes."""
        session = cls(model, ids, ReferencePolicy.from_config(model.config.generation), Draws(0, model.config.text.vocab_size), (),
                      1, **given)
        session.finished = True
        return session

    @property
    def canvas_index(self) -> int:
        return len(self.canvases)

    @property
    def step(self) -> int:
        """How many steps this attempt at the canvas has behind it."""
        return len(self.entropies) if self.canvas is not None else 0

    def open_canvas(self) -> None:
        length = self.policy.canvas_length(self.canvas_index, self.max_tokens - self.start, self.full_length)
        self.length = min(length, self.context - len(self.ids))
        self.canvas = mx.array(self.policy.seed(self.draws, self.canvas_index, self.retry, self.start, self.length))
        self.accepted, self.free = mx.zeros((self.length,), dtype=mx.bool_), self.length
        if self.demands:
            self.demands.open(self.start, self.length)
            self.canvas, self.accepted, self.free = self.demands.pin(self.canvas), self.demands.fixed, self.demands.free
        self.history = (mx.full((self.length,), -1, dtype=mx.int32),) * self.policy.stability
        self.entropies: list[float] = []
        self.ends: list[int] = []
        self.guess = self.signal = None
        if not self.retry:
            self.verdict = None

    def go_on_from(self, draft: Draft) -> None:
        """The canvas goes on, or begins, with ``draft``, unless that is empty."""
        self.passes += draft.passes
        if draft.soft is not None or draft.drafted.any().item():
            before = mx.full((draft.ids.size,), -1) if self.guess is None else self.guess
            self.canvas, self.signal = draft.ids, draft.soft
            self.guess = mx.where(draft.drafted, draft.ids, before)

    def go_on_from_prefix(self) -> None:
        """Of the text that the causal mode was asked about only what stands before its first surprise is left."""
        assert self.verdict is not None
        assert self.policy.surprise_limit is not None
        surprised = np.flatnonzero(np.array(self.verdict.surprises) > self.policy.surprise_limit)
        good = self.verdict.ids[: surprised[0]] if surprised.size else self.verdict.ids
        noise = self.policy.seed(self.draws, self.canvas_index, self.retry, self.start, self.length)
        self.canvas, self.guess, self.signal = mx.array(np.concatenate((good, noise[len(good) :])).astype(np.int32)), None, None
        if good:
            self.guess = mx.array(np.concatenate((good, np.full(self.length - len(good), -1))).astype(np.int32))

    def read(self, stop: bool, mean_entropy: float, end: int) -> Standing:
        """Take note of what the host read of a step; ``end`` is the position of the first end token."""
        assert self.canvas is not None
        self.steps, self.rows = self.steps + 1, self.rows + self.canvas.size
        self.entropies.append(mean_entropy)
        self.ends.append(end)
        self.standing = Standing(self.canvas_index, self.retry, self.length, stop, self.entropies, self.ends,
                                 self.guess is not None, self.drafts)
        return self.standing

    def judged_as(self, verdict: Verdict, rows: int = 0) -> None:
        """Take note of what the causal mode says of the text, in a pass of so many rows, or has said of the same text before."""
        surprise: float = verdict.surprises.max().item()
        self.verdict, self.standing = verdict, replace(self.standing, surprise=surprise)
        self.judged, self.judged_rows = self.judged + (rows > 0), self.judged_rows + rows

    def go_on(self, cache: Cache) -> None:
        """Take ``cache`` for its own, which holds the first of its ``ids``, before any of them was read."""
        self.cache, self.reused = cache, cache.length
        self.pending = np.array(self.ids[cache.length :], dtype=np.int32)

    def reserve(self) -> None:
        """Make room at once for all that is pending."""
        self.cache.reserve(self.cache.length + self.pending.size + ROOM)

    def encoded(self) -> None:
        """All that was pending is in the cache now."""
        self.pending = self.pending[:0]
        if self.prompt_cache:
            self.prompt_cache.reached(keyed(self.ids, self.images), self.cache)

    def chunk(self, most: int) -> int:
        """How many of the pending ids are encoded next, about ``most``.

        Where a snapshot is kept, the first stop is the place from which the next turn goes on.
        """
        size = next_chunk(self.pending.size, self.cache.length, self.images, most)
        ahead = self.repeated - self.cache.length if self.prompt_cache else 0
        return ahead if 1 < ahead < size else size

    def paused(self) -> None:
        """Some of what was pending is in the cache: keep a snapshot where the next turn goes on."""
        if self.prompt_cache and self.pending.size and self.cache.length == self.repeated:
            self.prompt_cache.reached(keyed(self.ids, self.images)[: self.repeated], self.cache)

    def take(self, step: CanvasStep) -> None:
        """Go on from ``step``, begin anew, or commit: the next canvas encodes what is committed, unless it ends the answer."""
        if not step.stopped:
            rows = self.policy.keeps(self.standing, step.canvas.size)
            self.canvas, self.accepted, self.signal = step.canvas[:rows], step.accepted[:rows], None
            self.guess = None if self.guess is None else self.guess[:rows]
            self.history = tuple(argmax[:rows] for argmax in (*self.history, step.argmax)[1:]) if self.history else ()
            if self.demands and rows < step.canvas.size:
                self.demands.open(self.start, rows)
        elif step.rejected:
            # An empty one is no answer to come back to, nor is a draft that watchdog or judge ended.
            if step.reason not in ("converged", "watchdog", "judge") and self.ends[-1]:
                self.rejected.append(step)
            self.retry, drafted = self.retry + 1, self.guess is not None
            self.open_canvas()
            if step.reason == "judge" and not self.drafts:
                self.go_on_from_prefix()
            self.drafts += drafted
        else:
            self._commit(step)

    def _commit(self, step: CanvasStep) -> None:
        argmax = np.array(step.argmax)
        ends = np.flatnonzero(np.isin(argmax, self.eos_ids))
        kept = argmax[: ends[0] + 1] if ends.size else argmax
        whole = self.demands.commit(kept) if self.demands else False
        guess = np.full(kept.size, -1) if step.draft is None else np.array(step.draft)[: kept.size]
        self.canvases.append(Canvas(kept, np.array(step.logprob)[: kept.size], self.steps, self.rows,
                                    step.reason == "converged", ends.size > 0 or whole, self.retry, int((guess >= 0).sum()),
                                    int((guess == kept).sum()), step.certificate, self.passes, self.judged, self.judged_rows))
        self.pending, self.canvas, self.rejected = argmax, None, []
        self.guess = self.signal = None
        self.drafts = 0
        self.retry = self.steps = self.rows = self.passes = self.judged = self.judged_rows = 0
        self.ids += argmax.tolist()
        self.start += argmax.size
        self.finished = ends.size > 0 or whole or self.start >= self.max_tokens


def prefill(model: DiffusionGemma, sessions: Sequence[Session], chunk: int, progress: Progress | None = None) -> None:
    """Encode what is pending in each session, about ``chunk`` positions of each at a time, an image never in two pieces."""
    total, done = sum(s.pending.size for s in sessions), 0
    for session in sessions:
        session.reserve()
    while waiting := [s for s in sessions if s.pending.size]:
        done += encode_chunk(model, waiting, [session.chunk(chunk) for session in waiting])
        for session in waiting:
            session.paused()
        if progress:
            progress(done, total)


def encode_chunk(model: DiffusionGemma, sessions: Sequence[Session], sizes: Sequence[int]) -> int:
    """Encode the first of what is pending in each session, so many positions of each; how many these are together."""
    read = [read_rows(model, s.pending[:size], s.cache.length, s.images) for s, size in zip(sessions, sizes, strict=True)]
    taps = sorted({layer for s in sessions if s.policy.drafter for layer in s.policy.drafter.taps})
    asking = [row for row, session in enumerate(sessions) if session.wants_next]
    output = model.encode([rows for rows, _ in read], [s.cache for s in sessions], logits="last" if asking else "none",
                          taps=taps, blocks=[blocks for _, blocks in read])
    for drafter, rows in _drafted(sessions).items():
        drafter.read([sessions[row] for row in rows], [{layer: output.taps[layer][row] for layer in drafter.taps} for row in rows])
    for row in asking:
        assert output.logits is not None
        sessions[row].next_logits = output.logits[row][-1]
    for session, size in zip(sessions, sizes, strict=True):
        session.pending = session.pending[size:]
    mx.eval([array for s in sessions for array in s.cache.arrays], [sessions[row].next_logits for row in asking])
    mx.clear_cache()
    return sum(sizes)


class Loop:
    """Runs sessions side by side, which share the end tokens.

    All go through one forward.  Those whose policies have one class and whose canvases have one length are sampled together.
    """

    def __init__(self, model: DiffusionGemma, sessions: Iterable[Session] = (), prefill_step_size: int = PREFILL_STEP_SIZE,
                 progress: Progress | None = None):
        self.model, self.prefill_step_size, self.progress = model, prefill_step_size, progress
        self.sessions = list(sessions)

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
        whole = []
        for drafter, places in _drafted(opening).items():
            begun = [opening[place] for place in places]
            for session, draft in zip(begun, drafter.seed(begun), strict=True):
                session.go_on_from(draft)
                if draft.whole:
                    whole.append(session)
        at_once = self._commit_drafts(whole)
        active = [session for session in active if session.canvas is not None]
        if not active:
            return at_once
        groups = sampled_together(active)
        rows = [session for group in groups for session in group]
        believed, outcomes, taps = self._step(rows, groups)
        flags = mx.concatenate([outcome.flags for outcome in outcomes]).tolist()  # the one host read of a step
        self._note(rows, outcomes, flags)
        steps, beliefs, taken = list[CanvasStep](), list[conditioning.Belief](), 0
        for group, (logits, bias), outcome in zip(groups, believed, outcomes, strict=True):
            numbers, taken = flags[taken : taken + len(group)], taken + len(group)
            temperature = mx.array([session.policy.schedule(session.step - 1) for session in group])
            beliefs.append(conditioning.Belief(logits, temperature, outcome.kept, outcome.uncovered,
                                               [int(row[Flag.UNCOVERED]) for row in numbers], bias=bias))
            steps += [self._record(session, row, outcome, numbers[row], beliefs[-1]) for row, session in enumerate(group)]
        for session, step in zip(rows, steps, strict=True):
            session.take(step)
        settle(rows)
        self._refine(rows, steps, taps)
        self._signal(groups, beliefs)
        if any(step.committed for step in steps):
            mx.clear_cache()
        return [*at_once, *zip(rows, steps, strict=True)]

    def _commit_drafts(self, sessions: Sequence[Session]) -> list[tuple[Session, CanvasStep]]:
        """The canvases just begun with a draft that the causal mode has nothing against, which are committed as they are."""
        asked = []
        for session in sessions:
            ids = text_of(_canvas(session), session.eos_ids)
            # As after a step that was certain of everything.
            session.standing = Standing(session.canvas_index, session.retry, session.length, False, (0.0,), (len(ids) - 1,), True)
            if session.policy.surprise_limit is not None:
                asked.append((session, ids))
        if not asked:
            return []
        consult(self.model, asked)
        found = []
        for session, ids in asked:
            assert session.verdict is not None
            if session.policy.judge(session.standing) != "converged":
                session.go_on_from_prefix()
            else:
                canvas, rest = _canvas(session), session.length - len(ids)
                step = CanvasStep(
                    canvas_index=session.canvas_index, retry=session.retry, step=-1, max_steps=session.policy.max_steps,
                    canvas=canvas, argmax=canvas, accepted=mx.ones(canvas.shape, dtype=mx.bool_),
                    entropy=mx.pad(session.verdict.entropy, (0, rest)), logprob=mx.pad(session.verdict.logprob, (0, rest)),
                    mean_entropy=session.verdict.entropy.sum().item() / session.length, reason="converged",
                    certificate=session.policy.certificate(session.standing), draft=session.guess,
                    surprise=session.standing.surprise)
                session.take(step)
                found.append((session, step))
        settle([session for session, _ in asked])
        return found

    def _signal(self, groups: Sequence[Sequence[Session]], beliefs: Sequence[conditioning.Belief]) -> None:
        """Give each session that continues its canvas the self-conditioning of its next step.

        A signal [length, hidden] is about a hundredth of the logits it is made from.  It is computed here, not when the next
        step needs it, so that no logits live through that step's forward.
        """
        made = list[mx.array]()
        for group, belief in zip(groups, beliefs, strict=True):
            lengths = {row: _canvas(session).size for row, session in enumerate(group) if session.step and not session.finished}
            for length in set(lengths.values()):  # tails may have left some canvases of the group
                kept = [row for row, own in lengths.items() if own == length]
                signals = conditioning.soft_embedding(self.model, belief.rows(kept, length))
                for index, row in enumerate(kept):
                    group[row].signal = signals[index]
                    made.append(signals[index])
        mx.async_eval(made)

    def _step(self, rows: Sequence[Session], groups: Sequence[Sequence[Session]],
              ) -> tuple[list[tuple[mx.array, Bias | None]], list[SamplerStep], list[Taps]]:
        """(For each group logits [group, length, vocabulary] and what constraints add to them, what the sampler made of them; for
        each of the ``rows``, which are all of them, the hidden states that its drafter refines by)."""
        lengths = [_canvas(session).size for session in rows]
        caches, fused = [session.cache for session in rows], [session for session in rows if session.pending.size]
        commits = [mx.array(session.pending) if session.pending.size else None for session in rows] if fused else ()
        signal = _signals(rows)
        wanted = [session.policy.drafter.taps if session.policy.drafter and session.policy.drafter.refines else ()
                  for session in rows]
        output = self.model.denoise(mx.concatenate([_canvas(session) for session in rows]), caches, signal, commits=commits,
                                    lengths=lengths, taps=sorted({layer for own in wanted for layer in own}))
        flat, taps = output.logits, list[Taps]()
        for stop, length, own in zip(itertools.accumulate(lengths), lengths, wanted, strict=True):
            taps.append({layer: output.taps[layer][stop - length : stop] for layer in own})
        for session in fused:
            session.encoded()
        logits, masses, start = list[mx.array](), list[list[Masses | None]](), 0
        for group in groups:
            length = _canvas(group[0]).size
            stop = start + len(group) * length
            logits.append(flat[start:stop].reshape(len(group), length, -1))
            masses.append([])
            if demands := group[0].demands:  # which is alone in its group
                own = demands.restrict(logits[-1].squeeze(0))  # in place of [0], which copies
                masses[-1] = demands.masses(own, group[0].policy.schedule(group[0].step))
                logits[-1] = own[None]
            start = stop
        mx.eval(masses)
        outcomes, biases = [], []
        for group, own, found in zip(groups, logits, masses, strict=True):
            outcome, bias = _sample(group, own, found)
            outcomes.append(outcome)
            biases.append(bias)
        mx.eval([array for outcome in outcomes for array in outcome if array is not None],
                [session.cache.arrays for session in fused], [list(own.values()) for own in taps])
        return list(zip(logits, biases, strict=True)), outcomes, taps

    def _note(self, rows: Sequence[Session], outcomes: Sequence[SamplerStep], flags: Sequence[list[float]]) -> None:
        """What the host reads of a step goes to the sessions, and what their policies want to know beside it is found out."""
        asked, argmaxes = [], [argmax for outcome in outcomes for argmax in outcome.argmax]
        if damaged := [session for session, own in zip(rows, flags, strict=True) if own[Flag.NON_FINITE]]:
            # Before anything is taken note of, so that the others can go on without these.
            raise NonFiniteLogitsError(
                f"The model returned NaN or infinity at canvas {damaged[0].canvas_index}, step {damaged[0].step}: the checkpoint "
                "is damaged or the dtype too narrow; try --dtype float32 and compare with `mlx-diffgemma doctor`.", damaged)
        for session, argmax, own in zip(rows, argmaxes, flags, strict=True):
            standing = session.read(bool(own[Flag.STOP]), own[Flag.MEAN_ENTROPY], int(own[Flag.EOS_POSITION]))
            if session.policy.consults(standing):
                ids = text_of(argmax, session.eos_ids)
                if session.verdict and session.verdict.ids == ids:
                    session.judged_as(session.verdict)  # it has said so before
                else:
                    asked.append((session, ids))
        if asked:
            consult(self.model, asked)

    @staticmethod
    def _refine(rows: Sequence[Session], steps: Sequence[CanvasStep], taps: Sequence[Taps]) -> None:
        """Canvases that go on do so from what their drafters make of them, unless they were begun anew without one."""
        going = [row for row, (session, step) in enumerate(zip(rows, steps, strict=True))
                 if not step.stopped and not session.retry and session.policy.drafter and session.policy.drafter.refines]
        for drafter, places in _drafted([rows[row] for row in going]).items():
            own = [going[place] for place in places]
            sessions = [rows[row] for row in own]
            sizes = [_canvas(session).size for session in sessions]
            drafts = drafter.refine(sessions, [{layer: states[:size] for layer, states in taps[row].items()}
                                               for row, size in zip(own, sizes, strict=True)])
            for session, draft in zip(sessions, drafts, strict=True):
                session.go_on_from(draft)

    @staticmethod
    def _record(session: Session, row: int, outcome: SamplerStep, flags: list[float], belief: conditioning.Belief) -> CanvasStep:
        standing = session.standing
        reason = session.policy.judge(standing)
        found = CanvasStep(
            canvas_index=session.canvas_index, retry=session.retry, step=session.step - 1, max_steps=session.policy.max_steps,
            canvas=outcome.canvas[row], argmax=outcome.argmax[row].astype(mx.int32), accepted=outcome.accepted[row],
            entropy=outcome.entropy[row], logprob=outcome.logprob[row], mean_entropy=flags[Flag.MEAN_ENTROPY],
            reason=reason, certificate=session.policy.certificate(standing) if reason == "converged" else None,
            rejected=reason is not None and session.policy.rejects(standing, reason), draft=session.guess,
            surprise=standing.surprise, top=belief.top(row, session.wants_top) if reason and session.wants_top else None,
        )
        if not found.committed or reason == "converged" or not session.rejected:
            return found
        # None of the attempts converged: what is committed is the most certain one, under the number of the last.
        attempts = session.rejected if standing.ends[-1] == 0 else [found, *session.rejected]
        best = min(attempts, key=lambda attempt: attempt.mean_entropy)
        return replace(best, retry=found.retry, step=found.step, reason=reason, rejected=False)


def run(model: DiffusionGemma, sessions: Iterable[Session], batch_size: int, prefill_step_size: int = PREFILL_STEP_SIZE,
        ) -> Iterator[tuple[Session, CanvasStep]]:
    """Take ``sessions`` to their ends, at most ``batch_size`` side by side: the next one joins as soon as one has finished."""
    waiting, loop = iter(sessions), Loop(model, (), prefill_step_size)
    while True:
        loop.sessions = loop.active
        loop.sessions += itertools.islice(waiting, batch_size - len(loop.sessions))
        if not loop.sessions:
            return
        yield from loop.advance()


def _drafted(sessions: Sequence[Session]) -> dict[CanvasDrafter, list[int]]:
    """The places in ``sessions`` of those each drafter guesses for."""
    found: dict[CanvasDrafter, list[int]] = {}
    for place, session in enumerate(sessions):
        if session.policy.drafter:
            found.setdefault(session.policy.drafter, []).append(place)
    return found


def _signals(sessions: Sequence[Session]) -> mx.array | None:
    """Self-conditioning of a forward over the canvases of ``sessions`` [rows, hidden], zeros where one has none; None if all
    have none."""
    known = next((session.signal for session in sessions if session.signal is not None), None)
    if known is None:
        return None
    return mx.concatenate([mx.zeros((_canvas(session).size, known.shape[1]), dtype=known.dtype)
                           if session.signal is None else session.signal for session in sessions])


def _canvas(session: Session) -> mx.array:
    assert session.canvas is not None
    return session.canvas


def sampled_together(sessions: Sequence[Session]) -> list[list[Session]]:
    """Those that can be sampled together."""
    groups: dict[tuple[type, int, int, int], list[Session]] = {}
    for session in sessions:
        alone = id(session) if session.demands else 0  # the dynamic programme is one for each
        own = type(session.policy.sampling), session.policy.stability, _canvas(session).size, alone
        groups.setdefault(own, []).append(session)
    return list(groups.values())


def _sample(group: Sequence[Session], logits: mx.array, masses: Sequence[Masses | None]) -> tuple[SamplerStep, Bias | None]:
    """(What the sampler makes of the logits; what constraints add to them, so that they are those of the marginals.)"""
    length = logits.shape[1]
    draws = [s.draws.step(s.canvas_index, s.retry, s.step, s.start, length) for s in group]
    history = mx.stack([mx.stack(s.history) if s.history else mx.zeros((0, length), dtype=mx.int32) for s in group])
    before = Before(mx.stack([_canvas(s) for s in group]), mx.stack([s.accepted for s in group]), history)
    policies, steps, forced, bias = [s.policy.sampling for s in group], [s.step for s in group], None, None
    if group[0].demands and any(masses):
        bias, forced = group[0].demands.force(logits.squeeze(0), masses, draws[0].u, policies[0].numbers(policies, steps))
    return policies[0].sample(policies, steps, [max(1, s.free) for s in group], logits, np.stack([d.u for d in draws]),
                              np.stack([d.renoise for d in draws]), before, mx.array(group[0].eos_ids), forced), bias
