"""``GenerationResponse``: what a generation yields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class GenerationResponse:
    """A piece of an answer: one canvas, or one token with ``mode="ar"``.

    ``batch_generate`` and ``generate --json`` give the whole answer as one response.

    Attributes:
        text: The visible text that this piece added.
        token: The last token of this piece.
        logprobs: One log-probability a token, under the last step's scaled distribution.  With
            ``mode="ar"``: the whole row [vocabulary] at temperature 1.
        from_draft: The token came from a draft model (``mode="ar"``).
        prompt_tokens: The length of the prompt.
        prompt_tps: Tokens of the prompt a second.
        generation_tokens: Tokens of the answer so far.
        generation_tps: Tokens of the answer a second, so far.
        peak_memory: GB.
        finish_reason: None until the end, then "stop", "length" or "empty" (the end token came
            first).
        tokens: The tokens of this piece, including the end token.
        thought: The thought in this piece's text.
        tool_calls: The tool calls in this piece's text.
        steps: The denoising steps of this canvas.
        judged: The causal passes that verified a drafted canvas.
        tokens_per_forward: Tokens, including the end token, per step and verification so far.
            Prefill and commits are not counted.
        canvas_index: The number of the canvas in its answer, from 0.
        converged: Whether the canvas converged.  For a whole answer: whether all canvases did.
        retries: The attempts at this canvas before this one.
        rows: The canvas positions that its steps computed.
        seed: The seed that was used.
        proposed: Tokens of the draft model so far.
        accepted: How many of these were accepted.
        certificate: The stop rule under which the canvas converged ("stable-and-confident",
            "causal", …), None if it did not.  For a whole answer that converged: the last canvas's.
        parts: For a whole answer: the responses of its canvases.
    """

    text: str
    token: int
    logprobs: Any
    from_draft: bool
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    peak_memory: float
    finish_reason: str | None = None
    tokens: tuple[int, ...] = ()
    thought: str = ""
    tool_calls: tuple[dict[str, Any], ...] = ()
    steps: int = 0
    judged: int = 0
    tokens_per_forward: float = 0.0
    canvas_index: int = 0
    converged: bool = True
    retries: int = 0
    rows: int = 0
    seed: int = 0
    proposed: int = 0
    accepted: int = 0
    certificate: str | None = None
    parts: tuple[
        GenerationResponse, ...
    ] = ()  # the responses that form a whole answer of batch_generate

    @property
    def is_canvas(self) -> bool:
        """Whether the response comes from canvases, not from ``mode="ar"``.

        A drafted canvas may have taken no step.
        """
        return self.certificate is not None or not self.converged
