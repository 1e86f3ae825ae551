"""Holes in a text, filled by what stands on both sides of them: ``infill``, ``stream_infill``, ``batch_infill`` and ``edit``.

A canvas sees to the right.  The text that is known is pinned on it, as far as it reaches; the holes are what is left free.  What
comes before the canvas is in the cache, what comes behind it is returned as it was and says nothing to the hole.

    >>> model, tokenizer = load("nano")
    >>> infill(model, tokenizer, "Mia was a red <|hole|>. Mia lived near the river.", "Tell me a story about Mia the fox.").text
"""

from __future__ import annotations

import re
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_diffgemma.cache import Cache
from mlx_diffgemma.cost import held_bytes
from mlx_diffgemma.demands import FREE, Demands, Stretch
from mlx_diffgemma.device import generation_memory
from mlx_diffgemma.draws import Draws
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.grammar.constraint import check_constraint, compile_constraint
from mlx_diffgemma.model import DiffusionGemma
from mlx_diffgemma.options import CONSTRAINTS, PENALTIES, GenerationOptions
from mlx_diffgemma.policy import Policy
from mlx_diffgemma.request import GenerationWarning, check_room, fresh_seed
from mlx_diffgemma.session import Loop, Session, prefill
from mlx_diffgemma.tokenizer import chat_ids, encode_literally, turn_end, user_message

LENGTHS = (1, 16)  # between which a length is searched that nobody gave
TRIED = 16  # lengths that run as one batch; of more, so many are tried first and then those about the best
QUICK_SIDE, QUICK_MOST, QUICK_SECONDS = 4, 8, 10.0
ANY_TEXT = "(?s:.*)"  # keeps control tokens and broken characters out of a hole
MARKER = re.compile(r"<\|hole(?::([^|<>]*))?\|>")
Messages: TypeAlias = "str | Sequence[Mapping[str, Any]]"


@dataclass(frozen=True)
class Hole:
    """A hole of ``length`` tokens: so many; between two numbers (fewest, most); or None, which is searched between LENGTHS.

    Blanks before a hole are counted with it, since tokens hold a blank together with the word behind it.  One of ``json_schema``,
    ``regex`` and ``choices`` may say which texts it can hold.  Errors: UserError for lengths below 1 or out
    of order, and for two constraints.
    """

    length: int | tuple[int, int] | None = None
    json_schema: Any = None
    regex: str | None = None
    choices: Sequence[str] | None = None

    def __post_init__(self) -> None:
        fewest, most = self.bounds
        if not 1 <= fewest <= most:
            raise UserError(f"A hole has at least 1 token and its bounds are in order; got the length {self.length!r}.")
        check_constraint(**self.constraint)

    @property
    def bounds(self) -> tuple[int, int]:
        """(fewest, most) tokens."""
        length = LENGTHS if self.length is None else self.length
        return (length, length) if isinstance(length, int) else (length[0], length[1])

    @property
    def constraint(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in CONSTRAINTS if getattr(self, name) is not None} or {"regex": ANY_TEXT}


@dataclass(frozen=True)
class Search:
    """How far the length of a hole is searched: ``side`` lengths side by side, ``most`` in all, and after so many ``seconds`` no
    further ones.  ``short``: the first ones are closer together among the short lengths."""

    side: int = TRIED
    most: int | None = None
    seconds: float | None = None
    short: bool = False


QUICK = Search(QUICK_SIDE, QUICK_MOST, QUICK_SECONDS, short=True)  # for an editor that waits


@dataclass(frozen=True)
class Candidate:
    """A text of ``length`` tokens for a hole, and its ``score``: see ``Fill``."""

    text: str
    length: int
    score: float
    converged: bool


@dataclass(frozen=True)
class Fill:
    """What came into the ``hole`` of this number: ``text``, its ``tokens``.

    Where lengths were tried, ``candidates`` holds the best text of each, in the order of their lengths; the one with the largest
    ``score`` was taken.  ``steps`` counts the denoising steps of all of them, 0 for a hole that was filled beside the one before.
    """

    hole: int
    text: str
    tokens: tuple[int, ...]
    converged: bool
    steps: int
    candidates: tuple[Candidate, ...] = ()


@dataclass(frozen=True)
class Infilled:
    """The whole ``text``, byte for byte what was given but for the ``fills``; ``unseen``: how many tokens at its end stood behind
    the last canvas, so that no hole knew of them; the ``seed`` that was used."""

    text: str
    fills: tuple[Fill, ...]
    unseen: int
    seed: int


def infill(model: DiffusionGemma, tokenizer: TokenizerWrapper, text: str | Sequence[str], prompt: Messages | None = None, *,
           hole: Hole | Sequence[Hole] = Hole(), **options: Any) -> Infilled:  # noqa: B008 (frozen)
    """``text`` with its holes filled.

    ``text`` has a marker for each hole, ``<|hole|>``, ``<|hole:5|>`` or ``<|hole:2-8|>`` with its length in tokens, or is the list
    of the texts between which the holes are.  ``hole`` says what the holes are like whose marker says nothing, or each of them.
    ``prompt`` is the user's message, or a conversation, to which the text is the answer; without one the text stands alone.
    ``options``: ``batch_size``, how many lengths are tried side by side, and those of GenerationOptions that concern canvases.

    Errors: UserError, before the model runs, for a text without holes, a hole that nothing fits and a text beyond the context.
    """
    return batch_infill(model, tokenizer, [text], None if prompt is None else [prompt], hole=hole, **options)[0]


def stream_infill(model: DiffusionGemma, tokenizer: TokenizerWrapper, text: str | Sequence[str], prompt: Messages | None = None, *,
                  hole: Hole | Sequence[Hole] = Hole(), batch_size: int = 8, **options: Any) -> Iterator[Fill]:  # noqa: B008
    """As ``infill``, yielding each ``Fill`` as soon as it is known, in the order of the text."""
    run = _Run(model, tokenizer, [text], None if prompt is None else [prompt], hole, None, batch_size, options)
    return (fill for _, fill in run.fills())


def batch_infill(model: DiffusionGemma, tokenizer: TokenizerWrapper, texts: Sequence[str | Sequence[str]],
                 prompts: Sequence[Messages] | None = None, *, hole: Hole | Sequence[Hole] = Hole(),  # noqa: B008
                 seeds: Sequence[int] | None = None, batch_size: int = 8,
                 on_fill: Callable[[int, Fill], None] | None = None, **options: Any) -> list[Infilled]:
    """As ``infill`` for each of ``texts``; what runs beside a text does not change its fills.  ``on_fill`` is told of each, with
    the index of its text."""
    run = _Run(model, tokenizer, texts, prompts, hole, seeds, batch_size, options)
    for index, fill in run.fills():
        if on_fill:
            on_fill(index, fill)
    return [filling.result() for filling in run.fillings]


def edit(model: DiffusionGemma, tokenizer: TokenizerWrapper, text: str, span: tuple[int, int], prompt: str, *,
         hole: Hole | None = None, **options: Any) -> Infilled:
    """``text`` with the characters from ``span[0]`` up to ``span[1]`` written anew, as ``prompt`` asks; the rest is returned byte
    for byte.  The model is shown the whole text beside ``prompt``.

    Without a length in ``hole`` about that of the span is searched, a quarter less or more.  Errors: UserError as ``infill``, and
    for a span that is empty or beyond the text.
    """
    start, stop = span
    if not 0 <= start < stop <= len(text):
        raise UserError(f"The span {start} to {stop} is no part of a text of {len(text)} characters; give its first character and "
                        "the one behind its last.")
    given = hole or Hole()
    if given.length is None:
        size = len(encode_literally(tokenizer, text[start:stop]))
        about = max(2, size // 4)
        given = replace(given, length=(max(1, size - about), size + about))
    return infill(model, tokenizer, (text[:start], text[stop:]), f"{prompt}\n\n{text}", hole=given, **options)


def split_holes(text: str, hole: Hole = Hole()) -> tuple[list[str], list[Hole]]:  # noqa: B008
    """(the texts between the markers of ``text``, what the marked holes are like: as ``hole``, with the marker's length).

    Errors: UserError for a marker that cannot be read.
    """
    parts, holes, done = list[str](), list[Hole](), 0
    for marker in MARKER.finditer(text):
        parts.append(text[done : marker.start()])
        holes.append(hole if marker[1] is None else replace(hole, length=read_length(marker[1])))
        done = marker.end()
    return [*parts, text[done:]], holes


def read_length(text: str) -> int | tuple[int, int]:
    """A length as it is written in a marker: ``5`` or ``2-8``.  Errors: UserError."""
    found = re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", text)
    if not found:
        raise UserError(f"{text!r} is no length of a hole; write a number of tokens, 5, or two, 2-8.")
    return int(found[1]) if found[2] is None else (int(found[1]), int(found[2]))


class _Run:
    """Some texts on their way, whose canvases share forwards."""

    def __init__(self, model: DiffusionGemma, tokenizer: TokenizerWrapper, texts: Sequence[str | Sequence[str]],
                 prompts: Sequence[Messages] | None, hole: Hole | Sequence[Hole], seeds: Sequence[int] | None,
                 batch_size: int, options: dict[str, Any]) -> None:
        """Errors: UserError for everything that can be refused."""
        if prompts is not None and len(prompts) != len(texts):
            raise UserError(f"prompts must have one entry a text: got {len(prompts)} for {len(texts)} texts.")
        if seeds is not None and len(seeds) != len(texts):
            raise UserError(f"seeds must have one entry a text: got {len(seeds)} for {len(texts)} texts.")
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}.")
        self.model, self.batch_size = model, batch_size
        self.options = GenerationOptions.from_keywords(check_options(options))
        policy, seed = self.options.policy(model), self.options.seed
        if seed is None:
            seed = fresh_seed()
        self.fillings = []
        for index, text in enumerate(texts):
            if isinstance(text, str):
                parts, holes = split_holes(text, hole if isinstance(hole, Hole) else Hole())
            else:
                parts = list(text)
                holes = [hole] * (len(parts) - 1) if isinstance(hole, Hole) else list(hole)
            self.fillings.append(Filling(model, tokenizer, parts, holes, prompts[index] if prompts else None, policy,
                                         self.options.prefill_step_size, seed if seeds is None else seeds[index]))
        check_room(model, [filling.most for filling in self.fillings for _ in range(batch_size)], batch_size)

    def fills(self) -> Iterator[tuple[int, Fill]]:
        """(index of a text, what was filled) as it comes."""
        loop = Loop(self.model, (), self.options.prefill_step_size)
        todo, waiting = deque(enumerate(self.fillings)), deque[Session]()
        running: dict[int, _Round] = {}  # by id of a session
        with generation_memory(partial(held_bytes, self.model, self.batch_size)):
            while True:
                loop.sessions = loop.active
                while len(loop.sessions) < self.batch_size and (waiting or todo):
                    if not waiting:
                        index, filling = todo.popleft()
                        waiting += _Round(index, filling).begin(running)
                    loop.sessions.append(waiting.popleft())
                if not loop.sessions:
                    return
                for session, step in loop.advance():
                    if not (step.committed and session.finished):
                        continue
                    own = running.pop(id(session))
                    own.open -= 1
                    if not own.open:
                        known = len(own.filling.fills)
                        waiting.extend(own.begin(running))
                        yield from ((own.index, fill) for fill in own.filling.fills[known:])


def check_options(options: dict[str, Any]) -> dict[str, Any]:
    """``options`` themselves.  Errors: UserError for those that have no meaning for a hole."""
    for name, why in (("max_tokens", "a hole has a length"), ("mode", "holes belong to canvases"),
                      ("canvas_length", "a canvas is as long as the text needs"), ("images", "holes are in texts"),
                      *((name, "a hole has text on both sides") for name in PENALTIES
                        if options.get(name) != getattr(GenerationOptions, name)),
                      *((name, "a constraint belongs to the hole: hole=Hole(…)") for name in CONSTRAINTS)):
        if options.get(name) is not None:
            raise UserError(f"{name} has no meaning here, {why}; leave it out.")
    return options


class _Round:
    """The sessions of one text that run side by side; ``open`` are not finished."""

    def __init__(self, index: int, filling: Filling) -> None:
        self.index, self.filling, self.rounds, self.open = index, filling, filling.rounds(), 0

    def begin(self, running: dict[int, _Round]) -> list[Session]:
        """The next round's sessions, none behind the last."""
        for new in self.rounds:
            if not new:
                continue  # it has worked itself
            if not new[0].finished:
                break
            prefill(self.filling.model, new, self.filling.chunk)  # they only read
        else:
            new = []
        self.open = len(new)
        running |= {id(session): self for session in new}
        return new


@dataclass(frozen=True)
class _Trial:
    """A session in which a hole has so many tokens.  ``spots`` are the places of this hole and of those after it that are wholly on
    the canvas."""

    session: Session
    spots: list[slice]

    @property
    def tokens(self) -> np.ndarray:
        return np.concatenate([canvas.tokens for canvas in self.session.canvases])

    @property
    def converged(self) -> bool:
        return all(canvas.converged for canvas in self.session.canvases)


class Filling:
    """One text with ``holes`` between its ``parts``."""

    def __init__(self, model: DiffusionGemma, tokenizer: TokenizerWrapper, parts: Sequence[str], holes: Sequence[Hole],
                 prompt: Messages | None, policy: Policy, prefill_step_size: int, seed: int, search: Search = Search(),  # noqa: B008
                 ) -> None:
        if not holes:
            raise UserError("The text has no hole; mark each with <|hole|>, or give the texts before and behind it.")
        if len(parts) != len(holes) + 1:
            raise UserError(f"{len(parts)} texts have {len(parts) - 1} holes between them, and {len(holes)} were described.")
        self.model, self.tokenizer, self.policy, self.chunk, self.seed = model, tokenizer, policy, prefill_step_size, seed
        self.search = search
        self.size, self.eos_ids = model.config.canvas_length, model.config.generation.eos_token_ids
        self.texts, self.holes, self.fills = list(parts), list(holes), list[Fill]()
        self.ends: list[int] = []  # what stands behind the text
        if prompt is None:
            if tokenizer.bos_token_id is None:
                raise UserError("This tokenizer has no token for the begin of a text; give a prompt.")
            self.known = [int(tokenizer.bos_token_id)]
        else:
            self.known = chat_ids(tokenizer, [user_message(prompt)] if isinstance(prompt, str) else prompt)
            self.ends = [turn_end(tokenizer)]
        self.begin = len(self.known)  # of the text, among the ids that are known
        # A blank before a hole belongs to the word that comes: tokens hold it with the word.
        self.blanks = [re.search(r"[ \t]*\Z", part)[0] for part in parts[:-1]]  # type: ignore[index]
        try:
            self.parts = [encode_literally(tokenizer, part[: len(part) - len(blank)])
                          for part, blank in zip(parts, [*self.blanks, ""], strict=True)]
        except (TypeError, UnicodeEncodeError):
            raise UserError("The text is not valid Unicode; decode the file with its own encoding.") from None
        self.constraints = [compile_constraint(tokenizer, model.config, begin=blank, **hole.constraint)
                            for blank, hole in zip(self.blanks, holes, strict=True)]
        self.lengths = [self._lengths(number) for number in range(len(holes))]
        self.most = self.begin + sum(map(len, self.parts)) + sum(own[-1] for own in self.lengths)  # tokens
        context = model.config.text.max_position_embeddings
        if self.most + self.size > context:
            raise UserError(f"The text may come to {self.most:,} tokens, and the context holds {context:,} with a canvas of "
                            f"{self.size}; shorten it.")
        self.cache = Cache(model.config.text)  # what comes before the canvases
        self.next_logits = mx.zeros(0)  # [vocabulary] of the causal mode behind it
        self.unseen = 0
        self.warn: Callable[[str], None] | None = None  # is told what the caller should see; None: as a GenerationWarning

    def _lengths(self, number: int) -> list[int]:
        fewest, most = self.holes[number].bounds
        found = [length for length in self.constraints[number].lengths(most) if length >= fewest]
        if not found:
            raise UserError(f"No text of {fewest} to {most} tokens is admitted by the constraint of hole {number + 1}; widen its "
                            "constraint or its length.")
        return found

    def result(self) -> Infilled:
        return Infilled("".join(piece for part, fill in zip(self.texts, [*(f.text for f in self.fills), ""], strict=True)
                                for piece in (part, fill)), tuple(self.fills), self.unseen, self.seed)

    def rounds(self) -> Iterator[list[Session]]:
        """The sessions that are to be run to their ends next, until all holes are filled; finished ones only read.  None where it
        has worked itself and others may have a turn."""
        while len(self.fills) < len(self.holes):
            number = len(self.fills)
            tried: dict[int, tuple[float, _Trial]] = {}
            began = time.monotonic()
            while new := _next_lengths(self.lengths[number], {length: score for length, (score, _) in tried.items()}, self.search,
                                       time.monotonic() - began):
                trials = yield from self._trials(number, new)
                yield [trial.session for trial in trials]
                if len(self.lengths[number]) == 1:
                    tried[new[0]] = 0.0, trials[0]
                    break
                for length, trial in zip(new, trials, strict=True):
                    tried[length] = self._score(number, trial), trial
                    yield []
            self._take(number, tried)

    def _trials(self, number: int, lengths: Sequence[int]) -> Generator[list[Session], None, list[_Trial]]:
        """Sessions in which the hole has so many tokens each, over one cache."""
        behind, holes = self._behind(number)
        known = [*self.known, *self.parts[number]]
        # As much as can be of the text behind, then of that before, which says more on the canvas than from the cache.
        before = max(0, min(self.size - max(lengths) - len(behind), len(known) - max(self.begin, self.cache.length)))
        context, trials = known[: len(known) - before], list[_Trial]()
        # They go on from one prefix, which is read once.
        reader = Session.reading(self.model, context, cache=self.cache.copy())
        reader.wants_next = True
        yield [reader]
        if reader.next_logits is not None:
            self.cache, self.next_logits = reader.cache, reader.next_logits
        for length in lengths:
            size = -(-length // self.size) * self.size  # of one canvas, or more for a long hole
            pins = [*known[len(context) :], *[FREE] * length, *behind][:size]
            spots = [slice(before, before + length),
                     *(slice(before + length + hole.start, before + length + hole.stop) for hole in holes)]
            cut = next((spot.start for spot in spots[1:] if spot.start < len(pins) < spot.stop), len(pins))
            pins, spots = pins[:cut], [spot for spot in spots if spot.stop <= cut]
            stretches = [Stretch(constraint, spot.start, spot.stop)
                         for constraint, spot in zip(self.constraints[number:], spots, strict=False)]
            demands = Demands(self.eos_ids, len(pins), pins, stretches)
            draws = Draws(self.seed, self.model.config.text.vocab_size)
            session = Session(self.model, context, self.policy, draws, self.eos_ids, len(pins), min(self.size, len(pins)),
                              demands=demands, cache=self.cache.copy())
            trials.append(_Trial(session, spots))
            self.unseen = max(0, before + length + len(behind) - len(self.ends) - len(pins))
        return trials

    def _behind(self, number: int) -> tuple[list[int], list[slice]]:
        """(The ids that stand behind a hole as far as their places are known, FREE in further holes; where those are.)"""
        ids, holes = list[int](), list[slice]()
        for place in range(number + 1, len(self.parts)):
            ids += self.parts[place]
            if place == len(self.holes):
                ids += self.ends
            elif len(self.lengths[place]) > 1:
                break
            else:
                holes.append(slice(len(ids), len(ids) + self.lengths[place][0]))
                ids += [FREE] * self.lengths[place][0]
        return ids, holes

    def _score(self, number: int, trial: _Trial) -> float:
        """Log-probability in nats that the causal mode gives to what stands from the hole on, by tokens, of which the hole has as
        many as the tokenizer would write it with: a word spelled letter by letter is no better for having more of them.

        That of the canvas mode says nothing of lengths: whatever stands on a canvas was made to fit (bench/LOG.md).
        """
        ids, cache = mx.array(trial.tokens), self.cache.copy()
        output = self.model.encode([ids], [cache], logits="all", write="hold")
        cache.accept(0)
        assert output.logits is not None
        hole = trial.spots[0]
        logits = mx.concatenate((self.next_logits[None], output.logits[0][:-1]))[hole.start :]
        chosen = mx.take_along_axis(logits, ids[hole.start :, None], axis=-1)[:, 0]
        tokens = len(encode_literally(self.tokenizer, self.blanks[number] + self._text(number, trial, 0))) + ids.size - hole.stop
        return float((chosen - mx.logsumexp(logits, axis=-1)).sum().item()) / tokens

    def _take(self, number: int, tried: Mapping[int, tuple[float, _Trial]]) -> None:
        """Fill the hole as the best trial did, and those that are on its canvas too."""
        _, best = max(tried.values(), key=lambda one: one[0])
        if not best.converged:
            message = f"The canvas of hole {number + 1} did not converge; its text may be faulty."
            if self.warn:
                self.warn(message)
            else:
                warnings.warn(message, GenerationWarning, stacklevel=2)
        candidates = tuple(Candidate(self._text(number, trial, 0), length, score, trial.converged)
                           for length, (score, trial) in sorted(tried.items())) if len(tried) > 1 else ()
        steps = sum(canvas.steps for _, trial in tried.values() for canvas in trial.session.canvases)
        for place, spot in enumerate(best.spots):
            tokens = best.tokens[spot].tolist()
            self.fills.append(Fill(number + place, self._text(number, best, place), tuple(tokens), best.converged,
                                   0 if place else steps, () if place else candidates))
            self.known += [*self.parts[number + place], *tokens]

    def _text(self, number: int, trial: _Trial, place: int) -> str:
        text: str = self.tokenizer.decode(trial.tokens[trial.spots[place]].tolist())
        return text[len(self.blanks[number + place]) :]


def _next_lengths(lengths: Sequence[int], scores: Mapping[int, float], search: Search = Search(),  # noqa: B008 (frozen)
                  seconds: float = 0.0) -> list[int]:
    """Of ``lengths`` those to be tried next, as many as the ``search`` allows after so many ``seconds``: spread over all at first,
    then between the neighbours of the best."""
    wanted = list(lengths)
    side = search.side if search.most is None else min(search.side, search.most - len(scores))
    if side < 1 or (scores and search.seconds is not None and seconds > search.seconds):
        return []
    if scores:
        tried = sorted(scores)
        place = tried.index(max(tried, key=lambda length: scores[length]))
        low, high = tried[max(0, place - 1)], tried[min(len(tried) - 1, place + 1)]
        wanted = [length for length in lengths if low < length < high and length not in scores]
    if len(wanted) <= side:
        return wanted
    if search.short and not scores:
        return sorted({wanted[round(place) - 1] for place in np.geomspace(1, len(wanted), side)})
    if side == 1:
        return [wanted[len(wanted) // 2]]
    return [wanted[round(place)] for place in np.linspace(0, len(wanted) - 1, side)]
