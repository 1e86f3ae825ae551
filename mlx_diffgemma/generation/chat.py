"""A conversation: its history, its cache and its messages.  The module uses no terminal.

>>> chat = Chat(model, tokenizer)
>>> for response in chat.send("Add 12 and 30."):
...     print(response.text)
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_diffgemma.decoding.prompt_cache import PromptCache
from mlx_diffgemma.generation.generate import OnStep, stream_generate
from mlx_diffgemma.generation.response import GenerationResponse
from mlx_diffgemma.media.prompt import Medium, prepare_media
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.text.tokenizer import chat_ids, user_message


@dataclass(frozen=True)
class ChatStats:
    """Figures of a conversation and of its last turn.

    Tokens, canvases and steps are those of all answers.  ``reused`` and ``encoded`` are the tokens
    of the last prompt that came from the cache and those that were encoded.
    """

    turns: int = 0
    tokens: int = 0
    canvases: int = 0
    steps: int = 0
    reused: int = 0
    encoded: int = 0
    tokens_per_second: float = 0.0

    def __str__(self) -> str:
        each = (
            f"{self.steps / self.canvases:.1f} steps a canvas" if self.canvases else "no canvas yet"
        )
        return (
            f"{self.turns} turns, {self.tokens} tokens in {self.canvases} canvases, {each}\n"
            f"last turn: {self.reused} prompt tokens reused, {self.encoded} encoded, {self.tokens_per_second:.1f} tokens/s"
        )


class Chat:
    """A conversation with a model.

    ``options`` are those of ``stream_generate`` and apply to every turn.  A ``seed`` increases by
    one each turn.  ``template`` holds further arguments of ``chat_ids``.  The responses include
    thoughts, and the history leaves them out.
    """

    def __init__(
        self,
        model: DiffusionGemma,
        tokenizer: TokenizerWrapper,
        system: str | None = None,
        think: bool = False,
        template: Mapping[str, Any] | None = None,
        **options: Any,
    ):
        self.model, self.tokenizer, self.think, self.options = model, tokenizer, think, options
        self.system = system
        self.template = dict(template or {})
        self.reset()

    def reset(self) -> None:
        """Forget all turns; the system message stays."""
        self.messages: list[dict[str, Any]] = []
        # The images of all turns in the order of their markers.  Each is opened once.
        self.images: list[Medium] = []
        self.cache = PromptCache(self.model)
        self.stats = ChatStats()

    def send(
        self,
        text: str,
        on_step: OnStep | None = None,
        images: Sequence[Medium] = (),
    ) -> Generator[GenerationResponse, None, None]:
        """Answer a message, canvas by canvas.

        If the caller stops early, the history keeps what was yielded by then.  If nothing was
        yielded, the turn leaves no trace.

        Args:
            text: The message.
            on_step: Called with each denoising step.
            images: The images of the message.

        Raises:
            UserError: As ``stream_generate``, most often because the history fills the context.
        """
        system = [{"role": "system", "content": self.system}] if self.system else []
        new = prepare_media(images, self.model.config, self.options.get("image_tokens"))
        asked, seen = [*self.messages, user_message(text, len(new))], [*self.images, *new]
        ids = chat_ids(self.tokenizer, [*system, *asked], think=self.think, **self.template)
        options = self.options | (
            {"seed": self.options["seed"] + self.stats.turns}
            if self.options.get("seed") is not None
            else {}
        )
        responses: list[GenerationResponse] = []
        try:
            for response in stream_generate(
                self.model,
                self.tokenizer,
                ids,
                on_step=on_step,
                prompt_cache=self.cache,
                images=seen,
                **options,
            ):
                responses.append(response)
                yield response
        finally:
            if responses:
                answer = "".join(response.text for response in responses)
                self.messages, self.images = (
                    [*asked, {"role": "assistant", "content": answer}],
                    seen,
                )
                self._count(responses)

    def _count(self, responses: list[GenerationResponse]) -> None:
        before, last = self.stats, responses[-1]
        self.stats = ChatStats(
            before.turns + 1,
            before.tokens + last.generation_tokens,
            before.canvases + len(responses),
            before.steps + sum(response.steps for response in responses),
            self.cache.reused,
            self.cache.encoded,
            last.generation_tps,
        )
