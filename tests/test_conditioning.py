"""Sparse self-conditioning against dense, position by position."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma.decoding.loop import Loop
from mlx_diffgemma.decoding.session import Session
from mlx_diffgemma.sampling import self_conditioning
from mlx_diffgemma.sampling.draws import Draws
from mlx_diffgemma.sampling.policy import ReferencePolicy
from mlx_diffgemma.sampling.sampler import KEPT, Flag, StepNumbers, sample_step
from mlx_diffgemma.sampling.self_conditioning import BUCKET, dense, soft_embedding
from tests.helpers.beliefs import LENGTH, VOCABULARY, belief, logits_with, no_history
from tests.variants import few


class TestSampler:
    def test_which_positions_are_covered(self):
        found = belief(logits_with(10))
        assert found.uncovered.tolist()[0] == [False] * 10 + [True] * 14
        assert found.counts == [14]
        assert found.kept.shape == (1, LENGTH, KEPT)

    def test_the_tail_decides(self):
        logits = mx.zeros((1, LENGTH, VOCABULARY))  # the kept tokens hold 64 / 301 of the mass
        held = KEPT / VOCABULARY
        assert belief(logits, tail=1 - held + 0.001).counts == [0]
        assert belief(logits, tail=1 - held - 0.001).counts == [LENGTH]


class TestSoftEmbedding:
    @pytest.mark.parametrize("sharp", [0, 1, 10, 23, 24])
    def test_covered_positions_are_close_and_others_exact(self, tiny, sharp):
        logits = logits_with(sharp)
        ours, exact = soft_embedding(tiny, belief(logits)), dense(tiny, logits / 0.7)
        assert mx.abs(ours - exact).max() < 1e-4
        assert mx.array_equal(ours[:, sharp:], exact[:, sharp:]), "uncovered positions are dense"

    def test_a_covered_position_takes_the_kept_tokens_alone(self, tiny):
        """Coverage that everything meets: the mean over 64 tokens, far from the mean over all."""
        logits = logits_with(0)
        ours = soft_embedding(tiny, belief(logits, tail=0.999))
        p = np.exp(np.array(logits[0], dtype=np.float64) / 0.7)
        keep = np.argsort(-p, axis=-1)[:, :KEPT]
        p = np.where((np.arange(VOCABULARY) == keep[..., None]).any(1), p, 0)
        table = np.array(tiny.model.decoder.embed_tokens.weight)
        expected = (p / p.sum(-1, keepdims=True)) @ table * 8.0  # sqrt of the hidden size
        np.testing.assert_allclose(np.array(ours[0]), expected, atol=1e-4)
        assert mx.abs(ours - dense(tiny, logits / 0.7)).max() > 0.01

    def test_rows_do_not_influence_each_other(self, tiny):
        """Other counts, other buckets, one row covered in full: each row as if it were alone."""
        # certain enough to be covered, not so certain that dense would give the same bits
        logits = mx.concatenate(
            [logits_with(sharp, seed, ahead=12) for seed, sharp in enumerate((24, 3, 20))]
        )
        together = soft_embedding(tiny, belief(logits, tail=0.01))
        assert not mx.array_equal(together[0], dense(tiny, logits / 0.7)[0])
        for row in range(3):
            alone = belief(logits[row : row + 1], tail=0.01)
            assert alone.counts == [(0, 21, 4)[row]]
            assert mx.array_equal(together[row : row + 1], soft_embedding(tiny, alone))

    def test_rows_have_their_own_temperatures(self, tiny):
        logits = mx.concatenate([logits_with(20, seed, ahead=12) for seed in range(2)])
        together = belief(logits, tail=0.01)
        together = replace(together, temperature=mx.array([0.7, 0.4]))
        found = soft_embedding(tiny, together)
        for row, temperature in enumerate((0.7, 0.4)):
            expected = dense(tiny, logits[row : row + 1] / temperature)
            uncovered = np.flatnonzero(np.array(together.uncovered[row]))
            assert uncovered.size
            for place in uncovered.tolist():
                assert mx.allclose(found[row, place], expected[0, place], atol=1e-6)

    def test_a_dense_row_beside_a_sparse_one(self, tiny):
        logits = mx.concatenate([logits_with(24), logits_with(24, 1)])
        one = mx.ones((2,))
        numbers = StepNumbers(one * 0.7, one, one, tail=mx.array([-1.0, 1e-6]))
        step = sample_step(
            logits,
            None,
            mx.zeros((2, LENGTH), dtype=mx.int32),
            no_history(2),
            numbers,
            mx.array([1]),
        )
        assert step.flags[:, Flag.UNCOVERED].tolist() == [LENGTH, 0]

    def test_few_shapes_occur(self, tiny, monkeypatch):
        shapes = set()
        real = self_conditioning.dense
        monkeypatch.setattr(
            self_conditioning,
            "dense",
            lambda model, scaled: shapes.add(scaled.shape[0]) or real(model, scaled),
        )
        logits = mx.concatenate([logits_with(20, seed) for seed in range(9)])
        for rows in range(1, 10):
            soft_embedding(tiny, belief(logits[:rows]))
        assert shapes == {8, 16, BUCKET, 2 * BUCKET}

    def test_quantised_tables(self, divisible_folder, tmp_path):
        from mlx_diffgemma.checkpoint.convert import convert
        from mlx_diffgemma.checkpoint.loading import load_model

        for recipe in ("4bit", "mxfp4"):
            model = load_model(convert(str(divisible_folder), tmp_path / recipe, recipe=recipe))
            ids = mx.array([[3, 5, 7]])
            p = mx.array([[0.5, 0.3, 0.2]])
            whole = mx.zeros((1, 320)).at[0, ids[0]].add(p[0])
            assert mx.abs(model.soft_embed(p, ids) - model.soft_embed(whole)).max() < 1e-4


class TestLoop:
    @staticmethod
    def tokens(model, generation, ids, coverage, seed=0):
        policy = ReferencePolicy.from_config(generation, coverage=coverage)
        session = Session(
            model,
            ids,
            policy,
            Draws(seed, model.config.text.vocab_size),
            generation.eos_token_ids,
            max_tokens=1,
        )
        loop = Loop(model, [session])
        while loop.active:
            loop.advance()
        return session.canvases[0].tokens.tolist(), session.canvases[0].steps

    @pytest.mark.parametrize(
        ("text", "seed"),
        few(
            [
                ("Sort these numbers: 42 17 91", 0),
                ("Add 12 and 30.", 1),
                ("Tell me a story about Leo the owl and a map.", 2),
            ],
            ("Sort these numbers: 42 17 91", 0),
            ("Add 12 and 30.", 1),
        ),
    )
    def test_same_ids_as_dense(self, nano_pair, text, seed):
        from mlx_diffgemma import chat_ids

        model, tokenizer = nano_pair
        ids = chat_ids(tokenizer, [{"role": "user", "content": text}])
        generation = model.config.generation
        assert self.tokens(model, generation, ids, 1 - 1e-6, seed) == self.tokens(
            model, generation, ids, None, seed
        )

    def test_the_dense_product_is_left_out_where_everything_is_covered(
        self, nano_pair, monkeypatch
    ):
        from mlx_diffgemma import chat_ids

        model, tokenizer = nano_pair
        taken, real = [], self_conditioning.dense
        monkeypatch.setattr(
            self_conditioning,
            "dense",
            lambda m, scaled: taken.append(scaled.size // 1024) or real(m, scaled),
        )
        ids = chat_ids(tokenizer, [{"role": "user", "content": "Add 12 and 30."}])
        _, steps = self.tokens(model, model.config.generation, ids, 1 - 1e-6)
        assert sum(taken) < 64 * (steps - 1), "fewer positions than the plain path takes"
