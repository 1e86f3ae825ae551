"""Compiles an automaton over bytes to one over the tokens of a vocabulary.

A token leads from each state to at most one other.  Tokens that do so alike from every state form
one class.  Of 262,144 tokens a schema of 30 fields makes a few hundred classes, and the dynamic
programme uses these classes only.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_diffgemma.errors import UserError
from mlx_diffgemma.grammar import budget
from mlx_diffgemma.grammar.automaton import NEVER, Automaton, distances
from mlx_diffgemma.grammar.budget import MAX_SECONDS
from mlx_diffgemma.text.calls import MARKERS, QUOTE

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

BYTE = re.compile(r"<0x([0-9A-F]{2})>")
AT_ONCE = 16  # states whose tokens are looked up together
MAX_EDGES = 400_000
MAX_CELLS = 50_000_000  # states times classes of tokens; 4 bytes each


class Vocabulary:
    """The bytes each token of a tokenizer adds to a text, as a tree of their beginnings.

    Tokens that add none (markers, end tokens) are not in it.

    Raises:
        UserError: The tokenizer does not simply join the texts of its tokens.
    """

    def __init__(self, tokenizer: TokenizerWrapper, size: int) -> None:
        self.size = size
        self.texts = token_bytes(tokenizer, size)
        ids = np.array(sorted(self.texts), dtype=np.int32)
        texts = [self.texts[i] for i in ids.tolist()]
        lengths = np.array([len(text) for text in texts], dtype=np.int64)
        joined = np.frombuffer(b"".join(texts), dtype=np.uint8)
        begins = np.concatenate(([0], np.cumsum(lengths)[:-1]))
        node = np.zeros(len(ids), dtype=np.int64)  # the node of each token, at the present depth
        # For the nodes of each depth: the index of the parent in its depth, and the byte.
        self.levels: list[tuple[np.ndarray, np.ndarray]] = []
        first = 0
        count = 1
        for depth in range(int(lengths.max(initial=0))):
            going = np.flatnonzero(lengths > depth)
            edges = (node[going] - first) * 256 + joined[begins[going] + depth]
            keys, inverse = np.unique(edges, return_inverse=True)
            self.levels.append((keys // 256, keys % 256))
            node[going] = count + inverse.reshape(-1)
            first = count
            count += len(keys)
        self.tokens = ids
        self.nodes = node


class Spellings:
    """The tree of a vocabulary in the letters of an automaton.

    A letter is a set of bytes that the automaton treats alike in all states.

    Attributes:
        size: How many letters there are.
        delta: The next state by state and letter, int32 [states * size].
        first: The first child of each node.
        children: How many children each node has; they follow one another.
        letter: The letter that leads to each node.
        node_of: The node of each token of the vocabulary.
        ends: Whether a token ends at each node.
    """

    def __init__(self, automaton: Automaton, vocabulary: Vocabulary) -> None:
        delta, letter_of = np.unique(automaton.delta, axis=1, return_inverse=True)
        letter_of = letter_of.reshape(-1)
        self.size = delta.shape[1]
        self.delta = np.ascontiguousarray(delta).ravel()
        nodes = [np.zeros(1, dtype=np.int64)]  # for each of the vocabulary's nodes, by depth
        parents = [np.zeros(0, dtype=np.int64)]
        letters = [np.zeros(1, dtype=np.int64)]
        count = 1
        for parent, byte in vocabulary.levels:
            edges = nodes[-1][parent] * self.size + letter_of[byte]
            keys, inverse = np.unique(edges, return_inverse=True)
            nodes.append(count + inverse.reshape(-1))
            parents.append(keys // self.size)
            letters.append(keys % self.size)
            count += len(keys)
        first = 1 + np.searchsorted(np.concatenate(parents), np.arange(count + 1))
        self.first = first[:-1].astype(np.int32)
        self.children = np.diff(first).astype(np.int32)
        self.letter = np.concatenate(letters).astype(np.int32)
        self.node_of = np.concatenate(nodes)[vocabulary.nodes]
        self.ends = np.zeros(count, dtype=np.bool_)
        self.ends[self.node_of] = True


def token_bytes(tokenizer: TokenizerWrapper, size: int) -> dict[int, bytes]:
    """The bytes of every token below ``size`` that is text.

    Raises:
        UserError: The tokenizer is of another kind.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    replaced, levels = _decoding(state.get("decoder"))
    markers = {
        token["id"]
        for token in state["added_tokens"]
        if token["special"] or token["content"] in MARKERS
    }
    markers |= set(tokenizer.eos_token_ids)
    texts: dict[int, bytes] = {}
    for content, token in tokenizer.get_vocab().items():
        if token in markers or token >= size:
            continue
        text = _text_bytes(content, replaced, levels)
        if text and 0xFF not in text:
            texts[token] = text
    quote = tokenizer.get_vocab().get(QUOTE)
    if quote is not None and quote < size:
        texts[quote] = b"\xff"  # a byte that is in no text; see grammar.calls
    return texts


def _text_bytes(content: str, replaced: list[tuple[str, str]], levels: dict[str, int]) -> bytes:
    """The bytes of a token.

    Args:
        content: The token as the vocabulary writes it.
        replaced: The replacements in its text, from ``_decoding``.
        levels: The byte of each character where characters stand for bytes, from ``_decoding``.
    """
    if match := BYTE.fullmatch(content):
        return bytes([int(match[1], 16)])
    if levels:
        # A token with any other character, as added tokens may have, is written literally.
        if levels.keys() >= set(content):
            return bytes(levels[character] for character in content)
        return content.encode()
    for old, new in replaced:
        content = content.replace(old, new)
    return content.encode("utf-8", "surrogatepass")


def _decoding(decoder: dict[str, Any] | None) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """How a decoder of ``tokenizers`` writes a token.

    Returns:
        (the replacements in its text, the byte of each character where characters stand for bytes)

    Raises:
        UserError: The decoder is of another kind.
    """
    if decoder is None:
        raise UserError(
            "This tokenizer has no decoder and writes a blank between its tokens; give it one that "
            "puts them one behind the other."
        )
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    replaced: list[tuple[str, str]] = []
    levels: dict[str, int] = {}
    for step in steps:
        if step["type"] == "Replace" and "String" in step["pattern"]:
            replaced.append((step["pattern"]["String"], step["content"]))
        elif step["type"] == "ByteLevel":
            levels = _byte_level()
        elif step["type"] not in ("ByteFallback", "Fuse"):
            raise UserError(
                f"This tokenizer's decoder has a step {step['type']!r}, which constraints do not "
                "know; use one that puts the texts of its tokens one behind the other."
            )
    return replaced, levels


def _byte_level() -> dict[str, int]:
    """The printable characters that stand for bytes in vocabularies of GPT-2's kind."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    levels = {chr(byte): byte for byte in printable}
    for index, byte in enumerate(rest):
        levels[chr(256 + index)] = byte
    return levels


@dataclass(frozen=True, eq=False)
class TokenAutomaton:
    """An automaton over tokens; state 0 is the first.

    Args:
        behind: The state after a token of each class, int32 [states, classes]; -1 where no token of
            the class may come.
        accepting: Whether the text may end, bool [states].
        class_of: The class of each token, int32 [vocabulary]; the number of classes for a token
            that may never come.
        distance: The fewest tokens until the text may end, int32 [states].
    """

    behind: np.ndarray
    accepting: np.ndarray
    class_of: np.ndarray
    distance: np.ndarray

    @property
    def states(self) -> int:
        return len(self.accepting)

    @property
    def classes(self) -> int:
        return self.behind.shape[1]

    @cached_property
    def edges(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All steps, as arrays (state, class, next state)."""
        source, cls = np.nonzero(self.behind >= 0)
        return source, cls, self.behind[source, cls].astype(np.int64)

    @cached_property
    def ends(self) -> np.ndarray:
        """Whether the text is finished and cannot continue, [states]."""
        return self.accepting & (self.behind < 0).all(axis=1)

    def advance(self, state: int, tokens: np.ndarray) -> int:
        """The state after ``tokens``, or -1."""
        for token in tokens.tolist():
            cls = int(self.class_of[token])
            state = int(self.behind[state, cls]) if state >= 0 and cls < self.classes else -1
        return state

    def accepts(self, tokens: np.ndarray) -> bool:
        state = self.advance(0, tokens)
        return state >= 0 and bool(self.accepting[state])


def compile_tokens(
    automaton: Automaton, vocabulary: Vocabulary, seconds: float = MAX_SECONDS
) -> TokenAutomaton:
    """The automaton over the tokens of a vocabulary.

    Args:
        automaton: The automaton over bytes.
        vocabulary: The vocabulary.
        seconds: How long compiling may take.

    Raises:
        UserError: No text of the automaton can be written in the vocabulary, or compiling takes too
            long.
    """
    with budget.limited(seconds):
        return _compiled_tokens(automaton, vocabulary)


def _compiled_tokens(automaton: Automaton, vocabulary: Vocabulary) -> TokenAutomaton:
    numbers = np.full(automaton.states, -1, dtype=np.int64)  # new numbers of the reached states
    numbers[0] = 0
    waiting = [0]
    reached = [0]
    spellings = Spellings(automaton, vocabulary)
    hashes = np.zeros(len(spellings.ends), dtype=np.uint64)
    while waiting:
        taken = np.array(waiting[:AT_ONCE])
        waiting = waiting[AT_ONCE:]
        budget.check()
        origins, nodes, targets = _followed(spellings, taken.astype(np.int32))
        np.add.at(hashes, nodes, _mixed(origins.astype(np.int64) * automaton.states + targets))
        is_target = np.zeros(automaton.states, dtype=np.bool_)
        is_target[targets] = True
        new = np.flatnonzero(is_target & (numbers < 0))
        numbers[new] = np.arange(len(reached), len(reached) + len(new))
        reached += new.tolist()
        waiting += new.tolist()
    of_tokens = np.zeros(vocabulary.size, dtype=np.uint64)
    of_tokens[vocabulary.tokens] = hashes[spellings.node_of]
    values, representatives, class_of = np.unique(of_tokens, return_index=True, return_inverse=True)
    class_of = class_of.reshape(-1)
    if len(values) and values[0] == 0:  # tokens that may never come; they go last
        representatives = representatives[1:]
        class_of = np.where(class_of == 0, len(values) - 1, class_of - 1)
    if (cells := len(reached) * len(representatives)) > MAX_CELLS:
        raise UserError(
            f"The constraint is too large for this vocabulary: {cells:,} pairs of states and "
            f"classes of tokens, of at most {MAX_CELLS:,}; lower the bounds of its repeats "
            "(maxLength, maxItems), or split it."
        )
    behind = np.full((len(reached), len(representatives)), -1, dtype=np.int32)
    for number, token in enumerate(representatives.tolist()):
        budget.check()
        state = np.array(reached)
        for byte in vocabulary.texts[token]:
            state = np.where(state >= 0, automaton.delta[state, byte], -1)
        behind[:, number] = np.where(state >= 0, numbers[state], -1)
    accepting = automaton.accepting[reached]
    source, cls = np.nonzero(behind >= 0)
    distance = distances(source, behind[source, cls], accepting)
    if distance[0] == NEVER:
        raise UserError(
            "No text of the constraint can be written with this model's vocabulary; widen it."
        )
    # States from which no text can be finished in tokens are not entered.
    behind = np.where((behind >= 0) & (distance[behind] < NEVER), behind, -1).astype(np.int32)
    if (edges := int((behind >= 0).sum())) > MAX_EDGES:
        raise UserError(
            f"The constraint is too large for this vocabulary: {edges:,} steps from state to state, "
            f"of at most {MAX_EDGES:,}; lower the bounds of its repeats (maxLength, maxItems), or "
            "split it."
        )
    return TokenAutomaton(behind, accepting, class_of.astype(np.int32), distance)


def _followed(
    spellings: Spellings, states: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Follow all tokens that may come in one of ``states`` (int32).

    Returns:
        (state, node of the tokens, next state) of each
    """
    origin = state = states
    node = np.zeros_like(states)
    steps: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    while node.size:
        counts = spellings.children[node]
        shift = spellings.first[node] - (np.cumsum(counts, dtype=np.int32) - counts)
        child = np.arange(counts.sum(), dtype=np.int32) + np.repeat(shift, counts)
        state = spellings.delta[np.repeat(state * spellings.size, counts) + spellings.letter[child]]
        alive = np.flatnonzero(state >= 0)
        origin = np.repeat(origin, counts)[alive]
        state = state[alive]
        node = child[alive]
        ends = np.flatnonzero(spellings.ends[node])
        steps.append((origin[ends], node[ends], state[ends]))
    origins, nodes, targets = zip(*steps, strict=True)
    return np.concatenate(origins), np.concatenate(nodes), np.concatenate(targets)


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each number (the finalizer of splitmix64)."""
    x = (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
