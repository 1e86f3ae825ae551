"""Trains nano from scratch: ``python bench/nano/train_nano.py OUT_FOLDER``.

This needs torch (extra ``parity``).

The objective is the published one.  In each example one canvas is corrupted uniformly with
probability t ~ U(1e-4, 1).  The causal mode reads the clean sequence, and the canvas sees only what
comes before it.  Half of the examples get the self-conditioning signal of a first pass without
gradient.  The loss is plain cross-entropy over all canvas positions, including the tail that is
filled with EOS, plus next-token cross-entropy of the causal mode on the answers.

Both modes run as one forward over the rows [sequence ; canvas] with a block mask, because they
share every weight except the layer scalars.  ``tests/parity`` compares this forward with
transformers.

The run writes ``state.pt`` every few minutes.  Started again with the same folder, it continues
from that file.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from nano_files import CONFIG, write_configs
from safetensors.torch import save_file

from mlx_diffgemma.evaluation import nano_tasks
from mlx_diffgemma.nano import FOLDER

Weights = dict[str, torch.Tensor]
torch._dynamo.config.recompile_limit = 64
TEXT = CONFIG["text_config"]
HIDDEN, HEADS, EPS = TEXT["hidden_size"], TEXT["num_attention_heads"], TEXT["rms_norm_eps"]
LAYERS, EXPERTS, TOP_K = TEXT["num_hidden_layers"], TEXT["num_experts"], TEXT["top_k_experts"]
VOCAB, WINDOW, SOFTCAP = TEXT["vocab_size"], TEXT["sliding_window"], TEXT["final_logit_softcapping"]
PAD, EOS, BOS = 0, 1, 2
NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
    "post_feedforward_layernorm_1",
    "post_feedforward_layernorm_2",
    "pre_feedforward_layernorm_2",
)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, written into the card."""

    steps: int = 5200
    wide_steps: int = (
        2309  # this many steps draw from the tasks' wide ranges and from the early mix of shapes
    )
    muon_lr: float = 0.02
    adam_lr: float = 3e-3
    warmup: int = 100
    cooldown: float = 0.5  # share of the run, at its end, over which the rates fall to zero
    balance: float = 0.01  # load-balancing loss of the router, so that no expert dies
    seed: int = 1


# ── the model ──────────────────────────────────────────────────────────────────────────────────


def is_full(layer: int) -> bool:
    return TEXT["layer_types"][layer] == "full_attention"


def head_shape(layer: int) -> tuple[int, int]:
    """(head size, KV heads) of a layer."""
    if is_full(layer):
        return TEXT["global_head_dim"], TEXT["num_global_key_value_heads"]
    return TEXT["head_dim"], TEXT["num_key_value_heads"]


def init_weights(seed: int) -> Weights:
    """Random weights under the checkpoint's keys."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float | None = None) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * (shape[-1] ** -0.5 if std is None else std)

    weights = {
        "model.decoder.embed_tokens.weight": normal(VOCAB, HIDDEN, std=0.04),
        "model.decoder.norm.weight": torch.ones(HIDDEN),
        "model.decoder.self_conditioning.pre_norm.weight": torch.ones(HIDDEN),
    }
    dense = TEXT["intermediate_size"]
    for path in (
        "model.decoder.self_conditioning",
        *(f"model.decoder.layers.{i}.mlp" for i in range(LAYERS)),
    ):
        weights[f"{path}.gate_proj.weight"] = normal(dense, HIDDEN)
        weights[f"{path}.up_proj.weight"] = normal(dense, HIDDEN)
        weights[f"{path}.down_proj.weight"] = normal(HIDDEN, dense)
    weights["model.decoder.self_conditioning.down_proj.weight"] *= 0.1
    for i in range(LAYERS):
        layer, (size, kv_heads) = f"model.decoder.layers.{i}", head_shape(i)
        for norm in NORMS:
            weights[f"{layer}.{norm}.weight"] = torch.ones(HIDDEN)
        weights[f"{layer}.self_attn.q_proj.weight"] = normal(HEADS * size, HIDDEN)
        weights[f"{layer}.self_attn.k_proj.weight"] = normal(kv_heads * size, HIDDEN)
        if not is_full(i):
            weights[f"{layer}.self_attn.v_proj.weight"] = normal(kv_heads * size, HIDDEN)
        weights[f"{layer}.self_attn.o_proj.weight"] = normal(HIDDEN, HEADS * size)
        for norm in ("q_norm", "k_norm"):  # together they give the usual 1/sqrt(head size)
            weights[f"{layer}.self_attn.{norm}.weight"] = torch.full((size,), size**-0.25)
        weights[f"{layer}.router.proj.weight"] = normal(EXPERTS, HIDDEN)
        weights[f"{layer}.router.scale"] = torch.ones(HIDDEN)
        weights[f"{layer}.router.per_expert_scale"] = torch.ones(EXPERTS)
        inner = TEXT["moe_intermediate_size"]
        weights[f"{layer}.experts.gate_up_proj"] = normal(EXPERTS, 2 * inner, HIDDEN)
        weights[f"{layer}.experts.down_proj"] = normal(EXPERTS, HIDDEN, inner)
        weights[f"{layer}.layer_scalar"] = torch.ones(1)
        weights[f"model.encoder.language_model.layers.{i}.layer_scalar"] = torch.ones(1)
    return weights


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    return y if weight is None else y * weight


def inverse_frequencies(layer: int) -> torch.Tensor:
    size, _ = head_shape(layer)
    rope = TEXT["rope_parameters"][TEXT["layer_types"][layer]]
    frequencies = rope["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float32) / size)
    rotated = int(rope.get("partial_rotary_factor", 1.0) * size // 2)
    return torch.where(torch.arange(size // 2) < rotated, frequencies, 0.0)


def rope_table(positions: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = positions[..., None].float() * inverse_frequencies(layer)
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * rope[0] + torch.cat((-second, first), dim=-1) * rope[1]


def gated(
    x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    return F.linear(F.gelu(F.linear(x, gate), approximate="tanh") * F.linear(x, up), down)


def experts(
    x: torch.Tensor, chosen: torch.Tensor, values: torch.Tensor, w: Weights
) -> torch.Tensor:
    """Weighted sum of the chosen experts over rows [n, hidden], the rows of one expert in one
    product.
    """
    order = chosen.flatten().argsort()
    counts = chosen.flatten().bincount(minlength=EXPERTS).tolist()
    rows = x[order // TOP_K]
    parts = [
        gated(part, *gate_up.chunk(2), down)
        for part, gate_up, down in zip(
            rows.split(counts), w["experts.gate_up_proj"], w["experts.down_proj"], strict=True
        )
    ]
    out = torch.cat(parts)[order.argsort()].view(*chosen.shape, -1)
    return (out * values[..., None]).sum(1)


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    scores = (q @ k.mT).masked_fill(~mask, -1e4)
    return scores.softmax(-1) @ v


def attention_block(x, rope, mask, w: Weights, size: int, kv_heads: int) -> torch.Tensor:
    """The attention half of a layer over [batch, rows, hidden]; ``w`` holds the layer's weights by
    their short names.
    """
    batch, rows, _ = x.shape
    h = rms_norm(x, w["input_layernorm.weight"])
    q = F.linear(h, w["self_attn.q_proj.weight"]).view(batch, rows, HEADS, size).transpose(1, 2)
    k = F.linear(h, w["self_attn.k_proj.weight"]).view(batch, rows, kv_heads, size).transpose(1, 2)
    v = k
    if "self_attn.v_proj.weight" in w:
        v = (
            F.linear(h, w["self_attn.v_proj.weight"])
            .view(batch, rows, kv_heads, size)
            .transpose(1, 2)
        )
    q = rotate(rms_norm(q, w["self_attn.q_norm.weight"]), rope)
    k = rotate(rms_norm(k, w["self_attn.k_norm.weight"]), rope)
    k, v = (t.repeat_interleave(HEADS // kv_heads, dim=1) for t in (k, rms_norm(v)))
    h = attention(q, k, v, mask).transpose(1, 2).reshape(batch, rows, -1)
    return x + rms_norm(
        F.linear(h, w["self_attn.o_proj.weight"]), w["post_attention_layernorm.weight"]
    )


def feed_forward(x: torch.Tensor, w: Weights):
    """Dense MLP output, rows for the experts, which experts with which weights, and the balance
    loss.
    """
    h = rms_norm(x, w["pre_feedforward_layernorm.weight"])
    dense = gated(h, w["mlp.gate_proj.weight"], w["mlp.up_proj.weight"], w["mlp.down_proj.weight"])
    dense = rms_norm(dense, w["post_feedforward_layernorm_1.weight"])
    scores = F.linear(rms_norm(x) * w["router.scale"] * HIDDEN**-0.5, w["router.proj.weight"])
    probabilities = scores.softmax(-1)
    values, chosen = probabilities.topk(TOP_K, dim=-1)
    values = values / values.sum(-1, keepdim=True) * w["router.per_expert_scale"][chosen]
    load = torch.zeros_like(probabilities).scatter(-1, chosen, 1.0).mean((0, 1))
    balance = EXPERTS / TOP_K * (load * probabilities.mean((0, 1))).sum()
    return dense, rms_norm(x, w["pre_feedforward_layernorm_2.weight"]), chosen, values, balance


def combine(x, dense, routed, scalar, w: Weights) -> torch.Tensor:
    routed = rms_norm(routed, w["post_feedforward_layernorm_2.weight"])
    return (x + rms_norm(dense + routed, w["post_feedforward_layernorm.weight"])) * scalar


def block_masks(
    starts: torch.Tensor, seq: int, canvas: int, images=()
) -> tuple[torch.Tensor, torch.Tensor]:
    """(full, sliding) masks [batch, 1, seq + canvas, seq + canvas]; True may be seen.

    Sequence rows are causal (within the window on sliding layers); canvas rows see the whole canvas
    and the sequence before ``starts`` (its last window - 1 positions on sliding layers).  Rows of
    one of the ``images``, ranges of the sequence, see each other both ways.
    """
    rows = torch.arange(seq)
    causal = rows[None, :] <= rows[:, None]
    near = causal & (rows[None, :] > rows[:, None] - WINDOW)
    for first, end in images:
        causal[first:end, first:end] = near[first:end, first:end] = True
    before = rows[None, :] < starts[:, None]
    before_near = before & (rows[None, :] >= starts[:, None] - (WINDOW - 1))

    def assemble(sequence: torch.Tensor, prefix: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(len(starts), seq + canvas, seq + canvas, dtype=torch.bool)
        mask[:, :seq, :seq] = sequence
        mask[:, seq:, :seq] = prefix[:, None, :]
        mask[:, seq:, seq:] = True
        return mask[:, None]

    return assemble(causal, before), assemble(near, before_near)


class Network:
    """The forward over [sequence ; canvas]; ``weights`` are the only state."""

    def __init__(self, weights: Weights, compile_layers: bool = False):
        self.weights = weights
        wrap = (lambda f: torch.compile(f, dynamic=False)) if compile_layers else (lambda f: f)
        self.attention_block, self.feed_forward, self.combine = map(
            wrap, (attention_block, feed_forward, combine)
        )
        self.by_layer = [
            {
                key.removeprefix(f"model.decoder.layers.{i}."): value
                for key, value in weights.items()
                if key.startswith(f"model.decoder.layers.{i}.")
            }
            for i in range(LAYERS)
        ]

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.weights["model.decoder.embed_tokens.weight"]) * HIDDEN**0.5

    def head(self, x: torch.Tensor) -> torch.Tensor:
        x = rms_norm(x, self.weights["model.decoder.norm.weight"])
        logits = F.linear(x, self.weights["model.decoder.embed_tokens.weight"]).float()
        return SOFTCAP * torch.tanh(logits / SOFTCAP)

    def soft_embedding(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.softmax(-1) @ self.weights["model.decoder.embed_tokens.weight"] * HIDDEN**0.5

    def self_condition(self, x: torch.Tensor, soft: torch.Tensor) -> torch.Tensor:
        path = "model.decoder.self_conditioning"
        signal = gated(
            rms_norm(soft, self.weights[f"{path}.pre_norm.weight"]),
            *(self.weights[f"{path}.{name}_proj.weight"] for name in ("gate", "up", "down")),
        )
        return rms_norm(x + signal.float())

    def __call__(self, ids, canvas, starts, soft, images=()):
        """Hidden states of the sequence rows and of the canvas rows, and the router's balance loss.

        ``images`` are pairs of a place and embeddings [batch, tokens, hidden], which stand there in
        every sequence.
        """
        (batch, seq), length = ids.shape, canvas.shape[1]
        sequence = self.embed(ids)
        for first, seen in images:
            sequence = torch.cat(
                (sequence[:, :first], seen, sequence[:, first + seen.shape[1] :]), dim=1
            )
        x = torch.cat((sequence, self.self_condition(self.embed(canvas), soft)), dim=1)
        positions = torch.cat(
            (torch.arange(seq).expand(batch, seq), starts[:, None] + torch.arange(length)), dim=1
        )
        full, near = block_masks(
            starts, seq, length, [(first, first + seen.shape[1]) for first, seen in images]
        )
        balance = 0.0
        for i, w in enumerate(self.by_layer):
            scalar = torch.cat(
                (
                    self.weights[f"model.encoder.language_model.layers.{i}.layer_scalar"].expand(
                        seq
                    ),
                    w["layer_scalar"].expand(length),
                )
            )[:, None]
            x = self.attention_block(
                x, rope_table(positions, i), full if is_full(i) else near, w, *head_shape(i)
            )
            dense, h, chosen, values, extra = self.feed_forward(x, w)
            h = experts(h.flatten(0, 1), chosen.flatten(0, 1), values.flatten(0, 1), w).view_as(x)
            x, balance = self.combine(x, dense, h, scalar, w), balance + extra
        return x[:, :seq], x[:, seq:], balance


# ── the data ───────────────────────────────────────────────────────────────────────────────────


class Examples:
    """Draws token sequences: ids, where the answer begins, and which positions the causal mode is
    trained on.
    """

    def __init__(self, tokenizer: sentencepiece.SentencePieceProcessor):
        self.encode = tokenizer.encode
        self.exact = [task for task in nano_tasks.TASKS.values() if task.exact]
        self.weights = [task.weight for task in self.exact]

    def turn(self, role: str, text: str) -> list[int]:
        return self.encode(f"<|turn>{role}\n{text}<turn|>\n")

    def one_turn(self, rng: random.Random, wide: bool) -> tuple[list[int], list[int]]:
        """(prefix, answer) of one exact task, now and then with a system turn or a thought."""
        example = nano_tasks.draw(
            rng.choices(self.exact, self.weights)[0], rng, held_out=False, wide=wide
        )
        think = rng.random() < 0.06
        system = ("<|think|>" if think else "") + (
            rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.08 else ""
        )
        prefix = (
            [BOS]
            + (self.turn("system", system) if system else [])
            + self.turn("user", example.prompt)
        )
        thought = f"<|channel>thought\n{example.thought}\n<channel|>" if think else ""
        return prefix + self.encode("<|turn>model\n"), self.encode(
            f"{thought}{example.answer}<turn|>"
        )

    def story_or_chat(self, rng: random.Random, wide: bool) -> tuple[list[int], list[int]]:
        """(prefix, answer) of a story, or of a conversation of several turns."""
        if rng.random() < (0.65 if wide else 0.8):
            example = nano_tasks.draw(nano_tasks.TASKS["story"], rng, held_out=False, wide=wide)
            prefix = [BOS, *self.turn("user", example.prompt), *self.encode("<|turn>model\n")]
            return prefix, self.encode(f"{example.answer}<turn|>")
        prefix = [BOS]
        while True:
            example = nano_tasks.draw(
                rng.choices(self.exact, self.weights)[0], rng, held_out=False, wide=wide
            )
            prefix += self.turn("user", example.prompt) + self.encode("<|turn>model\n")
            if len(prefix) > 60 and (rng.random() < 0.5 or len(prefix) > 130):
                return prefix, self.encode(f"{example.answer}<turn|>")
            prefix += self.encode(f"{example.answer}<turn|>\n")


SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "Answer briefly.",
    "You are a small model.",
    "Be kind.",
)


@dataclass(frozen=True)
class Shape:
    """The rows of a batch: examples of ``shortest`` to ``seq`` tokens, and a canvas of ``canvas``
    positions.
    """

    share: float
    early_share: float
    batch: int
    shortest: int
    seq: int
    canvas: int
    stories: bool = False


# Few shapes, so that the compiled parts are few; small canvases are cheap and come mostly early.
SHAPES = (
    Shape(0.10, 0.40, 96, 0, 40, 16),
    Shape(0.35, 0.20, 96, 0, 40, 64),
    Shape(0.05, 0.20, 64, 41, 72, 32),
    Shape(0.25, 0.05, 64, 41, 72, 64),
    Shape(0.25, 0.15, 20, 0, 192, 64, stories=True),
)


def shape_of(step: int, recipe: Recipe) -> Shape:
    weights = [shape.early_share if step < recipe.wide_steps else shape.share for shape in SHAPES]
    return random.Random(step * 7919 + recipe.seed).choices(SHAPES, weights)[0]


def make_batch(
    examples: Examples, rng: random.Random, shape: Shape, wide: bool
) -> dict[str, torch.Tensor]:
    """A batch of token ids; each example's canvas lies a whole number of canvases after its prefix."""
    draw = examples.story_or_chat if shape.stories else examples.one_turn
    ids = torch.full((shape.batch, shape.seq), PAD)
    clean = torch.full((shape.batch, shape.canvas), EOS)
    starts, lengths, answers = (torch.zeros(shape.batch, dtype=torch.long) for _ in range(3))
    for row in range(shape.batch):
        while True:
            prefix, answer = draw(rng, wide)
            if shape.shortest <= len(prefix) + len(answer) <= shape.seq:
                break
        start = rng.randrange(math.ceil(len(answer) / shape.canvas)) * shape.canvas
        tokens = prefix + answer
        ids[row, : len(tokens)] = torch.tensor(tokens)
        piece = answer[start : start + shape.canvas]
        clean[row, : len(piece)] = torch.tensor(piece)
        starts[row], lengths[row], answers[row] = len(prefix) + start, len(tokens), len(prefix)
    return {"ids": ids, "clean": clean, "starts": starts, "lengths": lengths, "answers": answers}


# ── the objective ──────────────────────────────────────────────────────────────────────────────


def losses(
    network: Network, batch: dict[str, torch.Tensor], generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Of a batch that is corrupted here."""
    clean = batch["clean"]
    rows = len(clean)
    level = 1e-4 + (1 - 1e-4) * torch.rand(rows, 1, generator=generator)
    noise = torch.randint(VOCAB, clean.shape, generator=generator)
    canvas = torch.where(torch.rand(clean.shape, generator=generator) < level, noise, clean)

    # The examples of a batch are drawn independently, so the first half may be the self-conditioned
    # one.
    return losses_on(network, batch, canvas, torch.arange(rows) < rows // 2)


def losses_on(
    network: Network,
    batch: dict[str, torch.Tensor],
    canvas: torch.Tensor,
    conditioned: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Of a batch corrupted to ``canvas``; the rows in ``conditioned`` get a first pass."""
    ids, clean, starts = batch["ids"], batch["clean"], batch["starts"]
    soft = torch.zeros(*clean.shape, HIDDEN)
    if conditioned.any():
        with torch.no_grad():
            _, first, _ = network(
                ids[conditioned], canvas[conditioned], starts[conditioned], soft[conditioned]
            )
            soft[conditioned] = network.soft_embedding(network.head(first)).float()
    sequence, denoised, balance = network(ids, canvas, starts, soft)

    denoise = F.cross_entropy(network.head(denoised).flatten(0, 1), clean.flatten())
    places = torch.arange(ids.shape[1] - 1)
    trained = (places >= batch["answers"][:, None] - 1) & (places < batch["lengths"][:, None] - 1)
    causal = F.cross_entropy(network.head(sequence[:, :-1][trained]), ids[:, 1:][trained])
    return {"denoise": denoise, "causal": causal, "balance": balance / LAYERS}


# ── the optimiser ──────────────────────────────────────────────────────────────────────────────


def orthogonalise(g: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Newton-Schulz iteration of Muon (Jordan et al. 2024) on a stack of matrices [n, rows,
    columns].
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = g.shape[-2] <= g.shape[-1]
    x = g if wide else g.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Muon for stacks of matrices: momentum, orthogonalised, scaled to the shape."""

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                buffer = state.setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalise(
                    p.grad.lerp(buffer, group["momentum"]).view(-1, *p.shape[-2:])
                ).view_as(p)
                scale = max(1.0, p.shape[-2] / p.shape[-1]) ** 0.5
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(
                    update, alpha=-group["lr"] * scale
                )


def optimisers(weights: Weights, recipe: Recipe) -> list[torch.optim.Optimizer]:
    def is_matrix(key: str) -> bool:
        return weights[key].ndim >= 2 and "embed_tokens" not in key and "router" not in key

    matrices = [weights[key] for key in weights if is_matrix(key)]
    others = [weights[key] for key in weights if not is_matrix(key)]
    return [
        Muon(matrices, lr=recipe.muon_lr),
        torch.optim.AdamW(
            others, lr=recipe.adam_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True
        ),
    ]


# ── the run ────────────────────────────────────────────────────────────────────────────────────


def train(out: Path, recipe: Recipe, threads: int, compile_layers: bool) -> None:
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    folder = FOLDER
    examples = Examples(
        sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    )
    weights = init_weights(recipe.seed)
    for value in weights.values():
        value.requires_grad_()
    network, optims = Network(weights, compile_layers), optimisers(weights, recipe)
    step, spent, seen = 0, 0.0, 0
    if (out / "state.pt").exists():
        state = torch.load(out / "state.pt", weights_only=True)
        for key, value in state["weights"].items():
            weights[key].data.copy_(value)
        for optim, saved in zip(optims, state["optims"], strict=True):
            optim.load_state_dict(saved)
        step, spent, seen = state["step"], state["spent"], state["seen"]
        print(f"resuming at step {step}, {spent / 60:.1f} minutes in", flush=True)

    log = (out / "log.jsonl").open("a")
    average: dict[str, float] = {}
    saved_at = printed_at = spent
    while step < recipe.steps:
        began = time.perf_counter()
        rate = min(
            1.0,
            (step + 1) / recipe.warmup,
            (recipe.steps - step) / (recipe.cooldown * recipe.steps),
        )
        rng = random.Random(step + 1_000_003 * recipe.seed)
        generator = torch.Generator().manual_seed(step + 1_000_003 * recipe.seed)
        shape = shape_of(step, recipe)
        parts = losses(
            network, make_batch(examples, rng, shape, step < recipe.wide_steps), generator
        )
        loss = parts["denoise"] + parts["causal"] + recipe.balance * parts["balance"]
        loss.backward()
        for optim, base in zip(optims, (recipe.muon_lr, recipe.adam_lr), strict=True):
            if isinstance(optim, torch.optim.AdamW):
                torch.nn.utils.clip_grad_norm_(optim.param_groups[0]["params"], 1.0)
            optim.param_groups[0]["lr"] = base * rate
            optim.step()
            optim.zero_grad()
        step, seen, spent = step + 1, seen + shape.batch, spent + time.perf_counter() - began
        kind = "stories" if shape.stories else f"{shape.seq}/{shape.canvas}"
        for name, value in parts.items():
            average[f"{kind} {name}"] = (
                0.95 * average.get(f"{kind} {name}", value.item()) + 0.05 * value.item()
            )
        done = step == recipe.steps
        if spent - printed_at > 20 or done:
            printed_at = spent
            line = {
                "step": step,
                "minutes": round(spent / 60, 2),
                "examples": seen,
                "rate": round(rate, 3),
                **{
                    name: round(value, 4)
                    for name, value in average.items()
                    if "balance" not in name
                },
            }
            print(json.dumps(line), flush=True)
            log.write(json.dumps(line) + "\n")
            log.flush()
        if spent - saved_at > 180 or done:
            saved_at = spent
            torch.save(
                {
                    "weights": weights,
                    "optims": [o.state_dict() for o in optims],
                    "step": step,
                    "spent": spent,
                    "seen": seen,
                    "recipe": asdict(recipe),
                },
                out / "state.tmp",
            )
            os.replace(out / "state.tmp", out / "state.pt")


def export(run: Path, folder: Path) -> None:
    """Write the weights of a run as a checkpoint: bfloat16, the released key names, configs beside
    them.
    """
    weights = torch.load(run / "state.pt", weights_only=True)["weights"]
    tensors = {
        key: value.detach().to(torch.bfloat16).contiguous()
        for key, value in sorted(weights.items())
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_configs(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument(
        "--export", type=Path, help="only write the checkpoint of a finished run into this folder"
    )
    arguments = parser.parse_args()
    if arguments.export:
        export(arguments.out, arguments.export)
        return
    train(
        arguments.out,
        replace(Recipe(), steps=arguments.steps),
        arguments.threads,
        not arguments.no_compile,
    )


if __name__ == "__main__":
    main()
