"""A target that knows its text.

Its canvases converge as a trained model's do, at a fraction of the cost.
"""

import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_diffgemma import nano
from mlx_diffgemma.checkpoint.loading import load_model
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from tests.checkpoints import FULL, SLIDING, write_checkpoint

CANVAS, VOCABULARY, END = 64, 1024, 1
# Prompts are as long as that, so that no two are answered by the same text; the first and the third
# are answered by two canvases, the others by one.
PROMPTS, ENDS = (20, 100, 190, 300, 400, 490), (20 + 94, 190 + 74, 300 + 40, 400 + 30, 490 + 20)


class Knowing(DiffusionGemma):
    """Random weights whose logits are raised where they say the next token of ``self.text``, a
    token for every position of a sequence.

    The more of a canvas is right, the surer they are, so that noise takes several steps and a good
    draft takes few.  A canvas full of end tokens, too, is believed.  A causal read expects the text
    whatever it has read.
    """

    def encode(self, inputs, caches, logits="none", **options):
        starts = [cache.length for cache in caches]
        output = super().encode(inputs, caches, logits=logits, **options)
        if output.logits is not None:
            for row, (start, ids) in enumerate(zip(starts, inputs)):
                count = output.logits[row].shape[0]
                stop = start + ids.shape[0] + 1
                output.logits[row] = output.logits[row] + 16.0 * self._is(stop - count, stop)
        return output

    def denoise(self, canvas, caches, *arguments, lengths=(), **options):
        output = super().denoise(canvas, caches, *arguments, lengths=lengths, **options)
        sizes = lengths or [canvas.shape[1]] * canvas.shape[0]
        raised, start = [], 0
        for cache, size in zip(caches, sizes):
            right = self._is(cache.length, cache.length + size)
            ids = canvas.reshape(-1)[start : start + size]
            share = mx.take_along_axis(right, ids[:, None], axis=1).mean()
            ease = self.ease[cache.length : cache.length + size, None]
            ends = (mx.arange(VOCABULARY) == END) * (ids == END).mean()
            raised.append((ease + 40.0 * share) * right + 60.0 * ends)
            start += size
        logits = output.logits + mx.concatenate(raised).reshape(output.logits.shape)
        return type(output)(logits, output.hidden, output.taps)

    def _is(self, start, stop):
        """[rows, vocabulary]: 1 at the token of each position."""
        return (self.text[start:stop, None] == mx.arange(VOCABULARY)).astype(mx.float32)


def knowing_target(folder: Path) -> Knowing:
    """Three layers under nano's tokenizer, with nano's canvas and sampler."""
    shape = dict(
        hidden=32,
        heads=4,
        kv=2,
        head_dim=8,
        global_kv=1,
        global_head_dim=16,
        layers=3,
        window=48,
        canvas=CANVAS,
        experts=2,
        top_k=1,
        vocab=VOCABULARY,
        kinds=[SLIDING, SLIDING, FULL],
    )
    calm = {"model.decoder.norm.weight": np.full(32, 0.1, dtype=np.float32)}
    write_checkpoint(folder, shape, calm=False, extra=calm)
    shutil.copy(nano.FOLDER / "generation_config.json", folder)
    model = load_model(folder, "float32")
    model.__class__ = Knowing
    rng = np.random.default_rng(0)
    text = rng.integers(100, VOCABULARY, 1024)
    text[list(ENDS)] = END
    # Held as constants: they are no parameters.
    object.__setattr__(model, "text", mx.array(text))
    object.__setattr__(
        model,
        "ease",
        mx.array(rng.uniform(4, 9, 1024) - 2.0 * (np.arange(1024) > 190).astype(np.float32)),
    )
    mx.eval(model.parameters())
    return model


def prompts_of(count: int) -> list[list[int]]:
    """The first ``count`` prompts."""
    rng = np.random.default_rng(1)
    return [rng.integers(100, VOCABULARY, size).tolist() for size in PROMPTS[:count]]
