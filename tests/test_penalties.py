"""Penalties and biases: what they do to logits, and that they do nothing where they are neutral."""

import json
import warnings

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.sample_utils import make_logits_processors

from mlx_diffgemma import batch_generate, stream_generate
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.generation.options import PENALTIES, GenerationOptions
from mlx_diffgemma.sampling.penalties import Penalties
from mlx_diffgemma.sampling.policy import ReferencePolicy
from mlx_diffgemma.serving.protocols.openai_chat import ChatRequest
from tests.helpers.in_process import run as command
from tests.helpers.ruled import NUMBERS, plain, run, session

WORDS = 12
END = 11
LOGITS = np.random.default_rng(0).normal(0, 3, (4, WORDS)).astype(np.float32)
ALL = {
    "repetition_penalty": 1.3,
    "frequency_penalty": 0.5,
    "presence_penalty": 0.25,
    "logit_bias": {"5": 3, "7": -100},
}


def adjusted(penalties, prompt=(), answer=(), canvas=None, logits=LOGITS):
    canvas = None if canvas is None else mx.array(canvas)
    return np.array(penalties.after(prompt, answer, [END], WORDS).adjust(mx.array(logits), canvas))


class TestMeaning:
    @pytest.mark.parametrize(
        "options",
        [
            {"repetition_penalty": 1.7},
            {"frequency_penalty": 0.6},
            {"presence_penalty": -0.4},
            {"logit_bias": {3: 2.0, 8: -100.0}},
            {
                "logit_bias": {3: 2.0},
                "repetition_penalty": 0.8,
                "presence_penalty": 1.0,
                "frequency_penalty": 0.3,
            },
        ],
    )
    def test_as_mlx_lm_s(self, options):
        """Of an answer without a prompt, as mlx-lm counts the prompt for all of them."""
        answer, logits = [3, 4, 3, 9, 3], mx.array(LOGITS[:1])
        for process in make_logits_processors(
            **options,
            repetition_context_size=99,
            presence_context_size=99,
            frequency_context_size=99,
        ):
            logits = process(mx.array(answer), logits)
        own = GenerationOptions(**options).penalties
        np.testing.assert_allclose(
            adjusted(own, answer=answer, logits=LOGITS[:1]), np.array(logits), rtol=1e-6, atol=1e-6
        )

    def test_the_prompt_counts_for_repetition_alone(self):
        own = Penalties(frequency=1.0, presence=1.0)
        assert (adjusted(own, prompt=[3, 4]) == LOGITS).all()
        changed = adjusted(Penalties(repetition=2.0), prompt=[3, 4]) != LOGITS
        assert changed.any(axis=0).nonzero()[0].tolist() == [3, 4]

    def test_a_position_sees_what_stands_to_its_left(self):
        found = LOGITS - adjusted(Penalties(frequency=0.5), answer=[2], canvas=[3, 3, 2, 5])
        expected = np.zeros((4, WORDS))
        expected[:, 2] = 0.5
        expected[1:, 3] = 0.5
        expected[2:, 3] = 1.0
        expected[3, 2] = 1.0
        np.testing.assert_allclose(found, expected, atol=1e-6)

    def test_presence_counts_once(self):
        found = LOGITS - adjusted(Penalties(presence=0.5), canvas=[3, 3, 3, 3])
        np.testing.assert_allclose(found[:, 3], [0, 0.5, 0.5, 0.5], atol=1e-6)

    def test_end_tokens_are_never_counted(self):
        own = Penalties(repetition=1.5, frequency=0.5, presence=0.5)
        found = adjusted(own, prompt=[END], answer=[END], canvas=[END] * 4)
        assert (found == LOGITS).all()


class TestCanvas:
    POLICY = ReferencePolicy(**NUMBERS, penalties=GenerationOptions(**ALL).penalties, min_p=0.05)

    def test_neutral_values_are_none(self, tiny):
        neutral = {
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "frequency_penalty": 0.0,
            "presence_penalty": -0.0,
            "logit_bias": {},
        }
        for mode in ("diffusion", "ar"):
            assert GenerationOptions(**neutral, mode=mode).penalties is None
        assert GenerationOptions(**neutral).policy(tiny) == GenerationOptions().policy(tiny)

    def test_a_row_is_the_same_in_a_batch(self, tiny):
        policies = [
            self.POLICY,
            ReferencePolicy(**NUMBERS),
            ReferencePolicy(**NUMBERS, penalties=Penalties(frequency=1.0)),
        ]
        together = run(
            tiny,
            *(session(tiny, row, policy, max_tokens=24) for row, policy in enumerate(policies)),
        )
        for row, policy in enumerate(policies):
            assert plain(run(tiny, session(tiny, row, policy, max_tokens=24))[0]) == plain(
                together[row]
            )

    def test_they_change_what_is_said(self, tiny):
        without = run(tiny, session(tiny, 0, ReferencePolicy(**NUMBERS), max_tokens=24))[0]
        for one in (
            {"repetition_penalty": 1.3},
            {"frequency_penalty": 1.5},
            {"presence_penalty": 1.5},
            {"logit_bias": {9: 50}},
        ):
            policy = ReferencePolicy(**NUMBERS, penalties=GenerationOptions(**one).penalties)
            assert plain(run(tiny, session(tiny, 0, policy, max_tokens=24))[0]) != plain(without), (
                one
            )

    def test_a_banned_token_never_comes_and_a_wanted_one_always(self, tiny):
        free = run(tiny, session(tiny, 0, ReferencePolicy(**NUMBERS), max_tokens=24))[0]
        banned = int(np.bincount(np.array(free[-1].argmax)).argmax())
        policy = ReferencePolicy(**NUMBERS, penalties=Penalties(bias=((banned, -100.0),)))
        steps = run(tiny, session(tiny, 0, policy, max_tokens=24))[0]
        assert not any(banned in step.argmax.tolist() for step in steps)
        policy = ReferencePolicy(**NUMBERS, penalties=Penalties(bias=((9, 100.0),)))
        assert set(run(tiny, session(tiny, 0, policy, max_tokens=24))[0][-1].argmax.tolist()) == {9}

    def test_the_next_canvas_counts_the_one_before(self, tiny):
        one = session(
            tiny, 0, ReferencePolicy(**NUMBERS, penalties=Penalties(frequency=1.0)), eos=()
        )
        run(tiny, one)
        first, second = (canvas.tokens for canvas in one.canvases)
        one.open_canvas()
        said = np.bincount(np.concatenate((first, second)), minlength=301)
        np.testing.assert_array_equal(np.array(one.canvas.adjustment.counts), said)


class TestGenerate:
    def test_a_constraint_is_kept_to(self, random_pair):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            text = "".join(
                part.text
                for part in stream_generate(
                    *random_pair,
                    "fox",
                    regex="[ab]{6}",
                    seed=0,
                    max_tokens=16,
                    max_denoising_steps=3,
                    **ALL,
                )
            )
        assert len(text) == 6
        assert set(text) <= {"a", "b"}

    @pytest.mark.parametrize(
        "options",
        [
            {"repetition_penalty": 1.5},
            {"frequency_penalty": 2.0},
            {"logit_bias": {9: 100}},
            {"temperature": 0.8, "min_p": 0.5},
        ],
    )
    def test_left_to_right(self, random_pair, options):
        given = {"mode": "ar", "max_tokens": 12, "seed": 0}
        together = batch_generate(*random_pair, ["fox", "owl"], **given, **options)
        for prompt, answer in zip(["fox", "owl"], together):
            alone = [
                part.token for part in stream_generate(*random_pair, prompt, **given, **options)
            ]
            assert alone == list(answer.tokens)
        if "frequency_penalty" in options:
            free = batch_generate(*random_pair, ["fox"], **given)[0].tokens
            assert len(set(together[0].tokens)) > len(set(free))

    def test_a_drafter_is_refused(self, random_pair):
        for mode in ("ar", "diffusion"):
            with pytest.raises(UserError, match="draft_model knows nothing of penalties"):
                stream_generate(
                    *random_pair, "fox", draft_model=object(), mode=mode, frequency_penalty=1.0
                )


class TestOptions:
    @pytest.mark.parametrize(
        "options",
        [
            {"min_p": -0.1},
            {"min_p": 1.1},
            {"repetition_penalty": 0},
            {"repetition_penalty": 11},
            {"frequency_penalty": 2.1},
            {"presence_penalty": float("nan")},
            {"logit_bias": {"fox": 1}},
            {"logit_bias": {1: 101}},
            {"logit_bias": {-1: 1}},
            {"logit_bias": [1]},
            {"logit_bias": {1: "x"}},
            {"logit_bias": {True: 1}},
            {"logit_bias": {1: float("nan")}},
        ],
    )
    def test_out_of_range(self, options):
        with pytest.raises(UserError, match=next(iter(options))):
            GenerationOptions(**options)

    def test_tokens_of_another_model(self, tiny):
        with pytest.raises(UserError, match="300"):
            GenerationOptions(logit_bias={301: 1}).policy(tiny)

    def test_of_requests(self):
        body = ChatRequest.model_validate(
            {"model": "nano", "messages": [{"role": "user", "content": "x"}], "min_p": 0.1, **ALL}
        )
        assert body.options() == {"min_p": 0.1, **ALL}
        assert body.notes == []

    def test_on_the_command_line(self, monkeypatch, capsys):
        code, out, _ = command(
            monkeypatch,
            capsys,
            "generate",
            "-p",
            "Add 12 and 30.",
            "--logit-bias",
            '{"300": 100}',
            "--min-p",
            "0.1",
            "--repetition-penalty",
            "1.1",
            "-m",
            "3",
            "--max-denoising-steps",
            "2",
            "--json",
        )
        assert code == 0
        assert json.loads(out.splitlines()[-1])["tokens"] == [300, 300, 300]
        for wrong in ("[1]", "{", '{"fox": 1}'):
            code, _, err = command(
                monkeypatch, capsys, "generate", "-p", "x", "--logit-bias", wrong
            )
            assert (code, err.count("\n")) == (2, 1)
        assert set(PENALTIES) <= set(GenerationOptions.__dataclass_fields__)
