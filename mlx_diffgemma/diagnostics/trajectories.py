"""Whole answers of ours against those of the reference, under the same random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from mlx_diffgemma.decoding.loop import Loop
from mlx_diffgemma.decoding.records import CanvasStep
from mlx_diffgemma.decoding.session import Session
from mlx_diffgemma.diagnostics.decisions import Decision, Ended, Outcome, Sides, policy_with
from mlx_diffgemma.diagnostics.recorder import ReferenceCanvas
from mlx_diffgemma.diagnostics.reference import Reference
from mlx_diffgemma.model.cache import Cache
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.sampling import self_conditioning
from mlx_diffgemma.sampling.draws import Draws
from mlx_diffgemma.sampling.sampler import Before, Flag

ENDED_SHARE = 0.02


@dataclass
class TrajectoryResult:
    """The trajectories of one setting.

    It counts the compared canvases and steps, and lists the decisions that differed.  After such a
    decision a sequence is compared step by step from the reference's own canvases.
    """

    setting: str
    canvases: int = 0
    steps: int = 0
    ended: list[Ended] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        allowed = max(1, ENDED_SHARE * self.steps)  # even a few steps may hold one tie
        if self.canvases == 0 or len(self.ended) > allowed:
            return False
        return all(decision.excused for decision in self.ended)


def compare_trajectories(
    model: DiffusionGemma,
    reference: Reference,
    prompts: Sequence[Sequence[int]],
    setting: str,
    canvases: int = 1,
    seed: int = 0,
    max_steps: int | None = None,
    together: bool = False,
) -> TrajectoryResult:
    """Compare whole answers.

    Args:
        model: Our model, in float32.
        reference: The reference for the same checkpoint.
        prompts: Token ids of each prompt.
        setting: The name of this comparison in the table.
        canvases: The most canvases of an answer.
        seed: Prompt i has the seed ``seed`` + i.
        max_steps: The most steps of a canvas.  None: the checkpoint's limit.
        together: Both sides run the prompts as one batch.

    Returns:
        What was compared, and the decisions that differed.
    """
    result = TrajectoryResult(setting)
    rows = list(range(len(prompts)))
    groups = [rows] if together else [[row] for row in rows]
    steps = max_steps or model.config.generation.max_denoising_steps
    for group in groups:
        ids = [prompts[row] for row in group]
        draws = [Draws(seed + row, model.config.text.vocab_size) for row in group]
        theirs = reference.trajectories(ids, draws, canvases, max_denoising_steps=steps)
        ours = run_ours(model, ids, draws, canvases, steps)
        for row in range(len(group)):
            sides = Sides(model, reference, draws[row], steps)
            RowComparison(result, sides, theirs[row]).compare(ours[row])
    return result


def run_ours(
    model: DiffusionGemma,
    prompts: Sequence[Sequence[int]],
    draws: Sequence[Draws],
    canvases: int,
    max_steps: int,
) -> list[list[list[CanvasStep]]]:
    """Answer the prompts with our model.

    Args:
        model: Our model.
        prompts: Token ids of each prompt.
        draws: Random numbers of each prompt.
        canvases: The most canvases of an answer.
        max_steps: The most steps of a canvas.

    Returns:
        For each prompt its canvases, and for each canvas its steps.
    """
    policy = policy_with(model, max_steps)
    limit = canvases * model.config.canvas_length
    eos_ids = model.config.generation.eos_token_ids
    sessions = [
        Session(model, ids, policy, own_draws, eos_ids, limit)
        for ids, own_draws in zip(prompts, draws, strict=True)
    ]
    steps: dict[int, list[list[CanvasStep]]] = {id(session): [] for session in sessions}
    loop = Loop(model, sessions)
    while loop.active:
        for session, step in loop.advance():
            if step.step == 0:
                steps[id(session)].append([])
            steps[id(session)][-1].append(step)
    return [steps[id(session)] for session in sessions]


@dataclass(frozen=True)
class RowComparison:
    """Compares one answer with the reference's, and adds what it finds to ``result``."""

    result: TrajectoryResult
    sides: Sides
    theirs: list[ReferenceCanvas]

    def compare(self, ours: list[list[CanvasStep]]) -> None:
        """Compare step by step up to the first difference; after an excused one call ``follow``."""
        for index, canvas in enumerate(self.theirs):
            self.result.canvases += 1
            for number, step in enumerate(canvas.steps):
                self.result.steps += 1
                outcome = _outcome(ours[index][number])
                names = outcome.differences(step)
                if names:
                    decision = Decision(self.sides, canvas, index, number).first(names, outcome)
                    self.result.ended.append(decision)
                    if decision.excused:
                        self.follow(index, number + 1)
                    return
            if len(ours[index]) != len(canvas.steps):
                ended = Ended(index, len(canvas.steps), "step count", np.inf, 0.0)
                self.result.ended.append(ended)
                return
        if len(ours) != len(self.theirs):
            ended = Ended(len(self.theirs), 0, "canvas count", np.inf, 0.0)
            self.result.ended.append(ended)

    def follow(self, first_canvas: int, first_step: int) -> None:
        """Compare the remaining steps, each from the reference's own canvas and signal.

        Steps whose signal was too large to keep are left out.
        """
        model = self.sides.model
        for index in range(first_canvas, len(self.theirs)):
            canvas = self.theirs[index]
            self.result.canvases += index > first_canvas
            cache = Cache(model.config.text)
            model.encode([mx.array(canvas.prefix.astype(np.int32))], [cache])
            for number in range(first_step if index == first_canvas else 0, len(canvas.steps)):
                step = canvas.steps[number]
                if number and step.signal is None:
                    continue
                self.result.steps += 1
                outcome = self.take_step(cache, index, number)
                names = outcome.differences(step)
                if names:
                    decision = Decision(self.sides, canvas, index, number, carried=False)
                    self.result.ended.append(decision.first(names, outcome))
                    if not self.result.ended[-1].excused:
                        return

    def take_step(self, cache: Cache, index: int, number: int) -> Outcome:
        """Take step ``number`` of the reference's canvas ``index``, with the reference's signal.

        Args:
            cache: The cache of the text before the canvas.
            index: The index of the canvas.
            number: The number of the step.
        """
        model = self.sides.model
        policy = self.sides.policy
        length = model.config.canvas_length
        steps = self.theirs[index].steps
        step = steps[number]
        signal = None
        if step.signal is not None:
            signal = self_conditioning.dense(model, mx.array(step.signal[None]))
        canvas_in = mx.array(step.canvas_in.astype(np.int32))[None]
        logits = model.denoise(canvas_in, [cache], signal).logits
        past = [np.full(length, -1), *(before.argmax for before in steps[:number])]
        history = [past[max(0, len(past) - 1 - back)] for back in range(policy.stability)]
        accepted = np.zeros(length, dtype=bool)
        if number:
            accepted = steps[number - 1].accepted.astype(bool)
        before = Before(
            canvas_in, mx.array(accepted)[None], mx.array(np.stack(history).astype(np.int32))[None]
        )
        numbers = self.sides.draws.step(index, 0, number, index * length, length)
        ends = mx.array(list(model.config.generation.eos_token_ids))
        u = numbers.u[None]
        renoise = numbers.renoise[None]
        out = policy.sample([policy], [number], [length], logits, u, renoise, before, ends)
        return Outcome(
            np.array(out.argmax[0]),
            np.array(out.accepted[0]),
            np.array(out.canvas[0]),
            bool(out.flags[0, Flag.STOP].item()),
        )


def _outcome(step: CanvasStep) -> Outcome:
    return Outcome(
        np.array(step.argmax),
        np.array(step.accepted),
        np.array(step.canvas),
        step.reason == "converged",
    )
