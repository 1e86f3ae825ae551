"""What stands before the model: connections, bodies, keys, paths, and how much a request brings."""

import asyncio
import gzip
import socket
import threading
import time
from contextlib import contextmanager

import pytest
import uvicorn
from fastapi.exceptions import RequestValidationError
from PIL import Image
from starlette.exceptions import HTTPException

from mlx_diffgemma.cli.serve_options import proxies
from mlx_diffgemma.errors import ContextError, UserError
from mlx_diffgemma.serving import amounts, bodies, content
from mlx_diffgemma.serving.connections import Connection, protocol
from mlx_diffgemma.serving.conversation import template_messages
from mlx_diffgemma.serving.keys import KeyCheck, asker
from mlx_diffgemma.serving.limits import BodyLimit
from mlx_diffgemma.serving.middleware import Paths
from mlx_diffgemma.serving.protocols.fields import STRICT
from mlx_diffgemma.serving.protocols.messages import Message
from mlx_diffgemma.serving.protocols.openai_chat import ChatRequest
from mlx_diffgemma.serving.protocols.openai_completions import CompletionRequest
from mlx_diffgemma.serving.protocols.tools import Tool
from tests.helpers.images import picture

HEAD = b"GET / HTTP/1.1\r\nHost: a\r\n"
POST = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n"


async def answering(scope, receive, send):
    """Reads the body and says how long it was."""
    size, more = 0, True
    while more:
        message = await receive()
        size += len(message.get("body", b""))
        more = message.get("more_body", False)
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1")]}
    )
    await send({"type": "http.response.body", "body": str(size % 10).encode()})


@contextmanager
def listening(app=answering, settings=None, **options):
    """The address of a server with our connections."""
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            port=0,
            log_level="critical",
            lifespan="off",
            http=protocol(**options),
            **(settings or {}),
        )
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield server.servers[0].sockets[0].getsockname()
    finally:
        server.should_exit = True
        thread.join()


def opened(address):
    return socket.create_connection(address, timeout=10)


def asked(connection):
    connection.sendall(HEAD + b"\r\n")
    found = b""
    while not found.endswith(b"\r\n\r\n0"):
        found += connection.recv(1000)
    return found


class TestConnections:
    @pytest.mark.parametrize("sent", [b"", b"G", HEAD, HEAD + b"X: y\r\n"])
    def test_a_head_that_does_not_come(self, sent):
        with listening(head_seconds=0.2) as address, opened(address) as connection:
            connection.sendall(sent)
            began = time.monotonic()
            assert connection.recv(100) == b""
            assert time.monotonic() - began < 5

    def test_a_second_head_that_comes_slowly(self):
        """Each byte stops uvicorn's own timer of idle connections."""
        with listening(head_seconds=0.3) as address, opened(address) as connection:
            assert b"200 OK" in asked(connection)
            with pytest.raises(OSError):  # noqa: PT012
                for byte in HEAD * 10:
                    connection.sendall(bytes([byte]))
                    time.sleep(0.05)

    def test_answers_may_take_longer(self):
        async def slow(scope, receive, send):
            await asyncio.sleep(0.5)
            await answering(scope, receive, send)

        with listening(slow, head_seconds=0.1) as address, opened(address) as connection:
            assert b"200 OK" in asked(connection)

    def test_the_time_of_the_next_head_begins_at_the_end_of_an_answer(self):
        async def slow(scope, receive, send):
            await asyncio.sleep(0.8)
            await answering(scope, receive, send)

        with listening(slow, head_seconds=1.2) as address, opened(address) as connection:
            assert b"200 OK" in asked(connection)
            time.sleep(0.8)
            assert b"200 OK" in asked(connection)

    def test_one_client_cannot_hold_all(self, monkeypatch):
        """The oldest idle connection of the client that has most makes room."""
        ports = set()  # of the other client, which has the same address here
        monkeypatch.setattr(
            Connection, "address", property(lambda self: "b" if self.client[1] in ports else "a")
        )
        with listening(most=5) as address:
            many = []
            for _ in range(5):
                many.append(opened(address))
                time.sleep(0.02)
            with opened(address) as other:
                ports.add(other.getsockname()[1])
                assert b"200 OK" in asked(other)
                assert many[0].recv(10) == b""
                assert b"200 OK" in asked(many[4])
                with opened(address) as own:
                    assert b"200 OK" in asked(own)
                    assert b"200 OK" in asked(other)
            for one in many:
                one.close()


def through(middleware, scope, messages, wait=0.0):
    """(status, body, the scope that the application saw) of a request whose body comes in
    ``messages``.
    """
    sent, seen = [], []

    async def app(scope, receive, send):
        seen.append(scope)
        try:
            await answering(scope, receive, send)
        except HTTPException as error:
            await send({"type": "http.response.start", "status": error.status_code, "headers": []})

    async def run():
        left = list(messages)

        async def receive():
            await asyncio.sleep(wait)
            return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

        async def send(message):
            sent.append(message)

        await middleware(app)(
            {"type": "http", "method": "POST", "path": "/", "headers": [], **scope}, receive, send
        )

    asyncio.run(run())
    return sent[0]["status"], sent[-1].get("body"), seen[0] if seen else None


class TestMiddleware:
    def test_bodies_that_come_slowly(self):
        def limited(app):
            return BodyLimit(app, 100, seconds=0.1)

        assert through(limited, {}, [b"abc", b"def"])[:2] == (200, b"6")
        assert through(limited, {}, [b"a"] * 50, wait=0.02)[0] == 408
        assert through(limited, {}, [b"a" * 60] * 2)[0] == 413

    @pytest.mark.parametrize(
        ("headers", "status"),
        [
            ([(b"authorization", b"Bearer k")], 200),
            ([(b"x-api-key", b"k")], 200),
            ([(b"x-api-key", b"K")], 401),
            ([], 401),
            ([(b"authorization", b"Basic k")], 401),
            ([(b"authorization", b"Bearer x"), (b"x-api-key", b"k")], 401),
        ],
    )
    def test_keys(self, headers, status):
        assert (
            through(
                lambda app: KeyCheck(app, ["k"]), {"headers": headers, "path": "/v1/models"}, [b""]
            )[0]
            == status
        )

    @pytest.mark.parametrize(
        ("keys", "brought", "found"),
        [
            (["k"], b"k", "10.0.0.1"),
            (["k", "l"], b"k", "key 0"),
            (["k", "l"], b"l", "key 1"),
        ],
    )
    def test_with_several_keys_each_is_a_client(self, keys, brought, found):
        scope = {
            "path": "/v1/models",
            "client": ("10.0.0.1", 5),
            "headers": [(b"x-api-key", brought)],
        }
        seen = through(lambda app: KeyCheck(app, keys), scope, [b""])[2]
        assert asker(seen) == found

    @pytest.mark.parametrize(
        ("trusted", "found"),
        [(None, "127.0.0.1"), ("127.0.0.1", "9.9.9.9"), ("10.0.0.1", "127.0.0.1")],
    )
    def test_no_client_chooses_its_address(self, trusted, found):
        seen = []

        async def app(scope, receive, send):
            seen.append(asker(scope))
            await answering(scope, receive, send)

        with listening(app, proxies(trusted)) as address, opened(address) as connection:
            connection.sendall(HEAD + b"X-Forwarded-For: 9.9.9.9\r\n\r\n")
            assert b"200 OK" in connection.recv(1000)
        assert seen == [found]

    @pytest.mark.parametrize(
        ("path", "found"),
        [
            ("/v1/models", "/v1/models"),
            ("/models", "/v1/models"),
            ("/models/nano", "/v1/models/nano"),
            ("/chat/completions/", "/v1/chat/completions"),
            ("/v1/chat/completions//", "/v1/chat/completions"),
            ("/", "/"),
            ("//", "/"),
            ("/page/", "/page/"),
            ("/health/", "/health"),
            ("/modelsx", "/modelsx"),
        ],
    )
    def test_paths(self, path, found):
        assert through(Paths, {"path": path}, [b""])[2]["path"] == found


class Told:
    """As much of a request as ``bodies`` reads."""

    def __init__(self, content, **headers):
        self.content, self.headers = (
            content,
            {name.replace("_", "-"): value for name, value in headers.items()},
        )

    async def body(self):
        return self.content


def read(content, kind=CompletionRequest, limit=10**6, **headers):
    threads = []

    async def off_loop(task, is_heavy):
        threads.append(is_heavy)
        return await asyncio.get_running_loop().run_in_executor(None, task)

    headers = {"content_type": "application/json", **headers}
    return asyncio.run(bodies.read(Told(content, **headers), kind, limit, off_loop)), bool(threads)


WHOLE = b'{"model": "nano", "prompt": "a"}'


class TestBodies:
    def test_short_ones_are_parsed_at_once_and_long_ones_elsewhere(self):
        assert read(WHOLE)[1] is False
        long = WHOLE[:-1] + b', "metadata": {"a": "' + b"x" * bodies.AT_ONCE + b'"}}'
        body, elsewhere = read(long)
        assert (body.prompt, elsewhere) == ("a", True)

    def test_very_long_ones_where_few_are_parsed_at_once(self):
        seen = []

        async def off_loop(task, is_heavy):
            seen.append(is_heavy)
            return task()

        for size in (bodies.AT_ONCE, bodies.HEAVY):
            long = WHOLE[:-1] + b', "user": "' + b"x" * size + b'"}'
            told = Told(long, content_type="application/json")
            asyncio.run(bodies.read(told, CompletionRequest, 10**7, off_loop))
        assert seen == [False, True]

    @pytest.mark.parametrize("size", [1, bodies.AT_ONCE], ids=["short", "long"])
    def test_what_is_strict_is_so_for_long_ones_too(self, size):
        body = WHOLE[:-1] + b', "unknown": "' + b"x" * size + b'"}'
        assert read(body)[0].notes == ["unknown: not known here; it was ignored."]
        token = STRICT.set(True)
        try:
            with pytest.raises(RequestValidationError) as refused:
                read(body)
        finally:
            STRICT.reset(token)
        assert refused.value.errors()[0]["type"] == "extra_forbidden"

    def test_gzip(self):
        assert read(gzip.compress(WHOLE), content_encoding="gzip")[0].prompt == "a"

    @pytest.mark.parametrize(
        ("content", "encoding", "status"),
        [
            (gzip.compress(b" " * 10**7), "gzip", 413),
            (gzip.compress(WHOLE)[:-9], "gzip", 422),
            (WHOLE, "gzip", 422),
            (WHOLE, "br", 415),
            (b"", "gzip", 422),
        ],
        ids=["inflates", "cut", "plain", "unknown", "empty"],
    )
    def test_gzip_that_is_none(self, content, encoding, status):
        with pytest.raises(HTTPException) as refused:
            read(content, content_encoding=encoding)
        assert refused.value.status_code == status

    def test_what_is_inflated_is_never_held_beyond_the_limit(self, monkeypatch):
        sizes = []
        monkeypatch.setattr(content, "INFLATED_AT_ONCE", 1000)
        inflate = content.zlib.decompressobj

        class Counted:
            def __init__(self, *given):
                self.own = inflate(*given)

            def decompress(self, *given):
                found = self.own.decompress(*given)
                sizes.append(len(found))
                return found

            def __getattr__(self, name):
                return getattr(self.own, name)

        monkeypatch.setattr(content.zlib, "decompressobj", Counted)
        with pytest.raises(content.UnreadableError):
            content.inflated(gzip.compress(b" " * 10**6), "gzip", 5000)
        assert sum(sizes) <= 6000

    @pytest.mark.parametrize(
        "content",
        [
            b"[" * 200 + b"]" * 200,
            b'{"model": ' + b"[" * 101 + b"]" * 101 + b"}",
            b"[" * 10**6,
            b"\xff",
            b"1" * 5000,
        ],
    )
    def test_what_is_nested_too_deeply_or_no_text(self, content):
        with pytest.raises(HTTPException) as refused:
            read(content)
        assert refused.value.status_code == 400

    @pytest.mark.parametrize(
        ("content", "kind"),
        [
            (b"", "missing"),
            (b"{", "json_invalid"),
            (b"[]", "model_attributes_type"),
            (b'{"model": "a"}', None),
        ],
    )
    def test_what_is_no_body(self, content, kind):
        with pytest.raises(RequestValidationError) as refused:
            read(content)
        assert kind in (None, refused.value.errors()[0]["type"])
        assert refused.value.errors()[0]["loc"][0] == "body"

    def test_what_is_no_json(self):
        with pytest.raises(RequestValidationError):
            read(WHOLE, content_type="text/plain")
        assert read(WHOLE, content_type="application/vnd.a+json; charset=utf-8")[0].prompt == "a"


def message(*urls):
    return Message(
        role="user", content=[{"type": "image_url", "image_url": {"url": url}} for url in urls]
    )


class TestAmounts:
    def test_characters_of_texts_alone(self):
        said = [
            Message(
                role="user",
                content=[
                    {"type": "text", "text": "abc"},
                    {"type": "image_url", "image_url": {"url": "d" * 99}},
                ],
            ),
            Message(role="user", content="de"),
        ]
        assert amounts.characters(said) == len("abc" + "de" + "text" + "image_url" + "user" * 2)

    def test_text_that_no_tokens_hold(self):
        amounts.check_text(50, 5, 10)
        with pytest.raises(
            ContextError,
            match="51 characters, and the 5 tokens that a prompt may have hold at most 50",
        ):
            amounts.check_text(51, 5, 10)

    def test_tools(self):
        tools = [
            Tool(type="function", function={"name": "f", "parameters": {"a": "x" * 600_000}})
            for _ in range(2)
        ]
        amounts.check_tools(tools[:1])
        with pytest.raises(UserError, match="at most 1,000,000"):
            amounts.check_tools(tools)

    def test_pixels_by_headers_before_anything_is_unpacked(self, monkeypatch):
        def unpack(*_):
            raise AssertionError("an image was unpacked")

        large, small, dot = picture(9000, 9000), picture(10, 20), picture(1, 1)
        Image.init()  # plugins make pictures of their own
        monkeypatch.setattr(Image.Image, "load", unpack)
        assert len(large) < 100_000
        assert amounts.check_pixels([message(large, small), message(dot)]) == 81_000_201
        with pytest.raises(UserError, match="100,000,000 pixels together"):
            amounts.check_pixels([message(large), message(large)])
        with pytest.raises(UserError):
            amounts.check_pixels([message("data:image/png;base64,AAAA")])

    def test_images_however_small(self):
        half = message(*[picture(1, 1)] * (amounts.MOST_IMAGES // 2))
        assert amounts.check_pixels([half, half]) == amounts.MOST_IMAGES
        with pytest.raises(UserError, match="has 192 images, of at most 128; send fewer"):
            amounts.check_pixels([half] * 3)

    def test_images_that_no_prompt_holds(self):
        dot = picture(1, 1)
        amounts.check_images([message(*[dot] * 10)], 350, 70)
        told = "11 images, which take at least 385 tokens, and a prompt may have 350"
        with pytest.raises(ContextError, match=told):
            amounts.check_images([message(*[dot] * 5), message(*[dot] * 6)], 350, 70)

    def test_sizes_that_are_known_later(self):
        data = picture(1, 1)
        assert not amounts.have_unknown_size([message(data, "DATA:" + data[5:])])
        for url in ("https://example.org/a.png", "/a.png", "file:///a.png"):
            assert amounts.have_unknown_size([message(data), message(url)])

    def test_pixels_of_files_count_too(self, tmp_path):
        made = Image.new("1", (9000, 9000))
        made.save(tmp_path / "a.png")
        asked = [message(picture(9000, 9000)), message(str(tmp_path / "a.png"))]
        with pytest.raises(UserError, match="100,000,000 pixels together"):
            template_messages(asked, allow_files=True)


@pytest.mark.parametrize(
    ("kind", "field", "most"),
    [
        (ChatRequest, "n", 16),
        (ChatRequest, "top_logprobs", 20),
        (CompletionRequest, "n", 16),
        (CompletionRequest, "logprobs", 5),
    ],
)
def test_numbers_have_bounds_of_their_own(kind, field, most):
    given = {"model": "a", "prompt": "b"}
    if kind is ChatRequest:
        given = {"model": "a", "messages": [{"role": "user", "content": "b"}], "logprobs": True}
    assert getattr(kind(**given | {field: most}), field) == most
    with pytest.raises(ValueError, match=f"less than or equal to {most}"):
        kind(**given | {field: most + 1})


def test_salts_are_fields():
    body = ChatRequest(
        model="a", messages=[{"role": "user", "content": "b"}], cache_salt="c", prompt_cache_key="d"
    )
    assert (body.cache_salt, body.prompt_cache_key) == ("c", "d")
    assert not body.options().keys() & {"cache_salt", "prompt_cache_key"}
