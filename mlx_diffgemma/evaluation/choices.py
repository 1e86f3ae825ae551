"""Multiple choice without generating: what the model believes at the first positions of a canvas that says nothing.

All choices are read from the same forwards, so that ten cost what one does.

    >>> read_choices(model, prompt_ids, [yes_ids, no_ids])
    array([0.97, 0.03])
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_diffgemma.cache import Cache
from mlx_diffgemma.draws import Draws
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.model import DiffusionGemma
from mlx_diffgemma.prompt import PlacedImage, read_rows


def read_choices(model: DiffusionGemma, prompt: Sequence[int], choices: Sequence[Sequence[int]], seed: int = 0,
                 reads: int = 4, images: Sequence[PlacedImage] = ()) -> np.ndarray:
    """The probability of each of ``choices`` (token ids, an end token included where the answer ends there), summing to 1.

    A choice's log-probability is the sum over its positions of the canvas mode's at a first step, averaged over ``reads``
    canvases of noise; ``images`` stand in the prompt.  Positions are read independently of each other: exact for choices of one
    token, an approximation for longer ones.  Errors: UserError for choices that are equal, empty or longer than a canvas.
    """
    length = model.config.canvas_length
    if len({tuple(choice) for choice in choices}) != len(choices):
        raise UserError("Two choices are the same.")
    if not all(0 < len(choice) <= length for choice in choices):
        raise UserError(f"A choice must have between 1 and {length} tokens.")
    cache = Cache(model.config.text)
    rows, blocks = read_rows(model, prompt, 0, images)
    model.encode([rows], [cache], blocks=[blocks])
    draws = [Draws(seed + read, model.config.text.vocab_size) for read in range(reads)]
    noise = np.stack([draw.step(0, 0, 0, 0, length).initial for draw in draws])
    longest = max(map(len, choices))
    logits = model.denoise(mx.array(noise), [cache] * reads).logits[:, :longest]
    believed = np.array((logits - mx.logsumexp(logits, axis=-1, keepdims=True)).mean(axis=0))
    scores = np.array([believed[np.arange(len(choice)), list(choice)].sum() for choice in choices])
    shares = np.exp(scores - scores.max())
    return shares / shares.sum()
