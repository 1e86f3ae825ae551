"""`mlx-diffgemma generate`: turn a prompt into text."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_diffgemma.cli.answer import CanvasInFlight, print_thought
from mlx_diffgemma.cli.hints import print_hint
from mlx_diffgemma.cli.options import (
    DraftOptions,
    ModelOptions,
    PromptCacheFile,
    PromptOptions,
    prompt_cache_at,
)
from mlx_diffgemma.cli.output import errors, output, spinner, streaming
from mlx_diffgemma.cli.signature import Settings, command, generation, part_option
from mlx_diffgemma.cli.values import TEMPLATE_CONFIG, template_variables
from mlx_diffgemma.decoding.records import CanvasStep
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.files import expand_path, read_stdin
from mlx_diffgemma.generation.generate import stream_generate, summary
from mlx_diffgemma.generation.load import load
from mlx_diffgemma.generation.option_groups import (
    CONSTRAINT,
    DENOISING,
    DRAFTING,
    IMAGES,
    RULE,
    SAMPLING,
)
from mlx_diffgemma.generation.options import CONSTRAINTS
from mlx_diffgemma.generation.response import GenerationResponse
from mlx_diffgemma.generation.trace import Recorder, Tracer, check_path
from mlx_diffgemma.media.images import open_image
from mlx_diffgemma.media.video import Video
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.text.tokenizer import chat_ids, encode_prompt, user_message
from mlx_diffgemma.text.variables import check_variables

OPTIONS = generation(groups=(SAMPLING, DENOISING, RULE, CONSTRAINT, DRAFTING, IMAGES))


@dataclass(frozen=True)
class AnswerOptions:
    """The options that say how the answer begins."""

    PANEL = "Prompt"

    think: bool = part_option(False, "--think", help="Let the model think before it answers.")
    prefill_response: str | None = part_option(None, help="Text the answer begins with.")
    ignore_chat_template: bool = part_option(
        False, "--ignore-chat-template", help="Use the prompt as it is, without a chat template."
    )


@dataclass(frozen=True)
class MediaOptions:
    """The options for images and videos before the prompt."""

    PANEL = IMAGES

    image: list[str] = part_option(
        [],
        "--image",
        help="An image before the prompt, file or URL; may be given again. Needs the extra vision, "
        "and a checkpoint that has eyes: 'nano-vision' is built in.",
    )
    video: list[str] = part_option(
        [],
        "--video",
        help="A video file before the prompt, one frame a second of it; may be given again.",
    )
    fps: float | None = part_option(
        None,
        help=f"Frames a second that are taken of a video, at most 60 in all. Default: {Video.fps:g}.",
    )

    def opened(self, image_tokens: int | None) -> list[Any]:
        """The images and videos.

        Raises:
            UserError: an image cannot be opened, or an option has no effect.
        """
        if image_tokens is not None and not (self.image or self.video):
            raise UserError(
                "--image-tokens has no meaning without --image or --video; leave it out."
            )
        if self.fps is not None and not self.video:
            raise UserError("--fps has no meaning without --video; leave it out.")
        media: list[Any] = [open_image(source, allow_urls=True) for source in self.image]
        fps = Video.fps if self.fps is None else self.fps
        return media + [Video(path, fps) for path in self.video]


@dataclass(frozen=True)
class OutputOptions:
    """The options that say what is printed and recorded."""

    PANEL = "Output"

    show: bool = part_option(False, "--show", help="Show the canvas resolving, on a terminal only.")
    trace: Path | None = part_option(
        None,
        help="Record every denoising step in this file: .html replays it in a browser, .jsonl "
        "holds a record a line. See docs/trace.md.",
    )
    as_json: bool = part_option(False, "--json", help="Print one JSON record as the last line.")
    verbose: bool = part_option(
        False, "--verbose", help="Print figures, and the thought, on standard error."
    )


@command
def generate_command(
    *,
    question: Annotated[
        str | None,
        typer.Argument(
            metavar="prompt",
            help="The user's message, as with --prompt; '-' reads standard input.",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", help="The user's message; '-' reads standard input."),
    ] = None,
    source: ModelOptions,
    surroundings: PromptOptions,
    answer: AnswerOptions,
    options: Annotated[dict[str, Any], OPTIONS],
    drafting: DraftOptions,
    media_options: MediaOptions,
    prompt_cache_file: PromptCacheFile = None,
    shown: OutputOptions,
    settings: Settings,
) -> None:
    """Turn a prompt into text."""
    if shown.trace is not None:
        if options["mode"] == "ar":
            raise UserError(
                "--trace records denoising steps, and mode 'ar' runs none; leave it out."
            )
        check_path(expand_path(shown.trace))
    text = _prompt(question, prompt)
    variables, think = _variables(surroundings, answer, options)
    media = media_options.opened(options["image_tokens"])
    with spinner(f"loading {source.model}"):
        network, tokenizer = load(source.model, **source.loading)
        drafter = drafting.load(network, tokenizer, options["mode"])
    if answer.ignore_chat_template:
        ids = encode_prompt(tokenizer, text, literal=not surroundings.allow_control_tokens)
    else:
        check_variables(tokenizer, variables, TEMPLATE_CONFIG)
        ids = chat_ids(
            tokenizer,
            [*surroundings.messages, user_message(text, len(media))],
            think=think,
            allow_control_tokens=surroundings.allow_control_tokens,
            **variables,
        )
    cache = prompt_cache_at(prompt_cache_file, network, tokenizer)
    prefill = answer.prefill_response
    prefix = tokenizer.encode(prefill, add_special_tokens=False) if prefill else []
    header = {"model": source.model, "prompt": text, "seed": options["seed"], "options": settings}
    watch = Watch.of(shown, options["mode"], network, tokenizer, header)
    responses = stream_generate(
        network,
        tokenizer,
        ids + prefix,
        prefix=prefix,
        on_step=watch.on_step,
        prompt_cache=cache,
        draft_model=drafter,
        images=media,
        **options,
    )
    try:
        _print_answer(
            responses, watch.live, shown.as_json, shown.verbose, watch.recorder, watch.flight
        )
    finally:
        if watch.recorder and not watch.recorder.failure:
            errors.print(f"trace: {shown.trace}", style="dim", markup=False)
    if not media:
        print_hint(source.model, source.adapter_path, text)
    if cache and prompt_cache_file:
        cache.save(prompt_cache_file, tokenizer)
        if shown.verbose:
            errors.print(
                f"prompt cache: {cache.reused} tokens reused, {cache.encoded} encoded", style="dim"
            )


def _prompt(question: str | None, prompt: str | None) -> str:
    """The text of the prompt, which is given as an argument or with --prompt.

    Raises:
        UserError: there is none, it is given twice, or it is empty.
    """
    if question is not None and prompt is not None:
        raise UserError("The prompt is given twice, by itself and with --prompt; give it once.")
    asked = prompt if question is None else question
    if asked is None:
        raise UserError(
            'There is no prompt; give one, such as: mlx-diffgemma generate "Add 47 and 38."'
        )
    text = read_stdin() if asked == "-" else asked
    if not text.strip():
        raise UserError("The prompt is empty; give at least one character.")
    return text


def _variables(
    surroundings: PromptOptions, answer: AnswerOptions, options: dict[str, Any]
) -> tuple[dict[str, Any], bool]:
    """The variables of the chat template, and whether the model thinks.

    Args:
        surroundings: the options for what surrounds the prompt.
        answer: the options for the beginning of the answer.
        options: the options of the generation.

    Raises:
        UserError: two options exclude each other.
    """
    variables, thinks = template_variables(surroundings.chat_template_config)
    think = answer.think or thinks
    if answer.ignore_chat_template and (surroundings.system_prompt or think or variables):
        raise UserError(
            "--ignore-chat-template leaves no place for --system-prompt, --think or --chat-template-config."
        )
    if think and any(options[name] for name in CONSTRAINTS):
        raise UserError(
            "--think lets the answer begin with a thought, which a constraint does not admit; leave one of them out."
        )
    return variables, think


@dataclass(frozen=True)
class Watch:
    """The observers of an answer's denoising steps."""

    live: Any = None
    recorder: Recorder | None = None
    flight: CanvasInFlight | None = None

    @classmethod
    def of(
        cls,
        shown: OutputOptions,
        mode: str,
        network: DiffusionGemma,
        tokenizer: TokenizerWrapper,
        header: dict[str, Any],
    ) -> Watch:
        """The observers that the options ask for; on a terminal, also the canvas in progress.

        Args:
            shown: the options.
            mode: the decoding mode.
            network: the model.
            tokenizer: its tokenizer.
            header: the header of a trace.
        """
        eos_ids = network.config.generation.eos_token_ids
        live = recorder = flight = None
        if mode == "diffusion":
            if shown.show and output.is_terminal:
                from mlx_diffgemma.cli.live import LiveCanvas

                live = LiveCanvas(tokenizer, eos_ids, output)
            if shown.trace is not None:
                recorder = Recorder(expand_path(shown.trace), Tracer(tokenizer, eos_ids), header)
            if errors.is_terminal:
                flight = CanvasInFlight(tokenizer, eos_ids)
        return cls(live, recorder, flight)

    @property
    def on_step(self) -> Callable[[CanvasStep], None] | None:
        """All observers as one ``on_step``; None if there are none."""
        watching = [
            *([self.live.show] if self.live else []),
            *([self.recorder.step] if self.recorder else []),
            *([self.flight.step] if self.flight else []),
        ]

        def watch(step: CanvasStep) -> None:
            for show in watching:
                show(step)

        return watch if watching else None


def _print_answer(
    responses: Iterator[GenerationResponse],
    live: Any,
    as_json: bool,
    verbose: bool,
    recorder: Recorder | None = None,
    flight: CanvasInFlight | None = None,
) -> None:
    """Print the answer as it comes, and the other output that was asked for.

    Args:
        responses: its canvases, or tokens.
        live: shows the canvas; the text is then printed at the end.
        as_json: print a record as the last line.
        verbose: print thought and figures on standard error.
        recorder: writes the trace.
        flight: holds the canvas that is not finished.

    Raises:
        typer.Exit: the answer was interrupted.
        UserError: the trace could not be written.
    """
    parts: list[GenerationResponse] = []
    interrupted = False
    with recorder or contextlib.nullcontext(), streaming():
        try:
            with live or contextlib.nullcontext():
                for response in responses:
                    parts.append(replace(response, logprobs=None))
                    if not live:
                        if verbose:
                            print_thought(response.thought)
                        print(response.text, end="", flush=True)
        except KeyboardInterrupt:
            interrupted = True
        record = (
            _record(parts, interrupted)
            if parts
            else {"text": "", "tokens": [], "finish_reason": "interrupted"}
        )
        if recorder:
            _finish_trace(recorder, record)
        if live and verbose:
            print_thought("".join(part.thought for part in parts))
        print("".join(part.text for part in parts) if live else "", flush=True)
    if verbose and parts:
        errors.print(summary(parts[-1]), style="dim", markup=False)
    if as_json:
        print(json.dumps(record, ensure_ascii=False), flush=True)
    if interrupted:
        if flight:
            flight.report()
        errors.print(f"interrupted after {sum(len(part.tokens) for part in parts)} tokens")
        raise typer.Exit(130)
    if recorder and recorder.failure:
        raise recorder.failure


def _finish_trace(recorder: Recorder, record: dict[str, Any]) -> None:
    said = {name: record[name] for name in ("thought", "tool_calls") if record.get(name)}
    recorder.finish(
        record["text"],
        record["finish_reason"],
        **said,
        seed=record.get("seed"),
        tokens=record.get("generation_tokens", 0),
        tokens_per_second=record.get("generation_tps"),
    )


def _record(parts: list[GenerationResponse], interrupted: bool) -> dict[str, Any]:
    """The JSON record of an answer: its text and all figures."""
    last = asdict(parts[-1])
    for key in ("logprobs", "token", "parts", "canvas_index"):
        del last[key]
    return last | {
        "text": "".join(part.text for part in parts),
        "thought": "".join(part.thought for part in parts),
        "tool_calls": [call for part in parts for call in part.tool_calls],
        "tokens": [token for part in parts for token in part.tokens],
        "steps": sum(part.steps for part in parts),
        "rows": sum(part.rows for part in parts),
        "retries": sum(part.retries for part in parts),
        "canvases": [
            {
                name: getattr(part, name)
                for name in ("steps", "rows", "retries", "converged", "certificate")
            }
            for part in parts
            if part.is_canvas
        ],
        "converged": all(part.converged for part in parts),
        "certificate": last["certificate"] if all(part.converged for part in parts) else None,
        "finish_reason": "interrupted" if interrupted else last["finish_reason"],
    }
