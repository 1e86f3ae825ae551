"""Infilling: ``infill``, ``stream_infill``, ``batch_infill`` and ``edit``.

They fill the holes of a text.  A hole depends on the text on both sides of it.

    >>> model, tokenizer = load("nano")
    >>> infill(model, tokenizer, "Mia was a red <|hole|>. Mia lived near the river.", "Tell me a story about Mia the fox.").text
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_diffgemma.decoding.batch import BatchJob, run_jobs
from mlx_diffgemma.decoding.session import Session
from mlx_diffgemma.device import generation_memory
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.estimate.cost import held_bytes
from mlx_diffgemma.generation.filling import Filling, FillSettings
from mlx_diffgemma.generation.holes import Fill, Hole, Infilled, Messages, split_holes
from mlx_diffgemma.generation.length_search import TRIED
from mlx_diffgemma.generation.limits import check_room
from mlx_diffgemma.generation.options import CONSTRAINTS, PENALTIES, GenerationOptions
from mlx_diffgemma.generation.request import fresh_seed
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.text.literal import encode_literally


def infill(
    model: DiffusionGemma,
    tokenizer: TokenizerWrapper,
    text: str | Sequence[str],
    prompt: Messages | None = None,
    *,
    hole: Hole | Sequence[Hole] = Hole(),  # noqa: B008
    **options: Any,
) -> Infilled:
    """Fill the holes of a text.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        text: The text, with a marker for each hole: ``<|hole|>``, or with a length in tokens
            ``<|hole:5|>`` or ``<|hole:2-8|>``.  Or the list of the texts between the holes.
        prompt: The user's message, or a conversation, to which the text is the answer.  None: the
            text stands alone.
        hole: The properties of all holes, apart from what their markers say.  Or a list, one for
            each hole.
        options: ``batch_size``, the number of lengths that are tried together, and the fields of
            GenerationOptions that concern canvases.

    Returns:
        The whole text, what filled each hole, and the seed.

    Raises:
        UserError: The text has no holes, nothing fits a hole, or the text is longer than the
            context.  It is raised before the model runs.
    """
    prompts = None if prompt is None else [prompt]
    return batch_infill(model, tokenizer, [text], prompts, hole=hole, **options)[0]


def stream_infill(
    model: DiffusionGemma,
    tokenizer: TokenizerWrapper,
    text: str | Sequence[str],
    prompt: Messages | None = None,
    *,
    hole: Hole | Sequence[Hole] = Hole(),  # noqa: B008
    batch_size: int = 8,
    **options: Any,
) -> Iterator[Fill]:
    """Fill the holes of a text, yielding each ``Fill`` as soon as it is known.

    The fills come in the order of the text.  Arguments and errors are those of ``infill``.
    """
    prompts = None if prompt is None else [prompt]
    options |= {"batch_size": batch_size}
    batch = _Batch(model, tokenizer, [text], prompts, hole, None, options)
    return (fill for _, fill in batch.fills())


def batch_infill(
    model: DiffusionGemma,
    tokenizer: TokenizerWrapper,
    texts: Sequence[str | Sequence[str]],
    prompts: Sequence[Messages] | None = None,
    *,
    hole: Hole | Sequence[Hole] = Hole(),  # noqa: B008
    seeds: Sequence[int] | None = None,
    on_fill: Callable[[int, Fill], None] | None = None,
    **options: Any,
) -> list[Infilled]:
    """Fill the holes of several texts in shared forwards.

    The other texts do not change the fills of a text.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        texts: As ``text`` of ``infill``.
        prompts: One for each text; None: the texts stand alone.
        hole: As in ``infill``.
        seeds: One for each text; None: the seed of ``options`` for all.
        on_fill: Called with the index of the text and each fill as soon as it is known.
        options: As in ``infill``.

    Returns:
        One result a text, in their order.

    Raises:
        UserError: As ``infill``, or a list does not have one entry for each text.
    """
    batch = _Batch(model, tokenizer, texts, prompts, hole, seeds, options)
    for index, fill in batch.fills():
        if on_fill:
            on_fill(index, fill)
    return [filling.result() for filling in batch.fillings]


def edit(
    model: DiffusionGemma,
    tokenizer: TokenizerWrapper,
    text: str,
    span: tuple[int, int],
    prompt: str,
    *,
    hole: Hole | None = None,
    **options: Any,
) -> Infilled:
    """Rewrite a span of a text as ``prompt`` asks.

    The rest is returned byte for byte.  The model sees the whole text next to ``prompt``.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        text: The text.
        span: The index of the first character of the span, and the index after its last.
        prompt: What to change.
        hole: The properties of the new text.  Without a length, lengths up to a quarter shorter or
            longer than the span's are tried.
        options: As in ``infill``.

    Returns:
        As ``infill``.

    Raises:
        UserError: As ``infill``, or the span is empty or not within the text.
    """
    start, stop = span
    if not 0 <= start < stop <= len(text):
        raise UserError(
            f"The span {start} to {stop} is no part of a text of {len(text)} characters; give its first character and "
            "the one behind its last."
        )
    given = hole or Hole()
    if given.length is None:
        size = len(encode_literally(tokenizer, text[start:stop]))
        about = max(2, size // 4)
        given = replace(given, length=(max(1, size - about), size + about))
    return infill(
        model, tokenizer, (text[:start], text[stop:]), f"{prompt}\n\n{text}", hole=given, **options
    )


class _FillJob(BatchJob):
    """One text whose holes are filled; ``index`` is its place in the batch."""

    def __init__(self, index: int, filling: Filling) -> None:
        self.index = index
        self.filling = filling
        self._delivered = 0

    def rounds(self, model: DiffusionGemma) -> Iterator[Sequence[Session]]:  # noqa: ARG002
        return self.filling.rounds()

    def new_fills(self) -> list[Fill]:
        """The fills since the last call."""
        fills = self.filling.fills[self._delivered :]
        self._delivered += len(fills)
        return fills


class _Batch:
    """Texts that are filled together.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        texts: Each with markers, or as the texts between its holes.
        prompts: The user's message or conversation for each text; None: the texts stand alone.
        hole: As in ``infill``.
        seeds: One for each text; None: all use the seed of ``options``.
        options: Those of ``infill``, including ``batch_size``.

    Raises:
        UserError: An argument is invalid.  Everything is checked before the model runs.
    """

    def __init__(
        self,
        model: DiffusionGemma,
        tokenizer: TokenizerWrapper,
        texts: Sequence[str | Sequence[str]],
        prompts: Sequence[Messages] | None,
        hole: Hole | Sequence[Hole],
        seeds: Sequence[int] | None,
        options: dict[str, Any],
    ) -> None:
        keywords = dict(options)
        self.batch_size: int = keywords.pop("batch_size", 8)
        _check_lengths(len(texts), prompts, seeds, self.batch_size)
        self.model = model
        self.options = GenerationOptions.from_keywords(check_options(keywords))
        policy = self.options.policy(model)
        seed = fresh_seed() if self.options.seed is None else self.options.seed
        self.fillings = list[Filling]()
        for index, text in enumerate(texts):
            parts, holes = _parts_of(text, hole)
            self.fillings.append(
                Filling(
                    model,
                    tokenizer,
                    parts,
                    holes,
                    prompts[index] if prompts else None,
                    FillSettings(
                        policy,
                        seed if seeds is None else seeds[index],
                    ),
                )
            )
        tried = min(self.batch_size, TRIED)  # of one hole, side by side
        lengths = [filling.most for filling in self.fillings for _ in range(tried)]
        check_room(model, lengths, self.batch_size)

    def fills(self) -> Iterator[tuple[int, Fill]]:
        """Yield the index of a text and its fill, as soon as it is known."""
        jobs = [_FillJob(index, filling) for index, filling in enumerate(self.fillings)]
        with generation_memory(partial(held_bytes, self.model, self.batch_size)):
            for _ in run_jobs(self.model, jobs, self.batch_size, self.options.prefill_step_size):
                for job in jobs:
                    for fill in job.new_fills():
                        yield job.index, fill


def _check_lengths(
    texts: int, prompts: Sequence[Any] | None, seeds: Sequence[int] | None, batch_size: int
) -> None:
    """Raise UserError if a list does not have one entry for each text."""
    if prompts is not None and len(prompts) != texts:
        raise UserError(
            f"prompts must have one entry a text: got {len(prompts)} for {texts} texts."
        )
    if seeds is not None and len(seeds) != texts:
        raise UserError(f"seeds must have one entry a text: got {len(seeds)} for {texts} texts.")
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}.")


def _parts_of(
    text: str | Sequence[str], hole: Hole | Sequence[Hole]
) -> tuple[list[str], list[Hole]]:
    """The texts between the holes, and the holes."""
    if isinstance(text, str):
        return split_holes(text, hole if isinstance(hole, Hole) else Hole())
    parts = list(text)
    holes = [hole] * (len(parts) - 1) if isinstance(hole, Hole) else list(hole)
    return parts, holes


def check_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return ``options``.  Raise UserError if one of them has no meaning for a hole."""
    for name, why in (
        ("max_tokens", "a hole has a length"),
        ("mode", "holes belong to canvases"),
        ("canvas_length", "a canvas is as long as the text needs"),
        ("images", "holes are in texts"),
        *(
            (name, "a hole has text on both sides")
            for name in PENALTIES
            if options.get(name) != getattr(GenerationOptions, name)
        ),
        *((name, "a constraint belongs to the hole: hole=Hole(…)") for name in CONSTRAINTS),
    ):
        if options.get(name) is not None:
            raise UserError(f"{name} has no meaning here, {why}; leave it out.")
    return options
