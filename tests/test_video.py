"""Videos: which frames are taken, and what is refused."""

import io
import struct
import warnings
import weakref

import av
import numpy as np
import pytest
from PIL import Image as pillow

from mlx_diffgemma import VideoWarning, chat_ids, load, stream_generate, user_message
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.media import video as module
from mlx_diffgemma.media.video import MAX_FRAMES, Clip, Film, Video, prepare_video
from mlx_diffgemma.model.config import VisionConfig
from tests.helpers.files_over_http import serving
from tests.helpers.video import write_video

CONFIG = VisionConfig.from_dict({"patch_size": 16, "pooling_kernel_size": 3})


def sampled(video, config=CONFIG):
    """Of a video that may be read as densely as is asked for."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return prepare_video(video, config, 70)


def shades(film):
    return [float(frame.pixels.mean()) for frame in film.frames]


class TestSampling:
    def test_one_frame_a_second(self, tmp_path):
        path = write_video(tmp_path / "a.mp4", 12.4, grey=lambda second: 20 * int(second))
        film = prepare_video(Video(path), CONFIG, 70)
        assert film.seconds == tuple(range(13))
        np.testing.assert_allclose(shades(film), [20 * i for i in range(13)], atol=3)
        assert {frame.soft_tokens for frame in film.frames} == {60}

    @pytest.mark.parametrize(
        ("fps", "times"),
        [
            (2.0, [0, 0.5, 1, 1.5]),
            (0.5, [0]),
            (10.0, [i / 10 for i in range(20)]),
            (100.0, [i / 10 for i in range(20)]),
        ],
    )
    def test_another_rate(self, tmp_path, fps, times):
        path = write_video(tmp_path / "a.mp4", 2)
        with warnings.catch_warnings():
            warnings.simplefilter(
                "error"
            )  # a video is not too long for a rate that it does not have
            assert prepare_video(Video(path, fps), CONFIG, 70).seconds == pytest.approx(times)

    def test_a_telephone_held_upright(self, tmp_path):
        """Frames that the file says are to be turned by a quarter, clockwise: what was above is on
        the right.
        """
        with av.open(str(tmp_path / "a.mp4"), "w") as container:
            stream = container.add_stream("mpeg4", rate=1)
            stream.width, stream.height, stream.pix_fmt, stream.bit_rate = (
                96,
                64,
                "yuv420p",
                4_000_000,
            )
            shown = np.zeros((64, 96, 3), dtype=np.uint8)
            shown[:32] = 255
            for packet in (
                *stream.encode(av.VideoFrame.from_ndarray(shown, format="rgb24")),
                *stream.encode(),
            ):
                container.mux(packet)
        data = bytearray((tmp_path / "a.mp4").read_bytes())
        matrix = (
            data.index(b"tkhd") + 4 + 40
        )  # behind the header's first fields, nine numbers of 16.16 and 2.30 bits
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
        with pytest.warns(
            VideoWarning,
            match=r"a.mp4 lasts 90 s.* more than the 60 frames .*: 60 are taken, one every 1.5 s",
        ):
            film = prepare_video(Video(path), CONFIG, 70)
        assert len(film.frames) == MAX_FRAMES
        assert film.seconds[:3] == pytest.approx((0, 1.5, 3))
        assert film.seconds[-1] == pytest.approx(88.5)
        np.testing.assert_allclose(
            shades(film), [int(2 * second) for second in film.seconds], atol=3
        )

    def test_bytes_are_a_video_too(self, tmp_path):
        path = write_video(tmp_path / "a.mp4", 3)
        a, b = (
            prepare_video(Video(path), CONFIG, 70),
            prepare_video(Video(path.read_bytes()), CONFIG, 70),
        )
        assert [frame.digest for frame in a.frames] == [frame.digest for frame in b.frames]

    def test_decoded_frames_are_not_kept(self, tmp_path, monkeypatch):
        """Each is let go when it is resized: what a video takes is its resized frames."""
        seen, alive = [], []

        def spy(image, *arguments):
            alive.append(sum(frame() is not None for frame in seen))
            seen.append(weakref.ref(image))
            return prepare(image, *arguments)

        prepare = module.prepare
        monkeypatch.setattr(module, "prepare", spy)
        assert len(sampled(Video(write_video(tmp_path / "a.mp4", 12))).frames) == len(alive) == 12
        assert max(alive) <= 1

    def test_a_still_picture_and_then_thirty_frames_a_second(self, tmp_path):
        """The time a picture stands is not made good by reading what follows more densely."""
        path = write_video(
            tmp_path / "a.mp4", 60, [0, *(30 + i / 30 for i in range(900))], codec="libx264"
        )
        assert sampled(Video(path)).seconds == pytest.approx((0, *range(30, 60)), abs=0.04)

    @pytest.mark.parametrize(
        ("fps", "times"), [(1.0, [0, 1, 2, 30]), (2.0, [0, 0.5, 1, 1.5, 2, 30]), (0.5, [0, 2, 30])]
    )
    def test_few_frames_at_first_and_none_for_long(self, tmp_path, fps, times):
        """Frames that come more often than the average says."""
        path = write_video(tmp_path / "a.mp4", 30, [0, 0.5, 1, 1.5, 2, 30])
        assert sampled(Video(path, fps)).seconds == pytest.approx(times, abs=0.02)

    @pytest.mark.parametrize(
        ("name", "codec", "options"),
        [
            ("a.mkv", "mpeg4", {"options": {"live": "1"}}),
            ("a.m4v", "mpeg4", {"format": "m4v"}),
            ("a.h264", "libx264", {}),
        ],
        ids=lambda value: str(value)[:6],
    )
    class TestUnknownDuration:
        def test_all_of_it_is_read(self, tmp_path, name, codec, options):
            path = write_video(
                tmp_path / name, 40, 5, codec=codec, grey=lambda second: 6 * int(second), **options
            )
            film = sampled(Video(path))
            assert film.seconds == pytest.approx(range(40), abs=0.01)
            np.testing.assert_allclose(shades(film), [6 * i for i in range(40)], atol=4)

        @pytest.mark.parametrize(("seconds", "count", "step"), [(61, 31, 2), (130, 33, 4)])
        def test_a_longer_one_is_spread(self, tmp_path, name, codec, options, seconds, count, step):
            path = write_video(tmp_path / name, seconds, 5, codec=codec, grey=int, **options)
            with pytest.warns(
                VideoWarning, match=f"lasts {seconds} s.*: {count} are taken, one every {step}.0 s"
            ):
                film = prepare_video(Video(path), CONFIG, 70)
            assert film.seconds == pytest.approx([step * i for i in range(count)], abs=0.01)
            np.testing.assert_allclose(shades(film), [step * i for i in range(count)], atol=4)

    def test_a_duration_that_is_too_short(self, tmp_path):
        """As files say whose frames have no lengths: what is behind it is read too."""
        path = write_video(tmp_path / "a.mp4", 200, [*range(100), 200], codec="libx264")
        with av.open(str(path)) as container:
            assert container.duration < 150 * av.time_base
        with pytest.warns(VideoWarning, match="lasts 200 s"):
            film = prepare_video(Video(path), CONFIG, 70)
        assert film.seconds[-1] == pytest.approx(200)
        assert 30 < len(film.frames) <= MAX_FRAMES

    def test_a_duration_that_lacks_its_last_frame(self, tmp_path, monkeypatch):
        """One frame too many is left out, rather than every second."""
        path = write_video(tmp_path / "a.mp4", 101, 1)
        monkeypatch.setattr(module, "_duration", lambda *_: 100.0)
        with pytest.warns(VideoWarning, match="60 are taken"):
            film = prepare_video(Video(path), CONFIG, 70)
        assert len(film.frames) == MAX_FRAMES

    def test_a_title_of_another_encoding(self, tmp_path):
        data = write_video(tmp_path / "a.mkv", 1).read_bytes()
        assert sampled(Video(data.replace(b"Lavf", b"\xfcavf"))).seconds == (0.0,)

    def test_a_clip_is_taken_whole(self):
        film = prepare_video(Clip([pillow.new("RGB", (60, 60))] * 2, [0.0, 0.1]), CONFIG, 70)
        assert isinstance(film, Film)
        assert film.seconds == (0.0, 0.1)


class TestRefused:
    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ("missing.mp4", "There is no video missing.mp4"),
            (".", r"\. is a folder; give a regular file"),
            ("a\0b.mp4", r"'a\\x00b.mp4' is not the path of a file"),
            ("~nosuchuser/a.mp4", "is not the path of a file"),
            ("https://example.org/a.mp4", "URLs of videos are not fetched here; give the path"),
            ("rtsp://127.0.0.1/a", "URLs of videos"),
            ("data:video/mp4;base64,AAAA", "URLs of videos"),
            (np.zeros((2, 2)), "the path of a file or its bytes, not ndarray"),
            ("/dev/zero", "/dev/zero is a device"),
        ],
        ids=str,
    )
    def test_no_file(self, source, message, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UserError, match=message) as raised:
            prepare_video(Video(source), CONFIG, 70)
        assert "\n" not in str(raised.value)

    def test_nothing_is_fetched(self, tmp_path, monkeypatch):
        """Nor is a file read that another one names."""
        asked = []
        monkeypatch.setattr(
            "tests.helpers.files_over_http.Handler.do_GET", lambda self: asked.append(self.path)
        )
        monkeypatch.chdir(tmp_path)
        write_video(tmp_path / "a.mp4", 1)
        with serving() as url:
            playlists = [
                b"ffconcat version 1.0\nfile a.mp4\n",
                f"ffconcat version 1.0\nfile {url}/a.mp4\n".encode(),
                f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{url}/a.ts\n#EXT-X-ENDLIST\n".encode(),
            ]
            for number, playlist in enumerate(playlists):
                path = tmp_path / f"{number}.m3u8"
                path.write_bytes(playlist)
                for source in (playlist, path, str(path)):
                    with pytest.raises(UserError, match="cannot be read as a video"):
                        prepare_video(Video(source), CONFIG, 70)
            with pytest.raises(UserError, match="URLs of videos are not fetched"):
                prepare_video(Video(f"{url}/v.mp4"), CONFIG, 70)
        assert not asked

    @pytest.mark.parametrize("content", [b"", b"hello" * 100])
    def test_no_video(self, content):
        with pytest.raises(UserError, match="cannot be read as a video"):
            prepare_video(Video(content), CONFIG, 70)

    def test_cut_off(self, tmp_path):
        path = write_video(tmp_path / "a.mp4", 5)
        with pytest.raises(
            UserError, match=r"The video cannot be read as a video, or is damaged or cut off"
        ):
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
    apart = list(
        stream_generate(
            model,
            tokenizer,
            text,
            images=[pillow.open(io.BytesIO(png(f))) for f in film.frames],
            seed=0,
            max_tokens=64,
        )
    )
    prompt = chat_ids(tokenizer, [user_message("What is shown at 00:01?", 1)])
    whole = list(
        stream_generate(model, tokenizer, prompt, images=[Video(path)], seed=0, max_tokens=64)
    )
    assert [r.tokens for r in whole] == [r.tokens for r in apart]
    assert whole[0].prompt_tokens == apart[0].prompt_tokens


def png(frame):
    file = io.BytesIO()
    pillow.fromarray(frame.pixels).save(file, "PNG")
    return file.getvalue()
