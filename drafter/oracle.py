"""The oracle curve: what any draft could save.

Canvases start from what the reference committed there, with a share of the positions replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from drafter.answers import answer
from drafter.baselines import FixedDraft
from drafter.drafter import Drafter
from drafter.head import TargetHead
from drafter.measures import Answered, a_canvas
from drafter.policy import DraftPolicy
from mlx_diffgemma.evaluation.tasks import Question
from mlx_diffgemma.model.attention import Segment
from mlx_diffgemma.model.cache import Cache
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.sampling.protocols import Policy
from mlx_diffgemma.text.tokenizer import chat_ids

SHARES = (1.0, 0.95, 0.9, 0.8, 0.6, 0.4, 0.2, 0.0)
OTHER = 500_009  # added to the seeds of a second run, whose random numbers should be independent


def oracle(
    model: DiffusionGemma,
    tokenizer: TokenizerWrapper,
    questions: Sequence[Question],
    base: Policy,
    seed: int,
    max_tokens: int,
    drafter: Drafter | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Measure the steps a canvas by the share of right positions in the draft.

    The other positions are noise, another question's answer, or the guesses of ``drafter`` from the
    right ones.  Neither watchdog nor judge is used.  The drafts come from one run of the reference,
    the random numbers from another.

    Args:
        model: The target.
        tokenizer: Its tokenizer.
        questions: Question i has the seed ``seed`` + i.
        base: The policy that samples and stops.
        seed: The seed of the first question.
        max_tokens: The most tokens of an answer.
        drafter: Guesses the other positions.  None: that curve is left out.
        progress: Called with a line of text after each point.

    Returns:
        The points of all curves.
    """
    before = answer(model, tokenizer, questions, base, seed, max_tokens)
    rng = np.random.default_rng(0)
    points = []
    for kind in ("noise", "another's answer") + (("the drafter's",) if drafter else ()):
        for right in SHARES:
            known: dict[tuple[int, int], np.ndarray] = {}
            for i, reference in enumerate(before):
                prefix = chat_ids(tokenizer, questions[i].messages)
                for index, canvas in enumerate(reference.committed):
                    is_right = rng.random(canvas.size) < right
                    wrong = np.full(canvas.size, -1, dtype=np.int32)
                    if kind == "another's answer":
                        wrong = np.resize(before[(i + 1) % len(before)].committed[0], canvas.size)
                    elif drafter and kind != "noise":
                        noise = rng.integers(0, model.config.text.vocab_size, canvas.size)
                        partly_right = np.where(is_right, canvas, noise)
                        wrong = _guesses(model, drafter, prefix, partly_right)
                    known[seed + OTHER + i, index] = np.where(is_right, canvas, wrong)
                    prefix = [*prefix, *canvas.tolist()]
            policy = DraftPolicy(base, FixedDraft(known), base.max_steps + 1)
            answers = answer(model, tokenizer, questions, policy, seed + OTHER, max_tokens)
            points.append({"wrong": kind, "right": right, **_figures(answers)})
            if progress:
                progress(f"oracle, {right:.0%} right, {kind}")
    return points


def _figures(answers: Sequence[Answered]) -> dict[str, float]:
    return {
        "steps": a_canvas(answers, lambda answered: answered.total("steps")),
        "score": float(np.mean([answered.score for answered in answers])),
    }


def _guesses(
    model: DiffusionGemma, drafter: Drafter, prefix: Sequence[int], canvas: np.ndarray
) -> np.ndarray:
    """The ids [length] that one pass of the drafter guesses for ``canvas``.

    Args:
        model: The target.
        drafter: The drafter.
        prefix: The ids before the canvas.
        canvas: The ids [length] of the canvas.
    """
    head = TargetHead(model, drafter)
    cache = Cache(drafter.config)
    target_cache = Cache(model.config.text)
    encoded = model.encode([mx.array(prefix)], [target_cache], taps=drafter.config.taps)
    hidden_states = {layer: rows[0] for layer, rows in encoded.taps.items()}
    drafter.append_features([drafter.features(hidden_states)], [cache])
    segment = Segment(0, canvas.size, cache, canvas=True)
    hidden = drafter(head.embed(mx.array(canvas)), [segment])
    return np.array(head.tokens(mx.argmax(head.logits(hidden), axis=-1)))
