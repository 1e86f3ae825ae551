"""Log-probabilities of tokens, released together with the text of the tokens."""

from __future__ import annotations

from collections import deque

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_diffgemma.decoding.records import CanvasStep
from mlx_diffgemma.generation.response import GenerationResponse
from mlx_diffgemma.generation.trace import Tracer
from mlx_diffgemma.serving.jobs.events import TokenLogprob
from mlx_diffgemma.text.parser import ResponseParser


class LogprobQueue:
    """Holds the log-probabilities of visible tokens until all of their text has been shown."""

    def __init__(self, tracer: Tracer, tokenizer: TokenizerWrapper) -> None:
        self._tracer = tracer
        self._parser = ResponseParser(tokenizer)
        self._waiting: deque[TokenLogprob] = deque()
        self._shown = 0  # characters of the answer that were shown
        self._released = 0  # characters of the tokens that were released

    def add(self, response: GenerationResponse, step: CanvasStep) -> None:
        """Take in the visible tokens of ``response``, which ``step`` committed."""
        positions = [
            position for position, token in enumerate(response.tokens) if self._parser.shows(token)
        ]
        texts = self._tracer.pieces([response.tokens[position] for position in positions])
        top = None if step.top is None else [np.array(values).tolist() for values in step.top]
        for position, text in zip(positions, texts, strict=True):
            best: tuple[tuple[str, float], ...] = ()
            if top is not None:
                best = tuple(
                    (self._tracer.pieces([token])[0], logprob)
                    for token, logprob in zip(top[0][position], top[1][position], strict=True)
                )
            logprob = float(response.logprobs[position])
            self._waiting.append(TokenLogprob(text, logprob, best))

    def release(self, text: str, stopped: bool, last: bool) -> tuple[TokenLogprob, ...]:
        """Return the entries whose text has been shown, once ``text`` is shown as well.

        Args:
            text: the text that is shown now.
            stopped: a stop string ended the answer; a token that it cut is released too.
            last: no more text follows; everything that waits is released.
        """
        self._shown += len(text)
        released = list[TokenLogprob]()
        while self._waiting:
            end = self._released + len(self._waiting[0].text)
            # After a stop string, a token that it cut is released with the text before it.
            is_shown = self._released < self._shown if stopped else end <= self._shown or last
            if not is_shown:
                break
            released.append(self._waiting.popleft())
            self._released = end
        return tuple(released)
