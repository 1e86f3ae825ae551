"""Images: what opening a file means, sizes, and what is refused."""

import base64
import io
import json
import socket
import struct
import sys
import threading
import time
import tracemalloc
import zlib
from contextlib import contextmanager

import numpy as np
import pillow_heif
import pytest
from PIL import Image as pillow
from PIL import features

from mlx_diffgemma.errors import UserError
from mlx_diffgemma.media import images as module
from mlx_diffgemma.media import sources
from mlx_diffgemma.media.images import BUDGETS, fitting_size, open_image, open_images, prepare
from mlx_diffgemma.model.config import VisionConfig
from tests.helpers.files_over_http import content, serving, stripes

CONFIG = VisionConfig.from_dict({"patch_size": 16, "pooling_kernel_size": 3})


class TestOpening:
    def test_all_kinds_of_sources_are_one_image(self, tmp_path):
        image = stripes()
        data = content(image)
        (tmp_path / "a.png").write_bytes(data)
        url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
        for source in (
            image,
            data,
            bytearray(data),
            memoryview(data),
            tmp_path / "a.png",
            str(tmp_path / "a.png"),
            url,
        ):
            assert open_image(source).tobytes() == image.tobytes()

    def test_exif_rotation_is_carried_out(self):
        exif = pillow.Exif()
        exif[0x0112] = (
            6  # turned by 90 degrees: shown upright it is 20 wide and 40 high, red on top
        )
        opened = open_image(content(stripes(), "PNG", exif=exif))
        assert opened.size == (20, 40)
        assert opened.getpixel((10, 3)) == (255, 0, 0)
        assert opened.getpixel((10, 36)) == (0, 0, 255)

    def test_sixteen_bits_are_scaled(self):
        ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0)
        opened = np.asarray(open_image(content(pillow.fromarray(ramp))))
        np.testing.assert_array_equal(opened[0, :, 0], np.arange(256))

    @pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
    def test_sixteen_bits_are_scaled_whatever_they_hold(self, kind):
        """A dark image is dark, and does not get bright when its brightest pixel goes."""
        dark = np.full((4, 4), 200, dtype=np.uint16)
        assert open_image(content(pillow.fromarray(dark), kind)).getpixel((0, 0)) == (1, 1, 1)
        dark[0, 0] = 60_000
        assert open_image(content(pillow.fromarray(dark), kind)).getpixel((3, 3)) == (1, 1, 1)

    def test_every_value_of_sixteen_bits_is_rounded(self):
        values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
        right = np.rint(values / 257)
        for image in (pillow.fromarray(values), pillow.fromarray(values.astype(np.int32))):
            np.testing.assert_array_equal(np.asarray(open_image(image))[:, :, 0], right)
        np.testing.assert_array_equal(
            np.asarray(
                open_image(pillow.frombytes("I;16B", (256, 256), values.astype(">u2").tobytes()))
            )[:, :, 0],
            right,
        )

    def test_memory_of_sixteen_bits(self):
        image = pillow.fromarray(np.full((1000, 1000), 30_000, dtype=np.uint16))
        tracemalloc.start()
        try:
            open_image(image)
            assert tracemalloc.get_traced_memory()[1] < 12 * 1000 * 1000
        finally:
            tracemalloc.stop()

    def test_integers_of_32_bits_outside_the_range_are_clipped(self):
        opened = open_image(
            pillow.fromarray(np.array([[-5, 257, 65535, 2**31 - 1]], dtype=np.int32))
        )
        assert np.asarray(opened)[0, :, 0].tolist() == [0, 1, 255, 255]

    def test_an_integer_image_within_eight_bits_is_not_scaled(self):
        opened = open_image(pillow.fromarray(np.full((3, 3), 200, dtype=np.int32)))
        assert opened.getpixel((1, 1)) == (200, 200, 200)

    @pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK", "F"])
    def test_every_mode_becomes_rgb(self, mode):
        assert open_image(pillow.new("L", (5, 4), 128).convert(mode)).mode == "RGB"

    def test_transparency_is_dropped(self):
        """As the reference does; what lies under it is seen."""
        image = pillow.new("RGBA", (4, 4), (10, 200, 30, 0))
        assert open_image(content(image)).getpixel((0, 0)) == (10, 200, 30)


class TestSizes:
    @pytest.mark.parametrize("budget", BUDGETS)
    def test_never_more_than_the_budget(self, budget):
        rng = np.random.default_rng(budget)
        for _ in range(300):
            width, height = (int(2 ** rng.uniform(0, 14)) for _ in range(2))
            rows, columns = (side // 48 for side in fitting_size(height, width, 16, 3, budget))
            assert 1 <= rows * columns <= budget
            assert rows * columns > budget / 4 or max(width, height) > 8 * min(width, height)

    @pytest.mark.parametrize("budget", BUDGETS)
    def test_as_the_reference_has_them(self, budget):
        """Above all for images so flat that not one row fits."""
        theirs = pytest.importorskip(
            "transformers.models.gemma4.image_processing_pil_gemma4"
        ).get_aspect_ratio_preserving_size
        around = [factor * budget + more for factor in (1, 2, 3) for more in (-1, 0, 1)]
        for long, short in [
            (long, short) for long in (*around, 5, 97, 20_000) for short in (1, 2, 3, 7)
        ]:
            for height, width in ((long, short), (short, long)):
                assert fitting_size(height, width, 16, 3, budget) == theirs(
                    height, width, 16, budget * 9, 3
                )

    def test_more_tokens_see_more(self):
        sizes = [prepare(stripes(400, 300), CONFIG, budget).soft_tokens for budget in BUDGETS]
        assert sizes == sorted(sizes)
        assert len(set(sizes)) == 5

    def test_patches_are_the_pixels(self):
        image = prepare(stripes(384, 384), CONFIG, 70)
        assert image.pixels.shape == (384, 384, 3)
        assert image.grid == (24, 24)
        patch = image.patches[25].reshape(16, 16, 3)  # second row, second column
        np.testing.assert_allclose(patch, image.pixels[16:32, 16:32] / 255, atol=1e-6)
        assert image.positions[25].tolist() == [1, 1]
        assert image.positions[26].tolist() == [2, 1]

    def test_digests_tell_images_apart(self):
        a, b = (prepare(stripes(), CONFIG, 70) for _ in range(2))
        assert a.digest == b.digest
        changed = a.pixels.copy()
        changed[0, 0, 0] ^= 1
        assert module.Image(changed, 16, 3).digest != a.digest
        assert (
            module.Image(a.pixels.reshape(a.pixels.shape[1], a.pixels.shape[0], 3), 16, 3).digest
            != a.digest
        )


def png_of(width, height):
    """A PNG that says it is this large and holds next to nothing."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b"\0" * 100))
        + chunk(b"IEND", b"")
    )


def ico_of(png):
    """An icon that says it is of 16 x 16 pixels."""
    return struct.pack("<3H4B2H2I", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(png), 22) + png


def icns_of(png):
    return (
        b"icns" + struct.pack(">I", 16 + len(png)) + b"ic08" + struct.pack(">I", 8 + len(png)) + png
    )


def dds():
    """A header of a format of pixels that Pillow does not know in full."""
    file = bytearray(content(pillow.new("RGB", (8, 8)), "DDS"))
    file[80:84] = struct.pack("<I", 0x80000)
    return bytes(file)


def heif_registered():
    """Whether Pillow can write the pictures of these tests."""
    pillow_heif.register_heif_opener()
    return "HEIF" in pillow.SAVE


class TestTogether:
    """The images of one request."""

    @pytest.fixture(autouse=True)
    def limits(self, monkeypatch):
        monkeypatch.setattr(module, "PIXEL_LIMIT", 1000)

    def test_as_each_alone(self, tmp_path):
        stripes(20, 10).save(tmp_path / "a.png")
        images = open_images([tmp_path / "a.png", content(stripes(10, 20))])
        assert [image.size for image in images] == [(20, 10), (10, 20)]

    def test_headers_of_all_before_one_is_decoded(self, monkeypatch, tmp_path):
        stripes().save(tmp_path / "a.png")
        file, data = str(tmp_path / "a.png"), content(stripes())
        with serving() as url:
            remote = f"{url}/a.png"
            monkeypatch.setattr(module, "_decoded", lambda *_: pytest.fail("it was decoded"))
            for sources in ([file, remote], [remote, remote], [file, data]):
                with pytest.raises(UserError, match="more than 1,000 pixels together"):
                    open_images(sources, allow_urls=True)

    def test_bytes(self, monkeypatch):
        size = len(content(stripes(20, 10)))
        monkeypatch.setattr(sources, "FILE_LIMIT", 4500)
        with serving() as url:
            assert size < 500
            assert open_images([f"{url}/a.png"], allow_urls=True)
            with pytest.raises(UserError, match="not an image"):
                open_images([f"{url}/big"], allow_urls=True)
            with pytest.raises(UserError, match="larger than 0 MB together"):
                open_images([f"{url}/tall", f"{url}/tall"], allow_urls=True)

    def test_seconds(self, monkeypatch):
        monkeypatch.setattr(sources, "TOGETHER_SECONDS", 0.3)
        with serving() as url:
            start = time.monotonic()
            with pytest.raises(UserError, match="all images together take longer than 0.3 seconds"):
                open_images([f"{url}/slow", f"{url}/slow"], allow_urls=True)
            assert time.monotonic() - start < 2


def test_heic():
    assert heif_registered()
    exif = pillow.Exif()
    exif[0x0112] = 6
    written = content(stripes(64, 32), "HEIF", quality=-1, chroma=444, exif=exif.tobytes())
    pillow.OPEN.pop("HEIF")  # nobody has registered it
    opened = open_image(written)
    assert (opened.mode, opened.size) == ("RGB", (32, 64))
    assert np.abs(np.asarray(opened, dtype=int)[2, 2] - (255, 0, 0)).max() < 8


def test_the_least_soft_tokens_of_any_shape():
    for budget in BUDGETS:
        sizes = [fitting_size(1000, 1000 + 7 * n, 16, 3, budget) for n in range(40_000)]
        assert min(height * width for height, width in sizes) // 48**2 >= budget // 2


class TestRefused:
    @pytest.mark.parametrize(
        ("source", "message"),
        [
            (b"", "is not an image"),
            (b"hello", "is not an image"),
            (content(stripes(200, 200))[:60], "damaged or cut off"),
            (content(stripes(200, 200), "JPEG")[:700], "damaged or cut off"),
            (png_of(200_000, 200_000), "40000000000 pixels"),
            (png_of(12_000, 12_000), "more than the 100,000,000 allowed"),
            (png_of(0, 5), "not an image|cannot be read|no size"),
            ("missing.png", "There is no image missing.png"),
            ("data:image/png;base64,@@", "data URL is not of the form"),
            ("data:image/png,abc", "data URL is not of the form"),
            ("https://example.org/a.png", "Remote images are not fetched here"),
            (pillow.new("RGB", (0, 7)), "has no size"),
            ("data:image/png;base64,ü", "data URL is not of the form"),
            ("a\0b.png", r"'a\\x00b.png' is not the path of a file"),
            ("~nosuchuser/a.png", "'~nosuchuser/a.png' is not the path"),
            (np.zeros((4, 4, 3), dtype=np.uint8), "an image of Pillow, not ndarray"),
            (None, "not NoneType"),
            ([b""], "not list"),
            (ico_of(png_of(20_000, 20_000)), "cannot be read as an image .*400000000 pixels"),
            (icns_of(png_of(20_000, 20_000)), "allowed are PNG, JPEG"),
            (
                b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n",
                "is not an image that can be read here; allowed are PNG",
            ),
            (dds(), "is not an image that can be read here"),
            ("HTTPS://example.org/a.png", "Remote images are not fetched here"),
        ],
        ids=lambda value: str(value)[:40],
    )
    def test_in_one_sentence(self, source, message, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UserError, match=message) as raised:
            open_image(source)
        assert "\n" not in str(raised.value)

    def test_opened_by_pillow_and_damaged(self):
        with pytest.raises(UserError, match="damaged or cut off"):
            open_image(pillow.open(io.BytesIO(icns_of(png_of(20_000, 20_000)))))

    @pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
    def test_a_damaged_avif(self):
        data = bytearray(content(pillow.effect_noise((64, 64), 90), "AVIF"))
        data[data.index(b"mdat") + 8 :] = b"\xff" * (len(data) - data.index(b"mdat") - 8)
        with pytest.raises(UserError, match="damaged or cut off"):
            open_image(bytes(data))

    def test_heic_without_its_package(self, monkeypatch):
        data = content(stripes(64, 64), "HEIF", quality=-1) if heif_registered() else b""
        monkeypatch.setitem(sys.modules, "pillow_heif", None)
        monkeypatch.delitem(pillow.OPEN, "HEIF")
        told = r"is a HEIC picture, .* install it with `pip install 'mlx-diffgemma\[heif\]'`"
        with pytest.raises(UserError, match=told):
            open_image(data)
        with pytest.raises(UserError, match="is not an image that can be read here"):
            open_image(data[:8] + b"isom" + data[12:])

    def test_a_damaged_heic(self):
        assert heif_registered()
        data = bytearray(content(pillow.effect_noise((64, 64), 90).convert("RGB"), "HEIF"))
        data[data.index(b"mdat") + 8 :] = b"\xff" * (len(data) - data.index(b"mdat") - 8)
        with pytest.raises(UserError, match="damaged or cut off"):
            open_image(bytes(data))

    def test_a_folder(self, tmp_path):
        with pytest.raises(UserError, match=f"{tmp_path} is a folder"):
            open_image(tmp_path)

    def test_a_file_that_does_not_end(self, monkeypatch, tmp_path):
        monkeypatch.setattr(sources, "FILE_LIMIT", 3_000_000)
        with (tmp_path / "long.png").open("wb") as file:
            file.truncate(3_000_001)
        with pytest.raises(UserError, match="long.png is larger than 3 MB"):
            open_image(tmp_path / "long.png")
        with pytest.raises(UserError, match="/dev/zero is a device"):
            open_image("/dev/zero")

    def test_files_where_they_are_not_allowed(self, tmp_path):
        stripes().save(tmp_path / "a.png")
        with pytest.raises(UserError, match="Files are not read here"):
            open_image(str(tmp_path / "a.png"), allow_files=False)

    @pytest.mark.parametrize("budget", [0, 69, 256, -70])
    def test_an_unknown_budget(self, budget):
        with pytest.raises(UserError, match=f"70, 140, 280, 560 or 1120, got {budget}"):
            prepare(stripes(), CONFIG, budget)

    def test_longer_than_the_positions(self):
        short = VisionConfig.from_dict({"position_embedding_size": 100})
        assert prepare(stripes(100, 100), short, 280)
        with pytest.raises(UserError, match="840 patches long and the tower knows 100"):
            prepare(stripes(10_000, 2), short, 280)


@contextmanager
def replying(reply):
    """A server that says the same to everyone."""

    def answer():
        connection, _ = listener.accept()
        with connection:
            connection.recv(4096)
            connection.sendall(reply)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/a.png"
        thread.join()


class TestUrls:
    """Where they are allowed."""

    def test_fetched(self, monkeypatch):
        with serving() as url:
            assert open_image(f"{url}/a.png", allow_urls=True).tobytes() == stripes().tobytes()
            with pytest.raises(UserError, match=r"cannot be fetched \(Not Found\)"):
                open_image(f"{url}/b.png", allow_urls=True)
            monkeypatch.setattr(sources, "DOWNLOAD_LIMIT", 3000)
            with pytest.raises(UserError, match="is larger than"):
                open_image(f"{url}/big", allow_urls=True)

    def test_the_time_is_that_of_the_whole(self, monkeypatch):
        """A server that sends a byte now and then is left."""
        monkeypatch.setattr(sources, "DOWNLOAD_SECONDS", 0.5)
        with serving() as url:
            for page in ("slow", "dripping"):
                start = time.monotonic()
                with pytest.raises(
                    UserError, match="cannot be fetched .it takes longer than 0.5 seconds"
                ):
                    open_image(f"{url}/{page}", allow_urls=True)
                assert time.monotonic() - start < 3

    @pytest.mark.parametrize(
        "url",
        [
            "http://127.0.0.1/a b.png",
            "http://127.0.0.1:port/a",
            "http://[::1/a",
            "http:///a.png",
            "http://127.0.0.1/\nHost: a",
            "http://127.0.0.1:9/ü.png",
        ],
    )
    def test_none_of_its_form(self, url):
        with pytest.raises(UserError, match="cannot be fetched") as raised:
            open_image(url, allow_urls=True)
        assert "\n" not in str(raised.value)

    @pytest.mark.parametrize(
        "reply",
        [
            b"junk\r\nmore\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n40\r\nabc",
            b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 200 + b"\r\n",
            b"",
        ],
        ids=["junk", "cut off", "headers", "nothing"],
    )
    def test_a_reply_that_is_none(self, reply):
        with replying(reply) as url, pytest.raises(UserError, match="cannot be fetched") as raised:
            open_image(url, allow_urls=True)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "siglip"}, "vision_config.model_type is 'siglip'"),
        ({"hidden_activation": "relu"}, "vision_config.hidden_activation is 'relu'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.rope_type is 'yarn'"),
        ({"head_dim": 10}, "must divide by 4"),
        ({"num_key_value_heads": 5}, "must divide by 4"),
    ],
    ids=lambda x: json.dumps(x)[:30],
)
def test_another_tower_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        VisionConfig.from_dict(change)


@pytest.mark.parametrize(
    "write",
    [
        str,
        lambda url: url.replace("data:image/png;base64", "DATA:IMAGE/PNG;BASE64"),
        lambda url: url.rstrip("="),
        lambda url: url[:40] + "\r\n" + url[40:] + "\n",
        lambda url: url[:40] + "%0D%0a" + url[40:].replace("=", "%3D").replace("+", "%2B"),
        lambda url: url.replace(";base64", ";charset=utf-8; base64"),
    ],
)
def test_data_urls_as_they_are_written(write):
    file = io.BytesIO()
    pillow.new("RGB", (3, 2), "red").save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    assert open_image(write(url), allow_files=False).size == (3, 2)
