"""A server that is treated badly: clients that hang up, bodies that are none, prompts that do not
fit.
"""

import contextlib
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hostile
import httpx
import pytest

from mlx_diffgemma.serving.engine import IDLE
from tests.serving.process import serving, until

BUDGET = 3_000_000  # bytes of prefixes, which some forty prompts fill


def resident(process):
    """Bytes, once the server has had no work for so long that it returned what was free."""
    time.sleep(IDLE + 1)
    told = subprocess.run(
        ["ps", "-o", "rss=", "-p", str(process.pid)], capture_output=True, text=True, check=True
    )
    return 1024 * int(told.stdout)


@pytest.mark.slow
def test_a_thousand_requests_leave_it_as_it_was():
    rng = random.Random(0)
    options = [
        "--max-batch",
        "8",
        "--max-queue",
        "16",
        "--prompt-cache-bytes",
        str(BUDGET),
        "--max-body",
        "200000",
    ]
    words, seen = ["Add", "12", "and", "story", "owl", "sort", "猫", "map"], Counter()
    with serving(*options) as (url, server):

        def ask(kind, number):
            text = " ".join(rng.choice(words) for _ in range(rng.randrange(3, 60)))
            body = {
                "model": "nano",
                "messages": [{"role": "user", "content": f"{number} {text}"}],
                "seed": number,
                "max_tokens": rng.choice([4, 40, 100]),
                "max_denoising_steps": rng.choice([1, 2, 4]),
            }
            route = f"{url}/v1/chat/completions"
            with httpx.Client(timeout=120) as http:
                if kind == "plain":
                    return http.post(route, json=body).status_code
                if kind == "constrained":
                    return http.post(
                        route, json={**body, "regex": "[a-z]{3,9}( [a-z]{3,9}){0,2}"}
                    ).status_code
                if kind == "infill":
                    hole = {
                        "prompt": text,
                        "suffix": " and so on.",
                        "max_tokens": 2,
                        "max_denoising_steps": 2,
                    }
                    return http.post(
                        f"{url}/v1/completions", json={"model": "nano", **hole}
                    ).status_code
                if kind == "decide":
                    return http.post(
                        f"{url}/v1/decisions",
                        json={"model": "nano", "messages": body["messages"], "questions": [{}]},
                    ).status_code
                if kind == "hang up":
                    with http.stream(
                        "POST",
                        route,
                        json={
                            **body,
                            "max_tokens": 400,
                            "stream": True,
                            "stream_options": {"include_drafts": True},
                        },
                    ) as response:
                        for _ in zip(range(rng.randrange(1, 5)), response.iter_bytes()):
                            pass
                    return 0
                if kind == "hang up early":
                    with contextlib.suppress(httpx.TimeoutException):
                        http.post(
                            route,
                            json={**body, "max_tokens": 400},
                            timeout=rng.choice([0.01, 0.1, 0.3]),
                        )
                    return 0
                if kind == "too long":
                    return http.post(
                        route,
                        json={**body, "messages": [{"role": "user", "content": "word " * 9000}]},
                    ).status_code
                if kind == "too large":
                    with contextlib.suppress(httpx.TransportError):
                        return http.post(route, content=b"x" * 300_000).status_code
                    return 413
                return http.post(
                    route,
                    content=rng.randbytes(rng.randrange(1, 200)),
                    headers={"Content-Type": "application/json"},
                ).status_code

        kinds = [
            *["plain"] * 9,
            *["hang up", "hang up early"] * 3,
            "constrained",
            "infill",
            "decide",
            "too long",
            "too large",
            "bad",
        ]
        expected = {
            "hang up": {0},
            "hang up early": {0},
            "too long": {400},
            "too large": {413},
            "bad": {400},
        }

        def run(count, begin):
            chosen = [(rng.choice(kinds), begin + place) for place in range(count)]
            with ThreadPoolExecutor(12) as pool:
                for (kind, _), status in zip(chosen, pool.map(lambda one: ask(*one), chosen)):
                    assert status in expected.get(kind, {200}), (kind, status)
                    seen[kind] += 1

        run(250, 0)  # threads and their heaps are all there by then
        until(lambda: httpx.get(f"{url}/health").json()["rows"] == 0)
        figures = dict(
            line.rsplit(" ", 1)
            for line in httpx.get(f"{url}/metrics").text.splitlines()
            if not line.startswith("#")
        )
        assert float(figures["diffgemma_prefix_bytes"]) > 0.8 * BUDGET, (
            "the cache of prefixes is full by now"
        )
        level = resident(server)
        run(950, 250)
        until(
            lambda: (
                httpx.get(f"{url}/health").json()
                == {"status": "ok", "model": "nano", "rows": 0, "waiting": 0}
            )
        )
        figures = dict(
            line.rsplit(" ", 1)
            for line in httpx.get(f"{url}/metrics").text.splitlines()
            if not line.startswith("#")
        )
        reached = resident(server)
        print(
            f"\nresident after 250: {level / 1e6:.1f} MB, after 1,200: {reached / 1e6:.1f} MB; {dict(seen)}"
        )
        assert float(figures['diffgemma_jobs_total{end="failed"}']) == 0
        assert float(figures['diffgemma_jobs_total{end="cancelled"}']) > 100
        assert reached <= 1.05 * level


@pytest.mark.slow
def test_requests_made_from_the_document():
    """Whatever fits the OpenAPI document, and what nearly does, is answered without a 5xx."""
    with serving("--max-tokens", "8", "--max-denoising-steps", "1") as (url, _):
        ran = subprocess.run(
            [
                Path(sys.executable).with_name("schemathesis"),
                "run",
                f"{url}/openapi.json",
                "--seed",
                "1",
                "--checks",
                "not_a_server_error",
                "--max-examples",
                "60",
                "--request-timeout",
                "120",
                "--phases",
                "examples,coverage,fuzzing",
                "--suppress-health-check",
                "all",
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
        assert httpx.get(f"{url}/health").json()["status"] == "ok"


def test_answers_keep_coming_under_attack(quick_server, monkeypatch):
    """A sample of bench/hostile.py: each kind of hostile request twice, beside a normal client."""
    port = httpx.URL(quick_server).port
    monkeypatch.setattr(hostile, "PATIENCE", 1.0)
    over, times = threading.Event(), []
    normal = threading.Thread(target=lambda: times.extend(hostile.normal_times(port, 100, over)))
    normal.start()
    try:
        seen = hostile.attack(port, 26, seed=0)
    finally:
        over.set()
        normal.join()
    assert times, (
        "the normal client had no answer; how fast they come is what bench/hostile.py measures"
    )
    statuses = Counter(kind.rpartition(": ")[2] for kind in seen.elements())
    assert "500" not in statuses
    assert {kind.partition(":")[0] for kind in seen} == {
        *hostile.bodies(),
        "slow body",
        "idle connections",
    }
    with httpx.Client() as http:
        until(lambda: http.get(f"{quick_server}/health").json()["waiting"] == 0)
