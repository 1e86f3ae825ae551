"""The training loop: batches, steps, validation on fixed noise, and checkpoints.

A killed run continues from its checkpoint bit for bit.  Every random number depends on the seed and
the iteration alone, so a checkpoint need not hold the state of a generator.  On a GPU two runs
agree up to rounding only: the gradients of gathers are atomic additions there, in no fixed order.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_map_with_path, tree_unflatten

from mlx_diffgemma.errors import UserError
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.tuning.data import Example
from mlx_diffgemma.tuning.objective import Batch, Losses, Objective, losses, make_batch
from mlx_diffgemma.tuning.state import read_state, write_state

# The uses of random streams.
ORDER = 0
TRAIN = 1
VALID = 2


@dataclass(frozen=True)
class TrainingOptions:
    """The options of the training loop.

    Attributes:
        iters: How many batches.
        batch_size: The examples of a batch.
        grad_accumulation_steps: The batches that make one step of the optimiser.
        canvas_length: The positions of a canvas.  None: as in the checkpoint.
        max_grad_norm: Gradients are clipped to this norm; 0 does not clip.
        grad_checkpoint: Compute layers twice and keep less for the gradient.
        val_batches: The batches of a validation; -1 means all, 0 means no validation.
        steps_per_report: Batches between two reports.
        steps_per_eval: Batches between two validations.
        save_every: Batches between two checkpoints; the last one is written at the end.
        seed: The seed of all random numbers.
    """

    iters: int = 1000
    batch_size: int = 4
    grad_accumulation_steps: int = 1
    canvas_length: int | None = None
    max_grad_norm: float = 1.0
    grad_checkpoint: bool = False
    val_batches: int = 25
    steps_per_report: int = 10
    steps_per_eval: int = 200
    save_every: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (
            "iters",
            "batch_size",
            "grad_accumulation_steps",
            "steps_per_report",
            "steps_per_eval",
            "save_every",
        ):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.canvas_length is not None and self.canvas_length < 1:
            raise UserError(f"canvas_length must be at least 1, got {self.canvas_length}.")
        if self.val_batches < -1:
            raise UserError(
                f"val_batches must be -1 (all), 0 (no validation) or more, got {self.val_batches}."
            )
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed must be a whole number from 0 to 2**32 - 1, got {self.seed}.")
        if not self.max_grad_norm >= 0:
            raise UserError(f"max_grad_norm must be 0 (off) or more, got {self.max_grad_norm}.")


@dataclass
class Report:
    """Figures at an iteration.

    The losses are means in nats since the last report, or over a validation.  ``seconds`` counts
    from the start of the run.
    """

    iteration: int
    canvas: float
    causal: float
    total: float
    learning_rate: float
    tokens: int
    tokens_per_second: float
    peak_memory: int
    seconds: float
    valid: bool = False


@dataclass
class Trainer:
    """One run, which trains the trainable parameters of the model."""

    model: DiffusionGemma
    train: Sequence[Example]
    valid: Sequence[Example]
    objective: Objective
    options: TrainingOptions
    optimizer: optimizers.Optimizer
    iteration: int = 0
    tokens: int = 0
    reports: list[Report] = field(default_factory=list)
    identity: Mapping[str, Any] = field(
        default_factory=dict
    )  # what else decides the result, by the names of options
    gradients: Any = None  # the sum since the optimiser's last step

    def __post_init__(self) -> None:
        if not self.train:
            raise UserError(
                "There is nothing to train on; give a train.jsonl with at least one example."
            )
        if not tree_flatten(self.model.trainable_parameters()):
            raise UserError("Nothing of the model is trainable with these options.")
        if not self.options.val_batches:
            self.valid = ()
        self.length = self.options.canvas_length or self.model.config.canvas_length
        self.end = self.model.config.generation.eos_token_ids[0]
        self.optimizer.init(self.model.trainable_parameters())

    def run(
        self,
        on_report: Callable[[Report], None] | None = None,
        on_save: Callable[[], None] | None = None,
    ) -> None:
        """Train from the present iteration to the last.

        Args:
            on_report: Called with each report.
            on_save: Called when a checkpoint is due.
        """
        options = self.options
        began = time.perf_counter()
        sums = _Sums()
        value_and_grad = nn.value_and_grad(self.model, self._loss)
        self._check_closed()
        self.model.train()
        mx.reset_peak_memory()

        def tell(report: Report) -> None:
            self.reports.append(report)
            if on_report:
                on_report(report)

        while self.iteration < options.iters:
            if self.valid and self.iteration % options.steps_per_eval == 0:
                tell(self.validate(began))
            batch = self.batch(self.iteration)
            mx.random.seed(self.options.seed * 1_000_003 + self.iteration)  # for dropout
            (_, found), gradient = value_and_grad(self.model, batch)
            self.gradients = self._accumulated(gradient)
            self.iteration += 1
            if (
                self.iteration % options.grad_accumulation_steps == 0
                or self.iteration == options.iters
            ):
                self._update(self.gradients)
                self.gradients = None
            mx.eval(
                self.model.trainable_parameters(),
                self.optimizer.state,
                self.gradients,
                found.canvas,
                found.causal,
            )
            sums.add(found, batch)
            if self.iteration % options.steps_per_report == 0 or self.iteration == options.iters:
                tell(self._report(sums, began))
                sums = _Sums()
            if on_save and (
                self.iteration % options.save_every == 0 or self.iteration == options.iters
            ):
                on_save()
        if self.valid:
            tell(self.validate(began))
        self.model.eval()

    def _check_closed(self) -> None:
        """Check that the run did not end between two steps of the optimiser.

        Raises:
            UserError: It did, and has more iterations to run: a run with that many would not have
                stepped there.
        """
        count = self.options.grad_accumulation_steps
        if (
            self.gradients is None
            and self.iteration % count
            and self.iteration < self.options.iters
        ):
            raise UserError(
                f"The run ended at iteration {self.iteration}, in the middle of {count} batches that make one step, "
                "and cannot go on bit for bit; begin it again in another folder."
            )

    def _loss(self, model: DiffusionGemma, batch: Batch) -> tuple[mx.array, Losses]:
        found = losses(model, batch, self.objective, self.options.grad_checkpoint)
        return found.total(self.objective), found

    def _accumulated(self, gradient: Any) -> Any:
        if self.gradients is None:
            return gradient
        held = dict(tree_flatten(self.gradients))  # those of a checkpoint have no empty branches
        return tree_map_with_path(lambda name, g: held[name] + g, gradient)

    def _update(self, gradients: Any) -> None:
        count = self.options.grad_accumulation_steps
        if count > 1:
            gradients = tree_map(lambda g: g / count, gradients)
        if self.options.max_grad_norm:
            gradients, _ = optimizers.clip_grad_norm(gradients, self.options.max_grad_norm)
        self.optimizer.update(self.model, gradients)

    def batch(self, iteration: int) -> Batch:
        """The batch of an iteration.

        Every epoch is a permutation of the examples.  A batch may span the end of one and the start
        of the next.
        """
        size = self.options.batch_size
        count = len(self.train)
        chosen = []
        for place in range(iteration * size, (iteration + 1) * size):
            epoch, index = divmod(place, count)
            chosen.append(self.train[self._order(epoch)[index]])
        return self._make(chosen, self._rng(TRAIN, iteration))

    def _order(self, epoch: int) -> np.ndarray:
        if getattr(self, "_epoch", None) != epoch:
            self._epoch, self._permutation = (
                epoch,
                self._rng(ORDER, epoch).permutation(len(self.train)),
            )
        return self._permutation

    def _rng(self, purpose: int, number: int) -> np.random.Generator:
        return np.random.default_rng([self.options.seed, purpose, number])

    def _make(self, examples: Sequence[Example], rng: np.random.Generator) -> Batch:
        return make_batch(
            [e.ids for e in examples],
            [e.answer for e in examples],
            self.length,
            self.model.config.text.vocab_size,
            self.end,
            self.objective,
            rng,
        )

    def validation_batches(self) -> Iterator[Batch]:
        """The same examples under the same noise each time, so that figures can be compared."""
        size = self.options.batch_size
        pieces = [self.valid[start : start + size] for start in range(0, len(self.valid), size)]
        for number, piece in enumerate(
            pieces if self.options.val_batches < 0 else pieces[: self.options.val_batches]
        ):
            yield self._make(piece, self._rng(VALID, number))

    def validate(self, began: float) -> Report:
        self.model.eval()
        sums = _Sums()
        for batch in self.validation_batches():
            _, found = self._loss(self.model, batch)
            mx.eval(found.canvas, found.causal)
            sums.add(found, batch)
        self.model.train()
        return self._report(sums, began, valid=True)

    def _report(self, sums: _Sums, began: float, valid: bool = False) -> Report:
        canvas = sums.canvas / max(1, sums.canvas_tokens)
        causal = sums.causal / max(1, sums.causal_tokens)
        if not valid:
            self.tokens += sums.tokens
        return Report(
            self.iteration,
            canvas,
            causal,
            self.objective.canvas * canvas + self.objective.causal * causal,
            float(self.optimizer.learning_rate),
            self.tokens,
            sums.tokens / (time.perf_counter() - sums.began),
            mx.get_peak_memory(),
            time.perf_counter() - began,
            valid,
        )

    def save(self, path: Path) -> None:
        """Write the trained weights, the optimiser's state and the counters to one file,
        atomically.
        """
        counters = {
            "iteration": self.iteration,
            "tokens": self.tokens,
            "reports": [vars(report) for report in self.reports],
        }
        write_state(
            path,
            tree_flatten(self.model.trainable_parameters()),
            self.optimizer,
            self.fingerprint(),
            counters,
            tree_flatten(self.gradients) if self.gradients is not None else (),
        )

    def restore(self, path: Path) -> None:
        """Continue from the state in ``path``.

        Raises:
            UserError: The file is damaged, or belongs to another run.
        """
        counters, gradients = read_state(path, self.model, self.optimizer, self.fingerprint())
        self.gradients = tree_unflatten(gradients) if gradients else None
        self.iteration = counters["iteration"]
        self.tokens = counters["tokens"]
        self.reports = [Report(**report) for report in counters["reports"]]

    def fingerprint(self) -> dict[str, Any]:
        """The values that decide the result, by name, except the number of iterations."""
        options = {
            name: value
            for name, value in vars(self.options).items()
            if name
            not in (
                "iters",
                "save_every",
                "steps_per_report",
                "steps_per_eval",
                "val_batches",
                "grad_checkpoint",
            )
        }
        shapes = [
            (name, value.shape) for name, value in tree_flatten(self.model.trainable_parameters())
        ]
        return {
            **options,
            **vars(self.objective),
            **self.identity,
            "optimizer": type(self.optimizer).__name__,
            "data": examples_digest(self.train),
            "trained weights": len(shapes),
            "trained numbers": sum(math.prod(shape) for _, shape in shapes),
        }


def examples_digest(examples: Sequence[Example]) -> str:
    """Digest of all tokens in order, and of where the answers begin."""
    found = hashlib.sha256()
    for example in examples:
        found.update(f"{example.ids.size} {example.answer} ".encode())
        found.update(np.ascontiguousarray(example.ids, dtype=np.int32).tobytes())
    return found.hexdigest()


class _Sums:
    """The losses of several batches, weighted by their numbers of tokens."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.canvas = self.causal = 0.0
        self.canvas_tokens = self.causal_tokens = self.tokens = 0

    def add(self, found: Losses, batch: Batch) -> None:
        self.canvas += found.canvas.item() * found.canvas_tokens
        self.causal += found.causal.item() * found.causal_tokens
        self.canvas_tokens += found.canvas_tokens
        self.causal_tokens += found.causal_tokens
        self.tokens += batch.clean.size + sum(ids.size for ids in batch.sequences)
