"""Tests whether a normal client still gets its answers from a server under attack.

nano is served on the loopback interface.  A normal client sends requests, first alone and then
together with hostile requests of all kinds: schemas and expressions that are slow to compile,
references that would have to be fetched, texts and pictures that take memory, bodies that arrive
slowly, idle connections, and requests that want all rows.  The result holds the time of the normal
answers, the resident memory of the server and its workers before and after, and the time the server
took to stop.

    python bench/hostile.py --requests 200 --output hostile.json

The normal client runs in a separate process, so that it waits for the server alone.  On Linux
hostile clients have the address 127.0.0.2; elsewhere they have the address of the normal client.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import functools
import http.client
import io
import json
import multiprocessing
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

HOSTILE = "127.0.0.2" if sys.platform == "linux" else "127.0.0.1"
NORMAL = {
    "model": "nano",
    "messages": [{"role": "user", "content": "Add 12 and 30."}],
    "max_tokens": 16,
    "temperature": 0,
    "seed": 1,
}
GRACE = 10
PATIENCE = 4.0  # seconds after which a hostile client hangs up
AT_ONCE = 16  # hostile requests


def constrained(schema: dict[str, Any]) -> dict[str, Any]:
    return {
        **NORMAL,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    }


def doubling(levels: int) -> dict[str, Any]:
    definitions: dict[str, Any] = {
        f"a{n}": {"allOf": [{"$ref": f"#/$defs/a{n + 1}"}] * 2} for n in range(levels)
    }
    return {
        "$defs": {**definitions, f"a{levels}": {"minLength": 3}},
        "enum": ["aaaa"],
        "$ref": "#/$defs/a0",
    }


@functools.cache
def picture() -> str:
    from PIL import Image

    made = io.BytesIO()
    Image.new("1", (9_900, 9_900)).save(made, "PNG")
    return "data:image/png;base64," + base64.b64encode(made.getvalue()).decode()


def bodies() -> dict[str, Callable[[], dict[str, Any]]]:
    """What hostile requests send, by kind."""
    image = picture()
    seen = {"type": "image_url", "image_url": {"url": image}}
    return {
        "backtracking": lambda: constrained({"enum": ["a" * 44 + "!"], "pattern": "^(a+)+$"}),
        "long expression": lambda: {**NORMAL, "regex": "a" * 100_000},
        "slow expression": lambda: {
            **NORMAL,
            "regex": f"(a|b)*a(a|b){{{random.randrange(200, 400)}}}",
        },
        "long list": lambda: constrained({"enum": [f"entry {n}" for n in range(100_000)]}),
        "work that doubles": lambda: constrained(doubling(60)),
        "reference": lambda: constrained({"enum": [1], "$ref": "http://127.0.0.1:9/x"}),
        "large pictures": lambda: {**NORMAL, "messages": [{"role": "user", "content": [seen] * 8}]},
        "long text": lambda: {
            **NORMAL,
            "messages": [{"role": "user", "content": "word " * 4_000_000}],
        },
        "all rows": lambda: {
            **NORMAL,
            "n": 16,
            "max_tokens": 400,
            "temperature": 1,
            "seed": random.randrange(10**6),
        },
        "large metadata": lambda: {
            **NORMAL,
            "max_tokens": 1,
            "metadata": {f"k{n}": ["x"] * 10 for n in range(100_000)},
        },
        "nested": lambda: {**NORMAL, "metadata": nested(900)},
    }


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def post(port: int, body: bytes, source: str, seconds: float) -> int:
    """The status; 0 when none came within ``seconds``."""
    connection = http.client.HTTPConnection(
        "127.0.0.1", port, timeout=seconds, source_address=(source, 0)
    )
    try:
        connection.request(
            "POST", "/v1/chat/completions", body, {"Content-Type": "application/json"}
        )
        response = connection.getresponse()
        response.read()
        return response.status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


def slow_body(port: int) -> int:
    with (
        contextlib.suppress(OSError),
        socket.create_connection(("127.0.0.1", port), PATIENCE, (HOSTILE, 0)) as connection,
    ):
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999\r\n\r\n"
        )
        for _ in range(int(PATIENCE)):
            connection.sendall(b"{")
            time.sleep(1)
    return 0


def idle_connections(port: int, count: int) -> int:
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            with contextlib.suppress(OSError):
                stack.enter_context(
                    socket.create_connection(("127.0.0.1", port), PATIENCE, (HOSTILE, 0))
                )
        time.sleep(1)
    return 0


def resident(process: subprocess.Popen[str]) -> int:
    """Bytes of the server and its workers."""
    told = subprocess.run(
        ["ps", "-A", "-o", "pid=,ppid=,rss="], capture_output=True, text=True, check=True
    )
    rows = [tuple(map(int, line.split())) for line in told.stdout.splitlines()]
    return 1024 * sum(rss for pid, parent, rss in rows if process.pid in (pid, parent))


@contextlib.contextmanager
def serving() -> Iterator[tuple[int, subprocess.Popen[str]]]:
    program = "from mlx_diffgemma.cli import main; main()"
    command = [
        sys.executable,
        "-c",
        program,
        "serve",
        "--port",
        "0",
        "--log-level",
        "error",
        "--grace",
        str(GRACE),
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    try:
        found = re.search(r"http://127\.0\.0\.1:([0-9]+)", process.stdout.readline())
        assert found is not None, "the server did not start"
        port = int(found[1])
        end = time.monotonic() + 120
        while post(port, json.dumps(NORMAL).encode(), "127.0.0.1", 60) != 200:
            assert time.monotonic() < end, "the server answers no normal request"
            time.sleep(0.1)
        yield port, process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


class Flag(Protocol):
    """An event of threads or of processes."""

    def is_set(self) -> bool: ...


def normal_times(port: int, seconds: float, until: Flag | None = None) -> list[float]:
    """Seconds each answer took, for a client that asks again as soon as it is answered."""
    times, end = [], time.monotonic() + seconds
    while time.monotonic() < end and not (until and until.is_set()):
        began = time.monotonic()
        status = post(port, json.dumps(NORMAL).encode(), "127.0.0.1", 120)
        assert status == 200, f"a normal request was answered with {status}"
        times.append(time.monotonic() - began)
    return times


@contextlib.contextmanager
def normal_client(port: int) -> Iterator[list[float]]:
    """The times of a normal client that asks meanwhile; they are there afterwards."""
    context, times = multiprocessing.get_context("spawn"), list[float]()
    over, found = context.Event(), context.Queue()
    client = context.Process(target=_normal_client, args=(port, over, found))
    client.start()
    assert found.get(timeout=60) == [], "the normal client did not start"
    try:
        yield times
    finally:
        over.set()
        times += found.get(timeout=180)
        client.join()


def _normal_client(port: int, over: Flag, found: Any) -> None:
    found.put([])
    found.put(normal_times(port, 600, over))


@functools.cache
def fixed_bodies() -> dict[str, bytes]:
    """Those that are the same each time, ready to be sent."""
    varied = ("slow expression", "all rows")
    return {
        name: json.dumps(make()).encode() for name, make in bodies().items() if name not in varied
    }


def attack(port: int, count: int, seed: int) -> Counter[str]:
    """``count`` hostile requests, AT_ONCE of them side by side; what came of them, by kind and
    status.
    """
    made, kinds, chooser = fixed_bodies(), bodies(), random.Random(seed)
    names = [*kinds, "slow body", "idle connections"]
    left, seen, lock = (
        [names[n % len(names)] for n in range(count)],
        Counter[str](),
        threading.Lock(),
    )
    chooser.shuffle(left)

    def work() -> None:
        while True:
            with lock:
                if not left:
                    return
                name = left.pop()
                body = made.get(name, b"")
                if name in kinds and not body:
                    body = json.dumps(kinds[name]()).encode()
            if name == "slow body":
                status = slow_body(port)
            elif name == "idle connections":
                status = idle_connections(port, 150)
            else:
                status = post(port, body, HOSTILE, PATIENCE)
            with lock:
                seen[f"{name}: {status or 'hung up'}"] += 1

    threads = [threading.Thread(target=work) for _ in range(AT_ONCE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seen


def measured(requests: int, alone_seconds: float, seed: int) -> dict[str, Any]:
    with serving() as (port, process):
        fixed_bodies()
        normal_times(port, 3)
        with normal_client(port) as alone:
            time.sleep(alone_seconds)
        before = resident(process)
        with normal_client(port) as beside:
            began = time.monotonic()
            seen = attack(port, requests, seed)
            lasted = time.monotonic() - began
        time.sleep(2)
        after = resident(process)
        threads = [threading.Thread(target=attack, args=(port, 8, seed + 1)) for _ in range(2)]
        for thread in threads:
            thread.start()
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        told = time.monotonic()
        process.wait(60)
        stopped = time.monotonic() - told
        for thread in threads:
            thread.join()
    typical = statistics.median(alone)
    limit = (
        sorted(beside)[min(len(beside) - 1, int(0.95 * len(beside)))] if beside else float("inf")
    )
    return {
        "requests": requests,
        "seconds": round(lasted, 1),
        "outcomes": dict(sorted(seen.items())),
        "normal alone": {
            "answers": len(alone),
            "median s": round(typical, 3),
            "95 % s": round(sorted(alone)[int(0.95 * len(alone))], 3),
        },
        "normal beside": {
            "answers": len(beside),
            "median s": round(statistics.median(beside), 3),
            "95 % s": round(limit, 3),
        },
        "ratio of the 95 %": round(limit / sorted(alone)[int(0.95 * len(alone))], 2),
        "resident MB": [round(before / 1e6, 1), round(after / 1e6, 1)],
        "resident ratio": round(after / before, 3),
        "stopped after s": round(stopped, 1),
        "grace s": GRACE,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--alone-seconds", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    found = json.dumps(measured(given.requests, given.alone_seconds, given.seed), indent=2)
    print(found)
    if given.output:
        given.output.write_text(found + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
