"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_diffgemma import nano
from mlx_diffgemma.drafting import DraftModel
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.files import check_file, expand_path, read_text
from mlx_diffgemma.model import DiffusionGemma
from mlx_diffgemma.prompt_cache import PromptCache
from mlx_diffgemma.rules import PRESETS, SAMPLERS

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
Temperature = Annotated[float | None, typer.Option(help="1 or absent: the checkpoint's schedule; T scales it; 0 takes the most "
                                                   "probable token.")]
Seed = Annotated[int | None, typer.Option(help="Same seed, same text. Default: a fresh one.")]
Steps = Annotated[int | None, typer.Option("--max-denoising-steps", help="Steps a canvas may take. Default: the checkpoint's.")]
Preset = Annotated[str | None, typer.Option(help=f"A set of rules: {', '.join(PRESETS)}; other options override it. "
                                            "What each costs and gains: docs/speed.md. Default: reference.")]
Sampler = Annotated[str | None, typer.Option(help=f"{' or '.join(SAMPLERS)}. Default: {SAMPLERS[0]}.")]
Threshold = Annotated[float | None, typer.Option(help="Rule: probability from which the sampler confidence-threshold accepts a "
                                                 "token. Default: 0.9.")]
Schema = Annotated[Path | None, typer.Option("--json-schema", help="The answer, or each hole, is JSON that the schema in this file "
                                             "admits, whatever the model thinks. See docs/structure.md.")]
Regex = Annotated[str | None, typer.Option(help="The whole answer must match this regular expression, of ECMA-262 (JavaScript's).")]
Choices = Annotated[str | None, typer.Option(help="It is one of these texts, separated by commas.")]
Draft = Annotated[str | None, typer.Option("--draft-model", help="A drafter, folder or Hub id: it guesses canvases, or the next "
                                           "tokens with --mode ar, and the model checks; 'nano-drafter' is built in. See "
                                           "docs/drafting.md.")]
DraftRules = Annotated[str | None, typer.Option("--draft-rules", help="How canvases are drafted: gate=0.9,passes=2,refine=on,"
                                                "judge=off and the like. See docs/drafting.md.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON record as the last line.")]


def prompt_cache_at(path: Path | None, network: DiffusionGemma, tokenizer: TokenizerWrapper) -> PromptCache | None:
    """The cache kept in a file, or a new one where there is none yet.  Errors: UserError for a folder that does not exist."""
    if path is None:
        return None
    path = expand_path(path)
    check_file(path)
    return PromptCache.load(path, network, tokenizer) if path.exists() else PromptCache(network)


def constraints_of(json_schema: Path | None, regex: str | None, choices: str | None) -> dict[str, Any]:
    """The keywords of a constraint.  Errors: UserError for a schema that cannot be read."""
    return {"json_schema": None if json_schema is None else _text_of(json_schema, "JSON schema"), "regex": regex,
            "choices": None if choices is None else [one.strip() for one in choices.split(",")]}


def _text_of(path: Path, what: str) -> str:
    try:
        return read_text(expand_path(path))
    except UserError as error:
        raise UserError(f"The {what}: {error}") from None


def drafter_of(name: str | None, rules: str | None, network: DiffusionGemma, tokenizer: TokenizerWrapper, mode: str = "diffusion",
               ) -> DraftModel | None:
    """Errors: UserError for rules that nothing follows, and as ``load_drafter``."""
    if rules is not None and (name is None or mode == "ar"):
        raise UserError("--draft-rules are for canvases that a --draft-model guesses; leave them out.")
    if name is None:
        return None
    import drafter

    found = drafter.load_drafter(name, network, tokenizer=tokenizer)
    found.rules = drafter.DraftRules.parse(rules) if rules is not None else None
    return found
