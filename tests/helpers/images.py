"""Pictures, and prompts that contain them."""

import base64
import io

import numpy as np
from PIL import Image as pillow

from mlx_diffgemma.media.images import Image, prepare
from mlx_diffgemma.media.prompt import ImageSpan


def noise(seed, width=100, height=80):
    return pillow.fromarray(
        np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


def small(model, seed, tokens=None):
    """An image of at most 70 soft tokens, or one row of exactly the given number."""
    if tokens is None:
        return prepare(noise(seed), model.config.vision, 70)
    unit = model.config.vision.patch_size * model.config.vision.pooling_kernel_size
    pixels = np.random.default_rng(seed).integers(0, 256, (unit, unit * tokens, 3), dtype=np.uint8)
    return Image(pixels, model.config.vision.patch_size, model.config.vision.pooling_kernel_size)


def prompt_of(model, *parts):
    """(ids, placed) of text lengths and images."""
    rng, tokens, ids, placed = np.random.default_rng(0), model.config.image_tokens, [], []
    for part in parts:
        if isinstance(part, int):
            ids += rng.integers(1, 250, part).tolist()
        else:
            placed.append(ImageSpan(len(ids) + 1, part))
            ids += [tokens.begin, *[tokens.image] * part.soft_tokens, tokens.end]
    return ids, placed


def picture(width, height):
    made = io.BytesIO()
    pillow.new("1", (width, height)).save(made, "PNG")
    return "data:image/png;base64," + base64.b64encode(made.getvalue()).decode()
