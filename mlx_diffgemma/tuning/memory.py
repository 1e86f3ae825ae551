"""Estimates the memory of a training step before anything is loaded.

The estimate says which ways to tune a model fit a machine.

Weights, updates and the parts of the head are counted.  What a layer keeps for its gradient is a
count of its intermediate arrays.  The coefficients of that count were fitted to measured peaks;
`python bench/training_memory.py` compares the estimate with such peaks.

    >>> training_memory(config, weights, trainable, element_size=2, sequence=512,
    options=TrainingOptions(batch_size=1)).total
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mlx.utils import tree_flatten

from mlx_diffgemma.device import check_memory, memory_limit
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.estimate import cost
from mlx_diffgemma.model.config import ModelConfig, TextConfig
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.model.recipes import recipe_named
from mlx_diffgemma.tuning.adapters import AdapterOptions, adapt
from mlx_diffgemma.tuning.head import LOGITS
from mlx_diffgemma.tuning.trainer import TrainingOptions

# The bytes that a layer keeps for the gradient, for each row and each unit of a dimension. Most of
# it is float32 in every compute dtype; in 16 bits the residual stream is kept in both dtypes.
PER_HIDDEN = 34
PER_HIDDEN_16 = 52
PER_INNER = 29
PER_CHOICE = 8.3
PER_EXPERT_INNER = 28
PER_HEAD = 10
PER_SCORE = 4.8
AT_WORK = 2.2  # the peak of the layer being differentiated, in sizes of what a layer keeps
LOSS = 12  # the peak while the loss of a part is differentiated, in sizes of the logits
MACS = (24, 32, 48, 64, 96, 128, 192, 256, 512)  # GB of memory


@dataclass(frozen=True)
class TrainingMemory:
    """The bytes that a training step takes.

    Attributes:
        weights: The weights as stored.
        updates: The trained parameters' gradients and their two moments.
        kept: What the layers keep for the backward pass.
        work: What the layer, or the part of the head, being differentiated takes.
    """

    weights: int
    updates: int
    kept: int
    work: int

    @property
    def total(self) -> int:
        return self.weights + self.updates + self.kept + self.work

    @property
    def mac(self) -> int | None:
        """GB of the smallest Mac on which it fits."""
        # By default macOS lets the GPU use two thirds of up to 32 GB, and three quarters of more.
        return next(
            (size for size in MACS if self.total <= (2 / 3 if size <= 32 else 3 / 4) * size * 1e9),
            None,
        )


def training_memory(
    config: ModelConfig,
    weights: int,
    trainable: int,
    element_size: int,
    sequence: int,
    options: TrainingOptions,
) -> TrainingMemory:
    """Estimate the memory of a training step.

    Args:
        config: The config of the model.
        weights: The bytes of the weights.
        trainable: The bytes of the trained parameters, which may be part of ``weights``.
        element_size: Bytes of an element in the compute dtype.
        sequence: The tokens of each sequence.
        options: The options of the run.
    """
    text = config.text
    length = options.canvas_length or config.canvas_length
    rows = options.batch_size * (sequence + length)
    layers = [
        layer_bytes(text, index, sequence, length, element_size)
        for index in range(len(text.layers))
    ]
    kept: float = (
        len(layers) * text.hidden_size * element_size
        if options.grad_checkpoint
        else sum(layers, 0.0)
    )
    head = LOSS * min(LOGITS, 4 * rows * text.vocab_size)
    updates = trainable * (3 + (options.grad_accumulation_steps > 1))
    return TrainingMemory(
        weights, updates, int(rows * kept), int(max(head, AT_WORK * rows * max(layers)))
    )


def layer_bytes(
    text: TextConfig, index: int, sequence: int, length: int, element_size: int
) -> float:
    """The bytes that a layer keeps for each row.

    Args:
        text: The config of the text backbone.
        index: The number of the layer.
        sequence: The tokens of each sequence.
        length: The positions of a canvas.
        element_size: Bytes of an element in the compute dtype.
    """
    layer = text.layers[index]
    keys = min(sequence, layer.window or sequence) + length
    heads = (text.num_attention_heads + 2 * layer.num_kv_heads) * layer.head_dim
    return (
        (PER_HIDDEN if element_size == 4 else PER_HIDDEN_16) * text.hidden_size
        + PER_INNER * text.intermediate_size
        + text.top_k_experts
        * (PER_CHOICE * text.hidden_size + PER_EXPERT_INNER * text.moe_intermediate_size)
        + PER_HEAD * heads
        + PER_SCORE * text.num_attention_heads * keys
    )


def check_training_memory(model: DiffusionGemma, sequence: int, options: TrainingOptions) -> None:
    """Check that training fits this machine; ``model`` is ready to train.

    Args:
        model: The model, with its adapter.
        sequence: The tokens of the longest sequence.
        options: The options of the run.

    Raises:
        UserError: It does not fit; the message says what would help.
    """

    def needed(options: TrainingOptions) -> int:
        return training_memory(
            model.config, weights, trainable, model.dtype.size, sequence, options
        ).total

    weights = sum(value.nbytes for _, value in tree_flatten(model.parameters()))
    trainable = sum(value.nbytes for _, value in tree_flatten(model.trainable_parameters()))
    advice = [
        (text, size)
        for text, changed in (
            ("--grad-checkpoint", replace(options, grad_checkpoint=True)),
            (
                f"--batch-size 1 --grad-accumulation-steps "
                f"{options.batch_size * options.grad_accumulation_steps} --grad-checkpoint",
                replace(
                    options,
                    batch_size=1,
                    grad_accumulation_steps=options.batch_size * options.grad_accumulation_steps,
                    grad_checkpoint=True,
                ),
            ),
        )
        if (size := needed(changed)) < needed(options)
    ]
    fitting = [
        f"{text} takes {size / 1e9:.1f} GB" for text, size in advice if size <= memory_limit()
    ]
    remedy = (
        fitting[0]
        if fitting
        else "take a conversion with fewer bits, shorter examples (--max-seq-length) or fewer layers"
    )
    check_memory(
        needed(options),
        f"Training with batches of {options.batch_size} and {sequence} tokens",
        f"{remedy}; or --ignore-memory, since this is an estimate",
    )


@dataclass(frozen=True)
class Way:
    """One way to tune all layers of a model; ``recipe`` is how the base is stored."""

    full: bool
    experts: bool
    recipe: str

    @property
    def adapter(self) -> AdapterOptions:
        return AdapterOptions("full" if self.full else "lora", -1, train_experts=self.experts)

    def __str__(self) -> str:
        return f"{'full' if self.full else 'LoRA'}{', experts too' if self.experts else ''}"


WAYS = tuple(
    Way(full, experts, recipe)
    for full in (False, True)
    for experts in (False, True)
    for recipe in (("bf16",) if full else ("4bit", "8bit", "bf16"))
)


def ways(
    config: ModelConfig, sequence: int, batch_size: int
) -> list[tuple[Way, TrainingMemory, TrainingMemory]]:
    """Estimate the memory of every way to tune a model, in 16 bits.

    Args:
        config: The config of the model.
        sequence: The tokens of each sequence.
        batch_size: The examples of a batch.

    Returns:
        (way, memory without --grad-checkpoint, memory with it) of each way.

    Raises:
        UserError: The model does not take sequences of this length.
    """
    if not 1 <= sequence <= config.text.max_position_embeddings:
        raise UserError(
            f"Examples have between 1 and {config.text.max_position_embeddings:,} tokens, got {sequence:,}."
        )
    adapters = {(way.full, way.experts): way.adapter for way in WAYS}
    trainable = {kind: _trainable(config, adapter) for kind, adapter in adapters.items()}
    found = []
    for way in WAYS:
        own = trainable[way.full, way.experts]
        weights = cost.weight_bytes(config, recipe_named(way.recipe)) + (0 if way.full else own)
        plain, twice = (
            training_memory(
                config,
                weights,
                own,
                2,
                sequence,
                TrainingOptions(batch_size=batch_size, grad_checkpoint=checkpoint),
            )
            for checkpoint in (False, True)
        )
        found.append((way, plain, twice))
    return found


def _trainable(config: ModelConfig, adapter: AdapterOptions) -> int:
    """The bytes of the trained parameters: adapters are float32, full weights have 16 bits."""
    model = DiffusionGemma(config)  # allocates nothing: MLX arrays are lazy
    adapt(model, adapter)
    count = sum(value.size for _, value in tree_flatten(model.trainable_parameters()))
    return count * (2 if adapter.fine_tune_type == "full" else 4)
