"""Messages, and tokenizers with the templates of several families."""

from pathlib import Path

from build_nano_tokenizer import MARKERS

from mlx_diffgemma import nano
from mlx_diffgemma.text.tokenizer import load_tokenizer

FOLDER = Path(__file__).parents[1] / "templates"
EOS = (1, 5, 13)
NANO = load_tokenizer(nano.FOLDER, EOS)
CONTROL = [*MARKERS, "<pad>", "<eos>", "<bos>"]


def with_template(name):
    tokenizer = load_tokenizer(nano.FOLDER, EOS)
    if name != "nano":
        tokenizer.chat_template = (FOLDER / f"{name}.jinja").read_text()
    return tokenizer


TOKENIZERS = {name: with_template(name) for name in ("nano", "gemma4-like", "scanning", "json")}
GEMMA = ("nano", "gemma4-like", "scanning")


def user(content):
    return {"role": "user", "content": content}


def call(arguments, content="", name="weather", **more):
    return {
        "role": "assistant",
        "content": content,
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}}
        ],
        **more,
    }
