"""What drafting is worth: ways to answer, each over the same questions under the same seeds.

The reference, and itself under other seeds (the noise floor); a looser stop rule; the drafter, also under other rules and without
its checks; drafts that need no drafter; drafts that are wrong on purpose; decoding left to right.  And the oracle curve, which says
what any draft could save: canvases begun from what the reference committed there, with a share of the positions replaced.

How each is measured: :mod:`drafter.measures`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from drafter.baselines import FixedDraft, JudgedPolicy, NgramDraft, UnverifiedPolicy, VetoPolicy, disturbed
from drafter.canvas import DraftPolicy, DraftRules
from drafter.measures import Answered, Shares, WayResult, a_canvas, way_result
from drafter.model import Borrowed, Drafter
from mlx_diffgemma.autoregressive import CausalLoop, CausalPolicy, causal_sessions
from mlx_diffgemma.cache import Cache
from mlx_diffgemma.draws import Draws
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.evaluation.tasks import Question, Task
from mlx_diffgemma.model import DiffusionGemma, Segment
from mlx_diffgemma.policy import Policy, ReferencePolicy
from mlx_diffgemma.session import PREFILL_STEP_SIZE, Session
from mlx_diffgemma.session import run as run_sessions
from mlx_diffgemma.tokenizer import ResponseParser, chat_ids

SHARES = (1.0, 0.95, 0.9, 0.8, 0.6, 0.4, 0.2, 0.0)
OTHER = 500_009  # between the seeds of two runs that should have nothing in common
LOOSE = 1e-9  # a gate that lets everything through
WRONG = ("random tokens", "all end tokens", "another's answer", "wrong everywhere", "right, from other seeds")
BELIEVED = ("all end tokens", "another's answer")  # also without a judge, to see what it is for
KINDS = ("drafter", "baselines", "wrong", "ar", "oracle")
BATCH = 16


def answer(model: DiffusionGemma, tokenizer: TokenizerWrapper, questions: Sequence[Question], policy: Policy, seed: int,
           max_tokens: int, batch_size: int = BATCH) -> list[Answered]:
    """Question i under the seed ``seed`` + i."""
    eos, config = model.config.generation.eos_token_ids, model.config
    sessions = [Session(model, chat_ids(tokenizer, q.messages), policy, Draws(seed + i, config.text.vocab_size), eos, max_tokens)
                for i, q in enumerate(questions)]
    lengths = [len(session.ids) for session in sessions]
    for _ in run_sessions(model, sessions, batch_size):
        pass  # what they did stands in the sessions
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
            points.append({"wrong": kind, "right": right, "steps": a_canvas(got, lambda a: a.total("steps")),
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


def evaluate_drafter(model: DiffusionGemma, tokenizer: TokenizerWrapper, drafter: Drafter, tasks: Sequence[Task], limit: int = 20,
                     seeds: Sequence[int] = range(5), max_tokens: int = 256, rules: DraftRules | None = None,
                     kinds: Iterable[str] = KINDS, drafters: Mapping[str, Drafter] | None = None,
                     progress: Callable[[str], None] | None = None) -> dict[str, Any]:
    """All of it, or some of the ``kinds``, as a record.  ``drafters`` are more of them by name, asked under the same rules.

    Errors: UserError for a drafter of another model, for nothing to ask, questions with images, one seed only,
    and a kind that is none.
    """
    kinds, rules = set(kinds), rules or DraftRules()
    questions = [question for task in tasks for question in task.questions(limit) if not question.choices]
    if any(question.images for question in questions):
        raise UserError("Drafters are measured on questions in text only; leave out those with images.")
    if not questions or len(seeds) < 2:
        raise UserError("At least one question that is answered in text and two seeds are needed.")
    if not kinds <= set(KINDS):
        raise UserError(f"Unknown part {sorted(kinds - set(KINDS))[0]!r}; known are {', '.join(KINDS)}.")
    base = ReferencePolicy.from_config(model.config.generation, coverage=1 - 1e-6)
    loose = replace(base, stability=0)
    firsts = [seed * 1_000_003 for seed in seeds]
    shares, results, runs = Shares.of(drafter.config, model.config), list[WayResult](), dict[str, list[list[Answered]]]()

    def run(name: str, policy_of: Callable[[int], Policy], offset: int = 0, free_steps: bool = False) -> None:
        runs[name] = []
        for number, first in enumerate(firsts):
            if progress:
                progress(f"{name}, seed {seeds[number]}")
            runs[name].append(answer(model, tokenizer, questions, policy_of(number), first + offset, max_tokens))
        results.append(way_result(name, runs[name], runs["reference"], shares, free_steps))

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
        limit_of = veto.surprise_limit or DraftRules.judge
        run("drafter, judge alone", lambda _: VetoPolicy(veto.base, veto.drafter, veto.watchdog, limit_of))
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
