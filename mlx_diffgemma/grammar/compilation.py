"""Compiles a schema, an expression or a list of texts to an automaton over tokens.

Nothing here imports MLX, so that a small process can do this work.

    >>> compiled(language_of, (None, "[0-9]+", None, ""), vocabulary, seconds=30)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mlx_diffgemma.grammar import calls
from mlx_diffgemma.grammar import regex as regexes
from mlx_diffgemma.grammar import schema as schemas
from mlx_diffgemma.grammar.automaton import compile_language
from mlx_diffgemma.grammar.budget import limited
from mlx_diffgemma.grammar.language import Language, choice, concat, text
from mlx_diffgemma.grammar.tokens import TokenAutomaton, Vocabulary, compile_tokens


def language_of(
    json_schema: Any, regex: str | None, choices: Sequence[str] | None, begin: str
) -> Language:
    """The texts that a schema, an expression or a list admits, each after ``begin``.

    Args:
        json_schema: A JSON schema, as an object or its text.
        regex: A regular expression.
        choices: A list of texts.  Exactly one of the three is given.
        begin: The text before each.
    """
    if json_schema is not None:
        language = schemas.parse(json_schema)
    elif regex is not None:
        language = regexes.parse(regex)
    else:
        language = choice([text(option) for option in choices or ()])
    return concat([text(begin), language])


def language_of_named(json_schemas: Sequence[tuple[str, Any]], as_json: bool) -> Language:
    """The language of one of several names, followed by a text that its JSON schema accepts."""
    parse = schemas.parse if as_json else calls.parse
    return choice([concat([text(name), parse(schema)]) for name, schema in json_schemas])


def compiled(
    language: Callable[..., Language],
    asked: Sequence[Any],
    vocabulary: Vocabulary,
    seconds: float,
) -> tuple[TokenAutomaton, int]:
    """Compile a language.

    Args:
        language: Makes the language.
        asked: Its arguments.
        vocabulary: The vocabulary of the tokens.
        seconds: How long compiling may take.

    Returns:
        (the automaton over tokens, how many states the one over bytes has)

    Raises:
        UserError: The language cannot be guaranteed, is too large, or takes too long.
    """
    with limited(seconds):
        automaton = compile_language(language(*asked), seconds)
        return compile_tokens(automaton, vocabulary, seconds), automaton.states
