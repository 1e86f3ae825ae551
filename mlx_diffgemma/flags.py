"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_diffgemma import nano
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.model import DiffusionGemma
from mlx_diffgemma.prompt_cache import PromptCache

Model = Annotated[str, typer.Option("--model", help=f"'{nano.NAME}' (built in), a checkpoint folder, or a Hub id.")]
Adapter = Annotated[str | None, typer.Option(help="Folder of an adapter that `lora` trained.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the Hub repository.")]
Dtype = Annotated[str | None, typer.Option(help="Compute dtype: float32, bfloat16 or float16. Default: the checkpoint's on "
                                                "a GPU, float32 on a CPU.")]
Images = Annotated[list[str], typer.Option("--image", help="An image before the prompt, file or URL; may be given again. Needs the "
                                           "extra vision, and a checkpoint that has eyes: 'nano-vision' is built in.")]
ImageTokens = Annotated[int | None, typer.Option(help="Soft tokens an image may take: 70, 140, 280, 560 or 1120; more see finer. "
                                                 "Default: the checkpoint's number, 70 for a frame of a video.")]
SystemPrompt = Annotated[str | None, typer.Option(help="A system message before the prompt.")]
PromptCacheFile = Annotated[Path | None, typer.Option(help="Keep in this file what was encoded; a next prompt that begins alike "
                                                      "encodes only the rest.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON record as the last line.")]


def prompt_cache_at(path: Path | None, network: DiffusionGemma, tokenizer: TokenizerWrapper) -> PromptCache | None:
    """The cache kept in a file, or a new one where there is none yet.  Errors: UserError for a folder that does not exist."""
    if path is None:
        return None
    if path.exists():
        return PromptCache.load(path, network, tokenizer)
    if not path.parent.is_dir():
        raise UserError(f"{path} cannot be written, there is no folder {path.parent}.")
    return PromptCache(network)
