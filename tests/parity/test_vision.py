"""The processor, the tower stage by stage, and prompts with images, against transformers."""

import numpy as np
import pytest
from PIL import Image as pillow

from mlx_diffgemma.checkpoint.loading import load_model
from mlx_diffgemma.diagnostics.forwards import compare_images
from mlx_diffgemma.media.images import BUDGETS, open_image, prepare
from mlx_diffgemma.model.config import VisionConfig
from tests.checkpoints import VISIONS, make_checkpoint
from tests.helpers.deferred import Deferred, Reference
from tests.variants import few

processing = Deferred("transformers.models.gemma4.image_processing_pil_gemma4")
RELEASED = VisionConfig.from_dict({"patch_size": 16, "pooling_kernel_size": 3})
EXTREME = (
    (1, 1),
    (1, 5000),
    (5000, 1),
    (3000, 2),
    (48, 48),
    (384, 384),
    (2, 2),
    (47, 49),
    (336, 480),
    (16, 3000),
)
MODES = ("RGB", "L", "RGBA", "P", "LA", "1", "CMYK")


def noise(rng, width, height, mode="RGB"):
    return pillow.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)


@pytest.mark.parametrize("number", few(range(60), *range(20)))
def test_processor(number):
    rng = np.random.default_rng(number)
    width, height = (
        EXTREME[number]
        if number < len(EXTREME)
        else (int(2 ** rng.uniform(0, 10.5)) for _ in range(2))
    )
    image = noise(rng, width, height, MODES[number % len(MODES)])
    budget = BUDGETS[number % len(BUDGETS)]
    theirs = processing.Gemma4ImageProcessorPil(max_soft_tokens=budget)([image])
    ours = prepare(open_image(image), RELEASED, budget)
    pixels, positions = theirs["pixel_values"][0], theirs["image_position_ids"][0]
    count = len(ours.patches)
    assert ours.soft_tokens == theirs["num_soft_tokens_per_image"][0]
    assert len(pixels) == budget * 9
    np.testing.assert_allclose(ours.patches, pixels[:count], atol=1e-5)
    np.testing.assert_array_equal(ours.positions, positions[:count])
    assert (positions[count:] == -1).all(), "the rest is padding, which we leave out"


def groups(model, sizes, budget):
    """One to three images a prompt."""
    rng = np.random.default_rng(budget)
    made = [prepare(noise(rng, *size), model.config.vision, budget) for size in sizes]
    return [made[:1], made[1:3], made[3:]] if len(made) > 2 else [made]


@pytest.mark.parametrize(
    ("shape", "vision"),
    few(
        [
            ("five-and-one", "plain"),
            ("five-and-one", "released-heads"),
            ("odd-heads", "clipped"),
            ("full-only", "plain"),
            ("wide-window", "clipped"),
            ("wide-window", "released-heads"),
        ],
        ("odd-heads", "clipped"),
    ),
)
def test_every_stage(shape, vision, tmp_path):
    folder = make_checkpoint(tmp_path, shape, vision=vision)
    model, reference = load_model(folder, "float32"), Reference(folder)
    sizes = ((100, 100), (300, 20), (20, 300), (64, 48), (7, 1000), (640, 360))
    for stage in compare_images(model, reference, groups(model, sizes, 70)):
        assert stage.ok, stage


@pytest.mark.parametrize("budget", few(BUDGETS[1:], 140))
def test_every_budget(budget, tmp_path):
    small = VISIONS["plain"] | dict(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    folder = make_checkpoint(tmp_path, vision=small)
    model, reference = load_model(folder, "float32"), Reference(folder)
    for stage in compare_images(
        model,
        reference,
        groups(model, ((500, 400), (60, 900))[: 1 if budget == 1120 else 2], budget),
    ):
        assert stage.ok, stage


def test_blocks_matter(tmp_path):
    """Without the masks of the images the comparison fails: it sees them."""
    folder = make_checkpoint(tmp_path, vision="plain")
    model, reference = load_model(folder, "float32"), Reference(folder)
    reference.model.config.get_text_config().use_bidirectional_attention = None
    stages = {
        stage.stage: stage
        for stage in compare_images(model, reference, groups(model, ((100, 100),), 70))
    }
    assert stages["image embeddings"].ok
    assert not stages["logits behind images"].ok
