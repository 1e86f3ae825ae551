"""Filling the holes of one text: the canvases that the holes need, and the choice of a length.

A canvas sees to the right.  The known text within its range is pinned, and the holes are free.  The
text before the canvas is in the cache.  The text after the canvas is returned as it was and has no
influence on the hole.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_diffgemma.decoding.constraints import FREE, Demands, Stretch
from mlx_diffgemma.decoding.session import Session
from mlx_diffgemma.errors import GenerationWarning, UserError
from mlx_diffgemma.generation.holes import Candidate, Fill, Hole, Infilled, Messages
from mlx_diffgemma.generation.length_search import Search, next_lengths
from mlx_diffgemma.grammar.constraint import compile_constraint
from mlx_diffgemma.model.cache import Cache
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.sampling.draws import Draws
from mlx_diffgemma.sampling.protocols import Policy
from mlx_diffgemma.text.literal import encode_literally
from mlx_diffgemma.text.tokenizer import chat_ids, turn_end, user_message


@dataclass(frozen=True)
class Trial:
    """A session that tries one length of a hole.

    ``spots`` are the canvas positions of this hole, and of the later holes that are entirely on it.
    """

    session: Session
    spots: list[slice]

    @property
    def tokens(self) -> np.ndarray:
        return np.concatenate([canvas.tokens for canvas in self.session.canvases])

    @property
    def converged(self) -> bool:
        return all(canvas.converged for canvas in self.session.canvases)


@dataclass(frozen=True)
class FillSettings:
    """How holes are filled.

    Attributes:
        policy: Starts, samples and stops each canvas.
        seed: The seed of the draws.
        search: How far the length of a hole is searched.
    """

    policy: Policy
    seed: int
    search: Search = field(default_factory=Search)


class Filling:
    """Fills the ``holes`` between the ``parts`` of one text.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        parts: The texts between the holes, one more than there are holes.
        holes: At least one.
        prompt: The user's message or conversation; None: the text stands alone.
        settings: How the holes are filled.

    Raises:
        UserError: There are no holes, nothing fits a hole, or the text is longer than the context.

    Attributes:
        fills: What was filled so far, in the order of the text.
        begin: The position of the text among the ids that the model reads.
        most: The most tokens that the whole text may have.
        unseen: The tokens at the end of the text that come after the last canvas.
        warn: Called with each warning; None: it becomes a GenerationWarning.
    """

    def __init__(
        self,
        model: DiffusionGemma,
        tokenizer: TokenizerWrapper,
        parts: Sequence[str],
        holes: Sequence[Hole],
        prompt: Messages | None,
        settings: FillSettings,
    ) -> None:
        _check_parts(parts, holes)
        self.model = model
        self.tokenizer = tokenizer
        self.policy = settings.policy
        self.seed = settings.seed
        self.search = settings.search
        self.size = model.config.canvas_length
        self.eos_ids = model.config.generation.eos_token_ids
        self.texts = list(parts)
        self.holes = list(holes)
        self.fills = list[Fill]()
        # The ids before the text, to which filled parts are added, and those after it.
        self.known, self.ends = _surroundings(tokenizer, prompt)
        self.begin = len(self.known)
        # A blank before a hole belongs to the word after it: one token holds both.
        self.blanks = [part[len(part.rstrip(" \t")) :] for part in parts[:-1]]
        self.parts = list[list[int]]()
        for part, blank in zip(parts, [*self.blanks, ""], strict=True):
            self.parts.append(encode_literally(tokenizer, part[: len(part) - len(blank)]))
        self.constraints = [
            compile_constraint(tokenizer, model.config, begin=blank, **hole.constraint)
            for blank, hole in zip(self.blanks, holes, strict=True)
        ]
        self.lengths = [self._lengths(number) for number in range(len(holes))]
        longest = sum(lengths[-1] for lengths in self.lengths)
        self.most = self.begin + sum(map(len, self.parts)) + longest
        context = model.config.text.max_position_embeddings
        if self.most + self.size > context:
            raise UserError(
                f"The text may come to {self.most:,} tokens, and the context holds {context:,} "
                f"with a canvas of {self.size}; shorten it."
            )
        self.cache = Cache(model.config.text)  # holds what comes before the canvases
        self.next_logits = mx.zeros(0)  # [vocabulary] of the causal mode after the cache
        self.unseen = 0
        self.warn: Callable[[str], None] | None = None

    def _lengths(self, number: int) -> list[int]:
        fewest, most = self.holes[number].bounds
        found = [length for length in self.constraints[number].lengths(most) if length >= fewest]
        if not found:
            raise UserError(
                f"No text of {fewest} to {most} tokens is admitted by the constraint of hole {number + 1}; widen its "
                "constraint or its length."
            )
        return found

    def result(self) -> Infilled:
        return Infilled(
            "".join(
                piece
                for part, fill in zip(self.texts, [*(f.text for f in self.fills), ""], strict=True)
                for piece in (part, fill)
            ),
            tuple(self.fills),
            self.unseen,
            self.seed,
        )

    def rounds(self) -> Iterator[list[Session]]:
        """Yield the sessions to run to their ends next, until all holes are filled.

        Finished sessions only encode.  An empty list means that this object has done some work
        itself and that others may have a turn.
        """
        while len(self.fills) < len(self.holes):
            number = len(self.fills)
            tried: dict[int, tuple[float, Trial]] = {}
            began = time.monotonic()
            while new := next_lengths(
                self.lengths[number],
                {length: score for length, (score, _) in tried.items()},
                self.search,
                time.monotonic() - began,
            ):
                trials = yield from self._trials(number, new)
                yield [trial.session for trial in trials]
                if len(self.lengths[number]) == 1:
                    tried[new[0]] = 0.0, trials[0]
                    break
                for length, trial in zip(new, trials, strict=True):
                    tried[length] = self._score(number, trial), trial
                    yield []
            self._take(number, tried)

    def _trials(
        self, number: int, lengths: Sequence[int]
    ) -> Generator[list[Session], None, list[Trial]]:
        """Make a trial for each length of the hole, all with the same cache.

        It yields the sessions that must run before the trials, and returns the trials.
        """
        behind, holes = self._behind(number)
        known = [*self.known, *self.parts[number]]
        # The canvas holds as much as possible of the text after the hole, then of the text before
        # it, which has more influence on the canvas than from the cache.
        before = max(
            0,
            min(
                self.size - max(lengths) - len(behind),
                len(known) - max(self.begin, self.cache.length),
            ),
        )
        context, trials = known[: len(known) - before], list[Trial]()
        # All trials continue from one prefix, which is encoded once.
        reader = Session.reading(self.model, context, cache=self.cache.copy())
        reader.wants_next = True
        yield [reader]
        if reader.next_logits is not None:
            self.cache, self.next_logits = reader.cache, reader.next_logits
        for length in lengths:
            # The size of one canvas, or of several for a long hole.
            size = -(-length // self.size) * self.size
            pins = [*known[len(context) :], *[FREE] * length, *behind][:size]
            spots = [
                slice(before, before + length),
                *(
                    slice(before + length + hole.start, before + length + hole.stop)
                    for hole in holes
                ),
            ]
            cut = next(
                (spot.start for spot in spots[1:] if spot.start < len(pins) < spot.stop), len(pins)
            )
            pins, spots = pins[:cut], [spot for spot in spots if spot.stop <= cut]
            stretches = [
                Stretch(constraint, spot.start, spot.stop)
                for constraint, spot in zip(self.constraints[number:], spots, strict=False)
            ]
            demands = Demands(self.eos_ids, len(pins), pins, stretches)
            draws = Draws(self.seed, self.model.config.text.vocab_size)
            session = Session(
                self.model,
                context,
                self.policy,
                draws,
                self.eos_ids,
                len(pins),
                min(self.size, len(pins)),
                demands=demands,
                cache=self.cache.copy(),
            )
            trials.append(Trial(session, spots))
            self.unseen = max(0, before + length + len(behind) - len(self.ends) - len(pins))
        return trials

    def _behind(self, number: int) -> tuple[list[int], list[slice]]:
        """Find the text after a hole, as far as its positions are known.

        Returns:
            (the ids, FREE at the positions of further holes; the positions of these holes).
        """
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

    def _score(self, number: int, trial: Trial) -> float:
        """The mean log-probability a token, in nats, that the causal mode gives to the text from
        the start of the hole.

        The mean counts as many tokens for the hole as the tokenizer would use for its text.  So a
        word that is spelled letter by letter gains nothing from its larger number of tokens.

        The log-probability under the canvas mode cannot compare lengths, because all tokens on a
        canvas were made to fit each other (bench/LOG.md).
        """
        ids, cache = mx.array(trial.tokens), self.cache.copy()
        output = self.model.encode([ids], [cache], logits="all", write="hold")
        cache.accept(0)
        assert output.logits is not None
        hole = trial.spots[0]
        logits = mx.concatenate((self.next_logits[None], output.logits[0][:-1]))[hole.start :]
        chosen = mx.take_along_axis(logits, ids[hole.start :, None], axis=-1)[:, 0]
        tokens = (
            len(
                encode_literally(self.tokenizer, self.blanks[number] + self._text(number, trial, 0))
            )
            + ids.size
            - hole.stop
        )
        return float((chosen - mx.logsumexp(logits, axis=-1)).sum().item()) / tokens

    def _take(self, number: int, tried: Mapping[int, tuple[float, Trial]]) -> None:
        """Fill the hole, and the later holes on its canvas, with the text of the best trial."""
        _, best = max(tried.values(), key=lambda one: one[0])
        if not best.converged:
            message = f"The canvas of hole {number + 1} did not converge; its text may be faulty."
            if self.warn:
                self.warn(message)
            else:
                warnings.warn(message, GenerationWarning, stacklevel=2)
        candidates = (
            tuple(
                Candidate(self._text(number, trial, 0), length, score, trial.converged)
                for length, (score, trial) in sorted(tried.items())
            )
            if len(tried) > 1
            else ()
        )
        steps = sum(
            canvas.steps for _, trial in tried.values() for canvas in trial.session.canvases
        )
        for place, spot in enumerate(best.spots):
            tokens = best.tokens[spot].tolist()
            self.fills.append(
                Fill(
                    number + place,
                    self._text(number, best, place),
                    tuple(tokens),
                    best.converged,
                    0 if place else steps,
                    () if place else candidates,
                )
            )
            self.known += [*self.parts[number + place], *tokens]

    def _text(self, number: int, trial: Trial, place: int) -> str:
        text: str = self.tokenizer.decode(trial.tokens[trial.spots[place]].tolist())
        return text[len(self.blanks[number + place]) :]


def _check_parts(parts: Sequence[str], holes: Sequence[Hole]) -> None:
    """Raise UserError unless there is one more text than there are holes."""
    if not holes:
        raise UserError(
            "The text has no hole; mark each with <|hole|>, or give the texts before and after it."
        )
    if len(parts) != len(holes) + 1:
        raise UserError(
            f"{len(parts)} texts have {len(parts) - 1} holes between them, and {len(holes)} were "
            "described."
        )


def _surroundings(
    tokenizer: TokenizerWrapper, prompt: Messages | None
) -> tuple[list[int], list[int]]:
    """The ids that come before the text, and those after it.

    Raises:
        UserError: There is no prompt, and the tokenizer has no token for the start of a text.
    """
    if prompt is None:
        if tokenizer.bos_token_id is None:
            raise UserError("This tokenizer has no token for the begin of a text; give a prompt.")
        return [int(tokenizer.bos_token_id)], []
    messages = [user_message(prompt)] if isinstance(prompt, str) else prompt
    return chat_ids(tokenizer, messages), [turn_end(tokenizer)]
