"""Drafters with given drafts, and the canvases that they lead to, as plain values."""

import mlx.core as mx
import numpy as np

from drafter.policy import DraftPolicy
from mlx_diffgemma.decoding.loop import Loop
from mlx_diffgemma.decoding.session import Session
from mlx_diffgemma.sampling.draws import Draws
from mlx_diffgemma.sampling.policy import ReferencePolicy
from mlx_diffgemma.sampling.protocols import Draft

LENGTH = 64


class Fixed:
    """A canvas drafter that knows by heart what to put where; -1 leaves the noise."""

    taps, refines = (2,), False

    def __init__(self, guesses, whole=False):
        self.guesses, self.whole = guesses, whole

    def canvas(self, target, base):
        return DraftPolicy(base, self, 8, 2.0)

    def begin(self):
        return []

    def read(self, sessions, taps):
        for session, own in zip(sessions, taps):
            session.draft.append(own[2].shape[0])

    def seed(self, sessions):
        drafts = []
        for session in sessions:
            assert sum(session.draft) == session.cache.length, "all that the target has read"
            assert not session.pending.size, "and nothing is left to read"
            guess = self.guesses.get((session.draws.seed, session.canvas_index))
            guess = (
                mx.full((session.canvas.ids.size,), -1)
                if guess is None
                else mx.array(guess[: session.canvas.ids.size])
            )
            drafts.append(
                Draft(
                    mx.where(guess < 0, session.canvas.ids, guess),
                    None,
                    guess >= 0,
                    whole=self.whole,
                )
            )
        return drafts


def run(model, prompts, policy, max_tokens=256, together=True):
    """(sessions, their steps) of prompt i with seed i."""
    sessions = [
        Session(
            model, ids, policy, Draws(i, 1024), model.config.generation.eos_token_ids, max_tokens
        )
        for i, ids in enumerate(prompts)
    ]
    steps = {id(session): [] for session in sessions}
    for group in [sessions] if together else [[s] for s in sessions]:
        loop = Loop(model, group)
        while loop.active:
            for session, step in loop.advance():
                steps[id(session)].append(step)
    return sessions, [steps[id(session)] for session in sessions]


def answers(sessions):
    return [[c.tokens.tolist() for c in s.canvases] for s in sessions]


def numbers(steps):
    return [
        [(s.canvas_index, s.retry, s.argmax.tolist(), s.canvas.tolist(), s.reason) for s in own]
        for own in steps
    ]


def base_of(model, **own):
    return ReferencePolicy.from_config(model.config.generation, coverage=1 - 1e-6, **own)


def drafted(base, guesses, watchdog=8, judge=None, whole=False):
    return DraftPolicy(base, Fixed(guesses, whole), watchdog, judge)


def committed(steps):
    return {
        (i, s.canvas_index): np.array(s.argmax)
        for i, own in enumerate(steps)
        for s in own
        if s.committed
    }
