"""From a prompt to text: ``load``, ``generate``, ``stream_generate`` and ``batch_generate``, shaped like mlx-lm's.

A canvas gives many tokens at once, so a stream brings one response a canvas (one a token with ``mode="ar"``).

    >>> model, tokenizer = load("nano")
    >>> prompt = chat_ids(tokenizer, [{"role": "user", "content": "Add 12 and 30."}])
    >>> generate(model, tokenizer, prompt, seed=0)
    '42'
"""

from __future__ import annotations

import difflib
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_diffgemma import cost, hub
from mlx_diffgemma.autoregressive import CausalLoop, CausalPolicy, CausalToken, causal_sessions
from mlx_diffgemma.config import GenerationConfig
from mlx_diffgemma.demands import Demands, Stretch
from mlx_diffgemma.device import check_memory, generation_memory
from mlx_diffgemma.drafting import DraftModel
from mlx_diffgemma.draws import Draws
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.grammar.constraint import check_constraint, compile_constraint
from mlx_diffgemma.images import check_budget
from mlx_diffgemma.model import DiffusionGemma
from mlx_diffgemma.policy import Policy, ReferencePolicy, check_coverage, check_sampling
from mlx_diffgemma.prompt import Medium, PlacedImage, check_list, place, prepare_media
from mlx_diffgemma.prompt_cache import PromptCache
from mlx_diffgemma.rules import PRESETS, SAMPLERS, ConfidencePolicy, RulesPolicy
from mlx_diffgemma.session import PREFILL_STEP_SIZE, Canvas, CanvasStep, Loop, Session, run
from mlx_diffgemma.tokenizer import ResponseParser, answer_part, encode_prompt, load_tokenizer
from mlx_diffgemma.tuning.adapters import load_adapter
from mlx_diffgemma.video import VideoWarning
from mlx_diffgemma.weights import check_supported, load_model

MODES = ("diffusion", "ar")
DEFAULT_TOKEN_LIMIT = 4096
DEFAULT_COVERAGE = 1 - 1e-6  # moved no token of 1,512 answers, see docs/speed.md
Prompt: TypeAlias = "str | Sequence[int] | mx.array"
OnStep = Callable[[CanvasStep], None]

# Keywords of mlx_lm that mean nothing here, and why.
REFUSED = {
    "sampler": "a canvas is drawn as a whole; use temperature, top_k, top_p or policy",
    "logits_processors": "they read the tokens to the left, which a canvas does not have yet",
    "max_kv_size": "the reference's sliding layers keep exactly their window",
    "kv_bits": "quantised caches break this family, whose attention scale is 1",
    "kv_group_size": "quantised caches break this family, whose attention scale is 1",
    "quantized_kv_start": "quantised caches break this family, whose attention scale is 1",
    "input_embeddings": "a prompt is text, ids and images=",
    "image": "give a list, images=[…]",
    "min_p": "only top_k and top_p act on a canvas",
    "repetition_penalty": "it reads the tokens to the left, which a canvas does not have yet",
}


class GenerationWarning(UserWarning):
    """Something the caller should see: a canvas that did not converge, an empty answer, a malformed tool call."""


@dataclass(frozen=True)
class GenerationOptions:
    """Every option of a generation with its default; the command line and other front ends take theirs from here.

    None means the checkpoint's own number.  ``temperature``: in diffusion mode None or 1 is the checkpoint's schedule, T
    scales it, 0 takes the argmax in place of the draw; in ar mode None or 0 is greedy.  ``max_tokens`` None: until the end
    token, at most 4,096 or the context.  ``seed`` None: a fresh one, told in the response.  ``self_conditioning`` None or
    "sparse": from the 64 most probable tokens where these hold ``coverage`` of the mass (None: 1 - 1e-6), over the whole
    vocabulary elsewhere; "dense": over the whole vocabulary everywhere, as the reference.

    ``preset`` names a set of rules (see ``rules.PRESETS``) that other options override.  ``diffusion_sampler`` is "entropy-bound",
    the reference, or "confidence-threshold" with its ``threshold``.  The options after it are the rules of
    ``rules.RulesPolicy``, all off by default.  ``num_draft_tokens``: how many tokens a ``draft_model`` may propose at once with
    ``mode="ar"``; None: as many as its blocks hold.  ``image_tokens``: how many soft tokens an image may take (70, 140, 280, 560
    or 1,120); None: the checkpoint's number, and 70 for each frame of a video.

    ``json_schema`` (an object, or its text), ``regex`` or ``choices`` (texts): the answer is one that these admit, whatever the
    model thinks (docs/structure.md); what stands in ``prefix`` is taken as its begin.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    mode: str = "diffusion"
    max_denoising_steps: int | None = None
    entropy_bound: float | None = None
    t_min: float | None = None
    t_max: float | None = None
    confidence_threshold: float | None = None
    stability_threshold: int | None = None
    self_conditioning: str | None = None
    coverage: float | None = None
    preset: str | None = None
    diffusion_sampler: str | None = None
    threshold: float | None = None
    min_denoising_steps: int | None = None
    temperature_steps: int | None = None
    plateau: int | None = None
    drop_tail: int | None = None
    canvas_length: int | str | None = None
    reroll_empty: int | None = None
    retry_unconverged: int | None = None
    num_draft_tokens: int | None = None
    image_tokens: int | None = None
    json_schema: Any = None
    regex: str | None = None
    choices: Sequence[str] | None = None
    prefill_step_size: int = PREFILL_STEP_SIZE

    @classmethod
    def from_keywords(cls, keywords: dict[str, Any]) -> GenerationOptions:
        """Errors: UserError naming an unknown keyword, or one of mlx-lm's that has no meaning here."""
        known = [f.name for f in fields(cls)]
        for name in keywords:
            if name in REFUSED:
                raise UserError(f"{name}= is not supported: {REFUSED[name]}.")
            if name not in known:
                close = difflib.get_close_matches("temperature" if name == "temp" else name, known, n=1)
                raise UserError(f"Unknown option {name!r}{f'; did you mean {close[0]!r}?' if close else ''} "
                                f"Known are {', '.join(known)}.")
        return cls(**keywords)

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(f"Unknown mode {self.mode!r}; use one of {', '.join(MODES)}.")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UserError(f"max_tokens must be at least 1, got {self.max_tokens}.")
        if self.num_draft_tokens is not None and self.num_draft_tokens < 1:
            raise UserError(f"num_draft_tokens must be at least 1, got {self.num_draft_tokens}.")
        if self.prefill_step_size < 2:
            raise UserError(f"prefill_step_size must be at least 2, got {self.prefill_step_size}.")
        if self.image_tokens is not None:
            check_budget(self.image_tokens)
        check_sampling(1.0 if self.temperature is None else self.temperature, self.top_k, self.top_p)
        if self.self_conditioning not in (None, "sparse", "dense"):
            raise UserError(f"Unknown self_conditioning {self.self_conditioning!r}; use 'sparse' or 'dense'.")
        if self.coverage is not None:
            if self.self_conditioning == "dense":
                raise UserError("coverage has no meaning with dense self-conditioning; leave one of them out.")
            check_coverage(self.coverage)
        for name, known in (("preset", tuple(PRESETS)), ("diffusion_sampler", SAMPLERS)):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise UserError(f"Unknown {name} {value!r}; use one of {', '.join(known)}.")
        confidence = self.chosen("diffusion_sampler") == "confidence-threshold"
        if self.threshold is not None and not confidence:
            raise UserError("threshold belongs to the sampler 'confidence-threshold'; choose that or leave it out.")
        if self.entropy_bound is not None and confidence:
            raise UserError("entropy_bound has no meaning with the sampler 'confidence-threshold'; leave one of them out.")
        # Numbers out of range are refused here; what depends on the checkpoint's numbers, in ``policy``.
        self._policy(GenerationConfig(max_denoising_steps=10**9, t_min=1e-9, t_max=1e9))
        if self.mode == "ar" and (diffusion := [name for name in DIFFUSION_ONLY if getattr(self, name) is not None]):
            raise UserError(f"{diffusion[0]} has no meaning with mode 'ar', which runs no denoising steps; leave it out.")
        if self.constraints:
            if self.mode == "ar":
                raise UserError(f"{next(iter(self.constraints))} constrains canvases; leave it out with mode 'ar'.")
            check_constraint(**self.constraints)

    @property
    def constraints(self) -> dict[str, Any]:
        """Those of json_schema, regex and choices that were given."""
        return {name: getattr(self, name) for name in CONSTRAINTS if getattr(self, name) is not None}

    def chosen(self, name: str) -> Any:
        """The option itself, or what the preset says, or None."""
        own = getattr(self, name)
        return PRESETS[self.preset].get(name) if own is None and self.preset is not None else own

    def policy(self, model: DiffusionGemma) -> ReferencePolicy:
        """The policy of these options, with the checkpoint's numbers where they name none.  Errors: UserError."""
        length, full = self.chosen("canvas_length"), model.config.canvas_length
        if length is not None and not isinstance(length, str) and length > full:
            raise UserError(f"canvas_length {length} exceeds the {full} positions this checkpoint was made for.")
        return self._policy(model.config.generation)

    def _policy(self, config: GenerationConfig) -> ReferencePolicy:
        coverage = self.chosen("coverage")
        if self.self_conditioning == "dense":
            coverage = None
        elif coverage is None:
            coverage = DEFAULT_COVERAGE
        named = {field: self.chosen(name) for name, field in POLICY_FIELDS.items()}
        own = {field: value for field, value in named.items() if value is not None}
        own |= {"temperature": 1.0 if self.chosen("temperature") is None else self.chosen("temperature"), "top_k": self.top_k,
                "top_p": self.top_p, "coverage": coverage}
        if self.chosen("diffusion_sampler") == "confidence-threshold":
            kind: type[ReferencePolicy] = ConfidencePolicy
        else:
            kind = RulesPolicy if any(name in own for name in RULES.values()) else ReferencePolicy
        policy: ReferencePolicy = kind.from_config(config, **own)
        return policy


# Names of options, and of what they set in the policy.
NUMBERS = {"max_denoising_steps": "max_steps", "entropy_bound": "entropy_bound", "t_min": "t_min", "t_max": "t_max",
           "confidence_threshold": "confidence_threshold", "stability_threshold": "stability"}
RULES = {"threshold": "threshold", "min_denoising_steps": "min_steps", "temperature_steps": "temperature_steps",
         "plateau": "plateau", "drop_tail": "drop_tail", "canvas_length": "length", "reroll_empty": "reroll_empty",
         "retry_unconverged": "retry_unconverged"}
POLICY_FIELDS = NUMBERS | RULES
DIFFUSION_ONLY = (*POLICY_FIELDS, "self_conditioning", "coverage", "preset", "diffusion_sampler")
CONSTRAINTS = ("json_schema", "regex", "choices")


@dataclass(frozen=True)
class GenerationResponse:
    """A piece of an answer: one canvas, or one token with ``mode="ar"``.

    mlx-lm's fields keep their meaning: ``text`` is the visible text this piece added, ``token`` its last token,
    ``generation_tokens`` and the rates count from the beginning, ``peak_memory`` is in GB, ``finish_reason`` is None until
    the end, then "stop", "length" or "empty" (the end token came first).  ``logprobs`` holds one log-probability a token,
    under the last step's scaled distribution (with ``mode="ar"`` the whole row [vocabulary] at temperature 1).

    Beyond them: ``tokens`` of this piece (the end token included), ``thought`` and ``tool_calls`` parsed out of the text,
    denoising ``steps`` of this canvas and the canvas ``rows`` they computed, ``judged``, the causal passes that a drafted
    canvas was judged by, ``tokens_per_forward`` so far (end token included; of steps and judges' passes, prefill and commits not
    counted), ``canvas_index``, whether the canvas ``converged``, ``retries`` it took, the ``seed``, and of a draft model's tokens
    so far how many it ``proposed`` and how many of these were ``accepted``.
    ``certificate`` names the rule under which a canvas converged ("stable-and-confident", "causal"…), None where it did not.
    """

    text: str
    token: int
    logprobs: Any
    from_draft: bool
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    peak_memory: float
    finish_reason: str | None = None
    tokens: tuple[int, ...] = ()
    thought: str = ""
    tool_calls: tuple[dict[str, Any], ...] = ()
    steps: int = 0
    judged: int = 0
    tokens_per_forward: float = 0.0
    canvas_index: int = 0
    converged: bool = True
    retries: int = 0
    rows: int = 0
    seed: int = 0
    proposed: int = 0
    accepted: int = 0
    certificate: str | None = None
    parts: tuple[GenerationResponse, ...] = ()  # the responses a whole answer of batch_generate was put together from

    @property
    def is_canvas(self) -> bool:
        """Whether it is one of canvases, not of tokens left to right; a drafted canvas may have taken no step."""
        return self.certificate is not None or not self.converged


def load(model: str, *, revision: str | None = None, dtype: str | None = None, adapter_path: str | None = None,
         ) -> tuple[DiffusionGemma, TokenizerWrapper]:
    """(model, tokenizer) of "nano", a checkpoint folder or a Hub repository, with the adapter of a folder if one is given.

    ``dtype`` overrides the compute dtype: float32, bfloat16 or float16.  Errors: UserError.
    """
    folder = hub.resolve(model, revision, before_weights=check_supported)
    loaded = load_model(folder, dtype)
    if adapter_path is not None:
        load_adapter(loaded, Path(adapter_path))
    return loaded, load_tokenizer(folder, loaded.config.generation.eos_token_ids)


def stream_generate(
    model: DiffusionGemma,
    tokenizer: TokenizerWrapper,
    prompt: Prompt,
    max_tokens: int | None = None,
    *,
    policy: Policy | None = None,
    on_step: OnStep | None = None,
    prefix: Sequence[int] = (),
    prompt_cache: PromptCache | None = None,
    prompt_progress_callback: Callable[[int, int], None] | None = None,
    draft_model: DraftModel | None = None,
    images: Sequence[Medium] = (),
    **options: Any,
) -> Iterator[GenerationResponse]:
    """Answer ``prompt`` (text, or ids), yielding a response a canvas.

    ``on_step`` is shown every denoising step and cannot change a token.  ``prefix`` are ids at the end of the prompt that
    already belong to the answer (a prefilled thought, say), so that the parser knows where it stands.  ``prompt_cache``
    keeps what was encoded, so that a next prompt that begins alike encodes only the rest.  ``draft_model`` proposes tokens, which
    the model checks: with ``mode="ar"`` that changes no token but where rounding breaks a tie; a canvas starts from other ids and
    may end in another text, under the same certificate (docs/drafting.md).  ``images`` are paths, data URLs, bytes, images of
    Pillow or a ``Video``, one for each image marker of the prompt and in their order (docs/images.md).  ``options`` are the
    fields of GenerationOptions.
    Errors: UserError, for options out of range and prompts that do not fit the context.
    """
    chosen = GenerationOptions.from_keywords({"max_tokens": max_tokens, **options})
    _check_policy(policy, options)
    _check_draft(draft_model, chosen)
    request = _Request.prepare(model, tokenizer, prompt, chosen, prefix, images=images)
    check_room(model, [len(request.ids)], 1, request.patches)
    if chosen.mode == "ar":
        if on_step is not None:
            raise UserError("policy and on_step belong to canvases; leave them out with mode 'ar'.")
        if prompt_cache is not None:
            raise UserError("prompt_cache belongs to canvases; leave it out with mode 'ar'.")
        return _stream_causal(model, request, chosen, draft_model)
    return _stream_canvases(model, request, _policy(model, policy, chosen, draft_model), chosen, on_step, prompt_progress_callback,
                            prompt_cache)


def generate(model: DiffusionGemma, tokenizer: TokenizerWrapper, prompt: Prompt, verbose: bool = False,
             **options: Any) -> str:
    """The whole visible answer to ``prompt``; ``verbose`` prints it as it comes, with figures at the end."""
    pieces, last = [], None
    for last in stream_generate(model, tokenizer, prompt, **options):
        pieces.append(last.text)
        if verbose:
            print(last.text, end="", flush=True)
    if verbose and last is not None:
        print(f"\n{summary(last)}")
    return "".join(pieces)


def batch_generate(
    model: DiffusionGemma,
    tokenizer: TokenizerWrapper,
    prompts: Sequence[Prompt],
    *,
    seeds: Sequence[int] | None = None,
    policy: Policy | None = None,
    draft_model: DraftModel | None = None,
    images: Sequence[Sequence[Medium]] | None = None,
    batch_size: int = 8,
    on_answer: Callable[[int, GenerationResponse], None] | None = None,
    **options: Any,
) -> list[GenerationResponse]:
    """One response a prompt, each with the whole answer; what runs beside a prompt does not change its answer.

    Up to ``batch_size`` answers share a forward; a finished one makes room for the next prompt at once.  ``seeds`` gives
    each prompt its own, else all take ``seed``; ``images`` gives each those of its own.  All are refused or accepted before the
    first answer; of more prompts than run together they are opened again when their turn comes.
    """
    chosen = GenerationOptions.from_keywords(options)
    _check_policy(policy, options)
    _check_draft(draft_model, chosen)
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}.")
    if seeds is not None and len(seeds) != len(prompts):
        raise UserError(f"seeds must have one entry a prompt: got {len(seeds)} for {len(prompts)} prompts.")
    if images is not None and len(check_list(images)) != len(prompts):
        raise UserError(f"images must have one list a prompt: got {len(images)} for {len(prompts)} prompts.")
    requests = list[_Request]()
    for index, prompt in enumerate(prompts):
        request = _Request.prepare(model, tokenizer, prompt, chosen, seed=None if seeds is None else seeds[index],
                                   images=() if images is None else images[index])
        if len(prompts) > batch_size:  # every image was looked at, but only those of running answers are held
            request.images = ()
        requests.append(request)
    check_room(model, [len(r.ids) for r in requests], batch_size, max((r.patches for r in requests), default=0))
    answers: list[GenerationResponse | None] = [None] * len(requests)
    if chosen.mode == "ar":
        run = _batch_causal(model, requests, chosen, batch_size, draft_model)
    else:
        run = _batch_canvases(model, requests, _policy(model, policy, chosen, draft_model), chosen, batch_size)
    with generation_memory():
        for index, response in run:
            answers[index] = response
            if on_answer:
                on_answer(index, response)
    return [answer for answer in answers if answer is not None]


def summary(response: GenerationResponse) -> str:
    """The figures of a finished answer in two lines."""
    canvases = f"{response.canvas_index + 1} canvas(es), " if response.is_canvas else ""
    drafted = f"{response.accepted} of {response.proposed} drafted tokens accepted, " if response.proposed else ""
    return (f"Prompt: {response.prompt_tokens} tokens, {response.prompt_tps:.1f} tokens/s\n"
            f"Answer: {response.generation_tokens} tokens, {response.generation_tps:.1f} tokens/s, "
            f"{response.tokens_per_forward:.1f} tokens a forward, {canvases}{drafted}"
            f"peak memory {response.peak_memory:.2f} GB, finished by {response.finish_reason}, seed {response.seed}")


@dataclass
class _Request:
    """One prompt on its way to an answer: what was asked, and the bookkeeping from token ids to responses."""

    ids: list[int]
    limit: int
    seed: int
    parser: ResponseParser
    eos_ids: tuple[int, ...]
    opened: Callable[[], tuple[list[int], tuple[PlacedImage, ...]]]  # opens the images again
    images: tuple[PlacedImage, ...] = ()
    patches: int = 0  # of the largest image
    demands: Demands | None = None
    began: float = 0.0
    prefill_seconds: float = 0.0
    produced: int = 0  # tokens, end token included
    cut: int = 0  # tokens, cut at the limit, end token left out
    forwards: int = 0
    proposed: int = 0  # by a drafter, and how many of these were right
    accepted: int = 0
    anything: bool = False  # whether text or a call has come
    responses: list[GenerationResponse] = field(default_factory=list)

    @classmethod
    def prepare(cls, model: DiffusionGemma, tokenizer: TokenizerWrapper, prompt: Prompt, options: GenerationOptions,
                prefix: Sequence[int] = (), seed: int | None = None, images: Sequence[Medium] = ()) -> _Request:
        """Errors: UserError for an empty prompt, ids out of the vocabulary, images without a place, or an answer that would pass
        the context."""
        ids = prompt_ids(model, tokenizer, prompt)

        def opened(asked: list[int] = ids) -> tuple[list[int], tuple[PlacedImage, ...]]:
            media = prepare_media(images, model.config, options.image_tokens)
            return place(asked, media, model.config.image_tokens, tokenizer)

        ids, placed = opened()
        length = 1 if options.mode == "ar" else model.config.canvas_length
        parser = ResponseParser(tokenizer)
        parser.feed(prefix)
        chosen = options.seed if seed is None else seed
        limit = token_limit(len(ids), options.max_tokens, length, model.config.text.max_position_embeddings)
        eos_ids = model.config.generation.eos_token_ids
        demands = None
        if options.constraints:
            constraint = compile_constraint(tokenizer, model.config, **options.constraints)
            demands = Demands(eos_ids, limit, stretches=[Stretch(constraint, begun=tuple(answer_part(tokenizer, prefix)))])
        return cls(ids, limit, int.from_bytes(os.urandom(4), "little") if chosen is None else chosen, parser, eos_ids, opened,
                   placed, max((math.prod(p.image.grid) for p in placed), default=0), demands)

    def draws(self, model: DiffusionGemma) -> Draws:
        return Draws(self.seed, model.config.text.vocab_size)

    def begin(self) -> None:
        self.began = time.perf_counter()

    def open(self) -> None:
        """Take up the images again that were let go.  Errors: UserError when they are not what they were."""
        if not self.patches or self.images:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", VideoWarning)  # told the first time
            ids, self.images = self.opened()
        if ids != self.ids:
            raise UserError("An image or video was changed after the batch began; leave the files as they are until it ends.")

    def add(self, tokens: Sequence[int], logprobs: Any, done: bool, canvas: Canvas | None = None, from_draft: bool = False,
            ) -> GenerationResponse:
        """The response for newly produced ``tokens`` (an end token, if any, is the last); ``done``: nothing follows."""
        ended = bool(tokens) and tokens[-1] in self.eos_ids
        visible = list(tokens[:-1] if ended else tokens)
        steps = canvas.steps if canvas else 0
        self.produced, self.forwards = self.produced + len(tokens), self.forwards + steps + (canvas.judged if canvas else 0)
        over = self.cut + len(visible) - self.limit
        if over > 0:
            visible, tokens, ended = visible[:-over], tokens[: len(visible) - over], False
        elif ended and self.cut + len(visible) == self.limit:
            tokens = tokens[:-1]  # the limit leaves no place for the end token, but the answer is whole
        self.cut += len(visible)
        delta = self.parser.feed(visible)
        text, thought, calls = delta.answer, delta.thought, delta.tool_calls
        if done:
            rest = self.parser.finish()
            text, thought = text + rest.answer, thought + rest.thought
        self.anything = self.anything or bool(text.strip() or calls)
        # A constraint can tell that nothing follows before an end token comes.
        whole = ended or (self.demands is not None and canvas is not None and canvas.ended)
        reason = None if not done else "length" if not whole else "stop" if self.anything else "empty"
        now, index = time.perf_counter(), len(self.responses) if canvas else 0
        if canvas:
            logprobs = logprobs[: len(tokens)]
        response = GenerationResponse(
            text=text, token=int(tokens[-1]) if tokens else -1, logprobs=logprobs, from_draft=from_draft,
            prompt_tokens=len(self.ids), prompt_tps=len(self.ids) / max(self.prefill_seconds, 1e-9),
            generation_tokens=min(self.cut + ended, self.limit),
            generation_tps=min(self.cut + ended, self.limit) / max(now - self.began - self.prefill_seconds, 1e-9),
            peak_memory=mx.get_peak_memory() / 1e9, finish_reason=reason, tokens=tuple(int(t) for t in tokens),
            thought=thought, tool_calls=calls, steps=steps, judged=canvas.judged if canvas else 0,
            tokens_per_forward=self.produced / self.forwards if self.forwards else 1.0,
            canvas_index=index, converged=canvas.converged if canvas else True, retries=canvas.retries if canvas else 0,
            rows=canvas.rows if canvas else 0, seed=self.seed, proposed=self.proposed, accepted=self.accepted,
            certificate=canvas.certificate if canvas else None,
        )
        # The causal mode's rows over the vocabulary are for the caller; keeping them would grow by a megabyte a token.
        self.responses.append(response if canvas else replace(response, logprobs=None))
        self._warn(response)
        return response

    def add_token(self, new: CausalToken, done: bool) -> GenerationResponse:
        session = new.session
        self.forwards, self.proposed, self.accepted = session.forwards, session.proposed, session.accepted
        return self.add([new.token], new.logprobs, done, from_draft=new.from_draft)

    def add_canvas(self, canvas: Canvas, done: bool) -> GenerationResponse:
        self.proposed, self.accepted = self.proposed + canvas.proposed, self.accepted + canvas.accepted
        return self.add(canvas.tokens.tolist(), canvas.logprobs, done, canvas)

    def whole(self) -> GenerationResponse:
        """All responses so far as one."""
        parts = self.responses
        return replace(
            parts[-1], text="".join(r.text for r in parts), thought="".join(r.thought for r in parts),
            tool_calls=tuple(call for r in parts for call in r.tool_calls), tokens=tuple(t for r in parts for t in r.tokens),
            steps=sum(r.steps for r in parts), judged=sum(r.judged for r in parts), rows=sum(r.rows for r in parts),
            retries=sum(r.retries for r in parts),
            converged=all(r.converged for r in parts), parts=tuple(parts),
        )

    def _warn(self, response: GenerationResponse) -> None:
        if not response.converged:
            attempts = f" in {response.retries + 1} attempts" if response.retries else ""
            warnings.warn(f"Canvas {response.canvas_index} did not converge within {response.steps} denoising steps{attempts}; "
                          "its text may be faulty.", GenerationWarning, stacklevel=4)
        if response.finish_reason == "empty":
            warnings.warn("The answer is empty: the end token came first; try another seed or a fuller prompt.",
                          GenerationWarning, stacklevel=4)
        if response.finish_reason and self.parser.malformed:
            warnings.warn(f"{len(self.parser.malformed)} tool call(s) could not be parsed: {self.parser.malformed[0]!r}.",
                          GenerationWarning, stacklevel=4)


def prompt_ids(model: DiffusionGemma, tokenizer: TokenizerWrapper, prompt: Prompt) -> list[int]:
    """Ids of a prompt, a marker for each image.  Errors: UserError for an empty prompt, or ids out of the vocabulary."""
    ids = encode_prompt(tokenizer, prompt) if isinstance(prompt, str) else [int(token) for token in np.array(prompt)]
    vocabulary = model.config.text.vocab_size
    if not ids or (isinstance(prompt, str) and not prompt.strip()):
        raise UserError("The prompt is empty; give at least one character.")
    if not all(0 <= token < vocabulary for token in ids):
        raise UserError(f"The prompt holds token ids outside 0 to {vocabulary - 1}; it was made with another tokenizer.")
    return ids


def token_limit(prompt: int, max_tokens: int | None, canvas_length: int, context: int) -> int:
    """How many tokens an answer may have; whole canvases must fit the ``context`` behind the ``prompt``.

    Errors: UserError when they do not.
    """
    room = (context - prompt) // canvas_length * canvas_length
    if room <= 0:
        raise UserError(f"The prompt has {prompt:,} tokens and the context holds {context:,}, which leaves no room for an "
                        f"answer of one canvas ({canvas_length} tokens); shorten the prompt.")
    if max_tokens is None:
        return min(DEFAULT_TOKEN_LIMIT, room)
    if max_tokens > room:
        raise UserError(f"max_tokens {max_tokens:,} does not fit: the prompt has {prompt:,} tokens and the context holds "
                        f"{context:,}, so at most {room:,} are possible.")
    return max_tokens


def check_room(model: DiffusionGemma, lengths: Sequence[int], batch_size: int = 1, patches: int = 0) -> None:
    """Errors: UserError when weights, caches and logits of ``batch_size`` answers to prompts of these ``lengths``, and the largest
    image of so many ``patches``, cannot be held, before they are allocated."""
    config, element = model.config, model.dtype.size
    longest = sorted(lengths, reverse=True)[:batch_size] or [0]
    weights = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    needed = weights + sum(cost.run_bytes(config, 0, length + config.canvas_length, element) for length in longest)
    if config.vision:  # one image at a time
        needed += cost.tower_bytes(config.vision, patches)
    many = len(longest) > 1
    size = f"{longest[0]:,} tokens"
    what = f"Running {len(longest)} prompts of up to {size} together" if many else f"A prompt of {size}"
    check_memory(needed, what, f"{'take fewer at once' if many else 'shorten it'}, or take a conversion with fewer bits")


def _check_policy(policy: Policy | None, options: dict[str, Any]) -> None:
    """Errors: UserError for options that a given policy decides itself."""
    if policy is not None and options.get("mode") == "ar":
        raise UserError("policy and on_step belong to canvases; leave them out with mode 'ar'.")
    decided = [name for name in options if name in (*DIFFUSION_ONLY, "temperature", "top_k", "top_p")]
    if policy is not None and decided:
        raise UserError(f"{decided[0]} is for the policy to decide, which was given; set it there.")


def _check_draft(draft: DraftModel | None, options: GenerationOptions) -> None:
    """Errors: UserError for options of a draft model that have no meaning."""
    if draft is not None and options.constraints:
        raise UserError(f"A draft_model knows nothing of {next(iter(options.constraints))}; leave one of them out.")
    if options.num_draft_tokens is not None and (draft is None or options.mode != "ar"):
        raise UserError("num_draft_tokens has no meaning without a draft_model and mode 'ar'; leave it out.")


def _policy(model: DiffusionGemma, given: Policy | None, options: GenerationOptions, draft: DraftModel | None) -> Policy:
    policy = given or options.policy(model)
    return draft.canvas(model, policy) if draft else policy


def _session(model: DiffusionGemma, request: _Request, policy: Policy, prompt_cache: PromptCache | None = None) -> Session:
    return Session(model, request.ids, policy, request.draws(model), request.eos_ids, request.limit, prompt_cache=prompt_cache,
                   images=request.images, demands=request.demands)


def _stream_canvases(model: DiffusionGemma, request: _Request, policy: Policy, options: GenerationOptions,
                     on_step: OnStep | None, progress: Callable[[int, int], None] | None,
                     prompt_cache: PromptCache | None) -> Iterator[GenerationResponse]:
    session = _session(model, request, policy, prompt_cache)
    loop = Loop(model, [session], options.prefill_step_size, progress)
    with generation_memory():
        request.begin()
        while loop.active:
            for _, step in loop.advance():
                request.prefill_seconds = session.prefill_seconds
                if on_step:
                    on_step(step)
                if step.committed:
                    yield request.add_canvas(session.canvases[-1], session.finished)


def _stream_causal(model: DiffusionGemma, request: _Request, options: GenerationOptions, draft: DraftModel | None,
                   ) -> Iterator[GenerationResponse]:
    loop = _causal_loop(model, [request], options, draft)
    with generation_memory():
        request.begin()
        loop.prefill()
        while loop.active:
            new = loop.advance()
            request.prefill_seconds = request.prefill_seconds or time.perf_counter() - request.began
            for token in new:
                yield request.add_token(token, done=token.session.finished and token is new[-1])


def _causal_loop(model: DiffusionGemma, requests: Sequence[_Request], options: GenerationOptions, draft: DraftModel | None,
                 ) -> CausalLoop:
    sessions = causal_sessions(model, [r.ids for r in requests],
                               CausalPolicy(options.temperature or 0.0, options.top_k, options.top_p),
                               [r.draws(model) for r in requests], requests[0].eos_ids, [r.limit for r in requests],
                               [r.images for r in requests])
    return CausalLoop(model, sessions, options.prefill_step_size, draft.causal(model) if draft else None, options.num_draft_tokens)


def _batch_canvases(model: DiffusionGemma, requests: Sequence[_Request], policy: Policy, options: GenerationOptions,
                    batch_size: int) -> Iterator[tuple[int, GenerationResponse]]:
    owner: dict[int, int] = {}  # id of a session to the index of its request

    def sessions() -> Iterator[Session]:
        for index, request in enumerate(requests):
            request.open()
            session = _session(model, request, policy)
            owner[id(session)] = index
            request.begin()
            yield session

    for session, step in run(model, sessions(), batch_size, options.prefill_step_size):
        if step.committed:
            index = owner[id(session)]
            requests[index].prefill_seconds = session.prefill_seconds
            requests[index].add_canvas(session.canvases[-1], session.finished)
            if session.finished:
                del owner[id(session)]
                requests[index].images = ()
                yield index, requests[index].whole()


def _batch_causal(model: DiffusionGemma, requests: Sequence[_Request], options: GenerationOptions, batch_size: int,
                  draft: DraftModel | None) -> Iterator[tuple[int, GenerationResponse]]:
    for first in range(0, len(requests), batch_size):
        group = requests[first : first + batch_size]
        for request in group:
            request.open()
        loop = _causal_loop(model, group, options, draft)
        place = {id(session): row for row, session in enumerate(loop.sessions)}
        for request in group:
            request.begin()
        loop.prefill()
        while loop.active:
            new = loop.advance()
            last = {id(token.session): token for token in new}
            for token in new:
                row = place[id(token.session)]
                group[row].prefill_seconds = group[row].prefill_seconds or time.perf_counter() - group[row].began
                done = token.session.finished and token is last[id(token.session)]
                group[row].add_token(token._replace(logprobs=None), done)
                if done:
                    group[row].images = ()
                    yield first + row, group[row].whole()
