"""A server of pictures, some of them invalid."""

import io
import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer

from PIL import Image as pillow


def content(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def stripes(width=40, height=20):
    """Left half red, right half blue."""
    image = pillow.new("RGB", (width, height), "red")
    image.paste("blue", (width // 2, 0, width, height))
    return image


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/dripping":
            self.send_response(200)
            self.wfile.flush()
            with suppress(OSError):
                for _ in range(100):
                    self.wfile.write(b"X")
                    self.wfile.flush()
                    time.sleep(0.05)
            return
        if self.path == "/slow":
            self.send_response(200)
            self.end_headers()
            for _ in range(100):
                self.wfile.write(b"x")
                time.sleep(0.05)
            return
        body = {
            "/a.png": content(stripes()),
            "/big": b"x" * 4000,
            "/tall": content(stripes(1, 900), "BMP"),
        }.get(self.path)
        self.send_response(200 if body else 404)
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, *_):
        pass


@contextmanager
def serving():
    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # who asked may leave before the end
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
