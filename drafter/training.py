"""Train a drafter on its target's rollouts: cross-entropy on the committed tokens, and a confidence
for each guess.

An example is a block of a logged canvas, after the target's hidden states of everything before it.
There are two kinds, one for each use of the drafter.  The first is a whole canvas, whose tokens are
replaced by noise to a random degree, or as one of the target's own steps left them.  The second is
a block of noise after a known token anywhere in the text.  Half of the canvases get the drafter's
own first guess as self-conditioning.  Others, for refinement between the target's steps, get the
target's hidden states of the canvas one step before.  Positions after the end of the text have a
small weight.

Every random number depends on the seed and the iteration alone, so an interrupted run continues as
if it had not been interrupted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
from mlx.utils import tree_flatten

from drafter.drafter import Drafter
from drafter.head import TargetHead
from drafter.trajectories import Trajectory
from mlx_diffgemma.checkpoint.fingerprint import fingerprint
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.model.attention import Segment
from mlx_diffgemma.model.cache import Cache
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.tuning.state import read_state, write_state

# The uses of random streams.
ORDER = 0
TRAIN = 1
VALID = 2


@dataclass(frozen=True)
class DraftTrainingOptions:
    """The options of a training run.

    The optimiser is AdamW.  Its numbers are those of DFlash, arXiv 2602.06036.

    Attributes:
        iters: How many batches.
        batch_size: The blocks of a batch.
        learning_rate: Reached after 4 % of the batches; it falls to a tenth at the end.
        canvases: The share of blocks that are whole canvases.
        pure: The share of canvases that are all noise.
        logged: The share of canvases as a step of the target left them.
        refined: The share of canvases with the target's hidden states of the step before.
        self_conditioning: The share of canvases with the drafter's own first guess.
        tail_weight: The weight of a position after the end of the text.
        confidence_weight: The weight of the confidence's loss.
        steps_per_report: Batches between two reports.
        steps_per_eval: Batches between two validations.
        seed: The seed of all random numbers.
    """

    iters: int = 3000
    batch_size: int = 32
    learning_rate: float = 1e-3
    canvases: float = 0.75
    pure: float = 0.3
    logged: float = 0.2
    refined: float = 0.25
    self_conditioning: float = 0.5
    tail_weight: float = 0.05
    confidence_weight: float = 0.2
    steps_per_report: int = 50
    steps_per_eval: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("iters", "batch_size", "steps_per_report", "steps_per_eval"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not self.learning_rate > 0:
            raise UserError(f"learning_rate must be above 0, got {self.learning_rate}.")
        shares = (self.pure, self.logged, self.refined)
        if not 0 <= self.canvases <= 1 or min(shares) < 0 or sum(shares) > 1:
            raise UserError(
                "canvases, pure, logged and refined are shares between 0 and 1, the last three of at most 1 together."
            )


@dataclass(frozen=True)
class Block:
    """One example.

    Attributes:
        prefix: The ids before the block.
        ids: The ids [rows] that the drafter starts from.
        wanted: The ids [rows] that it should find.
        weights: The weights [rows] of the loss.
        known: How many of the first ids are given.
        conditioned: The drafter gets its own first guess.
        seen: The canvas that the target denoised just before.  None: the drafter does not see it.
    """

    prefix: np.ndarray
    ids: np.ndarray
    wanted: np.ndarray
    weights: np.ndarray
    known: int
    conditioned: bool
    seen: np.ndarray | None = None


class Features(NamedTuple):
    """The target's hidden states [rows, hidden], by layer.

    ``before`` holds those before each block; ``seen`` those of all canvases with ``Block.seen``,
    one after the other.
    """

    before: list[dict[int, mx.array]]
    seen: dict[int, mx.array]


@dataclass
class DraftReport:
    """Means since the last report, or over a validation.

    Attributes:
        iteration: The batches so far.
        loss: The cross-entropy in nats.
        confidence_loss: The loss of the confidences in nats.
        canvas_right: On canvases, the share of unknown tokens, up to the end of the text, guessed
            right.
        block_right: The same share in blocks after a known token.
        valid: Whether this is a validation.
    """

    iteration: int
    loss: float
    confidence_loss: float
    canvas_right: float
    block_right: float
    valid: bool = False


@dataclass
class DraftTrainer:
    """One training run.  It trains the drafter's own parameters only."""

    drafter: Drafter
    target: DiffusionGemma
    train: Sequence[Trajectory]
    valid: Sequence[Trajectory]
    options: DraftTrainingOptions
    iteration: int = 0
    reports: list[DraftReport] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.train:
            raise UserError("There is nothing to train on; log some trajectories first.")
        options = self.options
        warmup = max(1, self.options.iters // 25)
        rate = optimizers.join_schedules(
            [
                optimizers.linear_schedule(0.0, options.learning_rate, warmup),
                optimizers.cosine_decay(
                    options.learning_rate,
                    max(1, options.iters - warmup),
                    options.learning_rate / 10,
                ),
            ],
            [warmup],
        )
        self.optimizer = optimizers.AdamW(
            learning_rate=rate, betas=[0.9, 0.95], weight_decay=0.0, bias_correction=True
        )
        if self.drafter.config.head_size:
            self.drafter.freeze(keys=["head_ids"], recurse=False)
        self.head = TargetHead(self.target, self.drafter)
        self.ends = self.target.config.generation.eos_token_ids
        places = np.full(self.target.config.text.vocab_size, -1, dtype=np.int32)
        drafted = np.arange(places.size) if self.head.ids is None else np.array(self.head.ids)
        places[drafted] = np.arange(drafted.size)
        self.places = mx.array(places)  # each token's index in the drafter's head, or -1
        self.optimizer.init(self.drafter.trainable_parameters())

    def run(
        self, on_report: Callable[[DraftReport], None] | None = None, state: Path | None = None
    ) -> None:
        """Train from the present iteration to the last.

        Args:
            on_report: Called with each report.
            state: The file for the state, written at every validation and at the end.
        """
        value_and_grad = nn.value_and_grad(self.drafter, self._loss)
        found: list[dict[str, float]] = []

        def tell(report: DraftReport) -> None:
            self.reports.append(report)
            if on_report:
                on_report(report)

        self.drafter.train()
        while self.iteration < self.options.iters:
            blocks = self.blocks(self.iteration)
            features = self.features(blocks)
            (_, figures), gradients = value_and_grad(self.drafter, blocks, features)
            gradients, _ = optimizers.clip_grad_norm(gradients, 1.0)
            self.optimizer.update(self.drafter, gradients)
            mx.eval(self.drafter.trainable_parameters(), self.optimizer.state, figures)
            found.append({name: value.item() for name, value in figures.items()})
            self.iteration += 1
            last = self.iteration == self.options.iters
            if last or self.iteration % self.options.steps_per_report == 0:
                tell(_report(self.iteration, found))
                found = []
            if last or self.iteration % self.options.steps_per_eval == 0:
                if self.valid:
                    tell(self.validate())
                if state:
                    self.save(state)
        self.drafter.eval()

    def validate(self) -> DraftReport:
        """Measure all of ``valid``, under the same noise each time."""
        self.drafter.eval()
        found = []
        size = self.options.batch_size
        for number, first in enumerate(range(0, len(self.valid), size)):
            rng = np.random.default_rng([self.options.seed, VALID, number])
            blocks = [self._block(t, rng) for t in self.valid[first : first + size]]
            _, figures = self._loss(self.drafter, blocks, self.features(blocks))
            found.append({name: value.item() for name, value in figures.items()})
        self.drafter.train()
        return _report(self.iteration, found, valid=True)

    def blocks(self, iteration: int) -> list[Block]:
        """The batch of an iteration.  Every epoch is a permutation; a batch may span two epochs."""
        size = self.options.batch_size
        count = len(self.train)
        rng = np.random.default_rng([self.options.seed, TRAIN, iteration])
        chosen = []
        for place in range(iteration * size, (iteration + 1) * size):
            epoch, index = divmod(place, count)
            if getattr(self, "_epoch", None) != epoch:
                self._epoch = epoch
                self._order = np.random.default_rng([self.options.seed, ORDER, epoch]).permutation(
                    count
                )
            chosen.append(self.train[self._order[index]])
        return [self._block(trajectory, rng) for trajectory in chosen]

    def _block(self, t: Trajectory, rng: np.random.Generator) -> Block:
        options = self.options
        vocabulary = self.target.config.text.vocab_size
        length = t.committed.size
        found = np.flatnonzero(np.isin(t.committed, self.ends))
        end = int(found[0]) + 1 if found.size else length  # the text, its end token included
        weights = np.where(np.arange(length) < end, 1.0, options.tail_weight).astype(np.float32)
        noise = rng.integers(0, vocabulary, length).astype(np.int32)
        kind = rng.random()
        degree = rng.random(length) < rng.random()
        conditioned = rng.random() < options.self_conditioning
        if rng.random() >= options.canvases:
            start = int(rng.integers(0, max(1, end - 1)))
            stop = min(length, start + self.drafter.config.block_size)
            ids = np.concatenate((t.committed[start : start + 1], noise[start + 1 : stop]))
            prefix = np.concatenate((t.prefix, t.committed[:start]))
            return Block(prefix, ids, t.committed[start:stop], weights[start:stop], 1, False)
        ids = np.where(degree, noise, t.committed)
        seen = None
        if kind < options.pure:
            ids = noise
        elif kind < options.pure + options.logged + options.refined and len(t.states):
            # -1 in a state stands for noise that was not logged.
            left = [np.where(state < 0, noise, state) for state in t.states]
            place = int(rng.integers(len(left)))
            ids = left[place]
            if kind >= options.pure + options.logged and self.drafter.config.refinement:
                conditioned = False
                before = left[place - 1] if place else rng.integers(0, vocabulary, length)
                seen = before.astype(np.int32)
        conditioned = conditioned and self.drafter.config.self_conditioning
        return Block(t.prefix, ids, t.committed, weights, 0, conditioned, seen)

    def features(self, blocks: Sequence[Block]) -> Features:
        """Compute the target's hidden states before each block, and on the canvases it denoised."""
        caches = [Cache(self.target.config.text) for _ in blocks]
        layers = self.drafter.config.taps
        taps = self.target.encode([mx.array(b.prefix) for b in blocks], caches, taps=layers).taps
        before = [
            {layer: states[row] for layer, states in taps.items()} for row in range(len(blocks))
        ]
        rows = [row for row, block in enumerate(blocks) if block.seen is not None]
        canvases = [mx.array(block.seen) for block in blocks if block.seen is not None]
        seen = (
            self.target.denoise(
                mx.concatenate(canvases),
                [caches[row] for row in rows],
                taps=layers,
                lengths=[canvas.size for canvas in canvases],
            ).taps
            if rows
            else {}
        )
        mx.eval(list(taps.values()), list(seen.values()))
        return Features(before, seen)

    def _loss(
        self, drafter: Drafter, blocks: Sequence[Block], features: Features
    ) -> tuple[mx.array, dict[str, mx.array]]:
        caches = [Cache(drafter.config, keep_all=True) for _ in blocks]
        drafter.append_features([drafter.features(own) for own in features.before], caches)
        segments = []
        start = 0
        for block, cache in zip(blocks, caches, strict=True):
            segments.append(Segment(start, start + block.ids.size, cache, canvas=True))
            start += block.ids.size
        x = self.head.embed(mx.array(np.concatenate([b.ids for b in blocks])))
        if drafter.config.self_conditioning:
            conditioned = np.repeat([b.conditioned for b in blocks], [b.ids.size for b in blocks])
            belief = mx.stop_gradient(
                self.head.mean_embedding(self.head.logits(drafter(x, segments)))
            )
            x = mx.where(mx.array(conditioned)[:, None], drafter.condition(x, belief), x)
        if features.seen:
            rows = np.flatnonzero(
                np.repeat([b.seen is not None for b in blocks], [b.ids.size for b in blocks])
            )
            x[mx.array(rows)] = drafter.refine(x[mx.array(rows)], features.seen)
        hidden = drafter(x, segments)
        logits = self.head.logits(hidden)
        wanted = np.concatenate([b.wanted for b in blocks])
        labels = self.places[mx.array(wanted)]
        weights = mx.array(
            np.concatenate(
                [np.where(np.arange(b.ids.size) < b.known, 0.0, b.weights) for b in blocks]
            ).astype(np.float32)
        )
        drafted = weights * (labels >= 0)
        losses = nn.losses.cross_entropy(logits, mx.maximum(labels, 0))
        loss = (losses * drafted).sum() / mx.maximum(drafted.sum(), 1e-6)
        right = (mx.argmax(logits, axis=-1) == labels).astype(mx.float32)
        confidence = mx.zeros(())
        if drafter.config.confidence:
            surely = drafter.confidence(mx.stop_gradient(hidden))[:, 0].astype(mx.float32)
            losses = nn.losses.binary_cross_entropy(
                surely, mx.stop_gradient(right), with_logits=True, reduction="none"
            )
            confidence = (losses * weights).sum() / weights.sum()
        text = (weights == 1).astype(mx.float32)
        is_canvas = np.repeat([b.known == 0 for b in blocks], [b.ids.size for b in blocks])
        canvas = mx.array(is_canvas.astype(np.float32))
        shares = {
            name: ((right * text * kind).sum(), (text * kind).sum())
            for name, kind in (("canvas", canvas), ("block", 1 - canvas))
        }
        figures = {"loss": loss, "confidence_loss": confidence}
        for name, (count, total) in shares.items():
            figures |= {f"{name}_right": count, f"{name}_tokens": total}
        return loss + self.options.confidence_weight * confidence, figures

    def save(self, path: Path) -> None:
        """Write weights, the optimiser's state and the counters to one file, atomically."""
        counters = {
            "iteration": self.iteration,
            "reports": [vars(report) for report in self.reports],
        }
        write_state(
            path,
            tree_flatten(self.drafter.parameters()),
            self.optimizer,
            self.fingerprint(),
            counters,
        )

    def restore(self, path: Path) -> None:
        """Continue from the state in ``path``.

        Raises:
            UserError: The file is damaged, or belongs to another run.
        """
        counters, _ = read_state(path, self.drafter, self.optimizer, self.fingerprint())
        self.iteration = counters["iteration"]
        self.reports = [DraftReport(**report) for report in counters["reports"]]

    def fingerprint(self) -> dict[str, Any]:
        """The values that decide the result, by name."""
        options = {
            name: value
            for name, value in asdict(self.options).items()
            if not name.startswith("steps_per")
        }
        return {
            **options,
            "shape": self.drafter.config.to_dict(),
            "data": _digest(self.train),
            "target": fingerprint(self.target),
        }


def _digest(trajectories: Sequence[Trajectory]) -> str:
    found = hashlib.sha256()
    for trajectory in trajectories:
        found.update(f"{trajectory.prompt} {trajectory.states.shape} ".encode())
        for part in (trajectory.prefix, trajectory.committed, trajectory.states):
            found.update(np.ascontiguousarray(part).tobytes())
    return found.hexdigest()


def _report(iteration: int, found: Sequence[dict[str, float]], valid: bool = False) -> DraftReport:
    sums = {name: sum(figures[name] for figures in found) for name in found[0]}
    return DraftReport(
        iteration,
        sums["loss"] / len(found),
        sums["confidence_loss"] / len(found),
        sums["canvas_right"] / max(1.0, sums["canvas_tokens"]),
        sums["block_right"] / max(1.0, sums["block_tokens"]),
        valid,
    )


def frequent_tokens(trajectories: Sequence[Trajectory], count: int, vocabulary: int) -> np.ndarray:
    """The ``count`` tokens that were committed most often, as int32 in ascending order."""
    counts = np.bincount(np.concatenate([t.committed for t in trajectories]), minlength=vocabulary)
    return np.sort(np.argsort(-counts, kind="stable")[:count]).astype(np.int32)
