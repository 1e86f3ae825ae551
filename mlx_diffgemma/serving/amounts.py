"""How much a request brings, measured before memory is taken for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from pydantic import BaseModel

from mlx_diffgemma.errors import ContextError, UserError
from mlx_diffgemma.images import PIXEL_LIMIT, header_pixels
from mlx_diffgemma.serving.protocol import Message, Tool

TOOL_CHARACTERS = 1_000_000  # of the schemas of all tools
HEAVY_PIXELS = 4_000_000  # of all images, from which their request takes the patient lane
HEAVY_CHARACTERS = 200_000


def characters(value: Any) -> int:
    """Of all texts in ``value``, a model or what JSON knows, however deep; addresses of images are no text."""
    found = 0
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            found += len(one)
        elif isinstance(one, BaseModel):
            waiting += [inner for name, inner in one.__dict__.items() if name not in ("url", "name", "id")]
        elif isinstance(one, dict):
            waiting += [*one, *one.values()]
        elif isinstance(one, list | tuple):
            waiting += one
    return found


def longest_token(tokenizer: TokenizerWrapper) -> int:
    """Characters of a text that one token can stand for, at most."""
    return max(map(len, tokenizer.get_vocab()))


def check_text(count: int, tokens: int, longest: int) -> None:
    """Errors: ContextError for so many characters that no ``tokens`` hold them, whatever they are."""
    if count > tokens * longest:
        raise ContextError(f"The prompt has {count:,} characters, and the {tokens:,} tokens that a prompt may have hold at most "
                           f"{tokens * longest:,}; shorten it.")


def check_tools(tools: Iterable[Tool]) -> None:
    """Errors: UserError for tools whose schemas are longer, together, than this server reads."""
    count = characters([tool.function.parameters for tool in tools])
    if count > TOOL_CHARACTERS:
        raise UserError(f"The parameters of the tools have {count:,} characters together, of at most {TOOL_CHARACTERS:,}; send "
                        "fewer tools, or shorter schemas.")


def has_images(messages: Iterable[Message]) -> bool:
    return any(_images(message) for message in messages)


def _images(message: Message) -> list[str]:
    parts = message.content if isinstance(message.content, list) else []
    return [image.url for part in parts if (image := getattr(part, "image_url", None)) is not None]


def check_pixels(messages: Iterable[Message]) -> int:
    """How many pixels the images of data URLs have together, by their headers.

    Errors: UserError for too many, and for headers that are none.
    """
    found = 0
    for message in messages:
        for url in _images(message):
            if url[:5].lower() != "data:":
                continue
            found += header_pixels(url)
            if found > PIXEL_LIMIT:
                raise UserError(f"The images of the request have more than {PIXEL_LIMIT:,} pixels together; make them smaller, "
                                "or send fewer.")
    return found
