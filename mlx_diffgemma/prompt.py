"""A prompt with images: ids in which each image takes as many places as it has soft tokens, and what is read there instead.

    >>> ids, images = place(chat_ids(tokenizer, messages), [image], config.image_tokens, tokenizer)
    >>> x, blocks = read_rows(model, ids[:100], 0, images)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_diffgemma.config import ImageTokens, ModelConfig, VisionConfig
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.images import BUDGETS, Image, ImageSource, check_budget, open_image, prepare
from mlx_diffgemma.video import Clip, Film, Video, prepare_video

if TYPE_CHECKING:
    from mlx_diffgemma.model import DiffusionGemma

T = TypeVar("T")
Block = tuple[int, int]
Medium: TypeAlias = "ImageSource | Video | Clip | Image | Film"


@dataclass(frozen=True)
class PlacedImage:
    """An image whose soft tokens stand at the positions ``start`` to ``stop`` of a prompt."""

    start: int
    image: Image

    @property
    def stop(self) -> int:
        return self.start + self.image.soft_tokens


def prepare_media(sources: Sequence[Medium], config: ModelConfig, budget: int | None = None) -> list[Image | Film]:
    """Open and resize images and videos; what is so already stays.  ``budget`` of soft tokens None: the checkpoint's own, and 70
    for a frame of a video.

    Errors: UserError for what is no list, a checkpoint without eyes, what was prepared for another model, and as ``open_image``
    and ``prepare_video``.
    """
    if not check_list(sources):
        return []
    vision, tokens = check_eyes(config)
    made: list[Image | Film] = []
    for source in sources:
        if isinstance(source, Image | Film):
            made.append(_check_fits(source, vision))
        elif isinstance(source, Video | Clip):
            made.append(prepare_video(source, vision, BUDGETS[0] if budget is None else check_budget(budget)))
        else:
            made.append(prepare(open_image(source), vision, tokens.budget if budget is None else budget))
    return made


def check_list(sources: Sequence[T]) -> Sequence[T]:
    """Errors: UserError for one image or video in place of a list of them."""
    if isinstance(sources, str | bytes) or not isinstance(sources, Sequence):
        raise UserError(f"images= takes a list, even of a single image or video, and got {type(sources).__name__}; give a list, "
                        "images=[…].")
    return sources


def check_eyes(config: ModelConfig) -> tuple[VisionConfig, ImageTokens]:
    """The tower and the image tokens.  Errors: UserError for a checkpoint that lacks either."""
    if config.vision is None:
        raise UserError("This checkpoint has no vision weights; take one that has them, such as 'nano-vision', or leave the images "
                        "out.")
    if config.image_tokens is None:
        raise UserError("config.json must name boi_token_id, image_token_id and eoi_token_id, or images have no place in a prompt; "
                        "download the file again, or leave the images out.")
    return config.vision, config.image_tokens


def _check_fits(medium: Image | Film, vision: VisionConfig) -> Image | Film:
    """Errors: UserError for what was cut into patches for another tower."""
    for image in medium.frames if isinstance(medium, Film) else (medium,):
        own, wanted = (image.patch_size, image.side), (vision.patch_size, vision.pooling_kernel_size)
        if own != wanted or max(image.grid) > vision.position_embedding_size:
            raise UserError(f"An image was prepared for another model, with patches of {own[0]} pixels, {own[1]} x {own[1]} a soft "
                            f"token, where this one takes {wanted[0]} and {wanted[1]} x {wanted[1]} and at most "
                            f"{vision.position_embedding_size} in a row; prepare it with this model's config.")
    return medium


def place(ids: Sequence[int], media: Sequence[Image | Film], tokens: ImageTokens | None, tokenizer: TokenizerWrapper,
          ) -> tuple[list[int], tuple[PlacedImage, ...]]:
    """``ids`` with what stands for an image or video in the place of each marker, which is one image token.

    A frame of a video comes behind its time: ``00:07 ``.  Without ``tokens``, of a model without eyes, a marker is text.
    Errors: UserError for more markers than images, or fewer.
    """
    markers = [] if tokens is None else [place for place, token in enumerate(ids) if token == tokens.image]
    if len(markers) != len(media):
        raise UserError(f"The prompt has {len(markers)} image marker(s) and {len(media)} image(s) came with it; give one marker "
                        "for each, as {'type': 'image'} in the content of a message.")
    if tokens is None or not media:
        return list(ids), ()
    made, images, done = list[int](), list[PlacedImage](), 0
    for marker, medium in zip(markers, media, strict=True):
        made += ids[done:marker]
        done = marker + 1
        for number, image in enumerate(medium.frames if isinstance(medium, Film) else (medium,)):
            if isinstance(medium, Film):
                minutes, seconds = divmod(int(medium.seconds[number]), 60)
                text = f"{' ' if number else ''}{minutes:02}:{seconds:02} "
                made += tokenizer.encode(text, add_special_tokens=False)
            made.append(tokens.begin)
            images.append(PlacedImage(len(made), image))
            made += [tokens.image] * image.soft_tokens + [tokens.end]
    return made + list(ids[done:]), tuple(images)


def keyed(ids: Sequence[int], images: Sequence[PlacedImage]) -> list[int]:
    """``ids`` with a number of its content at the places of each image, so that two prompts are alike only where images are."""
    keys = list(ids)
    for placed in images:
        keys[placed.start : placed.stop] = [-1 - int.from_bytes(placed.image.digest[:7], "big")] * placed.image.soft_tokens
    return keys


def next_chunk(pending: int, start: int, images: Sequence[PlacedImage], size: int) -> int:
    """How many of the ``pending`` positions from ``start`` on are read at once: about ``size``, and no image in two pieces."""
    # A last chunk of one row joins the one before it: a single row takes other kernels and rounds differently.
    if pending <= size + 1:
        return pending
    stop = start + size
    for placed in images:
        if placed.start < stop < placed.stop:
            stop = placed.start if placed.start > start + 1 else placed.stop
    return pending if pending - (stop - start) <= 1 else stop - start


def read_rows(model: DiffusionGemma, ids: Sequence[int] | np.ndarray, start: int, images: Sequence[PlacedImage],
              ) -> tuple[mx.array, list[Block]]:
    """(ids [n] or embeddings [n, hidden], the ranges of rows that see each other both ways) of the positions from ``start`` on."""
    inside = [placed for placed in images if start <= placed.start < start + len(ids)]
    rows = mx.array(ids)
    if not inside:
        return rows, []
    pieces, done = list[mx.array](), 0
    for placed in inside:
        if placed.start - start > done:
            pieces.append(model.embed(rows[done : placed.start - start]))
        pieces.append(model.see(mx.array(placed.image.patches), placed.image.grid))
        # One image after the other: what the tower holds in between is many times what comes out of it.
        mx.eval(pieces[-1])
        done = placed.stop - start
    if done < rows.size:
        pieces.append(model.embed(rows[done:]))
    tokens = model.config.image_tokens
    both_ways = tokens is not None and tokens.both_ways
    return mx.concatenate(pieces), [(placed.start - start, placed.stop - start) for placed in inside] if both_ways else []
