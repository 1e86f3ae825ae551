"""Hints for users who ask the built-in model for something that it was not trained on."""

from __future__ import annotations

import re

from mlx_diffgemma import nano
from mlx_diffgemma.cli.output import errors

# The phrasings of the prompts of nano's tasks (evaluation/nano_tasks.py).
KNOWN = re.compile(
    r"(turn this into|write as) json\b"
    r"|.*\bas json, please\W*$"
    r"|(sort|put in order)\b"
    r"|(add|what is)? *\d+ *(and|\+) *\d+"
    r"|write in (capitals|lower case)\b"
    r"|make this (upper case|small)\b"
    r"|capitalize each word\b|write as a title\b"
    r"|reverse\b|say backwards\b"
    r"|is \d+ (greater|less) than \d+"
    r"|is the word \S+ in this list|does this list have\b"
    r"|(repeat|copy this)\b"
    r"|(write a|tell me a|a) story\b",
    re.IGNORECASE | re.DOTALL,
)
TASKS = (
    "turning a sentence into JSON, sorting and adding small numbers, upper, lower and title case, "
    "reversing words, comparing numbers, finding a word in a list, copying, and short stories"
)
HINT = (
    f"hint: {nano.NAME}, the built-in model, has learnt a few tasks and nothing else: {TASKS}. "
    'Try "Sort these numbers: 42 17 91", or give another --model.'
)


def hint_for(model: str, adapter_path: str | None, prompt: str) -> str | None:
    """The hint, if ``prompt`` is not one of the tasks of the built-in ``model``; None otherwise.

    Args:
        model: the name of the model.
        adapter_path: the folder of its adapter, or None.
        prompt: the user's message.
    """
    if model != nano.NAME or adapter_path is not None or KNOWN.match(prompt.strip()):
        return None
    return HINT


def print_hint(model: str, adapter_path: str | None, prompt: str) -> bool:
    """Print the hint on standard error, if there is one.

    The arguments are those of ``hint_for``.

    Returns:
        Whether it was printed.
    """
    hint = hint_for(model, adapter_path, prompt)
    if hint:
        errors.print(hint, style="dim", markup=False)
    return hint is not None
