"""Images as the model takes them: opened safely, resized to a budget of soft tokens, cut into patches.

Pixel values and positions are those of the reference's processor (Gemma4ImageProcessorPil), whose padding is left out: the
tower takes one image at a time.  What differs on purpose is how a file is opened: rotated as its EXIF says, and 16 bits a
channel divided by 257 in place of clipped to 8.  As in the reference, transparency is dropped, not painted over.

Needs Pillow (the extra ``vision``).

    >>> image = prepare(open_image("chart.png"), config.vision, 280)
    >>> image.soft_tokens
    266
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import math
import os
import struct
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeAlias

import numpy as np

from mlx_diffgemma.config import VisionConfig
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.files import expand_path, open_regular
from mlx_diffgemma.vision import Grid, patch_positions

if TYPE_CHECKING:
    from PIL import Image as pillow

BUDGETS = (70, 140, 280, 560, 1120)  # soft tokens an image may take
# What photographs and screens are stored as; HEIF where a plugin of Pillow reads it.  Not EPS, which Pillow hands to Ghostscript.
FORMATS = ("PNG", "JPEG", "JPEG2000", "WEBP", "AVIF", "HEIF", "GIF", "BMP", "TIFF", "PPM", "ICO")
PIXEL_LIMIT = 100_000_000  # of a file: what it unpacks to takes three bytes each
FILE_LIMIT = 4 * PIXEL_LIMIT  # bytes: as many pixels uncompressed, with transparency
DOWNLOAD_LIMIT = 50_000_000  # bytes
DOWNLOAD_SECONDS = 20  # from the request to the last byte
PIECE = 1 << 16  # bytes read at once
MISSING = "Images need Pillow; install it with `pip install 'mlx-diffgemma[vision]'`."
ImageSource: TypeAlias = "str | Path | bytes | bytearray | memoryview | pillow.Image"


@dataclass(frozen=True, eq=False)
class Image:
    """An image ready for the tower: ``pixels`` [rows * patch, columns * patch, 3] uint8.

    ``side`` is the tower's ``pooling_kernel_size``: a soft token is the mean of ``side`` x ``side`` patches.
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
    if not rows:  # the width is more than ``budget`` heights
        rows, columns = 1, budget
    elif not columns:
        rows, columns = budget, 1
    return rows * unit, columns * unit


def check_budget(budget: int) -> int:
    """Errors: UserError for a number of soft tokens the model was not made for."""
    if budget not in BUDGETS:
        raise UserError(f"image_tokens must be {', '.join(map(str, BUDGETS[:-1]))} or {BUDGETS[-1]}, got {budget}.")
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

    Paths and remote URLs only where they are allowed; of files only ``FORMATS``.  Errors: UserError for what is no image,
    damaged, of no size or too large.
    """
    try:
        from PIL import Image as pillow
        from PIL import ImageOps
    except ImportError:
        raise UserError(MISSING) from None
    # What decoders raise for damaged files; a file in a file, as in ICNS, is looked at by load() alone.
    damaged = (OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, RuntimeError, struct.error,
               pillow.DecompressionBombError)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of what Pillow found odd and read nevertheless
        warnings.simplefilter("ignore", pillow.DecompressionBombWarning)  # the limit below is ours
        if isinstance(source, pillow.Image):
            opened, name = source, "The image"
        else:
            file, name = _content(source, allow_files, allow_urls)
            opened = _identify(file, name)
        _check_size(opened, name)
        kind = opened.format
        try:
            opened.load()
            _check_size(opened, name)
            return _rgb(ImageOps.exif_transpose(opened), kind)
        except UserError:
            raise
        except damaged as error:
            raise UserError(f"{name} is damaged or cut off ({_line(error)}).") from None


def open_file(path: str | Path, what: str) -> BinaryIO:
    """A file of the user's, for ``what`` it should be.  Errors: UserError where there is none."""
    file = expand_path(path)
    if "\0" not in str(file) and not os.path.lexists(file):
        raise UserError(f"There is no {what} {_line(path)}.")
    try:
        return open_regular(file)
    except UserError as error:
        raise UserError(_line(error)) from None


def _identify(file: io.BytesIO, name: str) -> pillow.Image:
    """The image of a file, of which the header is read."""
    from PIL import Image as pillow
    from PIL import UnidentifiedImageError

    pillow.init()
    formats = [kind for kind in FORMATS if kind in pillow.OPEN]
    try:
        return pillow.open(file, formats=formats)
    except UnidentifiedImageError:
        raise UserError(f"{name} is not an image that can be read here; allowed are {', '.join(formats)}.") from None
    except (OSError, ValueError, SyntaxError, KeyError, RuntimeError, pillow.DecompressionBombError) as error:
        raise UserError(f"{name} cannot be read as an image ({_line(error)}).") from None


def _check_size(image: pillow.Image, name: str) -> None:
    if not image.width or not image.height:
        raise UserError(f"{name} has no size ({image.width} x {image.height}).")
    if image.width * image.height > PIXEL_LIMIT:
        raise UserError(f"{name} has {image.width:,} x {image.height:,} pixels, more than the {PIXEL_LIMIT:,} allowed; make it "
                        "smaller.")


def _rgb(image: pillow.Image, kind: str | None) -> pillow.Image:
    """``image``, read from a file of ``kind``, with 8 bits a channel.

    16 bits are divided by 257, whatever the values are.  32-bit integers say nothing of their range: above 255 they count as
    16 bits, else as 8.  Floats count as 8 bits.
    """
    from PIL import Image as pillow

    if image.mode == "F":
        image = pillow.fromarray(np.clip(np.rint(np.asarray(image)), 0, 255).astype(np.uint8))
    elif image.mode.startswith("I"):
        values = np.asarray(image)
        # Pillow opens 16 bits of PPM, and in older versions of PNG, as 32.
        sixteen = image.mode != "I" or kind in ("PNG", "PPM") or values.max() > 255
        values = np.clip(values, 0, 65535 if sixteen else 255).astype(np.uint16)
        if sixteen:
            eighths = values // 257
            values -= eighths * 257
            values = eighths + (values > 128)
        image = pillow.fromarray(values.astype(np.uint8))
    return image.convert("RGB")


def _content(source: str | Path | bytes | bytearray | memoryview, allow_files: bool, allow_urls: bool) -> tuple[io.BytesIO, str]:
    """(bytes, what to call them) of everything but an opened image."""
    if isinstance(source, bytes | bytearray | memoryview):
        return io.BytesIO(source), "The image"
    if not isinstance(source, str | Path):
        raise UserError(f"An image is a path, a data URL, the bytes of a file or an image of Pillow, not {type(source).__name__}.")
    text = str(source)
    if text.startswith("data:"):
        header, _, payload = text.partition(",")
        try:
            if not header.endswith(";base64"):
                raise ValueError
            return io.BytesIO(base64.b64decode(payload, validate=True)), "The image of the data URL"
        except ValueError:
            raise UserError("The data URL is not of the form data:image/png;base64,…") from None
    if text.lower().startswith(("http://", "https://")):
        if not allow_urls:
            raise UserError("Remote images are not fetched here; send the image itself, as a data URL.")
        return _download(text), _line(text)
    if not allow_files:
        raise UserError("Files are not read here; send the image itself, as a data URL.")
    with open_file(source, "image") as file:
        name = Path(text).name
        try:
            return _read(lambda: file.read(PIECE), name, FILE_LIMIT), name
        except OSError as error:
            raise UserError(f"{name} cannot be read ({error.strerror}).") from None


def _read(piece: Callable[[], bytes], name: str, limit: int) -> io.BytesIO:
    """What ``piece`` gives until it is empty.  Errors: UserError above ``limit`` bytes, which devices and servers never end."""
    content = io.BytesIO()
    while found := piece():
        content.write(found)
        if content.tell() > limit:
            raise UserError(f"{name} is larger than {limit // 1_000_000} MB.")
    content.seek(0)
    return content


def _download(url: str) -> io.BytesIO:
    deadline = time.monotonic() + DOWNLOAD_SECONDS

    def piece() -> bytes:
        if time.monotonic() > deadline:
            raise TimeoutError(f"it takes longer than {DOWNLOAD_SECONDS} seconds")
        found: bytes = answer.read1(PIECE)  # what is there, as read() waits for the whole of a piece
        return found

    try:
        request = urllib.request.Request(url, headers={"User-Agent": "mlx-diffgemma"})
        with urllib.request.urlopen(request, timeout=DOWNLOAD_SECONDS) as answer:
            return _read(piece, _line(url), DOWNLOAD_LIMIT)
    except UserError:
        raise
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        raise UserError(f"{_line(url)} cannot be fetched ({_line(getattr(error, 'reason', error))}).") from None


def _line(text: object) -> str:
    """A path or what someone else's code says, as a part of a sentence."""
    return " ".join(str(text).split())[:200]
