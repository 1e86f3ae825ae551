"""What drafting is worth: forwards and multiply-adds a canvas, scores and their drift, beside everything it must be better than.

First the oracle curve, which needs no drafter: canvases begun from what the reference committed there, with a share of the
positions replaced.  Then the ways to answer, each over the same questions under the same seeds: the reference and itself under
other seeds (the noise floor), a looser stop rule, the drafter, and drafts that are wrong on purpose.

A cost is counted in denoising steps: a pass of the drafter and a commit have their share of a step's multiply-adds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from drafter.canvas import DraftPolicy, DraftRules
from drafter.model import Drafter
from drafter.run import share
from mlx_diffgemma import cost
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.drafting import Draft, Taps
from mlx_diffgemma.draws import Draws
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.evaluation.tasks import Question, Task
from mlx_diffgemma.model import DiffusionGemma
from mlx_diffgemma.policy import Policy, ReferencePolicy
from mlx_diffgemma.session import Loop, Session
from mlx_diffgemma.tokenizer import ResponseParser, chat_ids

SHARES = (1.0, 0.95, 0.9, 0.8, 0.6, 0.4, 0.2, 0.0)
OTHER = 500_009  # between the seeds of two runs that should have nothing in common
RESAMPLES = 2000
Known = Mapping[tuple[int, int], np.ndarray]  # ids by request seed and canvas, -1 where nothing is drafted


class FixedDraft:
    """A canvas drafter that is told beforehand what to guess."""

    taps: Sequence[int] = ()

    def __init__(self, known: Known):
        self.known = known

    def begin(self) -> None:
        return None

    def read(self, sessions: Sequence[Session], taps: Sequence[Taps]) -> None:
        """There is nothing to note."""

    def seed(self, sessions: Sequence[Session]) -> list[Draft]:
        drafts = []
        for session in sessions:
            canvas = session.canvas
            assert canvas is not None
            assert isinstance(session.draws, Draws)
            found = self.known.get((session.draws.seed, session.canvas_index), np.zeros(0, dtype=np.int32))[: canvas.size]
            guess = mx.array(np.pad(found, (0, canvas.size - found.size), constant_values=-1).astype(np.int32))
            drafts.append(Draft(mx.where(guess < 0, canvas, guess), None, guess >= 0))
        return drafts


@dataclass(frozen=True)
class Answered:
    """One question under one seed: its score, the denoising steps and commits it took, canvases, those begun anew, what was drafted
    of the text and how much of it committed; ``committed`` are its canvases whole."""

    score: float
    steps: int
    commits: int
    canvases: int
    retries: int
    proposed: int
    accepted: int
    tokens: int
    committed: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class WayResult:
    """A way to answer, over all questions and seeds.  ``cost`` in denoising steps a canvas, everything counted; ``ratio`` of it to
    the reference's; ``loss`` of mean score against the reference, in points, with the upper end of its 95 % interval."""

    name: str
    score: float
    steps: float
    cost: float
    ratio: float
    loss: float
    loss_bound: float
    drafted: float
    right: float | None
    retries: float
    same: float


def answer(model: DiffusionGemma, tokenizer: TokenizerWrapper, questions: Sequence[Question], policy: Policy, seed: int,
           max_tokens: int, batch_size: int = 16) -> list[Answered]:
    """Question i under the seed ``seed`` + i."""
    eos, config = model.config.generation.eos_token_ids, model.config
    sessions = [Session(model, chat_ids(tokenizer, q.messages), policy, Draws(seed + i, config.text.vocab_size), eos, max_tokens)
                for i, q in enumerate(questions)]
    lengths = [len(session.ids) for session in sessions]
    waiting, loop = list(sessions), Loop(model)
    while waiting or loop.active:
        loop.sessions = loop.active
        while waiting and len(loop.sessions) < batch_size:
            loop.sessions.append(waiting.pop(0))
        loop.advance()
    found = []
    for question, session, prompt in zip(questions, sessions, lengths, strict=True):
        parser = ResponseParser(tokenizer)
        ids = [int(t) for canvas in session.canvases for t in canvas.tokens if int(t) not in eos]
        text = parser.feed(ids).answer + parser.finish().answer
        whole, start, committed = session.ids[prompt:], 0, []
        for canvas in session.canvases:
            size = len(whole) - start if canvas is session.canvases[-1] else canvas.tokens.size
            committed.append(np.array(whole[start : start + size], dtype=np.int32))
            start += size
        c = session.canvases
        found.append(Answered(question.mark(text).score, sum(x.steps for x in c), len(c) - 1, len(c), sum(x.retries for x in c),
                              sum(x.proposed for x in c), sum(x.accepted for x in c), len(ids), tuple(committed)))
    return found


def commit_share(config: ModelConfig) -> float:
    """A commit's multiply-adds of those of a denoising step with dense self-conditioning."""
    flops = cost.step_flops(config, 0)
    whole = sum(value for part, value in flops.items() if part != "scores")
    return (flops["attention"] + flops["dense_mlp"] + flops["experts"]) / whole


def oracle(model: DiffusionGemma, tokenizer: TokenizerWrapper, questions: Sequence[Question], base: Policy, seed: int,
           max_tokens: int, progress: Callable[[str], None] | None = None) -> list[dict[str, Any]]:
    """Steps a canvas by the share of right positions in the draft, the others noise or another question's answer.

    No watchdog; drafts come from one run of the reference, the draws from another.
    """
    before = answer(model, tokenizer, questions, base, seed, max_tokens)
    rng, points = np.random.default_rng(seed), []
    for kind in ("noise", "another's answer"):
        for right in SHARES:
            known: dict[tuple[int, int], np.ndarray] = {}
            for i, own in enumerate(before):
                for index, canvas in enumerate(own.committed):
                    other = before[(i + 1) % len(before)].committed[0]
                    wrong = np.resize(other, canvas.size) if kind != "noise" else np.full(canvas.size, -1, dtype=np.int32)
                    known[seed + OTHER + i, index] = np.where(rng.random(canvas.size) < right, canvas, wrong)
            policy = DraftPolicy(base, FixedDraft(known), base.max_steps + 1)
            got = answer(model, tokenizer, questions, policy, seed + OTHER, max_tokens)
            points.append({"wrong": kind, "right": right, "steps": sum(a.steps for a in got) / sum(a.canvases for a in got),
                           "score": float(np.mean([a.score for a in got]))})
            if progress:
                progress(f"oracle, {right:.0%} right, {kind}")
    return points


def evaluate_drafter(model: DiffusionGemma, tokenizer: TokenizerWrapper, drafter: Drafter, tasks: Sequence[Task], limit: int = 20,
                     seeds: Sequence[int] = range(5), max_tokens: int = 256, gates: Sequence[float] = (0.9, 0.97),
                     progress: Callable[[str], None] | None = None) -> dict[str, Any]:
    """All of it, as a record.  Errors: UserError for a drafter of another model, for nothing to ask and for one seed only."""
    questions = [question for task in tasks for question in task.questions(limit) if not question.choices]
    if not questions or len(seeds) < 2:
        raise UserError("At least one question that is answered in text and two seeds are needed.")
    base = ReferencePolicy.from_config(model.config.generation, coverage=1 - 1e-6)
    rules = DraftRules()
    firsts = [seed * 1_000_003 for seed in seeds]
    runs: dict[str, list[list[Answered]]] = {}
    passes: dict[str, int] = {}

    def run(name: str, policy_of: Callable[[int], Policy], own_passes: int = 0) -> None:
        runs[name], passes[name] = [], own_passes
        for number, first in enumerate(firsts):
            runs[name].append(answer(model, tokenizer, questions, policy_of(number), first, max_tokens))
            if progress:
                progress(f"{name}, seed {seeds[number]}")

    run("reference", lambda _: base)
    reference = runs["reference"]
    runs["reference, other seeds"], passes["reference, other seeds"] = [*reference[1:], reference[0]], 0
    run("looser stop (stability 0)", lambda _: replace(base, stability=0))
    for gate in gates:
        run(f"drafter, gate {gate:g}", lambda _, gate=gate: drafter.canvas(model, base, replace(rules, gate=gate)),  # type: ignore[misc]
            rules.passes)
    run("drafter, its distribution too", lambda _: drafter.canvas(model, base, replace(rules, handoff=True)), rules.passes)

    def drafts(make: Callable[[int, int, int], np.ndarray]) -> Callable[[int], Policy]:
        """A policy for each seed whose drafts are what ``make`` (seed number, question, canvas) says."""
        return lambda number: DraftPolicy(base, FixedDraft({
            (firsts[number] + i, index): make(number, i, index) for i in range(len(questions))
            for index in range(len(reference[number][i].committed) + 2)}), rules.watchdog)

    length, end = model.config.canvas_length, model.config.generation.eos_token_ids[0]
    run("all end tokens", drafts(lambda *_: np.full(length, end)))
    run("another's answer", drafts(lambda number, i, _: reference[number][(i + 1) % len(questions)].committed[0]))
    nothing = np.zeros(0, dtype=np.int32)
    run("right, from other seeds", drafts(lambda number, i, index: next(iter(reference[number - 1][i].committed[index:]), nothing)))
    shares = {"pass": share(drafter.config, model.config), "commit": commit_share(model.config)}
    results = [_result(name, own, reference, passes[name] * shares["pass"], shares["commit"]) for name, own in runs.items()]
    points = oracle(model, tokenizer, questions, base, firsts[0], max_tokens, progress)
    return {"questions": len(questions), "seeds": list(seeds), "shares": shares, "rules": asdict(rules),
            "ways": [asdict(result) for result in results], "oracle": points}


def _result(name: str, own: Sequence[Sequence[Answered]], reference: Sequence[Sequence[Answered]], draft: float, commit: float,
            ) -> WayResult:
    flat = [a for run in own for a in run]

    def costs(runs: Sequence[Sequence[Answered]], extra: float) -> np.ndarray:
        """[questions] steps a canvas, everything counted, over all seeds."""
        spent = np.array([[a.steps + a.commits * commit + a.canvases * extra for a in run] for run in runs]).sum(axis=0)
        return np.array([spent, np.array([[a.canvases for a in run] for run in runs]).sum(axis=0)])

    def scores(runs: Sequence[Sequence[Answered]]) -> np.ndarray:
        return np.array([[a.score for a in run] for run in runs]).mean(axis=0)

    spent, canvases = costs(own, draft)
    before, count = costs(reference, 0.0)
    losses = 100 * (scores(reference) - scores(own))
    rng = np.random.default_rng(0)
    means = losses[rng.integers(0, losses.size, (RESAMPLES, losses.size))].mean(axis=1)
    proposed = sum(a.proposed for a in flat)
    same = [all(np.array_equal(x, y) for x, y in zip(a.committed, b.committed, strict=False)) and a.tokens == b.tokens
            for mine, theirs in zip(own, reference, strict=True) for a, b in zip(mine, theirs, strict=True)]
    each = sum(a.canvases for a in flat)
    return WayResult(
        name, float(np.mean([a.score for a in flat])), sum(a.steps for a in flat) / each, spent.sum() / canvases.sum(),
        (spent.sum() / canvases.sum()) / (before.sum() / count.sum()), float(losses.mean()), float(np.quantile(means, 0.975)),
        proposed / each, sum(a.accepted for a in flat) / proposed if proposed else None, sum(a.retries for a in flat) / each,
        float(np.mean(same)))


def table(record: Mapping[str, Any]) -> str:
    """The ways as a Markdown table."""
    lines = ["| way | score | loss, points (at most, 95 %) | steps a canvas | all costs | of the reference's | drafted tokens | "
             "right | begun anew | same text |", "|---|---|---|---|---|---|---|---|---|---|"]
    for way in record["ways"]:
        right = "-" if way["right"] is None else f"{way['right']:.0%}"
        lines.append(f"| {way['name']} | {way['score']:.1%} | {way['loss']:+.1f} ({way['loss_bound']:+.1f}) | {way['steps']:.2f} | "
                     f"{way['cost']:.2f} | {way['ratio']:.2f} | {way['drafted']:.1f} | {right} | {way['retries']:.1%} | "
                     f"{way['same']:.0%} |")
    return "\n".join(lines)


def plot(record: Mapping[str, Any], path: Path) -> None:
    """The oracle curve.  Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4))
    for kind in dict.fromkeys(point["wrong"] for point in record["oracle"]):
        own = [point for point in record["oracle"] if point["wrong"] == kind]
        axis.plot([point["right"] for point in own], [point["steps"] for point in own], "o-", label=f"the rest {kind}")
    axis.axhline(record["ways"][0]["steps"], color="grey", linestyle="--", label="reference")
    axis.set(xlabel="share of right positions in the draft", ylabel="denoising steps a canvas", ylim=(0, None))
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
