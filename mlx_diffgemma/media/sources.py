"""Where the bytes of images and videos come from: paths, data URLs and downloads, all bounded.

>>> content, name = read_source("chart.png", True, False, Allowance(100_000_000))
>>> name
'chart.png'
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import os
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import unquote

from mlx_diffgemma.errors import UserError
from mlx_diffgemma.files import expand_path, open_regular

T = TypeVar("T")
FILE_LIMIT = 400_000_000  # bytes of the images of one request: 100 million pixels, uncompressed
DOWNLOAD_LIMIT = 50_000_000  # bytes of one download
DOWNLOAD_SECONDS = 20  # seconds from the request to the last byte
TOGETHER_SECONDS = 60  # seconds of all downloads of one request
PIECE = 1 << 16  # bytes read at once


class Allowance:
    """The pixels, bytes and seconds that the images of one request may still take together."""

    def __init__(self, pixel_limit: int) -> None:
        self.pixel_limit = pixel_limit
        self.pixels = 0
        self.bytes = FILE_LIMIT
        self.deadline = time.monotonic() + TOGETHER_SECONDS

    def take_pixels(self, width: int, height: int) -> None:
        """Count an image.

        Raises:
            UserError: It has more pixels than are left.
        """
        self.pixels += width * height
        if self.pixels > self.pixel_limit:
            raise UserError(
                f"The images of the request have more than {self.pixel_limit:,} pixels together; "
                "make them smaller, or send fewer."
            )

    def take_bytes(self, count: int) -> None:
        """Count bytes that were read.

        Raises:
            UserError: They are more than are left.
        """
        self.bytes -= count
        if self.bytes < 0:
            raise UserError(
                f"The images of the request are larger than {FILE_LIMIT // 1_000_000} MB together; "
                "make them smaller, or send fewer."
            )


def read_source(
    source: str | Path | bytes | bytearray | memoryview,
    allow_files: bool,
    allow_urls: bool,
    allowance: Allowance,
) -> tuple[io.BytesIO, str]:
    """Read the bytes of an image file.

    Args:
        source: A path, the bytes themselves, a data URL or an http(s) URL.
        allow_files: Whether paths are opened.
        allow_urls: Whether http(s) URLs are fetched.
        allowance: What the request may still take.

    Returns:
        (the bytes, a name for them in messages)

    Raises:
        UserError: The source is of another kind, is not allowed, cannot be read or is too large.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        return io.BytesIO(source), "The image"
    if not isinstance(source, str | Path):
        raise UserError(
            "An image is a path, a data URL, the bytes of a file or an image of Pillow, "
            f"not {type(source).__name__}."
        )
    text = str(source)
    if is_data(text):
        return io.BytesIO(_decode_data_url(text)), "The image of the data URL"
    if text.lower().startswith(("http://", "https://")):
        if not allow_urls:
            raise UserError(
                "Remote images are not fetched here; send the image itself, as a data URL."
            )
        return _download(text, allowance), one_line(text)
    if not allow_files:
        raise UserError("Files are not read here; send the image itself, as a data URL.")
    with open_file(source, "image") as file:
        name = Path(text).name
        try:
            return _read_all(lambda: file.read(PIECE), name, FILE_LIMIT, allowance), name
        except OSError as error:
            raise UserError(f"{name} cannot be read ({error.strerror}).") from None


def open_file(path: str | Path, what: str) -> BinaryIO:
    """Open a file of the user.

    Args:
        path: Its path; ``~`` is expanded.
        what: What the file should be, for the message.

    Raises:
        UserError: There is no such file, or it is not a regular file.
    """
    file = expand_path(path)
    if "\0" not in str(file) and not os.path.lexists(file):
        raise UserError(f"There is no {what} {one_line(path)}.")
    try:
        return open_regular(file)
    except UserError as error:
        raise UserError(one_line(error)) from None


def is_data(url: str) -> bool:
    """Whether the URL contains the image itself."""
    return url[:5].lower() == "data:"


def one_line(text: object) -> str:
    """A path or another library's message as part of a sentence: one line, shortened."""
    return " ".join(str(text).split())[:200]


def _decode_data_url(url: str) -> bytes:
    """Decode the bytes in a data URL.

    Senders differ in blanks, line breaks, padding, percent-encoding and upper case; all are read.

    Raises:
        UserError: The URL is not in base64.
    """
    header, _, payload = url.partition(",")
    try:
        if not "".join(header.split()).lower().endswith(";base64"):
            raise ValueError
        payload = "".join(unquote(payload).split()).rstrip("=")
        return base64.b64decode(payload + "=" * (-len(payload) % 4), validate=True)
    except ValueError:
        raise UserError("The data URL is not of the form data:image/png;base64,…") from None


def _read_all(
    read_piece: Callable[[], bytes], name: str, limit: int, allowance: Allowance
) -> io.BytesIO:
    """Call ``read_piece`` until it returns nothing.

    Args:
        read_piece: Returns the next bytes.
        name: The name of the source in messages.
        limit: The most bytes to read; devices and servers may never end.
        allowance: What the request may still take.

    Raises:
        UserError: The source is larger than ``limit`` or than the allowance.
    """
    content = io.BytesIO()
    while piece := read_piece():
        content.write(piece)
        if content.tell() > limit:
            raise UserError(f"{name} is larger than {limit // 1_000_000} MB.")
        allowance.take_bytes(len(piece))
    content.seek(0)
    return content


def _download(url: str, allowance: Allowance) -> io.BytesIO:
    """Fetch ``url``.

    Raises:
        UserError: The download fails, or is too large or too slow.
    """
    left = allowance.deadline - time.monotonic()
    if left < DOWNLOAD_SECONDS:
        late = f"all images together take longer than {TOGETHER_SECONDS} seconds"
    else:
        late = f"it takes longer than {DOWNLOAD_SECONDS} seconds"
    watch = _Watch(min(DOWNLOAD_SECONDS, left))
    name = one_line(url)
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "mlx-diffgemma"})
        with watch, watch.opener.open(request, timeout=DOWNLOAD_SECONDS) as answer:
            # read1 returns what has arrived; read() would wait for the whole piece.
            return _read_all(
                lambda: watch.checked(answer.read1(PIECE)), name, DOWNLOAD_LIMIT, allowance
            )
    except UserError:
        raise
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        reason: object = error.reason if isinstance(error, urllib.error.URLError) else error
        if watch.is_over:
            reason = late
        raise UserError(f"{name} cannot be fetched ({one_line(reason)}).") from None


class _Watch:
    """Ends the connections of a download after some ``seconds``, whatever it is waiting for.

    A socket's own timeout starts again with each byte, even in a handshake and in headers.
    """

    def __init__(self, seconds: float) -> None:
        self.is_over = False
        self._sockets: list[socket.socket] = []
        self._lock = threading.Lock()
        self._timer = threading.Timer(max(seconds, 0), self._end)
        self._timer.daemon = True
        self.opener = urllib.request.build_opener(_WatchedHTTP(self), _WatchedHTTPS(self))

    def __enter__(self) -> _Watch:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        with self._lock:
            for connection in self._sockets:
                connection.close()
            self._sockets.clear()

    def connect(self, address: tuple[str, int], *options: Any) -> socket.socket:
        """Connect like ``socket.create_connection``, and watch the connection."""
        connection = socket.create_connection(address, *options)
        with self._lock:
            # A copy is kept, because TLS takes over the socket itself.
            self._sockets.append(connection.dup())
        return self.checked(connection)

    def checked(self, value: T) -> T:
        """Return ``value`` while there is time.

        Raises:
            TimeoutError: The time is over.
        """
        if self.is_over:
            raise TimeoutError
        return value

    def _end(self) -> None:
        self.is_over = True
        with self._lock:
            for connection in self._sockets:
                with contextlib.suppress(OSError):  # if it is already closed
                    connection.shutdown(socket.SHUT_RDWR)


class _WatchedHTTP(urllib.request.HTTPHandler):
    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self._watch = watch

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_watched(http.client.HTTPConnection, self._watch), req)


class _WatchedHTTPS(urllib.request.HTTPSHandler):
    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self._watch = watch

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_watched(http.client.HTTPSConnection, self._watch), req)


def _watched(kind: Callable[..., Any], watch: _Watch) -> Callable[..., Any]:
    """A function that makes connections of ``kind``, which end with the ``watch``."""

    def connect(*args: Any, **options: Any) -> Any:
        connection = kind(*args, **options)
        connection._create_connection = watch.connect
        return connection

    return connect
