"""Training a drafter on what its target did: cross-entropy on the committed tokens, and a confidence for each guess.

An example is a block of a logged canvas behind what the target's causal mode made of everything before it.  Two kinds take turns,
one for each use of the drafter: a whole canvas from the start on, its tokens replaced by noise to a random degree or as one of the
target's own steps had left them; and a block behind a known token anywhere in the text, all noise.  Half of the canvases get the
drafter's own first guess as self-conditioning; others, for refinement between the target's steps, what one of those made of the
canvas before.  Positions after the end of the text count little.

Every random number depends on the seed and the iteration alone, so a killed run goes on as if it had not been.
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

from drafter.model import Borrowed, Drafter
from drafter.trajectories import Trajectory
from mlx_diffgemma.cache import Cache
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.model import DiffusionGemma, Segment
from mlx_diffgemma.tuning.adapters import model_fingerprint
from mlx_diffgemma.tuning.state import read_state, write_state

ORDER, TRAIN, VALID = 0, 1, 2  # what a random stream is for


@dataclass(frozen=True)
class DraftTrainingOptions:
    """``iters`` batches of ``batch_size`` blocks under AdamW, whose rate rises to ``learning_rate`` over 4 % of them and falls to a
    tenth of it.  ``pure`` is the share of canvases that are noise altogether, ``logged`` that of those the target had left so,
    ``refined`` that of those behind one of its steps; ``tail_weight`` the weight of a position after the end of the text,
    ``confidence_weight`` that of the confidence's loss.

    Source of the optimiser's numbers: DFlash, arXiv 2602.06036.
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
            raise UserError("canvases, pure, logged and refined are shares between 0 and 1, the last three of at most 1 together.")


@dataclass(frozen=True)
class Block:
    """``ids`` the drafter starts from and the ``wanted`` ones it should find, [rows] each, of which the first ``known`` are given;
    ``prefix`` are the ids before, ``weights`` [rows] those of the loss.  ``conditioned``: it gets its own first guess.  ``seen`` is
    the canvas that the target denoised just before, if it is to know of that."""

    prefix: np.ndarray
    ids: np.ndarray
    wanted: np.ndarray
    weights: np.ndarray
    known: int
    conditioned: bool
    seen: np.ndarray | None = None


class Features(NamedTuple):
    """The taps [rows, hidden] of what comes before each block, and those of all canvases that the target has ``seen``, which
    follow each other."""

    before: list[dict[int, mx.array]]
    seen: dict[int, mx.array]


@dataclass
class DraftReport:
    """Means since the last report, or of a validation: losses in nats, and the share of unknown tokens up to the end of the text
    that were guessed right, on canvases of pure noise or begun, and in blocks behind a known token."""

    iteration: int
    loss: float
    confidence_loss: float
    canvas_right: float
    block_right: float
    valid: bool = False


@dataclass
class DraftTrainer:
    """One run; only the drafter's own parameters are trained."""

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
        options, warmup = self.options, max(1, self.options.iters // 25)
        rate = optimizers.join_schedules(
            [optimizers.linear_schedule(0.0, options.learning_rate, warmup),
             optimizers.cosine_decay(options.learning_rate, max(1, options.iters - warmup), options.learning_rate / 10)], [warmup])
        self.optimizer = optimizers.AdamW(learning_rate=rate, betas=[0.9, 0.95], weight_decay=0.0, bias_correction=True)
        if self.drafter.config.head_size:
            self.drafter.freeze(keys=["head_ids"], recurse=False)
        self.borrowed = Borrowed(self.target, self.drafter)
        self.ends = self.target.config.generation.eos_token_ids
        places = np.full(self.target.config.text.vocab_size, -1, dtype=np.int32)
        drafted = np.arange(places.size) if self.borrowed.ids is None else np.array(self.borrowed.ids)
        places[drafted] = np.arange(drafted.size)
        self.places = mx.array(places)  # of each token in the drafter's head, -1 where it has none
        self.optimizer.init(self.drafter.trainable_parameters())

    def run(self, on_report: Callable[[DraftReport], None] | None = None, state: Path | None = None) -> None:
        """From the present iteration to the last; ``state`` is written at every validation and at the end."""
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
        """Over all of ``valid``, under the same noise each time."""
        self.drafter.eval()
        found, size = [], self.options.batch_size
        for number, first in enumerate(range(0, len(self.valid), size)):
            rng = np.random.default_rng([self.options.seed, VALID, number])
            blocks = [self._block(t, rng) for t in self.valid[first : first + size]]
            _, figures = self._loss(self.drafter, blocks, self.features(blocks))
            found.append({name: value.item() for name, value in figures.items()})
        self.drafter.train()
        return _report(self.iteration, found, valid=True)

    def blocks(self, iteration: int) -> list[Block]:
        """The batch of an iteration: epochs are permutations of the trajectories, without a seam."""
        size, count = self.options.batch_size, len(self.train)
        rng, chosen = np.random.default_rng([self.options.seed, TRAIN, iteration]), []
        for place in range(iteration * size, (iteration + 1) * size):
            epoch, index = divmod(place, count)
            if getattr(self, "_epoch", None) != epoch:
                self._epoch = epoch
                self._order = np.random.default_rng([self.options.seed, ORDER, epoch]).permutation(count)
            chosen.append(self.train[self._order[index]])
        return [self._block(trajectory, rng) for trajectory in chosen]

    def _block(self, t: Trajectory, rng: np.random.Generator) -> Block:
        options, vocabulary, length = self.options, self.target.config.text.vocab_size, t.committed.size
        found = np.flatnonzero(np.isin(t.committed, self.ends))
        end = int(found[0]) + 1 if found.size else length  # the text, its end token included
        weights = np.where(np.arange(length) < end, 1.0, options.tail_weight).astype(np.float32)
        noise = rng.integers(0, vocabulary, length).astype(np.int32)
        kind, degree, conditioned = rng.random(), rng.random(length) < rng.random(), rng.random() < options.self_conditioning
        if rng.random() >= options.canvases:
            start = int(rng.integers(0, max(1, end - 1)))
            stop = min(length, start + self.drafter.config.block_size)
            ids = np.concatenate((t.committed[start : start + 1], noise[start + 1 : stop]))
            prefix = np.concatenate((t.prefix, t.committed[:start]))
            return Block(prefix, ids, t.committed[start:stop], weights[start:stop], 1, False)
        ids, seen = np.where(degree, noise, t.committed), None
        if kind < options.pure:
            ids = noise
        elif kind < options.pure + options.logged + options.refined and len(t.states):
            # A state holds -1 where the canvas had noise that was not written down.
            left = [np.where(state < 0, noise, state) for state in t.states]
            place = int(rng.integers(len(left)))
            ids = left[place]
            if kind >= options.pure + options.logged and self.drafter.config.refinement:
                seen, conditioned = left[place - 1] if place else rng.integers(0, vocabulary, length).astype(np.int32), False
        conditioned = conditioned and self.drafter.config.self_conditioning
        return Block(t.prefix, ids, t.committed, weights, 0, conditioned, seen)

    def features(self, blocks: Sequence[Block]) -> Features:
        """The target's hidden states before each block, and on the canvases it denoised."""
        caches, layers = [Cache(self.target.config.text) for _ in blocks], self.drafter.config.taps
        taps = self.target.encode([mx.array(b.prefix) for b in blocks], caches, taps=layers).taps
        before = [{layer: states[row] for layer, states in taps.items()} for row in range(len(blocks))]
        rows = [row for row, block in enumerate(blocks) if block.seen is not None]
        canvases = [mx.array(block.seen) for block in blocks if block.seen is not None]
        seen = self.target.denoise(mx.concatenate(canvases), [caches[row] for row in rows], taps=layers,
                                   lengths=[canvas.size for canvas in canvases]).taps if rows else {}
        mx.eval(list(taps.values()), list(seen.values()))
        return Features(before, seen)

    def _loss(self, drafter: Drafter, blocks: Sequence[Block], features: Features) -> tuple[mx.array, dict[str, mx.array]]:
        caches = [Cache(drafter.config, keep_all=True) for _ in blocks]
        drafter.absorb([drafter.features(own) for own in features.before], caches)
        segments, start = [], 0
        for block, cache in zip(blocks, caches, strict=True):
            segments.append(Segment(start, start + block.ids.size, cache, canvas=True))
            start += block.ids.size
        x = self.borrowed.embed(mx.array(np.concatenate([b.ids for b in blocks])))
        if drafter.config.self_conditioning:
            conditioned = np.repeat([b.conditioned for b in blocks], [b.ids.size for b in blocks])
            belief = mx.stop_gradient(self.borrowed.belief(self.borrowed.logits(drafter(x, segments))))
            x = mx.where(mx.array(conditioned)[:, None], drafter.condition(x, belief), x)
        if features.seen:
            rows = np.flatnonzero(np.repeat([b.seen is not None for b in blocks], [b.ids.size for b in blocks]))
            x[mx.array(rows)] = drafter.refine(x[mx.array(rows)], features.seen)
        hidden = drafter(x, segments)
        logits = self.borrowed.logits(hidden)
        wanted = np.concatenate([b.wanted for b in blocks])
        labels = self.places[mx.array(wanted)]
        weights = mx.array(np.concatenate([np.where(np.arange(b.ids.size) < b.known, 0.0, b.weights) for b in blocks])
                           .astype(np.float32))
        drafted = weights * (labels >= 0)
        losses = nn.losses.cross_entropy(logits, mx.maximum(labels, 0))
        loss = (losses * drafted).sum() / mx.maximum(drafted.sum(), 1e-6)
        right = (mx.argmax(logits, axis=-1) == labels).astype(mx.float32)
        confidence = mx.zeros(())
        if drafter.config.confidence:
            surely = drafter.confidence(mx.stop_gradient(hidden))[:, 0].astype(mx.float32)
            losses = nn.losses.binary_cross_entropy(surely, mx.stop_gradient(right), with_logits=True, reduction="none")
            confidence = (losses * weights).sum() / weights.sum()
        text, canvas = (weights == 1).astype(mx.float32), mx.array(np.repeat([b.known == 0 for b in blocks],
                                                                             [b.ids.size for b in blocks]).astype(np.float32))
        shares = {name: ((right * text * kind).sum(), (text * kind).sum()) for name, kind in (("canvas", canvas),
                                                                                             ("block", 1 - canvas))}
        figures = {"loss": loss, "confidence_loss": confidence}
        for name, (count, total) in shares.items():
            figures |= {f"{name}_right": count, f"{name}_tokens": total}
        return loss + self.options.confidence_weight * confidence, figures

    def save(self, path: Path) -> None:
        """Weights, the optimiser's state and the counters in one file, put in place at once."""
        counters = {"iteration": self.iteration, "reports": [vars(report) for report in self.reports]}
        write_state(path, tree_flatten(self.drafter.parameters()), self.optimizer, self.fingerprint(), counters)

    def restore(self, path: Path) -> None:
        """Go on from ``path``.  Errors: UserError for a damaged file or that of another run."""
        counters, _ = read_state(path, self.drafter, self.optimizer, self.fingerprint())
        self.iteration, self.reports = counters["iteration"], [DraftReport(**report) for report in counters["reports"]]

    def fingerprint(self) -> dict[str, Any]:
        """What decides the result, by name."""
        options = {name: value for name, value in asdict(self.options).items() if not name.startswith("steps_per")}
        return {**options, "shape": self.drafter.config.to_dict(), "data": _digest(self.train),
                "target": model_fingerprint(self.target)}


def _digest(trajectories: Sequence[Trajectory]) -> str:
    found = hashlib.sha256()
    for trajectory in trajectories:
        found.update(f"{trajectory.prompt} {trajectory.states.shape} ".encode())
        for part in (trajectory.prefix, trajectory.committed, trajectory.states):
            found.update(np.ascontiguousarray(part).tobytes())
    return found.hexdigest()


def _report(iteration: int, found: Sequence[dict[str, float]], valid: bool = False) -> DraftReport:
    sums = {name: sum(figures[name] for figures in found) for name in found[0]}
    return DraftReport(iteration, sums["loss"] / len(found), sums["confidence_loss"] / len(found),
                       sums["canvas_right"] / max(1.0, sums["canvas_tokens"]), sums["block_right"] / max(1.0, sums["block_tokens"]),
                       valid)


def frequent_tokens(trajectories: Sequence[Trajectory], count: int, vocabulary: int) -> np.ndarray:
    """The ``count`` tokens that were committed most often, ascending, int32."""
    counts = np.bincount(np.concatenate([t.committed for t in trajectories]), minlength=vocabulary)
    return np.sort(np.argsort(-counts, kind="stable")[:count]).astype(np.int32)
