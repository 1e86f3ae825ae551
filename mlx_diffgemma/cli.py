"""The command ``mlx-diffgemma``: a thin layer over the library.

Every mistake of the user is one line on standard error and exit code 2; text goes to standard output, figures and
warnings to standard error.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import mlx.core as mx
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Column, Table

from drafter.commands import app as drafting
from mlx_diffgemma import __version__, nano
from mlx_diffgemma.decide_command import decide_command
from mlx_diffgemma.device import memory_limit
from mlx_diffgemma.errors import CheckpointWarning, UserError
from mlx_diffgemma.failures import check_arguments, hear_interrupts, reported
from mlx_diffgemma.files import check_folder, expand_path, make_folder, read_stdin, write_json
from mlx_diffgemma.flags import (
    Adapter,
    Choices,
    Draft,
    DraftRules,
    Dtype,
    Images,
    ImageTokens,
    Json,
    Model,
    Preset,
    PromptCacheFile,
    Regex,
    Revision,
    Sampler,
    Schema,
    Seed,
    Steps,
    SystemPrompt,
    Threshold,
    constraints_of,
    drafter_of,
    prompt_cache_at,
)
from mlx_diffgemma.generate import load, stream_generate, summary
from mlx_diffgemma.images import open_image
from mlx_diffgemma.infill_command import edit_command, infill_command
from mlx_diffgemma.options import GenerationOptions
from mlx_diffgemma.prompt import check_eyes, prepare_media
from mlx_diffgemma.recipes import MODES, RECIPES
from mlx_diffgemma.request import GenerationResponse, GenerationWarning
from mlx_diffgemma.rules import LENGTHS
from mlx_diffgemma.serving.command import serve_command
from mlx_diffgemma.session import CanvasStep
from mlx_diffgemma.tokenizer import chat_ids, encode_prompt, user_message
from mlx_diffgemma.trace import Recorder, Tracer, check_path
from mlx_diffgemma.tuning.commands import lora
from mlx_diffgemma.video import Video, VideoWarning

if TYPE_CHECKING:
    from mlx_diffgemma.chat import Chat
    from mlx_diffgemma.config import ModelConfig
    from mlx_diffgemma.convert import Conversion
    from mlx_diffgemma.estimate import Estimate
    from mlx_diffgemma.evaluation.run import EvaluationReport, TaskResult

DEFAULTS = GenerationOptions()
app = typer.Typer(name="mlx-diffgemma", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="DiffusionGemma on Apple silicon with MLX.", rich_markup_mode=None)
errors = Console(stderr=True, highlight=False, soft_wrap=True)
output = Console(highlight=False)
SHOWN = (GenerationWarning, CheckpointWarning, VideoWarning)  # warnings meant for the user

SelfConditioning = Annotated[str | None, typer.Option(help="'dense': over the whole vocabulary, as the reference; 'sparse': from "
                                                      "the 64 most probable tokens where they hold --coverage of the mass. "
                                                      "Default: sparse.")]
Coverage = Annotated[float | None, typer.Option(help="Of sparse self-conditioning. Default: 0.999999, which changes no token in "
                                                "practice; lower is faster and does.")]
EntropyBound = Annotated[float | None, typer.Option(help="Acceptance bound in nats. Default: the checkpoint's.")]
Confidence = Annotated[float | None, typer.Option(help="A canvas converges below this mean entropy, in nats. Default: the "
                                                  "checkpoint's.")]
Stability = Annotated[int | None, typer.Option(help="And when its argmax equals that of so many steps before; 0 looks at the "
                                               "entropy alone. Default: the checkpoint's.")]
MinSteps = Annotated[int | None, typer.Option(help="Rule: no canvas converges before this many steps.")]
TemperatureSteps = Annotated[int | None, typer.Option(help="Rule: the temperature falls over this many steps. Default: over "
                                                      "--max-denoising-steps.")]
Plateau = Annotated[int | None, typer.Option(help="Rule: give a canvas up when its mean entropy has not fallen for this many "
                                             "steps.")]
DropTail = Annotated[int | None, typer.Option(help="Rule: positions after an end token that stood for this many steps leave the "
                                              "canvas.")]
CanvasLength = Annotated[str | None, typer.Option(help=f"Rule: positions of a canvas; a number, {' or '.join(map(repr, LENGTHS))} "
                                                  "(a quarter of the full canvas, then twice the last one; what is still allowed, "
                                                  "in eighths of the full canvas).")]
RerollEmpty = Annotated[int | None, typer.Option(help="Rule: try an empty first canvas again, at most so often.")]
RetryUnconverged = Annotated[int | None, typer.Option(help="Rule: try a canvas that did not converge again, at most so often.")]
MinP = Annotated[float, typer.Option(help="Draw among the tokens with at least this share of the largest probability; 0 is off.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Divide the logits of tokens that the prompt or the answer to the left "
                                                  "holds; 1 is off.")]
FrequencyPenalty = Annotated[float, typer.Option(help="Subtract this from a token's logit as often as the answer to the left holds "
                                                 "the token; 0 is off.")]
PresencePenalty = Annotated[float, typer.Option(help="Subtract this from the logits of tokens that the answer to the left holds; "
                                                "0 is off.")]
LogitBias = Annotated[str | None, typer.Option(help="JSON object of token ids and what is added to their logits, between -100 and "
                                               "100.")]
# Of every command that writes a checkpoint:
StoredDtype = Annotated[str | None, typer.Option(help="Store what is not quantised as float16, bfloat16 or float32. Default: as it "
                                                 "is.")]
UploadRepo = Annotated[str | None, typer.Option(help="Hub repository to upload the result to.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing checkpoint.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")]
Videos = Annotated[list[str], typer.Option("--video", help="A video file before the prompt, one frame a second of it; may be given "
                                           "again.")]

@app.command("generate")
def generate_command(
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The user's message; '-' reads standard input.")],
    model: Model = nano.NAME,
    revision: Revision = None,
    adapter_path: Adapter = None,
    system_prompt: SystemPrompt = None,
    think: Annotated[bool, typer.Option("--think", help="Let the model think before it answers.")] = False,
    prefill_response: Annotated[str | None, typer.Option(help="Text the answer begins with.")] = None,
    ignore_chat_template: Annotated[bool, typer.Option("--ignore-chat-template", help="Use the prompt as it is.")] = False,
    allow_control_tokens: Annotated[bool, typer.Option("--allow-control-tokens", help="Read what looks like a control token in the "
                                                       "prompt as one; without it, it is plain text.")] = False,
    chat_template_config: Annotated[str | None, typer.Option(help="JSON object of further chat-template variables.")] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", "-m", help="Cut the answer after this many tokens. "
                                                   "Default: until it ends, at most 4,096 or the context.")] = DEFAULTS.max_tokens,
    temp: Annotated[float | None, typer.Option(help="1 or absent: the checkpoint's schedule; T scales it; 0 takes the most "
                                               "probable token. With --mode ar: absent or 0 is greedy.")] = DEFAULTS.temperature,
    top_k: Annotated[int, typer.Option(help="Draw among the k most probable tokens; 0 is off.")] = DEFAULTS.top_k,
    top_p: Annotated[float, typer.Option(help="Draw among the tokens that hold this mass; 1 is off.")] = DEFAULTS.top_p,
    min_p: MinP = DEFAULTS.min_p,
    repetition_penalty: RepetitionPenalty = DEFAULTS.repetition_penalty,
    frequency_penalty: FrequencyPenalty = DEFAULTS.frequency_penalty,
    presence_penalty: PresencePenalty = DEFAULTS.presence_penalty,
    logit_bias: LogitBias = None,
    seed: Seed = DEFAULTS.seed,
    dtype: Dtype = None,
    max_denoising_steps: Steps = None,
    entropy_bound: EntropyBound = None,
    confidence_threshold: Confidence = None,
    stability_threshold: Stability = None,
    t_min: Annotated[float | None, typer.Option("--t-min", help="Temperature the schedule ends at.")] = None,
    t_max: Annotated[float | None, typer.Option("--t-max", help="Temperature the schedule begins with.")] = None,
    self_conditioning: SelfConditioning = None,
    coverage: Coverage = None,
    preset: Preset = None,
    diffusion_sampler: Sampler = None,
    threshold: Threshold = None,
    min_denoising_steps: MinSteps = None,
    temperature_steps: TemperatureSteps = None,
    plateau: Plateau = None,
    drop_tail: DropTail = None,
    canvas_length: CanvasLength = None,
    reroll_empty: RerollEmpty = None,
    retry_unconverged: RetryUnconverged = None,
    mode: Annotated[str, typer.Option(help="'diffusion', or 'ar' for left-to-right with the same weights.")] = DEFAULTS.mode,
    draft_model: Draft = None,
    draft_rules: DraftRules = None,
    image: Images = [],  # noqa: B006 (typer copies it)
    video: Videos = [],  # noqa: B006
    image_tokens: ImageTokens = DEFAULTS.image_tokens,
    json_schema: Schema = None,
    regex: Regex = None,
    choices: Choices = None,
    fps: Annotated[float | None, typer.Option(help="Frames a second that are taken of a video, at most 60 in all. "
                                              f"Default: {Video.fps:g}.")] = None,
    num_draft_tokens: Annotated[int | None, typer.Option(help="How many tokens the drafter may guess at once. Default: as many as "
                                                         "its blocks hold.")] = DEFAULTS.num_draft_tokens,
    prompt_cache_file: PromptCacheFile = None,
    show: Annotated[bool, typer.Option("--show", help="Show the canvas resolving, on a terminal only.")] = False,
    trace: Annotated[Path | None, typer.Option(help="Record every denoising step in this file: .html replays it in a browser, "
                                               ".jsonl holds a record a line. See docs/trace.md.")] = None,
    as_json: Json = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Print figures, and the thought, on standard error.")] = False,
) -> None:
    """Turn a prompt into text."""
    given = _given(generate_command, locals())
    options = _generation_options(locals())
    if trace is not None:
        if mode == "ar":
            raise UserError("--trace records denoising steps, and mode 'ar' runs none; leave it out.")
        check_path(expand_path(trace))
    variables = _json_object(chat_template_config, "--chat-template-config")
    text = read_stdin() if prompt == "-" else prompt
    if not text.strip():
        raise UserError("The prompt is empty; give at least one character.")
    if ignore_chat_template and (system_prompt or think or variables):
        raise UserError("--ignore-chat-template leaves no place for --system-prompt, --think or --chat-template-config.")
    if think and (json_schema or regex or choices):
        raise UserError("--think lets the answer begin with a thought, which a constraint does not admit; leave one of them out.")
    if image_tokens is not None and not (image or video):
        raise UserError("--image-tokens has no meaning without --image or --video; leave it out.")
    if fps is not None and not video:
        raise UserError("--fps has no meaning without --video; leave it out.")
    media: list[Any] = [open_image(source, allow_urls=True) for source in image]
    media += [Video(path, Video.fps if fps is None else fps) for path in video]
    with _status(f"loading {model}"):
        network, tokenizer = load(model, revision=revision, dtype=dtype, adapter_path=adapter_path)
        drafter = drafter_of(draft_model, draft_rules, network, tokenizer, mode)
    if ignore_chat_template:
        ids = encode_prompt(tokenizer, text, literal=not allow_control_tokens)
    else:
        system = [{"role": "system", "content": system_prompt}] if system_prompt else []
        ids = chat_ids(tokenizer, [*system, user_message(text, len(media))], think=think,
                       allow_control_tokens=allow_control_tokens, **variables)
    cache = prompt_cache_at(prompt_cache_file, network, tokenizer)
    prefix = tokenizer.encode(prefill_response, add_special_tokens=False) if prefill_response else []
    live = None
    if show and mode == "diffusion" and output.is_terminal:
        from mlx_diffgemma.live import LiveCanvas

        live = LiveCanvas(tokenizer, network.config.generation.eos_token_ids, output)
    recorder = None
    if trace is not None:
        header = {"model": model, "prompt": text, "seed": seed, "options": given}
        recorder = Recorder(expand_path(trace), Tracer(tokenizer, network.config.generation.eos_token_ids), header)
    watching = [own for own in (live and live.show, recorder and recorder.step) if own]

    def watch(step: CanvasStep) -> None:
        for own in watching:
            own(step)

    _print_answer(stream_generate(network, tokenizer, ids + prefix, prefix=prefix, on_step=watch if watching else None,
                                  prompt_cache=cache, draft_model=drafter, images=media, **options), live, as_json, verbose,
                  recorder)
    if cache and prompt_cache_file:
        cache.save(prompt_cache_file, tokenizer)
        if verbose:
            errors.print(f"prompt cache: {cache.reused} tokens reused, {cache.encoded} encoded", style="dim")


def _print_answer(responses: Iterator[GenerationResponse], live: Any, as_json: bool, verbose: bool,
                  recorder: Recorder | None = None) -> None:
    parts: list[GenerationResponse] = []
    interrupted = False
    with recorder or contextlib.nullcontext():
        try:
            with live or contextlib.nullcontext():
                for response in responses:
                    parts.append(replace(response, logprobs=None))
                    if not live:
                        print(response.text, end="", flush=True)
        except KeyboardInterrupt:
            interrupted = True
        record = _record(parts, interrupted) if parts else {"text": "", "tokens": [], "finish_reason": "interrupted"}
        if recorder:
            _finish_trace(recorder, record)
    text = "".join(part.text for part in parts)
    print(text if live else "", flush=True)
    if verbose and parts:
        if thought := "".join(part.thought for part in parts).strip():
            errors.print(thought, style="dim", markup=False)
        errors.print(summary(parts[-1]), style="dim", markup=False)
    if as_json:
        print(json.dumps(record, ensure_ascii=False), flush=True)
    if interrupted:
        errors.print(f"interrupted after {sum(len(part.tokens) for part in parts)} tokens")
        raise typer.Exit(130)
    if recorder and recorder.failure:
        raise recorder.failure


def _finish_trace(recorder: Recorder, record: dict[str, Any]) -> None:
    said = {name: record[name] for name in ("thought", "tool_calls") if record.get(name)}
    recorder.finish(record["text"], record["finish_reason"], **said, seed=record.get("seed"),
                    tokens=record.get("generation_tokens", 0), tokens_per_second=record.get("generation_tps"))


def _record(parts: list[GenerationResponse], interrupted: bool) -> dict[str, Any]:
    """Text and all figures of an answer."""
    last = asdict(parts[-1])
    for key in ("logprobs", "token", "parts", "canvas_index"):
        del last[key]
    return last | {
        "text": "".join(part.text for part in parts), "thought": "".join(part.thought for part in parts),
        "tool_calls": [call for part in parts for call in part.tool_calls],
        "tokens": [token for part in parts for token in part.tokens], "steps": sum(part.steps for part in parts),
        "rows": sum(part.rows for part in parts), "retries": sum(part.retries for part in parts),
        "canvases": [{name: getattr(part, name) for name in ("steps", "rows", "retries", "converged", "certificate")}
                     for part in parts if part.is_canvas],
        "converged": all(part.converged for part in parts),
        "certificate": last["certificate"] if all(part.converged for part in parts) else None,
        "finish_reason": "interrupted" if interrupted else last["finish_reason"],
    }


CHAT_HELP = ("/image FILE adds an image to what you say next, /reset forgets the conversation, /system TEXT sets the system "
             "message, /stats shows figures, /exit or Ctrl-D ends.")


@app.command()
def chat(
    model: Model = nano.NAME,
    revision: Revision = None,
    adapter_path: Adapter = None,
    system_prompt: Annotated[str | None, typer.Option(help="A system message before the conversation.")] = None,
    think: Annotated[bool, typer.Option("--think", help="Let the model think before it answers.")] = False,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", "-m", help="Cut each answer after this many tokens.")] = None,
    temp: Annotated[float | None, typer.Option(help="As in generate.")] = DEFAULTS.temperature,
    top_k: Annotated[int, typer.Option(help="As in generate.")] = DEFAULTS.top_k,
    top_p: Annotated[float, typer.Option(help="As in generate.")] = DEFAULTS.top_p,
    min_p: MinP = DEFAULTS.min_p,
    repetition_penalty: RepetitionPenalty = DEFAULTS.repetition_penalty,
    frequency_penalty: FrequencyPenalty = DEFAULTS.frequency_penalty,
    presence_penalty: PresencePenalty = DEFAULTS.presence_penalty,
    logit_bias: LogitBias = None,
    seed: Annotated[int | None, typer.Option(help="Of the first turn; counts up by one a turn.")] = DEFAULTS.seed,
    dtype: Dtype = None,
    max_denoising_steps: Steps = None,
    self_conditioning: SelfConditioning = None,
    coverage: Coverage = None,
    preset: Preset = None,
    canvas_length: CanvasLength = None,
    reroll_empty: RerollEmpty = None,
    retry_unconverged: RetryUnconverged = None,
    image_tokens: ImageTokens = DEFAULTS.image_tokens,
) -> None:
    """Talk to a model; the canvas is shown while it resolves."""
    from mlx_diffgemma.chat import Chat

    options = _generation_options(locals())
    with _status(f"loading {model}"):
        network, tokenizer = load(model, revision=revision, dtype=dtype, adapter_path=adapter_path)
    GenerationOptions.from_keywords(options).policy(network)  # refuse what does not fit this checkpoint now, not at each turn
    talk = Chat(network, tokenizer, system_prompt, think, **options)
    waiting: list[Any] = []  # images for the next turn
    at_terminal = sys.stdin.isatty() and output.is_terminal
    if at_terminal:
        errors.print(CHAT_HELP, style="dim")
    while (line := _read_line("> " if at_terminal else "")) is not None:
        command, _, rest = line.strip().partition(" ")
        if not command:
            continue
        if command in ("/exit", "/quit"):
            return
        if command == "/reset":
            talk.reset()
            waiting.clear()
        elif command == "/image":
            try:
                waiting += _image_for(talk, rest.strip())
                errors.print(f"{len(waiting)} image(s) come with what you say next", style="dim")
            except UserError as error:
                errors.print(f"error: {error}", markup=False)
        elif command == "/system":
            talk.system = rest.strip() or None
            now = f"set to {talk.system!r}" if talk.system else "gone"
            errors.print(f"the system message is {now}", style="dim", markup=False)
        elif command == "/stats":
            errors.print(str(talk.stats), style="dim", markup=False)
        elif command.startswith("/"):
            errors.print(CHAT_HELP, style="dim", markup=False)
        else:
            turns = talk.stats.turns
            _take_turn(talk, line.strip(), waiting, at_terminal)
            if talk.stats.turns > turns:  # else the turn is as if it had not been, and they still wait
                waiting = []


def _image_for(talk: Chat, name: str) -> list[Any]:
    """The image of a file or URL, ready for the model; refused here, not at the turn."""
    check_eyes(talk.model.config)
    if not name:
        raise UserError("No file was named; give one, as /image cat.png.")
    return [*prepare_media([open_image(name, allow_urls=True)], talk.model.config, talk.options.get("image_tokens"))]


def _read_line(prompt: str) -> str | None:
    try:
        return input(prompt)
    except (EOFError, KeyboardInterrupt):
        return None


def _take_turn(talk: Chat, text: str, images: list[Any], at_terminal: bool) -> None:
    """One turn; Ctrl-C ends the answer, not the conversation."""
    from mlx_diffgemma.live import LiveCanvas

    live: LiveCanvas | None = None

    def show(step: CanvasStep) -> None:
        nonlocal live
        if live is None:
            live = LiveCanvas(talk.tokenizer, talk.model.config.generation.eos_token_ids, output)
            live.__enter__()
        live.show(step)

    def hide() -> None:
        nonlocal live
        if live is not None:
            live.__exit__(None, None, None)
            live = None

    responses = talk.send(text, show if at_terminal else None, images)
    try:
        for response in responses:
            hide()
            if response.thought.strip():
                errors.print(response.thought.strip(), style="dim", markup=False)
            print(response.text, end="", flush=True)
            for call in response.tool_calls:
                errors.print(f"tool call: {call}", style="dim", markup=False)
        print(flush=True)
    except KeyboardInterrupt:
        print(flush=True)
        errors.print("interrupted", style="dim")
    except UserError as error:
        errors.print(f"error: {error} (/reset forgets the conversation)", markup=False)
    finally:
        hide()
        responses.close()


@app.command()
def info(model: Annotated[str, typer.Argument(help=f"'{nano.NAME}', a folder, or a Hub id.")] = nano.NAME,
         revision: Revision = None, as_json: Json = False) -> None:
    """Print what a checkpoint is: shapes, parameters, memory, quantisation."""
    from mlx_diffgemma import hub
    from mlx_diffgemma.config import ModelConfig
    from mlx_diffgemma.info import CONTEXT, inspect

    found = inspect(hub.resolve(model, revision, before_weights=ModelConfig.from_folder))
    if as_json:
        print(json.dumps(found.record()))
        return
    text = found.config.text
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in (
        ("folder", found.folder),
        ("parameters", f"{found.parameters / 1e6:,.1f} M, {found.active / 1e6:,.1f} M active"),
        ("stored", f"{found.stored_bytes / 1e9:,.3f} GB ({', '.join(f'{k} {v / 1e9:,.3f}' for k, v in found.dtypes.items())})"),
        ("needs here", f"{found.memory_needed / 1e9:,.3g} GB with {CONTEXT:,} tokens of context; this machine allows "
         f"{found.memory_limit / 1e9:,.1f} GB"),
        ("quantisation", found.quantisation),
        ("bits per weight", f"{found.bits_per_weight:.2f}"),
        ("layers", f"{len(text.layers)}: " + "".join("F" if layer.window is None else "s" for layer in text.layers)
         + " (s sliding, F full)"),
        ("hidden / dense MLP / expert", f"{text.hidden_size} / {text.intermediate_size} / {text.moe_intermediate_size}"),
        ("experts", f"{text.num_experts}, {text.top_k_experts} a row"),
        ("attention heads", f"{text.num_attention_heads}; KV " + ", ".join(
            f"{layer.num_kv_heads} x {layer.head_dim} {layer.kind.split('_')[0]}" for layer in dict.fromkeys(text.layers))),
        ("sliding window", str(max((layer.window or 0) for layer in text.layers))),
        ("vocabulary", f"{text.vocab_size:,}"),
        ("canvas / context", f"{found.config.canvas_length} / {text.max_position_embeddings:,} tokens"),
        ("K/V cache, 16 bits", f"{found.cache_bytes_per_token / 1e3:,.1f} KB a token + {found.sliding_cache_bytes / 1e6:,.1f} MB"),
        ("images", "yes" if found.config.vision else "no"),
    ):
        table.add_row(name, value)
    output.print(table)


@app.command("convert")
def convert_command(
    hf_path: Annotated[str, typer.Option("--hf-path", "--model", help=f"The checkpoint: a folder, a Hub id, or '{nano.NAME}'.")],
    mlx_path: Annotated[Path, typer.Option(help="The folder to write.")] = Path("mlx_model"),
    quantize: Annotated[bool, typer.Option("--quantize", "-q", help="Quantise by the recipe 4bit, or --q-mode's.")] = False,
    q_bits: Annotated[int | None, typer.Option(help="Bits of the experts (of everything with uniform-4bit).")] = None,
    q_group_size: Annotated[int | None, typer.Option(help="Group size of the experts.")] = None,
    q_mode: Annotated[str | None, typer.Option(help="Mode of the experts: " + ", ".join(MODES) + ".")] = None,
    recipe: Annotated[str | None, typer.Option("--recipe", "--quant-predicate", help="Which tensors get how many bits: "
                                               + ", ".join(RECIPES) + ". See docs/recipes.md.")] = None,
    fit: Annotated[str | None, typer.Option(help="With -q: the largest recipe that fits a Mac with this much memory and 8,192 "
                                            "tokens of context, 24GB for instance, or 'auto' for this machine.")] = None,
    dtype: StoredDtype = None,
    dequantize: Annotated[bool, typer.Option("--dequantize", "-d", help="Undo a quantisation.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be written and whether it fits this machine; of a "
                                          "Hub repository only headers are fetched.")] = False,
    upload_repo: UploadRepo = None,
    revision: Revision = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Convert or quantise a checkpoint, in far less memory than it takes."""
    from mlx_diffgemma import hub
    from mlx_diffgemma.convert import ConvertOptions, convert, plan

    if fit is not None:
        recipe = _fitting(hf_path, revision, fit, quantize, recipe, (q_bits, q_group_size, q_mode))
    options = ConvertOptions(quantize, recipe, q_bits, q_group_size, q_mode, dtype, dequantize)
    if (chosen := options.chosen()) and chosen.warning:
        errors.print(f"warning: {chosen.warning}", markup=False)
    if dry_run:
        _print_conversion(plan(hf_path, *hub.headers(hf_path, revision), options), as_json)
        return
    with _writing(mlx_path, overwrite) as progress:
        target = convert(hf_path, mlx_path, quantize, q_group_size, q_bits, q_mode, dtype, upload_repo, revision, dequantize,
                         recipe, overwrite, resume, progress)
    _print_written(target, as_json)


def _fitting(model: str, revision: str | None, fit: str, quantize: bool, recipe: str | None,
             changes: tuple[Any, ...]) -> str:
    """The name of the recipe that --fit chooses, which is said on standard error.  Errors: UserError."""
    from mlx_diffgemma import hub, macs
    from mlx_diffgemma.config import ModelConfig

    if not quantize:
        raise UserError("--fit chooses a recipe to quantise by; add -q.")
    if recipe is not None or changes != (None, None, None):
        raise UserError("--fit chooses the recipe itself; leave --recipe and the --q- options out, or leave --fit out.")
    macs.limit_of(fit)  # a size that is none is refused before the network is asked
    config = ModelConfig.from_folder(hub.small_files(model, revision))
    if config.quantization:
        raise UserError(f"{model} is quantised already, so --fit has nothing to choose; convert the original checkpoint.")
    found = macs.fit(config, fit)
    errors.print(f"recipe {found}", markup=False)
    return found.recipe.name


@app.command("fuse")
def fuse_command(
    model: Model = nano.NAME,
    adapter_path: Annotated[Path, typer.Option(help="Folder of the adapter.")] = Path("adapters"),
    save_path: Annotated[Path, typer.Option(help="The folder to write.")] = Path("fused_model"),
    dequantize: Annotated[bool, typer.Option("--dequantize", "-d", help="Store everything unquantised.")] = False,
    requantize: Annotated[bool, typer.Option("--requantize", help="Give what the adapter changed the precision it had. Default: it "
                                             "stays unquantised, so that the result answers as the adapter did.")] = False,
    dtype: StoredDtype = None,
    upload_repo: UploadRepo = None,
    revision: Revision = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Work an adapter into the weights of its base."""
    from mlx_diffgemma.tuning.fuse import fuse

    with _writing(save_path, overwrite) as progress:
        target = fuse(model, adapter_path, save_path, dequantize, requantize, dtype, upload_repo, revision, overwrite, resume,
                      progress)
    _print_written(target, as_json)


@contextlib.contextmanager
def _writing(folder: Path, overwrite: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar for a conversion, and how to go on with it when it is interrupted."""
    from mlx_diffgemma.convert import partial_folder

    with Progress(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
                  console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task("writing", total=None)
        try:
            yield lambda done, total: bar.update(task, completed=done, total=total)
        except KeyboardInterrupt:
            where = partial_folder(expand_path(folder).resolve())
            again = "--overwrite --resume" if overwrite else "--resume"
            errors.print("interrupted" + (f"; {where} is kept, run again with {again} to go on" if where.exists() else ""))
            raise typer.Exit(130) from None


def _print_written(target: Path, as_json: bool) -> None:
    from mlx_diffgemma.info import inspect

    found = inspect(target)
    if as_json:
        print(json.dumps(found.record()))
    else:
        output.print(f"{target}: {_count(found.stored_bytes, 'B')}, {found.bits_per_weight:.2f} bits per weight", soft_wrap=True)


def _print_conversion(conversion: Conversion, as_json: bool) -> None:
    from mlx_diffgemma import cost
    from mlx_diffgemma.device import compute_dtype

    size, weights = compute_dtype(mx.bfloat16).size, conversion.memory_bytes
    limit, longest = memory_limit(), conversion.config.text.max_position_embeddings
    contexts = sorted({min(c, longest) for c in cost.CONTEXTS})
    needs = {n: weights + sum(cost.forward_bytes(conversion.config, n, size)) for n in contexts}
    if as_json:
        print(json.dumps({
            "classes": [asdict(row) | {"bits_per_weight": row.bits_per_weight} for row in conversion.rows()],
            "bytes": conversion.bytes_out, "bits_per_weight": conversion.bits_per_weight, "files": len(conversion.shards()),
            "memory_limit": limit, "memory_needed": needs}))
        return
    table = Table("class", "tensors", "weights", "from", "to", "precision", "bits")
    for row in conversion.rows():
        table.add_row(row.kind, str(row.tensors), _count(row.parameters), _count(row.bytes_in, "B"), _count(row.bytes_out, "B"),
                      row.precision, f"{row.bits_per_weight:.2f}")
    table.add_section()
    table.add_row("all", str(len(conversion.outputs)), _count(sum(o.size for o in conversion.outputs)),
                  _count(conversion.bytes_in, "B"), _count(conversion.bytes_out, "B"), "", f"{conversion.bits_per_weight:.2f}")
    output.print(table)
    files = len(conversion.shards())
    output.print(f"{files} file{'s' if files > 1 else ''} would be written; bits are per weight. Weights, K/V cache and the "
                 f"widest\npart of a forward take of the {_count(limit, 'B')} this machine allows, by tokens of context:")
    for context, needed in needs.items():
        output.print(f"  {context:>7,}  {_count(needed, 'B'):>8}  {'fits' if needed <= limit else 'DOES NOT FIT'}")


@app.command()
def estimate(
    chip: Annotated[str | None, typer.Option(help="A chip of the table, 'M3 Max' for instance. Default: this machine's.")] = None,
    recipe: Annotated[str | None, typer.Option(help="How the weights are stored: " + ", ".join(RECIPES) + ". Default: the "
                                               "recipe of --model, else 4bit.")] = None,
    context: Annotated[int, typer.Option(help="Tokens before the canvas.")] = 512,
    model: Annotated[str | None, typer.Option(help="A folder or Hub id, of which only the config is read. Default: the released "
                                              "26B shape.")] = None,
    measured: Annotated[bool, typer.Option("--measure", help="Measure this machine's memory rate and matrix rate first.")] = False,
    dense: Annotated[bool, typer.Option("--dense", help="Count self-conditioning over the full vocabulary.")] = False,
    drafting: Annotated[Path | None, typer.Option(help="A record of `draft evaluate`: project what such a drafter would do "
                                                  "here.")] = None,
    training: Annotated[bool, typer.Option("--training", help="What each way of fine-tuning takes with examples of --context "
                                           "tokens, and on which Mac it fits.")] = False,
    batch_size: Annotated[int, typer.Option(help="With --training: examples a batch.")] = 1,
    macs: Annotated[bool, typer.Option("--macs", help="Which recipe fits which Mac, and how much context beside it.")] = False,
    as_json: Json = False,
) -> None:
    """Estimate step time, memory and tokens a second from the config alone."""
    from mlx_diffgemma import hub
    from mlx_diffgemma.config import ModelConfig
    from mlx_diffgemma.cost import released_with_tower
    from mlx_diffgemma.estimate import CHIPS, chip_named, measure, this_chip
    from mlx_diffgemma.estimate import estimate as count
    from mlx_diffgemma.recipes import recipe_named

    if drafting is not None and (training or dense):
        raise UserError("--drafting projects canvases with sparse self-conditioning; leave --training and --dense out.")
    if training and (chip is not None or measured or dense or recipe is not None):
        raise UserError("--training counts all recipes and needs no chip; leave --chip, --measure, --recipe and --dense out.")
    others = (chip, recipe, drafting)
    if macs and (any(given is not None for given in others) or measured or dense or training or context != 512):
        raise UserError("--macs counts all recipes and how much context each leaves; it goes with --model and --json alone.")
    if batch_size != 1 and not training:
        raise UserError("--batch-size belongs to --training; add that.")
    if chip is not None and measured:
        raise UserError("Either --chip or --measure: the one takes a row of the table, the other this machine.")
    named = chip_named(chip) if chip is not None else None  # unknown names are refused before anything is read or measured
    if recipe is not None:
        recipe_named(recipe)
    config = ModelConfig.from_folder(hub.small_files(model)) if model else released_with_tower()
    if training:
        _print_training(config, context, batch_size, as_json)
        return
    if macs:
        _print_macs(config, as_json)
        return
    which = measure() if measured else named or this_chip()
    if which is None:
        raise UserError(f"This machine is not in the table; name one with --chip ({', '.join(CHIPS)}), or --measure this one.")
    stored = recipe_named(recipe or (config.recipe if config.recipe in RECIPES else None) or "4bit")
    found = count(config, stored, which, context, sparse=not dense)
    projected = None
    if drafting is not None:
        from drafter.projection import project, read_record

        projected = project(config, stored, which, context, read_record(drafting))
    if as_json:
        print(json.dumps(found.record() | ({"projection": asdict(projected)} if projected else {})))
        return
    output.print(f"{which.name} ({which.source})\n{_count(which.bandwidth, 'B/s')}, of which {which.bandwidth_share:.0%} count; "
                 f"{which.flops / 1e12:.3g} TFLOP/s, of which {which.flops_share:.0%} count\n"
                 f"{found.parameters / 1e9:.3g} B parameters, {found.active / 1e9:.2g} B active, recipe {found.recipe}, "
                 f"{context:,} tokens of context", soft_wrap=True)
    table = Table("part", "TFLOP a step", "GB a step")
    for part in dict.fromkeys([*found.flops, *found.bytes]):
        table.add_row(part, f"{found.flops[part] / 1e12:.3f}" if part in found.flops else "-",
                      f"{found.bytes[part] / 1e9:.3f}" if part in found.bytes else "-")
    table.add_section()
    table.add_row("all", f"{sum(found.flops.values()) / 1e12:.3f}", f"{sum(found.bytes.values()) / 1e9:.3f}")
    output.print(table)
    output.print(f"a step takes at least {1000 * found.step_seconds:.3g} ms, bound by {found.bound_by} (bandwidth "
                 f"{1000 * found.bandwidth_seconds:.3g} ms, compute {1000 * found.compute_seconds:.3g} ms)\n"
                 + "at most " + ", ".join(f"{rate:.0f} tok/s at {steps} steps" for steps, rate in found.rates.items())
                 + f"\nleft to right at most {found.causal_rate:.0f} tok/s: as fast at {found.break_even:.1f} steps a canvas"
                 + (f"; against {found.reported:g} tok/s as reported, at {found.reported_break_even:.1f} steps"
                    if found.reported is not None else "")
                 + f"\nmemory: {_count(found.memory, 'B')} without the vision tower; {_allowed(found)}", soft_wrap=True)
    if projected:
        table = Table("steps a canvas", *map(str, projected.plain), title="projection, not measured: tok/s at most")
        table.add_row("without a drafter", *(f"{rate:.0f}" for rate in projected.plain.values()))
        table.add_row("drafted, as all canvases of the record", *(f"{rate:.0f}" for rate in projected.drafted_as_all.values()))
        table.add_row("drafted, as its longest", *(f"{rate:.0f}" for rate in projected.drafted_as_longest.values()))
        output.print(table)
        output.print(f"left to right at most {projected.causal:.0f} tok/s, drafted {projected.causal_drafted:.0f}", soft_wrap=True)


def _allowed(found: Estimate) -> str:
    """What the memory is held against: this machine's where the chip is its own, else the Macs there are."""
    from mlx_diffgemma.macs import smallest_mac

    if found.chip.here:
        return f"this machine allows {_count(memory_limit(), 'B')}"
    mac = smallest_mac(found.memory)
    return f"fits Macs with {mac} GB and more" if mac else "fits no Mac of the table (--macs)"


def _print_macs(config: ModelConfig, as_json: bool) -> None:
    from mlx_diffgemma import macs

    found = macs.table(config)
    if as_json:
        print(json.dumps({"gpu_bytes": {mac: macs.gpu_memory(mac) for mac in macs.MACS}, "context": {
            name: {mac: {"without_tower": plain, "with_tower": seen} for mac, (plain, seen) in row.items()}
            for name, row in found.items()}}))
        return
    table = Table("recipe", *(f"{mac} GB" for mac in macs.MACS), box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name, row in found.items():
        table.add_row(name, *map(macs.cell, row.values()))
    Console(highlight=False, width=max(output.width, 100)).print(table)  # a narrow terminal breaks lines, and no figure is cut off
    output.print("Thousands of tokens of context beside the weights, without and with the vision tower; – does not fit. Of a Mac's "
                 "memory its GPU may take two thirds up to 32 GB, three quarters above.", soft_wrap=True)


def _print_training(config: ModelConfig, sequence: int, batch_size: int, as_json: bool) -> None:
    from mlx_diffgemma.tuning.memory import ways

    found = ways(config, sequence, batch_size)
    if as_json:
        print(json.dumps([asdict(way) | asdict(plain) | {"grad_checkpoint": asdict(twice), "mac": plain.mac,
                                                         "mac_with_grad_checkpoint": twice.mac} for way, plain, twice in found]))
        return
    output.print(f"Fine-tuning all layers: batch size {batch_size}, {sequence:,} tokens and a canvas of {config.canvas_length}",
                 soft_wrap=True)
    table = Table("trained", "base", "weights", "all", "a Mac of", "--grad-checkpoint", "a Mac of", box=SIMPLE_HEAD)
    for way, plain, twice in found:
        table.add_row(str(way), way.recipe, _count(plain.weights, "B"), *(
            text for memory in (plain, twice)
            for text in (_count(memory.total, "B"), "none" if memory.mac is None else f"{memory.mac} GB")))
    output.print(table)
    output.print("Of a Mac's memory its GPU may take two thirds up to 32 GB, three quarters above.", soft_wrap=True)


@app.command()
def doctor(
    deep: Annotated[bool, typer.Option("--deep", help="Also check every operation at the released model's shapes, without its "
                                       "weights: about a minute on a GPU, several on a CPU, up to 5 GB of memory.")] = False,
    as_json: Json = False,
) -> None:
    """Check this machine: golden outputs, answers in every way, step time; one JSON line to paste."""
    from mlx_diffgemma.doctor import diagnose

    with _status("checking this machine") as status:
        result = diagnose(deep=deep, progress=status.update if status else lambda _: None)
    if not as_json:
        for key, value in result.machine.items():
            output.print(f"{key:8} {value}")
        output.print(f"{'memory':8} {result.memory_limit / 1e9:.1f} GB for a model")
        table = Table("", "largest logit difference", "KL, nats", "same argmax", "same steps", "ms a step", "")
        for c in result.checks:
            table.add_row(c.name, f"{c.logits:.2e}", f"{c.kl:.2e}", f"{c.argmax:.1%}", f"{c.trajectory}/{c.trajectory_steps}",
                          f"{c.milliseconds_per_step:.1f}", "ok" if c.ok else "WRONG")
        output.print(table)
        for way in result.ways:
            output.print(f"{way.name:40} {'ok' if way.ok else 'WRONG: ' + way.note}", markup=False)
        for section in result.deep:
            found = f"{section.checks} checks, largest error {section.worst:.0%} of its bound"
            output.print(f"{section.name:40} {'ok' if section.ok else 'WRONG'}, {found}", markup=False)
            for wrong in section.failed:
                output.print(f"  {wrong.name}: {wrong.note or f'error {wrong.error:.1e}, bound {wrong.bound:.0e}'}", markup=False)
    print(json.dumps(result.record()))
    if not result.ok:
        errors.print("This machine computes something else than the reference; please report the line above.")
        for line in result.advice:
            errors.print(f"- {line}", markup=False)
        raise typer.Exit(1)


@app.command()
def evaluate(
    tasks: Annotated[str | None, typer.Option(help="Suites or tasks, comma-separated: nano, pictures, sudoku, "
                                             "sudoku-6, ….")] = None,
    data: Annotated[Path | None, typer.Option(help="A jsonl file of questions of your own: `prompt` or `messages`, with "
                                              "`completion`, `schema`, or `choices` and `answer`. See docs/evaluate.md.")] = None,
    model: Model = nano.NAME,
    revision: Revision = None,
    adapter_path: Adapter = None,
    limit: Annotated[int, typer.Option(help="Questions a task, at most.")] = 500,
    seed: Annotated[int, typer.Option(help="The first seed.")] = 0,
    num_seeds: Annotated[int, typer.Option(help="How many seeds, counting up from the first.")] = 1,
    batch_size: Annotated[int, typer.Option(help="Answers that share a forward.")] = 16,
    mode: Annotated[str, typer.Option(help="'diffusion', 'ar', or 'both'.")] = "diffusion",
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", "-m")] = DEFAULTS.max_tokens,
    temp: Annotated[float | None, typer.Option(help="As in generate.")] = DEFAULTS.temperature,
    dtype: Dtype = None,
    max_denoising_steps: Steps = None,
    entropy_bound: EntropyBound = None,
    confidence_threshold: Confidence = None,
    stability_threshold: Stability = None,
    self_conditioning: SelfConditioning = None,
    coverage: Coverage = None,
    preset: Preset = None,
    diffusion_sampler: Sampler = None,
    threshold: Threshold = None,
    min_denoising_steps: MinSteps = None,
    temperature_steps: TemperatureSteps = None,
    plateau: Plateau = None,
    drop_tail: DropTail = None,
    canvas_length: CanvasLength = None,
    reroll_empty: RerollEmpty = None,
    retry_unconverged: RetryUnconverged = None,
    draft_model: Draft = None,
    draft_rules: DraftRules = None,
    output_dir: Annotated[Path | None, typer.Option(help="Write evaluate-MODE.json here.")] = None,
    as_json: Json = False,
) -> None:
    """Score a model: built-in tasks held out from training, or questions of your own."""
    from mlx_diffgemma.evaluation.run import evaluate as run
    from mlx_diffgemma.evaluation.tasks import tasks_named, tasks_of_file

    if tasks is None and data is None:
        raise UserError("Nothing to ask; give --tasks nano for example, or --data with a jsonl file.")
    asked = [*(tasks_named(tasks) if tasks is not None else ()), *(tasks_of_file(data) if data else ())]
    modes = ("diffusion", "ar") if mode == "both" else (mode,)
    if "ar" in modes and any(task.questions(1)[0].choices for task in asked):
        raise UserError("Multiple choice is read off a canvas; leave it out, or take --mode diffusion.")
    given = locals()
    per_mode = {m: _generation_options(given | {"mode": m}) for m in modes if mode != "both" or m == "diffusion"}
    for options in per_mode.values():
        del options["seed"]  # each prompt has its own
    if mode == "both":  # the rules of canvases are for these alone
        per_mode["ar"] = {"max_tokens": max_tokens, "temperature": temp, "mode": "ar"}
    if output_dir is not None:
        output_dir = expand_path(output_dir)
        check_folder(output_dir)
    with _status(f"loading {model}"):
        network, tokenizer = load(model, revision=revision, dtype=dtype, adapter_path=adapter_path)
        drafter = drafter_of(draft_model, draft_rules, network, tokenizer, mode)
    records: dict[str, dict[str, Any]] = {}
    for name, chosen in per_mode.items():
        with Progress(console=errors, transient=True) as bar:
            bars: dict[str, Any] = {}

            def advance(task: str, done: int, total: int, bar: Progress = bar, bars: dict[str, Any] = bars) -> None:
                if task not in bars:
                    bars[task] = bar.add_task(escape(task), total=total)
                bar.update(bars[task], completed=done)

            report = run(network, tokenizer, asked, limit, range(seed, seed + num_seeds), batch_size, advance, drafter, **chosen)
        record = report.record() | {"model": nano.VERSIONS.get(model, model), "draft_model": draft_model}
        if as_json:
            print(json.dumps(record), flush=True)
        else:
            output.print(f"{record['model']}, {name}", markup=False)
            for table in _scores(report):
                output.print(table)
            output.print(f"mean of the exact tasks: {report.exact_mean:.1%}")
        records[f"evaluate-{name}.json"] = record
    if output_dir is not None:  # only now, so that what cannot be written is not lost
        make_folder(output_dir)
        for file, record in records.items():
            write_json(output_dir / file, record, indent=1)


@app.command()
def parity(
    model: Model = nano.NAME,
    revision: Revision = None,
    device: Annotated[str, typer.Option(help="Where torch runs: cpu or cuda.")] = "cpu",
    prompts: Annotated[int, typer.Option(help="How many random prompts.")] = 4,
    canvases: Annotated[int, typer.Option(help="Canvases a prompt in the trajectory stages.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed of prompts and draws.")] = 0,
    as_json: Json = False,
) -> None:
    """Compare with transformers on the same checkpoint, stage by stage; exit code 1 past the tolerance."""
    try:
        from mlx_diffgemma.parity.compare import run
    except ImportError as error:
        raise UserError(f"parity needs torch and transformers ({error.name} is missing); install them with "
                        "`pip install 'mlx-diffgemma[parity]'`.") from None
    from mlx_diffgemma import hub

    folder = hub.resolve(model, revision)
    with _status("running both sides"):
        report = run(folder, device, prompts, canvases, seed)
    if as_json:
        print(json.dumps(asdict(report) | {"ok": report.ok}))
    else:
        table = Table("stage", "rows", "median", "90 %", "largest", "its median", "its 90 %", "beyond", "unexplained", "")
        for s in report.stages:
            table.add_row(s.stage, str(s.rows), f"{s.median:.1e}", f"{s.p90:.1e}", f"{s.largest:.1e}", f"{s.spread:.1e}",
                          f"{s.own_p90:.1e}", str(s.beyond), str(s.unexplained), "ok" if s.ok else "FAIL")
        output.print(table)
        table = Table("trajectories", "canvases", "steps", "ended at a rounding tie", "")
        for t in report.trajectories:
            table.add_row(t.setting, str(t.canvases), str(t.steps), str(len(t.ended)), "ok" if t.ok else "FAIL")
        output.print(table)
        for t in report.trajectories:
            for e in t.ended:
                output.print(f"{t.setting}: canvas {e.canvas}, step {e.step}, {e.decision}: margin {e.margin:.1e}, "
                             f"reference's spread {e.spread:.1e}{'' if e.excused else ' NOT EXCUSED'}")
    if not report.ok:
        raise typer.Exit(1)


app.command("serve")(serve_command)
app.command("decide")(decide_command)
app.command("infill")(infill_command)
app.command("edit")(edit_command)
app.command("lora")(lora)
app.add_typer(drafting)


@app.callback(invoke_without_command=True)
def options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def main(arguments: list[str] | None = None) -> None:
    """Entry point, with ``sys.argv``'s arguments or others; every failure becomes one line and an exit code."""
    hear_interrupts()
    warnings.showwarning = _show_warning
    for category in SHOWN:
        warnings.simplefilter("always", category)
    with reported(lambda line: errors.print(line, markup=False)):
        check_arguments(sys.argv[1:] if arguments is None else arguments)
        app(arguments)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    if issubclass(category, SHOWN):
        errors.print(f"warning: {message}", markup=False)


def _given(command: Callable[..., None], values: dict[str, Any]) -> dict[str, Any]:
    """Of what a command was called with that which is not its default, as JSON can hold it; neither what its trace names beside
    these nor what only displays."""
    named = {name: own.default for name, own in inspect.signature(command).parameters.items()
             if name not in ("prompt", "model", "seed", "show", "trace", "as_json", "verbose")}
    return {name: str(values[name]) if isinstance(values[name], Path) else values[name] for name, default in named.items()
            if values[name] != default}


def _generation_options(given: dict[str, Any]) -> dict[str, Any]:
    """The options of a generation among a command's own; what is wrong is refused here, before anything is loaded."""
    options = {f.name: given[f.name] for f in fields(GenerationOptions) if f.name in given} | {"temperature": given["temp"]}
    if options.get("canvas_length") is not None:
        with contextlib.suppress(ValueError):
            options["canvas_length"] = int(options["canvas_length"])
    if "logit_bias" in options:
        options["logit_bias"] = _json_object(options["logit_bias"], "--logit-bias") or None
    if "json_schema" in options:
        options |= constraints_of(options["json_schema"], options["regex"], options["choices"])
    GenerationOptions.from_keywords(options)
    return options


def _status(text: str) -> Any:
    return errors.status(text) if errors.is_terminal else contextlib.nullcontext()


def _json_object(text: str | None, option: str) -> dict[str, Any]:
    try:
        value = json.loads(text) if text else {}
    except json.JSONDecodeError as error:
        raise UserError(f"{option} is not valid JSON ({error}); give an object such as '{{\"key\": 1}}'.") from None
    if not isinstance(value, dict):
        raise UserError(f"{option} must be a JSON object, got {text}.")
    return value


def _count(number: float, unit: str = "") -> str:
    """12.3 GB, 4.56 M and the like."""
    for size, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {prefix}{unit}"
    return f"{number:.0f} {unit}".strip()


def _scores(report: EvaluationReport) -> Iterator[Table]:
    """A row a task, without the columns that no task has a figure for; then the groups."""
    style: dict[str, Any] = {"box": SIMPLE_HEAD, "padding": (0, 1, 0, 0), "pad_edge": False}
    figures: dict[str, Callable[[TaskResult], str]] = {
        "answers": lambda r: str(r.answers), "score": lambda r: f"{r.score:.1%}",
        "95 %": lambda r: f"{100 * r.low:.1f}-{r.high:.1%}", "partial": lambda r: _share(r.partial),
        "steps a canvas": lambda r: _or_dash(r.steps_per_canvas), "when right": lambda r: _or_dash(r.steps_when_right),
        "when wrong": lambda r: _or_dash(r.steps_when_wrong), "tokens a forward": lambda r: _or_dash(r.tokens_per_forward),
        "converged": lambda r: _share(r.converged), "drafted right": lambda r: _share(r.accepted)}
    shown = {name: cell for name, cell in figures.items() if any(cell(r) != "-" for r in report.results)}
    rows = [(escape(r.task), *(cell(r) for cell in shown.values())) for r in report.results]
    columns = (Column(name, min_width=max(map(len, cells))) for name, *cells in zip(("task", *shown), *rows, strict=True))
    table = Table(*columns, **style)
    for row in rows:
        table.add_row(*row)
    yield table
    if any(r.groups for r in report.results):
        table = Table("task", "group", "answers", "score", **style)
        for r in report.results:
            for group in r.groups:
                table.add_row(escape(r.task), escape(group.group), str(group.answers), f"{group.score:.1%}")
        yield table


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    main()
