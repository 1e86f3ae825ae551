"""Constraints, compiled once for a tokenizer, and what they compute from the logits of a step.

>>> constraint = compile_constraint(tokenizer, model.config, regex="[0-9]+ apples?")
"""

from __future__ import annotations

import hashlib
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

from mlx_diffgemma.errors import UserError
from mlx_diffgemma.grammar import elsewhere
from mlx_diffgemma.grammar.budget import MAX_SECONDS
from mlx_diffgemma.grammar.compilation import compiled, language_of, language_of_named
from mlx_diffgemma.grammar.language import Language
from mlx_diffgemma.grammar.pieces import PIECE, Pieces, entry_at, picked
from mlx_diffgemma.grammar.program import IMPOSSIBLE, Chain, Solution
from mlx_diffgemma.grammar.tokens import TokenAutomaton, Vocabulary
from mlx_diffgemma.model.config import ModelConfig
from mlx_diffgemma.sampling.sampler import (
    KEPT,
    Marginals,
    StepNumbers,
    inverse_cdf,
    largest,
    passing,
    truncate,
)

# The number of positions whose logits are reduced together.  On the CPU they should fit its caches;
# larger arrays would also be allocated by the system each time, at a fifth of the work's cost.  On
# a GPU each round costs a launch.
AT_ONCE = {mx.DeviceType.cpu: 4, mx.DeviceType.gpu: 64}
HOPELESS = -1e30  # stands for minus infinity in a column without tokens
REMEMBERED = 32  # the compiled constraints that are kept: the most recently used ones
REMEMBERED_BYTES = 256 * 2**20  # the bytes of all of them together


class Masses(NamedTuple):
    """The logits of a step, reduced to columns and pieces.

    Weights are exponentials of the distances from a column's largest logit, divided by the
    temperature.

    Args:
        temperature: The temperature.
        best: The largest logit of each column [length, columns].
        total: The log of the sum of the weights of each column [length, columns].
        entropy: The entropy in nats within each column [length, columns].
        tops: The largest logit of each piece [length, pieces].
        sums: The sum of the weights of each piece [length, pieces].
    """

    temperature: float
    best: mx.array
    total: mx.array
    entropy: mx.array
    tops: mx.array
    sums: mx.array

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Read the masses on the host, for the dynamic programme.

        Returns:
            (log of the sum of the exponentials of the scaled logits of each column, its largest
            logit)
        """
        best = np.array(self.best, dtype=np.float64)
        mass = best / self.temperature + np.array(self.total, dtype=np.float64)
        # The sampler detects logits that are not finite by their entropy, so they need no handling
        # here.
        mass = np.nan_to_num(mass, posinf=0.0, neginf=HOPELESS)
        return mass, np.nan_to_num(best, posinf=0.0, neginf=HOPELESS)


@partial(mx.compile, shapeless=True)
def _weigh(logits: mx.array, best: mx.array, temperature: mx.array) -> tuple[mx.array, mx.array]:
    """exp d and d exp d, where d is the scaled distance of a logit from ``best``."""
    distance = (logits - best) / temperature
    weights = mx.exp(distance)
    return weights, distance * weights


@dataclass(frozen=True, eq=False)
class Constraint:
    """A compiled constraint.

    Args:
        automaton: Its automaton over tokens.
        eos_ids: The tokens that end an admitted text.
        seconds: How long compiling took.
        states: How many states its automaton over bytes has.
    """

    automaton: TokenAutomaton
    eos_ids: tuple[int, ...]
    seconds: float
    states: int

    @cached_property
    def chain(self) -> Chain:
        return Chain(self.automaton)

    @cached_property
    def column_of(self) -> np.ndarray:
        """The column of each token [vocabulary]."""
        columns = np.where(
            self.automaton.class_of < self.automaton.classes,
            self.automaton.class_of,
            self.chain.other,
        )
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
        """Bytes of the compiled arrays."""
        automaton = self.automaton
        return automaton.behind.nbytes + automaton.class_of.nbytes + automaton.distance.nbytes

    def lengths(self, most: int) -> list[int]:
        """The numbers of tokens, up to ``most``, that an admitted text can have."""
        source, _, target = self.automaton.edges
        reached = np.arange(self.automaton.states) == 0
        lengths = []
        for length in range(most + 1):
            if (reached & self.automaton.accepting).any():
                lengths.append(length)
            ahead = np.zeros_like(reached)
            ahead[target[reached[source]]] = True
            reached = ahead
        return lengths

    def masses(self, logits: mx.array, temperature: float) -> Masses:
        """The masses of float32 ``logits`` [length, vocabulary].

        A few positions are reduced at a time, to save memory.
        """
        at_once = AT_ONCE[mx.default_device().type]
        parts: list[tuple[mx.array, ...]] = []
        for start in range(0, len(logits), at_once):
            parts.append(self._masses(logits[start : start + at_once], temperature))
            mx.eval(parts[-1])
        return Masses(temperature, *(mx.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    def _masses(self, logits: mx.array, temperature: float) -> tuple[mx.array, ...]:
        pieces = self.pieces
        in_pieces = picked(logits, pieces.ids)
        tops = in_pieces.max(axis=-1)
        best = pieces.maxima(tops)
        best_of_piece = picked(best, pieces.column)[..., None]
        weights, weighted = _weigh(in_pieces, best_of_piece, mx.array([[[temperature]]]))
        sums = pieces.sums_within(weights)
        total = pieces.sums(sums)
        entropy = mx.log(total) - pieces.sums(pieces.sums_within(weighted)) / total
        return (
            mx.where(pieces.empty, -mx.inf, best),
            mx.log(total),
            mx.where(pieces.empty, 0.0, entropy),
            tops,
            sums,
        )

    def best(self, logits: mx.array, masses: Masses, columns: np.ndarray) -> mx.array:
        """The most probable token [length] of each position's column.

        Args:
            logits: The logits [length, vocabulary].
            masses: Their masses.
            columns: The column of each position.
        """
        places, is_own = self.pieces.of(columns)
        tops = mx.take_along_axis(masses.tops, places, axis=-1)
        piece = mx.argmax(mx.where(is_own, tops, -mx.inf), axis=-1)
        ids = self.pieces.ids[entry_at(places, piece)]
        return entry_at(ids, mx.argmax(mx.take_along_axis(logits, ids, axis=-1), axis=-1))

    def draw(
        self,
        logits: mx.array,
        masses: Masses,
        columns: np.ndarray,
        u: np.ndarray,
        numbers: StepNumbers,
    ) -> tuple[mx.array, mx.array]:
        """Draw a token of each position's column, by the softmax within the column.

        Args:
            logits: The logits [length, vocabulary].
            masses: Their masses.
            columns: The column of each position.
            u: A uniform random number for each position.
            numbers: The sampling parameters; top_k, top_p and min_p act within the column.

        Returns:
            (tokens [length], their weights [length])
        """
        places, is_own = self.pieces.of(columns)
        target = mx.array(u.astype(np.float32))
        best = entry_at(masses.best, mx.array(columns))[:, None]
        temperature = mx.array([[masses.temperature]])
        if numbers.top_k is None and numbers.top_p is None and numbers.min_p is None:
            # The piece is drawn first, by the sums of the pieces, and then the token within it.
            sums = mx.where(is_own, mx.take_along_axis(masses.sums, places, axis=-1), 0.0)
            target = target * sums.sum(axis=-1)
            piece, before = passing(sums, target)
            ids = self.pieces.ids[entry_at(places, piece)]
            weights, _ = _weigh(mx.take_along_axis(logits, ids, axis=-1), best, temperature)
            place, _ = passing(weights, target - before)
        else:
            ids = self.pieces.ids[places].flatten(1)
            weights, _ = _weigh(mx.take_along_axis(logits, ids, axis=-1), best, temperature)
            own = mx.where(is_own[..., None], self.pieces.own[places], 0.0).flatten(1)
            weights = own * weights
            place = inverse_cdf(truncate(weights[None], numbers), target[None])[0]
        return entry_at(ids, place), entry_at(weights, place)

    def largest(
        self, logits: mx.array, masses: Masses, bias: mx.array, k: int
    ) -> tuple[mx.array, mx.array]:
        """The largest logits after ``bias`` is added; they are in the k pieces with the largest
        maxima.

        Args:
            logits: The logits [length, vocabulary].
            masses: Their masses.
            bias: What is added to the logits of each column [length, columns].
            k: How many.

        Returns:
            (ids [length, k], their columns [length, k])
        """
        pieces = self.pieces
        tops = masses.tops + picked(bias, pieces.column)
        tops = mx.where(pieces.own[:, 0] > 0, tops, -mx.inf)
        chosen = largest(tops, min(k, tops.shape[-1]))
        ids = pieces.ids[chosen].flatten(1)
        columns = mx.repeat(pieces.column[chosen], PIECE, axis=1)
        biased = mx.take_along_axis(logits, ids, axis=-1)
        biased = biased + mx.take_along_axis(bias, columns, axis=-1)
        inner = largest(mx.where(pieces.own[chosen].flatten(1) > 0, biased, -mx.inf), k)
        return mx.take_along_axis(ids, inner, axis=-1), mx.take_along_axis(columns, inner, axis=-1)

    def marginals(
        self, logits: mx.array, masses: Masses, solution: Solution, numbers: StepNumbers
    ) -> tuple[mx.array, Marginals]:
        """The exact marginals of a step under the constraint.

        Args:
            logits: The logits [length, vocabulary].
            masses: Their masses.
            solution: What the programme found for these masses.
            numbers: The sampling parameters.

        Returns:
            (what is added to the logits of each column [length, columns] so that their softmax are
            the marginals; the marginals, as of a batch of one)
        """
        mass, best = masses.read()
        log_share = solution.bias + mass
        # The log-probability of the most probable token of each column.
        log_best = np.maximum(solution.bias + best / masses.temperature, IMPOSSIBLE)
        bias = mx.array((masses.temperature * solution.bias).astype(np.float32))
        argmax = self.best(logits, masses, solution.path)
        logprob = mx.array(_of_columns(log_best, solution.path).astype(np.float32))
        drawn, weight = self.draw(logits, masses, solution.drawn, solution.rest, numbers)
        share_of_drawn = np.exp(_of_columns(log_best, solution.drawn)).astype(np.float32)
        probability = weight * mx.array(share_of_drawn)
        if numbers.greedy is not None:
            greedy = numbers.greedy[0]
            drawn = mx.where(greedy, argmax, drawn)
            probability = mx.where(greedy, mx.exp(logprob), probability)
        kept = covered = None
        if numbers.tail is not None:
            kept, columns = self.largest(logits, masses, bias, min(KEPT, logits.shape[-1]))
            distance = mx.take_along_axis(logits, kept, axis=-1)
            distance = distance - mx.take_along_axis(masses.best, columns, axis=-1)
            best_of_kept = mx.array(log_best.astype(np.float32))
            best_of_kept = mx.take_along_axis(best_of_kept, columns, axis=-1)
            covered = mx.exp(distance / masses.temperature + best_of_kept).sum(axis=-1)
        entropy = mx.array(_entropy(masses, log_share))
        arrays = (argmax, drawn, entropy, logprob, probability, kept, covered)
        return bias, Marginals(*(None if array is None else array[None] for array in arrays))


def _of_columns(values: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The value [length] of each position's column, from ``values`` [length, columns]."""
    return np.take_along_axis(values, columns[:, None], axis=-1)[:, 0]


def _entropy(masses: Masses, log_share: np.ndarray) -> np.ndarray:
    """The entropy of each position, in nats.

    It is the mean of the columns' entropies and of minus the log of their shares.
    """
    share = np.exp(log_share)
    within = np.array(masses.entropy, dtype=np.float64)
    entropy = (share * (within - np.where(share > 0, log_share, 0.0))).sum(axis=-1)
    return np.maximum(entropy, 0.0).astype(np.float32)


_vocabularies: weakref.WeakKeyDictionary[TokenizerWrapper, Vocabulary] = weakref.WeakKeyDictionary()
_compiled: OrderedDict[tuple[int, str], tuple[Vocabulary, Constraint]] = OrderedDict()
_lock = threading.Lock()  # guards both; a server compiles on several threads


def compile_constraint(
    tokenizer: TokenizerWrapper,
    config: ModelConfig,
    *,
    json_schema: Any = None,
    regex: str | None = None,
    choices: Sequence[str] | None = None,
    begin: str = "",
    seconds: float = MAX_SECONDS,
) -> Constraint:
    """Compile a constraint; the last REMEMBERED are kept.

    Args:
        tokenizer: The tokenizer.
        config: The model's config.
        json_schema: A JSON schema, as an object or its text.
        regex: A regular expression.
        choices: A list of texts.  Exactly one of the three is given.
        begin: A text that comes before each admitted text.
        seconds: How long compiling may take.

    Raises:
        UserError: None or two of the three are given, or the constraint cannot be guaranteed or is
            too large.
    """
    check_constraint(json_schema, regex, choices)
    asked = (json_schema, regex, choices, begin)
    eos_ids = config.generation.eos_token_ids
    return _remembered(tokenizer, config, language_of, asked, eos_ids, seconds)


def compile_named(
    tokenizer: TokenizerWrapper,
    config: ModelConfig,
    json_schemas: Mapping[str, Any],
    end: int,
    seconds: float = MAX_SECONDS,
    as_json: bool = True,
) -> Constraint:
    """Compile a constraint of names, each followed by a text that its own JSON schema admits.

    Args:
        tokenizer: The tokenizer.
        config: The model's config.
        json_schemas: The schema of each name.
        end: The token that follows the text.
        seconds: How long compiling may take.
        as_json: Whether the text is JSON; else it is in Gemma's own syntax.

    Raises:
        UserError: As ``compile_constraint``.
    """
    asked = (tuple(json_schemas.items()), as_json)
    return _remembered(tokenizer, config, language_of_named, asked, (end,), seconds)


def _remembered(
    tokenizer: TokenizerWrapper,
    config: ModelConfig,
    language: Callable[..., Language],
    asked: tuple[Any, ...],
    eos_ids: tuple[int, ...],
    seconds: float,
) -> Constraint:
    """The constraint of ``language(*asked)``, compiled unless it is still kept."""
    with _lock:
        vocabulary = _vocabularies.get(tokenizer)
        if vocabulary is None:
            vocabulary = _vocabularies[tokenizer] = Vocabulary(tokenizer, config.text.vocab_size)
        described = json.dumps([language.__name__, asked, eos_ids])
        digest = hashlib.sha256(described.encode("utf-8", "surrogatepass")).hexdigest()
        key = (id(vocabulary), digest)
        if key in _compiled:
            _compiled.move_to_end(key)
            return _compiled[key][1]
    began = time.monotonic()
    tokens, states = elsewhere.run(compiled, language, asked, vocabulary, seconds)
    constraint = Constraint(tokens, eos_ids, time.monotonic() - began, states)
    with _lock:
        _compiled[key] = (vocabulary, constraint)
        while len(_compiled) > REMEMBERED or _compiled_bytes() > REMEMBERED_BYTES:
            _compiled.popitem(last=False)
    return constraint


def _compiled_bytes() -> int:
    return sum(constraint.nbytes for _, constraint in _compiled.values())


def check_constraint(
    json_schema: Any = None, regex: str | None = None, choices: Sequence[str] | None = None
) -> None:
    """Check what a constraint is made of.

    Args:
        json_schema: A JSON schema, as an object or its text.
        regex: A regular expression.
        choices: A list of different texts.

    Raises:
        UserError: Not exactly one of them is given, or it is of the wrong type.
    """
    arguments = {"json_schema": json_schema, "regex": regex, "choices": choices}
    names = [name for name, value in arguments.items() if value is not None]
    if len(names) != 1:
        raise UserError(
            f"Give one of json_schema, regex and choices, got {' and '.join(names) or 'none'}."
        )
    if json_schema is not None and not isinstance(json_schema, str | dict | bool):
        raise UserError(f"json_schema is an object or its text, got {type(json_schema).__name__}.")
    if regex is not None and not isinstance(regex, str):
        raise UserError(f"regex is a text, got {type(regex).__name__}.")
    if choices is None:
        return
    if not isinstance(choices, list | tuple) or not all(isinstance(text, str) for text in choices):
        raise UserError("choices are a list of texts.")
    if not choices or not all(choices):
        raise UserError("choices must be at least one text, none of them empty.")
    seen: set[str] = set()
    for text in choices:
        if text in seen:
            raise UserError(f"The choice {text!r} is given twice; leave one of them out.")
        seen.add(text)
