"""Downloads against a local stand-in for the Hub, an interrupted one included."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import threading
from fnmatch import fnmatch
from pathlib import Path

import pytest

from mlx_diffgemma import nano
from mlx_diffgemma.checkpoint import hub
from mlx_diffgemma.errors import UserError
from tests.helpers.command import COMMAND

SHA = "0123456789abcdef0123456789abcdef01234567"
REPO = "someone/diffusiongemma-tiny"


def etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


class StandIn(http.server.BaseHTTPRequestHandler):
    """Repository info, file heads and file bodies with ranges; ``broken`` bodies stop in the
    middle.
    """

    protocol_version = "HTTP/1.1"
    root: Path
    broken: set[str]
    log: list[str]

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        path = self.path.split("?")[0].strip("/")
        self.log.append(f"{self.command} {path}")
        if path.startswith(f"api/models/{REPO}/tree/"):
            tree = [
                {
                    "type": "file",
                    "path": p.name,
                    "size": p.stat().st_size,
                    "oid": etag(p.read_bytes()),
                }
                for p in sorted(self.root.iterdir())
            ]
            return self.send(200, json.dumps(tree).encode(), body)
        if path.startswith(f"api/models/{REPO}"):
            files = [{"rfilename": p.name} for p in sorted(self.root.iterdir())]
            return self.send(
                200,
                json.dumps({"id": REPO, "sha": SHA, "siblings": files, "private": False}).encode(),
                body,
            )
        prefix = f"{REPO}/resolve/{SHA}/"
        if not path.startswith(prefix):
            return self.send(404, b"{}", body, {"X-Error-Code": "RepoNotFound"})
        content = (self.root / path.removeprefix(prefix)).read_bytes()
        headers = {"ETag": f'"{etag(content)}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        start, status = 0, 200
        if body and (wanted := self.headers.get("Range")):
            start, status = int(wanted.removeprefix("bytes=").split("-")[0]), 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return self.send(
            status, content[start:], body, headers, cut=path.removeprefix(prefix) in self.broken
        )

    def send(self, status, content, body, headers=None, cut=False):
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/octet-stream",
            "Content-Length": str(len(content)),
        }.items():
            self.send_header(name, value)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.close_connection = True

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path):
    handler = type("Handler", (StandIn,), {"root": nano.FOLDER, "broken": set(), "log": []})
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield handler, f"http://127.0.0.1:{httpd.server_port}", tmp_path / "hub"
    httpd.shutdown()


def command(endpoint, home, *arguments):
    """The command in a process of its own, since the Hub's library reads its settings at import."""
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "20",
        "HF_HUB_ETAG_TIMEOUT": "20",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    return subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **settings},
        cwd=Path(__file__).parents[1],
    )


@pytest.mark.slow
def test_download_and_run(server):
    _, endpoint, home = server
    out = command(
        endpoint, home, "generate", "--model", REPO, "-p", "Is 47 greater than 38?", "--seed", "1"
    )
    local = command(endpoint, home, "generate", "-p", "Is 47 greater than 38?", "--seed", "1")
    assert out.returncode == 0, out.stderr
    assert out.stdout == local.stdout


@pytest.mark.slow
def test_interrupted_download_goes_on(server):
    handler, endpoint, home = server
    handler.broken.add("model.safetensors")
    out = command(endpoint, home, "info", REPO)
    assert out.returncode == 2, (out.stdout, out.stderr)
    assert "Traceback" not in out.stderr
    last = out.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "continues where it stopped" in last
    handler.broken.clear()
    again = command(endpoint, home, "info", REPO)
    assert again.returncode == 0, again.stderr
    downloaded = next(home.rglob("model.safetensors"))
    assert downloaded.read_bytes() == (nano.FOLDER / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_model_that_cannot_be_run_is_refused_before_its_weights_are_fetched(server, tmp_path):
    handler, endpoint, home = server
    handler.root = tmp_path / "quantised"
    shutil.copytree(nano.FOLDER, handler.root)
    config = json.loads((handler.root / "config.json").read_text()) | {
        "quantization": {"bits": 7, "group_size": 64}
    }
    (handler.root / "config.json").write_text(json.dumps(config))
    out = command(endpoint, home, "generate", "--model", REPO, "-p", "fox")
    assert out.returncode == 2
    assert "has 2, 3, 4, 5, 6 or 8 bits, not 7" in out.stderr
    assert not any(line.startswith("GET") and "safetensors" in line for line in handler.log)


@pytest.mark.slow
def test_a_dry_run_fetches_headers_only(server):
    _, endpoint, home = server
    out = command(endpoint, home, "convert", "--hf-path", REPO, "-q", "--dry-run", "--json")
    assert out.returncode == 0, out.stderr
    local = command(endpoint, home, "convert", "--hf-path", "nano", "-q", "--dry-run", "--json")
    assert json.loads(out.stdout)["classes"] == json.loads(local.stdout)["classes"]
    assert not list(home.rglob("model.safetensors"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(["-d"], "is not quantised; leave -d out", marks=pytest.mark.slow),
        pytest.param(
            ["-q", "--q-group-size", "128"],
            "which groups of 128 do not divide",
            marks=pytest.mark.slow,
        ),
        pytest.param(["-q", "--mlx-path", "."], "exists already", marks=pytest.mark.slow),
    ],
)
def test_what_headers_tell_is_refused_before_the_download(server, options, message):
    _, endpoint, home = server
    out = command(endpoint, home, "convert", "--hf-path", REPO, *options)
    assert out.returncode == 2
    assert message in out.stderr.strip().splitlines()[-1]
    assert not list(home.rglob("model.safetensors"))


@pytest.mark.slow
def test_a_dry_run_of_what_is_downloaded_needs_no_network(server):
    _, endpoint, home = server
    assert command(endpoint, home, "info", REPO).returncode == 0
    out = command(
        "http://127.0.0.1:9", home, "convert", "--hf-path", REPO, "-q", "--dry-run", "--json"
    )
    assert out.returncode == 0, out.stderr


def test_convert_from_the_hub(server, tmp_path):
    _, endpoint, home = server
    out = command(
        endpoint, home, "convert", "--hf-path", REPO, "-q", "--mlx-path", str(tmp_path / "out")
    )
    assert out.returncode == 0, out.stderr
    assert f"base_model: {REPO}" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
def test_nothing_is_converted_for_an_upload_that_nobody_may_make(server, tmp_path):
    _, endpoint, home = server
    out = command(
        endpoint,
        home,
        "convert",
        "--hf-path",
        "nano",
        "-q",
        "--mlx-path",
        str(tmp_path / "out"),
        "--upload-repo",
        REPO,
    )
    assert out.returncode == 2
    assert (
        out.stderr.strip()
        .splitlines()[-1]
        .startswith("error: Nobody is logged in who could upload to")
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_no_such_repository(server):
    _, endpoint, home = server
    out = command(endpoint, home, "info", "someone/else")
    assert out.returncode == 2
    assert "neither a folder nor a Hub repository 'someone/else'" in out.stderr


def test_no_network(tmp_path):
    out = command("http://127.0.0.1:9", tmp_path, "info", REPO)
    assert out.returncode == 2
    assert (
        out.stderr.strip()
        .splitlines()[-1]
        .startswith("error: someone/diffusiongemma-tiny could not be fetched")
    )


@pytest.mark.slow
def test_a_second_run_needs_no_network(server):
    _, endpoint, home = server
    assert command(endpoint, home, "info", REPO).returncode == 0
    assert command("http://127.0.0.1:9", home, "info", REPO).returncode == 0


def test_what_is_local():
    assert hub.resolve("nano") == nano.FOLDER
    assert hub.resolve(str(nano.FOLDER)) == nano.FOLDER
    for name in ("nothing", "./a/b", "/a", "a/b/c"):
        with pytest.raises(UserError, match="There is no folder"):
            hub.resolve(name)


def test_all_that_a_tokenizer_needs_is_downloaded():
    names = (
        "tokenizer.model",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "vocab.txt",
        "config.json",
        "model.safetensors.index.json",
        "LICENSE",
        "README.md",
    )
    for name in names:
        assert any(fnmatch(name, pattern) for pattern in hub.SMALL), name
    assert any(fnmatch("model-00001-of-00002.safetensors", pattern) for pattern in hub.WANTED)
    assert not any(fnmatch("model-00001-of-00002.safetensors", pattern) for pattern in hub.SMALL)
    assert set(hub.SMALL) < set(hub.WANTED)
