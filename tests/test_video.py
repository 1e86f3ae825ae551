"""Videos: which frames are taken, and what is refused."""

import io
import struct
import warnings

import av
import numpy as np
import pytest
from PIL import Image as pillow

from mlx_diffgemma import chat_ids, load, stream_generate, user_message
from mlx_diffgemma.config import VisionConfig
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.video import MAX_FRAMES, Video, VideoWarning, prepare_video

CONFIG = VisionConfig.from_dict({"patch_size": 16, "pooling_kernel_size": 3})


def write_video(path, seconds, fps=10, size=(96, 64), codec="mpeg4", grey=lambda second: int(second * 2)):
    """Frames that are as grey as their second says."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.bit_rate = 4_000_000
        for number in range(round(seconds * fps)):
            shade = min(255, grey(number / fps))
            frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), shade, dtype=np.uint8), format="rgb24")
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def shades(film):
    return [float(frame.pixels.mean()) for frame in film.frames]


class TestSampling:
    def test_one_frame_a_second(self, tmp_path):
        path = write_video(tmp_path / "a.mp4", 12.4, grey=lambda second: 20 * int(second))
        film = prepare_video(Video(path), CONFIG, 70)
        assert film.seconds == tuple(range(13))
        np.testing.assert_allclose(shades(film), [20 * i for i in range(13)], atol=3)
        assert {frame.soft_tokens for frame in film.frames} == {60}

    @pytest.mark.parametrize(("fps", "times"), [(2.0, [0, 0.5, 1, 1.5]), (0.5, [0]), (10.0, [i / 10 for i in range(20)]),
                                                (100.0, [i / 10 for i in range(20)])])
    def test_another_rate(self, tmp_path, fps, times):
        path = write_video(tmp_path / "a.mp4", 2)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a video is not too long for a rate that it does not have
            assert prepare_video(Video(path, fps), CONFIG, 70).seconds == pytest.approx(times)

    def test_a_telephone_held_upright(self, tmp_path):
        """Frames that the file says are to be turned by a quarter, clockwise: what was above is on the right."""
        with av.open(str(tmp_path / "a.mp4"), "w") as container:
            stream = container.add_stream("mpeg4", rate=1)
            stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 96, 64, "yuv420p", 4_000_000
            shown = np.zeros((64, 96, 3), dtype=np.uint8)
            shown[:32] = 255
            for packet in (*stream.encode(av.VideoFrame.from_ndarray(shown, format="rgb24")), *stream.encode()):
                container.mux(packet)
        data = bytearray((tmp_path / "a.mp4").read_bytes())
        matrix = data.index(b"tkhd") + 4 + 40  # behind the header's first fields, nine numbers of 16.16 and 2.30 bits
        data[matrix : matrix + 36] = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 0, 0, 2**30)
        (frame,) = prepare_video(Video(bytes(data)), CONFIG, 70).frames
        height, width, _ = frame.pixels.shape
        assert height > width
        assert frame.pixels[:, : width // 2 - 8].mean() < 10
        assert frame.pixels[:, width // 2 + 8 :].mean() > 245

    def test_sixty_seconds_are_no_more_than_sixty_frames(self, tmp_path):
        path = write_video(tmp_path / "a.mp4", 60, fps=4)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            film = prepare_video(Video(path), CONFIG, 70)
        assert film.seconds == tuple(range(60))

    def test_a_longer_one_is_spread(self, tmp_path):
        path = write_video(tmp_path / "a.mp4", 90, fps=4)
        with pytest.warns(VideoWarning, match=r"a.mp4 lasts 90 s.* more than the 60 frames .*: 60 are taken, one every 1.5 s"):
            film = prepare_video(Video(path), CONFIG, 70)
        assert len(film.frames) == MAX_FRAMES
        assert film.seconds[:3] == pytest.approx((0, 1.5, 3))
        assert film.seconds[-1] == pytest.approx(88.5)
        np.testing.assert_allclose(shades(film), [int(2 * second) for second in film.seconds], atol=3)

    def test_bytes_are_a_video_too(self, tmp_path):
        path = write_video(tmp_path / "a.mp4", 3)
        a, b = prepare_video(Video(path), CONFIG, 70), prepare_video(Video(path.read_bytes()), CONFIG, 70)
        assert [frame.digest for frame in a.frames] == [frame.digest for frame in b.frames]

    def test_memory_is_that_of_the_resized_frames(self, tmp_path):
        path = write_video(tmp_path / "a.mp4", 5, fps=2, size=(1280, 720))
        film = prepare_video(Video(path), CONFIG, 70)
        assert sum(frame.pixels.nbytes for frame in film.frames) <= 5 * 70 * 48 * 48 * 3


class TestRefused:
    def test_no_file(self):
        with pytest.raises(UserError, match="There is no video missing.mp4"):
            prepare_video(Video("missing.mp4"), CONFIG, 70)

    @pytest.mark.parametrize("content", [b"", b"hello" * 100])
    def test_no_video(self, content):
        with pytest.raises(UserError, match="cannot be read as a video"):
            prepare_video(Video(content), CONFIG, 70)

    def test_cut_off(self, tmp_path):
        path = write_video(tmp_path / "a.mp4", 5)
        with pytest.raises(UserError, match=r"The video cannot be read as a video, or is damaged or cut off"):
            prepare_video(Video(path.read_bytes()[: path.stat().st_size // 2]), CONFIG, 70)

    def test_sound_alone(self, tmp_path):
        with av.open(str(tmp_path / "a.wav"), "w") as container:
            stream = container.add_stream("pcm_s16le", rate=8000)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), layout="mono")
            frame.sample_rate = 8000
            for packet in stream.encode(frame):
                container.mux(packet)
        with pytest.raises(UserError, match="a.wav holds no video"):
            prepare_video(Video(tmp_path / "a.wav"), CONFIG, 70)

    def test_an_unknown_codec(self, tmp_path):
        data = write_video(tmp_path / "a.avi", 1).read_bytes()
        assert b"FMP4" in data
        with pytest.raises(UserError, match="not supported|cannot be read as a video"):
            prepare_video(Video(data.replace(b"FMP4", b"XQZ7")), CONFIG, 70)

    @pytest.mark.parametrize("fps", [0, -1, float("nan"), 1000])
    def test_a_rate_that_is_none(self, fps):
        with pytest.raises(UserError, match="at most 120 frames a second"):
            prepare_video(Video(b"", fps), CONFIG, 70)

    def test_a_picture_is_a_video_of_one_frame(self, tmp_path):
        pillow.new("RGB", (60, 60), "red").save(tmp_path / "a.png")
        assert len(prepare_video(Video(tmp_path / "a.png"), CONFIG, 70).frames) == 1


def test_a_video_is_its_frames_behind_their_times(tmp_path):
    """The same answer as for its frames given as images, with the times in the text."""
    model, tokenizer = load("nano-vision")
    path = write_video(tmp_path / "a.mp4", 3, size=(128, 128))
    film = prepare_video(Video(path), model.config.vision, 70)
    text = "<|turn>user\n00:00 <|image|> 00:01 <|image|> 00:02 <|image|>What is shown at 00:01?<turn|>\n<|turn>model\n"
    apart = list(stream_generate(model, tokenizer, text, images=[pillow.open(io.BytesIO(png(f))) for f in film.frames], seed=0,
                                 max_tokens=64))
    prompt = chat_ids(tokenizer, [user_message("What is shown at 00:01?", 1)])
    whole = list(stream_generate(model, tokenizer, prompt, images=[Video(path)], seed=0, max_tokens=64))
    assert [r.tokens for r in whole] == [r.tokens for r in apart]
    assert whole[0].prompt_tokens == apart[0].prompt_tokens


def png(frame):
    file = io.BytesIO()
    pillow.fromarray(frame.pixels).save(file, "PNG")
    return file.getvalue()
