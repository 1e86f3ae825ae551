"""The built-in model is versioned data: its files, its card and everything made from it must agree."""

import json
import random
import re

import mlx.core as mx
import pytest

from mlx_diffgemma import nano
from mlx_diffgemma.checkpoint.info import inspect
from mlx_diffgemma.diagnostics import golden
from mlx_diffgemma.evaluation.nano_stories import NARROW_STAGES, story_score
from mlx_diffgemma.evaluation.nano_tasks import TASKS, draw, held_out_examples
from mlx_diffgemma.model.config import FULL, SLIDING, ModelConfig
from mlx_diffgemma.safetensors import read_header
from tests.helpers.deferred import Reference

CARD = (nano.FOLDER / "README.md").read_text(encoding="utf-8")


class TestVersion:
    def test_the_hash_is_that_of_the_weights(self):
        assert golden.sha256(nano.FOLDER / "model.safetensors") == nano.SHA256

    def test_golden_outputs_are_of_these_weights(self):
        assert golden.load().model_sha256 == nano.SHA256

    def test_the_card_names_it(self):
        assert nano.VERSION in CARD
        assert nano.SHA256 in CARD

    def test_results_are_of_this_version(self):
        results = list((nano.FOLDER.parents[2] / "bench" / "results").glob("nano-*.json"))
        assert results
        for path in results:
            if path.name.startswith(nano.VISION):
                continue  # of another model, see test_nano_vision
            assert json.loads(path.read_text())["model"] == nano.VERSION, path.name

    def test_scores_in_the_card_are_those_measured(self):
        folder = nano.FOLDER.parents[2] / "bench" / "results"
        for mode in ("diffusion", "ar"):
            for result in json.loads((folder / f"nano-evaluate-{mode}.json").read_text())[
                "results"
            ]:
                row = next(
                    line for line in CARD.splitlines() if line.startswith(f"| {result['task']} |")
                )
                assert f"{result['score']:.1%}" in row


class TestContract:
    CONFIG = ModelConfig.from_folder(nano.FOLDER)

    def test_size(self):
        assert sum(p.stat().st_size for p in nano.FOLDER.iterdir()) < 8e6

    def test_shape(self):
        text = self.CONFIG.text
        assert self.CONFIG.canvas_length == 64
        assert [layer.kind for layer in text.layers] == [SLIDING] * 5 + [FULL]
        assert text.layers[0].window <= 64
        assert text.num_experts >= 8
        assert text.top_k_experts >= 2
        assert text.vocab_size <= 2048

    def test_share_of_the_head(self):
        info = inspect(nano.FOLDER)
        head = self.CONFIG.text.vocab_size * self.CONFIG.text.hidden_size
        assert head / info.active <= 0.15

    def test_released_layout(self):
        raw = json.loads((nano.FOLDER / "config.json").read_text())
        assert raw["vision_config"] is None
        assert "global_head_dim" in raw["text_config"]
        assert "per_layer_config" not in raw["text_config"]
        generation = json.loads((nano.FOLDER / "generation_config.json").read_text())
        assert generation["confidence_threshold"] == 0.005
        assert generation["stability_threshold"] == 1

    def test_stored_dtype_is_the_cards(self):
        header = read_header(nano.FOLDER / "model.safetensors")
        assert {tensor.dtype for tensor in header.values()} == {"BF16"}
        assert "bfloat16" in CARD

    def test_the_modes_have_their_own_layer_scalars(self, nano_pair):
        trunk = nano_pair[0].model
        for layer, encoder in zip(trunk.decoder.layers, trunk.encoder.language_model.layers):
            assert not mx.array_equal(layer.layer_scalar, encoder.layer_scalar)

    def test_transformers_loads_and_runs_it(self):
        reference = Reference(nano.FOLDER)
        assert reference.model.generation_config.sampler_config.entropy_bound == 0.1

    def test_the_trainer_computes_what_the_reference_computes(self):
        """The trainer's fused forward over [sequence ; canvas] against the shipped model run in two
        modes.
        """
        import numpy as np
        import torch
        from safetensors.torch import load_file
        from train_nano import HIDDEN, Network

        from mlx_diffgemma.checkpoint.loading import load_model
        from mlx_diffgemma.model.cache import Cache

        weights = {k: v.float() for k, v in load_file(nano.FOLDER / "model.safetensors").items()}
        rng = np.random.default_rng(0)
        ids, canvas = rng.integers(20, 1000, 90), rng.integers(0, 1024, 32)
        soft = rng.normal(size=(1, 32, HIDDEN)).astype(np.float32)
        network = Network(weights)
        with torch.no_grad():
            sequence, denoised, _ = network(
                torch.tensor(ids)[None],
                torch.tensor(canvas)[None],
                torch.tensor([80]),
                torch.tensor(soft),
            )
            causal, logits = network.head(sequence)[0].numpy(), network.head(denoised)[0].numpy()
        model = load_model(nano.FOLDER, "float32")
        cache = Cache(model.config.text)
        ours = model.encode([mx.array(ids[:80])], [cache], logits="all").logits[0]
        np.testing.assert_allclose(np.array(ours), causal[:80], atol=2e-4)
        ours = model.denoise(mx.array(canvas[None]), [cache], mx.array(soft)).logits[0]
        np.testing.assert_allclose(np.array(ours), logits, atol=2e-4)


class TestTasks:
    @pytest.mark.parametrize("task", TASKS.values(), ids=lambda t: t.name)
    def test_right_answers_score_one_and_others_do_not(self, task):
        for example in held_out_examples(task, 50, seed=9):
            assert task.score(example.answer, example) == 1
            assert task.score(f" {example.answer}\n", example) == 1
            assert task.score(example.answer + " x", example) < 1
            assert task.score("", example) == 0

    @pytest.mark.parametrize("task", TASKS.values(), ids=lambda t: t.name)
    @pytest.mark.parametrize("wide", [False, True])
    def test_no_held_out_input_is_ever_drawn_for_training(self, task, wide):
        rng = random.Random(0)
        held_out = {e.key for e in held_out_examples(task, 500)}
        assert not any(
            draw(task, rng, held_out=False, wide=wide).key in held_out for _ in range(2000)
        )

    @pytest.mark.parametrize("task", TASKS.values(), ids=lambda t: t.name)
    def test_five_hundred_distinct_inputs(self, task):
        examples = held_out_examples(task, 500)
        assert len({e.key for e in examples}) == 500
        assert all(e.held_out for e in examples)
        assert examples == held_out_examples(task, 500)

    def test_addition_holds_out_both_orders(self):
        for e in held_out_examples(TASKS["add"], 100):
            a, b = map(int, re.findall(r"\d+", e.prompt))
            assert e.key == f"{min(a, b)} {max(a, b)}"

    def test_a_story_about_another_hero_scores_less(self):
        first, second = held_out_examples(TASKS["story"], 2)
        assert story_score(second.answer, first) < 0.5

    def test_a_story_that_contradicts_itself_scores_less(self):
        example = held_out_examples(TASKS["story"], 1)[0]
        sentences = example.answer.split(". ")
        assert story_score(". ".join([*sentences[:2], *sentences[4:], sentences[3]]), example) < 1

    def test_a_story_without_a_required_stage_scores_nothing(self):
        example = held_out_examples(TASKS["story"], 1)[0]
        assert story_score(example.answer[: len(example.answer) // 2], example) == 0

    def test_stories_need_several_canvases(self, nano_pair):
        lengths = [
            len(nano_pair[1].encode(e.answer)) for e in held_out_examples(TASKS["story"], 50)
        ]
        assert min(lengths) > 64
        assert len(NARROW_STAGES) == 10

    def test_no_sudoku(self):
        assert not any("sudoku" in name for name in TASKS)
