"""Videos whose shades are known."""

from fractions import Fraction

import av
import numpy as np


def write_video(
    path,
    seconds,
    fps=10,
    size=(96, 64),
    codec="mpeg4",
    grey=lambda second: int(second * 2),
    **options,
):
    """Frames that are as grey as their second says, as many a second as ``fps`` says or at the
    times it lists.
    """
    times = fps if isinstance(fps, list) else None
    with av.open(str(path), "w", **options) as container:
        stream = container.add_stream(codec, rate=30 if times else fps)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.bit_rate = 4_000_000
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(len(times or range(round(seconds * fps)))):
            second = times[number] if times else number / fps
            shade = min(255, grey(second))
            frame = av.VideoFrame.from_ndarray(
                np.full((size[1], size[0], 3), shade, dtype=np.uint8), format="rgb24"
            )
            if times:
                frame.pts, frame.time_base = round(second * 1000), Fraction(1, 1000)
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path
