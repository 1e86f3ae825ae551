"""Prepares videos for the model: at most 60 frames, one a second, each an image after its time.

A ``Video`` is a file that is not open yet, a ``Clip`` has its frames decoded, and the ``Film`` made
of either is ready for the tower.  Each frame is resized as soon as it is read, so a video takes the
memory of its resized frames.  FFmpeg gets the bytes of the one file and no address, and may not
open what the file points to.  Needs PyAV (the extra ``vision``).

    >>> film = prepare_video(Video("clip.mp4"), config.vision, 70)
    >>> len(film.frames), film.seconds[:3]
    (12, (0.0, 1.0, 2.0))
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from mlx_diffgemma.errors import UserError, VideoWarning
from mlx_diffgemma.media.images import PIXEL_LIMIT, Image, open_image, prepare
from mlx_diffgemma.media.sources import open_file
from mlx_diffgemma.model.config import VisionConfig

if TYPE_CHECKING:
    from PIL import Image as pillow

MAX_FRAMES = 60  # Google's guide: up to 60 seconds at one frame a second
SLACK = 1e-3  # the most seconds by which files round the times of frames
USUAL_RATE = 25  # frames a second of a file that has neither times nor a rate
MISSING = "Videos need PyAV; install it with `pip install 'mlx-diffgemma[vision]'`."


@dataclass(frozen=True)
class Video:
    """A video file, by path or as its bytes, and how many frames a second to read.  Nothing is read
    yet.
    """

    source: str | Path | bytes | bytearray | memoryview
    fps: float = 1.0

    @property
    def name(self) -> str:
        return Path(self.source).name if isinstance(self.source, str | Path) else "The video"


@dataclass(frozen=True, eq=False)
class Clip:
    """A video with decoded frames: Pillow images of any size, and the seconds at which they are
    shown.
    """

    frames: Sequence[pillow.Image]
    seconds: Sequence[float]


@dataclass(frozen=True, eq=False)
class Film:
    """A video that is ready for the tower: its resized frames, and the seconds at which they are
    shown.

    A frame is an ``images.Image``.
    """

    frames: tuple[Image, ...]
    seconds: tuple[float, ...]


def prepare_video(video: Video | Clip, config: VisionConfig, budget: int) -> Film:
    """Read the frames of a video and resize them.

    A ``Video`` gives ``video.fps`` frames a second, spread evenly where that would be more than 60;
    a ``Clip`` gives all its frames.

    Args:
        video: The video.
        config: The vision tower.
        budget: The most soft tokens a frame may take.

    Raises:
        UserError: The file is not a video, is cut off, or its codec is not available.

    Warns:
        VideoWarning: The video is longer than 60 frames.
    """
    if isinstance(video, Clip):
        if not video.frames or len(video.frames) != len(video.seconds):
            raise UserError(
                f"A clip has a time for each frame: got {len(video.frames)} frames and {len(video.seconds)} times."
            )
        return Film(
            tuple(prepare(open_image(frame), config, budget) for frame in video.frames),
            tuple(video.seconds),
        )
    if not 0 < video.fps <= 120:
        raise UserError(
            f"A video is read at more than 0 and at most 120 frames a second, not {video.fps:g}."
        )
    try:
        import av
    except ImportError:
        raise UserError(MISSING) from None
    try:
        with _open(video) as file:
            taken = _sample(video, file, config, budget, av)
    except UserError:
        raise
    except (av.FFmpegError, av.codec.codec.UnknownCodecError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{video.name} cannot be read as a video, or is damaged or cut off ({reason})."
        ) from None
    except OSError as error:
        raise UserError(f"{video.name} cannot be read ({error.strerror}).") from None
    if not taken:
        raise UserError(f"{video.name} holds no frames.")
    return Film(tuple(image for _, image in taken), tuple(second for second, _ in taken))


def _open(video: Video) -> BinaryIO:
    if isinstance(video.source, bytes | bytearray | memoryview):
        return io.BytesIO(video.source)
    if not isinstance(video.source, str | Path):
        raise UserError(
            f"A video is the path of a file or its bytes, not {type(video.source).__name__}."
        )
    if isinstance(video.source, str) and re.match(
        "(?!file:)(data:|.*://)", video.source, re.IGNORECASE
    ):
        raise UserError(
            "URLs of videos are not fetched here; give the path of a file, or its bytes."
        )
    return open_file(video.source, "video")


def _sample(
    video: Video, file: BinaryIO, config: VisionConfig, budget: int, av: Any
) -> list[tuple[float, Image]]:
    """The first frame that begins in each step of 1 / fps seconds.

    A video known to have more than 60 frames is read in longer steps.  Files may state no duration
    or a wrong one: where more than 60 frames turn up, the steps are doubled while reading.

    Args:
        video: The video.
        file: Its open file.
        config: The vision tower.
        budget: The most soft tokens a frame may take.
        av: The module PyAV.

    Returns:
        (second, image) of each frame.
    """
    # FFmpeg would open the files that a playlist, or a film in several files, names.
    with av.open(
        file, options={"protocol_whitelist": "none"}, metadata_errors="replace"
    ) as container:
        stream = _video_stream(video, container)
        duration = _duration(container, stream, av)
        step = 1 / video.fps
        frame_rate = min(video.fps, stream.average_rate or video.fps)  # no more than there are
        if duration * frame_rate > MAX_FRAMES:
            step = duration / MAX_FRAMES
        taken: list[tuple[float, Image]] = []
        due = 0.0
        second = 0.0
        asked = 0  # frames at the requested rate
        due_as_asked = 0.0
        for second, frame in _frames(container, stream):
            if second >= due_as_asked - SLACK:
                asked += 1
                due_as_asked = _next_step(second, 1 / video.fps)
            is_full = len(taken) == MAX_FRAMES
            is_past_the_end = is_full and duration - SLACK <= second < duration + step  # rounded
            if second < due - SLACK or is_past_the_end:
                continue
            picture = frame.to_image()
            if frame.rotation:
                picture = picture.rotate(frame.rotation, expand=True)
            taken.append((second, prepare(picture, config, budget)))
            while len(taken) > MAX_FRAMES:
                step *= 2
                taken = _thinned(taken, step)
            due = _next_step(second, step)
    if asked > MAX_FRAMES:
        warnings.warn(
            f"{video.name} lasts {max(duration, second):.0f} s, which at {video.fps:g} frame(s) a "
            f"second are more than the {MAX_FRAMES} frames the model was made for: {len(taken)} are "
            f"taken, one every {step:.1f} s.",
            VideoWarning,
            stacklevel=3,
        )
    return taken


def _video_stream(video: Video, container: Any) -> Any:
    """Find the stream of pictures.

    Raises:
        UserError: There is no stream that can be read.
    """
    if not container.streams.video:
        raise UserError(f"{video.name} holds no video.")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise UserError(f"{video.name} is of a codec that is not supported here.")
    width = stream.codec_context.width
    height = stream.codec_context.height
    if width * height > PIXEL_LIMIT:
        raise UserError(
            f"{video.name} has {width:,} x {height:,} pixels, "
            f"more than the {PIXEL_LIMIT:,} allowed."
        )
    return stream


def _frames(container: Any, stream: Any) -> Iterator[tuple[float, Any]]:
    """Decode the frames; without times, a frame's number gives its second.

    Yields:
        (seconds since the first frame, frame)
    """
    usual = 1 / float(stream.guessed_rate or stream.average_rate or USUAL_RATE)
    first = None
    second = 0.0
    for number, frame in enumerate(container.decode(stream)):
        if frame.time is None:
            second = second + usual if number else 0.0
        else:
            first = frame.time if first is None else first
            second = frame.time - first
        yield second, frame


def _next_step(second: float, step: float) -> float:
    """The start of the step after the one that contains ``second``."""
    return (math.floor((second + SLACK) / step) + 1) * step


def _thinned(taken: Sequence[tuple[float, Image]], step: float) -> list[tuple[float, Image]]:
    """The frames that would have been read in steps of ``step`` seconds."""
    left: list[tuple[float, Image]] = []
    due = 0.0
    for second, image in taken:
        if second >= due - SLACK:
            left.append((second, image))
            due = _next_step(second, step)
    return left


def _duration(container: Any, stream: Any, av: Any) -> float:
    """The seconds from the first frame to the end; 0 if the file does not say.

    Args:
        container: The open file.
        stream: Its stream of pictures.
        av: The module PyAV.
    """
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    if container.duration is not None:
        return container.duration / av.time_base
    return 0.0
