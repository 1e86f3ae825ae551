"""What may be asked of a generation: ``GenerationOptions``, from which command line and server take theirs."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from mlx_diffgemma.config import GenerationConfig
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.grammar.constraint import check_constraint
from mlx_diffgemma.images import check_budget
from mlx_diffgemma.model import DiffusionGemma
from mlx_diffgemma.penalties import Penalties, penalties_of
from mlx_diffgemma.policy import ReferencePolicy, check_coverage, check_sampling
from mlx_diffgemma.rules import PRESETS, SAMPLERS, ConfidencePolicy, RulesPolicy
from mlx_diffgemma.session import PREFILL_STEP_SIZE

MODES = ("diffusion", "ar")
DEFAULT_TOKEN_LIMIT = 4096
DEFAULT_COVERAGE = 1 - 1e-6  # moved no token of 1,512 answers, see docs/speed.md

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
class GenerationOptions:
    """Every option of a generation with its default; the command line and other front ends take theirs from here.

    None means the checkpoint's own number.  ``temperature``: in diffusion mode None or 1 is the checkpoint's schedule, T
    scales it, 0 takes the argmax in place of the draw; in ar mode None or 0 is greedy.  ``max_tokens`` None: until the end
    token, at most 4,096 or the context.  ``seed`` None: a fresh one, told in the response.  ``self_conditioning`` None or
    "sparse": from the 64 most probable tokens where these hold ``coverage`` of the mass (None: 1 - 1e-6), over the whole
    vocabulary elsewhere; "dense": over the whole vocabulary everywhere, as the reference.

    ``preset`` names a set of rules (see ``rules.PRESETS``) that other options override.  ``diffusion_sampler`` is "entropy-bound",
    the reference, or "confidence-threshold" with its ``threshold``.  The options after it are the rules of
    ``rules.RulesPolicy``, all off by default.  ``num_draft_tokens``: how many tokens a ``draft_model`` may propose at once with
    ``mode="ar"``; None: as many as its blocks hold.  ``image_tokens``: how many soft tokens an image may take (70, 140, 280, 560
    or 1,120); None: the checkpoint's number, and 70 for each frame of a video.

    ``min_p`` keeps tokens with at least that share of the largest probability.  ``repetition_penalty``, ``frequency_penalty``,
    ``presence_penalty`` and ``logit_bias`` (token ids to numbers) act on the logits (see :mod:`mlx_diffgemma.penalties`).

    ``json_schema`` (an object, or its text), ``regex`` or ``choices`` (texts): the answer is one that these admit, whatever the
    model thinks (docs/structure.md); what stands in ``prefix`` is taken as its begin.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    mode: str = "diffusion"
    max_denoising_steps: int | None = None
    entropy_bound: float | None = None
    t_min: float | None = None
    t_max: float | None = None
    confidence_threshold: float | None = None
    stability_threshold: int | None = None
    self_conditioning: str | None = None
    coverage: float | None = None
    preset: str | None = None
    diffusion_sampler: str | None = None
    threshold: float | None = None
    min_denoising_steps: int | None = None
    temperature_steps: int | None = None
    plateau: int | None = None
    drop_tail: int | None = None
    canvas_length: int | str | None = None
    reroll_empty: int | None = None
    retry_unconverged: int | None = None
    num_draft_tokens: int | None = None
    image_tokens: int | None = None
    json_schema: Any = None
    regex: str | None = None
    choices: Sequence[str] | None = None
    prefill_step_size: int = PREFILL_STEP_SIZE
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[Any, float] | None = None

    @classmethod
    def from_keywords(cls, keywords: dict[str, Any]) -> GenerationOptions:
        """Errors: UserError naming an unknown keyword, or one of mlx-lm's that has no meaning here."""
        known = [f.name for f in fields(cls)]
        for name in keywords:
            if name in REFUSED:
                raise UserError(f"{name}= is not supported: {REFUSED[name]}.")
            if name not in known:
                close = difflib.get_close_matches("temperature" if name == "temp" else name, known, n=1)
                raise UserError(f"Unknown option {name!r}{f'; did you mean {close[0]!r}?' if close else ''} "
                                f"Known are {', '.join(known)}.")
        return cls(**keywords)

    def __post_init__(self) -> None:
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
        check_sampling(1.0 if self.temperature is None else self.temperature, self.top_k, self.top_p, self.min_p)
        if self.self_conditioning not in (None, "sparse", "dense"):
            raise UserError(f"Unknown self_conditioning {self.self_conditioning!r}; use 'sparse' or 'dense'.")
        if self.coverage is not None:
            if self.self_conditioning == "dense":
                raise UserError("coverage has no meaning with dense self-conditioning; leave one of them out.")
            check_coverage(self.coverage)
        for name, known in (("preset", tuple(PRESETS)), ("diffusion_sampler", SAMPLERS)):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise UserError(f"Unknown {name} {value!r}; use one of {', '.join(known)}.")
        confidence = self.chosen("diffusion_sampler") == "confidence-threshold"
        if self.threshold is not None and not confidence:
            raise UserError("threshold belongs to the sampler 'confidence-threshold'; choose that or leave it out.")
        if self.entropy_bound is not None and confidence:
            raise UserError("entropy_bound has no meaning with the sampler 'confidence-threshold'; leave one of them out.")
        # Numbers out of range are refused here; what depends on the checkpoint's numbers, in ``policy``.
        self._policy(GenerationConfig(max_denoising_steps=10**9, t_min=1e-9, t_max=1e9))
        if self.mode == "ar" and (diffusion := [name for name in DIFFUSION_ONLY if getattr(self, name) is not None]):
            raise UserError(f"{diffusion[0]} has no meaning with mode 'ar', which runs no denoising steps; leave it out.")
        if self.constraints:
            if self.mode == "ar":
                raise UserError(f"{next(iter(self.constraints))} constrains canvases; leave it out with mode 'ar'.")
            check_constraint(**self.constraints)

    @property
    def constraints(self) -> dict[str, Any]:
        """Those of json_schema, regex and choices that were given."""
        return {name: getattr(self, name) for name in CONSTRAINTS if getattr(self, name) is not None}

    @property
    def penalties(self) -> Penalties | None:
        """None where they are neutral."""
        return penalties_of(self.repetition_penalty, self.frequency_penalty, self.presence_penalty, self.logit_bias)

    def chosen(self, name: str) -> Any:
        """The option itself, or what the preset says, or None."""
        own = getattr(self, name)
        return PRESETS[self.preset].get(name) if own is None and self.preset is not None else own

    def policy(self, model: DiffusionGemma) -> ReferencePolicy:
        """The policy of these options, with the checkpoint's numbers where they name none.  Errors: UserError."""
        length, full = self.chosen("canvas_length"), model.config.canvas_length
        if length is not None and not isinstance(length, str) and length > full:
            raise UserError(f"canvas_length {length} exceeds the {full} positions this checkpoint was made for.")
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
        own |= {"temperature": 1.0 if self.chosen("temperature") is None else self.chosen("temperature"), "top_k": self.top_k,
                "top_p": self.top_p, "min_p": self.min_p, "penalties": self.penalties, "coverage": coverage}
        if self.chosen("diffusion_sampler") == "confidence-threshold":
            kind: type[ReferencePolicy] = ConfidencePolicy
        else:
            kind = RulesPolicy if any(name in own for name in RULES.values()) else ReferencePolicy
        policy: ReferencePolicy = kind.from_config(config, **own)
        return policy


# Names of options, and of what they set in the policy.
NUMBERS = {"max_denoising_steps": "max_steps", "entropy_bound": "entropy_bound", "t_min": "t_min", "t_max": "t_max",
           "confidence_threshold": "confidence_threshold", "stability_threshold": "stability"}
RULES = {"threshold": "threshold", "min_denoising_steps": "min_steps", "temperature_steps": "temperature_steps",
         "plateau": "plateau", "drop_tail": "drop_tail", "canvas_length": "length", "reroll_empty": "reroll_empty",
         "retry_unconverged": "retry_unconverged"}
POLICY_FIELDS = NUMBERS | RULES
COUNTS = ("max_denoising_steps", "stability_threshold", "min_denoising_steps", "temperature_steps", "plateau", "drop_tail",
          "reroll_empty", "retry_unconverged", "num_draft_tokens")  # a canvas keeps something for each of so many
MOST = 10_000
DIFFUSION_ONLY = (*POLICY_FIELDS, "self_conditioning", "coverage", "preset", "diffusion_sampler")
PENALTIES = ("repetition_penalty", "frequency_penalty", "presence_penalty", "logit_bias")
CONSTRAINTS = ("json_schema", "regex", "choices")
