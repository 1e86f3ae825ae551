"""Sessions of the tiny model, and a model that returns given logits."""

import mlx.core as mx
import numpy as np

from mlx_diffgemma.decoding.session import Session
from mlx_diffgemma.model.diffusion_gemma import Denoised
from mlx_diffgemma.sampling.draws import Draws
from mlx_diffgemma.sampling.policy import ReferencePolicy

PROMPTS = [
    np.random.default_rng(i).integers(7, 301, n).tolist() for i, n in enumerate((5, 40, 17, 23))
]


def policy(**changes):
    return ReferencePolicy(
        **{
            "max_steps": 6,
            "entropy_bound": 0.1,
            "t_min": 0.4,
            "t_max": 0.8,
            "confidence_threshold": 0.005,
            "stability": 1,
        }
        | changes
    )


def session(model, row, max_tokens=48, eos=(1,), **changes):
    return Session(model, PROMPTS[row], policy(**changes), Draws(row, 301), eos, max_tokens)


class Scripted:
    """Stands in for the model: the logits of each step are given."""

    def __init__(self, real, script):
        self.real, self.script, self.config, self.dtype = (
            real,
            list(script),
            real.config,
            real.dtype,
        )
        self.forwards = 0

    def encode(self, *args, **options):
        return self.real.encode(*args, **options)

    def soft_embed(self, probabilities, ids=None):
        return self.real.soft_embed(probabilities, ids)

    def denoise(self, canvas, caches, soft_embedding=None, taps=(), commits=(), lengths=()):
        self.forwards += 1
        return Denoised(
            mx.array(self.script.pop(0), dtype=mx.float32).reshape(-1, 301)[: canvas.size], None, {}
        )


def certain(token):
    return np.eye(301)[None, [token] * 24] * 60.0


UNSURE = np.zeros((1, 24, 301))
