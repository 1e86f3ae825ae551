"""What a chat template reads, found out by rendering, and conversations brought into that form.

Published templates of one family differ: one reads a tool's result from ``tool_responses`` of the
assistant's message, another scans the messages of the role ``tool``. Every front end passes
messages as OpenAI writes them, and ``arranged`` does the rest.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_diffgemma import templates
from mlx_diffgemma.errors import UserError

SYSTEM = ("system", "developer")
MODEL = ("assistant", "model")
REASONING = (
    "reasoning_content",
    "thinking",
    "reasoning",
)  # names of a message's thought, the usual one first
TURN = "<|turn>"
QUOTE = '<|"|>'
CALL_START, CALL_END = "<|tool_call>", "<tool_call|>"
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
RESULT, ANSWER = "Proberesult", "Probeanswer"
UNKNOWN = "unknown"  # the name of a function that the conversation does not tell


@dataclass(frozen=True)
class Dialect:
    """What a template reads.

    Args:
        responses: results of tools stand under ``tool_responses`` of the assistant's message, not
        in messages of their own.
        joins_answer: what the model says after a result belongs to the same message, or the
        template begins another turn.
        json_calls: the arguments of calls are written as JSON, not in Gemma's own syntax.
    """

    responses: bool = False
    joins_answer: bool = False
    json_calls: bool = False

    @classmethod
    @functools.lru_cache(maxsize=16)
    def of(cls, source: str, specials: frozenset[tuple[str, Any]]) -> Dialect:
        """The dialect of the template ``source``, found by rendering it with the names of ``specials``."""

        def text(*messages: Mapping[str, Any]) -> str:
            try:
                return templates.render(
                    source,
                    {
                        **dict(specials),
                        "messages": [USER, *messages],
                        "tools": None,
                        "documents": None,
                        "add_generation_prompt": False,
                        "enable_thinking": False,
                    },
                )
            except UserError:
                return ""

        scanned = text(
            CALLED, {"role": "tool", "name": "probe", "tool_call_id": "1", "content": RESULT}
        )
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
        return cls(
            responses,
            responses and joins,
            f"probekey:{QUOTE}Probevalue{QUOTE}" not in call and "Probevalue" in call,
        )


def _same_turn(text: str, first: str, second: str) -> bool:
    """Whether ``second`` stands after ``first`` and no turn begins between."""
    _, found, rest = text.partition(first)
    between, other, _ = rest.partition(second)
    return bool(found and other) and TURN not in between


def arranged(messages: Sequence[dict[str, Any]], dialect: Dialect) -> list[dict[str, Any]]:
    """The messages in the form that a template of this ``dialect`` reads; what is given stays as it
    is.
    """
    made = [_joined_parts(message) for message in _system_first(messages)]
    made = _with_names([_with_arguments(message) for message in made])
    return _with_responses(made, dialect) if dialect.responses else made


def _joined_parts(message: dict[str, Any]) -> dict[str, Any]:
    """Text parts that stand side by side are one text, and a content of texts alone is that text.

    Templates trim each part, so that the blank between two of them would be lost.
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
    """Several system messages, or a late one, as a single one in front, with blank lines between."""
    system = [message for message in messages if message.get("role") in SYSTEM]
    if not system or (len(system) == 1 and messages[0] is system[0]):
        return list(messages)
    texts = [
        content
        for message in system
        if isinstance(content := _joined_parts(message).get("content"), str) and content.strip()
    ]
    rest = [message for message in messages if message.get("role") not in SYSTEM]
    return [{**system[0], "content": "\n\n".join(texts)}, *rest]


def _with_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """The arguments of calls as maps; those that are no JSON object stand as a text under the name
    ``arguments``.
    """
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    made = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments", ""), str):
            call = {
                **call,
                "function": {
                    **function,
                    "arguments": read_arguments(function.get("arguments", "")),
                },
            }
        made.append(call)
    return {**message, "tool_calls": made}


def read_arguments(text: str) -> dict[str, Any]:
    """What a client sends back as the arguments of a call, in JSON."""
    if not text.strip():
        return {}
    try:
        found = json.loads(text)
        json.dumps(
            found, ensure_ascii=False
        ).encode()  # half a character, which can be written in no encoding, is a ValueError
    except (ValueError, RecursionError):
        return {"arguments": text}
    return found if isinstance(found, dict) else {"arguments": text}


def _with_responses(messages: Sequence[dict[str, Any]], dialect: Dialect) -> list[dict[str, Any]]:
    """The results of tools under ``tool_responses`` of the message with their calls."""
    made: list[dict[str, Any]] = []
    for message in messages:
        before = made[-1] if made else {}
        if message.get("role") == "tool" and before.get("tool_calls"):
            made[-1:] = _with_response(before, message)
        elif dialect.joins_answer and _answers(before, message):
            made[-1] = {**before, "content": message.get("content") or ""}
        else:
            made.append(message)
    return made


def _with_response(called: dict[str, Any], result: dict[str, Any]) -> list[dict[str, Any]]:
    """The message with calls and its result.

    What was said before the calls becomes a message of its own: templates write it after the
    results.
    """
    before = []
    if called.get("content"):
        before.append({"role": called["role"], "content": called["content"]})
    response = {"name": result.get("name", UNKNOWN), "response": result.get("content", "")}
    responses = [*called.get("tool_responses", ()), response]
    return [*before, {**called, "content": "", "tool_responses": responses}]


def _answers(called: dict[str, Any], message: dict[str, Any]) -> bool:
    """Whether ``message`` is what the model says after the results of its calls."""
    if message.get("role") not in MODEL or message.get("tool_calls"):
        return False
    return bool(called.get("tool_responses")) and not called.get("content")


def _with_names(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results of tools with the names of their functions, by the ids of the calls or by their
    order.
    """
    made = []
    calls: list[dict[str, Any]] = []
    answered = 0
    for message in messages:
        if isinstance(message.get("tool_calls"), list):
            calls = [
                call
                for call in message["tool_calls"]
                if isinstance(call, dict) and isinstance(call.get("function"), dict)
            ]
            answered = 0
        elif message.get("role") == "tool":
            if not message.get("name") and calls:
                message = {
                    **message,
                    "name": _called_name(calls, message.get("tool_call_id"), answered),
                }
            answered += 1
        made.append(message)
    return made


def _called_name(calls: Sequence[dict[str, Any]], call_id: Any, place: int) -> str:
    """The function whose result has this id, or the one at this place."""
    for call in calls:
        if call_id is not None and call.get("id") == call_id:
            return str(call["function"].get("name", UNKNOWN))
    return str(calls[place]["function"].get("name", UNKNOWN)) if place < len(calls) else UNKNOWN
