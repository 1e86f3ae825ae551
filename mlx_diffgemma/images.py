"""Images as the model takes them: opened safely, resized to a budget of soft tokens, cut into patches.

Pixel values and positions are those of the reference's processor (Gemma4ImageProcessorPil), whose padding is left out: the
tower takes one image at a time.  What differs on purpose is how a file is opened: rotated as its EXIF says, and 16 bits a
channel scaled to 8 in place of clipped.  As in the reference, transparency is dropped, not painted over.

Needs Pillow (the extra ``vision``).

    >>> image = prepare(open_image("chart.png"), config.vision, 280)
    >>> image.soft_tokens
    266
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import math
import urllib.error
import urllib.request
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from mlx_diffgemma.config import VisionConfig
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.vision import Grid, patch_positions

if TYPE_CHECKING:
    from PIL import Image as pillow

BUDGETS = (70, 140, 280, 560, 1120)  # soft tokens an image may take
PIXEL_LIMIT = 100_000_000  # of a file: what it unpacks to takes three bytes each
DOWNLOAD_LIMIT = 50_000_000  # bytes
DOWNLOAD_SECONDS = 20
MISSING = "Images need Pillow; install it with `pip install 'mlx-diffgemma[vision]'`."
ImageSource: TypeAlias = "str | Path | bytes | pillow.Image"


@dataclass(frozen=True, eq=False)
class Image:
    """An image ready for the tower: ``pixels`` [rows * patch, columns * patch, 3] uint8."""

    pixels: np.ndarray
    patch_size: int
    side: int

    @property
    def grid(self) -> Grid:
        """Rows and columns of patches."""
        return self.pixels.shape[0] // self.patch_size, self.pixels.shape[1] // self.patch_size

    @property
    def soft_tokens(self) -> int:
        return self.grid[0] * self.grid[1] // self.side**2

    @property
    def patches(self) -> np.ndarray:
        """[rows * columns, 3 * patch size²] float32 from 0 to 1, row by row; colours are the innermost axis."""
        (rows, columns), size = self.grid, self.patch_size
        cut = self.pixels.reshape(rows, size, columns, size, 3).swapaxes(1, 2)
        return cut.reshape(rows * columns, -1).astype(np.float32) * np.float32(1 / 255)

    @property
    def positions(self) -> np.ndarray:
        """[rows * columns, 2] (x, y)."""
        return patch_positions(self.grid)

    @cached_property
    def digest(self) -> bytes:
        """Of all that the tower sees."""
        return hashlib.sha256(repr((self.pixels.shape, self.patch_size, self.side)).encode() + self.pixels.tobytes()).digest()


def fitting_size(height: int, width: int, patch_size: int, side: int, budget: int) -> tuple[int, int]:
    """The largest (height, width) of about the same aspect ratio that takes at most ``budget`` soft tokens and is made of whole
    ones.  Source: get_aspect_ratio_preserving_size.
    """
    unit = side * patch_size
    factor = math.sqrt(budget * unit**2 / (height * width))
    rows, columns = math.floor(factor * height / unit), math.floor(factor * width / unit)
    if not rows:
        rows, columns = 1, min(width // height, budget)
    elif not columns:
        rows, columns = min(height // width, budget), 1
    return rows * unit, columns * unit


def check_budget(budget: int) -> int:
    """Errors: UserError for a number of soft tokens the model was not made for."""
    if budget not in BUDGETS:
        raise UserError(f"An image takes at most {', '.join(map(str, BUDGETS[:-1]))} or {BUDGETS[-1]} soft tokens, not {budget}.")
    return budget


def prepare(image: pillow.Image, config: VisionConfig, budget: int) -> Image:
    """Resize an opened RGB image to ``budget`` soft tokens.  Errors: UserError for another budget than the model knows."""
    from PIL import Image as pillow

    height, width = fitting_size(image.height, image.width, config.patch_size, config.pooling_kernel_size, check_budget(budget))
    longest = max(height, width) // config.patch_size
    if longest > config.position_embedding_size:
        raise UserError(f"An image of {image.width} x {image.height} would be {longest} patches long and the tower knows "
                        f"{config.position_embedding_size} positions; crop it or take fewer soft tokens.")
    if (height, width) != (image.height, image.width):
        image = image.resize((width, height), pillow.Resampling.BICUBIC)
    return Image(np.asarray(image, dtype=np.uint8), config.patch_size, config.pooling_kernel_size)


def open_image(source: ImageSource, allow_files: bool = True, allow_urls: bool = False) -> pillow.Image:
    """The RGB image of a path, the bytes of a file, a data URL, an http(s) URL or an image of Pillow.

    Paths and remote URLs only where they are allowed.  Errors: UserError for what is no image, damaged, of no size or too large.
    """
    try:
        from PIL import Image as pillow
        from PIL import ImageOps, UnidentifiedImageError
    except ImportError:
        raise UserError(MISSING) from None
    if isinstance(source, pillow.Image):
        opened, name = source, "The image"
    else:
        content, name = _content(source, allow_files, allow_urls)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", pillow.DecompressionBombWarning)  # the limit below is ours
                opened = pillow.open(io.BytesIO(content))
        except UnidentifiedImageError:
            raise UserError(f"{name} is not an image that Pillow can read.") from None
        except (OSError, ValueError, SyntaxError, pillow.DecompressionBombError) as error:
            raise UserError(f"{name} cannot be read as an image ({error}).") from None
    if not opened.width or not opened.height:
        raise UserError(f"{name} has no size ({opened.width} x {opened.height}).")
    if opened.width * opened.height > PIXEL_LIMIT:
        raise UserError(f"{name} has {opened.width:,} x {opened.height:,} pixels, more than the {PIXEL_LIMIT:,} allowed; make it "
                        "smaller.")
    try:
        opened.load()
        return _rgb(ImageOps.exif_transpose(opened))
    except (OSError, ValueError, SyntaxError, EOFError, IndexError) as error:
        raise UserError(f"{name} is damaged or cut off ({error}).") from None


def _rgb(image: pillow.Image) -> pillow.Image:
    from PIL import Image as pillow

    if image.mode.startswith("I") or image.mode == "F":  # more than 8 bits a channel
        values = np.asarray(image).astype(np.float64)
        if image.mode != "F" and values.max() > 255:
            values = values / 257
        image = pillow.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))
    return image.convert("RGB")


def _content(source: str | Path | bytes, allow_files: bool, allow_urls: bool) -> tuple[bytes, str]:
    """(bytes, what to call them) of everything but an opened image."""
    if isinstance(source, bytes):
        return source, "The image"
    text = str(source)
    if text.startswith("data:"):
        header, comma, payload = text.partition(",")
        try:
            if not comma or not header.endswith(";base64"):
                raise binascii.Error
            return base64.b64decode(payload, validate=True), "The image of the data URL"
        except binascii.Error:
            raise UserError("The data URL is not of the form data:image/png;base64,…") from None
    if text.startswith(("http://", "https://")):
        if not allow_urls:
            raise UserError("Remote images are not fetched here; send the image itself, as a data URL.")
        return _download(text), text
    if not allow_files:
        raise UserError("Files are not read here; send the image itself, as a data URL.")
    path = Path(text).expanduser()
    try:
        return path.read_bytes(), path.name
    except FileNotFoundError:
        raise UserError(f"There is no image {path}.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from None


def _download(url: str) -> bytes:
    request = urllib.request.Request(url, headers={"User-Agent": "mlx-diffgemma"})
    try:
        with urllib.request.urlopen(request, timeout=DOWNLOAD_SECONDS) as answer:
            content: bytes = answer.read(DOWNLOAD_LIMIT + 1)
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise UserError(f"{url} cannot be fetched ({getattr(error, 'reason', error)}).") from None
    if len(content) > DOWNLOAD_LIMIT:
        raise UserError(f"{url} is larger than {DOWNLOAD_LIMIT // 1_000_000} MB.")
    return content
