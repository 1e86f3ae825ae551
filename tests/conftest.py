import mlx.core as mx
import pytest

from mlx_diffgemma import load
from mlx_diffgemma.weights import load_model
from tests.checkpoints import make_checkpoint


@pytest.fixture(scope="session")
def nano_pair():
    """(model, tokenizer) of the built-in model; tests only read them."""
    return load("nano")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("tiny"), calm=False)


@pytest.fixture(scope="session")
def divisible_folder(tmp_path_factory):
    """A random model whose rows groups of 64 divide, float32 in two files."""
    return make_checkpoint(tmp_path_factory.mktemp("divisible"), "divisible")


@pytest.fixture(scope="session")
def tiny(tiny_folder):
    """A random lively model of six layers; window 16, canvas 24, 301 tokens."""
    model = load_model(tiny_folder, "float32")
    mx.eval(model.parameters())
    return model
