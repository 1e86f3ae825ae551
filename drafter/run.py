"""A drafter from a target and prompts: roll the target out, log it, train, write the folder.

The folder holds the drafter (config.json, model.safetensors, README.md), ``trajectories/`` and state.safetensors to go on from.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from drafter.config import DrafterConfig, DraftLayer
from drafter.loading import save_drafter
from drafter.model import Drafter
from drafter.training import DraftReport, DraftTrainer, DraftTrainingOptions, frequent_tokens
from drafter.trajectories import Trajectory, read_trajectories, roll_out
from mlx_diffgemma import cost
from mlx_diffgemma.cache import Cache
from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.device import check_memory
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.files import check_folder, read_lines, write_text
from mlx_diffgemma.model import DiffusionGemma
from mlx_diffgemma.policy import Policy, ReferencePolicy

VALID_SHARE = 20  # one prompt of so many is for validation
USUAL_STEPS = 27  # a canvas: the mean of what users of the released model report
STATE, LOG = "state.safetensors", "trajectories"


@dataclass(frozen=True)
class DraftShape:
    """The drafter's own size; None: as small as its target asks for.  ``taps`` are layers of the target, counted from 0."""

    num_layers: int | None = None
    taps: tuple[int, ...] | None = None
    intermediate_size: int | None = None
    head_size: int | None = None
    block_size: int = 16

    def config(self, target: ModelConfig) -> DrafterConfig:
        """Errors: UserError for taps that the target does not have, and for sizes out of range."""
        text, layers = target.text, len(target.text.layers)
        for name in ("num_layers", "intermediate_size", "head_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}.")
        if self.block_size < 2:
            raise UserError(f"block_size must be at least 2, got {self.block_size}.")
        taps = self.taps or tuple(sorted({round(1 + i * (layers - 4) / 5) for i in range(6)} if layers > 12 else
                                         {layers // 6, layers // 2, layers - 1}))
        if not all(0 <= layer < layers for layer in taps):
            raise UserError(f"taps must lie between 0 and {layers - 1}, got {', '.join(map(str, taps))}.")
        size = 128 if text.hidden_size % 128 == 0 and text.hidden_size >= 1024 else max(8, text.hidden_size // 4)
        heads = max(1, text.hidden_size // size)
        return DrafterConfig(
            hidden_size=text.hidden_size, intermediate_size=self.intermediate_size or text.hidden_size * (3 if layers > 12 else 1),
            num_attention_heads=heads, num_key_value_heads=heads // 2 if heads % 2 == 0 else heads, head_dim=size,
            vocab_size=text.vocab_size, num_target_layers=layers, taps=taps,
            layers=(DraftLayer(None, False),) * (self.num_layers or (5 if layers > 12 else 1)), block_size=self.block_size,
            final_logit_softcapping=text.final_logit_softcapping, max_position_embeddings=text.max_position_embeddings,
            self_conditioning=True, confidence=True, refinement=True,
            head_size=min(self.head_size or max(64, text.vocab_size * 3 // 8 if layers <= 12 else 32_768), text.vocab_size))


def macs(config: DrafterConfig) -> int:
    """Multiply-adds a row of one pass: body, tap projection, self-conditioning or refinement, head; not the attention scores."""
    hidden, size = config.hidden_size, config.head_dim
    layer = 2 * hidden * size * (config.num_attention_heads + config.num_key_value_heads) + 3 * hidden * config.intermediate_size
    linear = len(config.taps) + config.self_conditioning  # [hidden, hidden] each
    return len(config.layers) * layer + linear * hidden * hidden + hidden * (config.head_size or config.vocab_size)


def share(config: DrafterConfig, target: ModelConfig) -> float:
    """``macs`` of those of a denoising step a row, whose self-conditioning is dense."""
    flops = cost.step_flops(target, 0)
    return macs(config) / (sum(value for part, value in flops.items() if part != "scores") / 2 / target.canvas_length)


def read_prompts(path: Path) -> list[list[dict[str, str]]]:
    """Conversations from a jsonl file with ``prompt`` or ``messages`` in each line; a last message of the model's is left out.

    Errors: UserError naming file and line.
    """
    def make(entry: object) -> list[dict[str, str]]:
        if not isinstance(entry, dict) or not ("prompt" in entry or "messages" in entry):
            raise UserError("'prompt' or 'messages' is missing.")
        if entry.get("images"):
            raise UserError("drafters are trained on text only; leave out the lines with 'images'.")
        messages = entry.get("messages") or [{"role": "user", "content": entry["prompt"]}]
        if not isinstance(messages, list) or not all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages):
            raise UserError("'prompt' must be text, 'messages' a list of objects with a role and a content.")
        asked = messages[:-1] if messages[-1].get("role") == "assistant" else messages
        if not asked:
            raise UserError("there is no message to answer.")
        return asked

    if not (found := list(read_lines(path, make))):
        raise UserError(f"{path} holds no prompts.")
    return found


def check_target(folder: Path, resume: bool) -> None:
    """Before the work.  Errors: UserError when ``folder`` cannot be written, is not a run's, or holds one already."""
    check_folder(folder, ours=(STATE, LOG))
    if (folder / STATE).exists() and not resume:
        raise UserError(f"{folder} holds a run already; continue it with --resume, or give another folder.")


@dataclass(frozen=True)
class Plan:
    """What a run will take: bytes, and seconds to answer the prompts, at a usual number of steps and at most, and to train."""

    memory: int
    answering: float
    answering_at_most: float
    training: float

    def told(self) -> str:
        def hours(seconds: float) -> str:
            return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{max(1, round(seconds / 60))} min"

        return (f"estimated: {self.memory / 1e9:.1f} GB; answering {hours(self.answering)} at {USUAL_STEPS} steps a canvas, at "
                f"most {hours(self.answering_at_most)}; training {hours(self.training)}")


@dataclass
class DraftRun:
    """One run, from prompts to a drafter in ``folder``.

    ``target_name`` is what the drafter's config says of its target.  With ``first`` it goes on from that drafter: the answers
    begin from its guesses, and what is logged in the folder ``earlier``, if there is any, is trained on as well.
    """

    target: DiffusionGemma
    target_name: Mapping[str, str]
    prompts: Sequence[Sequence[int]]
    folder: Path
    shape: DraftShape
    training: DraftTrainingOptions
    max_tokens: int
    batch_size: int
    resume: bool
    first: Drafter | None = None
    earlier: Path | None = None
    config: DrafterConfig = field(init=False)

    def __post_init__(self) -> None:
        check_target(self.folder, self.resume)
        if self.batch_size < 1 or self.max_tokens < 1:
            raise UserError("batch sizes and max_tokens must be at least 1.")
        self.config = self.first.config if self.first else self.shape.config(self.target.config)
        check_memory(self._memory(), f"Answering {self.batch_size} prompts together, or training on {self.training.batch_size} of "
                     "the answers' blocks,", "take a smaller --rollout-batch-size or --batch-size, shorter answers or a conversion "
                     "with fewer bits")

    def _memory(self) -> int:
        config, own, batch = self.target.config, self.config, self.training.batch_size
        longest = max(len(ids) for ids in self.prompts) + self.max_tokens
        weights = sum(array.nbytes for _, array in tree_flatten(self.target.parameters()))
        rolling = weights + self.batch_size * cost.run_bytes(config, 0, longest, self.target.dtype.size)
        # The drafter in float32 with its gradients and two moments; logits, their softmax and both gradients; the taps.
        parameters = sum(array.size for _, array in tree_flatten(Drafter(own).parameters()))
        rows = batch * config.canvas_length
        training = weights + 16 * parameters + 16 * rows * (own.head_size or own.vocab_size)
        training += 8 * batch * longest * len(own.taps) * own.hidden_size
        return max(rolling, training)

    def plan(self) -> Plan:
        """From one denoising step of a batch, which is taken and timed."""
        config, batch = self.target.config, self.batch_size
        canvases = mx.zeros((batch, config.canvas_length), dtype=mx.int32)
        caches = [Cache(config.text) for _ in range(batch)]
        self.target.encode([mx.array(self.prompts[0])] * batch, caches)
        for _ in range(2):  # the first one warms up
            began = time.perf_counter()
            mx.eval(self.target.denoise(canvases, caches).logits)
            seconds = (time.perf_counter() - began) / batch
        answered = len(self.prompts) * -(-self.max_tokens // config.canvas_length) * seconds
        steps = min(USUAL_STEPS, config.generation.max_denoising_steps)
        # A block is encoded, and half of the canvases denoised, by the target; the drafter goes forward twice and back.
        training = self.training.iters * self.training.batch_size * seconds * (1.5 + 4 * share(self.config, config))
        return Plan(self._memory(), steps * answered, config.generation.max_denoising_steps * answered, training)

    def log(self, progress: Callable[[int, int], None] | None = None) -> tuple[list[Trajectory], list[Trajectory]]:
        """(to train on, to validate on): what the target does, rolled out now as far as it is not logged yet."""
        policy: Policy = ReferencePolicy.from_config(self.target.config.generation, coverage=1 - 1e-6)
        if self.first:
            policy = self.first.canvas(self.target, policy)
        roll_out(self.target, self.prompts, self.folder / LOG, policy, self.max_tokens, self.training.seed, self.batch_size,
                 progress)
        found = list(read_trajectories(self.folder / LOG, self.target))
        if self.earlier and self.earlier.is_dir():
            found += read_trajectories(self.earlier, self.target)
        # Whole answers, and no prompt that is on both sides.
        held = {tuple(ids) for ids in self.prompts[::VALID_SHARE]}
        sides: tuple[list[Trajectory], list[Trajectory]] = [], []
        for trajectory in found:
            sides[tuple(trajectory.prefix[: trajectory.prompt].tolist()) in held].append(trajectory)
        if not sides[0]:
            raise UserError(f"There is nothing to train on: one prompt in {VALID_SHARE} is for validation; give at least two "
                            "different ones.")
        return sides

    def train(self, train: Sequence[Trajectory], valid: Sequence[Trajectory],
              on_report: Callable[[DraftReport], None] | None = None) -> Drafter:
        """Train and write the folder."""
        mx.random.seed(self.training.seed)
        drafter = Drafter(self.config)
        if self.first:
            drafter.update(tree_map(lambda x: x if x.dtype == mx.int32 else x.astype(mx.float32), self.first.parameters()))
        elif self.config.head_size:
            drafter.head_ids = mx.array(frequent_tokens(train, self.config.head_size, self.config.vocab_size))
        trainer = DraftTrainer(drafter, self.target, train, valid, self.training)
        if self.resume and (self.folder / STATE).exists():
            trainer.restore(self.folder / STATE)
        trainer.run(on_report, self.folder / STATE)
        self.write(drafter, trainer.reports)
        return drafter

    def write(self, drafter: Drafter, reports: Sequence[DraftReport]) -> None:
        save_drafter(drafter, self.folder, self.target_name, mx.bfloat16)
        last = next((report for report in reversed(reports) if report.valid), reports[-1])
        cost_share, count = share(self.config, self.target.config), f"{len(self.prompts):,}"
        write_text(
            self.folder / "README.md",
            f"# A drafter for {self.target_name['name']}\n\nTrained with `mlx-diffgemma draft train` on {count} prompts.\nA pass "
            f"takes {cost_share:.1%} of a denoising step's multiply-adds. On held-out prompts it finds {last.canvas_right:.1%} of\n"
            f"the tokens of begun canvases and {last.block_right:.1%} of those behind a known one.\n")
