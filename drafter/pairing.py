"""Whether a drafter belongs to a target model and its tokenizer."""

from __future__ import annotations

import hashlib
import json

from mlx_lm.tokenizer_utils import TokenizerWrapper

from drafter.config import DrafterConfig
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.tuning.adapters import model_fingerprint


def check_pairing(config: DrafterConfig, target: DiffusionGemma, name: str = "The drafter") -> None:
    """Check that a drafter was made for a target.

    Args:
        config: The drafter's configuration.
        target: The target.
        name: The drafter's name in errors.

    Raises:
        UserError: It was made for another target; the error names the difference.
    """
    text = target.config.text
    for what, drafts, has in (
        ("hidden size", config.hidden_size, text.hidden_size),
        ("vocabulary", config.vocab_size, text.vocab_size),
        ("number of target layers", config.num_target_layers, len(text.layers)),
    ):
        if drafts != has:
            raise UserError(
                f"{name} does not fit this model: it was made for a {what} of {drafts:,}, this one has {has:,}."
            )
    if (wanted := config.target.get("fingerprint")) and wanted != model_fingerprint(target):
        raise UserError(
            f"{name} was trained for another model than this one ({config.target.get('name', 'not named')})."
        )


def tokenizer_fingerprint(tokenizer: TokenizerWrapper) -> str:
    """SHA-256 over the vocabulary: the text of every id, in order."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()
