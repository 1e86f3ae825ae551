"""Turns, history, cache and commands of a conversation."""

import io

import pytest

from mlx_diffgemma import chat_ids, generate
from mlx_diffgemma.cli.chat import COMMANDS
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.generation.chat import Chat
from mlx_diffgemma.text.tokenizer import load_tokenizer, repeated
from tests.helpers.in_process import run
from tests.helpers.scripted import scripted
from tests.helpers.templates import FOLDER


def say(chat, text):
    return "".join(response.text for response in chat.send(text))


def test_turns_are_what_generate_gives_for_the_history(nano_pair):
    _, tokenizer = nano_pair
    chat, messages = Chat(*nano_pair, seed=5), []
    for number, question in enumerate(
        ("Add 12 and 30.", "Sort these numbers: 42 17 91", "Is 3 greater than 2?")
    ):
        messages.append({"role": "user", "content": question})
        answer = say(chat, question)
        assert answer == generate(*nano_pair, chat_ids(tokenizer, messages), seed=5 + number)
        messages.append({"role": "assistant", "content": answer})
        assert chat.messages == messages


def test_a_turn_encodes_only_what_is_new(nano_pair):
    _, tokenizer = nano_pair
    chat = Chat(*nano_pair, seed=5)
    say(chat, "Add 12 and 30.")
    first = chat.stats
    assert (first.turns, first.reused) == (1, 0)
    say(chat, "Add 1 and 2.")
    whole = chat_ids(tokenizer, chat.messages[:-1])
    assert chat.stats.reused == first.encoded
    assert chat.stats.reused + chat.stats.encoded == len(whole)


def test_thoughts_leave_the_history(nano_pair, monkeypatch):
    from dataclasses import replace

    from mlx_diffgemma.generation import chat as module

    real = module.stream_generate

    def thinking(*arguments, **options):
        for response in real(*arguments, **options):
            yield replace(response, thought="let me see")

    monkeypatch.setattr(module, "stream_generate", thinking)
    chat = Chat(*nano_pair, seed=5, think=True)
    assert [r.thought for r in chat.send("Add 12 and 30.")] == ["let me see"]
    assert "see" not in chat.messages[-1]["content"]


@pytest.mark.parametrize("thinks", [False, True])
def test_what_a_second_turn_encodes_past_the_window(nano_pair, monkeypatch, thinks):
    """A committed canvas is reused as long as the history repeats it, which it does not where a
    thought was dropped.
    """
    _, tokenizer = nano_pair
    chat = Chat(*nano_pair, seed=5, think=thinks, max_denoising_steps=3, max_tokens=128)
    thought = (
        tokenizer.encode("<|channel>thought\nlet me see<channel|>", add_special_tokens=False)
        if thinks
        else []
    )
    ones, end = (
        tokenizer.encode(text, add_special_tokens=False)
        for text in ("1" * (64 - len(thought)), "23<turn|>")
    )
    with monkeypatch.context() as patch:
        scripted(patch, nano_pair[0], [[*thought, *ones], end])
        assert say(chat, "Add " + "7" * 100) == "1" * len(ones) + "23"
    first = chat.stats.encoded
    assert first > 100, "past the window of 64"
    say(chat, "Add 1 and 2.")
    second = len(chat_ids(tokenizer, chat.messages[:-1], think=thinks))
    reused = first if thinks else first + 64
    assert (chat.stats.reused, chat.stats.encoded) == (reused, second - reused)
    assert chat.messages[-1]["content"] == generate(
        *nano_pair,
        chat_ids(tokenizer, chat.messages[:-1], think=thinks),
        seed=6,
        max_denoising_steps=3,
        max_tokens=128,
    )


def test_an_answer_that_is_broken_off(nano_pair):
    chat = Chat(*nano_pair, seed=5, max_denoising_steps=2)
    answer = chat.send("Tell me a story about Leo the owl and a map.")
    first = next(answer)
    assert first.finish_reason is None, "there is more to come"
    answer.close()
    assert [m["content"] for m in chat.messages][1:] == [first.text]
    before = list(chat.messages)
    chat.send("never asked")
    assert chat.messages == before
    say(chat, "Add 12 and 30.")
    assert len(chat.messages) == 4


def test_a_history_that_fills_the_context(nano_pair):
    chat = Chat(*nano_pair, seed=5)
    with pytest.raises(UserError, match="leaves no room"):
        say(chat, "word " * 9000)
    assert chat.messages == []
    assert say(chat, "Add 12 and 30.") == "42"


def test_reset_keeps_the_system_message(nano_pair):
    chat = Chat(*nano_pair, system="Answer in upper case.", seed=5)
    say(chat, "Add 12 and 30.")
    chat.reset()
    assert (chat.messages, chat.stats.turns, chat.system) == ([], 0, "Answer in upper case.")


class TestCommand:
    def talk(self, monkeypatch, capsys, *lines, options=()):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        return run(monkeypatch, capsys, "chat", "--seed", "5", *options)

    def test_lines_from_a_pipe(self, monkeypatch, capsys):
        lines = ("Add 12 and 30.", "", "/stats", "Is 3 greater than 2?", "/exit", "never read")
        code, out, err = self.talk(monkeypatch, capsys, *lines)
        assert (code, out) == (0, "42\nyes\n")
        assert "1 turns, " in err
        assert "steps a canvas" in err

    def test_commands(self, monkeypatch, capsys):
        code, out, err = self.talk(
            monkeypatch,
            capsys,
            "/system Be kind.",
            "/system",
            "/sytem",
            "/what",
            "/help",
            "Add 1 and 2.",
            "/reset",
            "/stats",
        )
        assert (code, out) == (0, "3\n")
        assert "set to 'Be kind.'" in err
        assert "the system message is gone" in err
        assert "There is no command /sytem. Did you mean /system?" in err
        assert "There is no command /what. /help lists all commands." in err
        for name, meaning in COMMANDS.items():
            assert f"{name:8} {meaning}\n" in err
        assert "0 turns" in err

    def test_an_error_does_not_end_it(self, monkeypatch, capsys):
        code, out, err = self.talk(monkeypatch, capsys, "word " * 9000, "Add 12 and 30.")
        assert (code, out) == (0, "42\n")
        assert "leaves no room" in err

    def test_wrong_options(self, monkeypatch, capsys):
        code, _, err = self.talk(monkeypatch, capsys, options=("--coverage", "2"))
        assert code == 2
        assert "coverage must lie" in err
        code, _, err = self.talk(
            monkeypatch, capsys, options=("--coverage", "0.9", "--self-conditioning", "dense")
        )
        assert code == 2
        assert "coverage has no meaning with dense" in err


@pytest.mark.parametrize("name", ["gemma4-like", "scanning"])
def test_a_prompt_that_ends_in_an_empty_thought_is_reused_up_to_it(
    random_folder, random_pair, name
):
    """The history does not repeat the thought: what is before it is kept for the next turn, and the
    text is as without a cache.
    """
    tokenizer = load_tokenizer(random_folder, (1, 5, 13))
    tokenizer.chat_template = (FOLDER / f"{name}.jinja").read_text()
    chat = Chat(random_pair[0], tokenizer, seed=5, max_denoising_steps=2, max_tokens=16)
    for number, question in enumerate(("Add 12 and 30, and then all the others.", "And now?")):
        say(chat, question)
        prompt = chat_ids(tokenizer, chat.messages[:-1])
        alone = generate(
            random_pair[0], tokenizer, prompt, seed=5 + number, max_denoising_steps=2, max_tokens=16
        )
        assert chat.messages[-1]["content"] == alone
    first = chat_ids(tokenizer, chat.messages[:1])
    assert chat.stats.reused == repeated(tokenizer, first) < len(first)
