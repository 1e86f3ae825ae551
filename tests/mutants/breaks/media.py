"""Breaks of images, videos and the vision tower; of filling in and deciding."""

from tests.mutants.entry import Break

VISION = "mlx_diffgemma/model/vision.py"
IMAGES = "mlx_diffgemma/media/images.py"
VIDEO = "mlx_diffgemma/media/video.py"
INFILL = "mlx_diffgemma/generation/filling.py"
DECIDE = "mlx_diffgemma/generation/label_reading.py"

BREAKS = (
    Break(
        "pooled-vision-unrounded",
        VISION,
        "squares.mean(axis=(1, 3)).astype(x.dtype).astype(mx.float32)",
        "squares.mean(axis=(1, 3)).astype(mx.float32)",
        "tests/test_dtypes.py",
    ),
    Break(
        "image-above-its-budget",
        IMAGES,
        "rows = math.floor(factor * height / unit)",
        "rows = math.ceil(factor * height / unit)",
        "tests/test_images.py -k TestSizes",
    ),
    Break(
        "digest-without-the-shape",
        IMAGES,
        "repr((self.pixels.shape, self.patch_size, self.side)).encode() + self.pixels.tobytes()",
        "self.pixels.tobytes()",
        "tests/test_images.py -k digests",
    ),
    Break(
        "one-frame-too-many",
        VIDEO,
        "            while len(taken) > MAX_FRAMES:\n",
        "            while len(taken) > MAX_FRAMES + 1:\n",
        "tests/test_video.py -k TestSampling",
    ),
    Break(
        "worst-length-wins",
        INFILL,
        "_, best = max(tried.values(), key=lambda one: one[0])",
        "_, best = min(tried.values(), key=lambda one: one[0])",
        "tests/test_infill.py -k best_score",
    ),
    Break(
        "labels-averaged-as-logs",
        DECIDE,
        "shares: np.ndarray = (odds / odds.sum(axis=1, keepdims=True)).mean(axis=0)",
        "shares: np.ndarray = odds.sum(axis=0) / odds.sum()",
        "tests/test_decide.py -k average or counts_each",
    ),
    Break(
        "reads-with-one-seed",
        DECIDE,
        "draws = [Draws(seed + read, model.config.text.vocab_size) for read in range(reads)]",
        "draws = [Draws(seed, model.config.text.vocab_size) for read in range(reads)]",
        "tests/test_decide.py -k reads or seeds",
    ),
)
