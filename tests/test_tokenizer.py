"""Text and markers: nothing is lost, nothing is split, nothing leaks."""

import json
import random
import shutil
import threading

import pytest
import sentencepiece
from build_nano_tokenizer import MARKERS, to_tokenizers_json
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_diffgemma import nano
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.text.literal import encode_literally
from mlx_diffgemma.text.parser import ResponseParser, TextStream
from mlx_diffgemma.text.tokenizer import chat_ids, encode_prompt, load_tokenizer

EOS = (1, 5, 13)
PIECES = sentencepiece.SentencePieceProcessor(model_file=str(nano.FOLDER / "tokenizer.model"))
FAST = load_tokenizer(nano.FOLDER, EOS)
AWKWARD = [
    "\u2581",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "12",
    "<|turn>",
    "<pad>",
    "<bos>",
    "<unk>",
    "<0x41>",
    "é",
    "日本",
    "\ufffd",
    "fox",
    "👩‍👩‍👧",
    "\u0000",
    "<|",
    "|>",
    "_",
]
TEXT = st.one_of(st.text(), st.lists(st.sampled_from(AWKWARD)).map("".join))


def encode(text):
    return FAST.encode(text, add_special_tokens=False)


class TestNanoTokenizer:
    @settings(max_examples=500, deadline=None)
    @given(TEXT)
    def test_lossless_and_the_same_in_both_files(self, text):
        ids = encode(text)
        assert ids == PIECES.encode(text)
        assert FAST.decode(ids) == text
        assert PIECES.decode(ids) == text

    def test_one_token_a_digit_and_a_marker(self):
        assert len(encode("2026")) == 4
        for marker in MARKERS:
            assert len(encode(marker)) == 1

    def test_the_json_follows_from_the_model(self):
        model = (nano.FOLDER / "tokenizer.model").read_bytes()
        assert json.loads((nano.FOLDER / "tokenizer.json").read_text()) == to_tokenizers_json(model)

    def test_stop_ids_come_from_the_generation_config(self):
        assert FAST.eos_token_ids == set(EOS)


class TestChatTemplate:
    def text(self, messages, **options):
        return FAST.decode(chat_ids(FAST, messages, **options))

    def test_plain(self):
        assert (
            self.text([{"role": "user", "content": " Hi "}])
            == "<bos><|turn>user\nHi<turn|>\n<|turn>model\n"
        )

    def test_system_and_thinking(self):
        got = self.text(
            [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}],
            think=True,
        )
        assert got.startswith("<bos><|turn>system\n<|think|>Be kind.<turn|>\n<|turn>user\n")

    def test_thoughts_are_dropped_from_history(self):
        past = "<|channel>thought\nsecret\n<channel|>Hello"
        turns = (("user", "a"), ("assistant", past), ("user", "b"))
        got = self.text([{"role": role, "content": content} for role, content in turns])
        assert "secret" not in got
        assert "<|turn>model\nHello<turn|>\n" in got

    def test_unknown_role(self):
        with pytest.raises(UserError, match="unknown role judge"):
            self.text([{"role": "judge", "content": "a"}])

    def test_a_prompt_with_its_own_start_token_gets_no_second(self):
        assert encode_prompt(FAST, "<bos>fox").count(2) == 1
        assert encode_prompt(FAST, "fox")[0] == 2


class TestTextStream:
    @settings(max_examples=200, deadline=None)
    @given(TEXT, st.integers(0, 1000))
    def test_pieces_join_to_the_whole(self, text, seed):
        rng, stream, ids, got = (
            random.Random(seed),
            TextStream(FAST, keep_markers=True),
            encode(text),
            "",
        )
        while ids:
            size = rng.randint(1, 4)
            piece = stream.feed(ids[:size])
            assert not piece.endswith("\ufffd") or "\ufffd" in text
            got, ids = got + piece, ids[size:]
        assert got + stream.finish() == text

    def test_a_character_in_the_making_is_held_back(self):
        stream, ids = TextStream(FAST), encode("鷹")
        assert len(ids) == 3, "three bytes"
        assert [stream.feed([token]) for token in ids] == ["", "", "鷹"]

    def test_a_blank_between_two_pieces_stays(self):
        """Decoders of other tokenizers drop the one that a text begins with."""

        class Dropping:
            def decode(self, ids, skip_special_tokens):
                return "".join(ids).removeprefix(" ")

        stream = TextStream(Dropping())
        pieces = [stream.feed([token]) for token in (" The", " owl", "s", " sleep")]
        assert pieces == ["The", " owl", "s", " sleep"]

    def test_the_replacement_character_itself_is_not_held_back(self):
        """What a model writes may hold it; only the first bytes of a character are waited for."""
        ids = encode("a\ufffd")
        stream = TextStream(FAST)
        assert "".join(stream.feed([token]) for token in ids) == "a\ufffd"
        assert stream.feed(encode("b")) == "b"
        broken = TextStream(FAST)
        assert broken.feed([FAST.get_vocab()["<0xFF>"]]) == "\ufffd", (
            "no character begins with this byte"
        )
        assert broken.feed([FAST.get_vocab()["<0xE9>"]]) == ""
        assert broken.finish().endswith("\ufffd")


def parse(text, size=None):
    """Parse ``text`` fed whole, or ``size`` ids at a time."""
    parser, ids = ResponseParser(FAST), encode(text)
    deltas = [
        parser.feed(ids[i : i + (size or len(ids))])
        for i in range(0, len(ids), size or len(ids) or 1)
    ]
    deltas.append(parser.finish())
    return (
        "".join(d.answer for d in deltas),
        "".join(d.thought for d in deltas),
        [call for d in deltas for call in d.tool_calls],
        parser.malformed,
    )


CALL = '<|tool_call>call:add{a:12,b:<|"|>x}y<|"|>}<tool_call|>'


class TestResponseParser:
    @pytest.mark.parametrize("size", [None, 1, 2, 3])
    @pytest.mark.parametrize(
        ("text", "answer", "thought", "calls"),
        [
            ("42", "42", "", []),
            ("42<turn|>", "42", "", []),
            ("<|channel>thought\nOnes: 2.\n<channel|>42<turn|>", "42", "Ones: 2.\n", []),
            ("<|channel>thought\n<channel|>42", "42", "", []),
            ("<|channel>thought<channel|>42", "42", "", []),
            ("<|channel>thought\nA<channel|>x<|channel>final\nB<channel|>y", "xBy", "A", []),
            ("<|channel>final\nhello<channel|> you", "hello you", "", []),
            ("<|channel>thought\nnever closed", "", "never closed", []),
            (CALL, "", "", [{"name": "add", "arguments": {"a": 12, "b": "x}y"}}]),
            (
                f"a{CALL}b{CALL}c",
                "abc",
                "",
                [{"name": "add", "arguments": {"a": 12, "b": "x}y"}}] * 2,
            ),
            ("stray<channel|> end<tool_call|>", "stray end", "", []),
            ("<|turn>user\nx", "user\nx", "", []),
            ("日本<|channel>thought\n日<channel|>é", "日本é", "日", []),
        ],
    )
    def test_parts(self, text, answer, thought, calls, size):
        assert parse(text, size)[:3] == (answer, thought, calls)

    @pytest.mark.parametrize(
        "text", ["<|tool_call>nonsense<tool_call|>ok", "ok<|tool_call>call:add{a:1"]
    )
    def test_malformed_calls_are_listed_not_shown(self, text):
        answer, _, calls, malformed = parse(text)
        assert (answer, calls) == ("ok", [])
        assert len(malformed) == 1

    @settings(max_examples=200, deadline=None)
    @given(
        st.lists(st.sampled_from(["fox", "日", "\n", "thought\n", *MARKERS]), max_size=12).map(
            "".join
        )
    )
    def test_no_marker_ever_leaks(self, text):
        answer, thought, _, _ = parse(text, 1)
        for marker in MARKERS:
            assert marker not in answer + thought

    def test_a_prefilled_thought_goes_on(self):
        parser = ResponseParser(FAST)
        parser.feed(encode("<|channel>thought\nI begin"))
        assert parser.feed(encode(" and go on<channel|>done")).thought == " and go on"


class TestBadFolders:
    def test_missing(self, tmp_path):
        with pytest.raises(UserError, match="no tokenizer.json"):
            load_tokenizer(tmp_path, EOS)

    def test_damaged(self, tmp_path):
        for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
            shutil.copy(nano.FOLDER / name, tmp_path)
        (tmp_path / "tokenizer.json").write_text("{broken")
        with pytest.raises(UserError, match="cannot be read"):
            load_tokenizer(tmp_path, EOS)


def test_literal_text_and_templates_do_not_disturb_each_other(nano_pair):
    """A server writes prompts on several threads with one tokenizer."""
    tokenizer, wrong, done = nano_pair[1], [], threading.Event()
    text, messages = "<|turn>user\nHello<turn|>", [{"role": "user", "content": "Hello"}]
    literal, chat = encode_literally(tokenizer, text), chat_ids(tokenizer, messages)
    assert len(literal) > len(tokenizer.encode(text, add_special_tokens=False)), "no marker is one"

    def write_literally():
        while not done.is_set():
            wrong.append(encode_literally(tokenizer, text) != literal)

    threads = [threading.Thread(target=write_literally) for _ in range(2)]
    for thread in threads:
        thread.start()
    wrong += [chat_ids(tokenizer, messages) != chat for _ in range(500)]
    done.set()
    for thread in threads:
        thread.join()
    assert not any(wrong)
