"""A server in a process of its own."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import httpx


@contextmanager
def serving(*options, env=None, program="from mlx_diffgemma.cli import main; main()"):
    """The address of a server of nano that really runs, told by its own first line."""
    command = [sys.executable, "-c", program, "serve", "--port", "0", "--log-level", "warning",
               *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **(env or {})})
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
