"""The facade of a drafter: the network, and what decoding asks of it."""

from __future__ import annotations

from drafter.canvas import CanvasDraft
from drafter.causal import CausalDraft
from drafter.config import DrafterConfig
from drafter.model import DraftNetwork
from drafter.pairing import check_pairing
from drafter.policy import DraftPolicy
from drafter.rules import DraftRules
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.sampling.protocols import Policy


class Drafter(DraftNetwork):
    """A drafter for one target model, from :func:`drafter.load_drafter`.

    Attributes:
        rules: How it drafts canvases.  None: the defaults of ``DraftRules``.
    """

    def __init__(self, config: DrafterConfig):
        super().__init__(config)
        self.rules: DraftRules | None = None

    def causal(self, target: DiffusionGemma) -> CausalDraft:
        """Propose tokens for left-to-right decoding.

        Raises:
            UserError: The drafter was made for another target.
        """
        check_pairing(self.config, target)
        return CausalDraft(self, target)

    def canvas(
        self, target: DiffusionGemma, base: Policy, rules: DraftRules | None = None
    ) -> DraftPolicy:
        """Extend the policy ``base``: canvases start from this drafter's proposals.

        Args:
            target: The model that verifies the proposals.
            base: The policy that samples and stops.
            rules: How canvases are drafted.  None: the drafter's own.

        Raises:
            UserError: The drafter was made for another target, or for left-to-right decoding alone.
        """
        check_pairing(self.config, target)
        rules = rules or self.rules or DraftRules()
        return DraftPolicy(base, CanvasDraft(self, target, rules), rules.watchdog, rules.judge)
