"""Everything that knows strings: the checkpoint's tokenizer and chat template, and the parser from ids to an answer.

    >>> tokenizer = load_tokenizer(folder, eos_ids=(1, 106, 50))
    >>> ids = chat_ids(tokenizer, [{"role": "user", "content": "Hello"}])
    >>> parser = ResponseParser(tokenizer)
    >>> parser.feed(answer_ids).answer
"""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper, load

from mlx_diffgemma import templates
from mlx_diffgemma.calls import read_calls
from mlx_diffgemma.dialect import REASONING, Dialect, arranged
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.literal import (
    Control,
    Marks,
    control_of,
    encode_literally,
    encode_marked,
    marked,
    plain_data,
    texts_of,
)

CHANNEL_START, CHANNEL_END = "<|channel>", "<channel|>"
TOOL_START, TOOL_END = "<|tool_call>", "<tool_call|>"
MARKERS = (CHANNEL_START, CHANNEL_END, TOOL_START, TOOL_END)
QUOTE = '<|"|>'  # before and after a text in a call
THOUGHT = "thought"
REPLACEMENT = "\ufffd"  # what an incomplete character decodes to
BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # a token of one byte
LONGEST_RUN = 8  # bytes before the end that tell whether a character is incomplete
NO_THOUGHT = f"{CHANNEL_START}{THOUGHT}\n{CHANNEL_END}"  # what generation prompts of models end with that do not think
PROBE = "\ue000"


def load_tokenizer(folder: Path, eos_ids: Iterable[int]) -> TokenizerWrapper:
    """mlx-lm's wrapper round the tokenizer of ``folder``; it stops at ``eos_ids``, from generation_config.

    Errors: UserError when the folder has no tokenizer or a damaged one.
    """
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        raise UserError(f"{folder} has no tokenizer.json; copy the tokenizer files of the original checkpoint into it.")
    try:
        tokenizer = load(folder, eos_token_ids=list(eos_ids))
    except Exception as error:  # transformers and tokenizers raise of every kind for a damaged file
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"The tokenizer in {folder} cannot be read ({reason}); download its files again.") from error
    tokenizer.eos_token_ids = set(eos_ids)
    return tokenizer


def user_message(text: str, images: int = 0) -> dict[str, Any]:
    """The user's turn, with markers for so many images or videos before its text, as the model was trained to see them."""
    return {"role": "user", "content": [*({"type": "image"} for _ in range(images)), {"type": "text", "text": text}]
            if images else text}


def chat_ids(tokenizer: TokenizerWrapper, messages: Sequence[Mapping[str, Any]], think: bool = False,
             tools: Sequence[Mapping[str, Any]] | None = None, allow_control_tokens: bool = False, **template: Any) -> list[int]:
    """Ids of a conversation up to where the model's turn begins, one marker for each image.

    Args:
        tokenizer: with the checkpoint's chat template.
        messages: as OpenAI writes them; ``conversation.arranged`` brings them into the form that the template reads.
        think: whether the model thinks first.
        tools: what it may call.
        allow_control_tokens: read what looks like a control token in the messages as one; it is plain text else.
        template: further variables of the chat template.

    Raises:
        UserError: when there is no template, or it refuses the messages.
    """
    rendered = _render(tokenizer, messages, tools, allow_control_tokens, add_generation_prompt=True, enable_thinking=think,
                       **template)
    return rendered.ids()


def answer_ids(tokenizer: TokenizerWrapper, messages: Sequence[Mapping[str, Any]],
               tools: Sequence[Mapping[str, Any]] | None = None, allow_control_tokens: bool = False) -> list[int]:
    """Ids of the last message, the model's: what the template adds to ``chat_ids`` of the others once it is known, up to the
    token that ends the turn. An empty thought block that only the generation prompt has is no part of it.

    Errors: UserError for a template that writes the rest otherwise then, or ends the turn with no end token.
    """
    def text(part: Sequence[Mapping[str, Any]], generation: bool) -> Rendered:
        return _render(tokenizer, part, tools, allow_control_tokens, add_generation_prompt=generation, enable_thinking=False)

    asked = text(messages[:-1], True)
    whole = text(messages, False)
    # Where the answer begins follows from one that shares no character with what the template writes.
    probe = text([*messages[:-1], {"role": messages[-1]["role"], "content": PROBE}], False)
    begin = len(os.path.commonprefix([asked.text, probe.text]))
    if whole.text[:begin] != asked.text[:begin] or asked.text[begin:] not in ("", NO_THOUGHT):
        raise UserError("the chat template writes the conversation otherwise once the answer is known, so the answer cannot be "
                        "told apart.")
    ids = whole.ids(begin)
    ends = [place for place, token in enumerate(ids) if token in tokenizer.eos_token_ids]
    if not ends:
        raise UserError("the chat template ends the answer with no end token.")
    return ids[: ends[-1] + 1]


def turn_end(tokenizer: TokenizerWrapper) -> int:
    """The token that ends the model's turn: the chat template's, or the tokenizer's own where there is none."""
    if tokenizer.has_chat_template:
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        ends = [token for token in _render(tokenizer, messages, None, False).ids() if token in tokenizer.eos_token_ids]
        if ends:
            return int(ends[-1])
    if tokenizer.eos_token_id is None:
        raise UserError("The tokenizer has no end token; take one that has.")
    return int(tokenizer.eos_token_id)


def repeated(tokenizer: TokenizerWrapper, ids: Sequence[int]) -> int:
    """How many of the ``ids`` of a prompt the next turn of the conversation repeats: all but an empty thought block at its end."""
    block = list(tokenizer.encode(NO_THOUGHT, add_special_tokens=False))
    ends = len(ids) > len(block) and list(ids[len(ids) - len(block) :]) == block
    return len(ids) - len(block) if ends and block[0] == tokenizer.get_vocab().get(CHANNEL_START) else len(ids)


@dataclass(frozen=True)
class Rendered:
    """The text of a chat template, with marks at what a user wrote, see ``literal``."""

    tokenizer: TokenizerWrapper
    text: str
    control: Control
    marks: Marks | None

    def ids(self, begin: int = 0) -> list[int]:
        """From the character ``begin`` on."""
        return encode_marked(self.tokenizer, self.control, self.text[begin:], self.marks)


def _render(tokenizer: TokenizerWrapper, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None,
            allow_control_tokens: bool, **options: Any) -> Rendered:
    """Errors: UserError when there is no template, or it refuses the messages."""
    if not tokenizer.has_chat_template:
        raise UserError("This checkpoint has no chat template; pass the prompt as it is (--ignore-chat-template).")
    source = template_of(tokenizer, tools)
    control = control_of(tokenizer, source)
    marks = None
    try:
        variables: dict[str, Any] = plain_data({**tokenizer.special_tokens_map, **options})
        given = plain_data([{name: value for name, value in message.items() if value is not None} for message in messages])
        called = None if tools is None else plain_data(list(tools))
        given = [_with_thought(message) for message in arranged(given, dialect_of(tokenizer, source))]
        if not allow_control_tokens:
            marks = Marks.unused(texts_of([given, called, variables]))
            given = marked(given, control, marks)
            called = marked(called, control, marks)
            variables |= marked(plain_data(options), control, marks)
    except RecursionError:
        raise UserError("The conversation, or what a tool takes, is nested too deeply; write it with fewer levels.") from None
    written = templates.render(source, {**variables, "messages": given, "tools": called, "documents": None},
                               "" if marks is None else marks.all)
    return Rendered(tokenizer, written if marks is None else marks.restored(written), control, marks)


def _with_thought(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its thought under all the names that templates read."""
    thought = next((message[name] for name in REASONING if message.get(name) is not None), None)
    return message if thought is None else {"thinking": thought, **message, "reasoning_content": thought}


def dialect_of(tokenizer: TokenizerWrapper, source: str) -> Dialect:
    """What the template ``source`` reads."""
    names = {name: value for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    return Dialect.of(source, frozenset(names.items()))


def calls_as_json(tokenizer: TokenizerWrapper) -> bool:
    """Whether the model writes the arguments of calls as JSON: its template does, or it has no token for Gemma's own syntax."""
    if QUOTE not in tokenizer.get_vocab():
        return True
    return bool(tokenizer.has_chat_template) and dialect_of(tokenizer, template_of(tokenizer)).json_calls


def template_of(tokenizer: TokenizerWrapper, tools: Any = None) -> str:
    """The text of the chat template.  Errors: UserError for a folder of several without one for this."""
    try:
        return str(tokenizer.get_chat_template(None, tools))
    except ValueError as error:
        raise UserError(f"The chat template cannot be chosen ({templates.reason(error)}).") from None


def encode_prompt(tokenizer: TokenizerWrapper, text: str, literal: bool = False) -> list[int]:
    """Ids of plain text, with the start token unless the text brings it.

    Args:
        tokenizer: the checkpoint's.
        text: the prompt.
        literal: read what looks like a control token as plain text; the start token always comes first then.
    """
    if literal:
        begin = tokenizer.encode("", add_special_tokens=True)
        return [*begin, *encode_literally(tokenizer, text)]
    special = tokenizer.bos_token is None or not text.startswith(tokenizer.bos_token)
    return list(tokenizer.encode(text, add_special_tokens=special))


def answer_part(tokenizer: TokenizerWrapper, ids: Sequence[int]) -> list[int]:
    """Of ``ids`` that begin an answer those behind the last marker, such as the end of a thought."""
    vocabulary = tokenizer.get_vocab()
    markers = {vocabulary[marker] for marker in MARKERS if marker in vocabulary}
    return list(ids)[max((place + 1 for place, token in enumerate(ids) if token in markers), default=0) :]


class TextStream:
    """Ids to text, piece by piece, never splitting a character."""

    def __init__(self, tokenizer: TokenizerWrapper, keep_markers: bool = False):
        self._decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=not keep_markers)
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context = 0  # ids before this are left out of decoding
        self._done = 0  # ids before this are in the text already given

    def feed(self, ids: Iterable[int]) -> str:
        self._ids.extend(ids)
        return self._next(final=False)

    def finish(self) -> str:
        return self._next(final=True)

    def _incomplete(self) -> bool:
        """Whether the last ids are the first bytes of a character; else what looks so is the character U+FFFD itself."""
        run = bytearray()
        by_bytes = "<0x00>" in self._tokenizer.get_vocab()
        for token in self._tokenizer.convert_ids_to_tokens(self._ids[-LONGEST_RUN:]):
            byte = BYTE.fullmatch(token or "")
            if byte:
                run.append(int(byte[1], 16))
            elif by_bytes:
                run = bytearray()
            else:  # a token may hold parts of characters
                return True
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(bytes(run))
        return bool(decoder.getstate()[0])

    def _next(self, final: bool) -> str:
        # Decoding starts a few ids back, since what a token looks like may depend on the one before it.
        before = self._decode(self._ids[self._context : self._done])
        text = self._decode(self._ids[self._context :])
        if text.endswith(REPLACEMENT) and not final and self._incomplete():
            return ""
        self._context, self._done = self._done, len(self._ids)
        return text[len(before) :]


@dataclass(frozen=True)
class Delta:
    """What some ids added: visible answer text, thought text, finished tool calls ({name, arguments})."""

    answer: str = ""
    thought: str = ""
    tool_calls: tuple[dict[str, Any], ...] = ()


class ResponseParser:
    """From the ids of an answer to thought, answer and tool calls; every front end uses this one.

    Markers are read as tokens before anything is decoded, so none can leak and none can be forged by text.  An empty
    thought block gives an empty thought.  A tool call that cannot be parsed is listed in ``malformed``.
    """

    def __init__(self, tokenizer: TokenizerWrapper):
        self._tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab()
        self._markers = {vocabulary[text]: text for text in MARKERS if text in vocabulary}
        self._quote = vocabulary.get(QUOTE)
        self._ends = set(tokenizer.eos_token_ids)
        self._state, self._stream = "answer", TextStream(tokenizer)
        self._header = ""
        self._tool = [""]  # what stands between the quotes of a call
        self._out: dict[str, str] = {}
        self._calls: list[dict[str, Any]] = []
        self.malformed: list[str] = []

    def feed(self, ids: Iterable[int]) -> Delta:
        """Read more ids; end tokens say nothing."""
        self._out, self._calls = {"answer": "", "thought": ""}, []
        for token in ids:
            if token in self._markers:
                self._flush()
                self._switch(self._markers[token])
            elif token == self._quote and self._state == "tool":
                self._flush()
                self._stream = TextStream(self._tokenizer, keep_markers=True)
                self._tool.append("")
            elif token not in self._ends:
                self._take(self._stream.feed([token]))
        return Delta(self._out["answer"], self._out["thought"], tuple(self._calls))

    def shows(self, token: int) -> bool:
        """Read one more id; whether it is a part of the visible answer."""
        self.feed([token])
        return self._state == "answer" and token not in self._markers and token not in self._ends

    def finish(self) -> Delta:
        """What was still held back: a character cut off in the middle, an unfinished call."""
        self._out, self._calls = {"answer": "", "thought": ""}, []
        self._flush()
        if self._state == "tool" and any(self._tool):
            self.malformed.append(QUOTE.join(self._tool))
        return Delta(self._out["answer"], self._out["thought"])

    def _flush(self) -> None:
        self._take(self._stream.finish())

    def _switch(self, marker: str) -> None:
        if marker == TOOL_END and self._state == "tool":
            self._finish_tool()
        self._state = {CHANNEL_START: "header", TOOL_START: "tool"}.get(marker, "answer")
        self._stream = TextStream(self._tokenizer, keep_markers=self._state == "tool")
        self._header = ""
        self._tool = [""]

    def _take(self, text: str) -> None:
        if self._state == "tool":
            self._tool[-1] += text
        elif self._state == "header":
            self._header += text
            name, newline, rest = self._header.partition("\n")
            if newline:  # any other channel is shown, so that nothing is lost
                self._state = "thought" if name.strip() == THOUGHT else "answer"
                self._out[self._state] += rest
        else:
            self._out[self._state] += text

    def _finish_tool(self) -> None:
        try:
            self._calls.extend(read_calls(self._tool))
        except ValueError:
            self.malformed.append(QUOTE.join(self._tool))
