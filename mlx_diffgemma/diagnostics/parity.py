"""Compares our computation with the reference, stage by stage.

A row's error is the largest absolute difference in it.  Where the reference also runs in float64,
both float32 implementations are compared with float64.  Our error may be twice the reference's own
in the median row, and three times at the 90th percentile.  A row may have more than four times the
reference's own error there only if its router margin is so small that rounding chooses between two
experts.

Where float64 does not fit, errors are differences to the reference.  The reference's own spread
``r`` is the median, over the rows, of the largest difference between its variants.  A stage passes
when the median row is within max(1e-5, r), 99 % of the rows are within max(2e-5, 4 r), and every
row beyond that has such a router margin.

Trajectories run with the same random numbers on both sides and must agree in every accepted mask,
canvas and argmax.  A decision may differ where its margin is below ten times the reference's spread
of that very quantity along the trajectory.  Such a decision is listed, and each step after it is
compared from the reference's own canvas and self-conditioning signal.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlx_diffgemma.checkpoint.loading import load_model
from mlx_diffgemma.device import exact_float32
from mlx_diffgemma.diagnostics.forwards import compare_forwards, compare_images
from mlx_diffgemma.diagnostics.reference import Reference
from mlx_diffgemma.diagnostics.stages import StageResult
from mlx_diffgemma.diagnostics.trajectories import TrajectoryResult, compare_trajectories
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.media.images import BUDGETS, Image, fitting_size
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma


@dataclass
class Report:
    stages: list[StageResult]
    trajectories: list[TrajectoryResult]

    @property
    def ok(self) -> bool:
        return all(s.ok for s in self.stages) and all(t.ok for t in self.trajectories)


def default_prompts(model: DiffusionGemma, count: int, seed: int = 0) -> list[list[int]]:
    """Prompts of random ids, from a few tokens to more than the sliding window holds.

    Args:
        model: The model.
        count: How many prompts.
        seed: The seed of the ids.
    """
    text = model.config.text
    windows = [layer.window for layer in text.layers if layer.window]
    longest = 2 * (windows[0] if windows else 64) + 7
    longest = min(longest, text.max_position_embeddings // 2)
    lengths = np.linspace(5, longest, count).astype(int)
    rng = np.random.default_rng(seed)
    return [rng.integers(1, text.vocab_size, length).tolist() for length in lengths]


def default_images(model: DiffusionGemma, seed: int = 0) -> list[list[Image]]:
    """Groups of noise images (square, wide and tall) that fit the tower's position table.

    The list is empty for a model without a vision tower.

    Raises:
        UserError: No image fits the position table.
    """
    vision = model.config.vision
    rng = np.random.default_rng(seed)
    if vision is None:
        return []
    square = vision.pooling_kernel_size
    longest = vision.position_embedding_size // square * square * vision.patch_size
    if not longest:
        raise UserError(
            f"config.json: position_embedding_size is {vision.position_embedding_size}, and an image has at least "
            f"{square} patches a side (pooling_kernel_size); no image can be compared, so correct it."
        )
    images = []
    for height, width in ((90, 90), (20, 300), (300, 40)):
        size = fitting_size(height, width, vision.patch_size, square, BUDGETS[0])
        size = (min(size[0], longest), min(size[1], longest))
        pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        images.append(Image(pixels, vision.patch_size, vision.pooling_kernel_size))
    return [images[:1], images[1:]]


def run(
    folder: Path, device: str = "cpu", prompts: int = 4, canvases: int = 2, seed: int = 0
) -> Report:
    """Compare all stages on random prompts, as ``mlx-diffgemma parity`` prints it.

    Args:
        folder: The checkpoint.
        device: Where torch runs: cpu or cuda.
        prompts: How many random prompts.
        canvases: The most canvases of an answer, in the stages with several.
        seed: The seed of prompts and draws.

    Returns:
        The results of all stages and trajectories.

    Raises:
        UserError: The checkpoint or an argument cannot be used.
    """
    if prompts < 1 or canvases < 1:
        raise UserError(f"prompts and canvases must be at least 1, got {prompts} and {canvases}.")
    exact_float32()
    model = load_model(folder, "float32")
    groups = default_images(model, seed)  # refuse before the reference is loaded
    reference = Reference(folder, device)
    ids = default_prompts(model, prompts, seed)
    return Report(
        [
            *compare_forwards(model, reference, ids, seed),
            *compare_images(model, reference, groups, seed),
        ],
        [
            compare_trajectories(model, reference, ids, "one sampler step", 1, seed, max_steps=1),
            compare_trajectories(model, reference, ids, "one canvas", 1, seed),
            compare_trajectories(model, reference, ids, "several canvases", canvases, seed),
            compare_trajectories(
                model, reference, ids, "unequal batch", canvases, seed, together=True
            ),
        ],
    )
