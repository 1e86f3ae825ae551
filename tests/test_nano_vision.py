"""The built-in model with eyes: its files and card agree, it answers, and others load it."""

import gc
import json
import random

import mlx.core as mx
import numpy as np
import pytest
import sentencepiece
from nano_vision_card import card

from mlx_diffgemma import batch_generate, chat_ids, convert, load, nano, user_message
from mlx_diffgemma.checkpoint.loading import load_model
from mlx_diffgemma.diagnostics import golden
from mlx_diffgemma.diagnostics.forwards import compare_images
from mlx_diffgemma.diagnostics.parity import default_images
from mlx_diffgemma.evaluation import pictures
from mlx_diffgemma.evaluation.tasks import tasks_named
from mlx_diffgemma.media.prompt import expand_image_tokens, prepare_media
from mlx_diffgemma.safetensors import read_headers
from tests.helpers.deferred import Reference
from tests.variants import few

FOLDER = nano.FOLDERS[nano.VISION]
RESULTS = nano.FOLDER.parents[2] / "bench" / "results"


@pytest.fixture(scope="module")
def sighted():
    return load(nano.VISION)


class TestVersion:
    def test_the_hash_is_that_of_the_weights(self):
        assert golden.sha256(FOLDER / "model.safetensors") == nano.VISION_SHA256

    def test_the_card_is_made_from_the_results(self):
        assert card(RESULTS) == (FOLDER / "README.md").read_text(encoding="utf-8")

    def test_the_tokenizer_is_nanos(self):
        for name in (
            "tokenizer.json",
            "tokenizer.model",
            "tokenizer_config.json",
            "chat_template.jinja",
        ):
            assert (FOLDER / name).read_bytes() == (nano.FOLDER / name).read_bytes()

    def test_it_is_small(self):
        assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 7e6

    def test_the_backbone_has_nanos_names(self):
        own, text = (set(read_headers(folder)) for folder in (FOLDER, nano.FOLDER))
        assert own - text == {name for name in own if "vision" in name}
        assert text < own


def test_it_was_trained_on_prompts_as_the_template_writes_them(sighted):
    from train_nano_vision import Recipe, picture_batch

    model, tokenizer = sighted
    encode = sentencepiece.SentencePieceProcessor(model_file=str(FOLDER / "tokenizer.model")).encode
    for kind in pictures.KINDS:
        _, batch, *_ = picture_batch(encode, random.Random(3), Recipe(batch=4), kind)
        rng = random.Random(3)
        ratio = rng.choice(pictures.RATIOS)
        rng.choices((16, 64), (0.7, 0.3))
        picture = pictures.draw(rng, False, kind, ratio)
        task = next(t for t in tasks_named("pictures") if t.name == f"pictures-{kind}")
        media = (
            type(task.questions(1)[0].images[0])(picture.images, picture.seconds)
            if picture.seconds
            else None
        )
        images = prepare_media([media] if media else picture.images, model.config)
        asked = chat_ids(tokenizer, [user_message(picture.question, len(images))])
        ids, _ = expand_image_tokens(asked, images, model.config.image_tokens, tokenizer)
        assert ids == batch["ids"][0, : batch["starts"][0]].tolist()


@pytest.mark.parametrize(("limit", "wanted"), few([(1, 0.75), (4, 0.8), (24, 0.85)], (1, 0.75)))
def test_it_answers_questions_about_held_out_pictures(sighted, limit, wanted):
    """The first questions of the evaluation whose figures are on the card, of every kind; every
    second is about a pair it has never seen.  Of 5 one may be wrong, of 20 three, of 120 17: the
    card says 92 %.
    """
    model, tokenizer = sighted
    questions = [question for task in tasks_named("pictures") for question in task.questions(limit)]
    prompts = [chat_ids(tokenizer, question.messages) for question in questions]
    images = [question.images for question in questions]
    answers = batch_generate(
        model, tokenizer, prompts, images=images, seeds=range(len(prompts)), max_tokens=64
    )
    right = [
        question.mark(answer.text).score
        for question, answer in zip(questions, answers, strict=True)
    ]
    assert np.mean(right) > wanted


def test_held_out_pairs_are_never_drawn_for_training():
    rng = random.Random(0)
    for number in range(400):
        picture = pictures.draw(
            rng, number % 2 == 1, pictures.KINDS[number % 5], pictures.RATIOS[number % 5]
        )
        assert any(thing.is_held_out for thing in picture.things) == (number % 2 == 1)


def test_the_picture_decides(sighted):
    model, tokenizer = sighted
    rng = random.Random(1)
    a, b = (pictures.draw(rng, False, "one", (8, 8)) for _ in range(2))
    prompt = chat_ids(tokenizer, [user_message("What is in the picture?", 1)])
    answers = batch_generate(
        model, tokenizer, [prompt, prompt], images=[a.images, b.images], seed=0, max_tokens=64
    )
    assert answers[0].text != answers[1].text


@pytest.mark.slow
def test_parity(sighted):
    """Trained weights, stage by stage against transformers, on noise.

    Not on drawings: MLX's own BLAS adds up the 1,728 values of a patch one by one, and where all
    are alike its error is 2.4e-5 in one row in a hundred, as large as the bound.
    """
    model, _ = sighted
    for stage in compare_images(model, Reference(FOLDER), default_images(model)):
        assert stage.ok, stage


def test_mlx_vlm_sees_the_same(tmp_path):
    """In float32 on both sides."""
    from mlx_vlm import utils as vlm

    folder = convert(nano.VISION, tmp_path / "out", dtype="float32")
    model, theirs = load_model(folder), vlm.load_model(folder)
    (image,) = prepare_media(
        pictures.draw(random.Random(0), False, "one", (7, 9)).images, model.config
    )
    encoder = theirs.model.encoder
    soft = encoder.vision_tower(mx.array(image.patches)[None], mx.array(image.positions)[None])
    assert (
        mx.abs(
            encoder.embed_vision(soft)[0] - model.encode_image(mx.array(image.patches), image.grid)
        ).max()
        < 1e-3
    )


def test_eyes_are_opened_by_the_first_image():
    """Loading reads nothing of the tower."""
    gc.collect()
    before = mx.get_active_memory()
    model, _ = load(nano.VISION, dtype="float32")
    gc.collect()
    held = mx.get_active_memory() - before
    tower = sum(
        tensor.nbytes * 2 for name, tensor in read_headers(FOLDER).items() if "vision" in name
    )  # bf16 to float32
    whole = sum(tensor.nbytes * 2 for tensor in read_headers(FOLDER).values())
    assert held <= whole - tower + 100_000
    mx.eval(model.parameters())
    assert mx.get_active_memory() - before - held >= tower - 100_000


def test_results_are_of_this_version():
    for name in ("nano-vision-evaluate", "nano-vision-training"):
        assert json.loads((RESULTS / f"{name}.json").read_text())["model"] == nano.VISION_VERSION
