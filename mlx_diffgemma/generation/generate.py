"""Text generation: ``generate``, ``stream_generate`` and ``batch_generate``, similar to mlx-lm's.

A canvas gives many tokens at once, so a stream yields one response a canvas (one a token with
``mode="ar"``).

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

from mlx_diffgemma.decoding.autoregressive import CausalLoop, CausalPolicy, causal_sessions
from mlx_diffgemma.decoding.batch import run
from mlx_diffgemma.decoding.loop import Loop
from mlx_diffgemma.decoding.prompt_cache import PromptCache
from mlx_diffgemma.decoding.records import CanvasStep
from mlx_diffgemma.decoding.session import Session
from mlx_diffgemma.device import generation_memory
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.estimate.cost import held_bytes
from mlx_diffgemma.generation.limits import check_room
from mlx_diffgemma.generation.options import DIFFUSION_ONLY, PENALTIES, GenerationOptions
from mlx_diffgemma.generation.request import Prompt, Request
from mlx_diffgemma.generation.response import GenerationResponse
from mlx_diffgemma.media.prompt import Medium, check_list
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.sampling.protocols import DraftModel, Policy

OnStep = Callable[[CanvasStep], None]


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
    """Answer one prompt, canvas by canvas.

    Args:
        model: From ``load``.
        tokenizer: From ``load``.
        prompt: Text or ids.  ``chat_ids`` makes ids of a conversation.
        max_tokens: Limit of the answer in tokens.  None: until the end token, at most 4,096 or the
            context.
        policy: A sampler of your own.  It replaces the options of sampling and stopping.
        on_step: Called with each denoising step.  It cannot change a token.
        prefix: Ids at the end of the prompt that already belong to the answer, for example a
            prefilled thought.  A constraint holds for them too.
        prompt_cache: Keeps the encoded prompt.  The next prompt encodes only the tokens that
            differ.
        prompt_progress_callback: Called with (encoded, all) tokens of the prompt.
        draft_model: Proposes tokens, which the model verifies.  With ``mode="ar"`` the text does
            not change, apart from ties in rounding.  A canvas may end in another text
            (docs/drafting.md).
        images: Paths, data URLs, bytes, Pillow images or ``Video``s, one for each image marker of
            the prompt, in the order of the markers (docs/images.md).
        options: Fields of ``GenerationOptions``.

    Returns:
        An iterator of responses: one a canvas, or one a token with ``mode="ar"``.

    Raises:
        UserError: An option is out of range or unknown, or the prompt does not fit the context.
    """
    chosen = GenerationOptions.from_keywords({"max_tokens": max_tokens, **options})
    _check_policy(policy, options)
    _check_draft(draft_model, chosen)
    request = Request.prepare(model, tokenizer, prompt, chosen, prefix, images=images)
    check_room(model, [len(request.ids)], 1, request.patches, chosen.prefill_step_size)
    if chosen.mode == "ar":
        _check_causal(on_step, prompt_cache)
        return _stream_causal(model, request, chosen, draft_model)
    own = _policy(model, policy, chosen, draft_model)
    return _stream_canvases(
        model, request, own, chosen, on_step, prompt_progress_callback, prompt_cache
    )


def _check_causal(on_step: OnStep | None, prompt_cache: PromptCache | None) -> None:
    """Raise UserError for arguments that have no meaning with ``mode="ar"``."""
    if on_step is not None:
        raise UserError("policy and on_step belong to canvases; leave them out with mode 'ar'.")
    if prompt_cache is not None:
        raise UserError("prompt_cache belongs to canvases; leave it out with mode 'ar'.")


def generate(
    model: DiffusionGemma,
    tokenizer: TokenizerWrapper,
    prompt: Prompt,
    verbose: bool = False,
    **options: Any,
) -> str:
    """Answer one prompt.

    Args:
        model: From ``load``.
        tokenizer: From ``load``.
        prompt: Text or ids.  ``chat_ids`` makes ids of a conversation.
        verbose: Print the answer as it comes, and figures at the end.
        options: Parameters of ``stream_generate`` and fields of ``GenerationOptions``.

    Returns:
        The visible text of the answer.

    Raises:
        UserError: An option is out of range or unknown, or the prompt does not fit the context.
    """
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
    """Answer several prompts in shared forwards.  The batch does not change an answer.

    All prompts and images are checked before the first answer.  A finished answer makes room for
    the next prompt at once.

    Args:
        model, tokenizer: From ``load``.
        prompts: Each is text or ids.
        seeds: One for each prompt.  None: all use ``seed``.
        policy: As in ``stream_generate``.
        draft_model: As in ``stream_generate``.
        images: A list of images for each prompt.  With more prompts than ``batch_size``, the files
            are opened again when their prompt starts.
        batch_size: How many answers run together.
        on_answer: Called with the index of a prompt and its response, as soon as it is finished.
        options: Fields of ``GenerationOptions``.

    Returns:
        One response a prompt, with the whole answer, in the order of the prompts.

    Raises:
        UserError: An option is out of range or unknown, a prompt does not fit the context, or
            ``seeds`` or ``images`` have another length than ``prompts``.
    """
    chosen = GenerationOptions.from_keywords(options)
    _check_policy(policy, options)
    _check_draft(draft_model, chosen)
    _check_batch(len(prompts), seeds, images, batch_size)
    drop = len(prompts) > batch_size
    requests = _prepare_batch(model, tokenizer, prompts, chosen, seeds, images, drop)
    patches = max((request.patches for request in requests), default=0)
    lengths = [len(request.ids) for request in requests]
    check_room(model, lengths, batch_size, patches, chosen.prefill_step_size)
    answers: list[GenerationResponse | None] = [None] * len(requests)
    if chosen.mode == "ar":
        finished = _batch_causal(model, requests, chosen, batch_size, draft_model)
    else:
        own = _policy(model, policy, chosen, draft_model)
        finished = _batch_canvases(model, requests, own, chosen, batch_size)
    with generation_memory(partial(held_bytes, model, batch_size)):
        for index, response in finished:
            answers[index] = response
            if on_answer:
                on_answer(index, response)
    return [answer for answer in answers if answer is not None]


def _prepare_batch(
    model: DiffusionGemma,
    tokenizer: TokenizerWrapper,
    prompts: Sequence[Prompt],
    options: GenerationOptions,
    seeds: Sequence[int] | None,
    images: Sequence[Sequence[Medium]] | None,
    drop_images: bool,
) -> list[Request]:
    """Check each prompt with its own seed and images.

    Args:
        model, tokenizer: From ``load``.
        prompts: Each is text or ids.
        options: The options of all prompts.
        seeds, images: As in ``batch_generate``.
        drop_images: Check every image, but keep only those of running answers in memory.
    """
    requests = list[Request]()
    for index, prompt in enumerate(prompts):
        seed = None if seeds is None else seeds[index]
        own = () if images is None else images[index]
        request = Request.prepare(model, tokenizer, prompt, options, seed=seed, images=own)
        if drop_images:
            request.images = ()
        requests.append(request)
    return requests


def _check_batch(
    prompts: int,
    seeds: Sequence[int] | None,
    images: Sequence[Sequence[Medium]] | None,
    batch_size: int,
) -> None:
    """Raise UserError if a list does not have one entry for each prompt."""
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}.")
    if seeds is not None and len(seeds) != prompts:
        raise UserError(
            f"seeds must have one entry a prompt: got {len(seeds)} for {prompts} prompts."
        )
    if images is not None and len(check_list(images)) != prompts:
        raise UserError(
            f"images must have one list a prompt: got {len(images)} for {prompts} prompts."
        )


def summary(response: GenerationResponse) -> str:
    """The figures of a finished answer in two lines."""
    canvases = f"{response.canvas_index + 1} canvas(es), " if response.is_canvas else ""
    drafted = (
        f"{response.accepted} of {response.proposed} drafted tokens accepted, "
        if response.proposed
        else ""
    )
    return (
        f"Prompt: {response.prompt_tokens} tokens, {response.prompt_tps:.1f} tokens/s\n"
        f"Answer: {response.generation_tokens} tokens, {response.generation_tps:.1f} tokens/s, "
        f"{response.tokens_per_forward:.1f} tokens a forward, {canvases}{drafted}"
        f"peak memory {response.peak_memory:.2f} GB, finished by {response.finish_reason}, seed {response.seed}"
    )


def _check_policy(policy: Policy | None, options: dict[str, Any]) -> None:
    """Raise UserError for options that the given policy decides itself."""
    if policy is not None and options.get("mode") == "ar":
        raise UserError("policy and on_step belong to canvases; leave them out with mode 'ar'.")
    decided = [
        name
        for name in options
        if name in (*DIFFUSION_ONLY, "temperature", "top_k", "top_p", "min_p", *PENALTIES)
    ]
    if policy is not None and decided:
        raise UserError(f"{decided[0]} is for the policy to decide, which was given; set it there.")


def _check_draft(draft: DraftModel | None, options: GenerationOptions) -> None:
    """Raise UserError for options that need a draft model, or that draft models do not support."""
    if draft is not None and options.constraints:
        raise UserError(
            f"A draft_model knows nothing of {next(iter(options.constraints))}; leave one of them out."
        )
    if draft is not None and options.penalties:
        raise UserError(
            "A draft_model knows nothing of penalties and logit_bias; leave one of them out."
        )
    if options.num_draft_tokens is not None and (draft is None or options.mode != "ar"):
        raise UserError(
            "num_draft_tokens has no meaning without a draft_model and mode 'ar'; leave it out."
        )


def _policy(
    model: DiffusionGemma,
    given: Policy | None,
    options: GenerationOptions,
    draft: DraftModel | None,
) -> Policy:
    policy = given or options.policy(model)
    return draft.canvas(model, policy) if draft else policy


def _stream_canvases(
    model: DiffusionGemma,
    request: Request,
    policy: Policy,
    options: GenerationOptions,
    on_step: OnStep | None,
    progress: Callable[[int, int], None] | None,
    prompt_cache: PromptCache | None,
) -> Iterator[GenerationResponse]:
    session = request.session(model, policy, prompt_cache=prompt_cache)
    loop = Loop(model, [session], options.prefill_step_size, progress)
    with generation_memory(partial(held_bytes, model)):
        request.begin()
        while loop.active:
            for _, step in loop.advance():
                request.prefill_seconds = session.prefill_seconds
                if on_step:
                    mx.eval(
                        step.canvas, step.argmax, step.accepted, step.entropy, step.logprob
                    )  # so that any thread may read it
                    on_step(step)
                if step.committed:
                    yield request.add_canvas(session.canvases[-1], session.finished)


def _stream_causal(
    model: DiffusionGemma,
    request: Request,
    options: GenerationOptions,
    draft: DraftModel | None,
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


def _causal_loop(
    model: DiffusionGemma,
    requests: Sequence[Request],
    options: GenerationOptions,
    draft: DraftModel | None,
) -> CausalLoop:
    penalties = options.penalties
    if penalties:
        penalties.check_vocabulary(model.config.text.vocab_size)
    sessions = causal_sessions(
        model,
        [r.ids for r in requests],
        CausalPolicy(
            options.temperature or 0.0, options.top_k, options.top_p, options.min_p, penalties
        ),
        [r.draws(model) for r in requests],
        requests[0].eos_ids,
        [r.limit for r in requests],
        [r.images for r in requests],
    )
    return CausalLoop(
        model,
        sessions,
        options.prefill_step_size,
        draft.causal(model) if draft else None,
        options.num_draft_tokens,
    )


def _batch_canvases(
    model: DiffusionGemma,
    requests: Sequence[Request],
    policy: Policy,
    options: GenerationOptions,
    batch_size: int,
) -> Iterator[tuple[int, GenerationResponse]]:
    owner: dict[int, int] = {}  # from the id of a session to the index of its request

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


def _batch_causal(
    model: DiffusionGemma,
    requests: Sequence[Request],
    options: GenerationOptions,
    batch_size: int,
    draft: DraftModel | None,
) -> Iterator[tuple[int, GenerationResponse]]:
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
                group[row].prefill_seconds = (
                    group[row].prefill_seconds or time.perf_counter() - group[row].began
                )
                done = token.session.finished and token is last[id(token.session)]
                group[row].add_token(token._replace(logprobs=None), done)
                if done:
                    group[row].images = ()
                    yield first + row, group[row].whole()
