"""The size of a request, measured before memory is allocated for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from pydantic import BaseModel

from mlx_diffgemma.errors import ContextError, UserError
from mlx_diffgemma.media.images import check_budget, header_pixels
from mlx_diffgemma.media.prompt import check_vision
from mlx_diffgemma.media.sources import is_data
from mlx_diffgemma.model.config import ModelConfig
from mlx_diffgemma.serving.protocols.messages import Message
from mlx_diffgemma.serving.protocols.tools import Tool

TOOL_CHARACTERS = 1_000_000  # the most characters of the schemas of all tools
HEAVY_PIXELS = 4_000_000  # a request whose images have more is prepared in the patient lane
HEAVY_CHARACTERS = 200_000
MOST_IMAGES = 128  # the most images of a request; preparing even a small one takes megabytes


class PromptBounds:
    """The bounds of a prompt.  ``max_tokens`` are those of a prompt; None for the context."""

    def __init__(
        self, config: ModelConfig, tokenizer: TokenizerWrapper, max_tokens: int | None
    ) -> None:
        self._config = config
        self._longest_token = longest_token(tokenizer)
        self._max_tokens = max_tokens or config.text.max_position_embeddings

    def check_text(self, texts: Any) -> bool:
        """Whether ``texts`` are so long that preparing them takes much memory.

        Raises:
            ContextError: more text than fits.
        """
        count = characters(texts)
        check_text(count, self._max_tokens, self._longest_token)
        return count > HEAVY_CHARACTERS

    def check_media(self, messages: Sequence[Message], image_tokens: int | None) -> bool:
        """Whether the images of ``messages`` may take much memory.

        Raises:
            ContextError: more images than fit.
            UserError: more pixels than a request may have, or images that the model cannot see.
        """
        pixels = check_pixels(messages)
        if self._config.vision is not None:  # otherwise the preparation says what is missing
            _, tokens = check_vision(self._config)
            budget = tokens.budget if image_tokens is None else check_budget(image_tokens)
            check_images(messages, self._max_tokens, budget)
        # Other images may be large, and a download may take longer than the quick lane allows.
        return pixels > HEAVY_PIXELS or have_unknown_size(messages)


def characters(value: Any) -> int:
    """Count the characters of all texts in ``value``, at any depth.

    ``value`` is a model of a request, or a JSON value.  URLs of images, names and ids do not count.
    """
    count = 0
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            count += len(item)
        elif isinstance(item, BaseModel):
            waiting += [
                field for name, field in item.__dict__.items() if name not in ("url", "name", "id")
            ]
        elif isinstance(item, dict):
            waiting += [*item, *item.values()]
        elif isinstance(item, list | tuple):
            waiting += item
    return count


def longest_token(tokenizer: TokenizerWrapper) -> int:
    """The most characters of a text that one token can stand for."""
    return max(map(len, tokenizer.get_vocab()))


def check_text(count: int, tokens: int, longest: int) -> None:
    """Check that a text may fit in a number of tokens.

    Args:
        count: the characters of the text.
        tokens: the most tokens.
        longest: the most characters that one token can stand for.

    Raises:
        ContextError: it cannot fit, whatever the characters are.
    """
    if count > tokens * longest:
        raise ContextError(
            f"The prompt has {count:,} characters, and the {tokens:,} tokens that a prompt may "
            f"have hold at most {tokens * longest:,}; shorten it."
        )


def check_tools(tools: Iterable[Tool]) -> None:
    """Check the length of the schemas of all tools together.

    Raises:
        UserError: they are longer than this server reads.
    """
    count = characters([tool.function.parameters for tool in tools])
    if count > TOOL_CHARACTERS:
        raise UserError(
            f"The parameters of the tools have {count:,} characters together, of at most "
            f"{TOOL_CHARACTERS:,}; send fewer tools, or shorter schemas."
        )


def has_images(messages: Iterable[Message]) -> bool:
    return any(_images(message) for message in messages)


def _images(message: Message) -> list[str]:
    """The URLs of the images in ``message``."""
    parts = message.content if isinstance(message.content, list) else []
    return [image.url for part in parts if (image := getattr(part, "image_url", None)) is not None]


def check_images(messages: Iterable[Message], tokens: int, budget: int) -> None:
    """Check that the images may fit in a prompt.

    An image takes at least half of its budget of soft tokens, since small images are scaled up.

    Args:
        messages: the messages with the images.
        tokens: the most tokens of the prompt.
        budget: the most soft tokens of an image.

    Raises:
        ContextError: they cannot fit, whatever their shape is.
    """
    count = sum(len(_images(message)) for message in messages)
    least = count * (budget // 2)
    if least > tokens:
        raise ContextError(
            f"The request has {count:,} images, which take at least {least:,} tokens, and a prompt "
            f"may have {tokens:,}; send fewer, or a smaller image_tokens."
        )


def check_pixels(messages: Iterable[Message]) -> int:
    """The number of pixels of all images in data URLs, by their headers.

    Raises:
        UserError: too many pixels or images, or an invalid header.
    """
    urls = [url for message in messages for url in _images(message)]
    if len(urls) > MOST_IMAGES:
        raise UserError(
            f"The request has {len(urls):,} images, of at most {MOST_IMAGES}; send fewer."
        )
    return header_pixels([url for url in urls if is_data(url)])


def have_unknown_size(messages: Iterable[Message]) -> bool:
    """Whether there are images outside the request, whose size is known only once they are read."""
    return any(not is_data(url) for message in messages for url in _images(message))
