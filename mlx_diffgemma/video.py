"""Videos as the model takes them: at most 60 frames, one a second, each an image behind its time.

A ``Video`` is a file that nobody has opened yet, a ``Clip`` has its frames decoded, and the ``Film`` made of either is ready
for the tower.  The frames are read one after the other and resized at once, so that a video takes the memory of its resized
frames.  FFmpeg gets the bytes of the one file and no address, and is kept from what a file may point to.  Needs PyAV (the extra
``vision``).

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

from mlx_diffgemma.config import VisionConfig
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.images import PIXEL_LIMIT, Image, open_file, open_image, prepare

if TYPE_CHECKING:
    from PIL import Image as pillow

MAX_FRAMES = 60  # Google's guide: up to 60 seconds at one frame a second
SLACK = 1e-3  # seconds by which files round the times of frames
USUAL_RATE = 25  # frames a second, where a file without times does not say
MISSING = "Videos need PyAV; install it with `pip install 'mlx-diffgemma[vision]'`."


class VideoWarning(UserWarning):
    """A video that is not read as densely as was asked for."""


@dataclass(frozen=True)
class Video:
    """A video file, by path or as its bytes, and how many frames a second are taken of it.  Nothing is read yet."""

    source: str | Path | bytes | bytearray | memoryview
    fps: float = 1.0

    @property
    def name(self) -> str:
        return Path(self.source).name if isinstance(self.source, str | Path) else "The video"


@dataclass(frozen=True, eq=False)
class Clip:
    """A video whose frames are decoded already, as images of Pillow of any size, and the seconds at which they are shown."""

    frames: Sequence[pillow.Image]
    seconds: Sequence[float]


@dataclass(frozen=True, eq=False)
class Film:
    """A video prepared for the tower, as ``images.Image`` is an image: its frames, resized, and the seconds at which they are
    shown."""

    frames: tuple[Image, ...]
    seconds: tuple[float, ...]


def prepare_video(video: Video | Clip, config: VisionConfig, budget: int) -> Film:
    """``video.fps`` frames a second, each resized to ``budget`` soft tokens; at most 60 frames, a longer video's spread evenly.
    Of a clip all its frames.

    Errors: UserError for what is no video, cut off, or of a codec that is not there.  Warns: VideoWarning for a longer one.
    """
    if isinstance(video, Clip):
        if not video.frames or len(video.frames) != len(video.seconds):
            raise UserError(f"A clip has a time for each frame: got {len(video.frames)} frames and {len(video.seconds)} times.")
        return Film(tuple(prepare(open_image(frame), config, budget) for frame in video.frames), tuple(video.seconds))
    if not 0 < video.fps <= 120:
        raise UserError(f"A video is read at more than 0 and at most 120 frames a second, not {video.fps:g}.")
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
        raise UserError(f"{video.name} cannot be read as a video, or is damaged or cut off ({reason}).") from None
    except OSError as error:
        raise UserError(f"{video.name} cannot be read ({error.strerror}).") from None
    if not taken:
        raise UserError(f"{video.name} holds no frames.")
    return Film(tuple(image for _, image in taken), tuple(second for second, _ in taken))


def _open(video: Video) -> BinaryIO:
    if isinstance(video.source, bytes | bytearray | memoryview):
        return io.BytesIO(video.source)
    if not isinstance(video.source, str | Path):
        raise UserError(f"A video is the path of a file or its bytes, not {type(video.source).__name__}.")
    if isinstance(video.source, str) and re.match("(?!file:)(data:|.*://)", video.source, re.IGNORECASE):
        raise UserError("URLs of videos are not fetched here; give the path of a file, or its bytes.")
    return open_file(video.source, "video")


def _sample(video: Video, file: BinaryIO, config: VisionConfig, budget: int, av: Any) -> list[tuple[float, Image]]:
    """The first frame of each step of 1 / fps seconds in which one begins, with its second.

    A video known to have more than 60 is read in longer steps.  One that turns out to, as not every file says how long it is or
    says it right, has its steps doubled while it is read.
    """
    # A playlist, or a film in several files, would have FFmpeg open what it names.
    with av.open(file, options={"protocol_whitelist": "none"}, metadata_errors="replace") as container:
        if not container.streams.video:
            raise UserError(f"{video.name} holds no video.")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise UserError(f"{video.name} is of a codec that is not supported here.")
        width, height = stream.codec_context.width, stream.codec_context.height
        if width * height > PIXEL_LIMIT:
            raise UserError(f"{video.name} has {width:,} x {height:,} pixels, more than the {PIXEL_LIMIT:,} allowed.")
        duration, step = _duration(container, stream, av), 1 / video.fps
        if duration * min(video.fps, stream.average_rate or video.fps) > MAX_FRAMES:  # no more than there are
            step = duration / MAX_FRAMES
        taken, due, second = list[tuple[float, Image]](), 0.0, 0.0
        asked, due_as_asked = 0, 0.0
        for second, frame in _frames(container, stream):
            if second >= due_as_asked - SLACK:
                asked, due_as_asked = asked + 1, _next_step(second, 1 / video.fps)
            past_the_end = len(taken) == MAX_FRAMES and duration - SLACK <= second < duration + step  # of a rounded duration
            if second < due - SLACK or past_the_end:
                continue
            shown = frame.to_image()
            taken.append((second, prepare(shown.rotate(frame.rotation, expand=True) if frame.rotation else shown, config, budget)))
            while len(taken) > MAX_FRAMES:
                step *= 2
                taken = _thinned(taken, step)
            due = _next_step(second, step)
    if asked > MAX_FRAMES:
        warnings.warn(f"{video.name} lasts {max(duration, second):.0f} s, which at {video.fps:g} frame(s) a second are more than "
                      f"the {MAX_FRAMES} frames the model was made for: {len(taken)} are taken, one every {step:.1f} s.",
                      VideoWarning, stacklevel=3)
    return taken


def _frames(container: Any, stream: Any) -> Iterator[tuple[float, Any]]:
    """Each frame and how many seconds behind the first it is shown; where a file keeps no times, by its number."""
    usual, first, second = 1 / float(stream.guessed_rate or stream.average_rate or USUAL_RATE), None, 0.0
    for number, frame in enumerate(container.decode(stream)):
        if frame.time is None:
            second = second + usual if number else 0.0
        else:
            first = frame.time if first is None else first
            second = frame.time - first
        yield second, frame


def _next_step(second: float, step: float) -> float:
    """When the step after that of ``second`` begins."""
    return (math.floor((second + SLACK) / step) + 1) * step


def _thinned(taken: Sequence[tuple[float, Image]], step: float) -> list[tuple[float, Image]]:
    """What is left of the frames in longer steps: as if they had been read so."""
    left, due = list[tuple[float, Image]](), 0.0
    for second, image in taken:
        if second >= due - SLACK:
            left.append((second, image))
            due = _next_step(second, step)
    return left


def _duration(container: Any, stream: Any, av: Any) -> float:
    """Seconds from the first frame to the end, 0 where the file does not say."""
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    if container.duration is not None:
        return container.duration / av.time_base
    return 0.0
