"""Drafters without training, for tests: random ones, and one that knows the answer as far as it is
told to.
"""

from dataclasses import replace

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from drafter import Drafter, DrafterConfig
from drafter.config import DraftLayer


def small_config(target, /, **changes):
    text = target.config.text
    config = DrafterConfig(
        hidden_size=text.hidden_size,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=text.vocab_size,
        num_target_layers=len(text.layers),
        taps=(0, len(text.layers) - 2),
        layers=(DraftLayer(None, False), DraftLayer(9, False)),
        block_size=8,
        self_conditioning=True,
        confidence=True,
    )
    return replace(config, **changes)


def random_drafter(target, /, seed=0, **changes):
    mx.random.seed(seed)
    drafter = Drafter(small_config(target, **changes))
    drafter.update(
        tree_map(
            lambda x: (
                x
                if x.dtype == mx.int32
                else mx.random.normal(x.shape) * x.shape[-1] ** -0.5
                if x.ndim > 1
                else 1 + 0.2 * mx.random.normal(x.shape)
            ),
            drafter.parameters(),
        )
    )
    if drafter.config.head_size:
        ids = np.random.default_rng(seed).choice(
            target.config.text.vocab_size, drafter.config.head_size, replace=False
        )
        drafter.head_ids = mx.array(np.sort(ids).astype(np.int32))
    drafter.eval()
    mx.eval(drafter.parameters())
    return drafter


class Oracle:
    """Proposes what plain decoding gave, and a wrong token at a share of the places; also as
    ``draft_model``.
    """

    longest, taps = 6, (1,)

    def __init__(self, wrong, vocabulary, seed=0):
        self.answers, self.wrong, self.vocabulary, self.rng = (
            {},
            wrong,
            vocabulary,
            np.random.default_rng(seed),
        )
        self.embed_inputs = {}

    def causal(self, target):
        return self

    def begin(self):
        return None

    def read(self, sessions, taps):
        for session, own in zip(sessions, taps):
            self.embed_inputs.setdefault(id(session), []).append(own[1])
            self.kept = session  # ids are told apart while sessions live

    def propose(self, sessions, counts):
        guesses = []
        for session, count in zip(sessions, counts):
            known = self.answers[session.draws.seed][len(session.tokens) :][:count]
            guesses.append(
                [
                    int(self.rng.integers(self.vocabulary))
                    if self.rng.random() < self.wrong
                    else int(t)
                    for t in known
                ]
            )
        return guesses
