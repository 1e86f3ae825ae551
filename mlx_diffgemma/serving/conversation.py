"""Turns the messages of a request into those of the chat template, and collects their images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlx_diffgemma.errors import UserError
from mlx_diffgemma.media.images import open_images
from mlx_diffgemma.media.prompt import Medium
from mlx_diffgemma.serving.protocols.messages import Message, ToolCall
from mlx_diffgemma.text.dialect import read_arguments


def template_messages(
    messages: Sequence[Message],
    allow_files: bool = False,
    allow_urls: bool = False,
) -> tuple[list[dict[str, Any]], list[Medium]]:
    """Turn messages into what the chat template takes.

    Args:
        messages: the messages of the request.
        allow_files: images may be paths on this machine.
        allow_urls: images may be fetched from elsewhere; otherwise they must be data URLs.

    Returns:
        (Messages as ``tokenizer.chat_ids`` takes them, their images in the order of the markers).

    Raises:
        UserError: an image cannot be read or is not allowed, or a tool answers a call that was not
            made.
    """
    made = list[dict[str, Any]]()
    urls = list[str]()
    names = dict[str, str]()  # the names of functions, by the id of the call
    for index, message in enumerate(messages):
        turn: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
        if isinstance(message.content, list):
            turn["content"] = []
            for part in message.content:
                if part.image_url is None:
                    turn["content"].append({"type": "text", "text": part.text})
                else:
                    urls.append(part.image_url.url)
                    turn["content"].append({"type": "image"})
        else:
            turn["content"] = message.content or ""
        if message.tool_calls:
            names |= {call.id: call.function.name for call in message.tool_calls}
            turn["tool_calls"] = [_template_call(call) for call in message.tool_calls]
        thought = message.reasoning_content or message.reasoning
        if message.role == "assistant" and isinstance(thought, str) and thought:
            turn["reasoning_content"] = thought
        if message.tool_call_id is not None:
            if message.tool_call_id not in names:
                raise UserError(
                    f"messages.{index}: no call before it has the id {message.tool_call_id!r}."
                )
            turn |= {"name": names[message.tool_call_id], "tool_call_id": message.tool_call_id}
        made.append(turn)
    images = open_images(urls, allow_files, allow_urls) if urls else []
    return made, list(images)


def _template_call(call: ToolCall) -> dict[str, Any]:
    """The form of a call in the chat template.

    Arguments that are not a JSON object become a text, see ``dialect.read_arguments``.
    """
    return {
        "id": call.id,
        "type": "function",
        "function": {
            "name": call.function.name,
            "arguments": read_arguments(call.function.arguments),
        },
    }
