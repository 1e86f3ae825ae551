"""What is answered, or refused, before the model runs; the engine is not started."""

import asyncio
import gzip
import json
import logging

import pytest
from starlette.testclient import TestClient

from mlx_diffgemma.cli.serve_options import host_names
from mlx_diffgemma.serving.app import Settings, create_app
from mlx_diffgemma.serving.settings import LOCAL
from tests.helpers.engines import Refusing
from tests.helpers.images import picture

ASKED = {"model": "nano", "messages": [{"role": "user", "content": "a"}]}
FAR = {
    "Access-Control-Request-Private-Network": "true",
    "Access-Control-Request-Method": "POST",
    "Origin": "http://page.example",
}


@pytest.fixture(scope="module")
def engine(nano_pair):
    return Refusing(nano_pair)


@pytest.fixture
def client(engine):
    settings = Settings(
        "nano",
        allowed_origins=["http://page.example"],
        allowed_hosts=[*LOCAL, "testserver"],
        max_prompt_tokens=1000,
    )
    with TestClient(create_app(engine, settings)) as client:
        yield client


def test_a_client_that_leaves_while_it_sends(engine, caplog):
    """It is answered 499, which nobody reads, and leaves one line in the log, no traceback."""
    app = create_app(engine, Settings("nano", allowed_hosts=()))
    headers = [
        (b"host", b"127.0.0.1"),
        (b"content-type", b"application/json"),
        (b"content-length", b"100"),
    ]
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/chat/completions",
        "raw_path": b"/v1/chat/completions",
        "query_string": b"",
        "headers": headers,
        "client": ("127.0.0.1", 9),
        "server": ("127.0.0.1", 80),
        "scheme": "http",
        "http_version": "1.1",
        "root_path": "",
    }
    messages = iter(
        [
            {"type": "http.request", "body": b'{"model"', "more_body": True},
            {"type": "http.disconnect"},
        ]
    )
    sent = []

    async def receive():
        return next(messages, {"type": "http.disconnect"})

    async def send(message):
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 499
    assert not any(record.exc_info for record in caplog.records)


def test_other_ways_to_call_it(client):
    for path in ("/v1/models", "/models", "/v1/models/", "/models/nano", "/v1/models/nano/"):
        assert client.get(path).status_code == 200, path
    assert client.get("/favicon.ico").status_code == 204
    assert client.get("/models", headers={"Host": "host.docker.internal:8080"}).status_code == 200
    assert client.get("/models", headers={"Host": "evil.example"}).status_code == 400
    for path in (
        "/v1/chat/completions",
        "/chat/completions",
        "/chat/completions/",
        "/v1/chat/completions/",
    ):
        assert client.post(path, json=ASKED).status_code == 503, path
    zipped = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
    assert (
        client.post(
            "/v1/chat/completions",
            content=gzip.compress(json.dumps(ASKED).encode()),
            headers=zipped,
        ).status_code
        == 503
    )
    assert "host.docker.internal" in host_names(list(LOCAL), "127.0.0.1", [])


def test_pages_may_ask_in_a_private_network_where_they_may_ask(client):
    told = client.options("/v1/chat/completions", headers=FAR)
    assert told.headers["access-control-allow-private-network"] == "true"
    other = client.options(
        "/v1/chat/completions", headers={**FAR, "Origin": "http://other.example"}
    )
    assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"model": "nano"}, "messages", "messages"),
        ({**ASKED, "temperature": "x"}, "temperature", "temperature"),
        (
            {**ASKED, "messages": [{"role": "user", "content": "a" * 60_000}]},
            None,
            "60,004 characters",
        ),
        (
            {
                **ASKED,
                "tools": [
                    {
                        "type": "function",
                        "function": {"name": "f", "parameters": {"a": "b" * 10**6}},
                    }
                ],
            },
            None,
            "The parameters of the tools",
        ),
        (
            {
                **ASKED,
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": {"$ref": "http://a/\n"}},
                },
            },
            None,
            "refers to",
        ),
    ],
)
def test_a_refusal_is_one_line_in_the_log(client, caplog, body, param, says):
    with caplog.at_level(logging.WARNING, "mlx_diffgemma"):
        answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert says in lines[0]
    assert (f"param '{param}'" in lines[0]) == (param is not None)
    assert "POST /v1/chat/completions: 400" in lines[0]
    assert "\n" not in lines[0]
    assert len(lines[0]) < 600


def test_pixels_are_summed_before_anything_is_unpacked(client):
    large = {"type": "image_url", "image_url": {"url": picture(9000, 9000)}}
    answer = client.post(
        "/v1/chat/completions",
        json={**ASKED, "messages": [{"role": "user", "content": [large] * 8}]},
    )
    assert answer.status_code == 400
    assert "100,000,000 pixels together" in answer.json()["error"]["message"]


def test_prefixes_are_apart_by_key_and_salt(client, engine):
    def scope(headers=None, **more):
        client.post("/v1/chat/completions", json={**ASKED, **more}, headers=headers or {})
        return engine.job.scope

    scopes = [
        scope(),
        scope({"Authorization": "Bearer a"}),
        scope({"Authorization": "Bearer b"}),
        scope(cache_salt="a"),
        scope(prompt_cache_key="a"),
        scope(cache_salt="b"),
        scope({"x-api-key": "c"}, cache_salt="b"),
    ]
    assert len(set(scopes)) == len(scopes)
    assert scope({"x-api-key": "a"}) == scopes[1]
    assert scope(cache_salt="b") == scopes[5]
    assert engine.job.client == "testclient"


def test_bodies_are_in_the_document(client):
    document = client.get("/openapi.json").json()
    for route, name in (
        ("chat/completions", "ChatRequest"),
        ("completions", "CompletionRequest"),
        ("decisions", "DecisionRequest"),
    ):
        body = document["paths"][f"/v1/{route}"]["post"]["requestBody"]["content"][
            "application/json"
        ]["schema"]
        assert body == {"$ref": f"#/components/schemas/{name}"}
        assert "model" in document["components"]["schemas"][name]["properties"]
    text = json.dumps(document)
    names = set(document["components"]["schemas"])
    assert {part.partition('"')[0] for part in text.split("#/components/schemas/")[1:]} <= names
