"""Videos as the model takes them: at most 60 frames, one a second, each an image behind its time.

The frames are read one after the other and resized at once, so that a video takes the memory of its resized frames.  Needs
PyAV (the extra ``vision``).

    >>> film = prepare_video(Video("clip.mp4"), config.vision, 70)
    >>> len(film.frames), film.seconds[:3]
    (12, (0.0, 1.0, 2.0))
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_diffgemma.config import VisionConfig
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.images import PIXEL_LIMIT, Image, open_image, prepare

if TYPE_CHECKING:
    from PIL import Image as pillow

MAX_FRAMES = 60  # Google's guide: up to 60 seconds at one frame a second
MISSING = "Videos need PyAV; install it with `pip install 'mlx-diffgemma[vision]'`."


class VideoWarning(UserWarning):
    """A video that is not read as densely as was asked for."""


@dataclass(frozen=True)
class Video:
    """A video file, by path or as its bytes, and how many frames a second are taken of it."""

    source: str | Path | bytes
    fps: float = 1.0

    @property
    def name(self) -> str:
        return "The video" if isinstance(self.source, bytes) else Path(self.source).name


@dataclass(frozen=True, eq=False)
class Clip:
    """A video whose frames are at hand, and the seconds at which they are shown."""

    frames: Sequence[pillow.Image]
    seconds: Sequence[float]


@dataclass(frozen=True, eq=False)
class Film:
    """A video ready for the tower: its frames and the seconds at which they are shown."""

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
    frames, seconds = list[Image](), list[float]()
    try:
        for second, frame in _sample(video, av):
            frames.append(prepare(frame, config, budget))
            seconds.append(second)
    except FileNotFoundError:
        raise UserError(f"There is no video {video.source!s}.") from None
    except (av.FFmpegError, av.codec.codec.UnknownCodecError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{video.name} cannot be read as a video, or is damaged or cut off ({reason}).") from None
    except OSError as error:
        raise UserError(f"{video.name} cannot be read ({error.strerror}).") from None
    if not frames:
        raise UserError(f"{video.name} holds no frames.")
    return Film(tuple(frames), tuple(seconds))


def _sample(video: Video, av: Any) -> Iterator[tuple[float, pillow.Image]]:
    """The frames at 0, 1 / fps, 2 / fps … seconds: of each moment the first that is shown from then on."""
    source = io.BytesIO(video.source) if isinstance(video.source, bytes) else str(Path(video.source).expanduser())
    with av.open(source) as container:
        if not container.streams.video:
            raise UserError(f"{video.name} holds no video.")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise UserError(f"{video.name} is of a codec that is not supported here.")
        width, height = stream.codec_context.width, stream.codec_context.height
        if width * height > PIXEL_LIMIT:
            raise UserError(f"{video.name} has {width:,} x {height:,} pixels, more than the {PIXEL_LIMIT:,} allowed.")
        duration = _duration(container, stream, av)
        every = max(1 / video.fps, float(1 / stream.average_rate) if stream.average_rate else 0.0)  # no more than there are
        if duration > MAX_FRAMES * every:
            every = duration / MAX_FRAMES
            warnings.warn(f"{video.name} lasts {duration:.0f} s, which at {video.fps:g} frame(s) a second are more than the "
                          f"{MAX_FRAMES} frames the model was made for: {MAX_FRAMES} are taken, one every {every:.1f} s.",
                          VideoWarning, stacklevel=2)
        taken, first = 0, None
        for frame in container.decode(stream):
            first = frame.time if first is None else first
            second = (frame.time or 0.0) - (first or 0.0)
            if second >= taken * every - 1e-3:
                yield second, frame.to_image().rotate(frame.rotation, expand=True) if frame.rotation else frame.to_image()
                taken += 1
                if taken == MAX_FRAMES:
                    return


def _duration(container: Any, stream: Any, av: Any) -> float:
    """Seconds from the first frame to the end."""
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    if container.duration is not None:
        return container.duration / av.time_base
    return 0.0
