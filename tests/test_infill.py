"""Holes in texts, filled by what stands on both sides of them."""

import importlib
import random
import re

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma import (
    GenerationWarning,
    Hole,
    UserError,
    batch_infill,
    chat_ids,
    convert,
    edit,
    infill,
    load,
    stream_infill,
    user_message,
)
from mlx_diffgemma.decoding.batch import run
from mlx_diffgemma.decoding.constraints import FREE, Demands
from mlx_diffgemma.decoding.prefill import prefill
from mlx_diffgemma.generation.filling import Filling, FillSettings
from mlx_diffgemma.generation.holes import split_holes
from mlx_diffgemma.generation.length_search import TRIED, next_lengths
from mlx_diffgemma.generation.options import GenerationOptions
from mlx_diffgemma.model.cache import Cache
from tests.checkpoints import make_adapter

PROMPT = "Turn this into JSON: Anna is 31 years old and lives in Paris."
JSON = '{"name": "Anna", "age": <|hole:3|>, "city": "Paris"}'
STORY = "Tell me a story about Mia the fox and a map."
FEW = {"max_denoising_steps": 3}  # where any text will do
pytestmark = pytest.mark.filterwarnings("ignore::mlx_diffgemma.GenerationWarning")


class TestWhatComesBack:
    def test_what_fits(self, nano_pair):
        found = infill(*nano_pair, JSON, PROMPT, seed=0)
        assert found.text == '{"name": "Anna", "age": 31, "city": "Paris"}'
        assert [fill.text for fill in found.fills] == ["31"]
        assert found.fills[0].converged
        assert found.fills[0].candidates == ()
        assert (found.unseen, found.seed) == (0, 0)

    def test_texts_in_place_of_marks(self, nano_pair):
        before, behind = JSON.split("<|hole:3|>")
        assert infill(*nano_pair, (before, behind), PROMPT, hole=Hole(3), seed=0) == infill(
            *nano_pair, JSON, PROMPT, seed=0
        )

    def test_several_holes_of_one_canvas_are_filled_together(self, nano_pair):
        holes = [Hole(size(nano_pair, text)) for text in ("Anna", " 31", "Paris")]
        found = infill(
            *nano_pair,
            ('{"name": "', '", "age": ', ', "city": "', '"}'),
            PROMPT,
            hole=holes,
            seed=0,
        )
        assert found.text == '{"name": "Anna", "age": 31, "city": "Paris"}'
        assert [fill.hole for fill in found.fills] == [0, 1, 2]
        assert found.fills[0].steps > 0
        assert [fill.steps for fill in found.fills[1:]] == [0, 0]

    def test_a_blank_before_the_hole_belongs_to_it_and_stays(self, nano_pair):
        """Without it being moved into the hole the word would have to be spelled otherwise than it
        ever is.
        """
        found = infill(
            *nano_pair, "Mia was a red <|hole:1|>. Mia lived near the river.", STORY, seed=0
        )
        assert found.text == "Mia was a red fox. Mia lived near the river."
        assert nano_pair[1].decode(list(found.fills[0].tokens)) == " fox"

    @pytest.mark.parametrize(
        "options",
        [
            {"diffusion_sampler": "confidence-threshold"},
            {"preset": "fast"},
            {"temperature": 0.0},
            {"self_conditioning": "dense"},
        ],
    )
    def test_samplers_and_presets(self, nano_pair, options):
        assert (
            infill(*nano_pair, JSON, PROMPT, seed=0, **options).text
            == '{"name": "Anna", "age": 31, "city": "Paris"}'
        )

    def test_text_alone(self, random_pair):
        found = infill(*random_pair, "Once there was a red <|hole:1|> named Mia.", seed=0, **FEW)
        assert re.fullmatch(r"(?s)Once there was a red .+ named Mia\.", found.text)

    def test_what_looks_like_a_control_token_is_text(self, random_pair):
        with pytest.warns(GenerationWarning, match="The canvas of hole 1 did not converge"):
            found = infill(
                *random_pair, "<turn|> a<|hole:1|> <|turn>b<eos>", seed=0, max_denoising_steps=1
            )
        assert found.text.startswith("<turn|> a")
        assert found.text.endswith(" <|turn>b<eos>")

    @pytest.mark.parametrize(
        ("pair", "cases"),
        [
            ("random_pair", 40),
            pytest.param("random_pair", 500, marks=pytest.mark.slow),
            pytest.param("nano_pair", 40, marks=pytest.mark.slow),
        ],
    )
    def test_byte_for_byte(self, request, pair, cases):
        rng, model_and_tokenizer = random.Random(0), request.getfixturevalue(pair)
        letters = "ab \t\r\n{}\"'<|>é\u0301ßñ漢字😀👩\u200d🚀עربي\u202e\ufeff\u0000"
        texts = [
            tuple(
                "".join(rng.choices(letters, k=rng.choice((0, 1, 5, 40))))
                for _ in range(rng.randint(2, 4))
            )
            for _ in range(cases)
        ]
        found = batch_infill(
            *model_and_tokenizer,
            texts,
            hole=Hole(2),
            seeds=range(cases),
            max_denoising_steps=1,
            batch_size=16,
        )
        for parts, one in zip(texts, found, strict=True):
            pieces = [
                piece
                for part, fill in zip(parts, [*one.fills, None])
                for piece in (part, fill.text if fill else "")
            ]
            assert one.text.encode() == "".join(pieces).encode()
            assert "\ufffd" not in "".join(fill.text for fill in one.fills)
            assert len(one.fills) == len(parts) - 1


class TestLengths:
    TEXT = "Mia was a red <|hole:1-4|>. Mia lived near the river."

    def test_the_best_score_wins(self, nano_pair):
        fill = infill(*nano_pair, self.TEXT, STORY, seed=0, **FEW).fills[0]
        assert fill.text == "fox"
        assert [one.length for one in fill.candidates] == [1, 2, 3, 4]
        assert max(fill.candidates, key=lambda one: one.score).text == "fox"

    def test_each_length_as_if_it_were_given(self, random_pair):
        """Side by side as alone, and none sees another's prefix."""
        text = "Mia was a <|hole:1-4|>."  # all of it on a canvas, whichever length
        candidates = infill(*random_pair, text, STORY, seed=0, **FEW).fills[0].candidates
        assert len({one.text for one in candidates}) == 4
        for one in candidates:
            alone = infill(
                *random_pair, text.replace("1-4", str(one.length)), STORY, seed=0, **FEW
            ).fills[0]
            assert (alone.text, alone.converged) == (one.text, one.converged)

    def test_others_have_a_turn_behind_each_score(self, random_pair):
        model, tokenizer = random_pair
        policy = GenerationOptions(**FEW).policy(model)
        filling, turns = (
            Filling(
                model,
                tokenizer,
                ["Mia was a ", "."],
                [Hole((1, 4))],
                STORY,
                FillSettings(policy, 0),
            ),
            0,
        )
        for sessions in filling.rounds():
            turns += not sessions
            if sessions and sessions[0].finished:
                prefill(model, sessions, 512)
            for _ in run(model, sessions, 8):
                pass
        assert turns == 4

    @pytest.mark.parametrize("text", [TEXT, "<|hole:1-2|> was a red fox."])
    def test_the_score_is_the_causal_mean_from_the_hole_on(self, nano_pair, text):
        """Computed anew over the whole text in one pass, at the begin of an answer too."""
        model, tokenizer = nano_pair
        asked = chat_ids(tokenizer, [user_message(STORY)])
        found = infill(model, tokenizer, text, STORY, seed=0, max_denoising_steps=3)
        parts, _ = split_holes(text)
        own = [
            tokenizer.encode(part, add_special_tokens=False)
            for part in (parts[0].rstrip(" "), parts[1])
        ]
        for one in found.fills[0].candidates:
            hole = tokenizer.encode(
                parts[0][len(parts[0].rstrip(" ")) :] + one.text, add_special_tokens=False
            )
            if len(hole) != one.length:  # spelled in another way than the tokenizer would
                continue
            ids = [*asked, *own[0], *hole, *own[1], 5]
            logits = model.encode([mx.array(ids)], [Cache(model.config.text)], logits="all").logits[
                0
            ]
            logprobs = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
            start = len(asked) + len(own[0])
            wanted = np.mean(
                [logprobs[place - 1, ids[place]] for place in range(start, len(ids))]
            )  # by tokens as it is written
            assert one.score == pytest.approx(wanted, abs=2e-4)

    def test_many_lengths_are_searched_from_coarse_to_fine(self):
        scores, lengths = {}, range(1, 201)
        rounds = 0
        while new := next_lengths(lengths, scores):
            assert len(new) <= TRIED
            assert not set(new) & set(scores)
            scores |= {length: -abs(length - 77.2) for length in new}
            rounds += 1
        assert max(scores, key=scores.get) == 77
        assert rounds == 3

    def test_holes_of_unknown_length_one_after_the_other(self, nano_pair):
        found = infill(
            *nano_pair,
            '{"name": "<|hole:1-3|>", "age": <|hole:1-3|>, "city": "Paris"}',
            PROMPT,
            seed=0,
            **FEW,
        )
        assert found.text == '{"name": "Anna", "age": 31, "city": "Paris"}'
        assert [len(fill.candidates) for fill in found.fills] == [3, 3]


class TestConstraints:
    def test_a_hole_under_an_expression(self, random_pair):
        found = infill(
            *random_pair,
            "Mia is <|hole|> years old.",
            STORY,
            hole=Hole(regex="[0-9]{1,3}"),
            seed=0,
            **FEW,
        )
        assert re.fullmatch("[0-9]{1,3}", found.fills[0].text)
        assert [one.length for one in found.fills[0].candidates] == [
            2,
            3,
            4,
        ]  # of a blank and digits

    def test_each_hole_its_own(self, nano_pair):
        holes = (
            Hole(3, choices=["31", "13"]),
            Hole((2, 6), json_schema={"enum": ["Paris", "Rome"]}),
        )
        found = infill(
            *nano_pair,
            ('{"name": "Anna", "age": ', ', "city": ', "}"),
            PROMPT,
            hole=holes,
            seed=0,
            **FEW,
        )
        assert found.text == '{"name": "Anna", "age": 31, "city": "Paris"}'

    def test_whatever_the_model_thinks(self, random_pair):
        fills = infill(
            *random_pair,
            '{"name": "Anna", "age": <|hole|>, "city": "Paris"}',
            PROMPT,
            hole=Hole(regex="-[a-d]{3,4}"),
            seed=0,
            **FEW,
        ).fills
        assert re.fullmatch("-[a-d]{3,4}", fills[0].text)


class TestLongTexts:
    BEFORE = "Mia was a red fox. Mia lived near the river. " * 6
    BEHIND = ". Mia lived near the river. Every day Mia ate bread and looked at the sky." * 6

    def test_what_is_behind_the_canvas_says_nothing(self, nano_float32):
        """What is on it does."""
        model, tokenizer = nano_float32
        text = self.BEFORE + "Mia was a <|hole:2|>" + self.BEHIND
        found = infill(model, tokenizer, text, STORY, seed=0, **FEW)
        behind = len(tokenizer.encode(self.BEHIND, add_special_tokens=False))
        assert found.unseen == behind - (model.config.canvas_length - 2)
        assert found.text.endswith(self.BEHIND)
        other = infill(model, tokenizer, text[:-20] + "quite another end...", STORY, seed=0, **FEW)
        assert other.fills == found.fills
        nearer = infill(
            model,
            tokenizer,
            text.replace("|>. Mia lived", "|> house. Tom lived"),
            STORY,
            seed=0,
            **FEW,
        )
        assert nearer.fills != found.fills

    def test_holes_far_apart(self, nano_pair):
        """The second canvas goes on from the cache of the first; a hole at the border comes whole
        onto the next.
        """
        text = f"Mia was a red <|hole:1|>. {self.BEFORE}Mia was a red <|hole:1|>. Mia lived near the river."
        found = infill(*nano_pair, text, STORY, seed=0, **FEW)
        assert [len(fill.tokens) for fill in found.fills] == [1, 1]
        assert found.fills[0].text == "fox"
        assert all(fill.steps for fill in found.fills)
        size_of_canvas = nano_pair[0].config.canvas_length
        part = " and the" * (size_of_canvas - 3)
        border = infill(
            *nano_pair,
            f"Mia<|hole:1|>{part}<|hole:4|> river.",
            STORY,
            seed=0,
            max_denoising_steps=1,
        )
        assert [len(fill.tokens) for fill in border.fills] == [1, 4]
        assert border.fills[1].steps

    def test_a_canvas_ends_before_a_hole_that_it_does_not_hold(self, random_pair, monkeypatch):
        """Or its score would count what nobody keeps."""
        pins = []
        monkeypatch.setattr(
            importlib.import_module("mlx_diffgemma.generation.filling"),
            "Demands",
            lambda eos, limit, own, *rest: pins.append(own) or Demands(eos, limit, own, *rest),
        )
        between = " and the" * (random_pair[0].config.canvas_length // 2 - 1)
        infill(
            *random_pair,
            f"Mia<|hole:1|>{between}<|hole:4|> river.",
            STORY,
            seed=0,
            max_denoising_steps=1,
        )
        assert len(pins) == 2
        assert [own[-1] != FREE for own in pins] == [True, True]

    def test_the_batch_bounds_the_canvases_of_a_forward(self, random_pair, monkeypatch):
        """Sixteen lengths are tried, three at a time."""
        rows = []
        denoise = type(random_pair[0]).denoise

        def counted(model, canvas, caches, *rest, **options):
            rows.append(len(caches))
            return denoise(model, canvas, caches, *rest, **options)

        monkeypatch.setattr(type(random_pair[0]), "denoise", counted)
        infill(*random_pair, "Mia was<|hole|> again.", STORY, batch_size=3, max_denoising_steps=1)
        assert max(rows) == 3

    def test_a_batch_of_any_size_is_one_number(self, random_pair):
        """It is not counted up to."""
        text = "Mia was a red <|hole:1|>."
        infill(*random_pair, text, STORY, batch_size=10**12, max_denoising_steps=1)

    def test_longer_than_a_canvas(self, either_pair):
        length = either_pair[0].config.canvas_length
        found = infill(
            *either_pair,
            f"Mia was a red fox.<|hole:{length + 9}|> Mia was never lonely again.",
            STORY,
            seed=0,
            **FEW,
        )
        assert len(found.fills[0].tokens) == length + 9
        assert found.text.endswith(" Mia was never lonely again.")
        text = f"Mia was<|hole:{length + 1}-{length + 3}|> again."
        candidates = infill(*either_pair, text, STORY, seed=0, **FEW).fills[0].candidates
        assert len(candidates) == 3
        for one in candidates:  # each with a first canvas of its own in the cache
            assert (
                infill(*either_pair, f"Mia was<|hole:{one.length}|> again.", STORY, seed=0, **FEW)
                .fills[0]
                .text
                == one.text
            )

    def test_the_cache_of_the_prefix_changes_nothing(self, nano_pair):
        """Filled one after the other, as a text that has the first fill in it already."""
        text = f"Mia was a red <|hole:1-2|>. {self.BEFORE}Mia was a red <|hole:1|>. Mia lived near the river."
        both = infill(*nano_pair, text, STORY, seed=0, **FEW)
        second = infill(
            *nano_pair, text.replace("<|hole:1-2|>", both.fills[0].text), STORY, seed=0, **FEW
        )
        assert second.text == both.text


class TestTogether:
    TEXTS = (
        JSON,
        "Mia was a red <|hole:1-3|>. Mia lived near the <|hole:1|>.",
        "Once there was a <|hole:2|> named Mia.",
    )
    PROMPTS = (PROMPT, STORY, STORY)

    def test_in_a_batch_as_alone(self, either_pair):
        together = batch_infill(
            *either_pair, self.TEXTS, self.PROMPTS, seeds=[3, 4, 5], batch_size=3, **FEW
        )
        for text, prompt, seed, one in zip(
            self.TEXTS, self.PROMPTS, (3, 4, 5), together, strict=True
        ):
            alone = infill(*either_pair, text, prompt, seed=seed, batch_size=1, **FEW)
            assert [fill.tokens for fill in alone.fills] == [fill.tokens for fill in one.fills]
            assert alone.text == one.text

    def test_a_stream_gives_each_fill_when_it_is_known(self, random_pair):
        fills = list(stream_infill(*random_pair, self.TEXTS[1], STORY, seed=4, **FEW))
        assert fills == list(infill(*random_pair, self.TEXTS[1], STORY, seed=4, **FEW).fills)
        told = []
        batch_infill(
            *random_pair,
            self.TEXTS,
            self.PROMPTS,
            seed=3,
            **FEW,
            on_fill=lambda index, fill: told.append((index, fill.hole)),
        )
        assert sorted(told) == [(0, 0), (1, 0), (1, 1), (2, 0)]

    def test_seeds(self, random_pair):
        text = "Once there was a <|hole:8|>."
        one, same, other = (
            infill(*random_pair, text, STORY, seed=seed, max_denoising_steps=2)
            for seed in (1, 1, 2)
        )
        assert one == same
        assert one.fills[0].tokens != other.fills[0].tokens
        assert (
            infill(*random_pair, JSON, PROMPT, max_denoising_steps=1).seed
            != infill(*random_pair, JSON, PROMPT, max_denoising_steps=1).seed
        )

    def test_quantised(self, tmp_path):
        convert("nano", tmp_path / "packed", quantize=True)
        assert (
            infill(*load(str(tmp_path / "packed")), JSON, PROMPT, seed=0).text
            == '{"name": "Anna", "age": 31, "city": "Paris"}'
        )

    def test_an_adapter(self, nano_pair, tmp_path):
        """Another text, under the same expression."""
        make_adapter(tmp_path)
        hole = Hole(8, regex="[a-z ]+")
        plain, adapted = (
            infill(*pair, "Mia saw<|hole|>.", STORY, hole=hole, seed=0, **FEW).fills[0].text
            for pair in (nano_pair, load("nano", adapter_path=str(tmp_path)))
        )
        assert plain != adapted
        assert re.fullmatch("[a-z ]+", adapted)


class TestEdit:
    TEXT = "Mia was a red fox.\r\nMia lived near the river.\n"

    def test_the_rest_is_returned_as_it_came(self, random_pair):
        span = self.TEXT.index("red"), self.TEXT.index("red") + 3
        found = edit(
            *random_pair,
            self.TEXT,
            span,
            "Tell me a story about Mia the fox.",
            seed=0,
            max_denoising_steps=4,
        )
        assert found.text.startswith("Mia was a ")
        assert found.text.endswith(" fox.\r\nMia lived near the river.\n")
        words = size(random_pair, "red")
        assert [one.length for one in found.fills[0].candidates] == list(
            range(max(1, words - 2), words + 3)
        )

    def test_the_model_is_shown_the_text(self, random_pair):
        """Which is not what it sees of the parts alone."""
        span = self.TEXT.index("red"), self.TEXT.index("river")
        found = edit(
            *random_pair, self.TEXT, span, PROMPT, hole=Hole(12), seed=0, max_denoising_steps=4
        )
        parts = self.TEXT[: span[0]], self.TEXT[span[1] :]
        assert found == infill(
            *random_pair,
            parts,
            f"{PROMPT}\n\n{self.TEXT}",
            hole=Hole(12),
            seed=0,
            max_denoising_steps=4,
        )
        assert (
            found.fills
            != infill(
                *random_pair, parts, PROMPT, hole=Hole(12), seed=0, max_denoising_steps=4
            ).fills
        )

    @pytest.mark.parametrize("span", [(3, 3), (-1, 4), (0, 99), (5, 4)])
    def test_spans(self, nano_pair, span):
        with pytest.raises(UserError, match="is no part of a text of 46 characters"):
            edit(*nano_pair, self.TEXT, span, PROMPT)


class TestRefused:
    @pytest.mark.parametrize(
        ("text", "options", "message"),
        [
            ("no hole", {}, "has no hole"),
            ((), {}, "has no hole"),
            (("one",), {}, "has no hole"),
            ("a<|hole:x|>", {}, "'x' is no length"),
            ("a<|hole:0|>", {}, "at least 1 token"),
            ("a<|hole:5-2|>", {}, "in order"),
            ("a<|hole:|>", {}, "'' is no length"),
            (("a", "b"), {"hole": [Hole(), Hole()]}, "2 were described"),
            ("a<|hole:3|>", {"hole": Hole(regex="x")}, "No text of 3 to 3 tokens is admitted"),
            ("a<|hole|>", {"hole": Hole(regex="x{500}")}, "No text of 1 to 16 tokens is admitted"),
            ("a<|hole:2|>" + "b " * 40000, {}, "shorten it"),
            ("a\ud800<|hole:2|>", {}, "not valid Unicode"),
            ("a<|hole|>", {"max_tokens": 4}, "max_tokens has no meaning"),
            ("a<|hole|>", {"mode": "ar"}, "mode has no meaning here"),
            ("a<|hole|>", {"regex": "x"}, "a constraint belongs to the hole"),
            ("a<|hole|>", {"canvas_length": 8}, "canvas_length"),
            ("a<|hole|>", {"sampler": 3}, "sampler= is not supported"),
            ("a<|hole|>", {"sed": 3}, "did you mean 'seed'"),
            ("a<|hole|>", {"batch_size": 0}, "batch_size must be at least 1"),
        ],
    )
    def test_before_the_model_runs(self, nano_pair, monkeypatch, text, options, message):
        monkeypatch.setattr(type(nano_pair[0]), "_forward", None)
        with pytest.raises(UserError, match=message):
            infill(*nano_pair, text, PROMPT, **options)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"length": 0}, "at least 1 token"),
            ({"length": (3, 2)}, "in order"),
            ({"regex": "a", "choices": ["b"]}, "Give one of"),
        ],
    )
    def test_holes(self, options, message):
        with pytest.raises(UserError, match=message):
            Hole(**options)

    def test_counts(self, nano_pair):
        with pytest.raises(UserError, match="prompts must have one entry a text"):
            batch_infill(*nano_pair, [JSON], [PROMPT, PROMPT])
        with pytest.raises(UserError, match="seeds must have one entry a text"):
            batch_infill(*nano_pair, [JSON], seeds=[1, 2])


def size(nano_pair, text):
    return len(nano_pair[1].encode(text, add_special_tokens=False))
