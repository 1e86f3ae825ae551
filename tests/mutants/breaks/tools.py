"""Breaks of what measures and judges: evaluation, costs, doctor, parity, Metal's rules, failures."""

from tests.mutants.entry import Break

RUN = "mlx_diffgemma/evaluation/run.py"
TASKS = "mlx_diffgemma/evaluation/tasks.py"
SUDOKU = "mlx_diffgemma/evaluation/sudoku.py"
COST = "mlx_diffgemma/estimate/cost.py"
ESTIMATE = "mlx_diffgemma/estimate/estimate.py"
MACS = "mlx_diffgemma/estimate/macs.py"
DOCTOR = "mlx_diffgemma/diagnostics/doctor.py"
SELFCHECK = "mlx_diffgemma/diagnostics/operations/checks.py"
COMPARE = "mlx_diffgemma/diagnostics/stages.py"
METAL = "tests/metal/rules.py"
FAILURES = "mlx_diffgemma/failures.py"
DEVICE = "mlx_diffgemma/device.py"
MACHINE = "mlx_diffgemma/machine.py"

BREAKS = (
    Break(
        "bootstrap-axis",
        RUN,
        "choice(scores, (rounds, scores.size)).mean(axis=1)",
        "choice(scores, (rounds, scores.size)).mean(axis=0)",
        "tests/test_evaluate.py -k intervals",
    ),
    Break(
        "neighbours-share-seeds",
        RUN,
        "READS * number,",
        "number,",
        "tests/test_evaluate.py -k seeds",
    ),
    Break(
        "seeds-of-a-question-are-independent",
        RUN,
        "means = scores.reshape(-1, questions).mean(axis=0)",
        "means = scores",
        "tests/test_evaluate.py -k seeds",
    ),
    Break(
        "keys-without-values",
        COST,
        "entry = 2 * layer.num_kv_heads * layer.head_dim * element_size",
        "entry = layer.num_kv_heads * layer.head_dim * element_size",
        "tests/test_cost.py -k cache",
    ),
    Break(
        "every-expert-is-read",
        ESTIMATE,
        "touched = experts * (1 - (1 - share) ** config.canvas_length)",
        "touched = experts",
        "tests/test_estimate.py -k short_canvas",
    ),
    Break(
        "smallest-recipe-first",
        MACS,
        "    for name in LADDER:\n",
        "    for name in reversed(LADDER):\n",
        "tests/test_macs.py -k TestFit",
    ),
    Break(
        "doctor-looks-at-the-first-kind",
        DOCTOR,
        "            all(check.ok for check in self.checks)\n            and all(way.ok for way in self.ways)\n",
        "            all(check.ok for check in self.checks)\n",
        "tests/test_doctor.py -k is_enough",
    ),
    Break(
        "nan-is-near",
        SELFCHECK,
        "return Result(self.section, name, bool(error <= bound), error, bound)",
        "return Result(self.section, name, not error > bound, error, bound)",
        "tests/test_selfcheck.py -k infinite or fault",
    ),
    Break(
        "errors-of-nan-pass",
        COMPARE,
        "beyond = ~(errors <= np.maximum(2e-5, allowed))",
        "beyond = errors > np.maximum(2e-5, allowed)",
        "tests/parity/test_judge.py -k held_against",
        "a NaN makes the median of all rows NaN, which is within no bound",
    ),
    Break(
        "metal-scatters-64-bits",
        METAL,
        'if name.startswith("Scatter") and dtype in ("int64", "uint64"):',
        'if name.startswith("Scatter") and dtype in ("uint64",):',
        "tests/metal/test_recorder.py -k scatter",
    ),
    Break(
        "metal-operations-without-a-rule",
        METAL,
        '        return "tests/metal/rules.py has no rule for this operation; add one"\n',
        "        return None\n",
        "tests/metal/test_recorder.py -k rule",
    ),
    Break(
        "defects-are-mistakes-of-users",
        FAILURES,
        "        DEFECT,\n    )",
        "        USER,\n    )",
        "tests/test_failures.py -k one_line or defect",
    ),
    Break(
        "full-disk-is-a-defect",
        FAILURES,
        "UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)",
        "UNWRITABLE = (errno.EDQUOT, errno.EIO, errno.EROFS)",
        "tests/test_failures.py -k one_line",
    ),
    Break(
        "memory-limit-passed-by-one",
        DEVICE,
        "    if needed <= limit:\n",
        "    if needed <= 2 * limit:\n",
        "tests/test_device.py tests/test_weights.py -k limit or memory",
    ),
)
