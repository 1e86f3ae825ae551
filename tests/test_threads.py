"""What is loaded on one thread serves another, and a fork is refused: MLX's streams belong to a
thread.
"""

import multiprocessing
import threading

import mlx.core as mx
import numpy as np
import pytest

from drafter.head import TargetHead
from mlx_diffgemma import device, generate, stream_generate
from mlx_diffgemma.checkpoint.convert import convert
from mlx_diffgemma.checkpoint.loading import load_model
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.model.cache import Cache
from mlx_diffgemma.tuning.adapters import AdapterOptions, load_adapter, prepare, put_weights
from tests.checkpoints import make_checkpoint
from tests.drafter.drafters import random_drafter

IDS = [5, 9, 17, 3, 8, 41, 7]


def elsewhere(function, *arguments):
    """What ``function`` returns or raises on a thread of its own."""
    results, failures = [], []

    def work():
        try:
            results.append(function(*arguments))
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return results[0]


@pytest.fixture(scope="module")
def sighted_folder(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("sighted"), vision="plain")


@pytest.mark.parametrize("name", ["tiny", "divisible", "packed"])
def test_a_model_that_was_loaded_elsewhere(name, tiny_folder, divisible_folder, tmp_path):
    folder = {"tiny": tiny_folder, "divisible": divisible_folder}.get(name) or convert(
        str(divisible_folder), tmp_path / "packed", recipe="4bit"
    )
    model = elsewhere(load_model, folder, "float32")
    cache = Cache(model.config.text)
    model.encode([mx.array(IDS)], [cache])
    out = model.denoise(mx.zeros((1, model.config.canvas_length), dtype=mx.int32), [cache]).logits
    assert np.isfinite(np.array(out)).all()


def test_the_tower_is_read_on_any_thread(sighted_folder):
    model = elsewhere(load_model, sighted_folder, "float32")
    patches = mx.array(np.random.default_rng(0).random((36, 48), dtype=np.float32))
    mx.eval(patches)

    def see():
        return np.array(model.encode_image(patches, (6, 6)))

    seen = [elsewhere(see), elsewhere(see), see()]
    assert np.isfinite(seen[0]).all()
    assert all((own == seen[0]).all() for own in seen[1:])


def test_two_threads_that_see_the_first_image_together(sighted_folder):
    model = load_model(sighted_folder, "float32")
    patches, seen = np.random.default_rng(0).random((36, 48), dtype=np.float32), []
    threads = [
        threading.Thread(
            target=lambda: seen.append(np.array(model.encode_image(mx.array(patches), (6, 6))))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 4
    assert all((own == seen[0]).all() for own in seen)


def test_the_tower_stays_unread_until_the_first_image(tmp_path):
    wide = dict(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,
        patch_size=4,
        pooling_kernel_size=3,
        position_embedding_size=256,
        standardize=True,
    )
    folder = make_checkpoint(tmp_path, vision=wide)
    mx.synchronize()
    before = mx.get_active_memory()
    model = load_model(folder, "float32")
    loaded = mx.get_active_memory() - before
    model.encode_image(mx.zeros((36, 48)), (6, 6))
    assert mx.get_active_memory() - before > loaded + 15e6


def test_a_cache_that_was_loaded_elsewhere(tiny, tmp_path):
    cache = Cache(tiny.config.text)
    tiny.encode([mx.array(IDS)], [cache])
    cache.save(tmp_path / "cache.safetensors")
    loaded, _ = elsewhere(Cache.load, tmp_path / "cache.safetensors", tiny.config.text)
    assert all(np.isfinite(np.array(entries)).all() for entries in loaded.arrays)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_made_elsewhere(divisible_folder, kind):
    model = load_model(divisible_folder, "float32")
    elsewhere(prepare, model, AdapterOptions(kind, num_layers=-1))
    out = model.encode([mx.array(IDS)], [Cache(model.config.text)]).hidden[0]
    assert np.isfinite(np.array(out)).all()


def test_adapter_weights_put_in_elsewhere(tiny, tmp_path):
    name = "model.decoder.norm.weight"
    model = type(tiny)(tiny.config)
    places = {name: tiny.model.decoder.norm.weight}

    def put():
        put_weights(model, places, {name: mx.ones(places[name].shape) * 2}, tmp_path)

    elsewhere(put)
    assert (np.array(model.model.decoder.norm.weight) == 2).all()
    assert load_adapter.__module__ == put_weights.__module__, (
        "which is the only way weights of an adapter come in"
    )


def test_a_head_of_some_rows_made_elsewhere(tiny):
    head = elsewhere(TargetHead, tiny, random_drafter(tiny, head_size=40))
    assert np.isfinite(np.array(head.logits(mx.zeros((2, tiny.config.text.hidden_size))))).all()


@pytest.mark.parametrize("mode", ["diffusion", "ar"])
def test_a_stream_that_changes_threads(random_pair, mode):
    """As web frameworks take generators: each answer from whichever thread is free."""
    options = {
        "max_tokens": 40,
        "seed": 0,
        "mode": mode,
        **({"max_denoising_steps": 4} if mode == "diffusion" else {}),
    }
    stream = stream_generate(*random_pair, IDS, **options)
    tokens, logprobs = [], []
    while (response := elsewhere(next, stream, None)) is not None:
        tokens += response.tokens
        logprobs += np.array(response.logprobs).flatten().tolist()
    assert len(tokens) > 16, "more than one canvas, so that the thread changes within the answer"
    whole = [
        token
        for response in stream_generate(*random_pair, IDS, **options)
        for token in response.tokens
    ]
    assert tokens == whole
    assert np.isfinite(logprobs).all()


def test_steps_are_read_on_any_thread(random_pair):
    steps = []
    elsewhere(
        lambda: generate(
            *random_pair, IDS, max_tokens=8, max_denoising_steps=3, seed=0, on_step=steps.append
        )
    )
    for step in steps:
        for array in (step.canvas, step.argmax, step.accepted, step.entropy, step.logprob):
            assert np.array(array).shape == (16,)


def forked(function):
    """The sentence with which ``function`` was refused in a fork of this process, within 20
    seconds.
    """
    fork = multiprocessing.get_context("fork")
    mine, theirs = fork.Pipe()

    def work():
        try:
            function()
            theirs.send("nothing was refused")
        except UserError as error:
            theirs.send(str(error))

    child = fork.Process(target=work, daemon=True)
    child.start()
    said = mine.recv() if mine.poll(20) else "it hangs"
    child.kill()
    child.join()
    return said


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_after_loading_is_refused(tiny, tiny_folder):
    ids = mx.array(IDS)
    for use in (
        lambda: tiny.encode([ids], [Cache(tiny.config.text)]),
        lambda: tiny.encode_image(None, (6, 6)),
        lambda: load_model(tiny_folder),
    ):
        assert "does not survive a fork; start it with multiprocessing's 'spawn' method" in forked(
            use
        )


def test_a_fork_before_loading_may_load(monkeypatch):
    monkeypatch.setattr(device, "_process", type(device._process)())
    device._process.owner = None
    device.claim_process()
    device.claim_process()
    monkeypatch.setattr(device.os, "getpid", lambda: -1)
    with pytest.raises(UserError, match="was forked from one that has loaded a model"):
        device.claim_process()
