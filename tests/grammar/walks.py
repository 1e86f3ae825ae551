"""Random texts of an automaton over bytes."""

import numpy as np


def distances(delta, accepting):
    """How many steps it takes at least to accept."""
    away, steps = np.where(accepting, 0, -1), 0
    while True:
        near = (away < 0) & ((delta >= 0) & (away[delta] == steps)).any(axis=1)
        if not near.any():
            return away
        steps += 1
        away[near] = steps


def walk(automaton, rng, free=20, stop=0.1):
    """A text: ``free`` random steps, from where the shortest way is taken to an end."""
    away, state, content = distances(automaton.delta, automaton.accepting), 0, bytearray()
    while True:
        row = automaton.delta[state]
        targets = np.unique(row[row >= 0])
        if automaton.accepting[state] and (
            len(content) >= free or not targets.size or rng.random() < stop
        ):
            return bytes(content)
        if len(content) >= free:
            targets = targets[away[targets] == away[targets].min()]
        state = rng.choice(targets)
        content.append(rng.choice(np.flatnonzero(row == state)))
