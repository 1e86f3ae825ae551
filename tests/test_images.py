"""Images: what opening a file means, sizes, and what is refused."""

import base64
import io
import json
import struct
import threading
import zlib
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from PIL import Image as pillow

from mlx_diffgemma import images as module
from mlx_diffgemma.config import VisionConfig
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.images import BUDGETS, fitting_size, open_image, prepare

CONFIG = VisionConfig.from_dict({"patch_size": 16, "pooling_kernel_size": 3})


def content(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def stripes(width=40, height=20):
    """Left half red, right half blue."""
    image = pillow.new("RGB", (width, height), "red")
    image.paste("blue", (width // 2, 0, width, height))
    return image


class TestOpening:
    def test_all_kinds_of_sources_are_one_image(self, tmp_path):
        image = stripes()
        data = content(image)
        (tmp_path / "a.png").write_bytes(data)
        url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
        for source in (image, data, tmp_path / "a.png", str(tmp_path / "a.png"), url):
            assert open_image(source).tobytes() == image.tobytes()

    def test_exif_rotation_is_carried_out(self):
        exif = pillow.Exif()
        exif[0x0112] = 6  # turned by 90 degrees: shown upright it is 20 wide and 40 high, red on top
        opened = open_image(content(stripes(), "PNG", exif=exif))
        assert opened.size == (20, 40)
        assert opened.getpixel((10, 3)) == (255, 0, 0)
        assert opened.getpixel((10, 36)) == (0, 0, 255)

    def test_sixteen_bits_are_scaled(self):
        ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0)
        opened = np.asarray(open_image(content(pillow.fromarray(ramp))))
        np.testing.assert_array_equal(opened[0, :, 0], np.arange(256))

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
        assert module.Image(a.pixels.reshape(a.pixels.shape[1], a.pixels.shape[0], 3), 16, 3).digest != a.digest


def png_of(width, height):
    """A PNG that says it is this large and holds next to nothing."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b""))


class TestRefused:
    @pytest.mark.parametrize(("source", "message"), [
        (b"", "is not an image"), (b"hello", "is not an image"), (content(stripes(200, 200))[:60], "damaged or cut off"),
        (content(stripes(200, 200), "JPEG")[:700], "damaged or cut off"), (png_of(200_000, 200_000), "40000000000 pixels"),
        (png_of(12_000, 12_000), "more than the 100,000,000 allowed"), (png_of(0, 5), "not an image|cannot be read|no size"),
        ("missing.png", "There is no image missing.png"), ("data:image/png;base64,@@", "data URL is not of the form"),
        ("data:image/png,abc", "data URL is not of the form"), ("https://example.org/a.png", "Remote images are not fetched here"),
        (pillow.new("RGB", (0, 7)), "has no size")], ids=str)
    def test_in_one_sentence(self, source, message, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UserError, match=message) as raised:
            open_image(source)
        assert "\n" not in str(raised.value)

    def test_a_folder(self, tmp_path):
        with pytest.raises(UserError, match="cannot be read"):
            open_image(tmp_path)

    def test_files_where_they_are_not_allowed(self, tmp_path):
        stripes().save(tmp_path / "a.png")
        with pytest.raises(UserError, match="Files are not read here"):
            open_image(str(tmp_path / "a.png"), allow_files=False)

    @pytest.mark.parametrize("budget", [0, 69, 256, -70])
    def test_an_unknown_budget(self, budget):
        with pytest.raises(UserError, match=f"70, 140, 280, 560 or 1120 soft tokens, not {budget}"):
            prepare(stripes(), CONFIG, budget)

    def test_longer_than_the_positions(self):
        short = VisionConfig.from_dict({"position_embedding_size": 100})
        assert prepare(stripes(100, 100), short, 280)
        with pytest.raises(UserError, match="840 patches long and the tower knows 100"):
            prepare(stripes(10_000, 2), short, 280)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        body = {"/a.png": content(stripes()), "/big": b"x" * 4000}.get(self.path)
        self.send_response(200 if body else 404)
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, *_):
        pass


def test_urls_where_they_are_allowed(monkeypatch):
    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        assert open_image(f"{url}/a.png", allow_urls=True).tobytes() == stripes().tobytes()
        with pytest.raises(UserError, match=r"cannot be fetched \(Not Found\)"):
            open_image(f"{url}/b.png", allow_urls=True)
        monkeypatch.setattr(module, "DOWNLOAD_LIMIT", 3000)
        with pytest.raises(UserError, match="is larger than"):
            open_image(f"{url}/big", allow_urls=True)
    finally:
        server.shutdown()


@pytest.mark.parametrize(("change", "message"), [
    ({"model_type": "siglip"}, "vision_config.model_type is 'siglip'"),
    ({"hidden_activation": "relu"}, "vision_config.hidden_activation is 'relu'"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters.rope_type is 'yarn'"),
    ({"head_dim": 10}, "must divide by 4"), ({"num_key_value_heads": 5}, "must divide by 4")], ids=lambda x: json.dumps(x)[:30])
def test_another_tower_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        VisionConfig.from_dict(change)
