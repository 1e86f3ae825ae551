"""Prompts with images.

An image takes one position of the ids for each of its soft tokens, and the model reads the image's
embeddings there.

>>> ids, images = expand_image_tokens(chat_ids(tokenizer, messages), [image], config.image_tokens, tokenizer)
>>> x, blocks = embed_inputs(model, ids[:100], 0, images)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_diffgemma.errors import UserError
from mlx_diffgemma.media.images import (
    BUDGETS,
    Image,
    ImageSource,
    check_budget,
    open_image,
    prepare,
)
from mlx_diffgemma.media.video import Clip, Film, Video, prepare_video
from mlx_diffgemma.model.config import ImageTokens, ModelConfig, VisionConfig
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma

T = TypeVar("T")
Block = tuple[int, int]
Medium: TypeAlias = "ImageSource | Video | Clip | Image | Film"


@dataclass(frozen=True)
class ImageSpan:
    """An image whose soft tokens are at the positions ``start`` to ``stop`` of a prompt."""

    start: int
    image: Image

    @property
    def stop(self) -> int:
        return self.start + self.image.soft_tokens


def prepare_media(
    sources: Sequence[Medium], config: ModelConfig, budget: int | None = None
) -> list[Image | Film]:
    """Open and resize images and videos; prepared ones are returned as they are.

    Args:
        sources: The images and videos.
        config: The config of the model that will read them.
        budget: The most soft tokens an image or a frame may take.  None means the checkpoint's own
            number for an image, and 70 for a frame of a video.

    Raises:
        UserError: ``sources`` is not a list, the checkpoint has no vision tower, an image was
            prepared for another model; or as ``open_image`` and ``prepare_video``.
    """
    if not check_list(sources):
        return []
    vision, tokens = check_vision(config)
    image_budget = tokens.budget if budget is None else budget
    prepared: list[Image | Film] = []
    for source in sources:
        if isinstance(source, Image | Film):
            prepared.append(_check_fits(source, vision))
        elif isinstance(source, Video | Clip):
            frame_budget = BUDGETS[0] if budget is None else check_budget(budget)
            prepared.append(prepare_video(source, vision, frame_budget))
        else:
            prepared.append(prepare(open_image(source), vision, image_budget))
    return prepared


def check_list(sources: Sequence[T]) -> Sequence[T]:
    """Check that ``sources`` is a list, and return it.

    Raises:
        UserError: It is a single image or video.
    """
    if isinstance(sources, str | bytes) or not isinstance(sources, Sequence):
        raise UserError(
            f"images= takes a list, even of a single image or video, and got "
            f"{type(sources).__name__}; give a list, images=[…]."
        )
    return sources


def check_vision(config: ModelConfig) -> tuple[VisionConfig, ImageTokens]:
    """The vision tower and the image tokens of a model.

    Raises:
        UserError: The checkpoint lacks one of them.
    """
    if config.vision is None:
        raise UserError(
            "This checkpoint has no vision weights; take one that has them, such as 'nano-vision', "
            "or leave the images out."
        )
    if config.image_tokens is None:
        raise UserError(
            "config.json must name boi_token_id, image_token_id and eoi_token_id, or images have no "
            "place in a prompt; download the file again, or leave the images out."
        )
    return config.vision, config.image_tokens


def _check_fits(medium: Image | Film, vision: VisionConfig) -> Image | Film:
    """Check that ``medium`` was cut into patches for this tower, and return it.

    Raises:
        UserError: It was made for another tower.
    """
    size = vision.patch_size
    side = vision.pooling_kernel_size
    for image in _frames(medium):
        fits = image.patch_size == size and image.side == side
        if not fits or max(image.grid) > vision.position_embedding_size:
            raise UserError(
                f"An image was prepared for another model, with patches of {image.patch_size} "
                f"pixels, {image.patch_size} x {image.patch_size} a soft token, where this one "
                f"takes {size} and {size} x {size} and at most "
                f"{vision.position_embedding_size} in a row; prepare it with this model's config."
            )
    return medium


def _frames(medium: Image | Film) -> tuple[Image, ...]:
    return medium.frames if isinstance(medium, Film) else (medium,)


def expand_image_tokens(
    ids: Sequence[int],
    media: Sequence[Image | Film],
    tokens: ImageTokens | None,
    tokenizer: TokenizerWrapper,
) -> tuple[list[int], tuple[ImageSpan, ...]]:
    """Replace each marker in ``ids`` by the tokens of its image or video.

    The time of a frame, such as ``00:07 ``, comes before it.

    Args:
        ids: A prompt in which one image token marks each image or video.
        media: The images and videos, in the order of the markers.
        tokens: The image tokens of the model; None for a model without a vision tower, in which a
            marker is text.
        tokenizer: The tokenizer, for the times.

    Returns:
        (the ids, where the images are in them)

    Raises:
        UserError: The numbers of markers and of images differ.
    """
    markers: list[int] = []
    if tokens is not None:
        markers = [position for position, token in enumerate(ids) if token == tokens.image]
    if len(markers) != len(media):
        raise UserError(
            f"The prompt has {len(markers)} image marker(s) and {len(media)} image(s) came with it; "
            "give one marker for each, as {'type': 'image'} in the content of a message."
        )
    if tokens is None or not media:
        return list(ids), ()
    expanded: list[int] = []
    images: list[ImageSpan] = []
    done = 0
    for marker, medium in zip(markers, media, strict=True):
        expanded += ids[done:marker]
        done = marker + 1
        for number, image in enumerate(_frames(medium)):
            if isinstance(medium, Film):
                minutes, seconds = divmod(int(medium.seconds[number]), 60)
                text = f"{' ' if number else ''}{minutes:02}:{seconds:02} "
                expanded += tokenizer.encode(text, add_special_tokens=False)
            expanded.append(tokens.begin)
            images.append(ImageSpan(len(expanded), image))
            expanded += [tokens.image] * image.soft_tokens + [tokens.end]
    return expanded + list(ids[done:]), tuple(images)


def cache_key(ids: Sequence[int], images: Sequence[ImageSpan]) -> list[int]:
    """``ids`` with a number made from the image's content at each position of an image.

    Two prompts are then equal only if their images are.
    """
    keys = list(ids)
    for placed in images:
        key = -1 - int.from_bytes(placed.image.digest[:7], "big")
        keys[placed.start : placed.stop] = [key] * placed.image.soft_tokens
    return keys


def next_chunk(pending: int, start: int, images: Sequence[ImageSpan], size: int) -> int:
    """How many positions to read at once: about ``size``, without cutting an image in two.

    Args:
        pending: How many positions are still to be read.
        start: The first of them.
        images: The images of the prompt.
        size: The number of positions to aim for.
    """
    # A last chunk of one row joins the chunk before it: a single row uses other kernels and rounds
    # differently.
    if pending <= size + 1:
        return pending
    stop = start + size
    for placed in images:
        if placed.start < stop < placed.stop:
            stop = placed.start if placed.start > start + 1 else placed.stop
    return pending if pending - (stop - start) <= 1 else stop - start


def embed_inputs(
    model: DiffusionGemma,
    ids: Sequence[int] | np.ndarray,
    start: int,
    images: Sequence[ImageSpan],
) -> tuple[mx.array, list[Block]]:
    """The model's input for part of a prompt.

    Args:
        model: The model.
        ids: The ids of the part.
        start: The position of the part in the prompt.
        images: The images of the prompt; each is inside of the part or outside of it.

    Returns:
        (ids [n], or embeddings [n, hidden] where the part has images; the ranges of rows that see
        each other both ways)
    """
    inside = [placed for placed in images if start <= placed.start < start + len(ids)]
    rows = mx.array(ids)
    if not inside:
        return rows, []
    pieces: list[mx.array] = []
    done = 0
    for placed in inside:
        if placed.start - start > done:
            pieces.append(model.embed(rows[done : placed.start - start]))
        pieces.append(model.encode_image(mx.array(placed.image.patches), placed.image.grid))
        # Images are read one at a time, because the tower's inner values take many times the memory
        # of its output.
        mx.eval(pieces[-1])
        done = placed.stop - start
    if done < rows.size:
        pieces.append(model.embed(rows[done:]))
    tokens = model.config.image_tokens
    blocks: list[Block] = []
    if tokens is not None and tokens.both_ways:
        blocks = [(placed.start - start, placed.stop - start) for placed in inside]
    return mx.concatenate(pieces), blocks
