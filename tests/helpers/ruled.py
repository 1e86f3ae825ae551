"""Sessions under a policy, and the results of the loop as plain values."""

from mlx_diffgemma.decoding.loop import Loop
from mlx_diffgemma.decoding.session import Session
from mlx_diffgemma.sampling.draws import Draws
from tests.helpers.sessions import PROMPTS

NUMBERS = {
    "max_steps": 6,
    "entropy_bound": 0.1,
    "t_min": 0.4,
    "t_max": 0.8,
    "confidence_threshold": 0.005,
    "stability": 1,
}


def session(model, row, policy, max_tokens=48, eos=(1,), draws=None):
    return Session(model, PROMPTS[row], policy, draws or Draws(row, 301), eos, max_tokens)


def run(model, *sessions):
    """For each session all steps that left the loop."""
    steps, loop = {id(s): [] for s in sessions}, Loop(model, sessions)
    while loop.active:
        for s, step in loop.advance():
            steps[id(s)].append(step)
    return [steps[id(s)] for s in sessions]


def plain(steps):
    return [
        (
            s.canvas_index,
            s.retry,
            s.step,
            s.canvas.tolist(),
            s.argmax.tolist(),
            s.mean_entropy,
            s.reason,
            s.rejected,
        )
        for s in steps
    ]
