"""Prompts with images: where they stand, how they are read, and that nothing but they decides what
is read.
"""

import gc
import json
import weakref
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma import batch_generate, chat_ids, generate, load, stream_generate, user_message
from mlx_diffgemma.checkpoint.loading import load_model
from mlx_diffgemma.decoding.loop import Loop
from mlx_diffgemma.decoding.prefill import prefill
from mlx_diffgemma.decoding.prompt_cache import PromptCache
from mlx_diffgemma.decoding.session import Session
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.evaluation.pictures import draw
from mlx_diffgemma.generation import request
from mlx_diffgemma.generation.chat import Chat
from mlx_diffgemma.media.images import Image
from mlx_diffgemma.media.prompt import (
    cache_key,
    embed_inputs,
    expand_image_tokens,
    next_chunk,
    prepare_media,
)
from mlx_diffgemma.media.video import Film, Video
from mlx_diffgemma.model import attention as attention_module
from mlx_diffgemma.model import layers
from mlx_diffgemma.model.cache import Cache
from mlx_diffgemma.sampling.draws import Draws
from mlx_diffgemma.sampling.policy import ReferencePolicy
from tests.checkpoints import VISIONS, make_checkpoint
from tests.helpers.images import noise, prompt_of, small
from tests.variants import few

QUESTION = "What colour is it?"


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """A random lively model of window 16 with a tower; an image is four times as long as the
    window.
    """
    return load_model(
        make_checkpoint(tmp_path_factory.mktemp("seeing"), calm=False, vision="plain"), "float32"
    )


@pytest.fixture(scope="module")
def sighted():
    return load("nano-vision")


class TestPlaces:
    def test_every_image_between_its_marks(self, sighted):
        model, tokenizer = sighted
        images = prepare_media([noise(0), noise(1, 30, 300)], model.config)
        ids = chat_ids(tokenizer, [user_message("What?", 2)])
        whole, placed = expand_image_tokens(ids, images, model.config.image_tokens, tokenizer)
        assert [p.image for p in placed] == images
        for p in placed:
            assert whole[p.start - 1] == 16
            assert set(whole[p.start : p.stop]) == {18}
            assert whole[p.stop] == 17
        assert [t for t in whole if t not in (16, 17, 18)] == [t for t in ids if t != 18]

    def test_a_film_tells_its_times(self, sighted):
        """As the reference's processor writes a video, with the image token in place of the video
        token.
        """
        model, tokenizer = sighted
        frames = tuple(small(model, i) for i in range(3))
        ids, placed = expand_image_tokens(
            chat_ids(tokenizer, [user_message("What?", 1)]),
            [Film(frames, (0.0, 1.04, 61.0))],
            model.config.image_tokens,
            tokenizer,
        )
        one = f"<|image>{'<|image|>' * frames[0].soft_tokens}<image|>"
        text = f"<|turn>user\n00:00 {one} 00:01 {one} 01:01 {one}What?<turn|>\n<|turn>model\n"
        assert ids == tokenizer.encode(tokenizer.bos_token + text, add_special_tokens=False)
        assert len(placed) == 3

    @pytest.mark.parametrize(("markers", "images"), [(0, 1), (1, 0), (2, 1), (1, 3)])
    def test_as_many_markers_as_images(self, sighted, markers, images):
        model, tokenizer = sighted
        with pytest.raises(
            UserError, match=rf"{markers} image marker\(s\) and {images} image\(s\)"
        ):
            stream_generate(
                model,
                tokenizer,
                chat_ids(tokenizer, [user_message("What?", markers)]),
                images=[noise(0)] * images,
            )

    def test_without_eyes(self, nano_pair):
        model, tokenizer = nano_pair
        with pytest.raises(UserError, match="has no vision weights"):
            generate(
                model, tokenizer, chat_ids(tokenizer, [user_message("What?", 1)]), images=[noise(0)]
            )

    def test_without_image_tokens(self, seeing):
        with pytest.raises(UserError, match="must name boi_token_id"):
            prepare_media([noise(0)], replace(seeing.config, image_tokens=None))

    def test_a_text_that_names_the_marker(self, nano_pair):
        """Without eyes it is text like any other."""
        model, tokenizer = nano_pair
        prompt = chat_ids(tokenizer, [user_message("What is <|image|>?")])
        assert next(stream_generate(model, tokenizer, prompt, mode="ar", max_tokens=2)).tokens

    def test_a_tower_that_was_left_out(self, tmp_path):
        """Its config names one, its files hold none: a model without eyes."""
        folder = make_checkpoint(tmp_path)
        raw = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(raw | {"vision_config": VISIONS["plain"]}))
        config = load_model(folder).config
        assert (config.vision, config.image_tokens) == (None, None)

    @pytest.mark.parametrize(
        "images",
        ["cat.png", b"cat", noise(0), Video("cat.mp4"), Path("cat.png")],
        ids=lambda images: type(images).__name__,
    )
    def test_one_image_in_place_of_a_list(self, sighted, images):
        model, tokenizer = sighted
        prompt = chat_ids(tokenizer, [user_message("What?", 1)])
        for call in (
            lambda: generate(model, tokenizer, prompt, images=images),
            lambda: batch_generate(model, tokenizer, [prompt], images=images),
            lambda: batch_generate(model, tokenizer, [prompt], images=[images]),
            lambda: list(Chat(model, tokenizer).send("What?", images=images)),
        ):
            with pytest.raises(UserError, match=r"give a list, images=\[…\]"):
                call()

    def test_prepared_for_another_model(self, seeing, sighted):
        model, tokenizer = sighted
        prompt, own = chat_ids(tokenizer, [user_message("What?", 1)]), small(model, 0)
        longer = Image(np.zeros((2 * 24, 24 * 258, 3), np.uint8), 24, 2)
        for image in (small(seeing, 0), Image(own.pixels, own.patch_size, 1), longer):
            for medium in (image, Film((own, image), (0.0, 1.0))):
                with pytest.raises(UserError, match="prepared for another model"):
                    generate(model, tokenizer, prompt, images=[medium])

    def test_in_raw_text(self, sighted):
        """--ignore-chat-template: markers are part of the text."""
        model, tokenizer = sighted
        options = dict(images=[noise(0)], mode="ar", max_tokens=8)
        written = generate(
            model, tokenizer, chat_ids(tokenizer, [user_message("What?", 1)]), **options
        )
        assert (
            generate(
                model, tokenizer, "<|turn>user\n<|image|>What?<turn|>\n<|turn>model\n", **options
            )
            == written
        )

    def test_one_list_a_prompt(self, sighted):
        model, tokenizer = sighted
        with pytest.raises(UserError, match="one list a prompt: got 1 for 2"):
            batch_generate(model, tokenizer, ["a", "b"], images=[[]])


class TestChunks:
    def cuts(self, size, total, *ranges):
        class Fake:
            def __init__(self, start, stop):
                self.start, self.stop = start, stop

        found, start = [], 0
        while start < total:
            count = next_chunk(total - start, start, [Fake(*r) for r in ranges], size)
            found.append(count)
            start += count
        return found

    def test_text_alone(self):
        assert self.cuts(4, 13) == [4, 4, 5]
        assert self.cuts(4, 12) == [4, 4, 4]

    def test_an_image_is_never_split(self):
        assert self.cuts(4, 20, (6, 9)) == [4, 2, 4, 4, 4, 2]
        assert self.cuts(4, 20, (3, 12)) == [3, 9, 4, 4]
        assert self.cuts(4, 20, (1, 12)) == [12, 4, 4], "the row before it would be alone"
        assert self.cuts(4, 20, (0, 12)) == [12, 4, 4]

    def test_a_single_row_at_the_end_joins(self):
        assert self.cuts(4, 13, (3, 12)) == [3, 10]

    @pytest.mark.parametrize("size", few([2, 3, 7, 16, 33, 64, 100], 2, 7, 33, 100))
    def test_the_size_does_not_show(self, seeing, size):
        ids, placed = prompt_of(
            seeing,
            5,
            small(seeing, 0),
            9,
            small(seeing, 1, 3),
            small(seeing, 2, 1),
            40,
            small(seeing, 3, 20),
            2,
        )
        whole, pieces = Cache(seeing.config.text), Cache(seeing.config.text)
        x, blocks = embed_inputs(seeing, ids, 0, placed)
        seeing.encode([x], [whole], blocks=[blocks])
        chunks = 0
        while pieces.length < len(ids):
            start = pieces.length
            stop = start + next_chunk(len(ids) - start, start, placed, size)
            x, blocks = embed_inputs(seeing, ids[start:stop], start, placed)
            seeing.encode([x], [pieces], blocks=[blocks])
            chunks += 1
        assert chunks > 1
        assert all(mx.array_equal(a, b) for a, b in zip(whole.arrays, pieces.arrays, strict=True))
        canvas = mx.array(np.random.default_rng(1).integers(1, 300, (1, 24)))
        assert mx.array_equal(
            seeing.denoise(canvas, [whole]).logits, seeing.denoise(canvas, [pieces]).logits
        )

    @pytest.mark.parametrize("scores", [1, 4 * 100 * 5, 4 * 100 * 23])
    def test_few_rows_at_a_time_do_not_show(self, seeing, monkeypatch, scores):
        """Nor is a mask ever as large as the whole prompt."""
        ids, placed = prompt_of(seeing, 5, small(seeing, 0), 40, small(seeing, 1, 20), 30)
        x, blocks = embed_inputs(seeing, ids, 0, placed)
        whole = seeing.encode([x], [Cache(seeing.config.text)], blocks=[blocks]).hidden[0]
        sizes, make = [], attention_module.block_mask
        monkeypatch.setattr(layers, "SCORES", scores)
        monkeypatch.setattr(
            attention_module,
            "block_mask",
            lambda *args: sizes.append(make(*args).size) or make(*args),
        )
        parts = seeing.encode([x], [Cache(seeing.config.text)], blocks=[blocks]).hidden[0]
        assert mx.array_equal(whole, parts)
        assert max(sizes) <= max(scores / 4, 3 * len(ids)) + 2 * len(ids)

    def test_images_are_seen_both_ways_in_every_layer_alike(self, seeing):
        """A change at an image's end shows at its begin, and not before it."""
        first, second = small(seeing, 0), small(seeing, 0)
        changed = second.pixels.copy()
        changed[-1, -1] ^= 255
        hidden = []
        for image in (first, Image(changed, second.patch_size, second.side)):
            ids, placed = prompt_of(seeing, 4, image, 3)
            x, blocks = embed_inputs(seeing, ids, 0, placed)
            assert blocks == [(placed[0].start, placed[0].stop)], "the tower alone mixes them, too"
            hidden.append(
                seeing.encode([x], [Cache(seeing.config.text)], blocks=[blocks]).hidden[0]
            )
        assert mx.array_equal(hidden[0][:5], hidden[1][:5])
        assert mx.abs(hidden[0] - hidden[1]).max(axis=-1)[5:].min() > 1e-4


def session(model, seed, parts, cache=None):
    ids, placed = prompt_of(model, *parts)
    return Session(
        model,
        ids,
        ReferencePolicy.from_config(model.config.generation),
        Draws(seed, 301),
        (1,),
        48,
        prompt_cache=cache,
        images=placed,
    )


def run(model, sessions, chunk=2048):
    loop = Loop(model, sessions, chunk)
    while loop.active:
        loop.advance()
    return [[canvas.tokens.tolist() for canvas in s.canvases] for s in sessions]


class TestSessions:
    def test_a_batch_equals_alone(self, seeing):
        parts = [(5, small(seeing, 0), 3), (20,), (small(seeing, 1, 9), small(seeing, 2, 2), 7)]
        together = run(seeing, [session(seeing, i, p) for i, p in enumerate(parts)], chunk=11)
        assert together == [run(seeing, [session(seeing, i, p)])[0] for i, p in enumerate(parts)]

    def test_the_image_decides(self, seeing):
        a, b = (run(seeing, [session(seeing, 0, (5, small(seeing, i), 3))]) for i in range(2))
        assert a != b

    @pytest.mark.slow
    def test_the_cache_knows_images_apart(self, seeing):
        cache = PromptCache(seeing)
        parts = [(5, small(seeing, 0), 3), (5, small(seeing, 1), 3), (5, small(seeing, 1), 3, 8)]
        for part, reused in zip(
            parts, (0, 0, 5 + small(seeing, 1).soft_tokens + 2 + 3), strict=True
        ):
            assert run(seeing, [session(seeing, 0, part, cache)]) == run(
                seeing, [session(seeing, 0, part)]
            )
            assert cache.reused == reused

    def test_a_saved_cache_knows_them_too(self, seeing, sighted, tmp_path):
        _, tokenizer = sighted
        cache = PromptCache(seeing)
        asked = session(seeing, 0, (5, small(seeing, 0), 3), cache)
        prefill(seeing, [asked], 2048)
        asked.encoded()
        cache.save(tmp_path / "cache", tokenizer)
        for seed, reused in ((1, False), (0, True)):
            loaded = PromptCache.load(tmp_path / "cache", seeing, tokenizer)
            run(seeing, [session(seeing, 0, (5, small(seeing, seed), 3, 6), loaded)])
            assert (loaded.reused > 0) == reused

    def test_keys(self, seeing):
        ids, placed = prompt_of(seeing, 2, small(seeing, 0, 4), 2)
        keys = cache_key(ids, placed)
        assert [k for k in keys if k >= 0] == ids[:3] + ids[7:]
        assert keys != cache_key(*prompt_of(seeing, 2, small(seeing, 1, 4), 2))

    def test_one_image_in_memory_at_a_time(self, seeing, monkeypatch):
        """A chunk with many images holds of the tower no more than one of them needs."""
        seen = []
        encode = type(seeing).encode_image

        def spy(model, patches, grid):
            seen.append(mx.get_active_memory())
            return encode(model, patches, grid)

        monkeypatch.setattr(type(seeing), "encode_image", spy)
        prefill(
            seeing, [session(seeing, 0, (3, *(small(seeing, i) for i in range(10)), 3))], 100_000
        )
        assert len(seen) == 10
        one = small(seeing, 0)
        inner = len(one.patches) * 4 * (one.patches.shape[1] + 24 * 10)
        assert max(seen) - seen[0] < inner + 10 * one.soft_tokens * 64 * 4 + 100_000

    def test_a_cache_reads_little_of_the_tower(self, tmp_path):
        """And still tells two towers apart where images were read."""

        def made(seed):
            folder = make_checkpoint(tmp_path / str(seed), calm=False, vision="plain")
            if seed:
                path = folder / "model-00002-of-00002.safetensors"
                tensors = mx.load(str(path))
                name = "model.encoder.vision_tower.encoder.layers.2.input_layernorm.weight"
                path = path if name in tensors else folder / "model-00001-of-00002.safetensors"
                tensors = dict(mx.load(str(path)))
                mx.save_safetensors(
                    str(path), {**tensors, name: tensors[name] + 1}, {"format": "pt"}
                )
            return load_model(folder, "float32")

        models = [made(0), made(1)]
        gc.collect()
        before = mx.get_active_memory()
        caches = [PromptCache(model) for model in models]
        assert caches[0].model_id == caches[1].model_id
        assert mx.get_active_memory() - before < 10_000, "the table of positions alone has 650 kB"
        for cache in caches:
            cache.ids = [5, -7, -7]  # an image
        assert caches[0].model_id != caches[1].model_id


class TestFrontEnds:
    def test_left_to_right_with_images(self, sighted):
        """Chunks of the causal mode's prefill do not show, nor does a batch."""
        model, tokenizer = sighted
        prompts = [chat_ids(tokenizer, [user_message(QUESTION, 1)])] * 2
        options = dict(mode="ar", max_tokens=12)
        whole = [
            generate(model, tokenizer, prompt, images=[noise(i)], **options)
            for i, prompt in enumerate(prompts)
        ]
        chunked = [
            generate(model, tokenizer, prompt, images=[noise(i)], prefill_step_size=7, **options)
            for i, prompt in enumerate(prompts)
        ]
        together = batch_generate(
            model, tokenizer, prompts, images=[[noise(0)], [noise(1)]], **options
        )
        assert whole == chunked == [answer.text for answer in together]

    @pytest.mark.filterwarnings("ignore::mlx_diffgemma.GenerationWarning")
    def test_a_long_batch_holds_the_images_of_running_answers(self, sighted, monkeypatch, tmp_path):
        model, tokenizer = sighted
        prompts = [chat_ids(tokenizer, [user_message(QUESTION, 1)])] * 5
        for number in range(5):
            noise(number).save(tmp_path / f"{number}.png")
        sources = [[tmp_path / f"{number}.png"] for number in range(5)]
        made, held = weakref.WeakSet(), []

        def spy(*arguments):
            made.update(images := prepare_media(*arguments))
            held.append(len(made))
            return images

        for mode in ({"max_denoising_steps": 2, "canvas_length": 8}, {"mode": "ar"}):
            options = dict(images=sources, seeds=range(5), max_tokens=8, **mode)
            whole = batch_generate(model, tokenizer, prompts, batch_size=5, **options)
            monkeypatch.setattr(request, "prepare_media", spy)
            parts = batch_generate(model, tokenizer, prompts, batch_size=2, **options)
            monkeypatch.undo()
            assert [answer.text for answer in parts] == [answer.text for answer in whole]
            assert len(held) == 10
            assert max(held) <= 4, "of two that run and two that end"
            held.clear()

    def test_a_batch_refuses_before_it_answers(self, sighted, monkeypatch, tmp_path):
        model, tokenizer = sighted
        prompts = [chat_ids(tokenizer, [user_message(QUESTION, 1)])] * 3
        path = tmp_path / "0.png"
        noise(0).save(path)
        options = dict(
            batch_size=1, mode="ar", max_tokens=2, on_answer=lambda *_: noise(1, 300, 20).save(path)
        )
        with pytest.raises(UserError, match="changed after the batch began"):
            batch_generate(model, tokenizer, prompts, images=[[path]] * 3, **options)
        monkeypatch.setattr(
            type(model), "encode", lambda *a, **k: pytest.fail("something was computed")
        )
        with pytest.raises(UserError, match="There is no image"):
            batch_generate(
                model, tokenizer, prompts, images=[[path], [path], ["gone.png"]], **options
            )

    def test_image_tokens(self, sighted):
        model, tokenizer = sighted
        prompt = chat_ids(tokenizer, [user_message(QUESTION, 1)])
        options = dict(images=[noise(0, 200, 200)], max_tokens=1, mode="ar")
        counts = [
            next(
                iter(stream_generate(model, tokenizer, prompt, image_tokens=tokens, **options))
            ).prompt_tokens
            - len(prompt)
            for tokens in (None, 70, 140)
        ]
        assert counts == [
            65,
            65,
            122,
        ]  # 8 x 8 and 11 x 11, begin and end in the place of the marker
        with pytest.raises(UserError, match="got 100"):
            stream_generate(model, tokenizer, prompt, images=[noise(0)], image_tokens=100)

    def test_a_conversation_keeps_its_images(self, sighted):
        import random

        model, tokenizer = sighted
        picture = draw(random.Random(5), False, "one", (8, 8))
        chat = Chat(model, tokenizer, seed=0, max_tokens=64)
        first = "".join(r.text for r in chat.send("What is in the picture?", images=picture.images))
        assert first == generate(
            model,
            tokenizer,
            chat_ids(tokenizer, [user_message("What is in the picture?", 1)]),
            images=picture.images,
            seed=0,
            max_tokens=64,
        )
        encoded = chat.stats.encoded
        list(chat.send(QUESTION))
        assert chat.stats.reused >= encoded > 64, "the image is not encoded again"
        messages = [
            user_message("What is in the picture?", 1),
            {"role": "assistant", "content": first},
            {"role": "user", "content": QUESTION},
        ]
        assert chat.messages[-1]["content"] == generate(
            model,
            tokenizer,
            chat_ids(tokenizer, messages),
            images=picture.images,
            seed=1,
            max_tokens=64,
        )
        chat.reset()
        assert not chat.images
