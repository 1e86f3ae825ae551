"""Trains nano to see: ``python bench/nano/train_nano_vision.py OUT_FOLDER``.

This needs torch (extras ``parity`` and ``vision``).

A small tower of the released kind, transformers' own module, is trained from scratch together with
nano's weights, on drawn pictures with questions (``pictures``).  In the first steps the tower is
trained alone: it learns to name the thing in a picture, from the mean of its soft tokens.  That
loss continues beside nano's own objective afterwards.  One step in five uses nano's own tasks, so
that it does not forget them.  ``--export`` writes the checkpoint.

The run writes ``state.pt`` every few minutes.  Started again with the same folder, it continues
from that file.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from nano_files import CONFIG, write_configs
from safetensors.torch import load_file, save_file
from train_nano import (
    BOS,
    EOS,
    PAD,
    SHAPES,
    Examples,
    Muon,
    Network,
    Weights,
    losses,
    losses_on,
    make_batch,
    rms_norm,
)
from transformers import Gemma4VisionConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4VisionModel

from mlx_diffgemma.evaluation import pictures
from mlx_diffgemma.media.images import prepare
from mlx_diffgemma.model.config import VisionConfig
from mlx_diffgemma.nano import FOLDER

TOWER = "model.encoder.vision_tower."
PROJECTION = "model.encoder.embed_vision.embedding_projection.weight"
BUDGET = 70
VISION_CONFIG = {
    "model_type": "gemma4_vision",
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "head_dim": 32,
    "patch_size": 24,
    "pooling_kernel_size": 2,
    "position_embedding_size": 256,
    "standardize": True,
    "use_clipped_linears": False,
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "rope_parameters": {"rope_type": "axial", "rope_theta": 100.0},
}
KINDS, COLOURS = (*pictures.DIGITS, *pictures.SHAPES), tuple(pictures.COLOURS)
MARKS = {
    "begin": CONFIG["boi_token_id"],
    "image": CONFIG["image_token_id"],
    "end": CONFIG["eoi_token_id"],
}


@dataclass(frozen=True)
class Recipe:
    """The numbers set before a run.  All are written beside its losses
    (bench/results/nano-vision-training.json); the card names ``alone`` and ``steps``, and when the
    mix of questions was changed by hand.
    """

    steps: int = 3400
    alone: int = 600  # so many first steps are of the tower alone
    naming: float = 0.3  # weight of the loss of naming things afterwards
    batch: int = 32  # images of a step, whatever the questions
    tower_lr: float = 0.02
    nano_lr: float = 0.005
    adam_lr: float = 2e-3
    warmup: int = 60
    cooldown: float = 0.5
    balance: float = 0.01
    seed: int = 1


def tower_of(seed: int) -> Gemma4VisionModel:
    torch.manual_seed(seed)
    tower = Gemma4VisionModel(
        Gemma4VisionConfig(
            **{key: value for key, value in VISION_CONFIG.items() if key != "model_type"}
        )
    )
    for name, value in tower.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            value.data.fill_(VISION_CONFIG["head_dim"] ** -0.25)
        elif name.endswith("position_embedding_table"):
            value.data.normal_(0, 0.3)
        elif value.ndim > 1:
            value.data.normal_(0, value.shape[-1] ** -0.5)
    tower.std_bias.zero_()
    tower.std_scale.fill_(1 / tower.config.hidden_size**0.5)
    return tower


class Sighted(Network):
    """nano's network whose sequences hold images; ``see`` before each batch."""

    def __init__(self, weights: Weights, tower: Gemma4VisionModel):
        super().__init__(weights)
        self.tower, self.projection = tower, weights[PROJECTION]
        self.images, self.soft = (), None
        self.names = torch.nn.Linear(
            self.tower.config.hidden_size, len(KINDS) + len(pictures.COLOURS)
        )

    def naming(self, things: list[pictures.Thing]) -> torch.Tensor:
        """Loss of naming the one thing in each of the images seen last, or the two that are side by
        side.
        """
        parts = rms_norm(self.soft)
        if len(things) == 2 * len(parts):
            half = parts.shape[2] // 2
            parts = torch.stack(
                (parts[:, :, :half].mean((1, 2)), parts[:, :, -half:].mean((1, 2))), dim=1
            ).flatten(0, 1)
        else:
            parts = parts.mean((1, 2))
        kinds, colours = self.names(parts).split([len(KINDS), len(pictures.COLOURS)], dim=-1)
        return F.cross_entropy(
            kinds, torch.tensor([KINDS.index(thing.kind) for thing in things])
        ) + F.cross_entropy(
            colours, torch.tensor([COLOURS.index(thing.colour) for thing in things])
        )

    def see(self, patches: torch.Tensor, positions: torch.Tensor, places: list[int]) -> None:
        """``patches`` [batch * images, patches, values] of images that stand at ``places`` in every
        sequence; none: text.
        """
        if not places:
            self.images = ()
            return
        seen = self.tower(patches, positions.expand(len(patches), -1, -1)).last_hidden_state
        rows, columns = (
            int(positions[:, axis].max() + 1) // VISION_CONFIG["pooling_kernel_size"]
            for axis in (1, 0)
        )
        self.soft = seen.view(len(patches), rows, columns, -1)
        seen = (rms_norm(seen) @ self.projection.T).view(
            len(patches) // len(places), len(places), -1, self.projection.shape[0]
        )
        self.images = tuple((place, seen[:, number]) for number, place in enumerate(places))

    def __call__(self, ids, canvas, starts, soft):
        # The pass that gives the self-conditioning signal is over the first rows of a batch.
        return super().__call__(
            ids, canvas, starts, soft, [(place, seen[: len(ids)]) for place, seen in self.images]
        )


def picture_batch(encode, rng: random.Random, recipe: Recipe, kind: str | None = None):
    """(kind, batch as ``train.make_batch`` has it, patches, positions, places, things) of questions
    of one kind about images of one ratio; no things where they are to be counted.
    """
    kind = kind or rng.choices(pictures.KINDS, (3, 5, 2, 4, 3))[0]
    ratio = rng.choice(pictures.RATIOS)
    config = VisionConfig.from_dict(VISION_CONFIG)
    amount = {"pictures": 2, "film": 3}.get(kind, 1)
    canvas = rng.choices((16, 64), (0.7, 0.3))[0]
    prefixes, answers, images, things = [], [], [], []
    for _ in range(recipe.batch // amount):
        picture = pictures.draw(rng, False, kind, ratio)
        things += picture.things if kind != "count" else ()
        made = [prepare(image, config, BUDGET) for image in picture.images]
        images += made
        prefix, places = [BOS, *encode("<|turn>user\n")], []
        for number, image in enumerate(made):
            if picture.seconds:
                prefix += encode(f"{' ' if number else ''}00:{picture.seconds[number]:02} ")
            prefix.append(MARKS["begin"])
            places.append(len(prefix))
            prefix += [MARKS["image"]] * image.soft_tokens + [MARKS["end"]]
        prefixes.append(prefix + encode(f"{picture.question}<turn|>\n<|turn>model\n"))
        answers.append(encode(f"{picture.answer}<turn|>"))
    rows, longest = (
        len(prefixes),
        max(len(p) + len(a) for p, a in zip(prefixes, answers, strict=True)),
    )
    ids, clean = torch.full((rows, longest), PAD), torch.full((rows, canvas), EOS)
    for row, (prefix, answer) in enumerate(zip(prefixes, answers, strict=True)):
        ids[row, : len(prefix) + len(answer)] = torch.tensor(prefix + answer)
        clean[row, : len(answer)] = torch.tensor(answer)
    starts = torch.tensor([len(prefix) for prefix in prefixes])
    lengths = starts + torch.tensor([len(answer) for answer in answers])
    batch = {"ids": ids, "clean": clean, "starts": starts, "lengths": lengths, "answers": starts}
    patches, positions = np.stack([image.patches for image in images]), images[0].positions
    return kind, batch, torch.from_numpy(patches), torch.from_numpy(positions), places, things


def optimisers(
    weights: Weights,
    tower: Gemma4VisionModel,
    names: torch.nn.Linear,
    recipe: Recipe,
) -> list[tuple[torch.optim.Optimizer, float]]:
    """Each with its rate: Muon for the tower's matrices and nano's, Adam for all else of both."""

    def is_matrix(key: str, value: torch.Tensor) -> bool:
        return value.ndim >= 2 and not any(
            part in key for part in ("embed_tokens", "router", "position_embedding_table")
        )

    own = {
        **dict(tower.named_parameters()),
        PROJECTION: weights[PROJECTION],
        **dict(names.named_parameters()),
    }
    text = {key: value for key, value in weights.items() if key != PROJECTION}

    def adam(values: dict[str, torch.Tensor]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            [v for k, v in values.items() if not is_matrix(k, v)],
            lr=1.0,
            betas=(0.9, 0.98),
            weight_decay=0.0,
            fused=True,
        )

    return [
        (Muon([v for k, v in own.items() if is_matrix(k, v)], lr=1.0), recipe.tower_lr),
        (adam(own), recipe.adam_lr),
        (Muon([v for k, v in text.items() if is_matrix(k, v)], lr=1.0), recipe.nano_lr),
        (adam(text), recipe.adam_lr / 4),
    ]


def train(out: Path, recipe: Recipe, threads: int) -> None:
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    examples = Examples(
        sentencepiece.SentencePieceProcessor(model_file=str(FOLDER / "tokenizer.model"))
    )
    tower = tower_of(recipe.seed)
    weights = {key: value.float() for key, value in load_file(FOLDER / "model.safetensors").items()}
    hidden, width = CONFIG["text_config"]["hidden_size"], VISION_CONFIG["hidden_size"]
    # Soft tokens begin as large as nano's own embeddings.
    own = weights["model.decoder.embed_tokens.weight"].std() * hidden**0.5
    weights[PROJECTION] = (
        torch.randn(hidden, width, generator=torch.Generator().manual_seed(recipe.seed))
        * width**-0.5
        * own
    )
    for value in weights.values():
        value.requires_grad_()
    network = Sighted(weights, tower)
    optims = optimisers(weights, tower, network.names, recipe)
    step, spent = 0, 0.0
    if (out / "state.pt").exists():
        state = torch.load(out / "state.pt", weights_only=True)
        tower.load_state_dict(state["tower"])
        network.names.load_state_dict(state["names"])
        for key, value in state["weights"].items():
            weights[key].data.copy_(value)
        for (optim, _), saved in zip(optims, state["optims"], strict=True):
            optim.load_state_dict(saved)
        step, spent = state["step"], state["spent"]
        print(f"resuming at step {step}, {spent / 60:.1f} minutes in", flush=True)
    both = [optim for optim, _ in optims]
    log, average = (out / "log.jsonl").open("a"), dict[str, float]()
    saved_at = printed_at = spent
    while step < recipe.steps:
        began = time.perf_counter()
        joined = (
            step - recipe.alone if step >= recipe.alone else step
        )  # nano's weights are warmed up too
        rate = min(
            1.0,
            (joined + 1) / recipe.warmup,
            (recipe.steps - step) / (recipe.cooldown * (recipe.steps - recipe.alone)),
        )
        rng = random.Random(step + 1_000_003 * recipe.seed)
        generator = torch.Generator().manual_seed(step + 1_000_003 * recipe.seed)
        if step < recipe.alone:
            _, _, patches, positions, places, things = picture_batch(
                examples.encode, rng, recipe, kind="one"
            )
            network.see(patches, positions, places)
            kind, parts = "alone", {"naming": network.naming(things)}
            loss = parts["naming"]
        elif step % 5 == 4:
            kind, shape = "text", rng.choices(SHAPES, [shape.share for shape in SHAPES])[0]
            network.see(torch.empty(0), torch.empty(0), [])
            parts = losses(network, make_batch(examples, rng, shape, wide=False), generator)
        else:
            kind, batch, patches, positions, places, things = picture_batch(
                examples.encode, rng, recipe
            )
            network.see(patches, positions, places)
            clean, rows = batch["clean"], len(batch["clean"])
            level = 1e-4 + (1 - 1e-4) * torch.rand(rows, 1, generator=generator)
            noise = torch.randint(
                CONFIG["text_config"]["vocab_size"], clean.shape, generator=generator
            )
            canvas = torch.where(torch.rand(clean.shape, generator=generator) < level, noise, clean)
            parts = losses_on(network, batch, canvas, torch.arange(rows) < rows // 2)
            if things:
                parts["naming"] = network.naming(things)
        if step >= recipe.alone:
            loss = parts["denoise"] + parts["causal"] + recipe.balance * parts["balance"]
            loss = loss + recipe.naming * parts["naming"] if "naming" in parts else loss
        loss.backward()
        for optim, base in optims:
            group = optim.param_groups[0]
            if isinstance(optim, torch.optim.AdamW):
                torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
            group["lr"] = base * rate
            for value in group["params"]:
                if value.grad is None:  # what had no part in this step
                    value.grad = torch.zeros_like(value)
            if optim in (both[:2] if kind == "alone" else both[2:] if kind == "text" else both):
                optim.step()
            optim.zero_grad()
        step, spent = step + 1, spent + time.perf_counter() - began
        for name in sorted(parts.keys() - {"balance"}):
            value = parts[name].item()
            average[f"{kind} {name}"] = 0.95 * average.get(f"{kind} {name}", value) + 0.05 * value
        done = step == recipe.steps
        if spent - printed_at > 30 or done:
            printed_at = spent
            line = {
                "step": step,
                "minutes": round(spent / 60, 2),
                "rate": round(rate, 3),
                **{name: round(value, 4) for name, value in sorted(average.items())},
            }
            print(json.dumps(line), flush=True)
            log.write(json.dumps(line) + "\n")
            log.flush()
        if spent - saved_at > 180 or done:
            saved_at = spent
            torch.save(
                {
                    "weights": weights,
                    "tower": tower.state_dict(),
                    "names": network.names.state_dict(),
                    "optims": [o.state_dict() for o, _ in optims],
                    "step": step,
                    "spent": spent,
                    "recipe": asdict(recipe),
                },
                out / "state.tmp",
            )
            os.replace(out / "state.tmp", out / "state.pt")


def export(run: Path, folder: Path) -> None:
    """Write the weights of a run as a checkpoint: bfloat16, the released key names, configs and
    nano's tokenizer beside them.
    """
    state = torch.load(run / "state.pt", weights_only=True)
    weights = {**state["weights"], **{TOWER + key: value for key, value in state["tower"].items()}}
    tensors = {
        key: value.detach().to(torch.bfloat16).contiguous()
        for key, value in sorted(weights.items())
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = copy.deepcopy(CONFIG)
    write_configs(
        folder, config | {"vision_config": VISION_CONFIG, "vision_soft_tokens_per_image": BUDGET}
    )
    for name in (
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "chat_template.jinja",
    ):
        shutil.copy(FOLDER / name, folder / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--export", type=Path, help="only write the checkpoint of a run into this folder"
    )
    arguments = parser.parse_args()
    if arguments.export:
        export(arguments.out, arguments.export)
        return
    train(arguments.out, replace(Recipe(), steps=arguments.steps), arguments.threads)


if __name__ == "__main__":
    main()
