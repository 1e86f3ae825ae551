"""Training examples from jsonl files in mlx-lm's formats: chat, completions or text, one object a
line.

{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
{"prompt": "…", "completion": "…"}
{"text": "…"}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_diffgemma.errors import UserError
from mlx_diffgemma.files import read_lines
from mlx_diffgemma.text.tokenizer import answer_ids, chat_ids, encode_prompt

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Example:
    """``ids`` is int32 [n]; the answer, with its end token, starts at index ``answer``."""

    ids: np.ndarray
    answer: int


@dataclass(frozen=True)
class Split:
    """The examples of one file.

    Attributes:
        examples: Those within the limit.
        too_long: How many examples exceed the limit and are left out.
        longest: The tokens of the longest example of the file.
    """

    examples: tuple[Example, ...]
    too_long: int = 0
    longest: int = 0


def load_splits(
    folder: Path,
    tokenizer: TokenizerWrapper,
    end: int,
    limit: int,
    allow_control_tokens: bool = False,
) -> dict[str, Split]:
    """Read train.jsonl, valid.jsonl and test.jsonl.

    Args:
        folder: The folder of the files; any of them may be missing.
        tokenizer: The model's tokenizer.
        end: The token that ends a text.
        limit: Examples of more tokens are left out.
        allow_control_tokens: The data may hold control tokens.  False: they are read as text.

    Returns:
        The examples of each file.

    Raises:
        UserError: A file cannot be used; the error names file and line.
    """
    if not folder.is_dir():
        raise UserError(
            f"There is no data folder {folder}; it should hold train.jsonl, and valid.jsonl and test.jsonl if wanted."
        )
    paths = {name: folder / f"{name}.jsonl" for name in SPLITS}
    return {
        name: load_split(path, tokenizer, end, limit, allow_control_tokens)
        for name, path in paths.items()
        if path.exists()
    }


def load_split(
    path: Path,
    tokenizer: TokenizerWrapper,
    end: int,
    limit: int,
    allow_control_tokens: bool = False,
) -> Split:
    """Read one file; arguments as in ``load_splits``.

    Raises:
        UserError: A line is no JSON, lacks a field or has an empty answer, or there is no example.
    """
    examples = []
    lengths = []
    for example in read_lines(
        path, lambda entry: _example(entry, tokenizer, end, allow_control_tokens)
    ):
        lengths.append(example.ids.size)
        if example.ids.size <= limit:
            examples.append(example)
    if not lengths:
        raise UserError(f"{path} holds no examples.")
    if not examples:
        raise UserError(
            f"All {len(lengths)} examples of {path} exceed {limit} tokens (the shortest has {min(lengths)}); "
            "raise --max-seq-length."
        )
    return Split(tuple(examples), len(lengths) - len(examples), max(lengths))


def _example(
    entry: Any, tokenizer: TokenizerWrapper, end: int, allow_control_tokens: bool
) -> Example:
    if not isinstance(entry, Mapping):
        raise UserError(f"an object is expected, got {type(entry).__name__}.")
    if entry.get("images"):
        raise UserError("models are tuned on text only; leave out the lines with 'images'.")
    if "messages" in entry:
        return _chat(entry["messages"], entry.get("tools"), tokenizer, allow_control_tokens)
    if "prompt" in entry or "completion" in entry:
        for name in ("prompt", "completion"):
            if not isinstance(entry.get(name), str):
                raise UserError(f"{name!r} is missing or no text.")
        return _chat(
            [
                {"role": "user", "content": entry["prompt"]},
                {"role": "assistant", "content": entry["completion"]},
            ],
            entry.get("tools"),
            tokenizer,
            allow_control_tokens,
        )
    if not isinstance(entry.get("text"), str):
        found = ", ".join(entry) or "nothing"
        raise UserError(
            f"one of 'messages', 'prompt' with 'completion', or 'text' is missing; found {found}."
        )
    ids = encode_prompt(tokenizer, entry["text"], literal=not allow_control_tokens)
    if len(ids) < 2:
        raise UserError("'text' is empty.")
    return Example(
        np.array([*ids, end] if ids[-1] not in tokenizer.eos_token_ids else ids, dtype=np.int32), 1
    )


def _chat(
    messages: Any, tools: Any, tokenizer: TokenizerWrapper, allow_control_tokens: bool
) -> Example:
    if not isinstance(messages, list) or not all(
        isinstance(m, Mapping) and "role" in m for m in messages
    ):
        raise UserError("'messages' must be a list of objects with a role.")
    if len(messages) < 2 or messages[-1]["role"] not in ("assistant", "model"):
        raise UserError("the last message must be the assistant's, after at least one other.")
    parts = [part for m in messages if isinstance(m.get("content"), list) for part in m["content"]]
    if any(not isinstance(part, Mapping) or part.get("type") != "text" for part in parts):
        raise UserError(
            "models are tuned on text only; leave out the messages with images or other parts that are no text."
        )
    if not messages[-1].get("content") and not messages[-1].get("tool_calls"):
        raise UserError("the assistant's message is empty.")
    prompt = chat_ids(
        tokenizer, messages[:-1], tools=tools, allow_control_tokens=allow_control_tokens
    )
    answer = answer_ids(tokenizer, messages, tools, allow_control_tokens)
    return Example(np.array([*prompt, *answer], dtype=np.int32), len(prompt))
