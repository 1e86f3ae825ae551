"""Everything that knows strings: the checkpoint's tokenizer and chat template, and the parser from ids to an answer.

    >>> tokenizer = load_tokenizer(folder, eos_ids=(1, 106, 50))
    >>> ids = chat_ids(tokenizer, [{"role": "user", "content": "Hello"}])
    >>> parser = ResponseParser(tokenizer)
    >>> parser.feed(answer_ids).answer
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from mlx_lm.tokenizer_utils import TokenizerWrapper, load
from tokenizers import Tokenizer

from mlx_diffgemma.errors import UserError

CHANNEL_START, CHANNEL_END = "<|channel>", "<channel|>"
TOOL_START, TOOL_END = "<|tool_call>", "<tool_call|>"
MARKERS = (CHANNEL_START, CHANNEL_END, TOOL_START, TOOL_END)
THOUGHT = "thought"
REPLACEMENT = "\ufffd"  # what an incomplete character decodes to
_literal: weakref.WeakKeyDictionary[TokenizerWrapper, Tokenizer] = weakref.WeakKeyDictionary()  # see encode_literally
_lock = threading.Lock()  # of it


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
             tools: Sequence[Mapping[str, Any]] | None = None, **template: Any) -> list[int]:
    """Ids of a conversation up to where the model's turn begins, one marker for each image; ``template`` are further
    chat-template variables.

    Errors: UserError when there is no template, or it refuses the messages.
    """
    return list(_render(tokenizer, messages, tokenize=True, add_generation_prompt=True, enable_thinking=think, tools=tools,
                        **template))


def answer_ids(tokenizer: TokenizerWrapper, messages: Sequence[Mapping[str, Any]],
               tools: Sequence[Mapping[str, Any]] | None = None) -> list[int]:
    """Ids of the last message, the model's: what the template adds to ``chat_ids`` of the others once it is known, up to the
    token that ends the turn.

    Errors: UserError for a template that writes the rest otherwise then, or ends the turn with no end token.
    """
    asked, whole = (_render(tokenizer, part, tokenize=False, add_generation_prompt=generation, enable_thinking=False, tools=tools)
                    for part, generation in ((messages[:-1], True), (messages, False)))
    if not whole.startswith(asked):
        raise UserError("the chat template writes the conversation otherwise once the answer is known, so the answer cannot be "
                        "told apart.")
    ids = list(tokenizer.encode(whole[len(asked) :], add_special_tokens=False))
    ends = [place for place, token in enumerate(ids) if token in tokenizer.eos_token_ids]
    if not ends:
        raise UserError("the chat template ends the answer with no end token.")
    return ids[: ends[-1] + 1]


def turn_end(tokenizer: TokenizerWrapper) -> int:
    """The token that ends the model's turn: the chat template's, or the tokenizer's own where there is none."""
    if tokenizer.has_chat_template:
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        ends = [token for token in _render(tokenizer, messages, tokenize=True) if token in tokenizer.eos_token_ids]
        if ends:
            return int(ends[-1])
    if tokenizer.eos_token_id is None:
        raise UserError("The tokenizer has no end token; take one that has.")
    return int(tokenizer.eos_token_id)


def _render(tokenizer: TokenizerWrapper, messages: Sequence[Mapping[str, Any]], **options: Any) -> Any:
    """Text or ids of the chat template.  Errors: UserError when there is none, or it refuses the messages."""
    if not tokenizer.has_chat_template:
        raise UserError("This checkpoint has no chat template; pass the prompt as it is (--ignore-chat-template).")
    try:
        return tokenizer.apply_chat_template(list(messages), **options)
    except jinja2.TemplateError as error:
        raise UserError(f"The chat template refuses this conversation: {error}") from None


def encode_prompt(tokenizer: TokenizerWrapper, text: str) -> list[int]:
    """Ids of plain text, with the start token unless the text brings it."""
    special = tokenizer.bos_token is None or not text.startswith(tokenizer.bos_token)
    return list(tokenizer.encode(text, add_special_tokens=special))


def encode_literally(tokenizer: TokenizerWrapper, text: str) -> list[int]:
    """Ids of text in which nothing is a control token, whatever it looks like.  Errors: TypeError for text that is not Unicode."""
    with _lock:
        literal = _literal.get(tokenizer)
        if literal is None:  # one of its own: the flag is the tokenizer's, which other threads use
            literal = _literal[tokenizer] = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
            literal.encode_special_tokens = True
    return list(literal.encode(text, add_special_tokens=False).ids)


def answer_part(tokenizer: TokenizerWrapper, ids: Sequence[int]) -> list[int]:
    """Of ``ids`` that begin an answer those behind the last marker, such as the end of a thought."""
    vocabulary = tokenizer.get_vocab()
    markers = {vocabulary[marker] for marker in MARKERS if marker in vocabulary}
    return list(ids)[max((place + 1 for place, token in enumerate(ids) if token in markers), default=0) :]


class TextStream:
    """Ids to text, piece by piece, never splitting a character."""

    def __init__(self, tokenizer: TokenizerWrapper, keep_markers: bool = False):
        self._decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=not keep_markers)
        self._ids: list[int] = []
        self._context = 0  # ids before this are left out of decoding
        self._done = 0  # ids before this are in the text already given

    def feed(self, ids: Iterable[int]) -> str:
        self._ids.extend(ids)
        return self._next(final=False)

    def finish(self) -> str:
        return self._next(final=True)

    def _next(self, final: bool) -> str:
        # Decoding starts a few ids back, since what a token looks like may depend on the one before it.
        before = self._decode(self._ids[self._context : self._done])
        text = self._decode(self._ids[self._context :])
        if text.endswith(REPLACEMENT) and not final:
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
        self._markers = {vocabulary[text]: text for text in MARKERS
                         if text in vocabulary}
        self._ends = set(tokenizer.eos_token_ids)
        self._state, self._stream = "answer", TextStream(tokenizer)
        self._header = self._tool = ""
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
        if self._state == "tool" and self._tool:
            self.malformed.append(self._tool)
        return Delta(self._out["answer"], self._out["thought"])

    def _flush(self) -> None:
        self._take(self._stream.finish())

    def _switch(self, marker: str) -> None:
        if marker == TOOL_END and self._state == "tool":
            self._finish_tool()
        self._state = {CHANNEL_START: "header", TOOL_START: "tool"}.get(marker, "answer")
        self._stream = TextStream(self._tokenizer, keep_markers=self._state == "tool")
        self._header = self._tool = ""

    def _take(self, text: str) -> None:
        if self._state == "tool":
            self._tool += text
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
            calls = self._tokenizer.tool_parser(self._tool, None)
        except (ValueError, TypeError):  # TypeError: the tokenizer has no parser
            self.malformed.append(self._tool)
            return
        self._calls.extend(calls if isinstance(calls, list) else [calls])
