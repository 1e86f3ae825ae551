"""What drafting is worth: forwards and multiply-adds a canvas, scores and their drift, beside everything it must be better than.

First the oracle curve, which needs no drafter: canvases begun from what the reference committed there, with a share of the
positions replaced.  Then the ways to answer, each over the same questions under the same seeds: the reference and itself under
other seeds (the noise floor), a looser stop rule, the drafter, the drafter without its checks, drafts that need no drafter, drafts
that are wrong on purpose, and decoding left to right.

A cost is counted in denoising steps: a pass of the drafter, a commit and a judge's pass have their shares of a step's
multiply-adds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from drafter.baselines import FixedDraft, JudgedPolicy, NgramDraft, UnverifiedPolicy, VetoPolicy, disturbed
from drafter.canvas import DraftPolicy, DraftRules
from drafter.model import Borrowed, Drafter
from drafter.run import share
from mlx_diffgemma import cost
from mlx_diffgemma.autoregressive import CausalLoop, CausalPolicy, causal_sessions
from mlx_diffgemma.cache import Cache
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.draws import Draws
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.evaluation.tasks import Question, Task
from mlx_diffgemma.model import DiffusionGemma, Segment
from mlx_diffgemma.policy import Policy, ReferencePolicy
from mlx_diffgemma.session import PREFILL_STEP_SIZE, Canvas, Loop, Session
from mlx_diffgemma.tokenizer import ResponseParser, chat_ids

SHARES = (1.0, 0.95, 0.9, 0.8, 0.6, 0.4, 0.2, 0.0)
OTHER = 500_009  # between the seeds of two runs that should have nothing in common
RESAMPLES = 2000
LOOSE = 1e-9  # a gate that lets everything through
WRONG = ("random tokens", "all end tokens", "another's answer", "wrong everywhere", "right, from other seeds")
BELIEVED = ("all end tokens", "another's answer")  # also without a judge, to see what it is for
KINDS = ("drafter", "baselines", "wrong", "ar", "oracle")
BATCH = 16


@dataclass(frozen=True)
class Answered:
    """One question under one seed: its score, its canvases, and the ids of each, whole."""

    score: float
    canvases: tuple[Canvas, ...]
    committed: tuple[np.ndarray, ...]

    def total(self, name: str) -> int:
        return sum(getattr(canvas, name) for canvas in self.canvases)

    @property
    def commits(self) -> int:
        """Causal passes that only committed: of every canvas but the last, unless the judge's pass did it."""
        return sum("causal" not in (canvas.certificate or "") for canvas in self.canvases[:-1])

    @property
    def text(self) -> tuple[int, ...]:
        return tuple(int(token) for canvas in self.canvases for token in canvas.tokens)


@dataclass(frozen=True)
class Shares:
    """What a pass of the drafter, a commit and a judge's pass take of a denoising step's multiply-adds; the last reads the text's
    rows only, and takes so much less."""

    draft: float
    commit: float
    judge: float

    @classmethod
    def of(cls, drafter: Drafter, config: ModelConfig) -> Shares:
        flops = cost.step_flops(config, 0)
        whole = sum(value for part, value in flops.items() if part != "scores")
        commit = (flops["attention"] + flops["dense_mlp"] + flops["experts"]) / whole
        return cls(share(drafter.config, config), commit, commit + flops["head"] / whole)

    def spent(self, answered: Answered, free_steps: bool = False) -> float:
        """In denoising steps; ``free_steps`` leaves those out."""
        steps = 0 if free_steps else answered.total("steps")
        judged = answered.total("judged_rows") / answered.committed[0].size
        causal = self.judge * judged + self.commit * answered.commits
        return steps + causal + self.draft * answered.total("passes")


@dataclass(frozen=True)
class WayResult:
    """A way to answer, over all questions and seeds.

    ``steps`` and ``forwards`` of the target a canvas, ``rows`` of them, and ``cost`` in denoising steps with everything counted;
    ``ratio`` of that to the reference's, and the same for the ``longest``: the questions that took most of the reference, up to a
    third of all it spent; ``longest_steps`` is the ratio of their steps.  Of the drafter ``passes``, and of the causal mode
    ``judged_passes`` with ``judged_rows``, as a share of the canvas's, and ``commits`` beside them, all a canvas.
    ``loss`` of mean score against the reference, in points, with the upper end of its 95 % interval.  ``drafted`` tokens of a
    canvas's text, of which ``right`` were committed; ``judged`` is the share of canvases that the causal mode certified,
    ``retries`` that of those begun anew.  ``same``: texts as the reference's.  ``drift`` is the squared distance between the
    distributions of the tokens at each place and ``text_drift`` that between those of whole texts (see ``drift``); ``variety`` is
    the chance that two seeds give different tokens at a place.
    """

    name: str
    score: float
    steps: float
    forwards: float
    rows: float
    cost: float
    ratio: float
    longest: float
    longest_steps: float
    passes: float
    judged_passes: float
    judged_rows: float
    commits: float
    loss: float
    loss_bound: float
    drafted: float
    right: float | None
    judged: float
    retries: float
    same: float
    drift: float
    text_drift: float
    variety: float


def answer(model: DiffusionGemma, tokenizer: TokenizerWrapper, questions: Sequence[Question], policy: Policy, seed: int,
           max_tokens: int, batch_size: int = BATCH) -> list[Answered]:
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
        whole, start, committed = session.ids[prompt:], 0, []
        for canvas in session.canvases:
            size = len(whole) - start if canvas is session.canvases[-1] else canvas.tokens.size
            committed.append(np.array(whole[start : start + size], dtype=np.int32))
            start += size
        ids = [int(t) for canvas in session.canvases for t in canvas.tokens]
        found.append(Answered(_score(tokenizer, question, ids, eos), tuple(session.canvases), tuple(committed)))
    return found


def answer_causally(model: DiffusionGemma, tokenizer: TokenizerWrapper, questions: Sequence[Question], temperature: float,
                    seed: int, max_tokens: int, drafter: Drafter | None = None) -> dict[str, float]:
    """The same left to right: mean score, and tokens, forwards and rows of the target an answer."""
    eos, size = model.config.generation.eos_token_ids, model.config.text.vocab_size
    scores, tokens, forwards, rows = [], 0, 0, 0
    for first in range(0, len(questions), BATCH):
        part = questions[first : first + BATCH]
        sessions = causal_sessions(model, [chat_ids(tokenizer, q.messages) for q in part], CausalPolicy(temperature),
                                   [Draws(seed + first + i, size) for i in range(len(part))], eos, [max_tokens] * len(part))
        loop = CausalLoop(model, sessions, PREFILL_STEP_SIZE, drafter.causal(model) if drafter else None)
        loop.prefill()
        while loop.active:
            loop.advance()
        scores += [_score(tokenizer, q, s.tokens, eos) for q, s in zip(part, sessions, strict=True)]
        tokens, forwards = tokens + sum(len(s.tokens) for s in sessions), forwards + sum(s.forwards for s in sessions)
        rows += sum(s.forwards + s.proposed for s in sessions)
    count = len(questions)
    return {"score": float(np.mean(scores)), "tokens": tokens / count, "forwards": forwards / count, "rows": rows / count}


def _score(tokenizer: TokenizerWrapper, question: Question, ids: Sequence[int], eos: Sequence[int]) -> float:
    parser = ResponseParser(tokenizer)
    return question.mark(parser.feed([t for t in ids if t not in eos]).answer + parser.finish().answer).score


def oracle(model: DiffusionGemma, tokenizer: TokenizerWrapper, questions: Sequence[Question], base: Policy, seed: int,
           max_tokens: int, drafter: Drafter | None = None, progress: Callable[[str], None] | None = None) -> list[dict[str, Any]]:
    """Steps a canvas by the share of right positions in the draft; the others are noise, another question's answer, or what a
    ``drafter`` makes of them from the right ones.

    Neither watchdog nor judge; drafts come from one run of the reference, the draws from another.
    """
    before = answer(model, tokenizer, questions, base, seed, max_tokens)
    rng, points = np.random.default_rng(seed), []
    for kind in ("noise", "another's answer") + (("the drafter's",) if drafter else ()):
        for right in SHARES:
            known: dict[tuple[int, int], np.ndarray] = {}
            for i, own in enumerate(before):
                behind = chat_ids(tokenizer, questions[i].messages)
                for index, canvas in enumerate(own.committed):
                    given = rng.random(canvas.size) < right
                    wrong = np.full(canvas.size, -1, dtype=np.int32)
                    if kind == "another's answer":
                        wrong = np.resize(before[(i + 1) % len(before)].committed[0], canvas.size)
                    elif drafter and kind != "noise":
                        noise = rng.integers(0, model.config.text.vocab_size, canvas.size)
                        wrong = _guessed(model, drafter, behind, np.where(given, canvas, noise))
                    known[seed + OTHER + i, index] = np.where(given, canvas, wrong)
                    behind = [*behind, *canvas.tolist()]
            policy = DraftPolicy(base, FixedDraft(known), base.max_steps + 1)
            got = answer(model, tokenizer, questions, policy, seed + OTHER, max_tokens)
            points.append({"wrong": kind, "right": right, "steps": _a_canvas(got, lambda a: a.total("steps")),
                           "score": float(np.mean([a.score for a in got]))})
            if progress:
                progress(f"oracle, {right:.0%} right, {kind}")
    return points


def _guessed(model: DiffusionGemma, drafter: Drafter, prefix: Sequence[int], canvas: np.ndarray) -> np.ndarray:
    """What one pass of the drafter makes of ``canvas`` ids [length] behind ``prefix``."""
    borrowed, cache = Borrowed(model, drafter), Cache(drafter.config)
    taps = model.encode([mx.array(prefix)], [Cache(model.config.text)], taps=drafter.config.taps).taps
    drafter.absorb([drafter.features({layer: rows[0] for layer, rows in taps.items()})], [cache])
    hidden = drafter(borrowed.embed(mx.array(canvas)), [Segment(0, canvas.size, cache, canvas=True)])
    return np.array(borrowed.tokens(mx.argmax(borrowed.logits(hidden), axis=-1)))


def drift(own: Sequence[Sequence[Answered]], reference: Sequence[Sequence[Answered]],
          of: Callable[[Answered], Sequence[Any]]) -> float:
    """The squared distance between the distributions of ``own`` and ``reference`` [seeds][questions], for each entry of what ``of``
    makes of an answer, in mean over entries and questions; pairs of one seed, which share their random numbers, are left out.

    An unbiased estimate of sum (p - q)^2: what a token at a place, say, is under the one and under the other.  It is around 0
    where the two ways are one.  Source: the energy distance (Székely and Rizzo 2013) under the discrete metric.
    """
    found = []
    for question in range(len(own[0])):
        length = max(len(of(run[question])) for run in (*own, *reference))
        across, inside, outside = (_differ(a, b, question, of, length) for a, b in ((own, reference), (own, own),
                                                                                    (reference, reference)))
        found.append(float(np.mean(2 * across - inside - outside)))
    return float(np.mean(found))


def _differ(a: Sequence[Sequence[Answered]], b: Sequence[Sequence[Answered]], question: int,
            of: Callable[[Answered], Sequence[Any]], length: int = 0) -> np.ndarray:
    """[entries] how often an answer under one seed and one under another differ; short ones are filled up."""
    x, y = ([list(map(hash, of(run[question]))) for run in runs] for runs in (a, b))
    length = length or max(map(len, x + y))
    left, right = (np.array([[*one, *[-1] * (length - len(one))] for one in ways]) for ways in (x, y))
    pairs = [left[i] != right[j] for i in range(len(a)) for j in range(len(b)) if i != j]
    different: np.ndarray = np.mean(pairs, axis=0)
    return different


def evaluate_drafter(model: DiffusionGemma, tokenizer: TokenizerWrapper, drafter: Drafter, tasks: Sequence[Task], limit: int = 20,
                     seeds: Sequence[int] = range(5), max_tokens: int = 256, rules: DraftRules | None = None,
                     kinds: Iterable[str] = KINDS, drafters: Mapping[str, Drafter] | None = None,
                     progress: Callable[[str], None] | None = None) -> dict[str, Any]:
    """All of it, or some of the ``kinds``, as a record.  ``drafters`` are more of them by name, asked under the same rules.

    Errors: UserError for a drafter of another model, for nothing to ask, one seed only, and a kind that is none.
    """
    kinds, rules = set(kinds), rules or DraftRules()
    questions = [question for task in tasks for question in task.questions(limit) if not question.choices]
    if not questions or len(seeds) < 2:
        raise UserError("At least one question that is answered in text and two seeds are needed.")
    if not kinds <= set(KINDS):
        raise UserError(f"Unknown part {sorted(kinds - set(KINDS))[0]!r}; known are {', '.join(KINDS)}.")
    base = ReferencePolicy.from_config(model.config.generation, coverage=1 - 1e-6)
    loose = replace(base, stability=0)
    firsts = [seed * 1_000_003 for seed in seeds]
    shares, results, runs = Shares.of(drafter, model.config), list[WayResult](), dict[str, list[list[Answered]]]()

    def run(name: str, policy_of: Callable[[int], Policy], offset: int = 0, free_steps: bool = False) -> None:
        runs[name] = []
        for number, first in enumerate(firsts):
            if progress:
                progress(f"{name}, seed {seeds[number]}")
            runs[name].append(answer(model, tokenizer, questions, policy_of(number), first + offset, max_tokens))
        results.append(_result(name, runs[name], runs["reference"], shares, free_steps))

    def drafted(under: Policy = base, own: Drafter = drafter, **changes: Any) -> Callable[[int], Policy]:
        policy = own.canvas(model, under, replace(rules, **changes))
        return lambda _: policy

    run("reference", lambda _: base)
    reference = runs["reference"]
    run("drafter", drafted())
    for name, other in (drafters or {}).items():
        run(name, drafted(own=other))
    if "drafter" in kinds:
        if drafter.config.refinement:
            run(f"drafter, refine {'off' if rules.refine else 'on'}", drafted(refine=not rules.refine))
        run(f"drafter, handoff {'off' if rules.handoff else 'on'}", drafted(handoff=not rules.handoff))
        run("drafter, no judge", drafted(judge=None))
        run("drafter, gate 0.9", drafted(gate=0.9))
        run("drafter, looser stop", drafted(under=loose))
    if "baselines" in kinds:
        run("reference, other seeds", lambda _: base, OTHER)
        run("looser stop (stability 0)", lambda _: loose)
        commits = UnverifiedPolicy(**{f.name: getattr(base, f.name) for f in fields(base)})
        run("drafter, not verified", drafted(under=commits, gate=LOOSE, judge=None, refine=False), free_steps=True)
        veto = drafter.canvas(model, base, replace(rules, gate=LOOSE))
        run("drafter, judge alone", lambda _: VetoPolicy(veto.base, veto.drafter, veto.watchdog, veto.surprise or DraftRules.judge))
        run("no draft, judge", lambda _: JudgedPolicy(base, FixedDraft({}), rules.watchdog, rules.judge or DraftRules.judge))
        run("n-gram draft", lambda _: DraftPolicy(base, NgramDraft(), rules.watchdog, rules.judge))
    if "wrong" in kinds:
        rng, length = np.random.default_rng(0), model.config.canvas_length
        watchdog, surprise = rules.watchdog, rules.judge
        end, vocabulary = model.config.generation.eos_token_ids[0], model.config.text.vocab_size

        def make(name: str, number: int, i: int, index: int) -> np.ndarray:
            right = next(iter(reference[number - 1][i].committed[index:]), np.zeros(0, dtype=np.int32))
            if name == "right, from other seeds":
                return right
            if name == "wrong everywhere":
                return (np.resize(right, length) + rng.integers(1, vocabulary, length)) % vocabulary if right.size else right
            if name == "another's answer":
                return reference[number][(i + 1) % len(questions)].committed[0]
            return np.full(length, end) if name == "all end tokens" else rng.integers(0, vocabulary, length)

        run("a random drafter", drafted(own=disturbed(drafter, 10.0)))
        run("the drafter, disturbed", drafted(own=disturbed(drafter, 0.3)))
        for name in WRONG:
            def fixed(number: int, name: str = name, judge: bool = True) -> Policy:
                known = {(firsts[number] + i, index): make(name, number, i, index) for i in range(len(questions))
                         for index in range(8)}
                return DraftPolicy(base, FixedDraft(known), watchdog, surprise if judge else None)

            run(name, fixed)
            if name in BELIEVED:
                run(f"{name}, no judge", lambda number, fixed=fixed: fixed(number, judge=False))  # type: ignore[misc]
    record: dict[str, Any] = {"questions": len(questions), "seeds": list(seeds), "shares": asdict(shares), "rules": asdict(rules),
                              "ways": [asdict(result) for result in results]}
    if "ar" in kinds:
        record["ar"] = []
        for temperature in (0.0, 1.0):
            for name, own in (("plain", None), ("drafted", drafter)):
                if progress:
                    progress(f"left to right, {name}, temperature {temperature:g}")
                found = [answer_causally(model, tokenizer, questions, temperature, first, max_tokens, own) for first in firsts]
                record["ar"].append({"name": name, "temperature": temperature}
                                    | {key: float(np.mean([one[key] for one in found])) for key in found[0]})
    if "oracle" in kinds:
        record["oracle"] = oracle(model, tokenizer, questions, base, firsts[0], max_tokens, drafter, progress)
    return record


def _a_canvas(answers: Iterable[Answered], value: Callable[[Answered], float]) -> float:
    answers = list(answers)
    return sum(map(value, answers)) / sum(len(a.canvases) for a in answers)


def _result(name: str, own: Sequence[Sequence[Answered]], reference: Sequence[Sequence[Answered]], shares: Shares,
            free_steps: bool) -> WayResult:
    flat, before = [a for run in own for a in run], [a for run in reference for a in run]

    def spent(a: Answered) -> float:
        return shares.spent(a, free_steps)

    def scores(runs: Sequence[Sequence[Answered]]) -> np.ndarray:
        return np.array([[a.score for a in run] for run in runs]).mean(axis=0)

    effort = np.array([[shares.spent(a) for a in run] for run in reference]).sum(axis=0)
    order = np.argsort(-effort, kind="stable")
    most = order[: 1 + int(np.searchsorted(np.cumsum(effort[order]), effort.sum() / 3))]
    long, long_before = ([run[i] for run in runs for i in most] for runs in (own, reference))
    losses = 100 * (scores(reference) - scores(own))
    rng = np.random.default_rng(0)
    means = losses[rng.integers(0, losses.size, (RESAMPLES, losses.size))].mean(axis=1)
    proposed, cost_of = sum(a.total("proposed") for a in flat), _a_canvas(flat, spent)
    certified = [canvas.certificate or "" for a in flat for canvas in a.canvases]

    def forwards(a: Answered) -> int:
        return (0 if free_steps else a.total("steps")) + a.total("judged") + a.commits

    def rows(a: Answered) -> int:
        return ((0 if free_steps else a.total("steps")) + a.commits) * a.committed[0].size + a.total("judged_rows")

    return WayResult(
        name=name, score=float(np.mean([a.score for a in flat])),
        steps=0.0 if free_steps else _a_canvas(flat, lambda a: a.total("steps")), forwards=_a_canvas(flat, forwards),
        rows=_a_canvas(flat, rows), cost=cost_of, ratio=cost_of / _a_canvas(before, shares.spent),
        longest=_a_canvas(long, spent) / _a_canvas(long_before, shares.spent),
        longest_steps=_a_canvas(long, lambda a: a.total("steps")) / _a_canvas(long_before, lambda a: a.total("steps")),
        passes=_a_canvas(flat, lambda a: a.total("passes")), judged_passes=_a_canvas(flat, lambda a: a.total("judged")),
        judged_rows=_a_canvas(flat, lambda a: a.total("judged_rows") / a.committed[0].size),
        commits=_a_canvas(flat, lambda a: a.commits), loss=float(losses.mean()),
        loss_bound=float(np.quantile(means, 0.975)), drafted=proposed / len(certified),
        right=sum(a.total("accepted") for a in flat) / proposed if proposed else None,
        judged=float(np.mean(["causal" in one for one in certified])), retries=_a_canvas(flat, lambda a: a.total("retries")),
        same=float(np.mean([a.text == b.text for a, b in zip(flat, before, strict=True)])),
        drift=drift(own, reference, lambda a: a.text), text_drift=drift(own, reference, lambda a: [a.text]),
        variety=float(np.mean([_differ(own, own, i, lambda a: a.text).mean() for i in range(len(own[0]))])))


COLUMNS = ("way", "score", "loss, points (at most, 95 %)", "steps a canvas", "all costs", "of the reference's",
           "the longest third's", "drafted tokens", "right", "begun anew", "same text", "drift x 1000", "variety")


def table(record: Mapping[str, Any]) -> str:
    """The ways as a Markdown table."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for way in record["ways"]:
        right = "-" if way["right"] is None else f"{way['right']:.0%}"
        lines.append(f"| {way['name']} | {way['score']:.1%} | {way['loss']:+.1f} ({way['loss_bound']:+.1f}) | {way['steps']:.2f} | "
                     f"{way['cost']:.2f} | {way['ratio']:.2f} | {way['longest']:.2f} | {way['drafted']:.1f} | {right} | "
                     f"{way['retries']:.1%} | {way['same']:.0%} | {1000 * way['drift']:.1f} | {way['variety']:.3f} |")
    if "ar" in record:
        lines += ["", "| left to right | temperature | score | tokens an answer | forwards | rows |", "|---|---|---|---|---|---|"]
        lines += [f"| {way['name']} | {way['temperature']:g} | {way['score']:.1%} | {way['tokens']:.1f} | {way['forwards']:.1f} | "
                  f"{way['rows']:.1f} |" for way in record["ar"]]
    return "\n".join(lines)


def plot(record: Mapping[str, Any], path: Path) -> None:
    """The oracle curve, and what each way costs and loses.  Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (axis, ways) = plt.subplots(1, 2, figsize=(12, 4.5))
    for kind in dict.fromkeys(point["wrong"] for point in record["oracle"]):
        own = [point for point in record["oracle"] if point["wrong"] == kind]
        axis.plot([point["right"] for point in own], [point["steps"] for point in own], "o-", label=f"the rest {kind}")
    axis.axhline(record["ways"][0]["steps"], color="grey", linestyle="--", label="reference")
    axis.set(xlabel="share of right positions in the draft", ylabel="denoising steps a canvas", ylim=(0, None))
    axis.legend()
    for place, way in enumerate(reversed(record["ways"])):
        ways.barh(place, way["ratio"], color="tab:blue" if way["loss_bound"] < 2 else "tab:red")
    ways.set(yticks=range(len(record["ways"])), yticklabels=[way["name"] for way in reversed(record["ways"])],
             xlabel="cost of the reference's (red: may lose 2 points or more)")
    ways.axvline(1, color="grey", linestyle="--")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
