"""Compares this package with mlx-vlm and mlx-lm, with the same weights, prompts and draws.

Both sides run in one process, in turn.

    python bench/rivals.py --parts              # the released widths: self-conditioning, sampler, head, one layer of each kind
    python bench/rivals.py --step               # a whole step of a mid-size model, dense and 4-bit
    python bench/rivals.py --answers            # nano end to end, greedy, both with the same numbers for renoising
    python bench/rivals.py --left-to-right      # causal decoding: ours, and mlx-lm's Gemma 4 of equal shape

Each pair runs both sides once.  Ratios are taken pair by pair; their median and range are printed.
A ratio above 1 means that this package is faster.  mlx-vlm runs its entropy-bound sampler with the
checkpoint's numbers.  For ``--answers`` its draws are replaced by ours, so that both take the same
steps to the same tokens.  Without one of the four options all four run.  The last line is one JSON
record.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from documents import put_table
from mlx.utils import tree_flatten
from mlx_vlm.generate import diffusion as rival_loop
from mlx_vlm.models import diffusion_gemma as rival
from mlx_vlm.utils import update_module_configs
from synthetic import canvas_logits, quantise_as, random_model

from mlx_diffgemma import batch_generate, chat_ids, nano, stream_generate
from mlx_diffgemma.checkpoint.convert import convert
from mlx_diffgemma.device import describe
from mlx_diffgemma.estimate import cost
from mlx_diffgemma.evaluation.tasks import tasks_named
from mlx_diffgemma.generation.load import load
from mlx_diffgemma.model.attention import Segment, rope_table
from mlx_diffgemma.model.cache import Cache
from mlx_diffgemma.model.config import ModelConfig, released_config
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.sampling import self_conditioning as conditioning
from mlx_diffgemma.sampling.draws import Draws
from mlx_diffgemma.sampling.policy import ReferencePolicy
from mlx_diffgemma.sampling.sampler import Before, Flag, SamplerStep
from mlx_diffgemma.sampling.self_conditioning import Belief

RESULTS = Path(__file__).parent / "results" / "rivals.json"
COVERAGE = 1 - 1e-6
TEMPERATURE = 0.6
MID_SIZE = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "moe_intermediate_size": 256,
    "num_experts": 32,
    "top_k_experts": 4,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_global_key_value_heads": 2,
    "head_dim": 64,
    "global_head_dim": 128,
    "sliding_window": 512,
    "vocab_size": 65_536,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = {"parts": parts, "step": steps, "answers": answers, "left_to_right": left_to_right}
    for kind in kinds:
        parser.add_argument(f"--{kind.replace('_', '-')}", action="store_true")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument(
        "--certain",
        default="0,0.5,0.9,0.985,1",
        help="shares of certain positions for self-conditioning",
    )
    parser.add_argument(
        "--table", action="store_true", help="only make the table in docs/speed.md from the record"
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    chosen = (
        []
        if arguments.table
        else [kind for kind in kinds if getattr(arguments, kind)] or list(kinds)
    )
    record: dict[str, Any] = (
        json.loads(arguments.output.read_text("utf-8")) if arguments.output.exists() else {}
    )
    for kind in chosen:
        print(kind.replace("_", " "), flush=True)
        rows = {}
        for name, row in kinds[kind](arguments):
            rows[name] = row
            print(
                f"  {name:58} ours {1000 * row['ours']:10,.2f} ms, theirs {1000 * row['theirs']:10,.2f} ms, ratio "
                f"{row['ratio']:6.2f} ({row['lowest']:.2f} to {row['highest']:.2f})  {row.get('note', '')}",
                flush=True,
            )
        record[kind] = {"rows": rows, "pairs": arguments.pairs, "machine": describe(mx.float32)}
    arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if arguments.output == RESULTS:
        put_table("speed.md", "rivals.py", table(record))
    print(json.dumps(record))


def table(record: dict[str, Any]) -> str:
    lines = ["| what | ours, ms | theirs, ms | ratio (range) | |", "|---|---|---|---|---|"]
    for kind in record.values():
        lines += [
            f"| {name} | {1000 * row['ours']:,.2f} | {1000 * row['theirs']:,.2f} | {row['ratio']:.2f} "
            f"({row['lowest']:.2f} to {row['highest']:.2f}) | {row.get('note', '')} |"
            for name, row in kind["rows"].items()
        ]
    return "\n".join(lines)


def pairs(
    ours: Callable[[], Any], theirs: Callable[[], Any], count: int, note: str = ""
) -> dict[str, Any]:
    """Seconds (medians) and ratios of runs in turn, after one of each to warm up."""
    times: list[tuple[float, float]] = []
    for pair in range(count + 1):
        both = []
        for run in (ours, theirs):
            began = time.perf_counter()
            mx.eval(run())
            both.append(time.perf_counter() - began)
        if pair:
            times.append((both[0], both[1]))
    ratios = [b / a for a, b in times]
    return {
        "ours": statistics.median(a for a, _ in times),
        "theirs": statistics.median(b for _, b in times),
        "ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
    } | ({"note": note} if note else {})


def shaped(changes: dict[str, Any]) -> ModelConfig:
    """The released config with other numbers."""
    raw = dict(released_config().raw)
    text = {
        key: value for key, value in raw["text_config"].items() if key != "layer_types"
    } | changes
    return ModelConfig.from_dict(raw | {"text_config": text, "vision_config": None})


def twin(model: DiffusionGemma, recipe: str | None) -> Any:
    """mlx-vlm's model over the very same arrays."""
    raw = json.loads(json.dumps(model.config.raw)) | {"audio_config": {}}
    count = raw["text_config"]["num_hidden_layers"]
    raw["text_config"].setdefault(
        "layer_types",
        [
            "full_attention" if (i + 1) % 6 == 0 or i + 1 == count else "sliding_attention"
            for i in range(count)
        ],
    )
    config = update_module_configs(
        rival.ModelConfig.from_dict(raw), rival, raw, ["text", "vision", "audio"]
    )
    theirs = rival.Model(config)
    if recipe:
        nn.quantize(theirs, class_predicate=quantise_as(recipe))
    theirs.load_weights(tree_flatten(model.parameters()))
    return theirs


def their_step(logits: mx.array, canvas: mx.array, vocabulary: int) -> list[mx.array]:
    """What mlx-vlm makes of raw logits at a sampled step that is not stable yet: temperature,
    argmax, draw, entropy, acceptance.

    At a stable step it computes the entropy a second time, for the stop rule; that is left out
    here.
    """
    scaled = logits / TEMPERATURE
    argmax = mx.argmax(scaled, axis=-1)
    drawn = rival_loop._diffusion_sample_canvas(scaled, mx.int32, 1.0)
    mask = rival_loop._diffusion_entropy_transfer_mask(
        rival_loop._diffusion_token_entropy(scaled), 0.1
    )
    noise = rival_loop._diffusion_initialize_canvas(1, canvas.shape[1], vocabulary, mx.int32)
    return [mx.where(mask, mx.where(mask, drawn, canvas), noise), argmax, mx.all(argmax == canvas)]


def sampled(policy: ReferencePolicy, logits: mx.array, canvas: mx.array) -> list[mx.array]:
    return [array for array in our_step(policy, logits, canvas) if array is not None]


def our_step(policy: ReferencePolicy, logits: mx.array, canvas: mx.array) -> SamplerStep:
    length = canvas.shape[1]
    u = np.random.default_rng(0).random((1, length)).astype(np.float32)
    before = Before(canvas, canvas < 0, canvas[None])
    return ReferencePolicy.sample(
        [policy], [24], [length], logits, u, np.zeros((1, length), np.int32), before, mx.array([1])
    )


def parts(arguments: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """At the released widths: two layers (the last is full), the whole vocabulary."""
    model = random_model(shaped({"num_hidden_layers": 2}), None)
    theirs = twin(model, None)
    for certain in map(float, arguments.certain.split(",")):
        yield self_conditioning(model, theirs, certain, arguments.pairs)
    yield from vocabulary_parts(model, theirs, arguments.pairs)
    yield from layer_parts(model, theirs, arguments.pairs)


def believed(
    model: DiffusionGemma, certain: float, coverage: float | None
) -> tuple[Belief, mx.array, str]:
    """A belief of stated certainty, the scaled logits behind it, and what to say of it."""
    logits = canvas_logits(model.config, certain)
    policy = ReferencePolicy.from_config(model.config.generation, coverage=coverage)
    step = our_step(policy, logits, mx.zeros(logits.shape[:2], dtype=mx.int32))
    uncovered = int(step.flags[0, Flag.UNCOVERED].item())
    belief, scaled = (
        Belief(logits, mx.array([TEMPERATURE]), step.kept, step.uncovered, [uncovered]),
        logits / TEMPERATURE,
    )
    mx.eval(logits, scaled, [array for array in (step.kept, step.uncovered) if array is not None])
    share = 1.0 if coverage is None else uncovered / logits.shape[1]
    return (
        belief,
        scaled,
        f"mean entropy {step.entropy.mean().item():.2f} nats, {share:.1%} fall back",
    )


def self_conditioning(
    model: DiffusionGemma, theirs: Any, certain: float, count: int
) -> tuple[str, dict[str, Any]]:
    belief, scaled, note = believed(model, certain, COVERAGE)
    context = theirs.diffusion_prepare_self_conditioning()
    return (
        f"self-conditioning, {certain:.0%} of positions certain",
        pairs(
            lambda: conditioning.soft_embedding(model, belief),
            lambda: theirs.diffusion_self_conditioning(scaled, context),
            count,
            note,
        ),
    )


def vocabulary_parts(
    model: DiffusionGemma, theirs: Any, count: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Everything of a step that runs over the vocabulary."""
    config, context = model.config, theirs.diffusion_prepare_self_conditioning()
    length, vocabulary, hidden = (
        config.canvas_length,
        config.text.vocab_size,
        config.text.hidden_size,
    )
    belief, scaled, _ = believed(model, 0.9, None)
    yield (
        "self-conditioning, dense",
        pairs(
            lambda: conditioning.soft_embedding(model, belief),
            lambda: theirs.diffusion_self_conditioning(scaled, context),
            count,
        ),
    )
    canvas, logits = mx.random.randint(0, vocabulary, (1, length)), belief.logits
    for name, coverage in (("sampler", None), ("sampler, with the most probable tokens", COVERAGE)):
        policy = ReferencePolicy.from_config(config.generation, coverage=coverage)
        yield (
            name,
            pairs(
                partial(sampled, policy, logits, canvas),
                lambda: their_step(logits, canvas, vocabulary),
                count,
            ),
        )
    x = mx.random.normal((length, hidden))
    mx.eval(x)
    yield (
        "head with the soft cap",
        pairs(
            lambda: model.logits(x),
            lambda: theirs._softcap(theirs.model.decoder.embed_tokens.as_linear(x[None])),
            count,
        ),
    )


def layer_parts(
    model: DiffusionGemma, theirs: Any, count: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Attention of a sliding and of a full layer, dense MLP and experts."""
    config, before = model.config, 1200
    length, hidden = config.canvas_length, config.text.hidden_size
    cache, their_cache = prefilled(
        model, theirs, mx.random.randint(0, config.text.vocab_size, (before,))
    )
    masks = theirs.diffusion_decoder_masks(mx.zeros((1, length), dtype=mx.int32), their_cache, None)
    x = mx.random.normal((length, hidden))
    mx.eval(x)
    first, theirs_first = model.model.decoder.layers[0], theirs.model.decoder.layers[0]
    yield ("dense MLP", pairs(lambda: first.mlp(x), lambda: theirs_first.mlp(x[None]), count))

    def their_experts() -> mx.array:
        chosen, weights = theirs_first.router(x)
        return (theirs_first.experts(x, chosen) * weights[..., None]).sum(axis=-2)

    yield (
        "router and experts",
        pairs(lambda: first.experts(x, *first.router(x)), their_experts, count),
    )

    def attention(index: int) -> dict[str, Any]:
        a, b, shape = (
            model.model.decoder.layers[index],
            theirs.model.decoder.layers[index],
            config.text.layers[index],
        )
        table = rope_table(mx.arange(before, before + length), shape)
        mask = masks.get(b.layer_type) if isinstance(masks, dict) else masks
        mx.eval(table)
        segments = [Segment(0, length, cache, canvas=True)]
        return pairs(
            lambda: a.self_attn(a.input_layernorm(x), table, segments, index),
            lambda: b.self_attn(
                b.input_layernorm(x[None]), mask, their_cache[index], decoder=True, offset=before
            ),
            count,
        )

    for index, shape in enumerate(config.text.layers):
        yield f"{shape.kind.replace('_', ' ')}, {before:,} tokens before", attention(index)


def prefilled(model: DiffusionGemma, theirs: Any, ids: mx.array) -> tuple[Cache, Any]:
    cache, their_cache = Cache(model.config.text), theirs.make_cache()
    model.encode([ids], [cache])
    their_cache = theirs.diffusion_prefill_cache(ids[None], attention_mask=None, cache=their_cache)
    mx.eval(cache.arrays, [entry.state for entry in their_cache])
    return cache, their_cache


def steps(arguments: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Self-conditioning from a belief of stated certainty, forward, sampler; and nothing else."""
    shares = (None, *map(float, arguments.certain.split(",")))
    # Quantised products are slow on a CPU, so the recipes take two settings only.
    for recipe, chosen in ((None, shares), ("4bit-bf16-core", (None, 0.9)), ("4bit", (None, 0.9))):
        model = random_model(shaped(MID_SIZE), recipe)
        theirs = twin(model, recipe)
        for certain in chosen:
            name = (
                "dense self-conditioning"
                if certain is None
                else f"{certain:.0%} of positions certain"
            )
            yield (
                f"{recipe or 'float32'}, {name}",
                whole_step(model, theirs, certain, arguments.pairs),
            )


def whole_step(
    model: DiffusionGemma, theirs: Any, certain: float | None, count: int
) -> dict[str, Any]:
    config, context = model.config, theirs.diffusion_prepare_self_conditioning()
    canvas, ids = (
        mx.random.randint(0, config.text.vocab_size, shape)
        for shape in ((1, config.canvas_length), (600,))
    )
    mx.eval(canvas, ids)
    cache, their_cache = prefilled(model, theirs, ids)
    masks = theirs.diffusion_decoder_masks(canvas, their_cache, None)
    coverage = None if certain is None else COVERAGE
    policy = ReferencePolicy.from_config(config.generation, coverage=coverage)
    belief, scaled, note = believed(model, certain or 0.0, coverage)

    def ours() -> list[mx.array]:
        soft = conditioning.soft_embedding(model, belief)
        return sampled(policy, model.denoise(canvas, [cache], soft).logits, canvas)

    def other() -> list[mx.array]:
        signal = theirs.diffusion_self_conditioning(scaled, context)
        logits = theirs.diffusion_decoder_logits(
            canvas, cache=their_cache, self_conditioning=signal, decoder_attention_mask=masks
        )
        return their_step(logits, canvas, config.text.vocab_size)

    flops = cost.step_flops(config, ids.size)
    covered = 0.0 if certain is None else 1 - belief.counts[0] / config.canvas_length
    less = sum(flops.values()) / (sum(flops.values()) - flops["self_conditioning"] * covered)
    return pairs(ours, other, count, f"{note}, {less:.2f} times fewer FLOPs counted")


class Replay:
    """Stands in for mlx-vlm's random canvases: the ids our draws would give."""

    def __init__(self, vocabulary: int):
        self.vocabulary = vocabulary

    def begin(self, seed: int) -> None:
        self.draws, self.canvas, self.step = Draws(seed, self.vocabulary), 0, -1

    def __call__(self, batch: int, length: int, vocabulary: int, dtype: Any) -> mx.array:
        assert (batch, vocabulary) == (1, self.vocabulary)
        numbers = self.draws.step(self.canvas, 0, max(self.step, 0), self.canvas * length, length)
        ids = numbers.initial if self.step < 0 else numbers.renoise
        self.step += 1
        return mx.array(ids)[None].astype(dtype)


def answers(arguments: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """nano in float32 on both sides, greedy, with both stop thresholds of its generation_config."""
    from mlx_vlm import utils as loading

    with tempfile.TemporaryDirectory() as folder:
        path = convert(nano.NAME, Path(folder) / "nano", dtype="float32")
        model, tokenizer = load(str(path))
        loaded: tuple[Any, Any] = loading.load(str(path))
        theirs, processor = loaded
        theirs.config.generation_config = json.loads(
            (path / "generation_config.json").read_text(encoding="utf-8")
        )
    mx.eval(model.parameters(), theirs.parameters())
    asked = [question for task in tasks_named("nano") for question in task.questions(2)]
    prompts = [chat_ids(tokenizer, question.messages) for question in asked]
    replay = Replay(model.config.text.vocab_size)
    rival_loop._diffusion_initialize_canvas = replay  # type: ignore[assignment]
    ends = set(model.config.generation.eos_token_ids)

    def other() -> tuple[list[list[int]], int]:
        texts: list[list[int]] = []
        forwards = 0
        for seed, prompt in enumerate(prompts):
            replay.begin(seed)
            texts.append([])
            for result in rival_loop.stream_diffusion_generate(
                theirs,
                processor,
                processor.tokenizer,
                mx.array([prompt]),
                None,
                None,
                max_tokens=1024,
                temperature=0.0,
                skip_special_token_ids=set(),
                diffusion_sampler="entropy-bound",
                diffusion_full_canvas=True,
            ):
                if result.diffusion_block_complete:
                    replay.canvas, replay.step = replay.canvas + 1, -1
                elif result.finish_reason is None:
                    assert result.token is not None
                    texts[-1].append(result.token)
                else:
                    forwards += result.diffusion_denoising_steps
        return texts, forwards

    def alone() -> tuple[list[list[int]], int]:
        found = [
            list(stream_generate(model, tokenizer, prompt, 1024, temperature=0.0, seed=seed))
            for seed, prompt in enumerate(prompts)
        ]
        return [[t for r in rs for t in r.tokens if t not in ends] for rs in found], sum(
            r.steps for rs in found for r in rs
        )

    def together() -> tuple[list[list[int]], int]:
        found = batch_generate(
            model,
            tokenizer,
            prompts,
            seeds=list(range(len(prompts))),
            batch_size=8,
            max_tokens=1024,
            temperature=0.0,
        )
        return [[t for t in answer.tokens if t not in ends] for answer in found], sum(
            answer.steps for answer in found
        )

    for name, ours in (("one after the other", alone), ("8 of ours at a time", together)):
        (mine, forwards), (others, their_forwards) = ours(), other()
        same, tokens = sum(a == b for a, b in zip(mine, others, strict=True)), sum(map(len, mine))
        if forwards != their_forwards:
            raise SystemExit(
                f"{forwards} forwards against {their_forwards}: not the same trajectories"
            )

        def silent(run: Callable[[], Any]) -> Callable[[], list[mx.array]]:
            return lambda: run() and []

        row = pairs(silent(ours), silent(other), arguments.pairs)
        yield (
            f"{len(prompts)} answers, {name}",
            row
            | {
                "note": f"{tokens} tokens, {forwards} canvas steps on both sides, {same} of {len(prompts)} texts equal; "
                f"{tokens / row['ours']:.0f} against {tokens / row['theirs']:.0f} tokens/s",
                "tokens_per_second": tokens / row["ours"],
                "their_tokens_per_second": tokens / row["theirs"],
            },
        )


def left_to_right(arguments: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """One token at a time: the causal mode of our weights, and mlx-lm's Gemma 4 with random weights
    of equal shape.
    """
    from mlx_lm.models import gemma4_text

    config = shaped(MID_SIZE)
    model = random_model(config, None)
    text = config.raw["text_config"] | {
        "model_type": "gemma4_text",
        "enable_moe_block": True,
        "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": 1,
        "use_double_wide_mlp": False,
    }
    names = gemma4_text.ModelArgs.__dataclass_fields__
    theirs = gemma4_text.Model(
        gemma4_text.ModelArgs(**{key: value for key, value in text.items() if key in names})
    )
    mx.eval(theirs.parameters())
    ids = mx.random.randint(0, config.text.vocab_size, (600,))
    cache = Cache(config.text)
    model.encode([ids], [cache])
    their_cache = theirs.make_cache()
    theirs(ids[None], cache=their_cache)
    mx.eval(cache.arrays, [entry.state for entry in their_cache])
    token = mx.array([5])

    def ours() -> list[mx.array]:
        out = model.encode([token], [cache], logits="last")
        assert out.logits is not None
        return [out.logits[0], *cache.arrays]

    yield (
        "mid-size, one token left to right after 600, beside mlx-lm, float32",
        pairs(
            ours,
            lambda: theirs(token[None], cache=their_cache),
            max(arguments.pairs, 21),
            "a step of diffusion beside it: see --step",
        ),
    )


if __name__ == "__main__":
    main()
