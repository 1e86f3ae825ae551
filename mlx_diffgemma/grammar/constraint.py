"""A constraint, ready for canvases of one model: compiled once, and what it needs to know of a step's logits.

    >>> constraint = compile_constraint(tokenizer, model.config, regex="[0-9]+ apples?")
"""

from __future__ import annotations

import json
import time
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.grammar import regex as regexes
from mlx_diffgemma.grammar import schema as schemas
from mlx_diffgemma.grammar.automaton import MAX_SECONDS, compile_language
from mlx_diffgemma.grammar.language import choice, concat, text
from mlx_diffgemma.grammar.program import Chain
from mlx_diffgemma.grammar.tokens import TokenAutomaton, Vocabulary, compile_tokens
from mlx_diffgemma.sampler import StepNumbers, inverse_cdf, truncate

ALONE = 2048  # tokens from which a class is gathered for itself, others beside those of about their size
REMEMBERED = 32  # compiled constraints that are kept, the latest used


class Masses(NamedTuple):
    """Of the columns of a constraint at each position [length, columns]: log of the sum of the exponentials of the scaled logits,
    the largest logit, and whose it is."""

    mass: mx.array
    best: mx.array
    token: mx.array


@dataclass(frozen=True, eq=False)
class Constraint:
    """``automaton`` over the tokens, the end tokens ``eos_ids``, and how it was compiled: ``seconds`` and ``states`` over bytes."""

    automaton: TokenAutomaton
    eos_ids: tuple[int, ...]
    seconds: float
    states: int

    @cached_property
    def chain(self) -> Chain:
        return Chain(self.automaton)

    @cached_property
    def column_of(self) -> np.ndarray:
        """[vocabulary] the column of each token; that of ``any`` for tokens of no class, which are met as any alone."""
        columns = np.where(self.automaton.class_of < self.automaton.classes, self.automaton.class_of, self.chain.any)
        columns[list(self.eos_ids)] = self.chain.end
        return columns.astype(np.int32)

    @cached_property
    def _columns(self) -> mx.array:
        return mx.array(self.column_of)

    @property
    def nbytes(self) -> int:
        """Of the compiled arrays."""
        return sum(a.nbytes for a in (self.automaton.behind, self.automaton.class_of, self.automaton.distance))

    def lengths(self, most: int) -> list[int]:
        """How many tokens, up to ``most``, an admitted text can have."""
        source, _, target = self.automaton.edges
        reached = np.arange(self.automaton.states) == 0
        found = []
        for length in range(most + 1):
            if (reached & self.automaton.accepting).any():
                found.append(length)
            ahead = np.zeros_like(reached)
            ahead[target[reached[source]]] = True
            reached = ahead
        return found

    @cached_property
    def _buckets(self) -> list[tuple[np.ndarray, mx.array, mx.array]]:
        """(columns, tokens of each [columns, size], which of them fill up) by size: a power of two, or that of one large class."""
        order = np.argsort(self.column_of, kind="stable")
        bounds = np.searchsorted(self.column_of[order], np.arange(self.chain.any + 1))
        sizes: dict[int, list[tuple[int, np.ndarray]]] = {}
        for column in range(self.chain.any):
            tokens = order[bounds[column] : bounds[column + 1]]
            size = len(tokens) if len(tokens) >= ALONE else 1 << (len(tokens) - 1).bit_length()
            sizes.setdefault(size, []).append((column, tokens))
        buckets = []
        for size, members in sorted(sizes.items()):
            ids = np.stack([np.pad(tokens, (0, size - len(tokens)), mode="edge") for _, tokens in members])
            filled = np.stack([np.arange(size) >= len(tokens) for _, tokens in members])
            buckets.append((np.array([column for column, _ in members]), mx.array(ids.astype(np.int32)), mx.array(filled)))
        return buckets

    def masses(self, logits: mx.array, temperature: float) -> Masses:
        """Of float32 ``logits`` [length, vocabulary]."""
        order: list[np.ndarray] = []
        mass, best, token = list[mx.array](), list[mx.array](), list[mx.array]()
        for columns, ids, filled in self._buckets:
            own = mx.take(logits, ids.flatten(), axis=-1).reshape(len(logits), *ids.shape)
            top, place = own.max(axis=-1), mx.argmax(own, axis=-1)
            weights = mx.where(filled, 0.0, mx.exp((own - top[..., None]) / temperature))
            order.append(columns)
            mass.append(top / temperature + mx.log(weights.sum(axis=-1)))
            best.append(top)
            token.append(ids[mx.arange(len(columns)), place])
        top, place = logits.max(axis=-1, keepdims=True), mx.argmax(logits, axis=-1, keepdims=True)
        mass.append(top / temperature + mx.log(mx.exp((logits - top) / temperature).sum(axis=-1, keepdims=True)))
        back = mx.array(np.argsort(np.concatenate((*order, [self.chain.any]))))
        return Masses(*(mx.concatenate(parts, axis=-1)[:, back] for parts in (mass, [*best, top], [*token, place])))

    def spread(self, bias: mx.array) -> mx.array:
        """[length, vocabulary]: to each token what ``bias`` [length, columns] says of its column."""
        return mx.take(bias, self._columns, axis=-1)

    def draw(self, logits: mx.array, columns: np.ndarray, u: np.ndarray, numbers: StepNumbers) -> mx.array:
        """[length] a token of each position's column, by the softmax within it.  top_k and top_p act within the column."""
        chosen = mx.array(columns.astype(np.int32))[:, None]
        own = mx.where((chosen == self._columns) | (chosen == self.chain.any), logits, -mx.inf)
        weights = mx.exp((own - own.max(axis=-1, keepdims=True)) / numbers.temperature)
        return inverse_cdf(truncate(weights[None], numbers), mx.array(u.astype(np.float32))[None])[0]


_vocabularies: weakref.WeakKeyDictionary[TokenizerWrapper, Vocabulary] = weakref.WeakKeyDictionary()
_compiled: OrderedDict[tuple[int, str], tuple[Vocabulary, Constraint]] = OrderedDict()


def compile_constraint(tokenizer: TokenizerWrapper, config: ModelConfig, *, json_schema: Any = None, regex: str | None = None,
                       choices: Sequence[str] | None = None, begin: str = "", seconds: float = MAX_SECONDS) -> Constraint:
    """Of one of a JSON schema (an object, or its text), a regular expression or a list of texts; ``begin`` comes before each text.

    The last REMEMBERED are kept.  Errors: UserError for none or two of them, and for what cannot be guaranteed or is too large.
    """
    check_constraint(json_schema, regex, choices)
    vocabulary = _vocabularies.get(tokenizer)
    if vocabulary is None:
        vocabulary = _vocabularies[tokenizer] = Vocabulary(tokenizer, config.text.vocab_size)
    key = id(vocabulary), json.dumps((json_schema, regex, choices, begin))
    if key in _compiled:
        _compiled.move_to_end(key)
        return _compiled[key][1]
    began = time.monotonic()
    if json_schema is not None:
        language = schemas.parse(json_schema)
    elif regex is not None:
        language = regexes.parse(regex)
    else:
        language = choice([text(one) for one in choices or ()])
    automaton = compile_language(concat([text(begin), language]), seconds)
    tokens = compile_tokens(automaton, vocabulary, seconds - (time.monotonic() - began))
    constraint = Constraint(tokens, config.generation.eos_token_ids, time.monotonic() - began, automaton.states)
    _compiled[key] = vocabulary, constraint
    if len(_compiled) > REMEMBERED:
        _compiled.popitem(last=False)
    return constraint


def check_constraint(json_schema: Any = None, regex: str | None = None, choices: Sequence[str] | None = None) -> None:
    """Errors: UserError unless one of them is given, and is a schema, an expression or different texts."""
    given = {"json_schema": json_schema, "regex": regex, "choices": choices}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise UserError(f"Give one of json_schema, regex and choices, got {' and '.join(named) or 'none'}.")
    if json_schema is not None and not isinstance(json_schema, str | dict | bool):
        raise UserError(f"json_schema is an object or its text, got {type(json_schema).__name__}.")
    if regex is not None and not isinstance(regex, str):
        raise UserError(f"regex is a text, got {type(regex).__name__}.")
    if choices is None:
        return
    if not isinstance(choices, list | tuple) or not all(isinstance(one, str) for one in choices):
        raise UserError("choices are a list of texts.")
    if not choices or not all(choices):
        raise UserError("choices must be at least one text, none of them empty.")
    if len(set(choices)) != len(choices):
        twice = next(one for one in choices if list(choices).count(one) > 1)
        raise UserError(f"The choice {twice!r} is given twice; leave one of them out.")
