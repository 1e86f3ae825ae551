"""Measures a drafter: configurations that answer the same questions under the same seeds.

The configurations are:

- the reference, and the reference under other seeds (the noise floor);
- a looser stop rule;
- the drafter, also under other rules and without its checks;
- drafts that need no drafter, and drafts that are wrong on purpose;
- decoding left to right;
- the oracle curve (:mod:`drafter.oracle`).

:mod:`drafter.measures` says how each is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from drafter.answers import answer, answer_causally
from drafter.baselines import (
    FixedDraft,
    JudgedPolicy,
    NgramDraft,
    UnverifiedPolicy,
    VetoPolicy,
    disturbed,
)
from drafter.drafter import Drafter
from drafter.measures import Answered, Shares, WayResult, way_result
from drafter.oracle import OTHER, oracle
from drafter.policy import DraftPolicy
from drafter.rules import DraftRules
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.evaluation.tasks import Question, Task
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.sampling.policy import ReferencePolicy
from mlx_diffgemma.sampling.protocols import Policy

LOOSE = 1e-9  # a gate that every guess passes
WRONG = (
    "random tokens",
    "all end tokens",
    "another's answer",
    "wrong everywhere",
    "right, from other seeds",
)
# These also run without verification, to show what verification prevents.
BELIEVED = ("all end tokens", "another's answer")
KINDS = ("drafter", "baselines", "wrong", "ar", "oracle")
MAX_CANVASES = 8  # the most canvases of an answer for which a wrong draft is made


@dataclass(frozen=True)
class EvaluationOptions:
    """What is measured.

    Attributes:
        limit: The most questions of a task.
        seeds: At least two.
        max_tokens: The most tokens of an answer.
        rules: The rules of the drafted canvases.
        kinds: The parts of the record, from ``KINDS``.
    """

    limit: int = 20
    seeds: Sequence[int] = (0, 1, 2, 3, 4)
    max_tokens: int = 256
    rules: DraftRules = field(default_factory=DraftRules)
    kinds: Sequence[str] = KINDS


def evaluate_drafter(
    model: DiffusionGemma,
    tokenizer: TokenizerWrapper,
    drafter: Drafter,
    tasks: Sequence[Task],
    options: EvaluationOptions | None = None,
    drafters: Mapping[str, Drafter] | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure a drafter.

    Args:
        model: The target.
        tokenizer: Its tokenizer.
        drafter: The drafter.
        tasks: What the target is asked; multiple choice is left out.
        options: What is measured.
        drafters: Further drafters by name, under the same rules.
        progress: Called with a line of text before each run.

    Returns:
        The record that ``draft evaluate`` writes.

    Raises:
        UserError: The drafter was made for another model, there is no question, a question has
            images, there is only one seed, or a kind is unknown.
    """
    options = options or EvaluationOptions()
    questions = _questions(tasks, options)
    evaluation = _Evaluation(model, tokenizer, drafter, questions, options, progress)
    evaluation.run("reference", evaluation.base)
    evaluation.run("drafter", evaluation.drafted())
    for name, other in (drafters or {}).items():
        evaluation.run(name, evaluation.drafted(drafter=other))
    if "drafter" in options.kinds:
        evaluation.run_other_rules()
    if "baselines" in options.kinds:
        evaluation.run_baselines()
    if "wrong" in options.kinds:
        evaluation.run_wrong_drafts()
    record: dict[str, Any] = {
        "questions": len(questions),
        "seeds": list(options.seeds),
        "shares": asdict(evaluation.shares),
        "rules": asdict(options.rules),
        "ways": [asdict(result) for result in evaluation.results],
    }
    if "ar" in options.kinds:
        record["ar"] = evaluation.left_to_right()
    if "oracle" in options.kinds:
        record["oracle"] = evaluation.oracle_curve()
    return record


def _questions(tasks: Sequence[Task], options: EvaluationOptions) -> list[Question]:
    """The questions, once everything that can be refused has been checked."""
    questions = []
    for task in tasks:
        questions += [q for q in task.questions(options.limit) if not q.choices]
    if any(question.images for question in questions):
        raise UserError(
            "Drafters are measured on questions in text only; leave out those with images."
        )
    if not questions or len(options.seeds) < 2:
        raise UserError("At least one question that is answered in text and two seeds are needed.")
    if unknown := sorted(set(options.kinds) - set(KINDS)):
        raise UserError(f"Unknown part {unknown[0]!r}; known are {', '.join(KINDS)}.")
    return questions


@dataclass
class _Evaluation:
    """The runs of one evaluation, with their results in order."""

    model: DiffusionGemma
    tokenizer: TokenizerWrapper
    drafter: Drafter
    questions: Sequence[Question]
    options: EvaluationOptions
    progress: Callable[[str], None] | None
    results: list[WayResult] = field(default_factory=list)
    reference: list[list[Answered]] = field(default_factory=list)

    def __post_init__(self) -> None:
        config = self.model.config
        self.base = ReferencePolicy.from_config(config.generation, coverage=1 - 1e-6)
        self.loose = replace(self.base, stability=0)
        # Question i of a run has the run's first seed + i.
        self.first_seeds = [seed * 1_000_003 for seed in self.options.seeds]
        self.shares = Shares.of(self.drafter.config, config)

    def tell(self, text: str) -> None:
        if self.progress:
            self.progress(text)

    def run(self, name: str, policy: Policy, offset: int = 0, free_steps: bool = False) -> None:
        """Answer all questions under every seed with one policy.  The arguments are those of
        ``run_each``.
        """
        self.run_each(name, [policy] * len(self.first_seeds), offset, free_steps)

    def run_each(
        self, name: str, policies: Sequence[Policy], offset: int = 0, free_steps: bool = False
    ) -> None:
        """Answer all questions under every seed.

        Args:
            name: The configuration in the record.  The first run is that of the reference.
            policies: The policy of each seed.
            offset: Added to all seeds.
            free_steps: Steps of the target cost nothing.
        """
        answers = []
        for seed, first, policy in zip(self.options.seeds, self.first_seeds, policies, strict=True):
            self.tell(f"{name}, seed {seed}")
            answers.append(
                answer(
                    self.model,
                    self.tokenizer,
                    self.questions,
                    policy,
                    first + offset,
                    self.options.max_tokens,
                )
            )
        self.reference = self.reference or answers
        self.results.append(way_result(name, answers, self.reference, self.shares, free_steps))

    def drafted(
        self, under: Policy | None = None, drafter: Drafter | None = None, **changes: Any
    ) -> DraftPolicy:
        """The policy ``under``, or the reference, with drafted canvases.

        Args:
            under: The base policy.  None: the reference.
            drafter: The drafter.  None: the one that is evaluated.
            changes: Changes to the rules.
        """
        rules = replace(self.options.rules, **changes)
        return (drafter or self.drafter).canvas(self.model, under or self.base, rules)

    def run_other_rules(self) -> None:
        """Run the drafter under other rules."""
        rules = self.options.rules
        if self.drafter.config.refinement:
            name = f"drafter, refine {'off' if rules.refine else 'on'}"
            self.run(name, self.drafted(refine=not rules.refine))
        name = f"drafter, handoff {'off' if rules.handoff else 'on'}"
        self.run(name, self.drafted(handoff=not rules.handoff))
        self.run("drafter, no judge", self.drafted(judge=None))
        self.run("drafter, gate 0.9", self.drafted(gate=0.9))
        self.run("drafter, looser stop", self.drafted(self.loose))

    def run_baselines(self) -> None:
        """Run the baselines that a drafter must beat."""
        base = self.base
        rules = self.options.rules
        self.run("reference, other seeds", base, OTHER)
        self.run("looser stop (stability 0)", self.loose)
        commits = UnverifiedPolicy(**{f.name: getattr(base, f.name) for f in fields(base)})
        unverified = self.drafted(commits, gate=LOOSE, judge=None, refine=False)
        self.run("drafter, not verified", unverified, free_steps=True)
        limit = rules.judge or DraftRules.judge
        open_gate = self.drafted(gate=LOOSE)
        veto = VetoPolicy(open_gate.base, open_gate.drafter, open_gate.watchdog, limit)
        self.run("drafter, judge alone", veto)
        judged = JudgedPolicy(base, FixedDraft({}), rules.watchdog, limit)
        self.run("no draft, judge", judged)
        ngram = DraftPolicy(base, NgramDraft(), rules.watchdog, rules.judge)
        self.run("n-gram draft", ngram)

    def run_wrong_drafts(self) -> None:
        """Run drafts that are wrong on purpose, and right ones from other seeds."""
        rng = np.random.default_rng(0)
        self.run("a random drafter", self.drafted(drafter=disturbed(self.drafter, 10.0)))
        self.run("the drafter, disturbed", self.drafted(drafter=disturbed(self.drafter, 0.3)))
        judge = self.options.rules.judge
        for name in WRONG:
            self.run_each(name, self._fixed_drafts(name, judge, rng))
            if name in BELIEVED:
                self.run_each(f"{name}, no judge", self._fixed_drafts(name, None, rng))

    def _fixed_drafts(
        self, name: str, judge: float | None, rng: np.random.Generator
    ) -> list[Policy]:
        """The policy of each seed, with the drafts that ``name`` describes.

        Args:
            name: One of ``WRONG``.
            judge: As in ``DraftRules``.
            rng: Where random tokens come from.
        """
        policies: list[Policy] = []
        for number, first in enumerate(self.first_seeds):
            known = {}
            for i in range(len(self.questions)):
                for index in range(MAX_CANVASES):
                    known[first + i, index] = self._wrong_draft(name, number, i, index, rng)
            drafts = FixedDraft(known)
            policies.append(DraftPolicy(self.base, drafts, self.options.rules.watchdog, judge))
        return policies

    def _wrong_draft(
        self, name: str, number: int, question: int, index: int, rng: np.random.Generator
    ) -> np.ndarray:
        """The draft of one canvas.

        Args:
            name: One of ``WRONG``.
            number: The index of the seed.
            question: The index of the question.
            index: The index of the canvas.
            rng: Where random tokens come from.

        Returns:
            Up to a canvas of ids.
        """
        config = self.model.config
        length = config.canvas_length
        vocabulary = config.text.vocab_size
        if name == "another's answer":
            return self.reference[number][(question + 1) % len(self.questions)].committed[0]
        if name == "all end tokens":
            return np.full(length, config.generation.eos_token_ids[0])
        if name == "random tokens":
            return rng.integers(0, vocabulary, length)
        committed = self.reference[number - 1][question].committed
        right = committed[index] if index < len(committed) else np.zeros(0, dtype=np.int32)
        if name == "right, from other seeds" or not right.size:
            return right
        return (np.resize(right, length) + rng.integers(1, vocabulary, length)) % vocabulary

    def left_to_right(self) -> list[dict[str, Any]]:
        """Answer left to right, without and with the drafter, at temperatures 0 and 1."""
        entries = []
        for temperature in (0.0, 1.0):
            for name, drafter in (("plain", None), ("drafted", self.drafter)):
                self.tell(f"left to right, {name}, temperature {temperature:g}")
                runs = [
                    answer_causally(
                        self.model,
                        self.tokenizer,
                        self.questions,
                        temperature,
                        first,
                        self.options.max_tokens,
                        drafter,
                    )
                    for first in self.first_seeds
                ]
                entry: dict[str, Any] = {"name": name, "temperature": temperature}
                for figure in runs[0]:
                    entry[figure] = float(np.mean([run[figure] for run in runs]))
                entries.append(entry)
        return entries

    def oracle_curve(self) -> list[dict[str, Any]]:
        """Measure what any draft could save, under the first seed."""
        return oracle(
            self.model,
            self.tokenizer,
            self.questions,
            self.base,
            self.first_seeds[0],
            self.options.max_tokens,
            self.drafter,
            self.progress,
        )
