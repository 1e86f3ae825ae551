"""The list of a command's options, and the error for an unknown one.  It imports only typer."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from typer.core import TyperCommand

# Names of options in other programs, and our names for them.  If there are several, the first one
# that the command has is used.
OTHER_NAMES: dict[str, Sequence[str]] = {
    "--steps": ("--max-denoising-steps", "--iters"),
    "--num-steps": ("--max-denoising-steps", "--iters"),
    "--denoising-steps": ("--max-denoising-steps",),
    "--num-inference-steps": ("--max-denoising-steps",),
    "--diffusion-steps": ("--max-denoising-steps",),
    "--max-new-tokens": ("--max-tokens",),
    "--max-length": ("--max-tokens", "--max-seq-length"),
    "--num-predict": ("--max-tokens",),
    "--n-predict": ("--max-tokens",),
    "--num-tokens": ("--max-tokens",),
    "--temperature": ("--temp",),
    "--system": ("--system-prompt",),
    "--thinking": ("--think",),
    "--enable-thinking": ("--think", "--chat-template-config"),
    "--repeat-penalty": ("--repetition-penalty",),
    "--schema": ("--json-schema",),
    "--response-format": ("--json-schema",),
    "--grammar": ("--json-schema", "--regex"),
    "--guided-json": ("--json-schema",),
    "--guided-regex": ("--regex",),
    "--model-path": ("--model", "--hf-path"),
    "--model-id": ("--model", "--hf-path"),
    "--checkpoint": ("--model", "--hf-path"),
    "--weights": ("--model", "--hf-path"),
    "--adapter": ("--adapter-path",),
    "--lora": ("--adapter-path",),
    "--lora-path": ("--adapter-path",),
    "--draft": ("--draft-model",),
    "--drafter": ("--draft-model",),
    "--images": ("--image",),
    "--output": ("--output-dir", "--mlx-path", "--save-path", "--adapter-path", "--in-place"),
    "--out": ("--output-dir", "--mlx-path", "--save-path", "--adapter-path", "--in-place"),
    "--bits": ("--q-bits",),
    "--group-size": ("--q-group-size",),
    "--quantise": ("--quantize",),
    "--lr": ("--learning-rate",),
    "--lora-rank": ("--rank",),
    "--lora-layers": ("--num-layers",),
    "--epochs": ("--iters",),
    "--iterations": ("--iters",),
    "--context-length": ("--context", "--max-prompt-tokens"),
    "--max-context": ("--context", "--max-prompt-tokens"),
    "--ctx-size": ("--context", "--max-prompt-tokens"),
    "--max-batch-size": ("--max-batch", "--batch-size"),
    "--parallel": ("--max-batch",),
    "--api-keys": ("--api-key",),
    "--cors": ("--allowed-origin",),
    "--prompt-cache": ("--prompt-cache-file", "--prompt-cache-bytes"),
    "--output-json": ("--json",),
}


def nearest(name: str, known: Sequence[str]) -> str | None:
    """The option that ``name`` probably means, or None if no name is similar."""
    written = name.partition("=")[0].lower().replace("_", "-")
    for other in (written, *OTHER_NAMES.get(written, ())):
        if other in known:
            return other
    close = difflib.get_close_matches(written, known, n=1, cutoff=0.7)
    return close[0] if close else None


class Command(TyperCommand):
    """Lists options under headings, and suggests a known option for an unknown one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            parsed: list[str] = super().parse_args(ctx, args)
        except Exception as error:  # typer brings its own click, or imports it
            unknown = getattr(error, "option_name", None)
            if type(error).__name__ != "NoSuchOption" or unknown is None:
                raise
            meant = nearest(
                unknown, [name for own in self.params for name in own.opts if name.startswith("-")]
            )
            if meant:
                error.possibilities = None  # type: ignore[attr-defined]
                error.message = f"No such option: {unknown}; did you mean {meant}?"  # type: ignore[attr-defined]
            raise
        return parsed

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, then the options without a heading, then those of each heading."""
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is None:
                continue
            heading = getattr(parameter, "rich_help_panel", None) or "Options"
            if parameter.param_type_name == "argument":
                heading = "Arguments"
            sections.setdefault(heading, []).append(record)
        for heading, records in sections.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)
