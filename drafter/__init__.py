"""The small diffusion drafter: guesses whole blocks and canvases for DiffusionGemma, which checks them.

    >>> from drafter import load_drafter
    >>> model, tokenizer = mlx_diffgemma.load("nano")
    >>> generate(model, tokenizer, prompt, draft_model=load_drafter("nano-drafter", model))
"""

from drafter.canvas import DraftRules
from drafter.config import DrafterConfig
from drafter.loading import load_drafter, save_drafter
from drafter.model import Drafter

__all__ = ["DraftRules", "Drafter", "DrafterConfig", "load_drafter", "save_drafter"]
