"""What clients get: OpenAI's response bodies, with fields of our own beside theirs.

Source: the OpenAI API reference, chat completions, chunks, completions, models and errors.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable, Sequence
from typing import Any

from mlx_diffgemma import __version__
from mlx_diffgemma.decide import Decision
from mlx_diffgemma.serving.jobs import Piece, TokenLogprob, Usage

DONE = "data: [DONE]\n\n"
PREFIXES = {"chat.completion": "chatcmpl", "text_completion": "cmpl", "decisions": "decisions"}  # of ids, by the kind of a body


def error_body(message: str, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None,
               ) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def event(body: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(body, allow_nan=False)}\n\n"  # in ASCII: clients take some other characters for ends of lines


class Envelope:
    """What all bodies and chunks of one answer have in common; ``kind``: one of PREFIXES."""

    def __init__(self, kind: str, model: str) -> None:
        self.kind, self.id = kind, f"{PREFIXES[kind]}-{secrets.token_hex(12)}"
        self._common = {"created": int(time.time()), "model": model, "system_fingerprint": f"mlx-diffgemma-{__version__}"}

    @property
    def chat(self) -> bool:
        return self.kind == "chat.completion"

    def whole(self, usage: Usage, **more: Any) -> dict[str, Any]:
        return {"id": self.id, "object": self.kind, **self._common, "usage": usage_body(usage), **more}

    def chunk(self, choices: Sequence[dict[str, Any]] = (), **more: Any) -> dict[str, Any]:
        """``more`` beside ``choices`` is passed over by clients that do not know it, above all where there are no choices."""
        return {"id": self.id, "object": "chat.completion.chunk" if self.chat else self.kind, **self._common,
                "choices": list(choices), **more}

    def choice(self, index: int, pieces: Sequence[Piece], echo: str = "") -> dict[str, Any]:
        """A whole choice from all its pieces."""
        found: dict[str, Any] = {"index": index, "finish_reason": pieces[-1].finish_reason if pieces else "stop"}
        text, logprobs = "".join(piece.text for piece in pieces), [own for piece in pieces for own in piece.logprobs]
        if not self.chat:
            return found | {"text": echo + text, "logprobs": _completion_logprobs(logprobs, len(echo)) if logprobs else None}
        calls = [call for piece in pieces for call in piece.calls]
        message: dict[str, Any] = {"role": "assistant", "content": None if calls and not text.strip() else text, "refusal": None}
        if thought := "".join(piece.thought for piece in pieces).strip():
            message["reasoning_content"] = thought
        if calls:
            message["tool_calls"] = [_call(call) for call in calls]
        return found | {"message": message, "logprobs": _chat_logprobs(logprobs) if logprobs else None}

    def delta(self, piece: Piece, calls: int = 0, length: int = 0, first: bool = False) -> dict[str, Any]:
        """A piece of a choice, behind so many ``calls`` and so much text, of ``length`` characters."""
        found: dict[str, Any] = {"index": piece.index, "finish_reason": piece.finish_reason}
        if not self.chat:
            logprobs = _completion_logprobs(piece.logprobs, length) if piece.logprobs else None
            return found | {"text": piece.text, "logprobs": logprobs}
        delta: dict[str, Any] = {"role": "assistant"} if first else {}
        if piece.text or first:
            delta["content"] = piece.text
        if piece.thought:
            delta["reasoning_content"] = piece.thought
        if piece.calls:
            delta["tool_calls"] = [{"index": calls + place, **_call(call)} for place, call in enumerate(piece.calls)]
        return found | {"delta": delta, "logprobs": _chat_logprobs(piece.logprobs) if piece.logprobs else None}


def warned(warnings: Iterable[str]) -> dict[str, Any]:
    """A field of our own for what the caller should know, if there is anything."""
    found = list(warnings)
    return {"warnings": found} if found else {}


def usage_body(usage: Usage) -> dict[str, Any]:
    return {"prompt_tokens": usage.prompt, "completion_tokens": usage.completion, "total_tokens": usage.prompt + usage.completion,
            "prompt_tokens_details": {"cached_tokens": usage.reused}, "denoising_steps": usage.steps,
            "tokens_per_forward": round(usage.produced / usage.forwards, 2) if usage.forwards else 0.0}


def decision_body(decision: Decision) -> dict[str, Any]:
    return {"question": decision.question.text, "label": decision.label, "value": decision.value, "mass": decision.mass,
            "probabilities": decision.probabilities}


def model_body(name: str, created: int, **more: Any) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "mlx-diffgemma", **more}


def _call(call: dict[str, Any]) -> dict[str, Any]:
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function",
            "function": {"name": call["name"], "arguments": json.dumps(call["arguments"], ensure_ascii=False)}}


def _chat_logprobs(logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    def entry(text: str, value: float) -> dict[str, Any]:
        return {"token": text, "logprob": value, "bytes": list(text.encode("utf-8", "surrogatepass"))}

    return {"content": [entry(own.text, own.logprob) | {"top_logprobs": [entry(*one) for one in own.top]} for own in logprobs],
            "refusal": None}


def _completion_logprobs(logprobs: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    offsets = [offset + sum(len(own.text) for own in logprobs[:place]) for place in range(len(logprobs))]
    return {"tokens": [own.text for own in logprobs], "token_logprobs": [own.logprob for own in logprobs],
            "top_logprobs": [dict(own.top) for own in logprobs], "text_offset": offsets}
