"""What several test modules read."""

import shutil

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma import load, nano
from mlx_diffgemma.checkpoint.loading import load_model
from tests.checkpoints import FULL, SLIDING, make_checkpoint, write_checkpoint
from tests.helpers.knowing import knowing_target


@pytest.fixture(scope="session")
def nano_pair():
    """(model, tokenizer) of the built-in model; tests only read them."""
    return load("nano")


@pytest.fixture(scope="session")
def nano_float32(nano_pair):
    """``nano_pair`` for bounds and sizes that hold in float32 only, also with ``--as-gpu``."""
    return nano_pair if nano_pair[0].dtype == mx.float32 else load("nano", dtype="float32")


@pytest.fixture(scope="session")
def random_folder(tmp_path_factory, nano_pair):
    """Random weights for nano's tokenizer, with canvases of 16 and a window of 9: a step takes a
    tenth of nano's time.
    """
    shape = dict(
        hidden=32,
        heads=4,
        kv=2,
        head_dim=8,
        global_kv=1,
        global_head_dim=16,
        layers=2,
        window=9,
        canvas=16,
        experts=2,
        top_k=1,
        vocab=nano_pair[0].config.text.vocab_size,
        kinds=[SLIDING, FULL],
    )
    # Unsure ones: what is likeliest position by position seldom fits together.
    unsure = {"model.decoder.norm.weight": np.full(32, 0.4, dtype=np.float32)}
    folder = write_checkpoint(tmp_path_factory.mktemp("random"), shape, calm=False, extra=unsure)
    for path in nano.FOLDER.glob("*token*"):
        shutil.copy(path, folder)
    for name in ("chat_template.jinja", "generation_config.json"):
        shutil.copy(nano.FOLDER / name, folder)
    return folder


@pytest.fixture(scope="session")
def random_pair(random_folder, nano_pair):
    """(model, tokenizer): random weights under nano's tokenizer, for what does not depend on what
    is answered.
    """
    model = load_model(random_folder, "float32")
    mx.eval(model.parameters())
    return model, nano_pair[1]


@pytest.fixture(scope="session")
def knowing_pair(tmp_path_factory, nano_pair):
    """(model, tokenizer): random weights that have a text in mind, under nano's tokenizer."""
    return knowing_target(tmp_path_factory.mktemp("knowing")), nano_pair[1]


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


@pytest.fixture(scope="session", params=["random", pytest.param("nano", marks=pytest.mark.slow)])
def either_pair(request, random_pair, nano_pair):
    """(model, tokenizer): random weights, and nano's in the slow pass."""
    return nano_pair if request.param == "nano" else random_pair
