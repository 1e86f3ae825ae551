"""Counts the kernels that Metal would start.

They are counted for a denoising step, a step with a commit, and one token left to right.

    python bench/launches.py            # ours, mlx-vlm's step and mlx-lm's token: the table in docs/speed.md
    python bench/launches.py --details  # each primitive of each part too

The graphs are those of the released shape with the recipe ``4bit``, in bfloat16, after 1,200
tokens.  They are only built, and no weight is evaluated, so neither a GPU nor the memory of the
model is needed.  Every primitive that is not a view of its input counts as a kernel; what
``mx.compile`` fused counts once.  Where MLX's Metal backend has one kernel and its CPU backend has
several primitives (the fused norm, rotation and attention), one primitive stands in for them.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from documents import put_table
from mlx.utils import tree_flatten, tree_unflatten
from synthetic import quantise_as

from mlx_diffgemma.model.cache import Cache
from mlx_diffgemma.model.config import ModelConfig, released_config
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.sampling import self_conditioning
from mlx_diffgemma.sampling.policy import ReferencePolicy
from mlx_diffgemma.sampling.sampler import Before
from mlx_diffgemma.sampling.self_conditioning import Belief

RESULTS = Path(__file__).parent / "results" / "launches.json"
VIEWS = frozenset(
    (
        "Broadcast",
        "BroadcastAxes",
        "Depends",
        "ExpandDims",
        "Flatten",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "StopGradient",
        "Transpose",
        "Unflatten",
        "View",
    )
)
COVERAGE = 1 - 1e-6
UNCERTAIN = 20  # canvas positions whose self-conditioning takes the whole vocabulary
VECTOR_ROWS = 8  # up to here Metal has an attention kernel for one row at a time


@dataclass(frozen=True)
class Count:
    """What one graph starts: all ``kernels``, the ``casts`` among them, and the processor seconds
    that building it took.
    """

    kernels: int
    casts: int
    seconds: float
    primitives: dict[str, int]


class MetalDevice:
    """Compares equal to the GPU, on a machine that has none."""

    type = mx.DeviceType.gpu

    def __eq__(self, other: object) -> bool:
        return other is mx.gpu or other == mx.DeviceType.gpu

    def __hash__(self) -> int:
        return hash(mx.DeviceType.gpu)


@contextlib.contextmanager
def as_on_metal() -> Iterator[None]:
    """Build graphs as on a Mac's GPU, with one primitive for each of Metal's fused kernels.  They
    cannot be evaluated.
    """
    real_attention = mx.fast.scaled_dot_product_attention

    def one(x: mx.array, *others: mx.array | None) -> mx.array:
        return mx.depends([mx.sort(x)], [other for other in others if other is not None])[0]

    def norm(x: mx.array, weight: mx.array | None, _: float) -> mx.array:
        if weight is not None and weight.dtype != x.dtype:
            x, weight = x.astype(mx.float32), weight.astype(mx.float32)
        return one(x, weight)

    def rope(x: mx.array, *_: Any, **__: Any) -> mx.array:
        return one(x)

    def dequantize(packed: mx.array, scales: mx.array, *_: Any, **options: Any) -> mx.array:
        width = packed.shape[-1] * 32 // options["bits"]
        return one(mx.broadcast_to(scales[..., :1], (*packed.shape[:-1], width)), packed)

    def attention(queries: mx.array, keys: mx.array, values: mx.array, **options: Any) -> mx.array:
        group = queries.shape[1] // keys.shape[1]
        rows = queries.shape[2]
        if rows <= VECTOR_ROWS and rows * group <= 32:
            return one(queries, keys, values)
        return real_attention(queries, keys, values, **options)

    with (
        mock.patch.object(mx, "default_device", MetalDevice),
        mock.patch.object(mx.fast, "rms_norm", norm),
        mock.patch.object(mx.fast, "rope", rope),
        mock.patch.object(mx, "dequantize", dequantize),
        mock.patch.object(mx.fast, "scaled_dot_product_attention", attention),
    ):
        yield


def primitives(arrays: Sequence[mx.array]) -> collections.Counter[str]:
    """The names of all primitives behind ``arrays``."""
    with tempfile.NamedTemporaryFile(suffix=".dot") as file:
        mx.export_to_dot(file.name, *arrays)
        text = Path(file.name).read_text(encoding="utf-8")
    return collections.Counter(re.findall(r'label ="([^"]+)"', text))


def count(
    build: Callable[[], Sequence[mx.array]], leaves: Sequence[mx.array], repeats: int = 1
) -> Count:
    """What the graph that ``build`` returns starts beyond ``leaves``; the time is the least of
    ``repeats``.
    """
    before = primitives(leaves)
    seconds = []
    for _ in range(repeats):
        began = time.process_time()
        outputs = build()
        seconds.append(time.process_time() - began)
    new = primitives([*leaves, *outputs]) - before
    # Some names end with a dtype or a reduction: "View uint8", "Scatter Sum".
    started = {name: number for name, number in new.most_common() if name.split()[0] not in VIEWS}
    return Count(sum(started.values()), started.get("AsType", 0), min(seconds), started)


def shortened(layers: int) -> ModelConfig:
    """The released shape with its first layers and its last one, which is full."""
    config = released_config()
    every = config.text.layers
    return replace(config, text=replace(config.text, layers=every[: layers - 1] + every[-1:]))


def lazy_model(config: ModelConfig, recipe: str) -> DiffusionGemma:
    """A model in bfloat16 whose weights are never computed."""
    model = DiffusionGemma(config)
    leaves = [
        (name, mx.zeros(value.shape, dtype=mx.bfloat16))
        for name, value in tree_flatten(model.parameters())
    ]
    model.update(tree_unflatten(leaves))
    nn.quantize(model, class_predicate=quantise_as(recipe))
    model.join()
    return model


class Ours:
    """Our graphs after ``context`` tokens."""

    def __init__(self, model: DiffusionGemma, context: int):
        self.model, self.config = model, model.config
        self.length = self.config.canvas_length
        self.cache = Cache(self.config.text)
        model.encode([mx.zeros((context,), dtype=mx.int32)], [self.cache])
        self.weights = [value for _, value in tree_flatten(model.parameters())]
        self.policy = ReferencePolicy.from_config(self.config.generation, coverage=COVERAGE)
        self.canvas = mx.array(np.zeros((self.length,), np.int32))

    @property
    def leaves(self) -> list[mx.array]:
        return [*self.weights, *self.cache.arrays]

    def belief(self) -> Belief:
        shape = (1, self.length)
        logits = mx.broadcast_to(
            mx.array(np.zeros((1, 1, 1), np.float32)), (*shape, self.config.text.vocab_size)
        )
        kept = mx.array(np.zeros((*shape, 64), np.int32))
        return Belief(logits, mx.array([0.5]), kept, mx.array(np.zeros(shape, bool)), [UNCERTAIN])

    def step(self, commit: bool = False) -> list[mx.array]:
        """Self-conditioning, the forward, the sampler."""
        soft = self_conditioning.soft_embedding(self.model, self.belief())
        return self.forward(soft[0], commit)

    def forward(self, soft: mx.array, commit: bool = False) -> list[mx.array]:
        shape = (1, self.length)
        commits = [mx.array(np.zeros((self.length,), np.int32))] if commit else ()
        cache = self.cache.copy()
        out = self.model.denoise(self.canvas, [cache], soft, lengths=[self.length], commits=commits)
        before = Before(
            self.canvas[None],
            mx.array(np.zeros(shape, bool)),
            mx.array(np.full((1, self.policy.stability, self.length), -1, np.int32)),
        )
        step = ReferencePolicy.sample(
            [self.policy],
            [1],
            [self.length],
            out.logits[None],
            np.zeros(shape, np.float32),
            np.zeros(shape, np.int32),
            before,
            mx.array([1, 106]),
        )
        return [*(array for array in step if array is not None), *cache.arrays]

    def token(self) -> list[mx.array]:
        cache = self.cache.copy()
        encoded = self.model.encode([mx.array([5])], [cache], logits="last")
        assert encoded.logits is not None
        logits = mx.concatenate(encoded.logits)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return [mx.argmax(logits, axis=-1), mx.isfinite(logits).all(), logprobs, *cache.arrays]


def our_counts(model: DiffusionGemma, context: int, repeats: int = 1) -> dict[str, Count]:
    ours = Ours(model, context)
    signal = mx.array(np.zeros((ours.length, ours.config.text.hidden_size), np.float32)).astype(
        model.dtype
    )
    return {
        "forward and sampler": count(lambda: ours.forward(signal), [*ours.leaves, signal], repeats),
        "step": count(ours.step, ours.leaves, repeats),
        "step with commit": count(lambda: ours.step(commit=True), ours.leaves, repeats),
        "token left to right": count(ours.token, ours.leaves, repeats),
    }


def vlm_counts(model: DiffusionGemma, recipe: str, context: int, repeats: int) -> dict[str, Count]:
    """mlx-vlm's step: its self-conditioning, forward and sampler."""
    from rivals import their_step, twin

    theirs = twin(model, recipe)
    length, vocabulary = model.config.canvas_length, model.config.text.vocab_size
    ids = mx.zeros((1, context), dtype=mx.int32)
    cache = theirs.diffusion_prefill_cache(ids, attention_mask=None, cache=theirs.make_cache())
    canvas = mx.array(np.zeros((1, length), np.int32))
    scaled = mx.array(np.zeros((1, 1, 1), np.float32))
    masks = theirs.diffusion_decoder_masks(canvas, cache, None)

    def step() -> list[mx.array]:
        mx.random.seed(0)  # else the key hangs on all the numbers that were drawn before
        believed = mx.broadcast_to(scaled, (1, length, vocabulary))
        signal = theirs.diffusion_self_conditioning(
            believed, theirs.diffusion_prepare_self_conditioning()
        )
        logits = theirs.diffusion_decoder_logits(
            canvas, cache=cache, self_conditioning=signal, decoder_attention_mask=masks
        )
        return their_step(logits, canvas, vocabulary)

    leaves = [value for _, value in tree_flatten(theirs.parameters())]
    return {"step": count(step, [*leaves, *_arrays(cache)], repeats)}


def lm_counts(config: ModelConfig, recipe: str, context: int, repeats: int) -> dict[str, Count]:
    """mlx-lm's token, of its Gemma 4 with equal shape and precisions."""
    from mlx_lm.models import gemma4_text

    raw = dict(config.raw["text_config"]) | {
        "model_type": "gemma4_text",
        "enable_moe_block": True,
        "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": 1,
        "use_double_wide_mlp": False,
        "num_hidden_layers": len(config.text.layers),
        "layer_types": [layer.kind for layer in config.text.layers],
    }
    names = gemma4_text.ModelArgs.__dataclass_fields__
    theirs = gemma4_text.Model(
        gemma4_text.ModelArgs(**{key: value for key, value in raw.items() if key in names})
    )
    lazily = [
        (name, mx.zeros(value.shape, dtype=mx.bfloat16))
        for name, value in tree_flatten(theirs.parameters())
    ]
    theirs.update(tree_unflatten(lazily))
    nn.quantize(theirs, class_predicate=_as_ours(quantise_as(recipe)))
    cache = theirs.make_cache()
    theirs(mx.zeros((1, context), dtype=mx.int32), cache=cache)
    before = _arrays(cache)

    def token() -> list[mx.array]:
        for entry, keys, values in zip(
            cache, before[::2], before[1::2], strict=True
        ):  # as it was, for every repeat
            entry.keys, entry.values = mx.stop_gradient(keys), mx.stop_gradient(values)
        logits = theirs(mx.array([[5]]), cache=cache)[:, -1]
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return [mx.argmax(logprobs, axis=-1), logprobs, *_arrays(cache)]

    leaves = [value for _, value in tree_flatten(theirs.parameters())]
    return {"token left to right": count(token, [*leaves, *before], repeats)}


def _arrays(caches: Sequence[Any]) -> list[mx.array]:
    """The keys and values of mlx-lm's caches."""
    return [array for cache in caches for array in (cache.keys, cache.values)]


def _as_ours(predicate: Callable[[str, nn.Module], Any]) -> Callable[[str, nn.Module], Any]:
    """``predicate`` asked under our names for mlx-lm's modules."""

    def renamed(path: str, module: nn.Module) -> Any:
        for theirs, ours in (
            ("switch_glu.gate_proj", "gate_up_proj"),
            ("switch_glu.up_proj", "gate_up_proj"),
            ("switch_glu.down_proj", "down_proj"),
        ):
            path = path.replace(theirs, ours)
        return predicate(path.replace("model.", "model.decoder.", 1), module)

    return renamed


def table(record: dict[str, Any]) -> str:
    lines = ["| what | kernels | of these casts | graph built in, ms |", "|---|---|---|---|"]
    for side, rows in record["sides"].items():
        lines += [
            f"| {side}: {name} | {row['kernels']:,} | {row['casts']:,} | {1000 * row['seconds']:.1f} |"
            for name, row in rows.items()
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="4bit")
    parser.add_argument("--context", type=int, default=1200)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--details", action="store_true", help="print each primitive")
    parser.add_argument(
        "--ours", action="store_true", help="leave the other implementations out and record nothing"
    )
    arguments = parser.parse_args()
    if not arguments.ours:
        import rivals  # noqa: F401 (mlx-vlm asks for the device when it is imported)
    config = shortened(arguments.layers)
    recipe, context, repeats = arguments.recipe, arguments.context, arguments.repeats
    with as_on_metal():
        model = lazy_model(config, recipe)
        sides = {"mlx-diffgemma": our_counts(model, context, repeats)}
        if not arguments.ours:
            sides["mlx-vlm"] = vlm_counts(lazy_model(config, recipe), recipe, context, repeats)
            sides["mlx-lm"] = lm_counts(config, recipe, context, repeats)
    for side, rows in sides.items():
        for name, row in rows.items():
            print(
                f"{side:14} {name:22} {row.kernels:6,} kernels, {row.casts:5,} casts, built in {1000 * row.seconds:.1f} ms"
            )
            if arguments.details:
                print(
                    "".join(
                        f"      {number:5} {primitive[:100]}\n"
                        for primitive, number in row.primitives.items()
                    ),
                    end="",
                )
    figures = {
        side: {name: vars(row) for name, row in rows.items()} for side, rows in sides.items()
    }
    record = {
        "command": "python bench/launches.py",
        "recipe": recipe,
        "context": context,
        "layers": arguments.layers,
        "mlx": mx.__version__,
        "sides": figures,
    }
    if not arguments.ours:
        RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        put_table("speed.md", "launches.py", table(record))
    print(
        json.dumps(
            {
                side: {name: row.kernels for name, row in rows.items()}
                for side, rows in sides.items()
            }
        )
    )


if __name__ == "__main__":
    main()
