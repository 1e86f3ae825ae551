"""Ours against the reference, stage by stage.

A row's error is the largest absolute difference in it.  Where the reference also runs in float64, both float32
implementations are held against that: ours may be twice as far from it as the reference's own float32 in the median row,
and three times at the 90th percentile.  A row whose error is more than four times the reference's own there must have a router
margin so small that rounding chooses between two experts.

Where float64 does not fit, errors are differences to the reference, and ``r`` is its own spread: the median over the rows
of the largest difference between its variants.  A stage holds when the median row is within max(1e-5, r), 99 % of the rows
within max(2e-5, 4 r), and every row beyond that has such a router margin.

Trajectories run with the same random numbers on both sides and must agree in every accepted mask, canvas and argmax.  A
decision may differ where its margin is below ten times the reference's spread of that very quantity along the trajectory;
it is listed, and from there on each step is compared from the reference's own canvas and self-conditioning signal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_diffgemma import conditioning
from mlx_diffgemma.cache import Cache
from mlx_diffgemma.device import exact_float32
from mlx_diffgemma.draws import Draws
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.images import BUDGETS, Image, fitting_size
from mlx_diffgemma.model import DiffusionGemma
from mlx_diffgemma.parity.reference import Reference, ReferenceCanvas, ReferenceStep
from mlx_diffgemma.policy import ReferencePolicy
from mlx_diffgemma.prompt import PlacedImage, read_rows
from mlx_diffgemma.sampler import Before, Flag
from mlx_diffgemma.session import CanvasStep, Loop, Session
from mlx_diffgemma.vision import axial_table

ROUTER_MARGIN = 1e-4
MEDIAN_FACTOR, P90_FACTOR = 2.0, 3.0  # of the reference's own distance to float64
DECISION_FACTOR = 10.0
ENDED_SHARE = 0.02


@dataclass(frozen=True)
class StageResult:
    """One line of the table: errors of ours, and ``spread``, ``own_p90`` of the reference's own.

    ``exact``: both are distances to float64.  ``beyond`` rows are past the bound of a single row, of which ``unexplained``
    have no tie in a router.
    """

    stage: str
    rows: int
    median: float
    p90: float
    p99: float
    largest: float
    spread: float
    own_p90: float
    exact: bool
    beyond: int
    unexplained: int

    @property
    def median_bound(self) -> float:
        return max(1e-5, (MEDIAN_FACTOR if self.exact else 1.0) * self.spread)

    @property
    def bound(self) -> float:
        return max(2e-5, 4 * self.spread)

    @property
    def ok(self) -> bool:
        tail = self.p90 <= max(2e-5, P90_FACTOR * self.own_p90) if self.exact else self.p99 <= self.bound
        return bool(self.median <= self.median_bound and tail and not self.unexplained)


@dataclass
class StageErrors:
    """Collects rows of one stage over many inputs."""

    stage: str
    errors: list[np.ndarray] = field(default_factory=list)
    spreads: list[np.ndarray] = field(default_factory=list)
    margins: list[np.ndarray] = field(default_factory=list)
    exact: bool = False

    def add(self, ours: np.ndarray, variants: Sequence[np.ndarray], margins: np.ndarray | None = None,
            exact: bool = False) -> None:
        """Add rows of one input.

        Args:
            ours: [rows, ...].
            variants: the same of the reference and of its other implementations.
            margins: [rows] of the router; without them no row is at a tie.
            exact: the last of ``variants`` is float64.
        """
        self.exact = exact
        truth, rest = (variants[-1], variants[:-1]) if exact else (variants[0], variants[1:])
        self.errors.append(_row_errors(ours, truth))
        own = [_row_errors(other, truth) for other in rest]
        self.spreads.append(np.max(own, axis=0) if own else np.zeros_like(self.errors[-1]))
        self.margins.append(np.full(len(self.errors[-1]), np.inf) if margins is None else margins)

    def result(self) -> StageResult:
        errors, spreads = np.concatenate(self.errors), np.concatenate(self.spreads)
        median, p90 = float(np.median(spreads)), float(np.quantile(spreads, 0.9))
        # A row that is hard for the reference's float32 is hard for ours.
        allowed = np.maximum(4 * spreads, 4 * p90) if self.exact else np.full(errors.shape, 4 * median)
        beyond = ~(errors <= np.maximum(2e-5, allowed))
        unexplained = beyond & (np.concatenate(self.margins) >= ROUTER_MARGIN)
        return StageResult(self.stage, errors.size, float(np.median(errors)), float(np.quantile(errors, 0.9)),
                           float(np.quantile(errors, 0.99)), float(errors.max()), median, p90, self.exact, int(beyond.sum()),
                           int(unexplained.sum()))


@dataclass(frozen=True)
class Ended:
    """A decision at which both sides may differ: its margin and the reference's spread of the same quantity."""

    canvas: int
    step: int
    decision: str
    margin: float
    spread: float

    @property
    def excused(self) -> bool:
        return self.margin < DECISION_FACTOR * self.spread


@dataclass
class TrajectoryResult:
    """Trajectories of one setting: canvases compared, steps compared, and the decisions in which both sides differed.

    Behind such a decision a sequence is compared step by step from the reference's own canvases.
    """

    setting: str
    canvases: int = 0
    steps: int = 0
    ended: list[Ended] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        allowed = max(1, ENDED_SHARE * self.steps)  # a handful of steps may hold one tie
        return self.canvases > 0 and all(e.excused for e in self.ended) and len(self.ended) <= allowed


@dataclass
class Report:
    stages: list[StageResult]
    trajectories: list[TrajectoryResult]

    @property
    def ok(self) -> bool:
        return all(s.ok for s in self.stages) and all(t.ok for t in self.trajectories)


def compare_forwards(model: DiffusionGemma, reference: Reference, prompts: Sequence[Sequence[int]], seed: int = 0,
                     ) -> list[StageResult]:
    """Encoder hidden states, cache, and denoising logits without and with self-conditioning, alone and as a batch."""
    hidden, cached, first, second, batch = (StageErrors(name) for name in (
        "encoder hidden states", "cache", "logits, first step", "logits, self-conditioned", "logits, unequal batch"))
    vocabulary, length = model.config.text.vocab_size, model.config.canvas_length
    rng, exact = np.random.default_rng(seed), "float64" in reference.variants
    canvases = rng.integers(0, vocabulary, (len(prompts), length))
    caches = [Cache(model.config.text) for _ in prompts]
    for ids, canvas, cache in zip(prompts, canvases, caches, strict=True):
        encoded = {name: reference.encode(ids, name) for name in reference.variants}
        ours = model.encode([mx.array(ids)], [cache]).hidden[0]
        eager = encoded["eager"]
        hidden.add(_array(ours), [e.hidden for e in encoded.values()], eager.margins, exact)
        for layer in range(len(model.config.text.layers)):
            views = [_cache_rows(e.cache, layer) for e in encoded.values()]
            cached.add(_our_cache_rows(cache, layer), views, eager.margins[-len(views[0]):], exact)
        plain = {name: reference.denoise(e.cache, canvas, None, name) for name, e in encoded.items()}
        out = model.denoise(mx.array(canvas[None].astype(np.int32)), [cache]).logits
        first.add(_array(out[0]), [logits for logits, _ in plain.values()], plain["eager"][1], exact)
        scaled = (plain["eager"][0] / np.float32(0.7)).astype(np.float32)
        again = {name: reference.denoise(e.cache, canvas, scaled, name) for name, e in encoded.items()}
        soft = conditioning.dense(model, mx.array(scaled[None]))
        out = model.denoise(mx.array(canvas[None].astype(np.int32)), [cache], soft).logits
        second.add(_array(out[0]), [logits for logits, _ in again.values()], again["eager"][1], exact)
        batch.margins.append(plain["eager"][1])
    out = model.denoise(mx.array(canvases.astype(np.int32)), caches).logits
    padded = {name: reference.denoise_padded(prompts, canvases, name) for name in reference.variants}
    margins, batch.margins = np.concatenate(batch.margins), []
    batch.add(_array(out).reshape(-1, vocabulary), [p.reshape(-1, vocabulary) for p in padded.values()], margins, exact)
    return [stage.result() for stage in (hidden, cached, first, second, batch)]


def compare_images(model: DiffusionGemma, reference: Reference, images: Sequence[Sequence[Image]], seed: int = 0,
                   ) -> list[StageResult]:
    """The tower stage by stage on every image, and the encoder's hidden states and first logits of a prompt with each group."""
    stages: dict[str, StageErrors] = {}
    hidden, logits = StageErrors("encoder hidden states, images"), StageErrors("logits behind images")
    rng, text, tokens = np.random.default_rng(seed), model.config.text, model.config.image_tokens
    if not images:
        return []
    assert tokens is not None
    special = (tokens.begin, tokens.image, tokens.end)
    if not all(0 <= token < text.vocab_size for token in special):
        raise UserError(f"config.json: the ids around images {special} must lie within the vocabulary of {text.vocab_size:,}, or "
                        "no prompt with an image can be read; correct them.")
    plain_ids = np.setdiff1d(np.arange(1, text.vocab_size), special)
    exact = "float64" in reference.variants
    variants = [name for name in reference.variants if name != "grouped_mm"]  # the tower has no experts
    for group in images:
        for image in group:
            theirs = [reference.see(image, name) for name in variants]
            for (name, ours), *others in zip(_seen(model, image), *theirs, strict=True):
                # Before the last norm numbers have no scale of their own: errors are in units of their root mean square.
                unit = max(1.0, float(np.sqrt(np.mean(others[0][1] ** 2))))
                stages.setdefault(name, StageErrors(name)).add(ours / unit, [array / unit for _, array in others],
                                                                   exact=exact)
        ids = list[int]()
        placed = list[PlacedImage]()
        for image in group:
            ids += [*rng.choice(plain_ids, 7).tolist(), tokens.begin]
            placed.append(PlacedImage(len(ids), image))
            ids += [tokens.image] * image.soft_tokens + [tokens.end]
        ids += rng.choice(plain_ids, 9).tolist()
        cache, canvas = Cache(text), rng.choice(plain_ids, model.config.canvas_length)
        rows, blocks = read_rows(model, ids, 0, placed)
        ours = model.encode([rows], [cache], blocks=[blocks]).hidden[0]
        encoded = {name: reference.encode(ids, name, group) for name in reference.variants}
        hidden.add(_array(ours), [e.hidden for e in encoded.values()], encoded["eager"].margins, exact)
        plain = {name: reference.denoise(e.cache, canvas, None, name) for name, e in encoded.items()}
        out = model.denoise(mx.array(canvas[None].astype(np.int32)), [cache]).logits
        logits.add(_array(out[0]), [found for found, _ in plain.values()], plain["eager"][1], exact)
    return [stage.result() for stage in (*stages.values(), hidden, logits)]


def _seen(model: DiffusionGemma, image: Image) -> list[tuple[str, np.ndarray]]:
    """Our tower, stage by stage under the names of ``Reference.see``."""
    tower = model.model.encoder.vision_tower
    positions = mx.array(image.positions)
    x = tower.patch_embedder(mx.array(image.patches), positions)
    table, found = axial_table(positions, tower.config.head_dim, tower.config.rope_theta), [("patch embedding", _array(x))]
    for index, layer in enumerate(tower.encoder.layers):
        x = layer(x, table)
        found.append((f"tower layer {index}", _array(x)))
    whole = tower(mx.array(image.patches), image.grid)
    return [*found, ("soft tokens", _array(whole)), ("image embeddings", _array(model.see(mx.array(image.patches), image.grid)))]


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
    """Whole answers with the same draws; ``together`` runs the prompts as one batch on both sides."""
    result = TrajectoryResult(setting)
    groups = [list(range(len(prompts)))] if together else [[row] for row in range(len(prompts))]
    steps = max_steps or model.config.generation.max_denoising_steps
    for group in groups:
        ids = [prompts[row] for row in group]
        draws = [Draws(seed + row, model.config.text.vocab_size) for row in group]
        theirs = reference.trajectories(ids, draws, canvases, max_denoising_steps=steps)
        ours = run_ours(model, ids, draws, canvases, steps)
        for row in range(len(group)):
            _compare_row(result, reference, model, ours[row], theirs[row], draws[row], steps)
    return result


def run_ours(model: DiffusionGemma, prompts: Sequence[Sequence[int]], draws: Sequence[Draws], canvases: int,
             max_steps: int) -> list[list[list[CanvasStep]]]:
    """Our trajectories: for each prompt, its canvases, each a list of steps."""
    generation = model.config.generation
    policy = _policy(model, max_steps)
    limit = canvases * model.config.canvas_length
    sessions = [Session(model, ids, policy, d, generation.eos_token_ids, limit) for ids, d in zip(prompts, draws, strict=True)]
    out: dict[int, list[list[CanvasStep]]] = {id(session): [] for session in sessions}
    loop = Loop(model, sessions)
    while loop.active:
        for session, step in loop.advance():
            if step.step == 0:
                out[id(session)].append([])
            out[id(session)][-1].append(step)
    return [out[id(session)] for session in sessions]


def _compare_row(result: TrajectoryResult, reference: Reference, model: DiffusionGemma, ours: list[list[CanvasStep]],
                 theirs: list[ReferenceCanvas], draws: Draws, max_steps: int) -> None:
    for index, canvas in enumerate(theirs):
        result.canvases += 1
        for number, step in enumerate(canvas.steps):
            mine = ours[index][number]
            result.steps += 1
            names = [name for name in ("argmax", "accepted", "canvas") if not np.array_equal(_ids(getattr(mine, name)),
                                                                                             getattr(step, name))]
            if (mine.reason == "converged") != step.stopped:
                names.append("stop")
            if names:  # the first is the cause: another mask makes another canvas, another argmax another stop
                judge = _Decision(reference, model, canvas, step, draws, index, number, max_steps)
                result.ended.append(judge.first(names, mine))
                if result.ended[-1].excused:
                    _follow(result, reference, model, theirs, draws, (index, number + 1), max_steps)
                return
        if len(ours[index]) != len(canvas.steps):
            result.ended.append(Ended(index, len(canvas.steps), "step count", np.inf, 0.0))
            return
    if len(ours) != len(theirs):
        result.ended.append(Ended(len(theirs), 0, "canvas count", np.inf, 0.0))


@dataclass(frozen=True)
class _Choice:
    """What our sampler makes of a step: [length] each, and whether the canvas converges with it."""

    argmax: np.ndarray
    accepted: np.ndarray
    canvas: np.ndarray
    stop: bool


def _follow(result: TrajectoryResult, reference: Reference, model: DiffusionGemma, theirs: list[ReferenceCanvas], draws: Draws,
            start: tuple[int, int], max_steps: int) -> None:
    """Compare the steps from ``start`` (canvas, step) on, each from the reference's own canvas and signal."""
    first_canvas, first_step = start
    for index in range(first_canvas, len(theirs)):
        canvas = theirs[index]
        result.canvases += index > first_canvas
        cache, their_cache = Cache(model.config.text), reference.encode(canvas.prefix.tolist()).cache
        model.encode([mx.array(canvas.prefix.astype(np.int32))], [cache])
        scaled: np.ndarray | None = None
        for number, step in enumerate(canvas.steps):
            if index > first_canvas or number >= first_step:
                result.steps += 1
                mine = _choose(model, cache, canvas, number, scaled, draws, index, max_steps)
                names = [name for name in ("argmax", "accepted", "canvas")
                         if not np.array_equal(getattr(mine, name), getattr(step, name))]
                names += ["stop"] if mine.stop != step.stopped else []
                if names:
                    judge = _Decision(reference, model, canvas, step, draws, index, number, max_steps, scaled, carried=False)
                    result.ended.append(judge.first(names, mine))
                    if not result.ended[-1].excused:
                        return
            logits, _ = reference.denoise(their_cache, step.canvas_in, scaled)
            scaled = (logits / _policy(model, max_steps).schedule(number)).astype(np.float32)


def _choose(model: DiffusionGemma, cache: Cache, canvas: ReferenceCanvas, number: int, scaled: np.ndarray | None, draws: Draws,
            index: int, max_steps: int) -> _Choice:
    """Our step ``number`` of the reference's canvas, with the signal of its ``scaled`` logits of the step before."""
    policy, step, length = _policy(model, max_steps), canvas.steps[number], model.config.canvas_length
    soft = None if scaled is None else conditioning.dense(model, mx.array(scaled[None]))
    canvas_in = mx.array(step.canvas_in.astype(np.int32))[None]
    logits = model.denoise(canvas_in, [cache], soft).logits
    past = [np.full(length, -1), *(before.argmax for before in canvas.steps[:number])]
    history = [past[max(0, len(past) - 1 - back)] for back in range(policy.stability)]
    accepted = canvas.steps[number - 1].accepted.astype(bool) if number else np.zeros(length, dtype=bool)
    before = Before(canvas_in, mx.array(accepted)[None], mx.array(np.stack(history).astype(np.int32))[None])
    numbers = draws.step(index, 0, number, index * length, length)
    ends = mx.array(list(model.config.generation.eos_token_ids))
    out = policy.sample([policy], [number], [length], logits, numbers.u[None], numbers.renoise[None], before, ends)
    return _Choice(_ids(out.argmax[0]), _ids(out.accepted[0]), _ids(out.canvas[0]), bool(out.flags[0, Flag.STOP].item()))


def _policy(model: DiffusionGemma, max_steps: int) -> ReferencePolicy:
    return ReferencePolicy.from_config(replace(model.config.generation, max_denoising_steps=max_steps))


class _Decision:
    """The margins of the decisions of one step, and how far the reference's variants are apart in each quantity."""

    def __init__(self, reference: Reference, model: DiffusionGemma, canvas: ReferenceCanvas, step: ReferenceStep,
                 draws: Draws, index: int, number: int, max_steps: int, signal: np.ndarray | None = None, carried: bool = True):
        self.step, self.index, self.number = step, index, number
        self.generation = model.config.generation
        length = model.config.canvas_length
        self.u = draws.step(index, 0, number, index * length, length).u.astype(np.float64)
        policy = _policy(model, max_steps)
        self.scaled, self.router = [], []
        for name in reference.variants:
            cache, scaled = reference.encode(canvas.prefix.tolist(), name).cache, signal
            if not carried:  # both sides were given the same signal
                logits, margins = reference.denoise(cache, step.canvas_in, signal, name)
                self.scaled.append((logits / policy.schedule(number)).astype(np.float64))
                self.router.append(margins.astype(np.float64))
                continue
            # Each variant goes through the canvas with its own self-conditioning, because rounding is carried on by it.
            for past, before in enumerate(canvas.steps[: number + 1]):
                logits, margins = reference.denoise(cache, before.canvas_in, scaled, name)
                scaled = logits / policy.schedule(past)
            assert scaled is not None, "a canvas has at least one step"
            self.scaled.append(scaled.astype(np.float64))
            self.router.append(margins.astype(np.float64))

    def first(self, names: Sequence[str], mine: CanvasStep | _Choice) -> Ended:
        """The decision that made the difference: the first of ``names``, unless another stood at a tie before it.

        Positions are accepted in the order of their entropies, so two that change places at the edge move the sum of the
        smaller entropies by a whole entropy: their order is the decision then.  Two experts that swap move a row's logits
        far, so every later decision may differ by any margin: then the router is.  Each is held against the variants' spread
        of the very same margin.
        """
        direct = self.margin(names[0], mine)
        row = int(self.router[0].argmin())
        spread = max(abs(float(margins[row] - self.router[0][row])) for margins in self.router[1:])
        before = [self.margin("order", mine)] if names[0] == "accepted" else []
        before.append(Ended(self.index, self.number, "router", float(self.router[0][row]), spread))
        return next((decision for decision in (direct, *before) if decision.excused), direct)

    def margin(self, name: str, mine: CanvasStep | _Choice) -> Ended:
        quantity: Callable[[np.ndarray], np.ndarray] = getattr(self, f"_{name}")
        values = [quantity(scaled) for scaled in self.scaled]
        stop = name == "stop"  # one decision for the whole canvas
        field = "accepted" if name == "order" else name
        differs = np.ones(1, dtype=bool) if stop else _ids(getattr(mine, field)) != getattr(self.step, field)
        margin = np.abs(values[0][differs]).max()
        spread = max(np.abs(v - values[0])[differs].max() for v in values[1:])
        return Ended(self.index, self.number, name, float(margin), float(spread))

    def _argmax(self, scaled: np.ndarray) -> np.ndarray:
        """[length] gap between the two best tokens."""
        best = np.sort(scaled, axis=-1)
        return best[:, -1] - best[:, -2]

    def _canvas(self, scaled: np.ndarray) -> np.ndarray:
        """[length] distance of ``u`` from the nearer edge of the reference's token in the running sum."""
        running = np.cumsum(_softmax(scaled), axis=-1)
        upper = np.take_along_axis(running, self.step.canvas[:, None], axis=-1)[:, 0]
        token = np.take_along_axis(_softmax(scaled), self.step.canvas[:, None], axis=-1)[:, 0]
        return np.minimum(np.abs(upper - self.u), np.abs(upper - token - self.u))

    def _accepted(self, scaled: np.ndarray) -> np.ndarray:
        """[length] distance of the sum of the smaller entropies from the bound."""
        entropy = _entropy(scaled)
        order = np.argsort(entropy)
        before = np.empty_like(entropy)
        before[order] = np.cumsum(entropy[order]) - entropy[order]
        return before - self.generation.entropy_bound

    def _order(self, scaled: np.ndarray) -> np.ndarray:
        """[length] distance of the entropy from that of the nearest position on the other side of the mask."""
        entropy, accepted = _entropy(scaled), self.step.accepted.astype(bool)
        highest = entropy[accepted].max(initial=-np.inf)
        lowest = entropy[~accepted].min(initial=np.inf)
        return np.where(accepted, lowest - entropy, entropy - highest)

    def _stop(self, scaled: np.ndarray) -> np.ndarray:
        """[1] distance of the mean entropy from the threshold."""
        return _entropy(scaled).mean(keepdims=True) - self.generation.confidence_threshold


def default_prompts(model: DiffusionGemma, count: int, seed: int = 0) -> list[list[int]]:
    """Random ids of lengths from a few tokens to beyond the sliding window; no tokenizer is needed."""
    windows = [layer.window for layer in model.config.text.layers if layer.window]
    longest = 2 * (windows[0] if windows else 64) + 7
    lengths = np.linspace(5, min(longest, model.config.text.max_position_embeddings // 2), count).astype(int)
    rng = np.random.default_rng(seed)
    return [rng.integers(1, model.config.text.vocab_size, length).tolist() for length in lengths]


def default_images(model: DiffusionGemma, seed: int = 0) -> list[list[Image]]:
    """Groups of images of noise, square, wide and tall, within the tower's position table; empty for a model without eyes.

    Errors: UserError where no image fits that table.
    """
    vision, rng = model.config.vision, np.random.default_rng(seed)
    if vision is None:
        return []
    square = vision.pooling_kernel_size
    longest = vision.position_embedding_size // square * square * vision.patch_size
    if not longest:
        raise UserError(f"config.json: position_embedding_size is {vision.position_embedding_size}, and an image has at least "
                        f"{square} patches a side (pooling_kernel_size); no image can be compared, so correct it.")
    made = []
    for height, width in ((90, 90), (20, 300), (300, 40)):
        size = fitting_size(height, width, vision.patch_size, square, BUDGETS[0])
        size = (min(size[0], longest), min(size[1], longest))
        pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        made.append(Image(pixels, vision.patch_size, vision.pooling_kernel_size))
    return [made[:1], made[1:]]


def run(folder: Path, device: str = "cpu", prompts: int = 4, canvases: int = 2, seed: int = 0) -> Report:
    """All stages on random prompts; what the command ``mlx-diffgemma parity`` prints."""
    from mlx_diffgemma.weights import load_model

    if prompts < 1 or canvases < 1:
        raise UserError(f"prompts and canvases must be at least 1, got {prompts} and {canvases}.")
    exact_float32()
    model = load_model(folder, "float32")
    groups = default_images(model, seed)  # refused before the reference is loaded
    reference = Reference(folder, device)
    ids = default_prompts(model, prompts, seed)
    return Report(
        [*compare_forwards(model, reference, ids, seed), *compare_images(model, reference, groups, seed)],
        [compare_trajectories(model, reference, ids, "one sampler step", 1, seed, max_steps=1),
         compare_trajectories(model, reference, ids, "one canvas", 1, seed),
         compare_trajectories(model, reference, ids, "several canvases", canvases, seed),
         compare_trajectories(model, reference, ids, "unequal batch", canvases, seed, together=True)],
    )


def _row_errors(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    if ours.shape != theirs.shape:  # a cache that keeps another number of entries, say
        return np.full(len(theirs), np.inf)
    difference = np.abs(ours.astype(np.float64) - theirs.astype(np.float64))
    return difference.reshape(len(difference), -1).max(axis=1)


def _cache_rows(cache: object, layer: int) -> np.ndarray:
    """The reference's entries of a layer as [entries, 2 x heads x size]."""
    entries = cache.layers[layer]  # type: ignore[attr-defined]
    pair = [np.asarray(t[0].detach().cpu().numpy()) for t in (entries.keys, entries.values)]
    return np.concatenate([a.transpose(1, 0, 2).reshape(a.shape[1], -1) for a in pair], axis=1)


def _our_cache_rows(cache: Cache, layer: int) -> np.ndarray:
    pair = [_array(t[0]) for t in cache.view(layer) or ()]
    return np.concatenate([a.transpose(1, 0, 2).reshape(a.shape[1], -1) for a in pair], axis=1)


def _array(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32))


def _ids(x: mx.array) -> np.ndarray:
    return np.array(x)


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def _entropy(x: np.ndarray) -> np.ndarray:
    shifted = x - x.max(axis=-1, keepdims=True)
    log = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return -(np.exp(log) * log).sum(axis=-1)
