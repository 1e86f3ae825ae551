import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager

import httpx
import openai
import pytest


@contextmanager
def serving(*options, env=None):
    """The address of a server of nano that really runs, told by its own first line."""
    command = [sys.executable, "-c", "from mlx_diffgemma.cli import main; main()", "serve", "--port", "0", "--log-level", "warning",
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


@pytest.fixture(scope="session")
def server():
    with serving("--max-batch", "8", "--max-body", "1000000") as (url, _):
        yield url


@pytest.fixture(scope="session")
def client(server):
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=300)
