"""The fields of ``GenerationOptions``, by the heading under which they are listed.

Each field has its default, its range and its help text; see ``option_fields``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_diffgemma.decoding.prefill import PREFILL_STEP_SIZE
from mlx_diffgemma.generation.option_fields import option
from mlx_diffgemma.sampling.penalties import MOST_PENALTY, MOST_REPETITION
from mlx_diffgemma.sampling.policy import MAX_TEMPERATURE
from mlx_diffgemma.sampling.rules import PRESETS, SAMPLERS

# The headings under which options are listed.
SAMPLING = "Sampling"
DENOISING = "Denoising"
RULE = "Rules"
CONSTRAINT = "Constraints"
DRAFTING = "Drafting"
IMAGES = "Images and videos"
MOST = 10_000  # a canvas keeps something for each step, so their number is bounded


def _number(policy: str, help: str, **description: Any) -> Any:
    """An option that replaces one of the checkpoint's numbers in the policy."""
    return option(None, help, DENOISING, policy=policy, **description)


def _rule(policy: str, help: str, **description: Any) -> Any:
    """An option for a rule that is off by default."""
    return option(None, help, RULE, policy=policy, rule=True, **description)


@dataclass(frozen=True)
class SamplingOptions:
    """Options that decide which tokens are drawn, and how many."""

    max_tokens: int | None = option(
        None,
        "Cut the answer after this many tokens. Default: until it ends, at most 4,096 or the "
        "context.",
        SAMPLING,
        letter="m",
        low=1,
    )
    temperature: float | None = option(
        None,
        "Randomness of the draw. 1, the default, is the checkpoint's schedule; T multiplies it; 0 "
        "takes the most probable token. Left to right ({mode} ar) the default is 0.",
        SAMPLING,
        name="temp",
        low=0,
        high=MAX_TEMPERATURE,
    )
    top_k: int = option(
        0,
        "Draw among the k most probable tokens; 0 is off.",
        SAMPLING,
        low=0,
        high=2**31 - 1,
    )
    top_p: float = option(
        1.0,
        "Draw among the most probable tokens that together have this probability; 1 is off.",
        SAMPLING,
        above=0,
        high=1,
    )
    seed: int | None = option(
        None, "The same seed gives the same text. Default: a fresh one.", SAMPLING
    )
    mode: str = option(
        "diffusion",
        "'diffusion' denoises canvases; 'ar' writes left to right with the same weights.",
        SAMPLING,
    )
    prefill_step_size: int = option(
        PREFILL_STEP_SIZE,
        "Positions of a prompt that are encoded at once.",
        SAMPLING,
        low=2,
    )
    min_p: float = option(
        0.0,
        "Draw among the tokens with at least this share of the largest probability; 0 is off.",
        SAMPLING,
        low=0,
        high=1,
    )
    repetition_penalty: float = option(
        1.0,
        "Divide the logits of tokens that the prompt or the answer to the left holds; 1 is off.",
        SAMPLING,
        above=0,
        high=MOST_REPETITION,
    )
    frequency_penalty: float = option(
        0.0,
        "Subtract this from a token's logit as often as the answer to the left holds the token; "
        "0 is off.",
        SAMPLING,
        low=-MOST_PENALTY,
        high=MOST_PENALTY,
    )
    presence_penalty: float = option(
        0.0,
        "Subtract this from the logits of tokens that the answer to the left holds; 0 is off.",
        SAMPLING,
        low=-MOST_PENALTY,
        high=MOST_PENALTY,
    )
    logit_bias: Mapping[Any, float] | None = option(
        None,
        "JSON object of token ids and what is added to their logits, between -100 and 100.",
        SAMPLING,
        text=True,
        json_type=dict[str, float],
    )


@dataclass(frozen=True)
class DenoisingOptions:
    """Options that decide how a canvas is denoised.  None means the checkpoint's own number."""

    max_denoising_steps: int | None = _number(
        "max_steps",
        "Stop a canvas after this many denoising steps. Default: the checkpoint's.",
        low=1,
        high=MOST,
    )
    entropy_bound: float | None = _number(
        "entropy_bound",
        "A step accepts the most certain positions while their entropies add up to at most this "
        "many nats. Default: the checkpoint's.",
        above=0,
    )
    t_min: float | None = _number(
        "t_min",
        "Temperature at the end of the schedule. Default: the checkpoint's.",
        low=0,
    )
    t_max: float | None = _number(
        "t_max",
        "Temperature at the start of the schedule. Default: the checkpoint's.",
        above=0,
    )
    confidence_threshold: float | None = _number(
        "confidence_threshold",
        "A canvas converges once its mean entropy is below this many nats. Default: the "
        "checkpoint's.",
        above=0,
    )
    stability_threshold: int | None = _number(
        "stability",
        "Require the argmax canvas to be unchanged for this many steps before it may converge; "
        "0 disables the check. Default: the checkpoint's.",
        low=0,
        high=MOST,
    )
    self_conditioning: str | None = option(
        None,
        "What a step sees of the step before: 'dense', the probabilities of the whole vocabulary, "
        "as the reference; 'sparse', those of the 64 most probable tokens where these hold "
        "{coverage} of the mass. Default: sparse.",
        DENOISING,
    )
    coverage: float | None = option(
        None,
        "Probability that the 64 most probable tokens must hold for self-conditioning to leave the "
        "others out. Default: 0.999999, which changes no token in practice; lower is faster and "
        "does.",
        DENOISING,
        above=0,
        high=1 - 1e-6,
    )


@dataclass(frozen=True)
class RuleOptions:
    """Rules that change the reference algorithm.  All are off by default."""

    preset: str | None = option(
        None,
        f"A set of rules: {', '.join(PRESETS)}; other options override it. What each costs and "
        "gains: docs/speed.md. Default: reference.",
        RULE,
    )
    diffusion_sampler: str | None = option(
        None,
        f"How a step chooses the tokens that it accepts: {' or '.join(SAMPLERS)}. Default: "
        f"{SAMPLERS[0]}.",
        RULE,
    )
    threshold: float | None = _rule(
        "threshold",
        "Probability from which the sampler confidence-threshold accepts a token. Default: 0.9.",
        above=0,
        high=1,
    )
    min_denoising_steps: int | None = _rule(
        "min_steps", "No canvas converges before this many steps. Default: 1.", low=1, high=MOST
    )
    temperature_steps: int | None = _rule(
        "temperature_steps",
        "The temperature falls over this many steps. Default: over {max_denoising_steps}.",
        low=1,
        high=MOST,
    )
    plateau: int | None = _rule(
        "plateau",
        "Give a canvas up when its mean entropy has not fallen for this many steps. Default: 0, "
        "off.",
        low=0,
        high=MOST,
    )
    drop_tail: int | None = _rule(
        "drop_tail",
        "Take the positions after an end token off the canvas once that token has been there for "
        "this many steps. Default: 0, off.",
        low=0,
        high=MOST,
    )
    canvas_length: int | str | None = _rule(
        "length",
        "Positions of a canvas: a number; 'growing', a quarter of the full canvas and then twice "
        "the last one; or 'fitting', the tokens that are still allowed, rounded up to eighths of "
        "the full canvas. Default: the full canvas.",
        text=True,
        low=1,
    )
    reroll_empty: int | None = _rule(
        "reroll_empty",
        "Try an empty first canvas again, at most this many times. Default: 0.",
        low=0,
        high=MOST,
    )
    retry_unconverged: int | None = _rule(
        "retry_unconverged",
        "Try a canvas that did not converge again, at most this many times. Default: 0.",
        low=0,
        high=MOST,
    )


@dataclass(frozen=True)
class ConstraintOptions:
    """Options that decide what the answer must be."""

    json_schema: Any = option(
        None,
        "The answer, or each hole, is JSON that this schema admits, whatever the model thinks: the "
        "name of a file, or the schema itself. See docs/structure.md.",
        CONSTRAINT,
        text=True,
    )
    regex: str | None = option(
        None,
        "The whole answer, or each hole, must match this regular expression of ECMA-262 "
        "(JavaScript's).",
        CONSTRAINT,
    )
    choices: Sequence[str] | None = option(
        None,
        "The answer, or each hole, is one of these texts, separated by commas.",
        CONSTRAINT,
        text=True,
        json_type=list[str],
    )
