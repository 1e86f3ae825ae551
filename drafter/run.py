"""Make a drafter from a target and prompts: record rollouts, train, write the folder.

The folder holds the drafter (config.json, model.safetensors, README.md), ``trajectories/``, and
state.safetensors to resume from.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from drafter.config import DrafterConfig, DraftLayer
from drafter.drafter import Drafter
from drafter.loading import save_drafter
from drafter.training import DraftReport, DraftTrainer, DraftTrainingOptions, frequent_tokens
from drafter.trajectories import Trajectory, read_trajectories, record_rollouts
from mlx_diffgemma.device import check_memory
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.estimate import cost
from mlx_diffgemma.files import check_folder, read_lines, write_text
from mlx_diffgemma.model.cache import Cache
from mlx_diffgemma.model.config import ModelConfig
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.sampling.policy import ReferencePolicy
from mlx_diffgemma.sampling.protocols import Policy

VALID_SHARE = 20  # one prompt in 20 is for validation
USUAL_STEPS = 27  # steps a canvas: the mean that users of the released model report
STATE = "state.safetensors"
LOG = "trajectories"


@dataclass(frozen=True)
class DraftShape:
    """The size of a drafter.  None: the default for its target.

    ``taps`` are the layers of the target whose hidden states are read, counted from 0.
    """

    num_layers: int | None = None
    taps: tuple[int, ...] | None = None
    intermediate_size: int | None = None
    head_size: int | None = None
    block_size: int = 16

    def config(self, target: ModelConfig) -> DrafterConfig:
        """The configuration of a drafter of this size for ``target``.

        Raises:
            UserError: The target lacks a layer in ``taps``, or a size is out of range.
        """
        text = target.text
        layers = len(target.text.layers)
        for name in ("num_layers", "intermediate_size", "head_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}.")
        if self.block_size < 2:
            raise UserError(f"block_size must be at least 2, got {self.block_size}.")
        is_large = layers > 12
        taps = self.taps or _default_taps(layers)
        if not all(0 <= layer < layers for layer in taps):
            raise UserError(
                f"taps must lie between 0 and {layers - 1}, got {', '.join(map(str, taps))}."
            )
        head_dim = max(8, text.hidden_size // 4)
        if text.hidden_size % 128 == 0 and text.hidden_size >= 1024:
            head_dim = 128
        heads = max(1, text.hidden_size // head_dim)
        head_size = self.head_size
        if head_size is None:
            head_size = 32_768 if is_large else max(64, text.vocab_size * 3 // 8)
        return DrafterConfig(
            hidden_size=text.hidden_size,
            intermediate_size=self.intermediate_size or text.hidden_size * (3 if is_large else 1),
            num_attention_heads=heads,
            num_key_value_heads=heads // 2 if heads % 2 == 0 else heads,
            head_dim=head_dim,
            vocab_size=text.vocab_size,
            num_target_layers=layers,
            taps=taps,
            layers=(DraftLayer(None, False),) * (self.num_layers or (5 if is_large else 1)),
            block_size=self.block_size,
            final_logit_softcapping=text.final_logit_softcapping,
            max_position_embeddings=text.max_position_embeddings,
            self_conditioning=True,
            confidence=True,
            refinement=True,
            head_size=min(head_size, text.vocab_size),
        )


def _default_taps(layers: int) -> tuple[int, ...]:
    """The layers to read of a target with this many layers."""
    if layers > 12:
        return tuple(sorted({round(1 + i * (layers - 4) / 5) for i in range(6)}))
    return tuple(sorted({layers // 6, layers // 2, layers - 1}))


def macs(config: DrafterConfig) -> int:
    """The multiply-adds of one pass for each row; attention scores are not counted."""
    hidden = config.hidden_size
    heads = config.num_attention_heads + config.num_key_value_heads
    attention = 2 * hidden * config.head_dim * heads
    mlp = 3 * hidden * config.intermediate_size
    # The projections of hidden states, self-conditioning and refinement are [hidden, hidden] each.
    projections = (len(config.taps) + config.self_conditioning) * hidden * hidden
    head = hidden * (config.head_size or config.vocab_size)
    return len(config.layers) * (attention + mlp) + projections + head


def share(config: DrafterConfig, target: ModelConfig) -> float:
    """The cost of a drafter's pass as a share of a denoising step with dense self-conditioning."""
    flops = cost.step_flops(target, 0)
    step = sum(value for part, value in flops.items() if part != "scores")
    return macs(config) / (step / 2 / target.canvas_length)


def read_prompts(path: Path) -> list[list[dict[str, str]]]:
    """Conversations from a jsonl file with ``prompt`` or ``messages`` in each line.

    A last message by the model is left out.

    Raises:
        UserError: A line is invalid; the error names file and line.
    """

    def make(entry: object) -> list[dict[str, str]]:
        if not isinstance(entry, dict) or not ("prompt" in entry or "messages" in entry):
            raise UserError("'prompt' or 'messages' is missing.")
        if entry.get("images"):
            raise UserError("drafters are trained on text only; leave out the lines with 'images'.")
        messages = entry.get("messages") or [{"role": "user", "content": entry["prompt"]}]
        if not isinstance(messages, list) or not all(
            isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages
        ):
            raise UserError(
                "'prompt' must be text, 'messages' a list of objects with a role and a content."
            )
        asked = messages[:-1] if messages[-1].get("role") == "assistant" else messages
        if not asked:
            raise UserError("there is no message to answer.")
        return asked

    if not (found := list(read_lines(path, make))):
        raise UserError(f"{path} holds no prompts.")
    return found


def check_target(folder: Path, resume: bool) -> None:
    """Check the folder before the work starts.

    Raises:
        UserError: The folder cannot be written, is not the folder of a run, or already holds a run.
    """
    check_folder(folder, ours=(STATE, LOG))
    if (folder / STATE).exists() and not resume:
        raise UserError(
            f"{folder} holds a run already; continue it with --resume, or give another folder."
        )


@dataclass(frozen=True)
class Plan:
    """The expected cost of a run.

    Attributes:
        memory: The memory in bytes.
        answering: Seconds to answer the prompts, at a usual number of steps.
        answering_at_most: Seconds to answer the prompts, at the most steps.
        training: Seconds to train.
    """

    memory: int
    answering: float
    answering_at_most: float
    training: float

    def describe(self) -> str:
        def hours(seconds: float) -> str:
            return (
                f"{seconds / 3600:.1f} h"
                if seconds >= 3600
                else f"{max(1, round(seconds / 60))} min"
            )

        return (
            f"estimated: {self.memory / 1e9:.1f} GB; answering {hours(self.answering)} at {USUAL_STEPS} steps a canvas, at "
            f"most {hours(self.answering_at_most)}; training {hours(self.training)}"
        )


@dataclass
class DraftRun:
    """One run, from prompts to a drafter in ``folder``.

    ``target_name`` describes the target in the drafter's config.  With ``first``, the run continues
    from that drafter: canvases start from its guesses, and the log in the folder ``earlier``, if
    there is one, is trained on as well.
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
        check_memory(
            self._memory(),
            f"Answering {self.batch_size} prompts together, or training on {self.training.batch_size} of "
            "the answers' blocks,",
            "take a smaller --rollout-batch-size or --batch-size, shorter answers or a conversion "
            "with fewer bits",
        )

    def _memory(self) -> int:
        config = self.target.config
        own = self.config
        batch = self.training.batch_size
        longest = max(len(ids) for ids in self.prompts) + self.max_tokens
        weights = sum(array.nbytes for _, array in tree_flatten(self.target.parameters()))
        rolling = weights + self.batch_size * cost.run_bytes(
            config, 0, longest, self.target.dtype.size
        )
        # The drafter in float32 with its gradients and two moments; the logits, their softmax and
        # the gradients of both; and the target's hidden states.
        parameters = sum(array.size for _, array in tree_flatten(Drafter(own).parameters()))
        rows = batch * config.canvas_length
        training = weights + 16 * parameters + 16 * rows * (own.head_size or own.vocab_size)
        training += 8 * batch * longest * len(own.taps) * own.hidden_size
        return max(rolling, training)

    def plan(self) -> Plan:
        """Estimate the cost from one denoising step of a batch, which is run and timed."""
        config = self.target.config
        batch = self.batch_size
        canvases = mx.zeros((batch, config.canvas_length), dtype=mx.int32)
        caches = [Cache(config.text) for _ in range(batch)]
        self.target.encode([mx.array(self.prompts[0])] * batch, caches)
        for _ in range(2):  # the first one warms up
            began = time.perf_counter()
            mx.eval(self.target.denoise(canvases, caches).logits)
            seconds = (time.perf_counter() - began) / batch
        answered = len(self.prompts) * -(-self.max_tokens // config.canvas_length) * seconds
        steps = min(USUAL_STEPS, config.generation.max_denoising_steps)
        # The target encodes a block and denoises half of the canvases.  The drafter runs forward
        # twice and backward once.
        training = (
            self.training.iters
            * self.training.batch_size
            * seconds
            * (1.5 + 4 * share(self.config, config))
        )
        return Plan(
            self._memory(),
            steps * answered,
            config.generation.max_denoising_steps * answered,
            training,
        )

    def log(
        self, progress: Callable[[int, int], None] | None = None
    ) -> tuple[list[Trajectory], list[Trajectory]]:
        """Record the rollouts that are not logged yet; return (training, validation) data."""
        policy: Policy = ReferencePolicy.from_config(
            self.target.config.generation, coverage=1 - 1e-6
        )
        if self.first:
            policy = self.first.canvas(self.target, policy)
        record_rollouts(
            self.target,
            self.prompts,
            self.folder / LOG,
            policy,
            self.max_tokens,
            self.training.seed,
            self.batch_size,
            progress,
        )
        logged = list(read_trajectories(self.folder / LOG, self.target))
        if self.earlier and self.earlier.is_dir():
            logged += read_trajectories(self.earlier, self.target)
        # Validation answers are kept whole, and no prompt is in both sets.
        held = {tuple(ids) for ids in self.prompts[::VALID_SHARE]}
        sides: tuple[list[Trajectory], list[Trajectory]] = [], []
        for trajectory in logged:
            sides[tuple(trajectory.prefix[: trajectory.prompt].tolist()) in held].append(trajectory)
        if not sides[0]:
            raise UserError(
                f"There is nothing to train on: one prompt in {VALID_SHARE} is for validation; give at least two "
                "different ones."
            )
        return sides

    def train(
        self,
        train: Sequence[Trajectory],
        valid: Sequence[Trajectory],
        on_report: Callable[[DraftReport], None] | None = None,
    ) -> Drafter:
        """Train and write the folder.

        Args:
            train: The training data.
            valid: The validation data.
            on_report: Called with each report.

        Returns:
            The trained drafter.
        """
        mx.random.seed(self.training.seed)
        drafter = Drafter(self.config)
        if self.first:
            drafter.update(
                tree_map(
                    lambda x: x if x.dtype == mx.int32 else x.astype(mx.float32),
                    self.first.parameters(),
                )
            )
        elif self.config.head_size:
            drafter.head_ids = mx.array(
                frequent_tokens(train, self.config.head_size, self.config.vocab_size)
            )
        trainer = DraftTrainer(drafter, self.target, train, valid, self.training)
        if self.resume and (self.folder / STATE).exists():
            trainer.restore(self.folder / STATE)
        trainer.run(on_report, self.folder / STATE)
        self.write(drafter, trainer.reports)
        return drafter

    def write(self, drafter: Drafter, reports: Sequence[DraftReport]) -> None:
        save_drafter(drafter, self.folder, self.target_name, mx.bfloat16)
        last = next((report for report in reversed(reports) if report.valid), reports[-1])
        cost_share = share(self.config, self.target.config)
        count = f"{len(self.prompts):,}"
        write_text(
            self.folder / "README.md",
            f"# A drafter for {self.target_name['name']}\n\nTrained with `mlx-diffgemma draft train` on {count} prompts.\nA pass "
            f"takes {cost_share:.1%} of a denoising step's multiply-adds. On held-out prompts it finds {last.canvas_right:.1%} of\n"
            f"the tokens of begun canvases and {last.block_right:.1%} of those behind a known one.\n",
        )
