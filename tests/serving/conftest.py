import openai
import pytest

from tests.serving.process import serving


@pytest.fixture(scope="session")
def server(nano_pair):
    dtype = str(nano_pair[0].dtype).removeprefix("mlx.core.")  # a process of its own knows nothing of --as-gpu
    with serving("--max-batch", "8", "--max-body", "1000000", "--dtype", dtype) as (url, _):
        yield url


@pytest.fixture(scope="session")
def client(server):
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=300)
