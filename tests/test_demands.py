"""Pins and constraints on the canvases of a session."""

import itertools

import numpy as np
import pytest

from mlx_diffgemma import batch_generate, chat_ids, generate, stream_generate
from mlx_diffgemma.decoding.batch import run
from mlx_diffgemma.decoding.constraints import FREE, Demands, Stretch
from mlx_diffgemma.decoding.session import Session
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.generation.options import GenerationOptions
from mlx_diffgemma.grammar.constraint import compile_constraint
from mlx_diffgemma.sampling.draws import Draws

PROMPT = [{"role": "user", "content": "Write as JSON: Anna is 23 years old and lives in Paris."}]


FEW = {"max_denoising_steps": 4}  # where any text will do


def answered(nano_pair, demands, seed=0, limit=64, beside=(), **options):
    """The tokens of an answer under ``demands``, and its steps."""
    model, tokenizer = nano_pair
    vocabulary, eos = model.config.text.vocab_size, model.config.generation.eos_token_ids
    policy = GenerationOptions(max_tokens=limit, **options).policy(model)
    session, *others = (
        Session(
            model,
            chat_ids(tokenizer, PROMPT),
            policy,
            Draws(seed, vocabulary),
            eos,
            limit,
            demands=one,
        )
        for one in (demands, *beside)
    )
    steps = [step for own, step in run(model, [session, *others], 4) if own is session]
    return np.concatenate([canvas.tokens for canvas in session.canvases]), steps


def ids(nano_pair, text):
    return nano_pair[1].encode(text, add_special_tokens=False)


class TestPins:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"diffusion_sampler": "confidence-threshold"},
            {"preset": "fast"},
            {"temperature": 0.0},
            {"self_conditioning": "dense"},
        ],
    )
    def test_come_back_and_are_certain_at_every_step(self, nano_pair, options):
        """The text between two pinned ones is the one that fits; the canvas converges, as pins do
        not count.
        """
        eos = nano_pair[0].config.generation.eos_token_ids
        head, tail = (
            ids(nano_pair, '{"name": "Anna", "age": 2'),
            ids(nano_pair, ', "city": "Paris"}'),
        )
        pins = [*head, FREE, *tail, 5]
        tokens, steps = answered(nano_pair, Demands(eos, 64, pins), **options)
        assert tokens.tolist() == [*head, *ids(nano_pair, "3"), *tail, 5]
        fixed = np.flatnonzero(np.array(pins) != FREE)
        for step in steps:
            assert (np.array(step.canvas)[fixed] == np.array(pins)[fixed]).all()
            assert np.array(step.entropy)[fixed].max() == 0
            assert np.array(step.accepted)[fixed].all()
        assert steps[-1].reason == "converged"
        assert len(steps) < 10

    def test_span_canvases(self, random_pair):
        """Pins of a second canvas are kept, and no answer ends before them."""
        model, eos = random_pair[0], random_pair[0].config.generation.eos_token_ids
        length = model.config.canvas_length
        pins = np.full(length + 10, FREE)
        pins[length + 3 : length + 10] = ids(random_pair, " and Paris.")[0]
        tokens, _ = answered(random_pair, Demands(eos, 2 * length, pins), limit=2 * length, **FEW)
        assert (tokens[length + 3 : length + 10] == pins[length + 3 : length + 10]).all()
        assert not np.isin(tokens[: length + 10], eos).any()

    def test_free_positions_alone_are_counted(self, nano_pair):
        """The mean entropy is that of the free positions."""
        eos = nano_pair[0].config.generation.eos_token_ids
        _, steps = answered(
            nano_pair, Demands(eos, 64, [*ids(nano_pair, '{"name": "'), *[FREE] * 54]), **FEW
        )
        free = len(ids(nano_pair, '{"name": "'))
        for step in steps:
            assert step.mean_entropy == pytest.approx(
                np.array(step.entropy)[free:].mean(), rel=1e-4, abs=1e-6
            )

    @pytest.mark.parametrize(
        ("pins", "message"),
        [
            ([FREE] * 64 + [7], "A pin stands at position 64"),
            ([7, 5, 7], "An end token is pinned before the last pin"),
        ],
    )
    def test_pins_that_no_canvas_can_keep_are_refused(self, nano_pair, pins, message):
        with pytest.raises(UserError, match=message):
            Demands(nano_pair[0].config.generation.eos_token_ids, 64, pins)


class TestConstraints:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"diffusion_sampler": "confidence-threshold"},
            {"preset": "fast"},
            {"temperature": 0.0},
            {"top_k": 3, "top_p": 0.9},
            {"canvas_length": "growing"},
        ],
    )
    def test_every_argmax_of_every_step_is_admitted(self, either_pair, options):
        """What would be committed now is always a beginning of an admitted text that still fits,
        with every rule.
        """
        model, tokenizer = either_pair
        eos, length = model.config.generation.eos_token_ids, model.config.canvas_length
        constraint = compile_constraint(
            tokenizer, model.config, regex=f"[a-f]{{{3 * length},{3 * length + 9}}}"
        )
        tokens, steps = answered(
            either_pair,
            Demands(eos, 4 * length, stretches=[Stretch(constraint)]),
            limit=4 * length,
            max_denoising_steps=6,
            **options,
        )
        assert steps[-1].canvas_index > 0
        text = tokens[~np.isin(tokens, eos)]
        assert constraint.automaton.accepts(text)
        state = 0
        for _, own in itertools.groupby(steps, key=lambda step: step.canvas_index):
            for step in own:
                kept = np.array(step.argmax)
                kept = kept[: np.argmax(np.append(np.isin(kept, eos), True))]
                behind = constraint.automaton.advance(state, kept)
                assert behind >= 0
            state = behind

    def test_pins_within_a_constraint(self, random_pair):
        model, tokenizer = random_pair
        constraint = compile_constraint(tokenizer, model.config, regex="[0-9]+")
        seven = ids(random_pair, "7")[0]
        tokens, _ = answered(
            random_pair,
            Demands(
                model.config.generation.eos_token_ids,
                64,
                [FREE, seven, FREE, seven],
                [Stretch(constraint)],
            ),
            **FEW,
        )
        text = tokenizer.decode(tokens[:-1].tolist())
        assert text.isdigit()
        assert (text[1], text[3]) == ("7", "7")

    @pytest.mark.parametrize("stop", [None, 20])
    @pytest.mark.parametrize("digit", "12")
    def test_pins_of_a_later_canvas_bind_the_first(self, random_pair, digit, stop):
        """Whatever the model would rather begin with."""
        model, tokenizer = random_pair
        constraint = compile_constraint(tokenizer, model.config, regex="1{20}|2{20}")
        demands = Demands(
            model.config.generation.eos_token_ids,
            24,
            [*[FREE] * 14, ids(random_pair, digit)[0]],
            [Stretch(constraint, 0, stop)],
        )
        tokens, _ = answered(random_pair, demands, limit=24, canvas_length=8, max_denoising_steps=2)
        assert tokenizer.decode(tokens[:20].tolist()) == digit * 20

    def test_a_stretch_between_pins_is_filled_exactly(self, random_pair):
        """A hole of five tokens under an expression, pinned text around it."""
        model, tokenizer = random_pair
        constraint = compile_constraint(tokenizer, model.config, regex="[0-9]{5}")
        head, tail = ids(random_pair, '{"age": '), ids(random_pair, "}")
        demands = Demands(
            model.config.generation.eos_token_ids,
            64,
            [*head, *[FREE] * 5, *tail, 5],
            [Stretch(constraint, len(head), len(head) + 5)],
        )
        tokens, _ = answered(random_pair, demands, **FEW)
        assert tokens[: len(head)].tolist() == head
        assert tokenizer.decode(tokens[len(head) : len(head) + 5].tolist()).isdigit()
        assert tokens[len(head) + 5 :].tolist() == [*tail, 5]

    @pytest.mark.parametrize(
        ("regex", "pins", "message"),
        [
            ("[0-9]+", "x", "No text that the constraint admits fits between and under the pins"),
            (
                "a{65}",
                "",
                "The shortest text that the constraint admits has 65 tokens, more than the 64 allowed",
            ),
        ],
    )
    def test_a_constraint_that_nothing_fits_is_refused(self, nano_pair, regex, pins, message):
        model, tokenizer = nano_pair
        constraint = compile_constraint(tokenizer, model.config, regex=regex)
        with pytest.raises(UserError, match=message):
            Demands(
                model.config.generation.eos_token_ids,
                64,
                ids(nano_pair, pins) if pins else (),
                [Stretch(constraint)],
            )

    def test_what_later_pins_make_impossible_is_refused_at_once(self, random_pair):
        model, tokenizer = random_pair
        constraint = compile_constraint(tokenizer, model.config, regex="[a-z]+")
        with pytest.raises(UserError, match="fits between and under the pins"):
            Demands(
                model.config.generation.eos_token_ids,
                24,
                [*[FREE] * 14, ids(random_pair, "7")[0]],
                [Stretch(constraint)],
            )

    def test_alone_is_as_beside_others(self, random_pair):
        model, tokenizer = random_pair
        eos = model.config.generation.eos_token_ids
        constraint = compile_constraint(tokenizer, model.config, regex="[a-z ]{60,70}")

        def demands():
            return Demands(eos, 70, stretches=[Stretch(constraint)])

        alone, steps = answered(random_pair, demands(), limit=70, max_denoising_steps=8)
        assert steps[-1].canvas_index > 0
        beside, _ = answered(
            random_pair, demands(), limit=70, beside=[None, demands(), None], max_denoising_steps=8
        )
        assert np.array_equal(alone, beside)


class TestGenerate:
    SCHEMA = {  # noqa: RUF012
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 30}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }

    def test_all_doors_say_the_same(self, nano_pair):
        model, tokenizer = nano_pair
        prompt = chat_ids(tokenizer, PROMPT)
        asked = {"json_schema": self.SCHEMA, **FEW}
        whole = generate(model, tokenizer, prompt, seed=0, **asked)
        assert whole.startswith('{"name": "Anna"')
        assert (
            "".join(r.text for r in stream_generate(model, tokenizer, prompt, seed=0, **asked))
            == whole
        )
        batch = batch_generate(model, tokenizer, [prompt] * 3, seeds=[0, 1, 0], **asked)
        assert [batch[0].text, batch[2].text] == [whole] * 2
        assert {response.finish_reason for response in batch} == {"stop"}

    @pytest.mark.parametrize("limit", [8, 16])
    def test_a_text_that_could_go_on_but_fills_the_limit_is_whole(self, random_pair, limit):
        """Also where the limit is the end of a canvas, on which no end token follows."""
        [response] = batch_generate(
            *random_pair,
            ["Hello."],
            seed=0,
            regex=f"(?:[0-9]{{{limit}}})+",
            max_tokens=limit,
            canvas_length=8,
            **FEW,
        )
        assert (len(response.text), len(response.tokens), response.finish_reason) == (
            limit,
            limit,
            "stop",
        )

    def test_a_begin_that_is_given(self, nano_pair):
        model, tokenizer = nano_pair
        begin = ids(nano_pair, '{"name":"Bo')
        text = generate(
            model,
            tokenizer,
            chat_ids(tokenizer, PROMPT) + begin,
            prefix=begin,
            seed=0,
            json_schema=self.SCHEMA,
        )
        assert text.rstrip().endswith("}")
        with pytest.raises(UserError, match="admits no text that begins with what was given"):
            generate(
                model, tokenizer, chat_ids(tokenizer, PROMPT) + begin, prefix=begin, regex="[0-9]+"
            )

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"regex": "a", "choices": ["a"]},
                "Give one of json_schema, regex and choices, got regex and choices",
            ),
            (
                {"regex": "a", "mode": "ar"},
                "regex constrains canvases; leave it out with mode 'ar'",
            ),
            ({"choices": "yes"}, "choices are a list of texts"),
            ({"regex": "a{9}", "max_tokens": 8}, "shortest text"),
            ({"json_schema": {"type": "array", "uniqueItems": True}}, "'uniqueItems' at #"),
        ],
    )
    def test_options_that_contradict_are_refused(self, nano_pair, options, message):
        with pytest.raises(UserError, match=message):
            generate(*nano_pair, "Hello.", **options)
