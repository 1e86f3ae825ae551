"""The decoding loop: one denoising step at a time, for a batch of sessions.

``Loop.advance`` runs one step of every unfinished session in one forward.  It returns a
``CanvasStep`` for each session; the live view, the server, the drafter and the tests read only
these records.

    >>> loop = Loop(model, [Session(model, prompt_ids, policy, Draws(0, vocab), eos_ids,
    max_tokens=256)])
    >>> while loop.active:
    ...     for session, step in loop.advance():
    ...         print(step.canvas_index, step.step, step.mean_entropy)
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import mlx.core as mx

from mlx_diffgemma.decoding.canvas_state import CanvasState
from mlx_diffgemma.decoding.prefill import PREFILL_STEP_SIZE, Progress, by_drafter, prefill
from mlx_diffgemma.decoding.records import CanvasStep
from mlx_diffgemma.decoding.sampling_groups import (
    constrained_logits,
    sample_group,
    sampled_together,
)
from mlx_diffgemma.decoding.session import Session
from mlx_diffgemma.decoding.verification import commit_drafts, keep_or_drop, verify_sessions
from mlx_diffgemma.decoding.verifier import text_of
from mlx_diffgemma.errors import NonFiniteLogitsError
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.sampling import self_conditioning
from mlx_diffgemma.sampling.protocols import Taps
from mlx_diffgemma.sampling.sampler import Flag, SamplerStep
from mlx_diffgemma.sampling.self_conditioning import Belief, Bias

SessionSteps = list[tuple[Session, CanvasStep]]


class _Group(NamedTuple):
    """Sessions that are sampled together, and the outcome of their step.

    ``logits`` are [sessions, length, vocabulary].  ``bias`` is what constraints add to them.
    """

    sessions: list[Session]
    logits: mx.array
    bias: Bias | None
    outcome: SamplerStep


class Loop:
    """Runs the denoising steps of several sessions together.  All have the same end tokens.

    Args:
        model: Runs all of them in one forward.
        sessions: May join and leave (``loop.sessions``) between any two steps.
        prefill_step_size: About how many positions of a prompt one forward encodes.
        progress: Called with (positions encoded, positions in all) while prompts are encoded.
    """

    def __init__(
        self,
        model: DiffusionGemma,
        sessions: Iterable[Session] = (),
        prefill_step_size: int = PREFILL_STEP_SIZE,
        progress: Progress | None = None,
    ):
        self.model = model
        self.sessions = list(sessions)
        self.prefill_step_size = prefill_step_size
        self.progress = progress

    @property
    def active(self) -> list[Session]:
        return [session for session in self.sessions if not session.finished]

    def advance(self) -> SessionSteps:
        """One denoising step of every active session.

        A session between two canvases opens the next one first.

        Raises:
            NonFiniteLogitsError: The model returned NaN or infinity for some sessions.  The error
                names them; the others can continue.
        """
        active = self.active
        # 1) Open canvases.  Some drafts are certain enough to be committed without a step.
        committed_drafts = self._open([session for session in active if session.canvas is None])
        active = [session for session in active if session.canvas is not None]
        if not active:
            return committed_drafts
        # 2) One forward, one sampler step a group, one read by the host.
        groups, taps = self._forward(sampled_together(active))
        flags = mx.concatenate([group.outcome.flags for group in groups]).tolist()
        rows = [session for group in groups for session in group.sessions]
        self._observe(rows, groups, flags)
        # 3) Continue, retry or commit each canvas.
        steps, beliefs = self._records(groups, flags)
        for session, step in zip(rows, steps, strict=True):
            session.take(step)
        keep_or_drop(rows)
        # 4) What the next step starts from.
        self._refine(rows, steps, taps)
        self._signal(groups, beliefs)
        if any(step.committed for step in steps):
            mx.clear_cache()
        return [*committed_drafts, *zip(rows, steps, strict=True)]

    def _open(self, opening: Sequence[Session]) -> SessionSteps:
        """Open a canvas in each session, and commit the drafts that need no step."""
        # A finished canvas is encoded in the same forward as the first step of the next one, unless
        # the policy asks for a forward of its own.
        apart = []
        for session in opening:
            if not (session.canvases and session.policy.fuses_commit):
                apart.append(session)
        if apart:
            began = time.perf_counter()
            prefill(self.model, apart, self.prefill_step_size, self.progress)
            for session in apart:
                session.encoded()
                session.prefill_seconds = session.prefill_seconds or time.perf_counter() - began
        for session in opening:
            session.open_canvas()
        whole = []
        for drafter, indices in by_drafter(opening).items():
            drafted = [opening[index] for index in indices]
            for session, draft in zip(drafted, drafter.seed(drafted), strict=True):
                session.use_draft(draft)
                if draft.whole:
                    whole.append(session)
        return commit_drafts(self.model, whole)

    def _forward(self, groups: Sequence[list[Session]]) -> tuple[list[_Group], list[Taps]]:
        """Run the model over all canvases, and sample each group.

        Returns:
            (the groups with their outcomes; for each session, in the order of the groups, the
            hidden states that its drafter reads to refine the canvas).
        """
        rows = [session for group in groups for session in group]
        canvases = [_canvas(session) for session in rows]
        lengths = [canvas.ids.size for canvas in canvases]
        fused = [session for session in rows if session.pending.size]
        commits: list[mx.array | None] = []
        if fused:
            commits = [mx.array(s.pending) if s.pending.size else None for s in rows]
        wanted = [_refined_layers(session) for session in rows]
        output = self.model.denoise(
            mx.concatenate([canvas.ids for canvas in canvases]),
            [session.cache for session in rows],
            _signals(canvases),
            commits=commits,
            lengths=lengths,
            taps=sorted({layer for layers in wanted for layer in layers}),
        )
        taps = list[Taps]()
        for stop, length, layers in zip(
            itertools.accumulate(lengths), lengths, wanted, strict=True
        ):
            taps.append({layer: output.taps[layer][stop - length : stop] for layer in layers})
        for session in fused:
            session.encoded()
        sampled = _sample(groups, output.logits)
        mx.eval(
            [array for group in sampled for array in group.outcome if array is not None],
            [session.cache.arrays for session in fused],
            [list(own.values()) for own in taps],
        )
        return sampled, taps

    def _observe(
        self, rows: Sequence[Session], groups: Sequence[_Group], flags: Sequence[list[float]]
    ) -> None:
        """Give each session what the host read.  Verify the texts for which a policy asks.

        Args:
            rows: The sessions, in the order of the groups.
            groups: The groups with their outcomes.
            flags: The numbers that the host read, for each session.
        """
        _check_finite(rows, flags)
        argmaxes = [argmax for group in groups for argmax in group.outcome.argmax]
        doubted = []
        for session, argmax, numbers in zip(rows, argmaxes, flags, strict=True):
            context = session.observe(
                bool(numbers[Flag.STOP]),
                numbers[Flag.MEAN_ENTROPY],
                int(numbers[Flag.EOS_POSITION]),
            )
            if not session.policy.needs_verification(context):
                continue
            ids = text_of(argmax, session.eos_ids)
            if session.verdict and session.verdict.ids == ids:
                session.note_verification(session.verdict)  # the same text was verified before
            else:
                doubted.append((session, ids))
        verify_sessions(self.model, doubted)

    def _records(
        self, groups: Sequence[_Group], flags: Sequence[list[float]]
    ) -> tuple[list[CanvasStep], list[Belief]]:
        """The record of each session's step, and the input of each group's self-conditioning."""
        steps = list[CanvasStep]()
        beliefs = list[Belief]()
        taken = 0
        for group in groups:
            numbers = flags[taken : taken + len(group.sessions)]
            taken += len(group.sessions)
            belief = Belief(
                group.logits,
                mx.array([session.policy.schedule(session.step - 1) for session in group.sessions]),
                group.outcome.kept,
                group.outcome.uncovered,
                [int(row[Flag.UNCOVERED]) for row in numbers],
                bias=group.bias,
            )
            for row, session in enumerate(group.sessions):
                steps.append(self.record(session, row, group.outcome, numbers[row], belief))
            beliefs.append(belief)
        return steps, beliefs

    @staticmethod
    def record(
        session: Session, row: int, outcome: SamplerStep, flags: list[float], belief: Belief
    ) -> CanvasStep:
        """The record of one session's step, with the decision of its policy.

        Tests script answers by putting their own function here.

        Args:
            session: It has observed the step.
            row: Its row of ``outcome`` and ``belief``.
            outcome: The sampler step of its group.
            flags: The numbers that the host read of its row.
            belief: The input of self-conditioning.
        """
        canvas = _canvas(session)
        context = canvas.stop_context
        assert context is not None
        policy = session.policy
        reason = policy.stop_reason(context)
        step = CanvasStep(
            canvas_index=session.canvas_index,
            retry=session.retry,
            step=session.step - 1,
            max_steps=policy.max_steps,
            canvas=outcome.canvas[row],
            argmax=outcome.argmax[row].astype(mx.int32),
            accepted=outcome.accepted[row],
            entropy=outcome.entropy[row],
            logprob=outcome.logprob[row],
            mean_entropy=flags[Flag.MEAN_ENTROPY],
            reason=reason,
            certificate=policy.certificate(context) if reason == "converged" else None,
            rejected=reason is not None and policy.should_retry(context, reason),
            draft=canvas.guess,
            surprise=context.surprise,
            top=belief.top(row, session.wants_top) if reason and session.wants_top else None,
        )
        rejected = session.attempts.rejected
        if not step.committed or reason == "converged" or not rejected:
            return step
        # No attempt converged: commit the most certain one, with the number of the last one.
        attempts = rejected if context.ends[-1] == 0 else [step, *rejected]
        best = min(attempts, key=lambda attempt: attempt.mean_entropy)
        return replace(best, retry=step.retry, step=step.step, reason=reason, rejected=False)

    @staticmethod
    def _refine(rows: Sequence[Session], steps: Sequence[CanvasStep], taps: Sequence[Taps]) -> None:
        """Let drafters refine the canvases that continue, unless the attempt began without one.

        Args:
            rows: The sessions, in the order of the groups.
            steps: The record of each session's step.
            taps: The hidden states that the step had on each session's canvas.
        """
        continuing = []
        for row, (session, step) in enumerate(zip(rows, steps, strict=True)):
            drafter = session.policy.drafter
            if drafter and drafter.refines and not step.stopped and not session.retry:
                continuing.append(row)
        for drafter, indices in by_drafter([rows[row] for row in continuing]).items():
            chosen = [continuing[index] for index in indices]
            sessions = [rows[row] for row in chosen]
            states = []
            for row in chosen:
                size = _canvas(rows[row]).ids.size
                states.append({layer: own[:size] for layer, own in taps[row].items()})
            for session, draft in zip(sessions, drafter.refine(sessions, states), strict=True):
                session.use_draft(draft)

    def _signal(self, groups: Sequence[_Group], beliefs: Sequence[Belief]) -> None:
        """Give each session that continues its canvas the self-conditioning of its next step.

        A signal [length, hidden] is about a hundredth of the logits it is made from.  It is
        computed here, not when the next step needs it, so that no logits live through that step's
        forward.
        """
        made = list[mx.array]()
        for group, belief in zip(groups, beliefs, strict=True):
            lengths = {
                row: _canvas(session).ids.size
                for row, session in enumerate(group.sessions)
                if session.step and not session.finished
            }
            for length in set(lengths.values()):  # rules may have shortened some of the canvases
                kept = [row for row, size in lengths.items() if size == length]
                signals = self_conditioning.soft_embedding(self.model, belief.rows(kept, length))
                for index, row in enumerate(kept):
                    _canvas(group.sessions[row]).signal = signals[index]
                    made.append(signals[index])
        mx.async_eval(made)


def _canvas(session: Session) -> CanvasState:
    assert session.canvas is not None, "a canvas is open"
    return session.canvas


def _refined_layers(session: Session) -> Sequence[int]:
    """The layers whose hidden states on the canvas the session's drafter reads."""
    drafter = session.policy.drafter
    return drafter.taps if drafter and drafter.refines else ()


def _signals(canvases: Sequence[CanvasState]) -> mx.array | None:
    """The self-conditioning [rows, hidden] of all canvases, with zeros for a canvas that has none.
    None if no canvas has any.
    """
    known = next((canvas.signal for canvas in canvases if canvas.signal is not None), None)
    if known is None:
        return None
    signals = []
    for canvas in canvases:
        missing = mx.zeros((canvas.ids.size, known.shape[1]), dtype=known.dtype)
        signals.append(missing if canvas.signal is None else canvas.signal)
    return mx.concatenate(signals)


def _sample(groups: Sequence[list[Session]], logits: mx.array) -> list[_Group]:
    """Sample each group from ``logits`` [rows, vocabulary] of all canvases."""
    prepared = []
    start = 0
    for group in groups:
        length = _canvas(group[0]).ids.size
        stop = start + len(group) * length
        own = logits[start:stop].reshape(len(group), length, -1)
        prepared.append((group, *constrained_logits(group, own)))
        start = stop
    mx.eval([masses for _, _, masses in prepared])
    sampled = []
    for group, own, masses in prepared:
        outcome, bias = sample_group(group, own, masses)
        sampled.append(_Group(group, own, bias, outcome))
    return sampled


def _check_finite(rows: Sequence[Session], flags: Sequence[list[float]]) -> None:
    """Raise NonFiniteLogitsError before any session changes, so that the others can continue."""
    damaged = []
    for session, numbers in zip(rows, flags, strict=True):
        if numbers[Flag.NON_FINITE]:
            damaged.append(session)
    if damaged:
        first = damaged[0]
        raise NonFiniteLogitsError(
            f"The model returned NaN or infinity at canvas {first.canvas_index}, step "
            f"{first.step}: the checkpoint is damaged or the dtype too narrow; try --dtype float32 "
            "and compare with `mlx-diffgemma doctor`.",
            damaged,
        )
