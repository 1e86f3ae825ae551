"""Replaces the model's answers by given ones."""

import mlx.core as mx

from mlx_diffgemma.decoding.loop import Loop
from mlx_diffgemma.decoding.records import CanvasStep


def scripted(monkeypatch, model, canvases):
    """Commit the given ids, one list a canvas, in place of what the model would."""
    left = list(canvases)

    def record(session, row, outcome, flags, belief):
        ids = left.pop(0)
        argmax = mx.array(ids + [0] * (64 - len(ids)), dtype=mx.int32)
        session.observe(True, 0.0, len(ids) - 1)
        return CanvasStep(
            session.canvas_index,
            0,
            0,
            1,
            argmax,
            argmax,
            outcome.accepted[row],
            outcome.entropy[row],
            outcome.logprob[row],
            0.0,
            "converged" if ids[-1] != 9 else "max_steps",
        )

    monkeypatch.setattr(Loop, "record", staticmethod(record))
