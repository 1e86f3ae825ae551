"""From the messages of a request to what the chat template takes, and the images that came with them."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

from jinja2 import meta
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_diffgemma.dialect import read_arguments
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.images import open_image
from mlx_diffgemma.prompt import Medium
from mlx_diffgemma.serving.protocol import Message, ToolCall
from mlx_diffgemma.templates import syntax

# Variables of templates, and arguments of apply_chat_template, that are not for a request to set.
RESERVED = ("messages", "tools", "tokenize", "add_generation_prompt", "chat_template", "return_dict", "return_tensors", "documents",
            "think", "tokenizer", "conversation", "continue_final_message", "padding", "truncation", "max_length", "self",
            "return_assistant_tokens_mask", "sanitize_control_tokens", "tokenizer_kwargs", "enable_thinking", "raise_exception",
            "strftime_now")


def template_messages(messages: Sequence[Message], allow_files: bool = False, allow_urls: bool = False,
                      ) -> tuple[list[dict[str, Any]], list[Medium]]:
    """(Messages as ``tokenizer.chat_ids`` takes them; their images, in the order of their markers).

    Images are data URLs; remote ones and paths only where they are allowed.  Errors: UserError for an image that cannot be read or
    is not allowed, and for a tool's answer to a call that nobody made.
    """
    made, images, names = list[dict[str, Any]](), list[Medium](), dict[str, str]()
    for place, message in enumerate(messages):
        found: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
        if isinstance(message.content, list):
            found["content"] = []
            for part in message.content:
                if part.image_url is None:
                    found["content"].append({"type": "text", "text": part.text})
                else:
                    images.append(open_image(part.image_url.url, allow_files=allow_files, allow_urls=allow_urls))
                    found["content"].append({"type": "image"})
        else:
            found["content"] = message.content or ""
        if message.tool_calls:
            names |= {call.id: call.function.name for call in message.tool_calls}
            found["tool_calls"] = [_template_call(call) for call in message.tool_calls]
        thought = message.reasoning_content or message.reasoning
        if message.role == "assistant" and isinstance(thought, str) and thought:
            found["reasoning_content"] = thought
        if message.tool_call_id is not None:
            if message.tool_call_id not in names:
                raise UserError(f"messages.{place}: no call before it has the id {message.tool_call_id!r}.")
            found |= {"name": names[message.tool_call_id], "tool_call_id": message.tool_call_id}
        made.append(found)
    return made, images


def _template_call(call: ToolCall) -> dict[str, Any]:
    """Arguments that are no JSON object do not end a conversation: they stand as a text, see ``dialect.read_arguments``."""
    return {"id": call.id, "type": "function",
            "function": {"name": call.function.name, "arguments": read_arguments(call.function.arguments)}}


def check_variables(tokenizer: TokenizerWrapper, names: Iterable[str]) -> None:
    """Errors: UserError for a name that the chat template does not read, or that is not for a request to set."""
    reserved = {*RESERVED, *tokenizer.special_tokens_map}
    inspected = tokenizer._chat_template is None and isinstance(tokenizer.chat_template, str)  # else a function, or several
    read = _variables(tokenizer.chat_template) if inspected else None
    for name in names:
        if name in reserved:
            raise UserError(f"chat_template_kwargs: {name} is not for a request to set; leave it out.")
        if read is not None and name not in read:
            known = ", ".join(sorted(read - reserved | {"enable_thinking"}))
            raise UserError(f"chat_template_kwargs: the model's chat template does not read {name!r:.100}, only {known}; leave it "
                            "out.")


@functools.lru_cache(maxsize=4)
def _variables(template: str) -> frozenset[str] | None:
    """What a template reads of what it is given; None where that cannot be told."""
    try:
        return frozenset(meta.find_undeclared_variables(syntax(template)))
    except UserError:  # it cannot be read, which is told when it is rendered
        return None
