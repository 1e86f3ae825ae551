"""Verification by the causal mode: what it reads, and what sessions and caches keep of it."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlx_diffgemma.decoding.records import CanvasStep
from mlx_diffgemma.decoding.session import Session
from mlx_diffgemma.decoding.verifier import text_of, verify
from mlx_diffgemma.model.cache import ROOM
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.sampling.stopping import StopContext


def verify_sessions(model: DiffusionGemma, texts: Sequence[tuple[Session, list[int]]]) -> None:
    """Ask the causal mode about the text of each session, in one pass."""
    if not texts:
        return
    drafters = [session.policy.drafter for session, _ in texts]
    taps = {layer for drafter in drafters if drafter for layer in drafter.taps}
    first = [session.next_logits for session, _ in texts]
    verdicts = verify(
        model,
        [ids for _, ids in texts],
        [session.cache for session, _ in texts],
        [logits for logits in first if logits is not None],
        sorted(taps),
    )
    for (session, ids), verdict in zip(texts, verdicts, strict=True):
        session.note_verification(verdict, rows=len(ids))


def commit_drafts(
    model: DiffusionGemma, sessions: Sequence[Session]
) -> list[tuple[Session, CanvasStep]]:
    """Commit the drafts that the verifier accepts before any step.

    If it rejects a draft, the verified prefix of the draft stays in the canvas.

    Args:
        model: The verifier.
        sessions: Each has just opened a canvas with a draft that is probably right as a whole.

    Returns:
        The sessions whose draft was committed, with a record of step -1.
    """
    texts = []
    for session in sessions:
        canvas = session.canvas
        assert canvas is not None
        ids = text_of(canvas.ids, session.eos_ids)
        # The record is that of a step that was certain of every token.
        canvas.stop_context = StopContext(
            session.canvas_index, session.retry, canvas.length, False, (0.0,), (len(ids) - 1,), True
        )
        if session.policy.surprise_limit is not None:
            texts.append((session, ids))
    verify_sessions(model, texts)
    committed = []
    for session, ids in texts:
        assert session.canvas is not None
        assert session.canvas.stop_context is not None
        if session.policy.stop_reason(session.canvas.stop_context) != "converged":
            session.keep_verified_prefix()
        else:
            step = _draft_record(session, ids)
            session.take(step)
            committed.append((session, step))
    keep_or_drop([session for session, _ in texts])
    return committed


def _draft_record(session: Session, ids: Sequence[int]) -> CanvasStep:
    """The record of a draft whose text ``ids`` is committed before any step."""
    canvas = session.canvas
    verdict = session.verdict
    assert canvas is not None
    assert canvas.stop_context is not None
    assert verdict is not None
    rest = canvas.length - len(ids)
    return CanvasStep(
        canvas_index=session.canvas_index,
        retry=session.retry,
        step=-1,
        max_steps=session.policy.max_steps,
        canvas=canvas.ids,
        argmax=canvas.ids,
        accepted=mx.ones(canvas.ids.shape, dtype=mx.bool_),
        entropy=mx.pad(verdict.entropy, (0, rest)),
        logprob=mx.pad(verdict.logprob, (0, rest)),
        mean_entropy=verdict.entropy.sum().item() / canvas.length,
        reason="converged",
        certificate=session.policy.certificate(canvas.stop_context),
        draft=canvas.guess,
        surprise=canvas.stop_context.surprise,
    )


def keep_or_drop(sessions: Sequence[Session]) -> None:
    """Settle the keys and values that a verifying pass holds beside each cache.

    They are appended where the canvas was committed, and dropped where it was not.
    """
    for session in sessions:
        verdict = session.verdict
        if not (verdict and verdict.held):
            continue
        committed = session.canvas is None and not session.finished
        if committed and session.pending.tolist() == verdict.ids:
            session.cache.reserve(session.cache.length + len(verdict.ids) + ROOM)
            session.cache.accept(len(verdict.ids))
            session.next_logits = verdict.next_logits
            if drafter := session.policy.drafter:
                drafter.read([session], [{layer: verdict.taps[layer] for layer in drafter.taps}])
            session.encoded()
            mx.eval(session.cache.arrays)
        else:
            session.cache.accept(0)
        session.verdict = verdict._replace(held=False, taps={})
