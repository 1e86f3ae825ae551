"""Answers of a target to questions, on canvases and left to right."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from drafter.drafter import Drafter
from drafter.measures import Answered
from mlx_diffgemma.decoding.autoregressive import (
    CausalLoop,
    CausalPolicy,
    CausalSession,
    causal_sessions,
)
from mlx_diffgemma.decoding.batch import run as run_sessions
from mlx_diffgemma.decoding.prefill import PREFILL_STEP_SIZE
from mlx_diffgemma.decoding.session import Session
from mlx_diffgemma.evaluation.tasks import Question
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.sampling.draws import Draws
from mlx_diffgemma.sampling.protocols import Policy
from mlx_diffgemma.text.parser import ResponseParser
from mlx_diffgemma.text.tokenizer import chat_ids

BATCH = 16


def answer(
    model: DiffusionGemma,
    tokenizer: TokenizerWrapper,
    questions: Sequence[Question],
    policy: Policy,
    seed: int,
    max_tokens: int,
    batch_size: int = BATCH,
) -> list[Answered]:
    """Answer questions on canvases.

    Args:
        model: The target.
        tokenizer: Its tokenizer.
        questions: Question i has the seed ``seed`` + i.
        policy: The policy that samples and stops.
        seed: The seed of the first question.
        max_tokens: The most tokens of an answer.
        batch_size: How many questions run together.

    Returns:
        One scored answer for each question.
    """
    eos_ids = model.config.generation.eos_token_ids
    sessions = []
    for number, question in enumerate(questions):
        ids = chat_ids(tokenizer, question.messages)
        draws = Draws(seed + number, model.config.text.vocab_size)
        sessions.append(Session(model, ids, policy, draws, eos_ids, max_tokens))
    prompt_lengths = [len(session.ids) for session in sessions]
    for _ in run_sessions(model, sessions, batch_size):
        pass  # the sessions hold the results
    answers = []
    for question, session, length in zip(questions, sessions, prompt_lengths, strict=True):
        tokens = [int(token) for canvas in session.canvases for token in canvas.tokens]
        score = _score(tokenizer, question, tokens, eos_ids)
        committed = _committed(session, length)
        answers.append(Answered(score, tuple(session.canvases), tuple(committed)))
    return answers


def _committed(session: Session, prompt_length: int) -> list[np.ndarray]:
    """The ids of each canvas, whole."""
    whole = session.ids[prompt_length:]
    start = 0
    committed = []
    for canvas in session.canvases:
        is_last = canvas is session.canvases[-1]
        size = len(whole) - start if is_last else canvas.tokens.size
        committed.append(np.array(whole[start : start + size], dtype=np.int32))
        start += size
    return committed


def answer_causally(
    model: DiffusionGemma,
    tokenizer: TokenizerWrapper,
    questions: Sequence[Question],
    temperature: float,
    seed: int,
    max_tokens: int,
    drafter: Drafter | None = None,
) -> dict[str, float]:
    """Answer questions left to right.

    Args:
        model: The target.
        tokenizer: Its tokenizer.
        questions: Question i has the seed ``seed`` + i.
        temperature: 0 takes the most probable token.
        seed: The seed of the first question.
        max_tokens: The most tokens of an answer.
        drafter: Proposes tokens.  None: the target decodes alone.

    Returns:
        The mean score, and the tokens, forwards and rows of the target for each answer.
    """
    eos_ids = model.config.generation.eos_token_ids
    scores: list[float] = []
    sessions: list[CausalSession] = []
    for first in range(0, len(questions), BATCH):
        batch = questions[first : first + BATCH]
        batch_sessions = causal_sessions(
            model,
            [chat_ids(tokenizer, question.messages) for question in batch],
            CausalPolicy(temperature),
            [Draws(seed + first + i, model.config.text.vocab_size) for i in range(len(batch))],
            eos_ids,
            [max_tokens] * len(batch),
        )
        proposals = drafter.causal(model) if drafter else None
        loop = CausalLoop(model, batch_sessions, PREFILL_STEP_SIZE, proposals)
        loop.prefill()
        while loop.active:
            loop.advance()
        sessions += batch_sessions
        for question, session in zip(batch, batch_sessions, strict=True):
            scores.append(_score(tokenizer, question, session.tokens, eos_ids))
    count = len(questions)
    return {
        "score": float(np.mean(scores)),
        "tokens": sum(len(session.tokens) for session in sessions) / count,
        "forwards": sum(session.forwards for session in sessions) / count,
        "rows": sum(session.forwards + session.proposed for session in sessions) / count,
    }


def _score(
    tokenizer: TokenizerWrapper, question: Question, ids: Sequence[int], eos_ids: Sequence[int]
) -> float:
    parser = ResponseParser(tokenizer)
    text = parser.feed([token for token in ids if token not in eos_ids]).answer
    text += parser.finish().answer
    return question.mark(text).score
