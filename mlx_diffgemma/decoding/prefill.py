"""Encoding what sessions have pending: prompts chunk by chunk, and committed canvases."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

from mlx_diffgemma.decoding.session import Session
from mlx_diffgemma.media.prompt import embed_inputs
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.sampling.protocols import CanvasDrafter

PREFILL_STEP_SIZE = 2048
Progress = Callable[[int, int], None]


def prefill(
    model: DiffusionGemma, sessions: Sequence[Session], chunk: int, progress: Progress | None = None
) -> None:
    """Encode all pending ids of the sessions, several sessions in one forward.

    Args:
        model: The model that encodes.
        sessions: Each keeps its K/V in its own cache.
        chunk: About how many positions of each session one forward reads.  An image is never split.
        progress: Called with (positions encoded, positions in all) after each forward.
    """
    total = sum(session.pending.size for session in sessions)
    done = 0
    for session in sessions:
        session.reserve()
    while waiting := [session for session in sessions if session.pending.size]:
        done += encode_chunk(model, waiting, [session.chunk(chunk) for session in waiting])
        for session in waiting:
            session.paused()
        if progress:
            progress(done, total)


def encode_chunk(model: DiffusionGemma, sessions: Sequence[Session], sizes: Sequence[int]) -> int:
    """Encode the next pending ids of each session in one forward.

    Args:
        model: The model that encodes.
        sessions: Each has pending ids.
        sizes: The number of ids to encode of each session.

    Returns:
        The positions encoded, over all sessions.
    """
    read = [
        embed_inputs(model, session.pending[:size], session.cache.length, session.images)
        for session, size in zip(sessions, sizes, strict=True)
    ]
    drafters = by_drafter(sessions)
    asking = [row for row, session in enumerate(sessions) if session.wants_next]
    output = model.encode(
        [rows for rows, _ in read],
        [session.cache for session in sessions],
        logits="last" if asking else "none",
        taps=sorted({layer for drafter in drafters for layer in drafter.taps}),
        blocks=[blocks for _, blocks in read],
    )
    for drafter, rows in drafters.items():
        drafter.read(
            [sessions[row] for row in rows],
            [{layer: output.taps[layer][row] for layer in drafter.taps} for row in rows],
        )
    for row in asking:
        assert output.logits is not None
        sessions[row].next_logits = output.logits[row][-1]
    for session, size in zip(sessions, sizes, strict=True):
        session.pending = session.pending[size:]
    mx.eval(
        [session.cache.arrays for session in sessions],
        [sessions[row].next_logits for row in asking],
    )
    mx.clear_cache()
    return sum(sizes)


def by_drafter(sessions: Sequence[Session]) -> dict[CanvasDrafter, list[int]]:
    """The indices of the sessions that each drafter proposes for."""
    indices: dict[CanvasDrafter, list[int]] = {}
    for index, session in enumerate(sessions):
        if session.policy.drafter:
            indices.setdefault(session.policy.drafter, []).append(index)
    return indices
