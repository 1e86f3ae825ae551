"""Prepares images for the model.

They are opened safely, resized to a budget of soft tokens, and cut into patches.

Pixel values and positions are those of the reference's processor (Gemma4ImageProcessorPil), without
its padding: the tower takes one image at a time.  Two things differ on purpose when a file is
opened.  It is rotated as its EXIF says, and 16 bits a channel are divided by 257 instead of clipped
to 8.  As in the reference, transparency is dropped, not painted over.

Needs Pillow (the extra ``vision``).

    >>> image = prepare(open_image("chart.png"), config.vision, 280)
    >>> image.soft_tokens
    266
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import struct
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from mlx_diffgemma.errors import UserError
from mlx_diffgemma.media.sources import Allowance, one_line, read_source
from mlx_diffgemma.model.config import VisionConfig
from mlx_diffgemma.model.vision import Grid, patch_positions

if TYPE_CHECKING:
    from PIL import Image as pillow

BUDGETS = (70, 140, 280, 560, 1120)  # the most soft tokens of an image, which has at least half
# The formats of photographs and screenshots.  HEIF needs pillow-heif.  EPS is left out, because
# Pillow runs Ghostscript on it.
FORMATS = ("PNG", "JPEG", "JPEG2000", "WEBP", "AVIF", "HEIF", "GIF", "BMP", "TIFF", "PPM", "ICO")
PIXEL_LIMIT = 100_000_000  # of the images of one request; each takes three bytes when unpacked
MISSING = "Images need Pillow; install it with `pip install 'mlx-diffgemma[vision]'`."
NO_HEIF = (
    "is a HEIC picture, which needs pillow-heif; install it with `pip install "
    "'mlx-diffgemma[heif]'`, or save the picture as JPEG."
)
# The brands of HEIF files; AVIF files may have "mif1" and "msf1" too.
HEIF_BRANDS = (
    b"heic",
    b"heix",
    b"heim",
    b"heis",
    b"hevc",
    b"hevx",
    b"hevm",
    b"hevs",
    b"mif1",
    b"msf1",
)
ImageSource: TypeAlias = "str | Path | bytes | bytearray | memoryview | pillow.Image"


@dataclass(frozen=True, eq=False)
class Image:
    """An image ready for the tower: ``pixels`` [rows * patch, columns * patch, 3] uint8.

    ``side`` is the tower's ``pooling_kernel_size``: a soft token is the mean of ``side`` x ``side``
    patches.
    """

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
        """The patches [rows * columns, 3 * patch size²], row by row, as float32 from 0 to 1.

        Colours are the innermost axis.
        """
        rows, columns = self.grid
        size = self.patch_size
        cut = self.pixels.reshape(rows, size, columns, size, 3).swapaxes(1, 2)
        return cut.reshape(rows * columns, -1).astype(np.float32) * np.float32(1 / 255)

    @property
    def positions(self) -> np.ndarray:
        """The positions (x, y) of the patches [rows * columns, 2]."""
        return patch_positions(self.grid)

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of everything the tower sees."""
        return hashlib.sha256(
            repr((self.pixels.shape, self.patch_size, self.side)).encode() + self.pixels.tobytes()
        ).digest()


def fitting_size(
    height: int, width: int, patch_size: int, side: int, budget: int
) -> tuple[int, int]:
    """The largest size of about the same aspect ratio that fits a budget of soft tokens.

    Source: get_aspect_ratio_preserving_size.

    Args:
        height: The image's height in pixels.
        width: Its width.
        patch_size: The side of a patch in pixels.
        side: The side in patches of the square that one soft token stands for.
        budget: The most soft tokens the image may take.

    Returns:
        (height, width), both multiples of ``side * patch_size``.
    """
    unit = side * patch_size
    factor = math.sqrt(budget * unit**2 / (height * width))
    rows = math.floor(factor * height / unit)
    columns = math.floor(factor * width / unit)
    if not rows:  # the width is more than ``budget`` times the height
        return unit, budget * unit
    if not columns:
        return budget * unit, unit
    return rows * unit, columns * unit


def check_budget(budget: int) -> int:
    """Check that the model was trained with a number of soft tokens, and return it.

    Raises:
        UserError: It was not.
    """
    if budget not in BUDGETS:
        raise UserError(
            f"image_tokens must be {', '.join(map(str, BUDGETS[:-1]))} or {BUDGETS[-1]}, got {budget}."
        )
    return budget


def prepare(image: pillow.Image, config: VisionConfig, budget: int) -> Image:
    """Resize an opened RGB image to a budget of soft tokens.

    Args:
        image: The image.
        config: The vision tower.
        budget: The most soft tokens the image may take; one of ``BUDGETS``.

    Raises:
        UserError: The budget is not one of ``BUDGETS``, or the image would have more patches in a
            row than the tower has positions.
    """
    from PIL import Image as pillow

    height, width = fitting_size(
        image.height,
        image.width,
        config.patch_size,
        config.pooling_kernel_size,
        check_budget(budget),
    )
    longest = max(height, width) // config.patch_size
    if longest > config.position_embedding_size:
        raise UserError(
            f"An image of {image.width} x {image.height} would be {longest} patches long and the "
            f"tower knows {config.position_embedding_size} positions; crop it or take fewer soft "
            "tokens."
        )
    if (height, width) != (image.height, image.width):
        image = image.resize((width, height), pillow.Resampling.BICUBIC)
    return Image(np.asarray(image, dtype=np.uint8), config.patch_size, config.pooling_kernel_size)


def open_image(
    source: ImageSource, allow_files: bool = True, allow_urls: bool = False
) -> pillow.Image:
    """Open one image and convert it to RGB.

    Args:
        source: A path, the bytes of a file, a data URL, an http(s) URL or an image of Pillow.
        allow_files: Whether paths are opened.
        allow_urls: Whether http(s) URLs are fetched.

    Raises:
        UserError: The source is not an image in one of ``FORMATS``, or it is damaged, empty, too
            large or not allowed.
    """
    return open_images([source], allow_files, allow_urls)[0]


def open_images(
    sources: Sequence[ImageSource], allow_files: bool = True, allow_urls: bool = False
) -> list[pillow.Image]:
    """The RGB images of one request, in their order.

    All headers are read before the first image is decoded, so that images that have too many pixels
    together take no memory.

    Args:
        sources: The images, each as ``open_image`` takes it.
        allow_files: Whether paths are opened.
        allow_urls: Whether http(s) URLs are fetched.

    Raises:
        UserError: ``open_image`` refuses one of the images.  Or they have more pixels together than
            ``PIXEL_LIMIT``, more bytes than ``FILE_LIMIT``, or take longer to download than
            ``TOGETHER_SECONDS``.
    """
    allowance = Allowance(PIXEL_LIMIT)
    with _quiet():
        opened = [_identified(source, allow_files, allow_urls, allowance) for source in sources]
        return [_decoded(image, name) for image, name in opened]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence Pillow's warnings.

    It warns of odd files, which it reads nevertheless, and of many pixels, which are counted here.

    Raises:
        UserError: Pillow is not installed.
    """
    try:
        from PIL import Image as pillow
    except ImportError:
        raise UserError(MISSING) from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", pillow.DecompressionBombWarning)
        yield


def _identified(
    source: ImageSource, allow_files: bool, allow_urls: bool, allowance: Allowance
) -> tuple[pillow.Image, str]:
    """Read the header of one image; the arguments are those of ``open_images``.

    Returns:
        (the image, not yet decoded; a name for it in messages)
    """
    from PIL import Image as pillow

    if isinstance(source, pillow.Image):
        image = source
        name = "The image"
    else:
        file, name = read_source(source, allow_files, allow_urls, allowance)
        image = _identify(file, name)
    _check_size(image, name)
    allowance.take_pixels(image.width, image.height)
    return image, name


def _decoded(image: pillow.Image, name: str) -> pillow.Image:
    """Decode an image whose header was read.

    Raises:
        UserError: The file is damaged.
    """
    from PIL import Image as pillow
    from PIL import ImageOps

    # The errors that decoders raise for damaged files.  load() is the first to look at a file
    # inside a file, as in ICNS.
    damaged = (
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
        IndexError,
        KeyError,
        TypeError,
        RuntimeError,
        struct.error,
        pillow.DecompressionBombError,
    )
    kind = image.format
    try:
        image.load()
        _check_size(image, name)
        return _rgb(ImageOps.exif_transpose(image), kind)
    except UserError:
        raise
    except damaged as error:
        raise UserError(f"{name} is damaged or cut off ({one_line(error)}).") from None


def header_pixels(sources: Sequence[str]) -> int:
    """Count the pixels of the images of data URLs from their headers, without decoding them.

    Raises:
        UserError: As ``open_images``.
    """
    allowance = Allowance(PIXEL_LIMIT)
    with _quiet():
        for source in sources:
            _identified(source, allow_files=False, allow_urls=False, allowance=allowance)
    return allowance.pixels


def _identify(file: io.BytesIO, name: str) -> pillow.Image:
    """Read the header of an image file.

    Raises:
        UserError: It is not an image.
    """
    from PIL import Image as pillow
    from PIL import UnidentifiedImageError

    pillow.init()
    if "HEIF" not in pillow.OPEN:
        with contextlib.suppress(ImportError):
            from pillow_heif import register_heif_opener

            register_heif_opener()
    formats = [kind for kind in FORMATS if kind in pillow.OPEN]
    try:
        return pillow.open(file, formats=formats)
    except UnidentifiedImageError:
        if "HEIF" not in formats and _is_heif(file):
            raise UserError(f"{name} {NO_HEIF}") from None
        raise UserError(
            f"{name} is not an image that can be read here; allowed are {', '.join(formats)}."
        ) from None
    except (
        OSError,
        ValueError,
        SyntaxError,
        KeyError,
        RuntimeError,
        pillow.DecompressionBombError,
    ) as error:
        raise UserError(f"{name} cannot be read as an image ({one_line(error)}).") from None


def _is_heif(file: io.BytesIO) -> bool:
    head = file.getvalue()[:12]
    return head[4:8] == b"ftyp" and head[8:] in HEIF_BRANDS


def _check_size(image: pillow.Image, name: str) -> None:
    if not image.width or not image.height:
        raise UserError(f"{name} has no size ({image.width} x {image.height}).")
    if image.width * image.height > PIXEL_LIMIT:
        raise UserError(
            f"{name} has {image.width:,} x {image.height:,} pixels, "
            f"more than the {PIXEL_LIMIT:,} allowed; make it smaller."
        )


def _rgb(image: pillow.Image, kind: str | None) -> pillow.Image:
    """Convert ``image``, read from a file of ``kind``, to 8 bits a channel.

    16 bits are divided by 257, whatever the values are.  The range of 32-bit integers is unknown:
    with a value above 255 they count as 16 bits, else as 8.  Floats count as 8 bits.
    """
    from PIL import Image as pillow

    if image.mode == "F":
        image = pillow.fromarray(np.clip(np.rint(np.asarray(image)), 0, 255).astype(np.uint8))
    elif image.mode.startswith("I"):
        values = np.asarray(image)
        # Pillow opens PPM with 16 bits as 32 bits; older versions do so with PNG.
        sixteen = image.mode != "I" or kind in ("PNG", "PPM") or values.max() > 255
        values = np.clip(values, 0, 65535 if sixteen else 255).astype(np.uint16)
        if sixteen:
            eighths = values // 257
            values -= eighths * 257
            values = eighths + (values > 128)
        image = pillow.fromarray(values.astype(np.uint8))
    return image.convert("RGB")
