"""Small diffusion drafters: they propose blocks and canvases, which DiffusionGemma verifies.

>>> from drafter import load_drafter
>>> model, tokenizer = mlx_diffgemma.load("nano")
>>> generate(model, tokenizer, prompt, draft_model=load_drafter("nano-drafter", model))
"""

from drafter.config import DrafterConfig
from drafter.drafter import Drafter
from drafter.loading import load_drafter, save_drafter
from drafter.rules import DraftRules

__all__ = ["DraftRules", "Drafter", "DrafterConfig", "load_drafter", "save_drafter"]
