"""The front door: options, limits, figures, and one seed one text."""

import warnings

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_diffgemma import (
    GenerationOptions,
    GenerationResponse,
    GenerationWarning,
    UserError,
    batch_generate,
    chat_ids,
    generate,
    load,
    stream_generate,
    user_message,
)
from mlx_diffgemma.decoding.autoregressive import (
    CausalPolicy,
    CausalSession,
    causal_sessions,
    draw_positions,
)
from mlx_diffgemma.generation.limits import token_limit
from mlx_diffgemma.generation.options import REFUSED
from mlx_diffgemma.sampling.draws import Draws
from tests.helpers.scripted import scripted

QUESTIONS = [
    "Add 12 and 30.",
    "Sort these numbers: 42 17 91",
    "Reverse these words: fox moon tree",
    "Write in capitals: fox",
    "Turn this into JSON: Anna is a red fox.",
    "Is 47 greater than 38?",
    "Tell me a story about Leo the owl and a map.",
]

pytestmark = pytest.mark.filterwarnings("ignore::mlx_diffgemma.GenerationWarning")


def prompt(tokenizer, question, **options):
    return chat_ids(tokenizer, [{"role": "user", "content": question}], **options)


@pytest.fixture(scope="module")
def few(either_pair, nano_pair):
    """Options of several canvases, of few steps each: nano is sure sooner or later, random weights
    must be told what is enough.
    """
    return (
        {"max_denoising_steps": 16}
        if either_pair is nano_pair
        else {
            "max_denoising_steps": 8,
            "max_tokens": 40,
            "confidence_threshold": 4.5,
            "stability_threshold": 0,
        }
    )


@pytest.fixture(scope="module")
def expected(either_pair, few):
    """What each question's answer is, asked alone."""
    model, tokenizer = either_pair
    answers = [
        list(stream_generate(model, tokenizer, prompt(tokenizer, q), seed=11, **few))
        for q in QUESTIONS
    ]
    assert max(len(answer) for answer in answers) > 1
    assert len({response.steps for answer in answers for response in answer}) > 1, (
        "rows leave a batch at different steps"
    )
    return answers


class TestSameSeedSameText:
    def test_again_and_in_a_batch(self, either_pair, few, expected):
        model, tokenizer = either_pair
        texts = ["".join(r.text for r in rs) for rs in expected]
        for size in (10**30, 3):
            answers = batch_generate(
                model,
                tokenizer,
                [prompt(tokenizer, q) for q in QUESTIONS],
                seed=11,
                batch_size=size,
                **few,
            )
            assert [a.text for a in answers] == texts
            assert [a.tokens for a in answers] == [
                tuple(t for r in rs for t in r.tokens) for rs in expected
            ]
            assert [a.steps for a in answers] == [sum(r.steps for r in rs) for rs in expected]

    def test_shown_equals_hidden(self, either_pair, few, expected):
        from mlx_diffgemma.cli.live import LiveCanvas

        model, tokenizer = either_pair
        with LiveCanvas(tokenizer, (1, 5, 13)) as live:
            shown = list(
                stream_generate(
                    model,
                    tokenizer,
                    prompt(tokenizer, QUESTIONS[2]),
                    seed=11,
                    on_step=live.show,
                    **few,
                )
            )
        assert [r.tokens for r in shown] == [r.tokens for r in expected[2]]

    def test_whole_equals_streamed(self, either_pair, few, expected):
        model, tokenizer = either_pair
        whole = generate(model, tokenizer, prompt(tokenizer, QUESTIONS[1]), seed=11, **few)
        assert whole == "".join(r.text for r in expected[1])

    def test_another_seed_gives_other_draws(self, random_pair):
        model, tokenizer = random_pair
        story = prompt(tokenizer, QUESTIONS[-1])
        texts = {
            generate(model, tokenizer, story, seed=seed, max_tokens=64, max_denoising_steps=4)
            for seed in range(2)
        }
        assert len(texts) > 1

    def test_no_seed_is_a_fresh_one_and_told(self, random_pair):
        model, tokenizer = random_pair
        seeds = {
            next(
                stream_generate(
                    model, tokenizer, prompt(tokenizer, QUESTIONS[0]), max_denoising_steps=1
                )
            ).seed
            for _ in range(2)
        }
        assert len(seeds) == 2
        zero = stream_generate(
            model, tokenizer, prompt(tokenizer, QUESTIONS[0]), seed=0, max_denoising_steps=1
        )
        assert next(zero).seed == 0, "which is a seed like any other"

    @pytest.mark.slow
    def test_today_or_after_a_hundred_other_requests(self, either_pair, few, expected):
        model, tokenizer = either_pair
        for i in range(100):
            generate(
                model,
                tokenizer,
                prompt(tokenizer, QUESTIONS[i % 6]),
                seed=i,
                max_denoising_steps=4,
                max_tokens=64,
            )
        for question, before in zip(QUESTIONS, expected):
            after = list(
                stream_generate(model, tokenizer, prompt(tokenizer, question), seed=11, **few)
            )
            assert [r.tokens for r in after] == [r.tokens for r in before]


class TestCausalMode:
    def test_batch_equals_alone(self, either_pair):
        model, tokenizer = either_pair
        for temperature in (None, 0.8):
            alone = [
                generate(
                    model,
                    tokenizer,
                    prompt(tokenizer, q),
                    mode="ar",
                    seed=5,
                    temperature=temperature,
                    max_tokens=20,
                )
                for q in QUESTIONS
            ]
            answers = batch_generate(
                model,
                tokenizer,
                [prompt(tokenizer, q) for q in QUESTIONS],
                mode="ar",
                seed=5,
                temperature=temperature,
                max_tokens=20,
            )
            assert [a.text for a in answers] == alone

    def test_rows_of_other_policies_are_drawn_by_their_own(self):
        logits = mx.array([[0.0, 2.0, 1.0]] * 3)
        sessions = [
            CausalSession([], None, CausalPolicy(temperature, top_k), Draws(3, 3), frozenset(), 1)
            for temperature, top_k in ((0.0, 0), (1.0, 0), (1.0, 1))
        ]
        assert Draws(3, 3).step(0, 0, 0, 0, 1).u[0] > 0.76, "which is the last token's share"
        assert draw_positions(logits, sessions, [1, 1, 1]).tolist() == [1, 2, 1]

    def test_greedy_follows_the_next_token_logits(self, random_pair):
        from mlx_diffgemma.model.cache import Cache

        model, tokenizer = random_pair
        ids = prompt(tokenizer, QUESTIONS[4])
        out = [r.token for r in stream_generate(model, tokenizer, ids, mode="ar", max_tokens=12)]
        logits = model.encode(
            [mx.array(ids + out)], [Cache(model.config.text)], logits="all"
        ).logits[0]
        assert np.array(logits.argmax(-1))[len(ids) - 1 : -1].tolist() == out

    def test_one_response_a_token_with_the_whole_row_of_logprobs(self, nano_pair):
        model, tokenizer = nano_pair
        responses = list(
            stream_generate(model, tokenizer, prompt(tokenizer, QUESTIONS[0]), mode="ar")
        )
        assert all(len(r.tokens) == 1 for r in responses)
        assert float(mx.exp(responses[0].logprobs).sum()) == pytest.approx(1, abs=1e-4)
        assert responses[-1].finish_reason == "stop"

    def test_every_position_has_its_own_random_number(self, random_pair):
        """Also in the second block: position p is drawn with u of position p, not with that of the
        block's first token.
        """
        model, _ = random_pair
        policy, draws = CausalPolicy(temperature=1.0), Draws(5, model.config.text.vocab_size)
        (session,) = causal_sessions(model, [[7, 8]], policy, [draws], (), [6])
        flat = mx.zeros((3, model.config.text.vocab_size))
        drawn = []
        for done in (0, 3):
            session.tokens = [0] * done
            drawn += draw_positions(flat, [session], [3]).tolist()
        u = draws.step(0, 0, 0, 0, 6).u
        assert drawn == pytest.approx((u * model.config.text.vocab_size).tolist(), abs=1)
        assert len(set(drawn)) == 6

    def test_options_of_canvases_are_refused(self, nano_pair):
        with pytest.raises(UserError, match="max_denoising_steps has no meaning"):
            stream_generate(*nano_pair, "fox", mode="ar", max_denoising_steps=3)
        with pytest.raises(UserError, match="on_step"):
            stream_generate(*nano_pair, "fox", mode="ar", on_step=print)


class TestFigures:
    def test_fields(self, random_pair):
        model, tokenizer = random_pair
        steps = []
        ids = prompt(tokenizer, QUESTIONS[-1])
        responses = list(
            stream_generate(
                model,
                tokenizer,
                ids,
                seed=3,
                max_denoising_steps=4,
                max_tokens=64,
                on_step=steps.append,
            )
        )
        last = responses[-1]
        assert len(responses) > 1
        assert isinstance(last, GenerationResponse)
        assert sum(r.steps for r in responses) == len(steps)
        assert [r.canvas_index for r in responses] == list(range(len(responses)))
        assert [r.finish_reason for r in responses[:-1]] == [None] * (len(responses) - 1)
        assert last.prompt_tokens == len(ids)
        assert all(len(r.logprobs) == len(r.tokens) for r in responses)
        assert all((r.logprobs <= 1e-6).all() for r in responses)
        assert last.tokens_per_forward == pytest.approx(
            sum(len(r.tokens) for r in responses) / len(steps)
        )
        assert last.peak_memory > 0
        assert not last.from_draft

    def test_the_limit_cuts_the_text(self, random_pair):
        model, tokenizer = random_pair
        ids = prompt(tokenizer, QUESTIONS[-1])
        whole = list(
            stream_generate(model, tokenizer, ids, seed=3, max_denoising_steps=3, max_tokens=64)
        )
        cut = list(
            stream_generate(model, tokenizer, ids, seed=3, max_denoising_steps=3, max_tokens=5)
        )
        assert cut[-1].tokens == whole[0].tokens[:5]
        assert cut[-1].finish_reason == "length"
        assert cut[-1].generation_tokens == 5
        assert cut[-1].tokens_per_forward == whole[0].tokens_per_forward, (
            "counted before the cut, as the reference does"
        )


class TestEndings:
    def run(self, nano_pair, **options):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            out = list(stream_generate(*nano_pair, "fox", seed=0, **options))
        return out, [str(w.message) for w in caught if w.category is GenerationWarning]

    def test_empty(self, nano_pair, monkeypatch):
        scripted(monkeypatch, nano_pair[0], [[5]])
        out, told = self.run(nano_pair)
        assert (out[-1].text, out[-1].finish_reason) == ("", "empty")
        assert "empty" in told[0]

    def test_only_an_empty_thought_is_empty_too(self, nano_pair, monkeypatch):
        thought = nano_pair[1].encode("<|channel>thought\n<channel|>", add_special_tokens=False)
        scripted(monkeypatch, nano_pair[0], [[*thought, 5]])
        assert self.run(nano_pair)[0][-1].finish_reason == "empty"

    def test_unconverged(self, nano_pair, monkeypatch):
        scripted(monkeypatch, nano_pair[0], [[300, 5, 9]])
        out, told = self.run(nano_pair)
        assert not out[-1].converged
        assert "did not converge" in told[0]

    def test_stop_and_length(self, nano_pair, monkeypatch):
        scripted(monkeypatch, nano_pair[0], [[300] * 64, [300, 5]])
        assert [r.finish_reason for r in self.run(nano_pair)[0]] == [None, "stop"]
        scripted(monkeypatch, nano_pair[0], [[300] * 64])
        assert self.run(nano_pair, max_tokens=64)[0][-1].finish_reason == "length"
        scripted(monkeypatch, nano_pair[0], [[300, 300, 5]])
        out, _ = self.run(nano_pair, max_tokens=2)
        assert (out[-1].finish_reason, out[-1].tokens) == ("stop", (300, 300)), (
            "whole, but no place for the end token"
        )
        assert out[-1].generation_tokens == len(out[-1].logprobs) == 2

    def test_closing_early_leaves_nothing_behind(self, nano_pair):
        model, tokenizer = nano_pair
        ids = prompt(tokenizer, QUESTIONS[1])
        expected = generate(model, tokenizer, ids, seed=2, max_denoising_steps=4)
        stream = stream_generate(
            model, tokenizer, prompt(tokenizer, QUESTIONS[-1]), seed=2, max_denoising_steps=2
        )
        next(stream)
        stream.close()
        assert generate(model, tokenizer, ids, seed=2, max_denoising_steps=4) == expected

    def test_two_streams_may_be_interleaved(self, random_pair):
        model, tokenizer = random_pair
        ids = [
            prompt(tokenizer, "Tell me a story about Mia the cat and a drum."),
            prompt(tokenizer, QUESTIONS[-1]),
        ]
        options = dict(seed=4, max_denoising_steps=5, max_tokens=128)
        alone = [[r.tokens for r in stream_generate(model, tokenizer, i, **options)] for i in ids]
        assert min(map(len, alone)) > 1
        streams, mixed = [stream_generate(model, tokenizer, i, **options) for i in ids], [[], []]
        while any(len(m) < len(a) for m, a in zip(mixed, alone)):
            for stream, into in zip(streams, mixed):
                if (response := next(stream, None)) is not None:
                    into.append(response.tokens)
        assert mixed == alone


class TestBadInput:
    @pytest.mark.parametrize("text", ["", "   ", "\n"])
    def test_empty_prompt(self, nano_pair, text):
        with pytest.raises(UserError, match="prompt is empty"):
            stream_generate(*nano_pair, text)

    def test_foreign_ids(self, nano_pair):
        with pytest.raises(UserError, match="outside 0 to 1023"):
            stream_generate(*nano_pair, [5, 200_000])
        with pytest.raises(UserError, match="outside 0 to 1023"):
            stream_generate(*nano_pair, [5, 1024])

    @pytest.mark.parametrize("name", REFUSED)
    def test_what_has_no_meaning_is_refused_by_name(self, nano_pair, name):
        with pytest.raises(UserError, match=f"{name}= is not supported"):
            stream_generate(*nano_pair, "fox", **{name: 1})

    def test_unknown_keywords_are_named(self, nano_pair):
        with pytest.raises(UserError, match="'temprature'; did you mean 'temperature'"):
            stream_generate(*nano_pair, "fox", temprature=1)
        with pytest.raises(UserError, match="did you mean 'temperature'"):
            generate(*nano_pair, "fox", temp=1)

    @pytest.mark.parametrize(
        "options",
        [
            {"max_tokens": 0},
            {"temperature": 2.5},
            {"temperature": -1},
            {"top_p": 0},
            {"top_k": -1},
            {"mode": "turbo"},
            {"prefill_step_size": 1},
        ],
    )
    def test_out_of_range(self, options):
        with pytest.raises(UserError):
            GenerationOptions(**options)

    def test_sampling_numbers_out_of_range(self, nano_pair):
        for options in ({"max_denoising_steps": 0}, {"entropy_bound": -1.0}, {"t_min": 0.9}):
            with pytest.raises(UserError):
                stream_generate(*nano_pair, "fox", **options)

    def test_seeds_must_match_the_prompts(self, nano_pair):
        with pytest.raises(UserError, match="one entry a prompt"):
            batch_generate(*nano_pair, ["a", "b"], seeds=[1])
        with pytest.raises(UserError, match="batch_size must be at least 1"):
            batch_generate(*nano_pair, ["a"], batch_size=0)

    def test_prompt_longer_than_the_context(self, nano_pair):
        with pytest.raises(UserError, match="8,129 tokens and the context holds 8,192"):
            stream_generate(*nano_pair, [300] * 8129)

    def test_token_limit(self):
        assert token_limit(100, None, 64, 8192) == 4096
        assert token_limit(8000, None, 64, 8192) == 192
        assert token_limit(8128, None, 64, 8192) == 64
        assert token_limit(8000, 192, 64, 8192) == 192
        with pytest.raises(UserError, match="at most 192"):
            token_limit(8000, 193, 64, 8192)


def test_a_prompt_that_memory_cannot_hold_is_refused_before_anything_is_allocated(
    nano_float32, monkeypatch
):
    from mlx_diffgemma import device

    monkeypatch.setattr(device, "memory_limit", lambda: 12_000_000)
    monkeypatch.setattr(
        type(nano_float32[0]), "encode", lambda *a, **k: pytest.fail("something was computed")
    )
    # 9 MB of weights, 4 of cache, and 13 of the experts' results for a chunk of the prompt.
    with pytest.raises(
        UserError,
        match=r"A prompt of 6,000 tokens needs 0\.03 GB, this machine allows 0\.01 GB; shorten it",
    ):
        stream_generate(*nano_float32, [30] * 6000)
    with pytest.raises(
        UserError,
        match="Running 3 prompts of up to 6,000 tokens together needs .*take fewer at once",
    ):
        batch_generate(*nano_float32, [[30] * 6000] * 3)
    with pytest.raises(UserError, match="A prompt of 6,000 tokens"):
        batch_generate(*nano_float32, [[30], [30] * 6000], batch_size=1)


def test_room_for_the_tower(nano_pair, monkeypatch):
    """An image of 1,120 soft tokens takes more than the answer to its prompt."""
    from PIL import Image

    from mlx_diffgemma import device

    model, tokenizer = load("nano-vision")
    weights = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    monkeypatch.setattr(device, "memory_limit", lambda: weights + 20_000_000)
    prompt, images = chat_ids(tokenizer, [user_message("What?", 1)]), [Image.new("RGB", (500, 500))]
    stream_generate(model, tokenizer, prompt, images=images)
    with pytest.raises(UserError, match="A prompt of .* needs"):
        stream_generate(model, tokenizer, prompt, images=images, image_tokens=1120)


@pytest.mark.parametrize("name", ["top_k", "top_p", "max_tokens", "plateau", "min_p"])
@pytest.mark.parametrize("value", ["5", True, [1]])
def test_what_is_no_number_is_refused_by_name(name, value):
    with pytest.raises(UserError, match=f"^{name} must be a number, got"):
        GenerationOptions(**{name: value})


def test_numpys_numbers_are_numbers():
    options = GenerationOptions(top_k=np.int64(5), top_p=np.float32(0.5), canvas_length="growing")
    assert (options.top_k, options.canvas_length) == (5, "growing")


def test_an_unknown_option_ends_its_sentence():
    with pytest.raises(UserError, match=r"Unknown option 'qqqq'\. Known are"):
        GenerationOptions.from_keywords({"qqqq": 1})
