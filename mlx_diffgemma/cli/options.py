"""Options that several commands share: parts (``cli/signature.py``) and single ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_diffgemma import nano
from mlx_diffgemma.cli.signature import part_option
from mlx_diffgemma.decoding.prompt_cache import PromptCache
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.files import check_file, expand_path
from mlx_diffgemma.generation.option_groups import DRAFTING, IMAGES
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.sampling.protocols import DraftModel

Json = Annotated[bool, typer.Option("--json", help="Print one JSON record as the last line.")]

Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the Hub repository.")]
Think = Annotated[bool, typer.Option("--think", help="Let the model think before it answers.")]
PromptCacheFile = Annotated[
    Path | None,
    typer.Option(
        help="Keep in this file what was encoded; a next prompt that starts with the same text "
        "encodes only the rest."
    ),
]
Images = Annotated[
    list[str],
    typer.Option(
        "--image",
        help="An image before the prompt, file or URL; may be given again. Needs the extra vision, "
        "and a checkpoint that has eyes: 'nano-vision' is built in.",
        rich_help_panel=IMAGES,
    ),
]

CANVAS_TEMPERATURE = (
    "Randomness of the draw. 1, the default, is the checkpoint's schedule; T multiplies it; 0 takes "
    "the most probable token."
)


@dataclass(frozen=True)
class CheckpointOptions:
    """The options that choose a checkpoint."""

    PANEL = "Model"

    model: str = part_option(
        nano.NAME, "--model", help=f"'{nano.NAME}' (built in), a checkpoint folder, or a Hub id."
    )
    revision: str | None = part_option(None, help="Branch, tag or commit of the Hub repository.")


@dataclass(frozen=True)
class AdaptedOptions(CheckpointOptions):
    """The options that choose a checkpoint and an adapter."""

    adapter_path: str | None = part_option(
        None, help="Folder of an adapter that `lora` trained; it changes the model's weights."
    )


@dataclass(frozen=True)
class ModelOptions(AdaptedOptions):
    """The options that choose a model and how it computes."""

    dtype: str | None = part_option(
        None,
        help="Compute dtype: float32, bfloat16 or float16. Default: the checkpoint's on a GPU, "
        "float32 on a CPU.",
    )

    @property
    def loading(self) -> dict[str, Any]:
        """The keywords of ``load``, without the model's name."""
        return {
            "revision": self.revision,
            "dtype": self.dtype,
            "adapter_path": self.adapter_path,
        }


@dataclass(frozen=True)
class PromptOptions:
    """The options for what surrounds the prompt."""

    PANEL = "Prompt"

    system_prompt: str | None = part_option(None, help="A system message before the prompt.")
    allow_control_tokens: bool = part_option(
        False,
        "--allow-control-tokens",
        help="Read what looks like a control token in the prompt as one. Default: it is plain "
        "text.",
    )
    chat_template_config: str | None = part_option(
        None, "--chat-template-config", help="JSON object of further chat-template variables."
    )

    @property
    def messages(self) -> list[dict[str, Any]]:
        """A list with the system message; empty if there is none."""
        if not self.system_prompt:
            return []
        return [{"role": "system", "content": self.system_prompt}]


@dataclass(frozen=True)
class DraftOptions:
    """The options that choose a drafter and how it drafts."""

    PANEL = DRAFTING

    draft_model: str | None = part_option(
        None,
        "--draft-model",
        help="A drafter, folder or Hub id: it guesses canvases, or the next tokens left to right, "
        "and the model checks; 'nano-drafter' is built in. See docs/drafting.md.",
    )
    draft_rules: str | None = part_option(
        None,
        "--draft-rules",
        help="How canvases are drafted: gate=0.9,passes=2,refine=on,judge=off and the like. See "
        "docs/drafting.md.",
    )

    def load(
        self, network: DiffusionGemma, tokenizer: TokenizerWrapper, mode: str = "diffusion"
    ) -> DraftModel | None:
        """The drafter, or None.

        Args:
            network: the model that verifies.
            tokenizer: its tokenizer.
            mode: the decoding mode.

        Raises:
            UserError: there are rules but no drafter that uses them, or as ``load_drafter``.
        """
        if self.draft_rules is not None and (self.draft_model is None or mode == "ar"):
            raise UserError(
                "--draft-rules are for canvases that a --draft-model guesses; leave them out."
            )
        if self.draft_model is None:
            return None
        import drafter

        loaded = drafter.load_drafter(self.draft_model, network, tokenizer=tokenizer)
        rules = self.draft_rules
        loaded.rules = drafter.DraftRules.parse(rules) if rules is not None else None
        return loaded


@dataclass(frozen=True)
class WritingOptions:
    """The options that say how a command writes a checkpoint."""

    PANEL = "Writing"

    dtype: str | None = part_option(
        None,
        help="Store what is not quantised as float16, bfloat16 or float32. Default: as it is.",
    )
    upload_repo: str | None = part_option(None, help="Hub repository to upload the result to.")
    revision: str | None = part_option(None, help="Branch, tag or commit of the Hub repository.")
    overwrite: bool = part_option(False, "--overwrite", help="Replace an existing checkpoint.")
    resume: bool = part_option(False, "--resume", help="Continue an interrupted run.")


def prompt_cache_at(
    path: Path | None, network: DiffusionGemma, tokenizer: TokenizerWrapper
) -> PromptCache | None:
    """The cache in a file, or a new one if there is no file yet.

    Args:
        path: the file, or None.
        network: the model.
        tokenizer: its tokenizer.

    Raises:
        UserError: the folder does not exist.
    """
    if path is None:
        return None
    path = expand_path(path)
    check_file(path)
    return PromptCache.load(path, network, tokenizer) if path.exists() else PromptCache(network)
