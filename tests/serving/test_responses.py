"""Response bodies made by hand from pieces: a whole one and the chunks of a stream."""

import json

from mlx_diffgemma.serving.jobs.events import Piece, TokenLogprob, Usage
from mlx_diffgemma.serving.protocols.openai import usage_body
from mlx_diffgemma.serving.protocols.openai_chat import ChatEnvelope
from mlx_diffgemma.serving.protocols.openai_completions import CompletionEnvelope

CALL = {"name": "look", "arguments": {"city": "Zürich"}}
LOGPROBS = (TokenLogprob("ab", -0.5, (("ab", -0.5),)), TokenLogprob("猫", -1.0))
CHAT, TEXT = ChatEnvelope("nano"), CompletionEnvelope("nano")


class TestCompletions:
    def test_offsets_of_tokens_count_the_echoed_prompt(self):
        choice = TEXT.choice(0, [Piece(0, "ab猫", logprobs=LOGPROBS)], echo="123")
        assert choice["text"] == "123ab猫"
        assert choice["logprobs"]["text_offset"] == [3, 5]

    def test_offsets_of_a_chunk_follow_the_text_before_it(self):
        chunk = TEXT.delta(Piece(0, "ab猫", logprobs=LOGPROBS), length=7)
        assert chunk["logprobs"]["text_offset"] == [7, 9]
        assert chunk["logprobs"]["tokens"] == ["ab", "猫"]


class TestChat:
    def test_calls_of_a_stream_are_numbered_through(self):
        delta = CHAT.delta(Piece(0, calls=(CALL, CALL)), calls=2)["delta"]
        assert [call["index"] for call in delta["tool_calls"]] == [2, 3]

    def test_arguments_are_json_in_readable_letters(self):
        (call,) = CHAT.choice(0, [Piece(0, calls=(CALL,))])["message"]["tool_calls"]
        assert call["function"]["arguments"] == '{"city": "Zürich"}'
        assert json.loads(call["function"]["arguments"]) == CALL["arguments"]

    def test_an_answer_of_calls_alone_has_no_content(self):
        assert CHAT.choice(0, [Piece(0, " \n", calls=(CALL,))])["message"]["content"] is None
        assert CHAT.choice(0, [Piece(0, "See:", calls=(CALL,))])["message"]["content"] == "See:"

    def test_thoughts_stand_beside_the_text(self):
        pieces = [Piece(0, thought="I add. "), Piece(0, "42", finish_reason="stop")]
        message = CHAT.choice(0, pieces)["message"]
        assert (message["reasoning_content"], message["content"]) == ("I add.", "42")
        assert CHAT.delta(pieces[0])["delta"] == {"reasoning_content": "I add. "}


def test_usage_counts_what_was_in_the_cache():
    usage = usage_body(Usage(30, 12, 20, 5, 64, 16))
    assert usage["prompt_tokens_details"] == {"cached_tokens": 20}
    assert usage["total_tokens"] == 42
    assert usage["tokens_per_forward"] == 4.0
