"""The tokens of a question's labels, and the canvas that holds them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_diffgemma.errors import UserError
from mlx_diffgemma.generation.questions import Question
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.text.literal import encode_literally
from mlx_diffgemma.text.tokenizer import turn_end

LENGTH_STEP = 16  # the length of a canvas is a multiple of this


@dataclass(frozen=True)
class Labels:
    """The ids of a question's labels, from the start of the canvas.

    Raises:
        UserError: Two labels are equal, or one is a prefix of another, so that they cannot be
            distinguished.
    """

    ids: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if not prefix_free(self.ids):
            raise UserError(
                "Two labels are the same tokens, or one begins the other; give labels that differ."
            )

    @cached_property
    def common(self) -> int:
        """The length of the common prefix of all labels.  It makes no label more probable than
        another, so it is not read.
        """
        pairs = zip(min(self.ids), max(self.ids), strict=False)
        return next(known for known, (a, b) in enumerate(pairs) if a != b)

    @cached_property
    def edges(self) -> dict[tuple[int, ...], list[int]]:
        """The tokens that may follow each prefix that some label has."""
        found: dict[tuple[int, ...], list[int]] = {}
        for ids in self.ids:
            for known in range(self.common, len(ids)):
                following = found.setdefault(ids[:known], [])
                if ids[known] not in following:
                    following.append(ids[known])
        return found

    @property
    def longest(self) -> int:
        return max(map(len, self.ids))


def label_ids(tokenizer: TokenizerWrapper, question: Question) -> Labels:
    """The ids of each label with what is pinned before it.

    Both are tokenised together, so the tokens are those of the whole text.  If one label is a
    prefix of another, as 1 is of 10, each label includes the end of the turn.

    Raises:
        UserError: Two labels are the same tokens.  The message names them.
    """
    found: dict[tuple[int, ...], str] = {}
    texts = [question.written(label) for label in question.labels]
    for label, text in zip(question.labels, texts, strict=True):
        ids = tuple(encode_literally(tokenizer, text))
        if ids in found:
            raise UserError(
                f"The labels {found[ids]!r} and {label!r} are the same tokens; give labels that differ."
            )
        found[ids] = label
    # The texts are compared too.  The tokens of "Annas" need not begin with those of "Anna", but
    # a text that begins with the tokens of "Anna" may still become "Annas".
    if prefix_free(found) and prefix_free(texts):
        return Labels(tuple(found))
    return Labels(tuple((*ids, turn_end(tokenizer)) for ids in found))


def prefix_free(sequences: Iterable[tuple[int, ...]] | Iterable[str]) -> bool:
    """Whether no sequence equals another or is a prefix of another."""
    # In sorted order, a prefix of others comes directly before one of them.
    ordered: list[Any] = sorted(sequences)
    return all(later[: len(one)] != one for one, later in itertools.pairwise(ordered))


def canvas_for(model: DiffusionGemma, labels: Labels, canvas_length: int | None = None) -> int:
    """The length of a canvas for ``labels``.

    Args:
        model: The model.
        labels: The labels of a question.
        canvas_length: The length that was asked for.  None: the smallest multiple of LENGTH_STEP
            that holds the labels, at most the checkpoint's length.

    Raises:
        UserError: The labels do not fit, or the length is out of range.
    """
    full = model.config.canvas_length
    if canvas_length is not None and not 1 <= canvas_length <= full:
        raise UserError(
            f"canvas_length {canvas_length} must lie between 1 and the {full} positions this checkpoint was made for."
        )
    length = (
        min(full, -(-labels.longest // LENGTH_STEP) * LENGTH_STEP)
        if canvas_length is None
        else canvas_length
    )
    if labels.longest > length:
        raise UserError(
            f"The longest label has {labels.longest} tokens with all that is pinned before it, and the canvas {length} "
            f"positions; {'shorten it' if length == full else 'take a longer canvas'}."
        )
    return length
