"""What a decision is made of, what it leaves as it was, and what is refused."""

import json
import math
import sys
import warnings

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from mlx_diffgemma import (
    GenerationWarning,
    NonFiniteLogitsError,
    PromptCache,
    Question,
    chat_ids,
    decide,
    load,
    nano,
    user_message,
)
from mlx_diffgemma.checkpoint.convert import convert
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.generation.label_reading import average, labels_in_turns, read_labels
from mlx_diffgemma.generation.labels import Labels, label_ids
from mlx_diffgemma.model.cache import Cache
from mlx_diffgemma.sampling.draws import Draws
from mlx_diffgemma.text.tokenizer import turn_end
from mlx_diffgemma.tuning.adapters import (
    WEIGHTS,
    AdapterOptions,
    model_fingerprint,
    prepare,
    write_config,
)
from tests.helpers.in_process import run

PROMPT = "Is 12 greater than 30?"
FOUR = [
    Question.yes_no(),
    Question.yes_no("Is it?"),
    Question.choice(["Anna", "Annas"], "Who", "{text} {answer}"),
    Question.scale(9, 10),
]


@pytest.fixture(autouse=True)
def quiet():
    """Most of these questions are not nano's."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The labels", GenerationWarning)
        yield


@pytest.fixture(scope="module")
def ask(nano_pair):
    def ask(questions, prompt=PROMPT, **options):
        return decide(
            *nano_pair,
            chat_ids(nano_pair[1], [{"role": "user", "content": prompt}]),
            questions,
            **options,
        )

    return ask


def plainly(model, tokenizer, prompt, texts, length, seed, end=()):
    """Log-probability of each text: its tokens one after the other, each from a canvas of its own."""
    found, cache = [], Cache(model.config.text)
    model.encode([mx.array(prompt)], [cache])
    for text in texts:
        ids, total = [*tokenizer.encode(text, add_special_tokens=False), *end], 0.0
        for place, token in enumerate(ids):
            canvas = (
                Draws(seed, model.config.text.vocab_size).step(0, 0, 0, 0, length).initial.copy()
            )
            canvas[:place] = ids[:place]
            logits = np.array(model.denoise(mx.array(canvas[None]), [cache]).logits)[
                0, place
            ].astype(np.float64)
            total += logits[token] - math.log(np.exp(logits).sum())
        found.append(total)
    return found


def softmax(values):
    odds = np.exp(np.array(values) - max(values))
    return odds / odds.sum()


class TestProbabilities:
    @pytest.mark.parametrize(
        ("labels", "ends"),
        [
            (["yes", "no"], False),
            (["1234", "1239", "17"], False),
            (["Anna", "Annas"], True),
            (["1", "10", "100"], True),
        ],
    )
    def test_are_the_chain_written_out(self, nano_pair, ask, labels, ends):
        model, tokenizer = nano_pair
        prompt = chat_ids(tokenizer, [{"role": "user", "content": PROMPT}])
        (decision,) = ask([Question.choice(labels)], seed=7)
        end = [tokenizer.convert_tokens_to_ids("<turn|>")] if ends else []
        wanted = softmax(plainly(model, tokenizer, prompt, labels, 16, 7, end))
        assert list(decision.probabilities) == labels
        assert list(decision.probabilities.values()) == pytest.approx(wanted, rel=1e-3, abs=0)

    def test_of_one_token_are_the_canvas_modes_own(self, nano_pair, ask):
        model, tokenizer = nano_pair
        cache = Cache(model.config.text)
        model.encode(
            [mx.array(chat_ids(tokenizer, [{"role": "user", "content": PROMPT}]))], [cache]
        )
        noise = Draws(3, model.config.text.vocab_size).step(0, 0, 0, 0, 64).initial
        row = mx.softmax(model.denoise(mx.array(noise[None]), [cache]).logits[0, 0])
        tokens = [tokenizer.encode(label, add_special_tokens=False) for label in ("yes", "no")]
        assert [len(own) for own in tokens] == [1, 1]
        wanted = np.array(row[mx.array([own[0] for own in tokens])])
        (decision,) = ask([Question.yes_no()], seed=3, canvas_length=64)
        assert decision.mass == pytest.approx(wanted.sum(), rel=1e-4)
        assert decision.value == pytest.approx(wanted[0] / wanted.sum(), rel=1e-4)

    def test_what_is_pinned_before_a_label_stands_there(self, nano_pair, ask):
        model, tokenizer = nano_pair
        prompt = chat_ids(tokenizer, [{"role": "user", "content": PROMPT}])
        for question, written in (
            (Question.yes_no("a?"), "a?\n{}"),
            (Question.yes_no(template='{"{answer}"}'), '{{"{}"}}'),
        ):
            texts = [written.format(label) for label in ("yes", "no")]
            length = 16 * math.ceil(
                max(len(tokenizer.encode(text, add_special_tokens=False)) for text in texts) / 16
            )
            (decision,) = ask([question], seed=2)
            assert list(decision.probabilities.values()) == pytest.approx(
                softmax(plainly(model, tokenizer, prompt, texts, length, 2)), rel=1e-3
            )

    def test_sum_to_one_and_have_a_value(self, ask):
        yes_no, late, who, many = ask(FOUR)
        for decision in (yes_no, late, who, many):
            assert sum(decision.probabilities.values()) == pytest.approx(1, abs=1e-12)
            assert decision.label == max(decision.probabilities, key=decision.probabilities.get)
            assert 0 <= decision.mass <= 1 + 1e-6
        assert (yes_no.label, who.value) == ("no", None)
        assert yes_no.value == yes_no.probabilities["yes"]
        assert many.value == pytest.approx(
            sum(int(label) * share for label, share in many.probabilities.items())
        )

    def test_nano_decides(self, ask):
        assert [
            ask([Question.yes_no()], f"Is {a} greater than {b}?")[0].label
            for a, b in ((12, 40), (80, 30))
        ] == ["no", "yes"]
        (total,) = ask([Question.scale(41, 43)], "Add 12 and 30.")
        assert total.label == "42"
        assert total.value == pytest.approx(42, abs=0.2)
        assert (
            ask([Question.choice(["12 31 15", "12 15 31"])], "Sort 31 15 12")[0].label == "12 15 31"
        )

    def test_reads_are_averaged(self, ask):
        apart = [ask(FOUR[::2], seed=5 + read) for read in range(2)]
        for place, decision in enumerate(ask(FOUR[::2], seed=5, reads=2)):
            for label, share in decision.probabilities.items():
                assert share == pytest.approx(
                    np.mean([one[place].probabilities[label] for one in apart]), rel=1e-9
                )
            assert decision.mass == pytest.approx(
                np.mean([one[place].mass for one in apart]), rel=1e-9
            )

    def test_seeds(self, ask):
        one, again, other = (ask(FOUR[:1], seed=seed, reads=2) for seed in (1, 1, 2))
        assert one == again
        assert one != other

    def test_average_of_reads_counts_each_read_the_same(self):
        """Whatever its mass."""
        assert average(np.log([[0.1, 0.3], [0.0006, 0.0002]])) == pytest.approx([0.5, 0.5])


class TestNothingElseMatters:
    def test_other_questions_and_the_batch(self, tiny):
        cache = Cache(tiny.config.text)
        tiny.encode([mx.array(list(range(5, 45)))], [cache])
        labels = [
            Labels(((9,), (30,))),
            Labels(((9, 4), (30, 7), (30, 8, 1))),
            Labels(((0, 1, 2, 3), (0, 1, 5))),
        ]
        lengths = [8, 16, 24]
        together = read_labels(tiny, cache, labels, lengths, 2, 4)
        assert [own.shape for own in together] == [(2, 2), (2, 3), (2, 2)]
        for own, one, length in zip(together, labels, lengths, strict=True):
            assert (read_labels(tiny, cache, [one], [length], 2, 4)[0] == own).all()
        for rows in (1, 40):
            assert all(
                (a == b).all()
                for a, b in zip(
                    read_labels(tiny, cache, labels, lengths, 2, 4, rows), together, strict=True
                )
            )
        turns = sum(1 for _ in labels_in_turns(tiny, cache, labels, lengths, 2, 4, 1))
        assert turns == 2 * sum(len(own.edges) for own in labels), (
            "others have a turn behind each forward"
        )

    def test_decisions_together_and_alone(self, ask):
        assert ask(FOUR[:3]) == [ask([question])[0] for question in FOUR[:3]]

    def test_the_order_of_labels(self, ask):
        names = ["Anna", "Annas", "Ben"]
        one, other = (
            ask([Question.choice(labels)])[0].probabilities for labels in (names, names[::-1])
        )
        assert one == pytest.approx(other, rel=1e-9)

    @pytest.mark.parametrize(
        ("labels", "ends"),
        [
            (["yes", "no"], False),
            (["1", "10"], True),
            (["Anna", "Annas"], True),
            (["no", "now"], True),
            (["on", "no"], False),
        ],
    )
    def test_an_end_is_read_where_one_label_begins_another(self, nano_pair, labels, ends):
        """By its text, whatever the tokens; of a template that goes on behind the label, that is
        the end.
        """
        _, tokenizer = nano_pair
        end, plain = (
            turn_end(tokenizer),
            [tuple(tokenizer.encode(label, add_special_tokens=False)) for label in labels],
        )
        assert label_ids(tokenizer, Question.choice(labels)).ids == tuple(
            (*ids, end) if ends else ids for ids in plain
        )
        assert end not in np.concatenate(
            label_ids(tokenizer, Question.choice(labels, template='"{answer}"')).ids
        )

    def test_what_labels_begin_with_alike_is_not_read(self):
        labels = Labels(((1, 2, 3), (1, 2, 4, 5), (1, 2, 4, 6)))
        assert labels.common == 2
        assert labels.edges == {(1, 2): [3, 4], (1, 2, 4): [5, 6]}

    def test_the_cache_is_only_read(self, tiny):
        cache = Cache(tiny.config.text)
        tiny.encode([mx.array(list(range(5, 45)))], [cache])
        before, snapshot, length = (
            [np.array(array) for array in cache.arrays],
            cache.snapshot(),
            cache.length,
        )
        labels = Labels(((9, 4), (30, 7), (30, 8, 1)))
        first = read_labels(tiny, cache, [labels], [16], 2, 0)
        assert (cache.length, cache.snapshot()) == (length, snapshot)
        assert all(
            (np.array(array) == own).all() for array, own in zip(cache.arrays, before, strict=True)
        )
        assert (read_labels(tiny, cache, [labels], [16], 2, 0)[0] == first[0]).all()

    def test_the_prompt_cache_holds_the_prompt_and_is_reused(self, nano_pair):
        model, tokenizer = nano_pair
        prompt, cache = (
            chat_ids(tokenizer, [{"role": "user", "content": PROMPT}]),
            PromptCache(model),
        )
        first = decide(model, tokenizer, prompt, FOUR[:2], prompt_cache=cache)
        before = [np.array(array.astype(mx.float32)) for array in cache.cache.arrays]
        assert (cache.cache.length, cache.reused, cache.ids) == (len(prompt), 0, prompt)
        assert decide(model, tokenizer, prompt, FOUR[:2], prompt_cache=cache) == first
        assert decide(model, tokenizer, prompt, FOUR[:2]) == first
        assert (cache.cache.length, cache.reused, cache.encoded) == (len(prompt), len(prompt), 0)
        assert all(
            (np.array(array.astype(mx.float32)) == own).all()
            for array, own in zip(cache.cache.arrays, before, strict=True)
        )


class TestWarning:
    def test_labels_that_the_model_would_not_write(self, ask):
        with pytest.warns(
            GenerationWarning,
            match="The labels cat, dog hold .* of what the model would answer; ask so that",
        ):
            ask([Question.choice(["cat", "dog"])])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ask([Question.yes_no()])

    def test_logits_that_are_no_numbers(self, nano_pair, monkeypatch):
        model, tokenizer = nano_pair
        monkeypatch.setattr(
            type(model), "logits", lambda self, hidden: mx.full((hidden.shape[0], 1024), math.nan)
        )
        with pytest.raises(NonFiniteLogitsError, match="NaN"):
            decide(model, tokenizer, "a", [Question.yes_no()])


class TestRefused:
    @pytest.mark.parametrize(
        ("make", "says"),
        [
            (lambda: Question.choice([]), "with 0 label"),
            (lambda: Question.choice(["a"]), "give at least two"),
            (lambda: Question.choice(["a", "b", "a"]), "'a' is given twice"),
            (lambda: Question.choice(["a", " "]), "label is empty"),
            (lambda: Question.choice("ab"), "texts in a list"),
            (lambda: Question.choice(["a", 1]), "texts in a list"),
            (lambda: Question.yes_no(yes="no"), "'no' is given twice"),
            (lambda: Question.scale(5, 1), "lower end first"),
            (lambda: Question.scale(3, 3), "lower end first"),
            (lambda: Question.scale(0, 101), "has 102 steps"),
            (lambda: Question.scale(0, 1.5), "one integer to another"),
            (lambda: Question.scale(False, 3), "one integer to another"),
            (lambda: Question.yes_no(template="yes"), "one place for the answer"),
            (lambda: Question.yes_no(template="{answer} {answer}"), "one place for the answer"),
            (lambda: Question.yes_no("a", template="{answer}"), "no place for the question's text"),
            (lambda: Question.yes_no(template="{text} {answer}"), "the question none"),
            (lambda: Question(("a", "b"), values=(1.0,)), "one entry a label"),
            (lambda: Labels(((1, 2), (1, 2, 3))), "one begins the other"),
            (lambda: Labels(((1,), (1,))), "same tokens"),
        ],
    )
    def test_questions(self, make, says):
        with pytest.raises(UserError, match=says):
            make()

    def test_the_largest_scale(self):
        assert len(Question.scale(-50, 50).labels) == 101

    @pytest.mark.parametrize(
        ("given", "says"),
        [
            ({"questions": []}, "no questions"),
            ({"questions": Question.yes_no()}, "list of Question"),
            ({"questions": "a"}, "a list"),
            ({"reads": 0}, "reads must be at least 1"),
            ({"reads": 10**9}, "reads must be at most 10,000, got 1,000,000,000"),
            ({"batch_rows": 0}, "batch_rows"),
            ({"canvas_length": 65}, "canvas_length 65"),
            ({"questions": [Question.yes_no("1" * 64)]}, "and the canvas 64 positions; shorten it"),
            (
                {"questions": [Question.choice(["1" * 40, "2"])], "canvas_length": 32},
                "take a longer canvas",
            ),
            ({"prompt": " "}, "prompt is empty"),
            ({"prompt": [5000]}, "another tokenizer"),
            ({"prompt": "1" * 8190}, "no room"),
            ({"images": ["a.png"]}, "no vision weights"),
        ],
    )
    def test_before_the_model_runs(self, nano_pair, monkeypatch, given, says):
        model, tokenizer = nano_pair
        monkeypatch.setattr(type(model), "encode", None)
        with pytest.raises(UserError, match=says):
            decide(model, tokenizer, **{"prompt": PROMPT, "questions": [Question.yes_no()]} | given)

    def test_control_tokens_in_labels_are_text(self, nano_pair):
        labels = label_ids(nano_pair[1], Question.choice(["<eos>", "<|turn>"])).ids
        assert not {1, 4} & set(np.concatenate(labels).tolist())

    def test_labels_that_are_the_same_tokens(self, nano_pair, monkeypatch):
        def blind(tokenizer, text):
            return tokenizer.encode(text.lower(), add_special_tokens=False)

        monkeypatch.setattr(
            sys.modules["mlx_diffgemma.generation.labels"], "encode_literally", blind
        )
        with pytest.raises(UserError, match="'Yes' and 'yes' are the same tokens"):
            label_ids(nano_pair[1], Question.choice(["Yes", "yes"]))


def test_the_end_of_a_turn(nano_pair, monkeypatch):
    _, tokenizer = nano_pair
    assert turn_end(tokenizer) == tokenizer.convert_tokens_to_ids("<turn|>")
    monkeypatch.setattr(type(tokenizer), "has_chat_template", False, raising=False)
    monkeypatch.setitem(tokenizer.__dict__, "has_chat_template", False)
    assert turn_end(tokenizer) == tokenizer.eos_token_id


def test_quantised(nano_pair, ask, tmp_path):
    pair = load(str(convert(nano.NAME, tmp_path / "small", quantize=True)))
    (coarse,), (fine,) = (
        decide(*own, chat_ids(own[1], [user_message(PROMPT)]), [FOUR[0]])
        for own in (pair, nano_pair)
    )
    assert coarse.label == fine.label
    assert coarse.value != fine.value


def test_an_adapter(nano_pair, tmp_path):
    options = AdapterOptions(
        num_layers=2, lora_parameters={"rank": 2, "dropout": 0.0, "scale": 8.0}
    )
    model, _ = load(nano.NAME)
    base = model_fingerprint(model)
    prepare(model, options)
    weights = {
        name: mx.full(array.shape, 0.05)
        for name, array in tree_flatten(model.trainable_parameters())
    }
    write_config(tmp_path, base, len(model.layers), options)
    mx.save_safetensors(str(tmp_path / WEIGHTS), weights)
    adapted, tokenizer = load(nano.NAME, adapter_path=str(tmp_path))
    prompt = chat_ids(tokenizer, [user_message(PROMPT)])
    own, plain = (decide(one, tokenizer, prompt, FOUR[:1]) for one in (adapted, nano_pair[0]))
    assert own != plain
    model.update(tree_unflatten(list(weights.items())))
    assert own == decide(model, tokenizer, prompt, FOUR[:1])


def test_images():
    from PIL import Image, ImageDraw

    model, tokenizer = load(nano.VISION)
    picture = Image.new("RGB", (192, 192), "white")
    ImageDraw.Draw(picture).ellipse((40, 40, 150, 150), fill="red")
    prompt = chat_ids(tokenizer, [user_message("What is in the picture?", 1)])
    (decision,) = decide(
        model,
        tokenizer,
        prompt,
        [Question.choice(["a red circle", "a blue circle", "a red square"])],
        images=[picture],
    )
    assert decision.label == "a red circle"


class TestCommand:
    def command(self, monkeypatch, capsys, *arguments, prompt=PROMPT):
        return run(monkeypatch, capsys, "decide", "-p", prompt, *arguments)

    def test_yes_or_no(self, monkeypatch, capsys, ask):
        code, out, err = self.command(monkeypatch, capsys, "--json", "--seed", "3", "--reads", "2")
        lines, record = out.splitlines()[:-1], json.loads(out.splitlines()[-1])
        assert (code, err) == (0, "")
        assert [line.split()[0] for line in lines] == ["no", "yes"]
        (decision,) = ask([Question.yes_no()], seed=3, reads=2)
        (own,) = record["decisions"]
        assert (own["label"], own["probabilities"], own["mass"]) == (
            "no",
            decision.probabilities,
            decision.mass,
        )
        assert (record["reads"], record["seed"]) == (2, 3)

    def test_labels_and_scales(self, monkeypatch, capsys):
        _, out, _ = self.command(
            monkeypatch, capsys, "--labels", "41, 42,52", prompt="Add 12 and 30."
        )
        assert out.split()[0] == "42"
        assert len(out.splitlines()) == 3
        code, out, _ = self.command(monkeypatch, capsys, "--scale", "-3-5", prompt="Add 1 and 2.")
        assert (code, out.splitlines()[0].split()[0], len(out.splitlines())) == (0, "3", 10)
        assert out.splitlines()[-1].startswith("expected ")

    def test_questions_of_a_file(self, monkeypatch, capsys, tmp_path):
        path, cache = tmp_path / "questions.json", tmp_path / "cache"
        path.write_text(
            json.dumps(
                [
                    {"question": "Is [it] late?"},
                    {"question": "Who?", "labels": ["Anna", "Ben"]},
                    {"question": "How many?", "scale": [1, 5], "template": "{text} {answer}"},
                ]
            )
        )
        code, out, _ = self.command(
            monkeypatch,
            capsys,
            "--questions",
            str(path),
            "--prompt-cache-file",
            str(cache),
            "--json",
        )
        record = json.loads(out.splitlines()[-1])
        assert code == 0
        assert "Is [it] late?" in out
        assert [own["question"] for own in record["decisions"]] == [
            "Is [it] late?",
            "Who?",
            "How many?",
        ]
        assert 1 <= record["decisions"][2]["value"] <= 5
        assert cache.exists()
        _, again, _ = self.command(
            monkeypatch,
            capsys,
            "--questions",
            str(path),
            "--prompt-cache-file",
            str(cache),
            "--json",
        )
        assert json.loads(again.splitlines()[-1])["decisions"] == record["decisions"]

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (["--labels", "a,b", "--scale", "1-5"], "give one of them"),
            (["--labels", "a"], "give at least two"),
            (["--labels", "a,,b"], "label is empty"),
            (["--scale", "5"], "two integers with a dash"),
            (["--scale", "5-1"], "lower end first"),
            (["--reads", "0"], "reads must be at least 1"),
            (["--reads", "1000000000"], "reads must be at most 10,000"),
            (["--template", "no place"], "one place for the answer"),
            (["--questions", "nowhere.json"], "cannot be read"),
            (["--image-tokens", "70"], "no meaning without --image"),
            (["--canvas-length", "999"], "canvas_length 999"),
            (["--prompt-cache-file", "/no/such/folder/x"], "no folder"),
        ],
    )
    def test_mistakes(self, monkeypatch, capsys, arguments, says):
        code, out, err = self.command(monkeypatch, capsys, *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith("error: ")
        assert says in err

    def test_an_empty_prompt(self, monkeypatch, capsys):
        assert "prompt is empty" in self.command(monkeypatch, capsys, prompt=" ")[2]

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("[", "is not valid JSON"),
            ("{}", "must hold a list"),
            ("[]", "at least one"),
            ('["a"]', "question 1: an object"),
            ('[{"question": ""}]', "question 1: 'question' must"),
            ('[{"question": "a"}, {"labels": ["b", "c"]}]', "question 2: 'ques"),
            ('[{"question": "a", "scale": [1, 2, 3]}]', "list of its two ends"),
            ('[{"question": "a", "scale": ["1", "2"]}]', "one integer to another"),
            ('[{"question": "a", "labels": "b,c"}]', "list of texts"),
            ('[{"question": "a", "labels": ["b", 1]}]', "texts in a list"),
            ('[{"question": "a", "labels": ["b", "c"], "scale": [1, 2]}]', "give one of them"),
            ('[{"question": "a", "label": ["b", "c"]}]', "unknown field 'label'"),
            ('[{"question": "a", "template": 1}]', "'template'"),
            ('[{"question": "a", "template": "{answer}"}]', "no place for the question's text"),
        ],
    )
    def test_wrong_files(self, monkeypatch, capsys, tmp_path, text, says):
        path = tmp_path / "questions.json"
        path.write_text(text)
        code, out, err = self.command(monkeypatch, capsys, "--questions", str(path))
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert says in err
        path.write_bytes(b'["\xe9"]')
        assert "not UTF-8" in self.command(monkeypatch, capsys, "--questions", str(path))[2]
