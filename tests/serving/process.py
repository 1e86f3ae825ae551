"""Servers: in a process of their own, and in threads of this process."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import httpx
import uvicorn

from mlx_diffgemma.serving.app import create_app
from mlx_diffgemma.serving.connections import protocol
from mlx_diffgemma.serving.engine import Engine
from tests.helpers.command import COMMAND, WITHOUT_TORCH


@contextmanager
def threaded(pair, settings, **options):
    """The address of a server of ``pair``, with ``options`` of its engine, in threads of this
    process: it imports and loads nothing.
    """
    engine = Engine(lambda: pair, **options)
    engine.start()
    listening = socket.create_server(("127.0.0.1", 0))  # from here on requests wait in its queue
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(engine, settings),
            log_level="warning",
            http=protocol(),
            timeout_graceful_shutdown=2,
        )
    )
    http = threading.Thread(
        target=server.run, kwargs={"sockets": [listening]}, name="http", daemon=True
    )
    http.start()
    try:
        yield "http://{}:{}".format(*listening.getsockname())
    finally:
        engine.close()
        server.should_exit = True
        http.join(60)
        assert not http.is_alive()


@contextmanager
def serving(*options, env=None, program=None):
    """(address, process) of a server of nano in a process of its own, which names its address in
    its first line.
    """
    start = [*COMMAND] if program is None else [sys.executable, "-c", WITHOUT_TORCH + program]
    command = [
        *start,
        "serve",
        "--port",
        "0",
        "--log-level",
        "warning",
        *options,
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, **(env or {})}
    )
    try:
        url = re.search(r"http://127[.]0[.]0[.]1:[0-9]+", process.stdout.readline())[0]
        while True:  # until it listens
            try:
                httpx.get(f"{url}/health")
                break
            except httpx.ConnectError:
                assert process.poll() is None
        yield url, process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        process.stdout.close()


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.05)
