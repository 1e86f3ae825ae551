"""Tokens do what their bytes do, in vocabularies of all the kinds that are known."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from mlx_diffgemma import load
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.grammar import regex, schema
from mlx_diffgemma.grammar import tokens as token_automata
from mlx_diffgemma.grammar.automaton import compile_language
from mlx_diffgemma.grammar.tokens import Vocabulary, compile_tokens, token_bytes
from tests.grammar.walks import distances

MODEL, FAST = load("nano")
SIZE = MODEL.config.text.vocab_size
NANO = Vocabulary(FAST, SIZE)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "n": {"type": "integer", "minimum": -12, "maximum": 345},
        "of": {"enum": ["fox", "fast", "鯨"]},
    },
    "required": ["name"],
}
LANGUAGES = [
    regex.parse("[a-z ]{2,9}[.!]"),
    regex.parse(r"(the |The )?fo[xr]est?|\d{1,4}|鯨+"),
    regex.parse("[^a-m]*"),
    schema.parse(SCHEMA),
    regex.parse("(?s:.*)"),
]
PAIRS = [(own, compile_tokens(own, NANO)) for own in map(compile_language, LANGUAGES)]


def wrapped(tokens, decoder, added=(), model=models.WordLevel):
    backend = Tokenizer(
        model({token: place for place, token in enumerate(tokens)}, unk_token=tokens[0])
    )
    if decoder is not None:
        backend.decoder = decoder
    backend.add_tokens([AddedToken(token) for token in added])
    return TokenizerWrapper(
        PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=tokens[0]), eos_token_ids=[0]
    )


def encode(text):
    return np.array(FAST.encode(text, add_special_tokens=False))


def test_markers_need_not_be_special():
    tokenizer = wrapped(["a", "b"], decoders.Fuse(), added=["<|tool_call>"])
    marker = tokenizer.get_vocab()["<|tool_call>"]
    assert marker not in token_bytes(tokenizer, 3)


class TestAutomaton:
    @settings(max_examples=200, deadline=None)
    @given(st.sampled_from(PAIRS), st.integers(0, 2**32))
    def test_tokens_lead_where_their_bytes_do(self, pair, seed):
        """Random sequences, mostly of tokens that may come; at each token both are alive or neither
        is.
        """
        plain, tokens = pair
        rng, state, content, taken = np.random.default_rng(seed), 0, b"", []
        for _ in range(12):
            alive = np.flatnonzero(np.append(tokens.behind[state] >= 0, False)[tokens.class_of])
            anyway = rng.random() < 0.1 or not alive.size
            token = int(rng.choice(sorted(NANO.texts) if anyway else alive))
            taken, content = [*taken, token], content + NANO.texts[token]
            behind = 0
            for byte in content:
                behind = int(plain.delta[behind, byte]) if behind >= 0 else -1
            state = tokens.advance(0, np.array(taken))
            assert (state >= 0) == (behind >= 0)
            if state < 0:
                break
            assert (
                tokens.accepts(np.array(taken))
                == plain.accepts(content)
                == bool(tokens.accepting[state])
            )

    @pytest.mark.parametrize(
        "text",
        [
            "the fox.",
            "The forest",
            "1234",
            "鯨鯨",
            '{"name":"鯨 walks","n":-7,"of":"鯨"}',
            "NO\n",
            "",
        ],
    )
    def test_however_a_text_is_written(self, text):
        """By the tokenizer, and byte by byte."""
        single = {content[0]: token for token, content in NANO.texts.items() if len(content) == 1}
        for plain, tokens in PAIRS:
            expected = plain.accepts(text.encode())
            assert tokens.accepts(encode(text)) == expected
            assert (
                tokens.accepts(np.array([single[byte] for byte in text.encode()], dtype=np.int64))
                == expected
            )

    @pytest.mark.parametrize("pair", PAIRS)
    def test_classes(self, pair):
        """Tokens of one class do alike from every state; any two classes differ somewhere; of none:
        never.
        """
        plain, tokens = pair
        rows = {}
        reached = {0: 0}  # states over bytes, of those over tokens
        for state in range(tokens.states):
            for cls in np.flatnonzero(tokens.behind[state] >= 0):
                behind = reached[state]
                for byte in NANO.texts[int(np.flatnonzero(tokens.class_of == cls)[0])]:
                    behind = int(plain.delta[behind, byte])
                assert reached.setdefault(int(tokens.behind[state, cls]), behind) == behind
        numbers = np.full(plain.states + 1, -1)
        numbers[list(reached.values())] = list(reached)
        for token in range(SIZE):
            behind = np.array([reached[state] for state in range(tokens.states)])
            if token not in NANO.texts:
                assert tokens.class_of[token] == tokens.classes
                continue
            for byte in NANO.texts[token]:
                behind = np.where(behind >= 0, plain.delta[behind, byte], -1)
            cls, expected = tokens.class_of[token], numbers[behind]
            assert (expected == (tokens.behind[:, cls] if cls < tokens.classes else -1)).all()
            assert rows.setdefault(expected.tobytes(), cls) == cls
        assert len(set(rows.values())) == len(rows)

    @pytest.mark.parametrize("pair", PAIRS)
    def test_distance(self, pair):
        np.testing.assert_array_equal(
            pair[1].distance, distances(pair[1].behind, pair[1].accepting)
        )

    def test_ends(self):
        tokens = compile_tokens(compile_language(regex.parse("a?b")), NANO)
        expected = [
            bool(tokens.accepting[state]) and all(tokens.behind[state] < 0)
            for state in range(tokens.states)
        ]
        assert tokens.ends.tolist() == expected
        assert any(expected)

    def test_markers_and_end_tokens_never_come(self):
        """Not where any text may come, either."""
        tokens = PAIRS[-1][1]
        for name in ("<bos>", "<eos>", "<pad>", "<|channel>"):
            assert tokens.class_of[FAST.convert_tokens_to_ids(name)] == tokens.classes
        assert not tokens.accepts(np.array([FAST.eos_token_id]))


class TestRefusals:
    def vocabulary(self, *tokens):
        return Vocabulary(wrapped(["<end>", *tokens], decoders.Fuse()), len(tokens) + 1)

    def test_what_cannot_be_written(self):
        with pytest.raises(UserError, match="vocabulary"):
            compile_tokens(compile_language(regex.parse("ac")), self.vocabulary("a", "b"))

    def test_ways_that_cannot_be_finished_are_not_entered(self):
        tokens = compile_tokens(compile_language(regex.parse("ab|ba*c")), self.vocabulary("a", "b"))
        assert tokens.accepts(np.array([1, 2]))
        assert tokens.advance(0, np.array([2])) == -1

    def test_too_long(self):
        with pytest.raises(UserError, match="too long to compile, more than the"):
            compile_tokens(PAIRS[0][0], NANO, seconds=-1.0)

    def test_too_many_edges(self, monkeypatch):
        monkeypatch.setattr(token_automata, "MAX_EDGES", 5)
        with pytest.raises(UserError, match="of at most 5"):
            compile_tokens(PAIRS[0][0], NANO)


class TestVocabulary:
    @settings(max_examples=200, deadline=None)
    @given(
        st.one_of(
            st.text(),
            st.lists(
                st.sampled_from(["the", " fox", "鯨", "é", "\n", "<0x41>", "😀", "  ", "\u2581"])
            ).map("".join),
        )
    )
    def test_bytes_of_nano_add_up(self, text):
        ids = encode(text)
        if all(token in NANO.texts for token in ids.tolist()):  # no marker
            assert (
                b"".join(NANO.texts[token] for token in ids.tolist()).decode()
                == FAST.decode(ids)
                == text
            )

    def test_characters_outside_the_vocabulary_are_bytes(self):
        assert "鯨" not in FAST.get_vocab()
        assert [NANO.texts[token] for token in encode("鯨").tolist()[-3:]] == [
            bytes([byte]) for byte in "鯨".encode()
        ]

    def test_end_tokens_need_not_be_special(self):
        tokenizer = wrapped(["<e>", "a", "stop"], decoders.Fuse())
        assert sorted(
            token_bytes(TokenizerWrapper(tokenizer._tokenizer, eos_token_ids=[2]), 3)
        ) == [1]

    def test_sizes_cut(self):
        assert max(token_bytes(FAST, 900)) == 899

    @pytest.mark.parametrize(
        ("decoder", "tokens", "added"),
        [
            (
                decoders.Sequence(
                    [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
                ),
                ["<e>", "\u2581a", "b\u2581\u2581", "<0xC3>", "<0xA9>", "é"],
                [],
            ),
            (decoders.Replace("_", "--"), ["<e>", "a_", "_", "b"], []),
            (
                decoders.Sequence([decoders.Replace("a", "b"), decoders.Replace("b", "c")]),
                ["<e>", "a", "ab", "x"],
                [],
            ),
            (decoders.Fuse(), ["<e>", "a", "é猫"], []),
            (decoders.ByteLevel(), ["<e>", "Ġthe", "Ċ", "Ã©", "çĮ", "«", "!"], []),
            (decoders.ByteLevel(), ["<e>", "Ġthe", "a"], ["two words", "猫", "Ġx"]),
            (decoders.Sequence([decoders.ByteLevel()]), ["<e>", "Ġ", "Ā"], []),
        ],
    )
    def test_bytes_equal_the_decoder(self, decoder, tokens, added):
        """Of every pair of tokens that is whole characters."""
        tokenizer = wrapped(tokens, decoder, added)
        texts = token_bytes(tokenizer, len(tokens) + len(added))
        assert sorted(texts) == list(range(1, len(tokens) + len(added)))
        whole = 0
        for pair in itertools.product(texts, repeat=2):
            content = b"".join(texts[token] for token in pair).decode("utf-8", "replace")
            if "\ufffd" not in content:
                assert tokenizer.decode(list(pair), clean_up_tokenization_spaces=False) == content
                whole += 1
        assert whole > 3

    def test_every_byte_of_byte_level(self):
        levels = token_automata._byte_level()
        assert sorted(levels.values()) == list(range(256))
        assert all(
            decoders.ByteLevel().decode([character]) == chr(byte)
            for character, byte in levels.items()
            if byte < 128
        )

    @pytest.mark.parametrize(
        ("decoder", "named"),
        [
            (decoders.Metaspace(), "Metaspace"),
            (decoders.WordPiece(), "WordPiece"),
            (decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 0)]), "Strip"),
            (None, "no decoder"),
        ],
    )
    def test_unknown_decoders(self, decoder, named):
        with pytest.raises(UserError, match=named):
            token_bytes(wrapped(["<e>", "a"], decoder), 2)
