"""From a prompt to text: ``load``, ``generate``, ``stream_generate`` and ``batch_generate``, shaped like mlx-lm's.

A canvas gives many tokens at once, so a stream brings one response a canvas (one a token with ``mode="ar"``).

    >>> model, tokenizer = load("nano")
    >>> prompt = chat_ids(tokenizer, [{"role": "user", "content": "Add 12 and 30."}])
    >>> generate(model, tokenizer, prompt, seed=0)
    '42'
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_diffgemma import hub
from mlx_diffgemma.autoregressive import CausalLoop, CausalPolicy, causal_sessions
from mlx_diffgemma.cost import held_bytes
from mlx_diffgemma.device import generation_memory
from mlx_diffgemma.drafting import DraftModel
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.files import expand_path
from mlx_diffgemma.model import DiffusionGemma
from mlx_diffgemma.options import DIFFUSION_ONLY, PENALTIES, GenerationOptions
from mlx_diffgemma.policy import Policy
from mlx_diffgemma.prompt import Medium, check_list
from mlx_diffgemma.prompt_cache import PromptCache
from mlx_diffgemma.request import GenerationResponse, Prompt, Request, check_room
from mlx_diffgemma.session import CanvasStep, Loop, Session, run
from mlx_diffgemma.tokenizer import load_tokenizer
from mlx_diffgemma.tuning.adapters import load_adapter
from mlx_diffgemma.weights import check_supported, load_model

OnStep = Callable[[CanvasStep], None]


def load(model: str, *, revision: str | None = None, dtype: str | None = None, adapter_path: str | None = None,
         ) -> tuple[DiffusionGemma, TokenizerWrapper]:
    """(model, tokenizer) of "nano", a checkpoint folder or a Hub repository, with the adapter of a folder if one is given.

    ``dtype`` overrides the compute dtype: float32, bfloat16 or float16.  Errors: UserError.
    """
    folder = hub.resolve(model, revision, before_weights=check_supported)
    loaded = load_model(folder, dtype)
    if adapter_path is not None:
        load_adapter(loaded, expand_path(adapter_path))
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
    request = Request.prepare(model, tokenizer, prompt, chosen, prefix, images=images)
    check_room(model, [len(request.ids)], 1, request.patches, chosen.prefill_step_size)
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
    requests = list[Request]()
    for index, prompt in enumerate(prompts):
        request = Request.prepare(model, tokenizer, prompt, chosen, seed=None if seeds is None else seeds[index],
                                  images=() if images is None else images[index])
        if len(prompts) > batch_size:  # every image was looked at, but only those of running answers are held
            request.images = ()
        requests.append(request)
    check_room(model, [len(r.ids) for r in requests], batch_size, max((r.patches for r in requests), default=0),
               chosen.prefill_step_size)
    answers: list[GenerationResponse | None] = [None] * len(requests)
    if chosen.mode == "ar":
        run = _batch_causal(model, requests, chosen, batch_size, draft_model)
    else:
        run = _batch_canvases(model, requests, _policy(model, policy, chosen, draft_model), chosen, batch_size)
    with generation_memory(partial(held_bytes, model, batch_size)):
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


def _check_policy(policy: Policy | None, options: dict[str, Any]) -> None:
    """Errors: UserError for options that a given policy decides itself."""
    if policy is not None and options.get("mode") == "ar":
        raise UserError("policy and on_step belong to canvases; leave them out with mode 'ar'.")
    decided = [name for name in options if name in (*DIFFUSION_ONLY, "temperature", "top_k", "top_p", "min_p", *PENALTIES)]
    if policy is not None and decided:
        raise UserError(f"{decided[0]} is for the policy to decide, which was given; set it there.")


def _check_draft(draft: DraftModel | None, options: GenerationOptions) -> None:
    """Errors: UserError for options of a draft model that have no meaning."""
    if draft is not None and options.constraints:
        raise UserError(f"A draft_model knows nothing of {next(iter(options.constraints))}; leave one of them out.")
    if draft is not None and options.penalties:
        raise UserError("A draft_model knows nothing of penalties and logit_bias; leave one of them out.")
    if options.num_draft_tokens is not None and (draft is None or options.mode != "ar"):
        raise UserError("num_draft_tokens has no meaning without a draft_model and mode 'ar'; leave it out.")


def _policy(model: DiffusionGemma, given: Policy | None, options: GenerationOptions, draft: DraftModel | None) -> Policy:
    policy = given or options.policy(model)
    return draft.canvas(model, policy) if draft else policy


def _stream_canvases(model: DiffusionGemma, request: Request, policy: Policy, options: GenerationOptions,
                     on_step: OnStep | None, progress: Callable[[int, int], None] | None,
                     prompt_cache: PromptCache | None) -> Iterator[GenerationResponse]:
    session = request.session(model, policy, prompt_cache=prompt_cache)
    loop = Loop(model, [session], options.prefill_step_size, progress)
    with generation_memory(partial(held_bytes, model)):
        request.begin()
        while loop.active:
            for _, step in loop.advance():
                request.prefill_seconds = session.prefill_seconds
                if on_step:
                    mx.eval(step.canvas, step.argmax, step.accepted, step.entropy, step.logprob)  # for any thread to read
                    on_step(step)
                if step.committed:
                    yield request.add_canvas(session.canvases[-1], session.finished)


def _stream_causal(model: DiffusionGemma, request: Request, options: GenerationOptions, draft: DraftModel | None,
                   ) -> Iterator[GenerationResponse]:
    loop = _causal_loop(model, [request], options, draft)
    with generation_memory(partial(held_bytes, model)):
        request.begin()
        loop.prefill()
        while loop.active:
            new = loop.advance()
            request.prefill_seconds = request.prefill_seconds or time.perf_counter() - request.began
            for token in new:
                yield request.add_token(token, done=token.session.finished and token is new[-1])


def _causal_loop(model: DiffusionGemma, requests: Sequence[Request], options: GenerationOptions, draft: DraftModel | None,
                 ) -> CausalLoop:
    penalties = options.penalties
    if penalties:
        penalties.check_vocabulary(model.config.text.vocab_size)
    sessions = causal_sessions(model, [r.ids for r in requests],
                               CausalPolicy(options.temperature or 0.0, options.top_k, options.top_p, options.min_p, penalties),
                               [r.draws(model) for r in requests], requests[0].eos_ids, [r.limit for r in requests],
                               [r.images for r in requests])
    return CausalLoop(model, sessions, options.prefill_step_size, draft.causal(model) if draft else None, options.num_draft_tokens)


def _batch_canvases(model: DiffusionGemma, requests: Sequence[Request], policy: Policy, options: GenerationOptions,
                    batch_size: int) -> Iterator[tuple[int, GenerationResponse]]:
    owner: dict[int, int] = {}  # id of a session to the index of its request

    def sessions() -> Iterator[Session]:
        for index, request in enumerate(requests):
            request.open()
            session = request.session(model, policy)
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


def _batch_causal(model: DiffusionGemma, requests: Sequence[Request], options: GenerationOptions, batch_size: int,
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
