"""Fills the holes of a text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mlx_diffgemma.decoding.job import Job
from mlx_diffgemma.decoding.records import Canvas, CanvasStep
from mlx_diffgemma.decoding.session import Session
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.generation.filling import Filling, FillSettings
from mlx_diffgemma.generation.holes import LENGTHS, Hole
from mlx_diffgemma.generation.infill import check_options
from mlx_diffgemma.generation.length_search import QUICK
from mlx_diffgemma.generation.limits import check_room
from mlx_diffgemma.generation.options import PENALTIES, GenerationOptions
from mlx_diffgemma.generation.request import fresh_seed
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.serving.engine import Engine
from mlx_diffgemma.serving.jobs.events import Emit, Ended, Piece, Usage
from mlx_diffgemma.serving.jobs.stops import Stops
from mlx_diffgemma.serving.settings import Settings
from mlx_diffgemma.serving.tasks import InfillTask


class InfillJob(Job):
    """Fills the holes of one text.

    ``filling`` holds the result.  ``warnings`` are for the caller.
    """

    def __init__(self, filling: Filling, emit: Emit) -> None:
        self.filling = filling
        self.warnings: list[str] = []
        self._emit = emit
        self._canvases: list[Canvas] = []
        filling.warn = self.warnings.append

    def rounds(self, model: DiffusionGemma) -> Iterator[Sequence[Session]]:  # noqa: ARG002
        return self.filling.rounds()

    def step(self, session: Session, step: CanvasStep) -> None:
        if step.committed:
            self._canvases.append(session.canvases[-1])

    def piece(self, stops: Sequence[str]) -> Piece:
        """The text of the hole, up to the first of ``stops``."""
        text = Stops(stops).feed(self.filling.fills[0].text, last=True)
        return Piece(0, text, finish_reason="stop")

    def done(self, error: Exception | None) -> None:
        self._emit(Ended(error))

    @property
    def usage(self) -> Usage:
        """The cost of all lengths that were tried.  ``completion`` counts only the final texts."""
        steps = sum(canvas.steps for canvas in self._canvases)
        return Usage(
            prompt=self.filling.begin + sum(map(len, self.filling.parts)),
            completion=sum(len(fill.tokens) for fill in self.filling.fills),
            reused=0,
            steps=steps,
            produced=sum(len(canvas.tokens) for canvas in self._canvases),
            forwards=steps,
        )


def prepare_filling(engine: Engine, settings: Settings, task: InfillTask) -> Filling:
    """Make the search for the text of a hole, ready to run.

    Args:
        engine: the engine with the model.
        settings: the settings of the server.
        task: what the request asks for.

    Raises:
        UserError: the task cannot be done.
    """
    keywords = settings.defaults | dict(task.options)
    keywords.pop("max_tokens", None)  # the server's default is for answers
    constraint = {name: keywords.pop(name) for name in ("regex", "choices") if name in keywords}
    for name in PENALTIES:  # they have no effect, which a warning says
        keywords.pop(name, None)
    options = GenerationOptions.from_keywords(check_options(keywords))
    filling = Filling(
        engine.model,
        engine.tokenizer,
        [task.before, task.after],
        [Hole(_lengths(task, engine.model.config.canvas_length), **constraint)],
        task.instruction,
        FillSettings(
            options.policy(engine.model),
            fresh_seed() if options.seed is None else options.seed,
            QUICK,
        ),
    )
    settings.check_prompt(filling.most)
    check_room(engine.model, [filling.most])
    return filling


def _lengths(task: InfillTask, canvas_length: int) -> tuple[int, int]:
    """The fewest and the most tokens of the hole.

    Raises:
        UserError: the fewest exceed the most.
    """
    most = task.max_tokens if task.max_tokens and task.max_tokens > 0 else LENGTHS[1]
    least = task.min_tokens or LENGTHS[0]
    if least > most:
        raise UserError(f"min_tokens {least} exceeds max_tokens {most}.")
    # A hole is only longer than a canvas if the request asks for at least that many tokens.
    return least, max(least, min(most, canvas_length))
