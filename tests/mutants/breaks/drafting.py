"""Breaks of drafters: canvases, training, measures."""

from tests.mutants.entry import Break

CANVAS = "drafter/canvas.py"
POLICY = "drafter/policy.py"
TRAINING = "drafter/training.py"

BREAKS = (
    Break(
        "bootstrap-axis-of-drafters",
        "drafter/measures.py",
        "means = losses[rng.integers(0, losses.size, (RESAMPLES, losses.size))].mean(axis=1)",
        "means = losses[rng.integers(0, losses.size, (RESAMPLES, losses.size))].mean(axis=0)",
        "tests/drafter/test_evaluation.py -k interval",
    ),
    Break(
        "trust-not-scaled",
        CANVAS,
        "needed = self.rules.trust * rows / open_canvas(session).length",
        "needed = self.rules.trust",
        "tests/drafter/test_canvas.py -k trust",
    ),
    Break(
        "unsure-positions-drafted",
        CANVAS,
        "ids = mx.where(sure, self.head.tokens(best), _canvas(session))",
        "ids = self.head.tokens(best)",
        "tests/drafter/test_canvas.py -k not_sure",
    ),
    Break(
        "accepted-positions-refined",
        CANVAS,
        "sure = (confidence >= self.rules.gate) & ~accepted",
        "sure = confidence >= self.rules.gate",
        "tests/drafter/test_canvas.py -k refining",
    ),
    Break(
        "watchdog-one-step-late",
        POLICY,
        "if reason is None and context.drafted and context.steps >= self.watchdog:",
        "if reason is None and context.drafted and context.steps > self.watchdog:",
        "tests/drafter/test_canvas.py -k watchdog",
    ),
    Break(
        "surprising-drafts-converge",
        POLICY,
        '            reason = "judge" if reason else None\n',
        "",
        "tests/drafter/test_canvas.py -k TestJudge",
    ),
    Break(
        "drafted-attempts-are-retries",
        POLICY,
        "before = replace(context, retry=context.retry - context.drafts)",
        "before = standing",
        "tests/drafter/test_canvas.py -k not_those",
    ),
    Break(
        "draft-of-a-prefix-one-token-late",
        "mlx_diffgemma/decoding/session.py",
        "prefix = self.verdict.ids[: rejected[0]] if rejected.size else self.verdict.ids",
        "prefix = self.verdict.ids[: rejected[0] + 1] if rejected.size else self.verdict.ids",
        "tests/drafter/test_canvas.py -k before_the_first",
    ),
    Break(
        "tokens-outside-the-head-are-the-first",
        TRAINING,
        "        drafted = weights * (labels >= 0)\n",
        "        drafted = weights\n",
        "tests/drafter/test_training.py -k outside",
    ),
)
