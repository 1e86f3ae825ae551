"""A conversation: its history, its cache, and what was said.  Knows no terminal.

    >>> chat = Chat(model, tokenizer)
    >>> for response in chat.send("Add 12 and 30."):
    ...     print(response.text)
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_diffgemma.generate import OnStep, stream_generate
from mlx_diffgemma.model import DiffusionGemma
from mlx_diffgemma.prompt import Medium, prepare_media
from mlx_diffgemma.prompt_cache import PromptCache
from mlx_diffgemma.request import GenerationResponse
from mlx_diffgemma.tokenizer import chat_ids, user_message


@dataclass(frozen=True)
class ChatStats:
    """Figures of a conversation and of its last turn: tokens, canvases and steps of all answers; tokens of the last prompt
    that were ``reused`` from the cache and those that were ``encoded``."""

    turns: int = 0
    tokens: int = 0
    canvases: int = 0
    steps: int = 0
    reused: int = 0
    encoded: int = 0
    tokens_per_second: float = 0.0

    def __str__(self) -> str:
        each = f"{self.steps / self.canvases:.1f} steps a canvas" if self.canvases else "no canvas yet"
        return (f"{self.turns} turns, {self.tokens} tokens in {self.canvases} canvases, {each}\n"
                f"last turn: {self.reused} prompt tokens reused, {self.encoded} encoded, {self.tokens_per_second:.1f} tokens/s")


class Chat:
    """``options`` are those of ``stream_generate``, for every turn; a ``seed`` counts up by one a turn.

    Thoughts are yielded in the responses and left out of the history.
    """

    def __init__(self, model: DiffusionGemma, tokenizer: TokenizerWrapper, system: str | None = None, think: bool = False,
                 **options: Any):
        self.model, self.tokenizer, self.think, self.options = model, tokenizer, think, options
        self.system = system
        self.reset()

    def reset(self) -> None:
        """Forget all turns; the system message stays."""
        self.messages: list[dict[str, Any]] = []
        self.images: list[Medium] = []  # of all turns in the order of their markers, opened once
        self.cache = PromptCache(self.model)
        self.stats = ChatStats()

    def send(self, text: str, on_step: OnStep | None = None, images: Sequence[Medium] = (),
             ) -> Generator[GenerationResponse, None, None]:
        """The answer to ``text``, which may come with ``images``, canvas by canvas.

        When the caller stops early, what was yielded by then becomes the history; when nothing was, the turn is as if it had
        not been.  Errors: UserError as ``stream_generate``, above all for a history that fills the context.
        """
        system = [{"role": "system", "content": self.system}] if self.system else []
        new = prepare_media(images, self.model.config, self.options.get("image_tokens"))
        asked, seen = [*self.messages, user_message(text, len(new))], [*self.images, *new]
        ids = chat_ids(self.tokenizer, [*system, *asked], think=self.think)
        options = self.options | ({"seed": self.options["seed"] + self.stats.turns} if self.options.get("seed") is not None else {})
        responses: list[GenerationResponse] = []
        try:
            for response in stream_generate(self.model, self.tokenizer, ids, on_step=on_step, prompt_cache=self.cache, images=seen,
                                            **options):
                responses.append(response)
                yield response
        finally:
            if responses:
                answer = "".join(response.text for response in responses)
                self.messages, self.images = [*asked, {"role": "assistant", "content": answer}], seen
                self._count(responses)

    def _count(self, responses: list[GenerationResponse]) -> None:
        before, last = self.stats, responses[-1]
        self.stats = ChatStats(
            before.turns + 1, before.tokens + last.generation_tokens, before.canvases + len(responses),
            before.steps + sum(response.steps for response in responses), self.cache.reused, self.cache.encoded,
            last.generation_tps)
