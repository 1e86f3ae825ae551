"""The options of a generation: ``GenerationOptions``.

The command line and the server make their options from it.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

from mlx_diffgemma.errors import UserError
from mlx_diffgemma.generation.option_fields import described, option
from mlx_diffgemma.generation.option_groups import (
    CONSTRAINT,
    DRAFTING,
    IMAGES,
    MOST,
    ConstraintOptions,
    DenoisingOptions,
    RuleOptions,
    SamplingOptions,
)
from mlx_diffgemma.grammar.constraint import check_constraint
from mlx_diffgemma.media.images import check_budget
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.model.generation_config import GenerationConfig
from mlx_diffgemma.sampling.penalties import (
    Penalties,
    penalties_of,
)
from mlx_diffgemma.sampling.policy import (
    ReferencePolicy,
    check_coverage,
    check_sampling,
)
from mlx_diffgemma.sampling.rules import PRESETS, SAMPLERS, ConfidencePolicy, RulesPolicy

MODES = ("diffusion", "ar")
DEFAULT_TOKEN_LIMIT = 4096
DEFAULT_COVERAGE = 1 - 1e-6  # changed no token of 1,512 answers, see docs/speed.md

# Keywords of mlx_lm that mean nothing here, and why.
REFUSED = {
    "sampler": "a canvas is drawn as a whole; use temperature, top_k, top_p or policy",
    "logits_processors": "they read the tokens to the left, which a canvas does not have yet; use logit_bias and penalties",
    "max_kv_size": "the reference's sliding layers keep exactly their window",
    "kv_bits": "quantised caches break this family, whose attention scale is 1",
    "kv_group_size": "quantised caches break this family, whose attention scale is 1",
    "quantized_kv_start": "quantised caches break this family, whose attention scale is 1",
    "input_embeddings": "a prompt is text, ids and images=",
    "image": "give a list, images=[…]",
}


@dataclass(frozen=True)
class GenerationOptions(ConstraintOptions, RuleOptions, DenoisingOptions, SamplingOptions):
    """Every option of a generation with its default, its range and its help text.

    The command line and the server make their own options from these fields.  None means the
    checkpoint's own number; a ``seed`` of None is a fresh one, which the response names.
    ``preset`` names a set of rules (see ``rules.PRESETS``) that other options override.
    """

    num_draft_tokens: int | None = option(
        None,
        "Tokens that the drafter may guess at once, left to right. Default: as many as its blocks "
        "hold.",
        DRAFTING,
        low=1,
        high=MOST,
    )
    image_tokens: int | None = option(
        None,
        "Soft tokens an image may take: 70, 140, 280, 560 or 1120; more see finer. "
        "Default: the checkpoint's number, 70 for a frame of a video.",
        IMAGES,
    )

    @classmethod
    def from_keywords(cls, keywords: dict[str, Any]) -> GenerationOptions:
        """Make the options from keywords.

        Raises:
            UserError: A keyword is unknown, or is one of mlx-lm's that has no meaning here.  The
                message names it.
        """
        known = [f.name for f in fields(cls)]
        for name in keywords:
            if name in REFUSED:
                raise UserError(f"{name}= is not supported: {REFUSED[name]}.")
            if name not in known:
                close = difflib.get_close_matches(
                    "temperature" if name == "temp" else name, known, n=1
                )
                raise UserError(
                    f"Unknown option {name!r}{f'; did you mean {close[0]!r}?' if close else '.'} "
                    f"Known are {', '.join(known)}."
                )
        return cls(**keywords)

    def __post_init__(self) -> None:
        self._check_numbers()
        if self.mode not in MODES:
            raise UserError(f"Unknown mode {self.mode!r}; use one of {', '.join(MODES)}.")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UserError(f"max_tokens must be at least 1, got {self.max_tokens}.")
        if self.num_draft_tokens is not None and self.num_draft_tokens < 1:
            raise UserError(f"num_draft_tokens must be at least 1, got {self.num_draft_tokens}.")
        if self.prefill_step_size < 2:
            raise UserError(f"prefill_step_size must be at least 2, got {self.prefill_step_size}.")
        for name in COUNTS:
            value = getattr(self, name)
            if isinstance(value, int) and value > MOST:
                raise UserError(f"{name} must be at most {MOST:,}, got {value:,}.")
        if self.image_tokens is not None:
            check_budget(self.image_tokens)
        check_sampling(
            1.0 if self.temperature is None else self.temperature,
            self.top_k,
            self.top_p,
            self.min_p,
        )
        if self.self_conditioning not in (None, "sparse", "dense"):
            raise UserError(
                f"Unknown self_conditioning {self.self_conditioning!r}; use 'sparse' or 'dense'."
            )
        if self.coverage is not None:
            if self.self_conditioning == "dense":
                raise UserError(
                    "coverage has no meaning with dense self-conditioning; leave one of them out."
                )
            check_coverage(self.coverage)
        for name, known in (("preset", tuple(PRESETS)), ("diffusion_sampler", SAMPLERS)):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise UserError(f"Unknown {name} {value!r}; use one of {', '.join(known)}.")
        confidence = self.chosen("diffusion_sampler") == "confidence-threshold"
        if self.threshold is not None and not confidence:
            raise UserError(
                "threshold belongs to the sampler 'confidence-threshold'; choose that or leave it out."
            )
        if self.entropy_bound is not None and confidence:
            raise UserError(
                "entropy_bound has no meaning with the sampler 'confidence-threshold'; leave one of them out."
            )
        # Numbers out of range are refused here.  ``policy`` checks what depends on the checkpoint's
        # numbers.
        self._policy(GenerationConfig(max_denoising_steps=10**9, t_min=1e-9, t_max=1e9))
        if self.mode == "ar" and (
            diffusion := [name for name in DIFFUSION_ONLY if getattr(self, name) is not None]
        ):
            raise UserError(
                f"{diffusion[0]} has no meaning with mode 'ar', which runs no denoising steps; leave it out."
            )
        if self.constraints:
            if self.mode == "ar":
                raise UserError(
                    f"{next(iter(self.constraints))} constrains canvases; leave it out with mode 'ar'."
                )
            check_constraint(**self.constraints)

    def _check_numbers(self) -> None:
        """Raises UserError for what is no number where one is wanted."""
        for name, own in DESCRIBED.items():
            value = getattr(self, name)
            has_range = (own.low, own.high, own.above) != (None, None, None)
            if value is None or not has_range or (own.text and isinstance(value, str)):
                continue
            if isinstance(value, bool) or not isinstance(value, Real):
                raise UserError(f"{name} must be a number, got {value!r}.")

    @property
    def constraints(self) -> dict[str, Any]:
        """The constraints that were given: json_schema, regex or choices."""
        return {
            name: getattr(self, name) for name in CONSTRAINTS if getattr(self, name) is not None
        }

    @property
    def penalties(self) -> Penalties | None:
        """The penalties, or None if all are neutral."""
        return penalties_of(
            self.repetition_penalty, self.frequency_penalty, self.presence_penalty, self.logit_bias
        )

    def chosen(self, name: str) -> Any:
        """The value of the option, or else the preset's, or None."""
        own = getattr(self, name)
        return PRESETS[self.preset].get(name) if own is None and self.preset is not None else own

    def policy(self, model: DiffusionGemma) -> ReferencePolicy:
        """The policy of these options, with the checkpoint's numbers for options that are None.

        Raises:
            UserError: An option does not fit the checkpoint's numbers.
        """
        length, full = self.chosen("canvas_length"), model.config.canvas_length
        if length is not None and not isinstance(length, str) and length > full:
            raise UserError(
                f"canvas_length {length} exceeds the {full} positions this checkpoint was made for."
            )
        policy = self._policy(model.config.generation)
        if policy.penalties:
            policy.penalties.check_vocabulary(model.config.text.vocab_size)
        return policy

    def _policy(self, config: GenerationConfig) -> ReferencePolicy:
        coverage = self.chosen("coverage")
        if self.self_conditioning == "dense":
            coverage = None
        elif coverage is None:
            coverage = DEFAULT_COVERAGE
        named = {field: self.chosen(name) for name, field in POLICY_FIELDS.items()}
        own = {field: value for field, value in named.items() if value is not None}
        own |= {
            "temperature": 1.0
            if self.chosen("temperature") is None
            else self.chosen("temperature"),
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "penalties": self.penalties,
            "coverage": coverage,
        }
        if self.chosen("diffusion_sampler") == "confidence-threshold":
            kind: type[ReferencePolicy] = ConfidencePolicy
        else:
            kind = RulesPolicy if any(name in own for name in RULES.values()) else ReferencePolicy
        policy: ReferencePolicy = kind.from_config(config, **own)
        return policy


DESCRIBED = described(GenerationOptions)
# Names of options, and of what they set in the policy.
POLICY_FIELDS = {name: own.policy for name, own in DESCRIBED.items() if own.policy}
RULES = {name: own.policy for name, own in DESCRIBED.items() if own.policy and own.rule}
COUNTS = tuple(name for name, own in DESCRIBED.items() if own.high == MOST)
DIFFUSION_ONLY = (*POLICY_FIELDS, "self_conditioning", "coverage", "preset", "diffusion_sampler")
PENALTIES = ("repetition_penalty", "frequency_penalty", "presence_penalty", "logit_bias")
CONSTRAINTS = tuple(name for name, own in DESCRIBED.items() if own.group == CONSTRAINT)
