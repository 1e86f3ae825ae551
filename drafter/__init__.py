"""The small diffusion drafter: guesses whole blocks for DiffusionGemma, which checks them.

    >>> from drafter import load_drafter
    >>> model, tokenizer = mlx_diffgemma.load("mlx-community/diffusiongemma-26B-A4B-it-4bit")
    >>> generate(model, tokenizer, prompt, mode="ar", draft_model=load_drafter("my-drafter", model))
"""

from drafter.config import DrafterConfig
from drafter.loading import load_drafter, save_drafter
from drafter.model import Drafter

__all__ = ["Drafter", "DrafterConfig", "load_drafter", "save_drafter"]
