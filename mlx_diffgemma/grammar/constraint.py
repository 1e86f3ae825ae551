"""A constraint, ready for canvases of one model: compiled once, and what it needs to know of a step's logits.

    >>> constraint = compile_constraint(tokenizer, model.config, regex="[0-9]+ apples?")
"""

from __future__ import annotations

import json
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_diffgemma.config import ModelConfig
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.grammar import calls
from mlx_diffgemma.grammar import regex as regexes
from mlx_diffgemma.grammar import schema as schemas
from mlx_diffgemma.grammar.automaton import compile_language
from mlx_diffgemma.grammar.budget import MAX_SECONDS, limited
from mlx_diffgemma.grammar.language import Language, choice, concat, text
from mlx_diffgemma.grammar.program import IMPOSSIBLE, Chain, Solution
from mlx_diffgemma.grammar.tokens import TokenAutomaton, Vocabulary, compile_tokens
from mlx_diffgemma.sampler import KEPT, Marginals, StepNumbers, inverse_cdf, largest, passing, truncate

PIECE = 16  # tokens of one column that are looked at together
ALONE = 128  # pieces from which a column is reduced for itself, others beside those of about their size
# Positions whose logits are reduced together.  On the CPU as many as stay in its caches: larger arrays are also taken from the
# system anew each time, and its pages cost as much as a fifth of the work.  On a GPU each turn costs a launch.
AT_ONCE = {mx.DeviceType.cpu: 4, mx.DeviceType.gpu: 64}
HOPELESS = -1e30  # in place of the minus infinity of a column without tokens
REMEMBERED = 32  # compiled constraints that are kept, the latest used


class Masses(NamedTuple):
    """Of the columns of a constraint at each position [length, columns]: the largest logit ``best``, the log ``total`` of the sum
    of the weights, which are exponentials of the scaled distances from it, and the ``entropy`` in nats within the column.

    Of each piece [length, pieces]: the largest logit ``tops``, and the sum ``sums`` of the weights of its own tokens.
    """

    temperature: float
    best: mx.array
    total: mx.array
    entropy: mx.array
    tops: mx.array
    sums: mx.array

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """(log of the sum of the exponentials of the scaled logits of each column, its largest logit), for the programme."""
        best = np.array(self.best, dtype=np.float64)
        mass = best / self.temperature + np.array(self.total, dtype=np.float64)
        # Logits that are no numbers are found by the sampler, as the entropy is none then; nothing can be made of them here.
        return np.nan_to_num(mass, posinf=0.0, neginf=HOPELESS), np.nan_to_num(best, posinf=0.0, neginf=HOPELESS)


class Pieces:
    """The tokens, column by column, in pieces: ``ids`` [pieces, PIECE], the last piece of a column filled up with its last token,
    where ``own`` is zero, not one.  ``column`` of each piece; ``first`` piece of each column, and at the end how many there are."""

    def __init__(self, column_of: np.ndarray, columns: int) -> None:
        order = np.argsort(column_of, kind="stable")
        tokens = np.bincount(column_of, minlength=columns)
        counts = np.maximum(1, -(-tokens // PIECE))  # a column without tokens has a piece too, with nothing in it
        self.first = np.concatenate(([0], np.cumsum(counts)))
        column = np.repeat(np.arange(columns), counts)
        place = (np.arange(self.first[-1]) - self.first[column])[:, None] * PIECE + np.arange(PIECE)
        begin, last = (np.cumsum(tokens) - tokens)[column, None], tokens[column, None] - 1
        ids = order[np.clip(begin + np.minimum(place, last), 0, len(order) - 1)]
        self.ids, self.own = mx.array(ids.astype(np.int32)), mx.array((place <= last).astype(np.float32))
        self.column, self.empty = mx.array(column.astype(np.int32)), mx.array(tokens == 0)
        self.unfilled = mx.array(np.flatnonzero((place > last).any(axis=1)).astype(np.int32))
        alone = np.flatnonzero(counts >= ALONE)
        self._slices = [slice(int(self.first[one]), int(self.first[one + 1])) for one in alone]
        self._sets: list[tuple[mx.array, mx.array]] = []  # pieces [columns, size], and which are none, by size: a power of two
        columns_by_size = [alone]
        sizes = np.where(counts < ALONE, 1 << np.ceil(np.log2(counts)).astype(np.int64), 0)
        for size in np.unique(sizes[sizes > 0]).tolist():
            same = np.flatnonzero(sizes == size)
            columns_by_size.append(same)
            places = np.minimum(np.arange(size), counts[same, None] - 1)
            self._sets.append((mx.array((self.first[same, None] + places).astype(np.int32)),
                               mx.array(np.arange(size) >= counts[same, None])))
        self._back = mx.array(np.argsort(np.concatenate(columns_by_size)))

    def sums_within(self, x: mx.array) -> mx.array:
        """[length, pieces] of ``x`` [length, pieces, PIECE]."""
        sums = x.sum(axis=-1)
        # A product with all of ``own`` would cost as much as a quarter of the exponentials; few pieces are not full.
        sums[:, self.unfilled] = (x[:, self.unfilled] * self.own[self.unfilled]).sum(axis=-1)
        return sums

    def maxima(self, x: mx.array) -> mx.array:
        """[length, columns] of ``x`` [length, pieces]."""
        parts = [x[:, own].max(axis=-1, keepdims=True) for own in self._slices]
        return self._joined(parts + [_picked(x, places).max(axis=-1) for places, _ in self._sets])

    def sums(self, x: mx.array) -> mx.array:
        parts = [x[:, own].sum(axis=-1, keepdims=True) for own in self._slices]
        return self._joined(parts + [mx.where(none, 0.0, _picked(x, places)).sum(axis=-1) for places, none in self._sets])

    def _joined(self, parts: list[mx.array]) -> mx.array:
        return mx.concatenate(parts, axis=-1)[:, self._back]

    def of(self, columns: np.ndarray) -> tuple[mx.array, mx.array]:
        """(the pieces of one column at each position [length, n], which of them are some)."""
        counts = self.first[columns + 1] - self.first[columns]
        place = np.arange(counts.max())
        places = self.first[columns, None] + np.minimum(place, counts[:, None] - 1)
        return mx.array(places.astype(np.int32)), mx.array(place < counts[:, None])


def _picked(x: mx.array, places: mx.array) -> mx.array:
    """[length, *] the entries of ``x`` [length, n] at ``places`` [*].  Along each row: MLX's CPU reads whole columns for
    ``take``, which is five times as slow."""
    return mx.take_along_axis(x, places.reshape(1, -1), axis=-1).reshape(len(x), *places.shape)


def _at(x: mx.array, place: mx.array) -> mx.array:
    """[length, ...] the entry of ``x`` [length, n, ...] at each position's ``place`` [length]."""
    return x[mx.arange(len(x)), place]


@partial(mx.compile, shapeless=True)
def _weigh(logits: mx.array, best: mx.array, temperature: mx.array) -> tuple[mx.array, mx.array]:
    """exp of the scaled distance d from ``best``, and d exp d."""
    distance = (logits - best) / temperature
    weights = mx.exp(distance)
    return weights, distance * weights


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
        """[vocabulary] the column of each token."""
        columns = np.where(self.automaton.class_of < self.automaton.classes, self.automaton.class_of, self.chain.other)
        columns[list(self.eos_ids)] = self.chain.end
        return columns.astype(np.int32)

    @cached_property
    def columns(self) -> mx.array:
        return mx.array(self.column_of)

    @cached_property
    def pieces(self) -> Pieces:
        return Pieces(self.column_of, self.chain.columns)

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

    def masses(self, logits: mx.array, temperature: float) -> Masses:
        """Of float32 ``logits`` [length, vocabulary]; some positions after others, so that little memory is taken."""
        parts, at_once = list[tuple[mx.array, ...]](), AT_ONCE[mx.default_device().type]
        for start in range(0, len(logits), at_once):
            parts.append(self._masses(logits[start : start + at_once], temperature))
            mx.eval(parts[-1])
        return Masses(temperature, *(mx.concatenate(own) for own in zip(*parts, strict=True)))

    def _masses(self, logits: mx.array, temperature: float) -> tuple[mx.array, ...]:
        pieces = self.pieces
        own = _picked(logits, pieces.ids)
        tops = own.max(axis=-1)
        best = pieces.maxima(tops)
        weights, weighted = _weigh(own, _picked(best, pieces.column)[..., None], mx.array([[[temperature]]]))
        sums = pieces.sums_within(weights)
        total = pieces.sums(sums)
        entropy = mx.log(total) - pieces.sums(pieces.sums_within(weighted)) / total
        return (mx.where(pieces.empty, -mx.inf, best), mx.log(total), mx.where(pieces.empty, 0.0, entropy), tops, sums)

    def best(self, logits: mx.array, masses: Masses, columns: np.ndarray) -> mx.array:
        """[length] the most probable token of each position's column."""
        places, some = self.pieces.of(columns)
        piece = mx.argmax(mx.where(some, mx.take_along_axis(masses.tops, places, axis=-1), -mx.inf), axis=-1)
        ids = self.pieces.ids[_at(places, piece)]
        return _at(ids, mx.argmax(mx.take_along_axis(logits, ids, axis=-1), axis=-1))

    def draw(self, logits: mx.array, masses: Masses, columns: np.ndarray, u: np.ndarray, numbers: StepNumbers,
             ) -> tuple[mx.array, mx.array]:
        """[length] a token of each position's column, by the softmax within it, and its weight.  top_k and top_p act within the
        column."""
        (places, some), target = self.pieces.of(columns), mx.array(u.astype(np.float32))
        best, temperature = _at(masses.best, mx.array(columns))[:, None], mx.array([[masses.temperature]])
        if numbers.top_k is None and numbers.top_p is None and numbers.min_p is None:
            sums = mx.where(some, mx.take_along_axis(masses.sums, places, axis=-1), 0.0)
            target = target * sums.sum(axis=-1)
            piece, before = passing(sums, target)
            ids = self.pieces.ids[_at(places, piece)]
            weights, _ = _weigh(mx.take_along_axis(logits, ids, axis=-1), best, temperature)
            place, _ = passing(weights, target - before)
        else:
            ids = self.pieces.ids[places].flatten(1)
            weights, _ = _weigh(mx.take_along_axis(logits, ids, axis=-1), best, temperature)
            weights = mx.where(some[..., None], self.pieces.own[places], 0.0).flatten(1) * weights
            place = inverse_cdf(truncate(weights[None], numbers), target[None])[0]
        return _at(ids, place), _at(weights, place)

    def largest(self, logits: mx.array, masses: Masses, bias: mx.array, k: int) -> tuple[mx.array, mx.array]:
        """(ids [length, k] of the largest logits when ``bias`` [length, columns] is added, their columns).

        They lie in the k pieces with the largest of all.
        """
        pieces = self.pieces
        tops = masses.tops + _picked(bias, pieces.column)
        tops = mx.where(pieces.own[:, 0] > 0, tops, -mx.inf)
        chosen = largest(tops, min(k, tops.shape[-1]))
        ids, columns = pieces.ids[chosen].flatten(1), mx.repeat(pieces.column[chosen], PIECE, axis=1)
        found = mx.take_along_axis(logits, ids, axis=-1) + mx.take_along_axis(bias, columns, axis=-1)
        inner = largest(mx.where(pieces.own[chosen].flatten(1) > 0, found, -mx.inf), k)
        return mx.take_along_axis(ids, inner, axis=-1), mx.take_along_axis(columns, inner, axis=-1)

    def marginals(self, logits: mx.array, masses: Masses, solution: Solution, numbers: StepNumbers) -> tuple[mx.array, Marginals]:
        """(What is added to the logits of each column [length, columns], so that their softmax are the exact marginals; these, of a
        batch of one.)"""
        mass, best = masses.read()
        log_share = solution.bias + mass
        share = np.exp(log_share)
        entropy = (share * (np.array(masses.entropy, dtype=np.float64) - np.where(share > 0, log_share, 0.0))).sum(axis=-1)
        entropy = np.maximum(entropy, 0.0).astype(np.float32)
        log_best = np.maximum(solution.bias + best / masses.temperature, IMPOSSIBLE)  # of the most probable token of each column
        of_path, of_drawn = (np.take_along_axis(log_best, own[:, None], axis=-1)[:, 0] for own in (solution.path, solution.drawn))
        bias, log_best = mx.array((masses.temperature * solution.bias).astype(np.float32)), mx.array(log_best.astype(np.float32))
        argmax = self.best(logits, masses, solution.path)
        drawn, weight = self.draw(logits, masses, solution.drawn, solution.rest, numbers)
        logprob, probability = mx.array(of_path.astype(np.float32)), weight * mx.array(np.exp(of_drawn).astype(np.float32))
        if numbers.greedy is not None:
            greedy = numbers.greedy[0]
            drawn = mx.where(greedy, argmax, drawn)
            probability = mx.where(greedy, mx.exp(logprob), probability)
        kept = covered = None
        if numbers.tail is not None:
            kept, columns = self.largest(logits, masses, bias, min(KEPT, logits.shape[-1]))
            distance = mx.take_along_axis(logits, kept, axis=-1) - mx.take_along_axis(masses.best, columns, axis=-1)
            covered = mx.exp(distance / masses.temperature + mx.take_along_axis(log_best, columns, axis=-1)).sum(axis=-1)
        found = argmax, drawn, mx.array(entropy), logprob, probability, kept, covered
        return bias, Marginals(*(None if own is None else own[None] for own in found))


_vocabularies: weakref.WeakKeyDictionary[TokenizerWrapper, Vocabulary] = weakref.WeakKeyDictionary()
_compiled: OrderedDict[tuple[int, str], tuple[Vocabulary, Constraint]] = OrderedDict()
_lock = threading.Lock()  # of both; a server compiles on several threads


def compile_constraint(tokenizer: TokenizerWrapper, config: ModelConfig, *, json_schema: Any = None, regex: str | None = None,
                       choices: Sequence[str] | None = None, begin: str = "", seconds: float = MAX_SECONDS) -> Constraint:
    """Of one of a JSON schema (an object, or its text), a regular expression or a list of texts; ``begin`` comes before each text.

    The last REMEMBERED are kept.  Errors: UserError for none or two of them, and for what cannot be guaranteed or is too large.
    """
    check_constraint(json_schema, regex, choices)

    def language() -> Language:
        if json_schema is not None:
            return schemas.parse(json_schema)
        if regex is not None:
            return regexes.parse(regex)
        return choice([text(one) for one in choices or ()])

    return _remembered(tokenizer, config, (json_schema, regex, choices, begin), lambda: concat([text(begin), language()]),
                       config.generation.eos_token_ids, seconds)


def compile_named(tokenizer: TokenizerWrapper, config: ModelConfig, json_schemas: Mapping[str, Any], end: int,
                  seconds: float = MAX_SECONDS, as_json: bool = True) -> Constraint:
    """Of one of some names, each followed by a text that its own JSON schema admits, and then the token ``end``.

    The text is JSON, or in Gemma's own syntax unless ``as_json``.  As ``compile_constraint`` else.
    """
    parse = schemas.parse if as_json else calls.parse
    return _remembered(tokenizer, config, (tuple(json_schemas.items()), end, as_json), lambda: choice(
        [concat([text(name), parse(schema)]) for name, schema in json_schemas.items()]), (end,), seconds)


def _remembered(tokenizer: TokenizerWrapper, config: ModelConfig, asked: Any, language: Callable[[], Language],
                eos_ids: tuple[int, ...], seconds: float) -> Constraint:
    """The constraint of a ``language`` that ``asked`` describes, from among the last compiled ones if it is there."""
    with _lock:
        vocabulary = _vocabularies.get(tokenizer)
        if vocabulary is None:
            vocabulary = _vocabularies[tokenizer] = Vocabulary(tokenizer, config.text.vocab_size)
        key = id(vocabulary), json.dumps(asked)
        if key in _compiled:
            _compiled.move_to_end(key)
            return _compiled[key][1]
    began = time.monotonic()
    with limited(seconds):
        automaton = compile_language(language(), seconds)
        tokens = compile_tokens(automaton, vocabulary, seconds)
    constraint = Constraint(tokens, eos_ids, time.monotonic() - began, automaton.states)
    with _lock:
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
