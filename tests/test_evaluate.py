"""Which questions are asked, how answers are read, and what is counted."""

import json
from dataclasses import replace

import numpy as np
import pytest

from mlx_diffgemma import Question as Decided
from mlx_diffgemma import chat_ids, decide
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.evaluation.nano_tasks import TASKS
from mlx_diffgemma.evaluation.run import (
    _Answer,
    _bootstrap,
    _choice_ids,
    _result,
    _wilson,
    evaluate,
)
from mlx_diffgemma.evaluation.tasks import Mark, Question, Task, tasks_named, tasks_of_file
from mlx_diffgemma.generation.label_reading import average, read_labels, read_prompt
from mlx_diffgemma.generation.response import GenerationResponse
from tests.helpers.in_process import run

FEW = {"max_denoising_steps": 4, "max_tokens": 40}  # where any text will do


def test_suites_and_tasks():
    assert [t.name for t in tasks_named("nano")] == [name for name in TASKS if name != "find"]
    assert [t.name for t in tasks_named("add, story,add")] == ["add", "story"]
    for bad in ("", "nanno", "add,x"):
        with pytest.raises(UserError):
            tasks_named(bad)


def test_figures_do_not_depend_on_the_batch_size(random_pair):
    one, two = (
        evaluate(
            *random_pair, tasks_named("compare"), limit=3, seeds=[3], batch_size=size, **FEW
        ).results
        for size in (1, 2)
    )
    assert one == two


def test_counts(random_pair):
    report = evaluate(*random_pair, tasks_named("compare"), limit=3, seeds=[0, 1], **FEW)
    result = report.results[0]
    assert result.answers == 6
    assert 1 <= result.steps_per_canvas <= 4
    assert 0 <= result.low <= result.score <= result.high <= 1
    assert result.converged is not None
    causal = evaluate(
        *random_pair, tasks_named("compare"), limit=3, mode="ar", max_tokens=20
    ).results[0]
    assert causal.steps_per_canvas is causal.converged is None


def test_intervals():
    # Wilson's interval of 8 of 10, from the formula's usual table
    low, high = _wilson(np.array([1] * 8 + [0] * 2))
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-3)
    assert _wilson(np.ones(100))[0] < 1
    low, high = _bootstrap(np.array([0.0, 1.0] * 200))
    assert low < 0.5 < high
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.15)


def test_seeds_of_a_question_count_as_one():
    """Answers to one question under several seeds are no independent evidence: the interval is that
    of the questions.
    """
    task = Task("t", lambda _: [])
    question = Question([{"role": "user", "content": "a"}], lambda text: Mark(1.0))
    right = [1, 0, 1, 1, 0, 1, 1, 1]
    once, thrice = (
        _result(
            task,
            [_Answer(question, Mark(float(score)), None) for _ in range(seeds) for score in right],
            8,
        )
        for seeds in (1, 3)
    )
    assert (once.answers, thrice.answers) == (8, 24)
    assert (thrice.score, thrice.low, thrice.high) == (once.score, once.low, once.high)
    # Question by question: one that is right under two of three seeds counts two thirds.
    mixed = _result(
        task, [_Answer(question, Mark(float(score)), None) for score in (1, 0, 1, 1, 0, 1)], 2
    )
    assert (mixed.low, mixed.high) == _wilson(np.array([2 / 3, 2 / 3]))


def test_no_two_questions_share_their_seeds(random_pair, monkeypatch):
    """Neither those beside each other nor the same one under another seed; a choice is read off
    several canvases of noise.
    """
    from mlx_diffgemma.evaluation import run as module

    read = []
    real = module.read_labels

    def reading(model, prompt, labels, canvases, count, seed):
        read.append(range(seed, seed + count))
        return real(model, prompt, labels, canvases, count, seed)

    monkeypatch.setattr(module, "read_labels", reading)
    questions = [
        Question([{"role": "user", "content": str(n)}], lambda text: Mark(1.0), choices=("a", "b"))
        for n in range(3)
    ]
    evaluate(*random_pair, [Task("t", lambda _: questions)], limit=3, seeds=[0, 1])
    numbers = [number for each in read for number in each]
    assert len(read) == 6
    assert len(set(numbers)) == len(numbers)


def test_a_task_gives_all_it_has():
    (task,) = tasks_named("add")
    assert 500 < len(task.questions(5000)) < 5000


def test_limits():
    with pytest.raises(UserError, match="limit must be at least 1"):
        evaluate(None, None, tasks_named("add"), limit=0)


class TestRightAndWrong:
    """Counts of a report, on answers that are made up."""

    @staticmethod
    def answer(score, steps, group="", partial=None):
        part = GenerationResponse(
            "",
            0,
            None,
            False,
            0,
            0.0,
            0,
            0.0,
            0.0,
            tokens=(1, 2),
            steps=steps,
            certificate="confident",
        )
        return _Answer(
            Question.from_prompt("", Mark, group),
            Mark(score, partial),
            replace(part, parts=(part,)),
        )

    def test_steps_and_groups(self):
        task = Task("t", lambda _: [])
        answers = [
            self.answer(1, 4, "10 to 12", 1.0),
            self.answer(1, 6, "4 to 6", 1.0),
            self.answer(0, 20, "4 to 6", 0.5),
        ]
        r = _result(task, answers, 3)
        assert (
            r.steps_per_canvas,
            r.steps_when_right,
            r.steps_when_wrong,
            r.tokens_per_forward,
        ) == (10, 5, 20, 0.2)
        assert [(g.group, g.answers, g.score) for g in r.groups] == [
            ("4 to 6", 2, 0.5),
            ("10 to 12", 1, 1.0),
        ]
        assert r.partial == pytest.approx(2.5 / 3)

    def test_a_task_that_is_not_exact_knows_no_right(self):
        r = _result(
            Task("t", lambda _: [], exact=False), [self.answer(1, 4), self.answer(0.2, 8)], 2
        )
        assert (r.steps_when_right, r.steps_when_wrong, r.partial, r.groups) == (
            None,
            None,
            None,
            (),
        )


def write(path, *entries):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    return path


class TestFile:
    def test_three_ways_of_scoring(self, tmp_path):
        schema = {
            "type": "object",
            "required": ["name"],
            "properties": {"name": {"type": "string"}},
            "additionalProperties": False,
        }
        path = write(
            tmp_path / "own.jsonl",
            {"prompt": "a", "completion": " b\n", "group": "x"},
            {"prompt": "a", "schema": schema},
            {"messages": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]},
            {"prompt": "e", "choices": ["f", "g"], "answer": "g"},
            {"prompt": "e", "choices": ["f", "g"], "answer": 0},
        )
        exact, valid, choice = tasks_of_file(path)
        assert (exact.name, valid.name, choice.name) == (
            "own (exact)",
            "own (schema)",
            "own (choices)",
        )
        first, second = exact.questions(9)
        assert (first.mark("b").score, first.mark("B").score, first.group, second.prompt) == (
            1,
            0,
            "x",
            "c",
        )
        (question,) = valid.questions(9)
        texts = (
            '{"name": "x"}',
            '{"name": 1}',
            '{"name": "x"',
            '```{"name": "x"}```',
            "1" * 5000,
            "[" * 5000,
            "NaN",
        )
        assert [question.mark(text) for text in texts] == [
            Mark(1.0, 1.0),
            Mark(0.0, 1.0),
            *[Mark(0.0, 0.0)] * 5,
        ]
        assert [[q.mark(c).score for c in q.choices] for q in choice.questions(9)] == [
            [0, 1],
            [1, 0],
        ]
        assert len(exact.questions(1)) == 1

    @pytest.mark.parametrize(
        ("line", "says"),
        [
            ("{", "line 2: not valid JSON"),
            ("[]", "line 2: an object"),
            ('{"completion": "a"}', "line 2: 'prompt' or 'messages'"),
            ('{"prompt": "a"}', "line 2: one of 'completion'"),
            ('{"prompt": "a", "schema": {"type": "objct"}}', "no JSON schema"),
            ('{"prompt": "a", "choices": ["b"], "answer": 0}', "at least two"),
            ('{"prompt": "a", "choices": ["b", "c"], "answer": 2}', "one of the choices"),
            (
                '{"prompt": "a", "choices": ["b", "b "], "answer": 0}',
                "two of the choices are the same",
            ),
            ('{"prompt": "a", "choices": ["b", "c"], "answer": true}', "one of the choices"),
            ('{"prompt": "a", "schema": {"$ref": "#/$defs/x"}}', "which it does not hold"),
            ('{"messages": [{"role": "user", "content": 5}], "completion": "a"}', "both texts"),
            ('{"messages": [{"role": "assistant", "content": "a"}]}', "answers nothing"),
        ],
    )
    def test_wrong_lines_are_named(self, tmp_path, line, says):
        path = write(tmp_path / "own.jsonl", {"prompt": "a", "completion": "b"})
        path.write_text(path.read_text() + line + "\n")
        with pytest.raises(UserError, match=says):
            tasks_of_file(path)

    def test_a_line_separator_inside_of_a_text_ends_no_line(self, tmp_path):
        path = tmp_path / "own.jsonl"
        path.write_text(
            json.dumps({"prompt": "a\u2028b", "completion": "c"}, ensure_ascii=False) + "\n",
            encoding="utf-8",
        )
        assert tasks_of_file(path)[0].questions(9)[0].prompt == "a\u2028b"

    def test_no_file_and_an_empty_one(self, tmp_path):
        (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
        with pytest.raises(UserError, match="is not UTF-8"):
            tasks_of_file(tmp_path / "latin.jsonl")
        with pytest.raises(UserError, match="cannot be read"):
            tasks_of_file(tmp_path / "nowhere.jsonl")
        with pytest.raises(UserError, match="holds no questions"):
            tasks_of_file(write(tmp_path / "own.jsonl"))


class TestChoices:
    def test_a_choice_is_a_whole_answer(self, nano_pair):
        """It ends with the turn's end, and is read as a decision of four reads is."""
        model, tokenizer = nano_pair
        message = {"role": "user", "content": "Add 12 and 30."}
        question = replace(
            Question([message], lambda text: Mark(float(text == "42"))), choices=("42", "4")
        )
        labels = _choice_ids(model, tokenizer, question)
        assert {ids[-1] for ids in labels.ids} == {tokenizer.convert_tokens_to_ids("<turn|>")}
        (result,) = evaluate(model, tokenizer, [Task("t", lambda _: [question])]).results
        assert (result.score, result.canvases) == (1, 0)
        (own,) = decide(
            model, tokenizer, chat_ids(tokenizer, [message]), [Decided.choice(["42", "4"])], reads=4
        )
        (found,) = read_labels(
            model, read_prompt(model, chat_ids(tokenizer, [message])), [labels], [16], 4, 0
        )
        assert average(found).tolist() == list(own.probabilities.values())

    def test_choices_that_are_the_same_tokens(self, nano_pair):
        question = replace(Question.from_prompt("a", lambda _: Mark(0.0)), choices=("yes", "yes "))
        with pytest.raises(UserError, match="same tokens"):
            evaluate(*nano_pair, [Task("t", lambda _: [question])])

    def test_nano_compares_numbers_by_reading(self, nano_pair, tmp_path):
        pairs = [
            (a, word, b)
            for a, word, b in (
                (12, "greater", 40),
                (80, "less", 9),
                (33, "less", 71),
                (64, "greater", 5),
                (18, "less", 86),
                (90, "greater", 27),
                (55, "less", 14),
                (2, "greater", 77),
            )
        ]
        entries = [
            {
                "prompt": f"Is {a} {word} than {b}?",
                "choices": ["yes", "no"],
                "answer": "yes" if (a > b) == (word == "greater") else "no",
            }
            for a, word, b in pairs
        ]
        (result,) = evaluate(
            *nano_pair, tasks_of_file(write(tmp_path / "own.jsonl", *entries))
        ).results
        assert (result.answers, result.canvases, result.steps_per_canvas) == (8, 0, None)
        assert result.score >= 7 / 8


def test_command_on_a_file_of_ones_own(monkeypatch, capsys, tmp_path):
    path = write(
        tmp_path / "own.jsonl",
        {"prompt": "Is 12 greater than 40?", "completion": "no", "group": "two digits"},
    )
    code, out, _ = run(monkeypatch, capsys, "evaluate", "--data", str(path), "--limit", "5")
    assert (code, "two digits" in out) == (0, True)
    write(
        path,
        {"prompt": "Is 12 greater than 40?", "completion": "no", "group": "[/two]"},
        {"prompt": "Is 12 greater than 40?", "completion": "yes"},
    )
    code, out, _ = run(
        monkeypatch, capsys, "evaluate", "--data", str(path), "--num-seeds", "2", "--json"
    )
    (result,) = json.loads(out)["results"]
    assert (code, result["score"], result["answers"], result["groups"]) == (
        0,
        0.5,
        4,
        [{"group": "[/two]", "answers": 2, "score": 1.0}],
    )
    assert (result["low"], result["high"]) == pytest.approx(_wilson(np.array([1.0, 0.0])))
    code, out, _ = run(monkeypatch, capsys, "evaluate", "--data", str(path))
    assert (code, "[/two]" in out) == (0, True)
    write(
        path, {"prompt": "Is 12 greater than 40?", "choices": ["yes", "no " * 40], "answer": "yes"}
    )
    code, _, err = run(monkeypatch, capsys, "evaluate", "--data", str(path))
    assert (code, "tokens, a canvas 64" in err) == (2, True)
    code, _, err = run(monkeypatch, capsys, "evaluate", "--data", str(path), "--mode", "both")
    assert (code, "read off a canvas" in err) == (2, True)
    code, _, err = run(monkeypatch, capsys, "evaluate")
    assert (code, "Nothing to ask" in err) == (2, True)
