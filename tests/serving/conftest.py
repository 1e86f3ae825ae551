import mlx.core as mx
import openai
import pytest

from mlx_diffgemma.checkpoint.loading import load_model
from mlx_diffgemma.serving.settings import LOCAL, Settings
from tests.serving.process import threaded


def client_of(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)


@pytest.fixture(scope="package")
def server(nano_pair):
    """The address of a server of nano."""
    with threaded(nano_pair, Settings("nano", allowed_hosts=LOCAL, max_body=1_000_000)) as url:
        yield url


@pytest.fixture(scope="package")
def client(server):
    return client_of(server)


@pytest.fixture(scope="package")
def quick_pair(random_pair, random_folder, nano_pair):
    """``random_pair`` in the dtype of this pass."""
    dtype = nano_pair[0].dtype
    if dtype == random_pair[0].dtype:
        return random_pair
    model = load_model(random_folder, str(dtype).removeprefix("mlx.core."))
    mx.eval(model.parameters())
    return model, nano_pair[1]


@pytest.fixture(scope="package")
def quick_server(quick_pair):
    """The address of a server of ``quick_pair``, under nano's name: for what does not depend on
    what is answered.
    """
    with threaded(quick_pair, Settings("nano", allowed_hosts=LOCAL, max_body=1_000_000)) as url:
        yield url


@pytest.fixture(scope="package")
def quick_client(quick_server):
    return client_of(quick_server)
