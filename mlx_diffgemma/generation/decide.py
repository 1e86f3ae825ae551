"""Decisions: yes or no, one of several labels, a score on a scale.

The model does not write.  What comes before the answer is pinned at the start of a canvas, and
noise follows it.  One denoising step then gives the probability of each next token.  Nothing is
committed, and the cache of the prompt is only read.

    >>> prompt = chat_ids(tokenizer, [{"role": "user", "content": "Is 12 greater than 30?"}])
    >>> (decision,) = decide(model, tokenizer, prompt, [Question.yes_no()])
    >>> decision.label, decision.probabilities["no"]
    ('no', 0.99)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_diffgemma.decoding.prompt_cache import PromptCache
from mlx_diffgemma.device import generation_memory
from mlx_diffgemma.errors import GenerationWarning, UserError
from mlx_diffgemma.estimate.cost import held_bytes
from mlx_diffgemma.generation.label_reading import BATCH_ROWS, average, read_labels, read_prompt
from mlx_diffgemma.generation.labels import canvas_for, label_ids
from mlx_diffgemma.generation.limits import check_room, token_limit
from mlx_diffgemma.generation.questions import Decision, Question, unlikely
from mlx_diffgemma.generation.request import Prompt, prompt_ids
from mlx_diffgemma.media.prompt import Medium, expand_image_tokens, prepare_media
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma

MOST_READS = 10_000


def decide(
    model: DiffusionGemma,
    tokenizer: TokenizerWrapper,
    prompt: Prompt,
    questions: Sequence[Question],
    *,
    reads: int = 1,
    seed: int = 0,
    canvas_length: int | None = None,
    images: Sequence[Medium] = (),
    image_tokens: int | None = None,
    prompt_cache: PromptCache | None = None,
    batch_rows: int = BATCH_ROWS,
) -> list[Decision]:
    """Decide questions about a prompt, without writing text.

    A decision does not depend on the other questions.  A ``GenerationWarning`` says when the model
    would write none of a question's labels.

    Args:
        model, tokenizer: From ``load``.
        prompt: Text, or ids up to the start of the model's turn.
        questions: At least one.
        reads: How many canvases of noise are averaged.  Read r uses ``seed`` + r.
        seed: Same seed, same decision.
        canvas_length: Positions of a canvas.  None: as short as the question allows.
        images: As in ``stream_generate``.
        image_tokens: As in ``GenerationOptions``.
        prompt_cache: As in ``stream_generate``.
        batch_rows: How many positions of canvases share a forward, at most.

    Returns:
        One decision a question, in their order.

    Raises:
        UserError: There are no questions, labels are the same tokens or do not fit the canvas,
            ``reads`` is below 1, or the prompt does not fit the context.
    """
    check_reads(reads, batch_rows)
    _check_questions(questions)
    labels = [label_ids(tokenizer, question) for question in questions]
    lengths = [canvas_for(model, own, canvas_length) for own in labels]
    ids, placed = expand_image_tokens(
        prompt_ids(model, tokenizer, prompt),
        prepare_media(images, model.config, image_tokens),
        model.config.image_tokens,
        tokenizer,
    )
    token_limit(len(ids), None, max(lengths), model.config.text.max_position_embeddings)
    patches = [math.prod(image.image.grid) for image in placed]
    check_room(model, [len(ids)], patches=max(patches, default=0))
    with generation_memory(partial(held_bytes, model)):
        cache = read_prompt(model, ids, placed, prompt_cache)
        read = read_labels(model, cache, labels, lengths, reads, seed, batch_rows)
    decisions = []
    for question, own in zip(questions, read, strict=True):
        decisions.append(decision_of(question, own))
        if warning := unlikely(decisions[-1]):
            warnings.warn(warning, GenerationWarning, stacklevel=2)
    return decisions


def _check_questions(questions: Any) -> None:
    """Raise UserError if ``questions`` is not a list of questions, or is empty."""
    is_list = isinstance(questions, Sequence) and not isinstance(questions, str)
    if not (is_list and all(isinstance(question, Question) for question in questions)):
        raise UserError(
            "questions are a list of Question, even a single one; give for example "
            "[Question.yes_no()]."
        )
    if not questions:
        raise UserError("There are no questions; give at least one.")


def decision_of(question: Question, logprobs: np.ndarray) -> Decision:
    """Make a decision from the log-probabilities that ``read_labels`` returns for a question."""
    shares = dict(zip(question.labels, average(logprobs).tolist(), strict=True))
    return Decision(question, shares, float(np.exp(logprobs).sum(axis=1).mean()))


def check_reads(reads: int, batch_rows: int = BATCH_ROWS) -> None:
    """Raise UserError if a number is below 1, or ``reads`` is more than memory can list."""
    if reads < 1:
        raise UserError(f"reads must be at least 1, got {reads}.")
    if reads > MOST_READS:
        raise UserError(f"reads must be at most {MOST_READS:,}, got {reads:,}.")
    if batch_rows < 1:
        raise UserError(f"batch_rows must be at least 1, got {batch_rows}.")
