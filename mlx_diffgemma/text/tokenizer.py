"""Converts text to ids by the checkpoint's tokenizer and chat template.

>>> tokenizer = load_tokenizer(folder, eos_ids=(1, 106, 50))
>>> ids = chat_ids(tokenizer, [{"role": "user", "content": "Hello"}])
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper, load

from mlx_diffgemma.errors import UserError
from mlx_diffgemma.text import templates
from mlx_diffgemma.text.calls import (
    CHANNEL_END,
    CHANNEL_START,
    MARKERS,
    QUOTE,
    THOUGHT,
)
from mlx_diffgemma.text.dialect import REASONING, Dialect, arranged
from mlx_diffgemma.text.literal import (
    Control,
    Marks,
    check_characters,
    control_of,
    encode_literally,
    encode_marked,
    marked,
    plain_data,
    texts_of,
)

# The end of a generation prompt when the model does not think.
NO_THOUGHT = f"{CHANNEL_START}{THOUGHT}\n{CHANNEL_END}"
PROBE = "\ue000"  # a character that no template writes


def load_tokenizer(folder: Path, eos_ids: Iterable[int]) -> TokenizerWrapper:
    """Load the tokenizer of ``folder`` in mlx-lm's wrapper, with ``eos_ids`` as its end tokens.

    Raises:
        UserError: The folder has no tokenizer or a damaged one.
    """
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        raise UserError(
            f"{folder} has no tokenizer.json; copy the tokenizer files of the original checkpoint "
            "into it."
        )
    try:
        tokenizer = load(folder, eos_token_ids=list(eos_ids))
    except Exception as error:  # transformers and tokenizers raise exceptions of every type
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"The tokenizer in {folder} cannot be read ({reason}); download its files again."
        ) from error
    tokenizer.eos_token_ids = set(eos_ids)
    return tokenizer


def user_message(text: str, images: int = 0) -> dict[str, Any]:
    """The user's turn.

    Markers for ``images`` images or videos come before the text, as in the model's training.
    """
    if not images:
        return {"role": "user", "content": text}
    markers = [{"type": "image"} for _ in range(images)]
    return {"role": "user", "content": [*markers, {"type": "text", "text": text}]}


def chat_ids(
    tokenizer: TokenizerWrapper,
    messages: Sequence[Mapping[str, Any]],
    think: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    allow_control_tokens: bool = False,
    **template: Any,
) -> list[int]:
    """The ids of a conversation up to the start of the model's turn, with one marker for each image.

    Args:
        tokenizer: The tokenizer with the checkpoint's chat template.
        messages: The messages, as OpenAI writes them; ``dialect.arranged`` brings them into the
            form that the template reads.
        think: Whether the model thinks first.
        tools: The tools that it may call.
        allow_control_tokens: Whether text in the messages that looks like a control token is read
            as one; without it, it is plain text.
        template: Further variables of the chat template.

    Raises:
        UserError: There is no template, or it refuses the messages.
    """
    rendered = _render(
        tokenizer,
        messages,
        tools,
        allow_control_tokens,
        add_generation_prompt=True,
        enable_thinking=think,
        **template,
    )
    return rendered.ids()


def answer_ids(
    tokenizer: TokenizerWrapper,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    allow_control_tokens: bool = False,
) -> list[int]:
    """The ids of the last message, the model's, up to the token that ends its turn.

    They are what the template adds to ``chat_ids`` of the messages before.  An empty thought block
    that only the generation prompt has is not part of them.

    Args:
        tokenizer: The tokenizer with the checkpoint's chat template.
        messages: The messages, as OpenAI writes them.
        tools: The tools that the model may call.
        allow_control_tokens: As in ``chat_ids``.

    Raises:
        UserError: With the answer, the template writes the messages before it differently, or the
            turn ends without an end token.
    """

    def text(part: Sequence[Mapping[str, Any]], generation: bool) -> Rendered:
        return _render(
            tokenizer,
            part,
            tools,
            allow_control_tokens,
            add_generation_prompt=generation,
            enable_thinking=False,
        )

    asked = text(messages[:-1], True)
    whole = text(messages, False)
    # An answer that shares no character with the template shows where the answer begins.
    probe = text([*messages[:-1], {"role": messages[-1]["role"], "content": PROBE}], False)
    begin = len(os.path.commonprefix([asked.text, probe.text]))
    if whole.text[:begin] != asked.text[:begin] or asked.text[begin:] not in ("", NO_THOUGHT):
        raise UserError(
            "the chat template writes the conversation otherwise once the answer is known, so the "
            "answer cannot be told apart."
        )
    ids = whole.ids(begin)
    ends = [index for index, token in enumerate(ids) if token in tokenizer.eos_token_ids]
    if not ends:
        raise UserError("the chat template ends the answer with no end token.")
    return ids[: ends[-1] + 1]


def turn_end(tokenizer: TokenizerWrapper) -> int:
    """The token that ends the model's turn: the chat template's, else the tokenizer's."""
    if tokenizer.has_chat_template:
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        ids = _render(tokenizer, messages, None, False).ids()
        ends = [token for token in ids if token in tokenizer.eos_token_ids]
        if ends:
            return int(ends[-1])
    if tokenizer.eos_token_id is None:
        raise UserError("The tokenizer has no end token; take one that has.")
    return int(tokenizer.eos_token_id)


def repeated(tokenizer: TokenizerWrapper, ids: Sequence[int]) -> int:
    """The number of ids of a prompt that the next turn of the conversation repeats.

    These are all ids except those of an empty thought block at the end.
    """
    block = list(tokenizer.encode(NO_THOUGHT, add_special_tokens=False))
    before = len(ids) - len(block)
    has_block = before > 0 and list(ids[before:]) == block
    if has_block and block[0] == tokenizer.get_vocab().get(CHANNEL_START):
        return before
    return len(ids)


@dataclass(frozen=True)
class Rendered:
    """A rendered chat template, with marks around the texts of users; see ``literal``."""

    tokenizer: TokenizerWrapper
    text: str
    control: Control
    marks: Marks | None

    def ids(self, begin: int = 0) -> list[int]:
        """The ids of the text from the character ``begin`` to the end."""
        return encode_marked(self.tokenizer, self.control, self.text[begin:], self.marks)


def _render(
    tokenizer: TokenizerWrapper,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    allow_control_tokens: bool,
    **options: Any,
) -> Rendered:
    """Render a conversation.

    Args:
        tokenizer: The tokenizer with the checkpoint's chat template.
        messages: The messages, as OpenAI writes them.
        tools: The tools that the model may call.
        allow_control_tokens: As in ``chat_ids``.
        options: Further variables of the template.

    Raises:
        UserError: There is no template, or it refuses the messages.
    """
    if not tokenizer.has_chat_template:
        raise UserError(
            "This checkpoint has no chat template; "
            "pass the prompt as it is (--ignore-chat-template)."
        )
    source = template_of(tokenizer, tools)
    control = control_of(tokenizer, source)
    marks = None
    try:
        variables: dict[str, Any] = plain_data({**tokenizer.special_tokens_map, **options})
        turns = plain_data([_without_nulls(message) for message in messages])
        called = None if tools is None else plain_data(list(tools))
        turns = [_with_thought(turn) for turn in arranged(turns, dialect_of(tokenizer, source))]
        if not allow_control_tokens:
            marks = Marks.unused(texts_of([turns, called, variables]))
            turns = marked(turns, control, marks)
            called = marked(called, control, marks)
            variables |= marked(plain_data(options), control, marks)
    except RecursionError:
        raise UserError(
            "The conversation, or what a tool takes, is nested too deeply; "
            "write it with fewer levels."
        ) from None
    variables |= {"messages": turns, "tools": called, "documents": None}
    text = templates.render(source, variables, "" if marks is None else marks.all)
    if marks is not None:
        text = marks.restored(text)
    return Rendered(tokenizer, text, control, marks)


def _without_nulls(message: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in message.items() if value is not None}


def _with_thought(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its thought under all names that templates read."""
    thought = next((message[name] for name in REASONING if message.get(name) is not None), None)
    if thought is None:
        return message
    return {"thinking": thought, **message, "reasoning_content": thought}


def dialect_of(tokenizer: TokenizerWrapper, source: str) -> Dialect:
    """The dialect of the template ``source``."""
    specials = tokenizer.special_tokens_map.items()
    return Dialect.of(
        source, frozenset((name, value) for name, value in specials if isinstance(value, str))
    )


def calls_as_json(tokenizer: TokenizerWrapper) -> bool:
    """Whether the model writes the arguments of calls as JSON.

    It does where its template does, or where it has no token for Gemma's own syntax.
    """
    if QUOTE not in tokenizer.get_vocab():
        return True
    if not tokenizer.has_chat_template:
        return False
    return dialect_of(tokenizer, template_of(tokenizer)).json_calls


def template_of(tokenizer: TokenizerWrapper, tools: Any = None) -> str:
    """The source of the chat template.

    Raises:
        UserError: The checkpoint has several templates and none of them fits.
    """
    try:
        return str(tokenizer.get_chat_template(None, tools))
    except ValueError as error:
        raise UserError(
            f"The chat template cannot be chosen ({templates.reason(error)})."
        ) from None


def encode_prompt(tokenizer: TokenizerWrapper, text: str, literal: bool = False) -> list[int]:
    """The ids of a plain text, with the start token unless the text begins with it.

    Args:
        tokenizer: The checkpoint's tokenizer.
        text: The prompt.
        literal: Whether text that looks like a control token is read as plain text.  The start
            token then always comes first.
    """
    if literal:
        begin = tokenizer.encode("", add_special_tokens=True)
        return [*begin, *encode_literally(tokenizer, text)]
    special = tokenizer.bos_token is None or not text.startswith(tokenizer.bos_token)
    return list(tokenizer.encode(check_characters(text), add_special_tokens=special))


def answer_part(tokenizer: TokenizerWrapper, ids: Sequence[int]) -> list[int]:
    """The ids after the last marker, such as the end of a thought; ``ids`` is the start of an
    answer.
    """
    vocabulary = tokenizer.get_vocab()
    markers = {vocabulary[marker] for marker in MARKERS if marker in vocabulary}
    begin = 0
    for index, token in enumerate(ids):
        if token in markers:
            begin = index + 1
    return list(ids)[begin:]
