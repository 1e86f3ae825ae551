"""What a next turn encodes, that nothing else changes, and which files are refused."""

import itertools
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from mlx_diffgemma import PromptCache, chat_ids, generate, nano, stream_generate
from mlx_diffgemma.checkpoint.convert import convert
from mlx_diffgemma.checkpoint.loading import load_model
from mlx_diffgemma.decoding.loop import Loop
from mlx_diffgemma.decoding.prefill import prefill
from mlx_diffgemma.decoding.session import Session
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.model.cache import Cache
from mlx_diffgemma.sampling.draws import Draws
from mlx_diffgemma.sampling.policy import ReferencePolicy
from mlx_diffgemma.tuning.adapters import AdapterOptions, prepare
from tests.checkpoints import make_checkpoint
from tests.helpers.in_process import run
from tests.variants import few

RNG = np.random.default_rng(5)
LONG = RNG.integers(20, 1000, 150).tolist()  # beyond the windows of nano and of random weights


def turn(pair, ids, cache=None, max_denoising_steps=3, **options):
    responses = list(
        stream_generate(
            *pair,
            ids,
            seed=3,
            prompt_cache=cache,
            max_denoising_steps=max_denoising_steps,
            **options,
        )
    )
    return [token for response in responses for token in response.tokens]


def encoded_rows(monkeypatch, model):
    """Counts what is really encoded apart from commits."""
    rows, encode = [], type(model).encode

    def count(self, ids, *arguments, **options):
        rows.append(sum(part.shape[0] for part in ids))
        return encode(self, ids, *arguments, **options)

    monkeypatch.setattr(type(model), "encode", count)
    return rows


class TestReuse:
    def test_a_chat(self, nano_pair, monkeypatch):
        """Two turns: the second encodes what lies behind the first prompt, and answers as without a
        cache.
        """
        model, tokenizer = nano_pair
        rows, cache = encoded_rows(monkeypatch, model), PromptCache(model)
        messages = [{"role": "user", "content": "Add 12 and 30."}]
        first = chat_ids(tokenizer, messages)
        text = generate(*nano_pair, first, seed=1, prompt_cache=cache)
        assert (cache.encoded, cache.reused, rows) == (len(first), 0, [len(first)])
        messages += [
            {"role": "assistant", "content": text},
            {"role": "user", "content": "Add 1 and 2."},
        ]
        second = chat_ids(tokenizer, messages)
        assert second[: len(first)] == first
        with_cache = turn(nano_pair, second, cache)
        assert (cache.encoded, cache.reused) == (len(second) - len(first), len(first))
        assert rows == [len(first), len(second) - len(first)]
        assert with_cache == turn(nano_pair, second)

    def test_a_thought_that_the_history_drops(self, random_pair, monkeypatch):
        """The common prefix ends where the thought began, so the last snapshot before it counts."""
        model, _ = random_pair
        cache, thought = PromptCache(model), LONG[100:120]
        turn(random_pair, LONG[:90], cache, max_tokens=16)
        turn(random_pair, LONG[:90] + LONG[90:100] + thought, cache, max_tokens=16)
        assert cache.reused == 90
        turn(random_pair, LONG[:100] + LONG[130:], cache, max_tokens=16)
        assert (cache.reused, cache.encoded) == (90, 30)

    @pytest.mark.parametrize("shared", few([0, 30, 90, 140], 30, 140))
    def test_identical_past_the_window(self, random_pair, shared):
        cache = PromptCache(random_pair[0])
        for start in range(0, shared, 30):
            turn(random_pair, LONG[: start + 30], cache, max_tokens=16, max_denoising_steps=1)
        ours = turn(random_pair, LONG, cache, max_denoising_steps=2, max_tokens=32)
        assert cache.reused == shared // 30 * 30 + (30 if shared % 30 else 0)
        assert ours == turn(random_pair, LONG, max_denoising_steps=2, max_tokens=32)

    def test_committed_canvases_are_snapshots(self, random_pair):
        model, _ = random_pair
        cache, policy = (
            PromptCache(model),
            ReferencePolicy.from_config(replace(model.config.generation, max_denoising_steps=2)),
        )

        def tokens(ids, length, cache=None):
            """Canvases that no end token cuts short."""
            session = Session(
                model, ids, policy, Draws(0, 1024), (), max_tokens=length, prompt_cache=cache
            )
            loop = Loop(model, [session])
            while loop.active:
                loop.advance()
            return [token for canvas in session.canvases for token in canvas.tokens.tolist()]

        answer = tokens(LONG, 48, cache)
        assert [s.length for s in cache.snapshots] == [150, 166, 182], (
            "the last canvas is not encoded"
        )
        again = LONG + answer + LONG[:9]
        ours = tokens(again, 16, cache)
        assert (cache.reused, cache.encoded) == (182, 16 + 9)
        assert ours == tokens(again, 16)

    def test_the_last_token_may_be_the_one_that_differs(self, random_pair):
        cache = PromptCache(random_pair[0])
        turn(random_pair, LONG, cache, max_tokens=16)
        other = [*LONG[:-1], LONG[-1] + 1]
        assert turn(random_pair, other, cache, max_tokens=16) == turn(
            random_pair, other, max_tokens=16
        )
        assert cache.reused == 0

    def test_the_same_prompt_again_encodes_nothing(self, random_pair):
        cache = PromptCache(random_pair[0])
        first = turn(random_pair, LONG, cache, max_tokens=16)
        assert turn(random_pair, LONG, cache, max_tokens=16) == first
        assert (cache.reused, cache.encoded) == (150, 0)

    def test_never_a_single_token(self, random_pair):
        cache = PromptCache(random_pair[0])
        for end in (100, 120):
            turn(random_pair, LONG[:end], cache, max_tokens=16)
        turn(random_pair, LONG[:121], cache, max_tokens=16)
        assert (cache.reused, cache.encoded) == (100, 21)

    def test_an_answer_that_was_broken_off(self, random_pair):
        cache = PromptCache(random_pair[0])
        stream = stream_generate(
            *random_pair, LONG, seed=3, prompt_cache=cache, max_denoising_steps=2, max_tokens=48
        )
        next(stream)
        stream.close()
        ours = turn(random_pair, LONG + LONG[:20], cache, max_tokens=16)
        assert cache.reused == 150
        assert ours == turn(random_pair, LONG + LONG[:20], max_tokens=16)

    def test_the_budget(self, random_pair):
        cache = PromptCache(random_pair[0], budget=0)
        for end in (80, 100, 120):
            turn(random_pair, LONG[:end], cache, max_tokens=16)
        assert [s.length for s in cache.snapshots] == [120]
        cache = PromptCache(random_pair[0])
        turn(random_pair, LONG[:80], cache, max_tokens=16)
        cache.budget = 2 * cache.snapshots[0].nbytes
        for end in (100, 120):
            turn(random_pair, LONG[:end], cache, max_tokens=16)
        assert [s.length for s in cache.snapshots] == [100, 120], "two of a size, the oldest goes"


class TestTwoAtOnce:
    """Generators taken in turn on one cache say what each says alone."""

    @pytest.mark.parametrize(
        "prompts", [(LONG, LONG), (LONG, LONG[:90] + LONG[100:]), (LONG[:90] + LONG[100:], LONG)]
    )
    def test_in_turn(self, random_pair, prompts):
        cache = PromptCache(random_pair[0])
        turn(
            random_pair, LONG[:90], cache, max_tokens=16, max_denoising_steps=1
        )  # a snapshot that both share

        def stream(ids):
            return stream_generate(
                *random_pair, ids, seed=3, prompt_cache=cache, max_denoising_steps=2, max_tokens=64
            )

        streams = [stream(ids) for ids in prompts]
        found = [[], []]
        for parts in itertools.zip_longest(*streams):
            for tokens, part in zip(found, parts, strict=True):
                tokens += part.tokens if part else []
        assert found == [
            turn(random_pair, ids, max_denoising_steps=2, max_tokens=64) for ids in prompts
        ]

    def test_the_later_one_is_kept(self, random_pair):
        cache = PromptCache(random_pair[0])
        first = stream_generate(
            *random_pair,
            LONG[:90],
            seed=3,
            prompt_cache=cache,
            max_denoising_steps=2,
            max_tokens=64,
        )
        next(first)
        turn(random_pair, LONG[:120], cache, max_tokens=16)
        for _ in first:
            pass
        turn(random_pair, LONG, cache, max_tokens=16)
        assert cache.reused == 120

    def test_who_was_taken_over_from_keeps_nothing_any_more(self, random_pair):
        cache = PromptCache(random_pair[0])

        class Reading:
            finished, pending = False, np.zeros(3)

        first, second = Reading(), Reading()
        own = cache.begin(random_pair[0], LONG[:50], first)
        assert cache.begin(random_pair[0], LONG[50:], second) is not own
        cache.reached(LONG[:50], own)
        assert (cache.ids, cache.snapshots) == ([], [])

    def test_one_after_the_other_copies_nothing(self, random_pair, monkeypatch):
        cache = PromptCache(random_pair[0])
        turn(random_pair, LONG[:90], cache, max_tokens=16)
        monkeypatch.setattr(Cache, "copy", None)
        turn(random_pair, LONG[:120], cache, max_tokens=16)
        assert cache.reused == 90

    def test_nor_does_one_that_has_ended_but_is_still_there(self, random_pair, monkeypatch):
        cache = PromptCache(random_pair[0])
        done = Session.reading(random_pair[0], LONG[:90], prompt_cache=cache)
        prefill(random_pair[0], [done], 2048)
        done.encoded()
        assert cache._is_held() is False
        monkeypatch.setattr(Cache, "copy", None)
        turn(random_pair, LONG[:120], cache, max_tokens=16)
        assert cache.reused == 90
        assert done.finished


def adapted(folder, scale=20.0, seed=0):
    """A model with an adapter on all layers that changes what it computes."""
    model = load_model(folder, "float32")
    mx.random.seed(0)  # where the adapter begins
    prepare(
        model,
        AdapterOptions(num_layers=-1, lora_parameters={"rank": 2, "dropout": 0.0, "scale": scale}),
    )
    found = [
        (
            name,
            mx.random.normal(array.shape, key=mx.random.key(seed))
            if name.endswith("lora_b")
            else array,
        )
        for name, array in tree_flatten(model.trainable_parameters())
    ]
    model.update(tree_unflatten(found))
    model.eval()
    return model


class TestWhoseItIs:
    def test_adapters_on_all_layers(self, random_folder, random_pair, tmp_path):
        model = adapted(random_folder)
        pair = model, random_pair[1]
        cache = PromptCache(model)
        turn(pair, LONG[:90], cache, max_tokens=16)
        cache.save(tmp_path / "c", random_pair[1])
        loaded = PromptCache.load(tmp_path / "c", model, random_pair[1])
        assert turn(pair, LONG, loaded, max_tokens=16) == turn(pair, LONG, max_tokens=16)
        assert loaded.reused == 90

    @pytest.mark.parametrize("change", ["base", "seed", "scale", "one weight", "one layer"])
    def test_another_model_is_refused(self, random_folder, random_pair, tmp_path, change):
        """Whatever makes the keys and values: an adapter, its scale, one number of any layer."""
        tokenizer = random_pair[1]
        model = adapted(random_folder)
        cache = PromptCache(model)
        turn((model, tokenizer), LONG[:90], cache, max_tokens=16, max_denoising_steps=1)
        cache.save(tmp_path / "c", tokenizer)
        if change == "base":
            other = load_model(random_folder, "float32")
        else:
            other = adapted(random_folder, 10.0 if change == "scale" else 20.0, change == "seed")
        if change.startswith("one"):
            layer = other.layers[1 if change == "one layer" else 0]
            layer.experts.down_proj.weight[1, 3, 5] += 0.25
        with pytest.raises(UserError, match="another model, adapter or precision"):
            PromptCache.load(tmp_path / "c", other, tokenizer)
        with pytest.raises(UserError, match="another model"):
            turn((other, tokenizer), LONG, cache)

    def test_the_same_model_loaded_again_is_the_same(self, random_folder, random_pair, tmp_path):
        tokenizer = random_pair[1]
        model, again = load_model(random_folder, "float32"), load_model(random_folder, "float32")
        cache = PromptCache(model)
        turn((model, tokenizer), LONG[:90], cache, max_tokens=16, max_denoising_steps=1)
        cache.save(tmp_path / "c", tokenizer)
        assert PromptCache.load(tmp_path / "c", again, tokenizer).cache.length == 90
        turn((again, tokenizer), LONG, cache, max_tokens=16, max_denoising_steps=1)
        assert cache.reused == 90

    def test_another_quantisation_is_another_model(self, divisible_folder, tmp_path):
        packed = convert(str(divisible_folder), tmp_path / "4bit", recipe="4bit")
        plain = convert(str(packed), tmp_path / "plain", dequantize=True, dtype="float32")
        found = {
            PromptCache(load_model(folder, "float32")).model_id
            for folder in (divisible_folder, packed, plain)
        }
        assert len(found) == 3

    def test_an_earlier_format_is_refused(self, random_pair, tmp_path):
        mx.save_safetensors(
            str(tmp_path / "c.safetensors"),
            {"0.keys": mx.zeros((1,))},
            {"format": "mlx-diffgemma cache 1", "length": "1"},
        )
        with pytest.raises(UserError, match="not a cache file of this version"):
            PromptCache.load(tmp_path / "c.safetensors", *random_pair)

    @pytest.mark.parametrize("ids", ["[1, 2]", "[", '["a"]', "[" * 5000, "{}", ""])
    def test_ids_that_do_not_fit(self, random_pair, tmp_path, ids):
        model, tokenizer = random_pair
        cache = PromptCache(model)
        turn(random_pair, LONG[:90], cache, max_tokens=16, max_denoising_steps=1)
        cache.cache.save(tmp_path / "c", {"model": cache.model_id, "ids": ids})
        with pytest.raises(UserError, match="is damaged|is not valid JSON"):
            PromptCache.load(tmp_path / "c", model, tokenizer)


class TestFile:
    def test_goes_on_in_another_process(self, random_pair, tmp_path):
        model, tokenizer = random_pair
        cache = PromptCache(model)
        turn(random_pair, LONG[:90], cache, max_tokens=16)
        cache.save(tmp_path / "c.safetensors", tokenizer)
        loaded = PromptCache.load(tmp_path / "c.safetensors", model, tokenizer)
        ours = turn(random_pair, LONG, loaded, max_tokens=16)
        assert (loaded.reused, loaded.encoded) == (90, 60)
        assert ours == turn(random_pair, LONG, max_tokens=16)

    def test_refusals(self, nano_pair, tmp_path, tiny):
        model, tokenizer = nano_pair
        path = tmp_path / "c.safetensors"
        with pytest.raises(UserError, match="nothing to save"):
            PromptCache(model).save(path, tokenizer)
        cache = PromptCache(model)
        turn(nano_pair, LONG[:90], cache, max_tokens=64)
        with pytest.raises(UserError, match="cannot be written"):
            cache.save(tmp_path / "no" / "c.safetensors", tokenizer)
        cache.save(path, tokenizer)
        with pytest.raises(UserError, match="another model"):
            PromptCache.load(
                path, load_model(make_checkpoint(tmp_path / "m", "divisible")), tokenizer
            )
        with pytest.raises(UserError, match="another model"):
            PromptCache.load(path, load_model(nano.FOLDER, "float16"), tokenizer)
        with pytest.raises(UserError, match="another model"):
            turn((tiny, tokenizer), [5, 6, 7], cache)

        class Other:
            def get_vocab(self):
                return {"a": 1}

        with pytest.raises(UserError, match="another tokenizer"):
            PromptCache.load(path, model, Other())
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(UserError, match="is not a cache file"):
            PromptCache.load(path, model, tokenizer)
        mx.save_safetensors(str(path), {"a": mx.zeros((1,))})
        with pytest.raises(UserError, match="not a cache file of this version"):
            PromptCache.load(path, model, tokenizer)

    def test_not_with_the_causal_mode(self, nano_pair):
        with pytest.raises(UserError, match="leave it out with mode 'ar'"):
            stream_generate(*nano_pair, "fox", mode="ar", prompt_cache=PromptCache(nano_pair[0]))

    def test_the_command(self, monkeypatch, capsys, tmp_path):
        file = str(tmp_path / "c.safetensors")
        words = ["generate", "--prompt-cache-file", file, "--seed", "1", "--verbose", "-p"]
        for reused, prompt in (
            (0, "Add 12 and 30."),
            (2, "Add 12 and 30."),
            (0, "Is 3 greater than 2?"),
        ):
            code, out, err = run(monkeypatch, capsys, *words, prompt)
            assert code == 0
            assert out == run(monkeypatch, capsys, "generate", "--seed", "1", "-p", prompt)[1]
            assert ("prompt cache: 0 tokens reused" in err) == (reused == 0)
        (tmp_path / "c.safetensors").write_bytes(b"nothing")
        code, _, err = run(monkeypatch, capsys, *words, "fox")
        assert code == 2
        assert "is not a cache file" in err
        code, _, err = run(
            monkeypatch, capsys, "generate", "--prompt-cache-file", "/nowhere/c", "-p", "fox"
        )
        assert (code, "there is no folder /nowhere" in err) == (2, True)
