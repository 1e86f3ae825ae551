"""A headless Chromium for tests of the pages, and a stub of the server that streams what a trace
recorded.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from mlx_diffgemma.generation.trace import PAGE

CHROMIUM = "/usr/bin/chromium"
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
TYPES = {
    ".js": "text/javascript",
    ".css": "text/css",
    ".html": "text/html; charset=utf-8",
    ".svg": "image/svg+xml",
}


@contextlib.contextmanager
def opened(playwright, profile, **options):
    """A browser with an empty profile; what it must not do (errors, other hosts) is gathered in
    ``complaints``.
    """
    context = playwright.chromium.launch_persistent_context(
        str(profile), executable_path=CHROMIUM, args=ARGUMENTS, **options
    )
    try:
        yield context
    finally:
        context.close()


class Watched:
    """A page of a browser, with what it asked for and complained of."""

    def __init__(self, context):
        self.page, self.requests, self.complaints = context.new_page(), [], []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", self.hear)

    def hear(self, message):
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)


def chunk(**fields):
    record = {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "nano",
        **fields,
    }
    return f"data: {json.dumps(record)}\n\n"


def delta(finish_reason=None, **fields):
    return chunk(choices=[{"index": 0, "delta": fields, "finish_reason": finish_reason}])


def recorded(trace: str) -> list[str]:
    """The events of a server that gives the answer of a trace."""
    header, *frames, footer = [json.loads(line) for line in trace.splitlines()]
    assert header["format"]
    events = [delta(role="assistant", content="")]
    for frame in frames:
        events.append(chunk(choices=[], diffusion=frame))
        if frame["reason"]:
            events.append(delta(content="".join(frame["pieces"])))
    usage = {
        "prompt_tokens": 12,
        "completion_tokens": footer["tokens"],
        "total_tokens": 12 + footer["tokens"],
        "denoising_steps": footer["steps"],
        "tokens_per_forward": footer["tokens"] / footer["steps"],
    }
    return [
        *events,
        delta(finish_reason=footer["finish_reason"]),
        chunk(choices=[], usage=usage),
        "data: [DONE]\n\n",
    ]


class Stub:
    """Serves the chat page as the server does, and answers each question with the next of
    ``answers``: events, or (status, error).
    """

    def __init__(self):
        self.answers: list = []
        self.asked: list[tuple[dict, dict]] = []  # (headers, body)
        self.pause = 0.02
        self.aborted = threading.Event()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def reply(self, status, kind, body):
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Content-Security-Policy", CSP)
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self):
                if self.path == "/v1/models":
                    models = {
                        "object": "list",
                        "data": [
                            {"id": "nano", "object": "model"},
                            {"id": "other", "object": "model"},
                        ],
                    }
                    return self.reply(200, "application/json", json.dumps(models).encode())
                path = PAGE / ("index.html" if self.path == "/" else Path(self.path).name)
                if self.path != "/" and (
                    Path(self.path).parent != Path("/page") or not path.is_file()
                ):
                    return self.reply(404, "text/plain", b"no such page")
                return self.reply(200, TYPES[path.suffix], path.read_bytes())

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stub.asked.append((dict(self.headers), body))
                answer = stub.answers.pop(0)
                if isinstance(answer, tuple):
                    status, error = answer
                    return self.reply(
                        status, "application/json", json.dumps({"error": error}).encode()
                    )
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.send_header("Connection", "close")
                self.end_headers()
                self.close_connection = True
                try:
                    for event in answer:
                        self.wfile.write(event.encode())
                        self.wfile.flush()
                        time.sleep(stub.pause)
                except OSError:
                    stub.aborted.set()
                return None

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()
