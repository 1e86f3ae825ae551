"""The sampling parameters of a checkpoint (generation_config.json).

>>> GenerationConfig.from_folder(folder, config_json).eos_token_ids
(1, 106, 50)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_diffgemma.errors import UserError
from mlx_diffgemma.files import read_json
from mlx_diffgemma.values import Values

CONFIG = "config.json"
GENERATION = "generation_config.json"
SAMPLER = "EntropyBoundSamplerConfig"
MOST_STEPS = 10_000  # more denoising steps are a mistake: a canvas keeps records of each step


@dataclass(frozen=True)
class GenerationConfig:
    """The sampling parameters of the reference algorithm, with its defaults.

    ``entropy_bound`` and ``confidence_threshold`` are in nats.
    """

    max_denoising_steps: int = 48
    entropy_bound: float = 0.1
    t_min: float = 0.4
    t_max: float = 0.8
    confidence_threshold: float = 0.005
    stability_threshold: int = 1
    eos_token_ids: tuple[int, ...] = (1, 106, 50)
    pad_token_id: int = 0

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> GenerationConfig:
        """Read generation_config.json.

        null means absent, because transformers writes it for every unset field.

        Raises:
            UserError: A value is of the wrong kind, or the sampler is unknown.
        """
        values = Values(raw, GENERATION)
        sampler = values.part("sampler_config")
        name = sampler.text("_cls_name", SAMPLER)
        if name != SAMPLER:
            raise UserError(
                f"generation_config.json asks for the sampler {name!r}; only {SAMPLER} is known."
            )
        default = cls()
        config = cls(
            max_denoising_steps=values.integer(
                "max_denoising_steps", default.max_denoising_steps, 1, MOST_STEPS
            ),
            entropy_bound=sampler.number("entropy_bound", default.entropy_bound, low=0.0),
            t_min=values.number("t_min", default.t_min, low=0.0),
            t_max=values.number("t_max", default.t_max, low=0.0),
            confidence_threshold=values.number(
                "confidence_threshold", default.confidence_threshold, low=0.0
            ),
            stability_threshold=values.integer(
                "stability_threshold", default.stability_threshold, 0, MOST_STEPS
            ),
            eos_token_ids=_end_tokens(values) or default.eos_token_ids,
            pad_token_id=values.integer("pad_token_id", default.pad_token_id, low=0),
        )
        if config.t_min > config.t_max:
            raise UserError(
                f"generation_config.json: t_min {config.t_min:g} exceeds t_max {config.t_max:g}; "
                "the temperature falls from t_max to t_min."
            )
        return config

    @classmethod
    def from_folder(cls, folder: Path, config: Mapping[str, Any]) -> GenerationConfig:
        """Read the sampling parameters of a checkpoint.

        They are in generation_config.json, or in the copy that some conversions keep in ``config``
        (config.json).  Without either, the defaults apply, with the end tokens of config.json, as
        in transformers.
        """
        path = folder / GENERATION
        if path.exists():
            return cls.from_dict(read_json(path))
        values = Values(config, CONFIG)
        if values.has("generation_config"):
            return cls.from_dict(values.part("generation_config").content)
        ends = _end_tokens(values) or _end_tokens(values.part("text_config"))
        return replace(cls(), eos_token_ids=ends) if ends else cls()


def _end_tokens(values: Values) -> tuple[int, ...]:
    """eos_token_id, which is one id or a list of them; empty when it is absent."""
    value = values.content.get("eos_token_id")
    if value is None:
        return ()
    ids = value if isinstance(value, list | tuple) else [value]
    if not ids or not all(_is_token(token) for token in ids):
        raise values.refuse("eos_token_id", "a token id or a list of token ids")
    return tuple(ids)


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31
