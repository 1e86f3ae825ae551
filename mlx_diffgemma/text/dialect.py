"""The dialect of a chat template, found by rendering it, and conversations in that dialect.

Published templates of one family differ: one reads a tool's result from ``tool_responses`` of the
assistant's message, another reads the messages of the role ``tool``.  Every front end passes
messages as OpenAI writes them, and ``arranged`` converts them.

    >>> arranged(messages, Dialect.of(template, frozenset()))
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_diffgemma.errors import UserError
from mlx_diffgemma.text import templates

SYSTEM = ("system", "developer")
MODEL = ("assistant", "model")
REASONING = ("reasoning_content", "thinking", "reasoning")  # fields for a thought, usual one first
TURN = "<|turn>"
QUOTE = '<|"|>'
CALL_END = "<tool_call|>"
USER = {"role": "user", "content": "Question"}
CALLED = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "id": "1",
            "type": "function",
            "function": {"name": "probe", "arguments": {"probekey": "Probevalue"}},
        }
    ],
}
RESULT = "Proberesult"
ANSWER = "Probeanswer"
UNKNOWN = "unknown"  # stands for the name of a function that the conversation does not name


@dataclass(frozen=True)
class Dialect:
    """What a template reads.

    Args:
        responses: Whether results of tools are under ``tool_responses`` of the assistant's message,
            not in messages of their own.
        joins_answer: Whether the model's text after a result belongs to the same message; in a
            message of its own, the template would begin another turn.
        json_calls: Whether the arguments of calls are written as JSON, not in Gemma's own syntax.
    """

    responses: bool = False
    joins_answer: bool = False
    json_calls: bool = False

    @classmethod
    @functools.lru_cache(maxsize=16)
    def of(cls, source: str, specials: frozenset[tuple[str, Any]]) -> Dialect:
        """Find the dialect of the template ``source``, rendered with the special tokens
        ``specials``.
        """

        def text(*messages: Mapping[str, Any]) -> str:
            variables = {
                **dict(specials),
                "messages": [USER, *messages],
                "tools": None,
                "documents": None,
                "add_generation_prompt": False,
                "enable_thinking": False,
            }
            try:
                return templates.render(source, variables)
            except UserError:
                return ""

        result = {"role": "tool", "name": "probe", "tool_call_id": "1", "content": RESULT}
        scanned = text(CALLED, result)
        answered = {**CALLED, "tool_responses": [{"name": "probe", "response": RESULT}]}
        held = text(answered)
        if _same_turn(scanned, CALL_END, RESULT) or not _same_turn(held, CALL_END, RESULT):
            responses = RESULT not in scanned and RESULT in held
        else:
            responses = True
        apart = text(answered, {"role": "assistant", "content": ANSWER})
        together = text({**answered, "content": ANSWER})
        joins = not _same_turn(apart, RESULT, ANSWER) and _same_turn(together, RESULT, ANSWER)
        call = held or scanned or text(CALLED)
        json_calls = f"probekey:{QUOTE}Probevalue{QUOTE}" not in call and "Probevalue" in call
        return cls(responses, responses and joins, json_calls)


def _same_turn(text: str, first: str, second: str) -> bool:
    """Whether ``second`` comes after ``first`` and no turn begins between them."""
    _, has_first, rest = text.partition(first)
    between, has_second, _ = rest.partition(second)
    return bool(has_first and has_second) and TURN not in between


def arranged(messages: Sequence[dict[str, Any]], dialect: Dialect) -> list[dict[str, Any]]:
    """The messages in the form that a template of this ``dialect`` reads, as new objects."""
    turns = [_joined_parts(message) for message in _system_first(messages)]
    turns = _with_names([_with_arguments(turn) for turn in turns])
    return _with_responses(turns, dialect) if dialect.responses else turns


def _joined_parts(message: dict[str, Any]) -> dict[str, Any]:
    """The message with adjacent text parts joined; a content of texts alone becomes that text.

    Templates trim each part, and would otherwise remove the blank between two parts.
    """
    content = message.get("content")
    if not isinstance(content, list):
        return message
    parts: list[Any] = []
    for texts, run in itertools.groupby(content, _is_text):
        if texts:
            parts.append({"type": "text", "text": "".join(part["text"] for part in run)})
        else:
            parts += run
    if all(map(_is_text, parts)):
        return {**message, "content": parts[0]["text"] if parts else ""}
    return {**message, "content": parts}


def _is_text(part: Any) -> bool:
    return (
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
    )


def _system_first(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join all system messages by blank lines into one message at the front."""
    system = [message for message in messages if message.get("role") in SYSTEM]
    if not system or (len(system) == 1 and messages[0] is system[0]):
        return list(messages)
    texts = []
    for message in system:
        content = _joined_parts(message).get("content")
        if isinstance(content, str) and content.strip():
            texts.append(content)
    rest = [message for message in messages if message.get("role") not in SYSTEM]
    return [{**system[0], "content": "\n\n".join(texts)}, *rest]


def _with_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """The message with the arguments of its calls as maps, see ``read_arguments``."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    read_calls = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments", ""), str):
            arguments = read_arguments(function.get("arguments", ""))
            call = {**call, "function": {**function, "arguments": arguments}}
        read_calls.append(call)
    return {**message, "tool_calls": read_calls}


def read_arguments(text: str) -> dict[str, Any]:
    """Read the arguments of a call that a client sends back in JSON.

    A text that is not a JSON object is returned under the name ``arguments``.
    """
    if not text.strip():
        return {}
    try:
        value = json.loads(text)
        # Half of a surrogate pair, which no encoding can write, is a ValueError.
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return {"arguments": text}
    return value if isinstance(value, dict) else {"arguments": text}


def _with_responses(messages: Sequence[dict[str, Any]], dialect: Dialect) -> list[dict[str, Any]]:
    """Move results of tools into ``tool_responses`` of the message that called them."""
    turns: list[dict[str, Any]] = []
    for message in messages:
        before = turns[-1] if turns else {}
        if message.get("role") == "tool" and before.get("tool_calls"):
            turns[-1:] = _with_response(before, message)
        elif dialect.joins_answer and _answers(before, message):
            turns[-1] = {**before, "content": message.get("content") or ""}
        else:
            turns.append(message)
    return turns


def _with_response(called: dict[str, Any], result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the message with calls and its result.

    Text before the calls becomes a separate message, because templates write it after the results.
    """
    before = []
    if called.get("content"):
        before.append({"role": called["role"], "content": called["content"]})
    response = {"name": result.get("name", UNKNOWN), "response": result.get("content", "")}
    responses = [*called.get("tool_responses", ()), response]
    return [*before, {**called, "content": "", "tool_responses": responses}]


def _answers(called: dict[str, Any], message: dict[str, Any]) -> bool:
    """Whether ``message`` is the model's text after the results of the calls in ``called``."""
    if message.get("role") not in MODEL or message.get("tool_calls"):
        return False
    return bool(called.get("tool_responses")) and not called.get("content")


def _with_names(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with the function's name added to each result of a tool.

    The function is found by the id of the call, or by the order of the calls.
    """
    named = []
    calls: list[dict[str, Any]] = []
    answered = 0
    for message in messages:
        if isinstance(message.get("tool_calls"), list):
            calls = [call for call in message["tool_calls"] if _has_function(call)]
            answered = 0
        elif message.get("role") == "tool":
            if not message.get("name") and calls:
                name = _called_name(calls, message.get("tool_call_id"), answered)
                message = {**message, "name": name}
            answered += 1
        named.append(message)
    return named


def _has_function(call: Any) -> bool:
    return isinstance(call, dict) and isinstance(call.get("function"), dict)


def _called_name(calls: Sequence[dict[str, Any]], call_id: Any, index: int) -> str:
    """The name of the function that a result belongs to.

    Args:
        calls: The calls.
        call_id: The id of the call, which is looked for first.
        index: The place of the call, which is used if no call has that id.
    """
    for call in calls:
        if call_id is not None and call.get("id") == call_id:
            return str(call["function"].get("name", UNKNOWN))
    return str(calls[index]["function"].get("name", UNKNOWN)) if index < len(calls) else UNKNOWN
