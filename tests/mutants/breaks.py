"""The list of breaks.

A break replaces ``old``, which occurs once in ``file``, by ``new``.  ``tests`` are pytest's arguments for those that must
then fail; they should take seconds.  ``equivalent`` says why nothing can notice, where that is so.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Break:
    name: str
    file: str
    old: str
    new: str
    tests: str
    equivalent: str = ""


MODEL = "mlx_diffgemma/model.py"
SESSION = "mlx_diffgemma/session.py"
AR = "mlx_diffgemma/autoregressive.py"
ENGINE = "mlx_diffgemma/serving/engine.py"
SAMPLER = "mlx_diffgemma/sampler.py"
RUN = "mlx_diffgemma/evaluation/run.py"

BREAKS = (
    # Dtypes
    Break("embed-scale-float32", MODEL,
          "return mx.array(self.config.text.hidden_size**0.5, dtype=self.dtype)",
          "return mx.array(self.config.text.hidden_size**0.5, dtype=mx.float32)",
          "tests/test_dtypes.py"),
    Break("self-conditioning-unrounded", "mlx_diffgemma/conditioning.py",
          "return scaled.astype(model.dtype).astype(mx.float32)",
          "return scaled.astype(mx.float32)",
          "tests/test_dtypes.py"),
    Break("pooled-vision-unrounded", "mlx_diffgemma/vision.py",
          "pooled = squares.mean(axis=(1, 3)).astype(x.dtype).astype(mx.float32)",
          "pooled = squares.mean(axis=(1, 3)).astype(mx.float32)",
          "tests/test_dtypes.py"),
    # The loop
    Break("passes-kept", SESSION,
          "self.retry = self.steps = self.rows = self.passes = self.judged = self.judged_rows = 0",
          "self.retry = self.steps = self.rows = self.judged = self.judged_rows = 0",
          "tests/test_session.py"),
    Break("judged-rows-kept", SESSION,
          "self.retry = self.steps = self.rows = self.passes = self.judged = self.judged_rows = 0",
          "self.retry = self.steps = self.rows = self.passes = self.judged = 0",
          "tests/test_session.py"),
    Break("ar-noise", AR,
          "u = [s.draws.step(0, 0, 0, len(s.tokens), count).u",
          "u = [s.draws.step(0, 0, 0, 0, count).u",
          "tests/test_generate.py -k random_number"),
    # Evaluation
    Break("bootstrap-axis", RUN,
          "choice(scores, (rounds, scores.size)).mean(axis=1)",
          "choice(scores, (rounds, scores.size)).mean(axis=0)",
          "tests/test_evaluate.py -k intervals"),
    Break("bootstrap-axis-of-drafters", "drafter/measures.py",
          "means = losses[rng.integers(0, losses.size, (RESAMPLES, losses.size))].mean(axis=1)",
          "means = losses[rng.integers(0, losses.size, (RESAMPLES, losses.size))].mean(axis=0)",
          "tests/drafter/test_evaluation.py -k interval"),
    Break("neighbours-share-seeds", RUN,
          "READS * number)",
          "number)",
          "tests/test_evaluate.py -k seeds"),
    Break("seeds-of-a-question-are-independent", RUN,
          "means = scores.reshape(-1, questions).mean(axis=0)",
          "means = scores",
          "tests/test_evaluate.py -k seeds"),
)
