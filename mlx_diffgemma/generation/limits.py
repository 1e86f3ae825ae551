"""Limits of a generation: the room for an answer in the context, and memory."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_diffgemma.device import check_memory
from mlx_diffgemma.errors import ContextError
from mlx_diffgemma.estimate import cost
from mlx_diffgemma.generation.options import DEFAULT_TOKEN_LIMIT
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma


def answer_room(prompt: int, canvas_length: int, context: int) -> int:
    """How many tokens of whole canvases fit in the context after the prompt.

    Args:
        prompt: The tokens of the prompt.
        canvas_length: The tokens of a canvas.
        context: The tokens of the context.

    Raises:
        ContextError: Not even one canvas fits.
    """
    room = (context - prompt) // canvas_length * canvas_length
    if room <= 0:
        raise ContextError(
            f"The prompt has {prompt:,} tokens and the context holds {context:,}, which leaves no room for an "
            f"answer of one canvas ({canvas_length} tokens); shorten the prompt."
        )
    return room


def token_limit(prompt: int, max_tokens: int | None, canvas_length: int, context: int) -> int:
    """How many tokens an answer may have.  Its whole canvases must fit in the context.

    Args:
        prompt: The tokens of the prompt.
        max_tokens: The limit that was asked for, or None.
        canvas_length: The tokens of a canvas.
        context: The tokens of the context.

    Raises:
        ContextError: The canvases do not fit in the context after the prompt.
    """
    room = answer_room(prompt, canvas_length, context)
    if max_tokens is None:
        return min(DEFAULT_TOKEN_LIMIT, room)
    if max_tokens > room:
        raise ContextError(
            f"max_tokens {max_tokens:,} does not fit: the prompt has {prompt:,} tokens and the context holds "
            f"{context:,}, so at most {room:,} are possible."
        )
    return max_tokens


def check_room(
    model: DiffusionGemma,
    lengths: Sequence[int],
    batch_size: int = 1,
    patches: int = 0,
    prefill_step_size: int = cost.PREFILL_ROWS,
) -> None:
    """Check, before anything is allocated, that memory can hold a generation.

    Args:
        model: The model.
        lengths: The tokens of each prompt.
        batch_size: How many answers run together.  The longest prompts are counted.
        patches: The patches of the largest image; 0 without images.  With 0 the weights of the
            vision tower are not counted, since they are only read with the first image.
        prefill_step_size: The rows of each prompt in one forward.

    Raises:
        UserError: The weights, the caches and the widest part of a forward do not fit this machine.
    """
    longest = sorted(lengths, reverse=True)[:batch_size] or [0]
    needed = cost.answers_bytes(model, longest, patches, prefill_step_size)
    many = len(longest) > 1
    size = f"{longest[0]:,} tokens"
    what = (
        f"Running {len(longest)} prompts of up to {size} together"
        if many
        else f"A prompt of {size}"
    )
    check_memory(
        needed,
        what,
        f"{'take fewer at once' if many else 'shorten it'}, or take a conversion with fewer bits",
    )
