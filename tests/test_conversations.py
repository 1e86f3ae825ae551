"""Conversations in every template: what a user wrote is text, and what the template reads is where
it reads it.
"""

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_diffgemma.errors import UserError
from mlx_diffgemma.text.dialect import Dialect, arranged
from mlx_diffgemma.text.literal import Control, Marks, encode_literally
from mlx_diffgemma.text.tokenizer import (
    answer_ids,
    calls_as_json,
    chat_ids,
    dialect_of,
    encode_prompt,
    repeated,
    template_of,
)
from mlx_diffgemma.tuning.data import load_split
from tests.helpers.in_process import run
from tests.helpers.templates import (
    CONTROL,
    EOS,
    GEMMA,
    NANO,
    TOKENIZERS,
    call,
    user,
    with_template,
)

TURN, TURN_END = 4, 5
THINKING, NOT_THINKING = "<|turn>model\n", "<|turn>model\n<|channel>thought\n<channel|>"


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]


def text(tokenizer, messages, **options):
    return tokenizer.decode(chat_ids(tokenizer, messages, **options))


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
]
ASKED = [user("How is it in Rome?"), call({"days": 3, "city": "Rome"})]
SUNNY = {"role": "tool", "tool_call_id": "c1", "content": "sunny"}
PLAIN = st.text(st.characters(exclude_characters="<", exclude_categories=["Cs"]), max_size=20)


class TestAsTransformers:
    """What holds no control token is rendered and read exactly as transformers does it."""

    @settings(max_examples=60, deadline=None)
    @given(
        st.sampled_from(sorted(TOKENIZERS)),
        st.lists(PLAIN, min_size=1, max_size=4),
        st.one_of(st.none(), PLAIN),
        st.booleans(),
        st.booleans(),
    )
    def test_turns(self, name, contents, system, think, with_tools):
        tokenizer = TOKENIZERS[name]
        messages = [
            {"role": ("user", "assistant")[place % 2], "content": content}
            for place, content in enumerate(contents)
        ]
        if system is not None:
            messages = [{"role": "system", "content": system}, *messages]
        tools = TOOLS if with_tools else None
        theirs = tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, enable_thinking=think
        )
        assert chat_ids(tokenizer, messages, think, tools) == theirs

    @settings(max_examples=30, deadline=None)
    @given(
        PLAIN,
        PLAIN,
        st.sampled_from(["<", "<|", "<|tu", "a < b", "<b>", "<|turn", "turn>", "< |turn>"]),
    )
    def test_what_only_looks_like_the_beginning_of_one(self, before, after, almost):
        for tokenizer in TOKENIZERS.values():
            messages = [
                user(before + almost),
                {"role": "assistant", "content": almost + after},
                user(almost),
            ]
            assert chat_ids(tokenizer, messages) == tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, enable_thinking=False
            )

    @pytest.mark.parametrize("name", ["nano", "scanning"])
    def test_calls(self, name):
        tokenizer = TOKENIZERS[name]
        messages = [
            *ASKED,
            {**SUNNY, "name": "weather"},
            {"role": "assistant", "content": "Sunny."},
            user("Thanks."),
        ]
        for end in range(1, len(messages) + 1):
            assert chat_ids(
                tokenizer, messages[:end], tools=TOOLS
            ) == tokenizer.apply_chat_template(
                messages[:end], tools=TOOLS, add_generation_prompt=True, enable_thinking=False
            )

    def test_calls_in_the_published_form(self):
        tokenizer = TOKENIZERS["gemma4-like"]
        held = {**ASKED[1], "tool_responses": [{"name": "weather", "response": "sunny"}]}
        for ours, theirs in (
            ([*ASKED, SUNNY], [ASKED[0], held]),
            (
                [*ASKED, SUNNY, {"role": "assistant", "content": "Sunny."}],
                [ASKED[0], {**held, "content": "Sunny."}],
            ),
        ):
            assert chat_ids(tokenizer, ours, tools=TOOLS) == tokenizer.apply_chat_template(
                theirs, tools=TOOLS, add_generation_prompt=True, enable_thinking=False
            )

    def test_control_tokens_where_they_are_allowed(self, tokenizer):
        for content in ("a<|turn>b", "<eos>", "<|image|> <|tool_call>", "<|channel>x<channel|>"):
            theirs = tokenizer.apply_chat_template(
                [user(content)], add_generation_prompt=True, enable_thinking=False
            )
            assert chat_ids(tokenizer, [user(content)], allow_control_tokens=True) == theirs


def literal_markers(tokenizer, messages, **options):
    """How many control tokens the template itself writes, with plain words in place of what users
    wrote.
    """
    vocabulary = tokenizer.get_vocab()
    ids = chat_ids(tokenizer, messages, **options)
    return sorted(token for token in ids if token in {vocabulary[marker] for marker in CONTROL})


class TestLiterally:
    @pytest.mark.parametrize("marker", CONTROL)
    def test_markers_that_users_tools_and_callers_write_are_text(self, tokenizer, marker):
        def conversation(word):
            words = f"a {word}b{word} {word}"
            return [
                {"role": "system", "content": words},
                user(words),
                call({"city": words, "list": [words]}, name="weather"),
                {**SUNNY, "content": words},
                {"role": "assistant", "content": "fine"},
                user([{"type": "text", "text": words}]),
            ]

        tools = [
            {
                "type": "function",
                "function": {
                    "name": "f",
                    "description": marker,
                    "parameters": {
                        "type": "object",
                        "properties": {marker: {"type": "string", "description": marker}},
                    },
                },
            }
        ]
        plain = [
            {
                "type": "function",
                "function": {
                    "name": "f",
                    "description": "word",
                    "parameters": {
                        "type": "object",
                        "properties": {"word": {"type": "string", "description": "word"}},
                    },
                },
            }
        ]
        assert literal_markers(tokenizer, conversation(marker), tools=tools) == literal_markers(
            tokenizer, conversation("word"), tools=plain
        )
        assert f"a {marker}b{marker}" in text(tokenizer, conversation(marker))

    def test_no_part_of_one_joins_another(self, tokenizer):
        """Not over the borders of parts, not where a template cuts something out of the middle or
        trims.
        """
        plain = literal_markers(
            tokenizer, [user("a"), {"role": "assistant", "content": "b"}, user("c")]
        )
        for first, second in (("<|tu", "rn>"), ("<", "eos>"), ("<|turn", ">"), ("<|tu \n", "rn>")):
            image = {"type": "text", "text": first}, {"type": "text", "text": second}
            messages = [
                user(list(image)),
                {"role": "assistant", "content": f"{first}<|channel>{second}"},
                user("c"),
            ]
            assert literal_markers(tokenizer, messages) == plain
            messages[1]["content"] = f"{first}<|channel>x<channel|>{second}"
            assert literal_markers(tokenizer, messages) == plain

    def test_text_round_a_marker_is_cut_into_tokens_as_text(self):
        """Not at the border of what was marked: the whole turn is what its literal text is."""
        for content in (
            "fox <eos> jumps<eos>fox",
            "<|turn>user",
            "\U000f0000<eos>\U000f0001",
            "日<bos>本\ufffd",
        ):
            expected = [
                2,
                TURN,
                *encode_literally(NANO, f"user\n{content}"),
                TURN_END,
                *NANO.encode("\n<|turn>model\n", add_special_tokens=False),
            ]
            assert chat_ids(NANO, [user(content)]) == expected

    @settings(max_examples=100, deadline=None)
    @given(
        st.lists(
            st.sampled_from(
                [
                    *CONTROL,
                    "<|tu",
                    "rn>",
                    "a",
                    " ",
                    "\n",
                    "<",
                    ">",
                    "\U000f0000",
                    "\U000f0001",
                    "\U000f0002",
                    "é",
                ]
            ),
            max_size=8,
        ).map("".join)
    )
    def test_any_mixture_comes_back_and_holds_none(self, content):
        ids = chat_ids(NANO, [user(content)])
        assert NANO.decode(ids) == f"<bos><|turn>user\n{content.strip()}<turn|>\n<|turn>model\n"
        assert ids.count(TURN) == 2
        assert [token for token in ids if token < 19] == [2, TURN, TURN_END, TURN]

    def test_a_template_that_looks_for_markers_finds_them(self):
        assert "[marker] see <|image|>" in text(TOKENIZERS["json"], [user("see <|image|>")])

    def test_json_in_ascii_keeps_no_mark(self):
        got = text(TOKENIZERS["json"], [*ASKED, {**SUNNY, "content": "é<eos>\U000f0003"}])
        assert '"\\u00e9<eos>\\udb80\\udc03"' in got

    def test_prompts(self):
        assert encode_prompt(NANO, "<bos>a<eos>", literal=True) == [
            2,
            *encode_literally(NANO, "<bos>a<eos>"),
        ]
        assert encode_prompt(NANO, "fox", literal=True) == encode_prompt(NANO, "fox")

    def test_variables_of_the_template(self):
        tokenizer = with_template("json")
        tokenizer.chat_template += "{{ colour }}"
        assert 1 not in chat_ids(tokenizer, [user("a")], colour="<eos>")


class TestParts:
    def test_texts_are_joined_as_they_are(self, tokenizer):
        parts = [{"type": "text", "text": part} for part in ("Add 12 ", "and 30.")]
        assert chat_ids(tokenizer, [user(parts)]) == chat_ids(tokenizer, [user("Add 12 and 30.")])

    def test_a_system_message_of_parts(self, tokenizer):
        parts = {
            "role": "system",
            "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}],
        }
        whole = {"role": "system", "content": "Be kind."}
        assert chat_ids(tokenizer, [parts, user("a")]) == chat_ids(tokenizer, [whole, user("a")])

    @pytest.mark.parametrize(
        ("name", "between"), [("nano", ""), ("gemma4-like", "\n\n"), ("scanning", "\n\n")]
    )
    def test_images_stand_between(self, name, between):
        parts = [
            {"type": "text", "text": "One "},
            {"type": "text", "text": "two"},
            {"type": "image"},
            {"type": "text", "text": "three "},
        ]
        got = text(TOKENIZERS[name], [user(parts)])
        assert f"user\nOne two{between}<|image|>{between}three<turn|>" in got

    def test_late_and_second_system_messages_stand_in_front(self, tokenizer):
        system = [
            {"role": "system", "content": "A."},
            {"role": "developer", "content": [{"type": "text", "text": "B."}]},
        ]
        late = [system[0], user("a"), {"role": "assistant", "content": "b"}, system[1], user("c")]
        first = [
            {"role": "system", "content": "A.\n\nB."},
            *(message for message in late if message not in system),
        ]
        assert chat_ids(tokenizer, late) == chat_ids(tokenizer, first)
        assert chat_ids(tokenizer, [user("c"), system[0]]) == chat_ids(
            tokenizer, [system[0], user("c")]
        )

    def test_what_is_given_stays_as_it_is(self):
        messages = [user("a"), call('{"city": "Rome"}'), SUNNY, {"role": "system", "content": "x"}]
        before = repr(messages)
        arranged(messages, Dialect(responses=True))
        assert repr(messages) == before


class TestCalls:
    def test_what_each_template_reads(self):
        told = {name: dialect_of(own, template_of(own)) for name, own in TOKENIZERS.items()}
        assert told == {
            "nano": Dialect(),
            "gemma4-like": Dialect(responses=True, joins_answer=True),
            "scanning": Dialect(),
            "json": Dialect(json_calls=True),
        }
        assert [calls_as_json(own) for own in TOKENIZERS.values()] == [False, False, False, True]

    @pytest.mark.parametrize("name", GEMMA)
    def test_a_result_stands_in_the_turn_of_the_call_and_no_new_turn_begins(self, name):
        got = text(TOKENIZERS[name], [*ASKED, SUNNY])
        thought = "<|channel>thought\n<channel|>" if name == "gemma4-like" else ""
        assert got.endswith(
            '<|turn>model\n<|tool_call>call:weather{city:<|"|>Rome<|"|>,days:3}<tool_call|>'
            '<|tool_response>response:weather{value:<|"|>sunny<|"|>}<tool_response|>' + thought
        )

    @pytest.mark.parametrize("name", GEMMA)
    def test_what_the_model_says_after_a_result_belongs_to_the_turn(self, name):
        got = text(
            TOKENIZERS[name],
            [*ASKED, SUNNY, {"role": "assistant", "content": "Sunny."}, user("Thanks.")],
        )
        assert "<tool_response|>Sunny.<turn|>\n<|turn>user\nThanks.<turn|>\n<|turn>model\n" in got

    @pytest.mark.parametrize("name", GEMMA)
    def test_a_text_before_the_call_stands_before_the_result(self, name):
        got = text(TOKENIZERS[name], [ASKED[0], call({"city": "Rome"}, "Let me see."), SUNNY])
        assert got.index("Let me see.") < got.index("<|tool_response>")
        assert "<tool_response|><turn|>" not in got
        assert not got.endswith("<turn|>\n<|channel>thought\n<channel|>")

    def test_several_calls_and_results(self, tokenizer):
        two = call({"city": "Rome"})
        two["tool_calls"].append(
            {"id": "c2", "type": "function", "function": {"name": "time", "arguments": "{}"}}
        )
        got = text(
            tokenizer,
            [ASKED[0], two, {"role": "tool", "tool_call_id": "c2", "content": "noon"}, SUNNY],
        )
        assert (
            got.index("call:weather")
            < got.index("call:time")
            < got.index("noon")
            < got.index("sunny")
        )
        if not calls_as_json(tokenizer):
            assert 'response:time{value:<|"|>noon<|"|>}' in got
            assert 'response:weather{value:<|"|>sunny<|"|>}' in got

    @pytest.mark.parametrize("broken", ["{", "[1]", '{"a": 1', "not JSON", '"text"'])
    def test_arguments_that_are_no_json_do_not_end_a_conversation(self, tokenizer, broken):
        assert "weather" in text(tokenizer, [ASKED[0], call(broken), SUNNY])

    def test_arguments_in_json_are_the_same_as_maps(self, tokenizer):
        as_text = call('{"days": 3, "city": "Rome"}')
        assert chat_ids(tokenizer, [ASKED[0], as_text, SUNNY]) == chat_ids(
            tokenizer, [*ASKED, SUNNY]
        )

    @pytest.mark.parametrize("name", ["nano", "scanning"])
    def test_thoughts_between_calls_stay_until_the_user_speaks(self, name):
        thinking = {**ASKED[1], "reasoning_content": "They want the weather."}
        thought = "<|channel>thought\nThey want the weather.\n<channel|><|tool_call>"
        assert thought in text(TOKENIZERS[name], [ASKED[0], thinking, SUNNY])
        assert thought in text(
            TOKENIZERS[name], [ASKED[0], {**ASKED[1], "reasoning": "They want the weather."}, SUNNY]
        )
        later = [
            ASKED[0],
            thinking,
            SUNNY,
            {"role": "assistant", "content": "Sunny."},
            user("Thanks."),
        ]
        assert "They want" not in text(TOKENIZERS[name], later)


class TestAnswers:
    def test_prompt_and_answer_are_what_the_model_sees_and_says(self, tokenizer):
        messages = [user("Add 12 and 30."), {"role": "assistant", "content": "<b>42"}]
        assert tokenizer.decode(answer_ids(tokenizer, messages)) == "<b>42<turn|>"
        assert text(tokenizer, messages[:-1]).endswith(
            ("<|turn>model\n", "<|turn>model\n<|channel>thought\n<channel|>")
        )

    def test_calls_and_answers_after_results(self):
        for name in GEMMA:
            tokenizer = TOKENIZERS[name]
            got = tokenizer.decode(answer_ids(tokenizer, ASKED))
            assert (
                got.startswith('<|tool_call>call:weather{city:<|"|>Rome<|"|>,days:3}<tool_call|>')
                or name == "scanning"
            )
            answer = [*ASKED, SUNNY, {"role": "assistant", "content": "Sunny."}]
            assert tokenizer.decode(answer_ids(tokenizer, answer)) == "Sunny.<turn|>"

    def test_markers_in_an_answer_are_text(self, tokenizer):
        ids = answer_ids(
            tokenizer, [user("a"), {"role": "assistant", "content": "see <eos> and <turn|> here"}]
        )
        assert [token for token in ids if token in EOS] == [TURN_END]
        assert tokenizer.decode(ids) == "see <eos> and <turn|> here<turn|>"

    def test_a_template_that_writes_the_question_otherwise(self):
        tokenizer = with_template("json")
        tokenizer.chat_template = "{{ messages | length }}" + tokenizer.chat_template
        with pytest.raises(UserError, match="otherwise once the answer is known"):
            answer_ids(tokenizer, [user("a"), {"role": "assistant", "content": "b"}])


def test_what_the_next_turn_repeats(tokenizer):
    """An empty thought block at the end of a prompt is not in the history; all before it is."""
    messages = [user("Add 12 and 30.")]
    first = chat_ids(tokenizer, messages)
    second = chat_ids(
        tokenizer, [*messages, {"role": "assistant", "content": "42"}, user("Thanks.")]
    )
    kept = repeated(tokenizer, first)
    assert second[:kept] == first[:kept]
    assert tokenizer.decode(first[kept:]) in ("", "<|channel>thought\n<channel|>")
    assert kept < len(first) or second[: len(first)] == first


class TestTrainingData:
    """What lora reads: the prompt is what the model will see, and --mask-prompt leaves it out."""

    def example(self, tokenizer, path, entry, **options):
        path.write_text(json.dumps(entry) + "\n")
        (example,) = load_split(path, tokenizer, TURN_END, 1000, **options).examples
        return example.ids[: example.answer].tolist(), example.ids[example.answer :].tolist()

    def test_chats(self, tokenizer, tmp_path):
        messages = [
            {"role": "system", "content": [{"type": "text", "text": "Be kind."}]},
            user([{"type": "text", "text": "Add 12 "}, {"type": "text", "text": "and 30."}]),
            {"role": "assistant", "content": "42"},
        ]
        prompt, answer = self.example(tokenizer, tmp_path / "train.jsonl", {"messages": messages})
        assert prompt == chat_ids(tokenizer, messages[:-1])
        assert tokenizer.decode(answer) == "42<turn|>"

    @pytest.mark.parametrize("name", GEMMA)
    def test_calls_and_what_follows_them(self, name, tmp_path):
        tokenizer = TOKENIZERS[name]
        path = tmp_path / "train.jsonl"
        as_openai = call('{"days": 3, "city": "Rome"}')
        written = '<|tool_call>call:weather{city:<|"|>Rome<|"|>,days:3}<tool_call|>'
        entry = {"messages": [ASKED[0], as_openai], "tools": TOOLS}
        prompt, answer = self.example(tokenizer, path, entry)
        assert prompt == chat_ids(tokenizer, ASKED[:1], tools=TOOLS)
        assert tokenizer.decode(answer) in (f"{written}<turn|>", f"{written}<|tool_response>")
        said = {"role": "assistant", "content": "Sunny."}
        entry = {"messages": [ASKED[0], as_openai, SUNNY, said], "tools": TOOLS}
        prompt, answer = self.example(tokenizer, path, entry)
        assert prompt == chat_ids(tokenizer, [*ASKED, SUNNY], tools=TOOLS)
        assert tokenizer.decode(answer) == "Sunny.<turn|>"

    def test_control_tokens_are_text_unless_they_are_allowed(self, tokenizer, tmp_path):
        path = tmp_path / "train.jsonl"
        entry = {"prompt": "a <eos> b", "completion": "c <turn|> d"}
        _, answer = self.example(tokenizer, path, entry)
        assert [token for token in answer if token in EOS] == [TURN_END]
        prompt, answer = self.example(tokenizer, path, entry, allow_control_tokens=True)
        assert 1 in prompt
        assert [token for token in answer if token in EOS] == [TURN_END, TURN_END]
        _, text = self.example(tokenizer, path, {"text": "a <eos> b"})
        assert 1 not in text
        _, text = self.example(tokenizer, path, {"text": "a <eos> b"}, allow_control_tokens=True)
        assert 1 in text


class TestCommand:
    """What is typed at the command line is text."""

    def ids(self, monkeypatch, capsys, *options):
        found = []

        def noted(_model, _tokenizer, prompt, **_options):
            found.append(list(prompt))
            return iter(())

        monkeypatch.setattr("mlx_diffgemma.cli.generate.stream_generate", noted)
        run(monkeypatch, capsys, "generate", "-p", "a<eos>b", *options)
        return found[0]

    def test_generate(self, monkeypatch, capsys):
        assert self.ids(monkeypatch, capsys) == chat_ids(NANO, [user("a<eos>b")])
        allowed = self.ids(monkeypatch, capsys, "--allow-control-tokens")
        assert allowed == chat_ids(NANO, [user("a<eos>b")], allow_control_tokens=True)
        plain = self.ids(monkeypatch, capsys, "--ignore-chat-template")
        assert plain == [2, *encode_literally(NANO, "a<eos>b")]
        plain = self.ids(monkeypatch, capsys, "--ignore-chat-template", "--allow-control-tokens")
        assert plain == encode_prompt(NANO, "a<eos>b")


def test_thousands_of_control_tokens_are_found_at_once():
    """A vocabulary may have them, and a text may be nothing but their first character."""
    control = Control({f"<unused{number}>": number for number in range(6000)} | {"<": 6001})
    assert list(control.places("a<unused12><unused5999><")) == [(1, 11), (11, 23), (23, 24)]
    began = time.thread_time()
    assert control.mark("<un" * 100_000, Marks("1", "2", "3")).count("1<2") == 100_000
    assert time.thread_time() - began < 2
