"""Traces: the record of an answer, denoising step by denoising step, for use outside the terminal.

``Tracer`` turns a ``CanvasStep`` into plain JSON values.  The server sends these as they come.
``Recorder`` writes them to a file between a header and a footer.  A ``.jsonl`` file has one record
a line.  A ``.html`` file has the same lines after the page that replays them (``page/canvas.js``),
and needs only a browser.  docs/trace.md describes the fields.

    >>> with Recorder(Path("answer.html"), Tracer(tokenizer, eos_ids), {"model": "nano", "prompt":
    text}) as recorder:
    ...     answer = generate(model, tokenizer, text, on_step=recorder.step)
    ...     recorder.finish(text=answer, finish_reason="stop")
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import itertools
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_diffgemma.decoding.records import CanvasStep
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.files import open_binary
from mlx_diffgemma.text.parser import REPLACEMENT

FORMAT = "mlx-diffgemma trace 1"
PAGE = Path(__file__).parents[1] / "page"  # the files for browsers; they have no build step
# One invalid byte makes its whole run undecodable, even the bytes that are characters themselves.
BYTE = re.compile("<0x[0-9A-F]{2}>")
NOT_DRAFTED, STANDS, REPAIRED = "0", "1", "2"
# JSON means the same with these escaped, and then no answer can end the HTML element that holds it.
ESCAPES = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})


class Tracer:
    """Turns steps into frames, which are values that JSON can hold.  It does not change a step."""

    def __init__(self, tokenizer: TokenizerWrapper, eos_ids: Iterable[int]):
        self._decode: Callable[[Sequence[int]], str] = lambda ids: tokenizer.decode(
            list(ids), skip_special_tokens=False
        )
        self._eos = set(eos_ids)
        self._spelled: Callable[[int], str | None] = tokenizer.convert_ids_to_tokens
        # The texts of tokens; None for tokens that are decoded in runs.
        self._known: dict[int, str | None] = {}

    def frame(self, step: CanvasStep) -> dict[str, Any]:
        """The record of ``step``.  Lists and strings have an entry for each position before the
        first end token.
        """
        ids = np.array(step.argmax).tolist()
        end = next((place for place, token in enumerate(ids) if token in self._eos), len(ids))
        ids = ids[:end]
        found = {
            "canvas": step.canvas_index,
            "retry": step.retry,
            "step": step.step,
            "max_steps": step.max_steps,
            "pieces": self.pieces(ids),
            "entropy": [_finite(nats) for nats in np.array(step.entropy)[:end].tolist()],
            "accepted": "".join(
                "01"[kept] for kept in np.array(step.accepted)[:end].astype(int).tolist()
            ),
            "mean_entropy": _finite(step.mean_entropy, 6),
            "reason": step.reason,
            "certificate": step.certificate,
        }
        if step.rejected:
            found["rejected"] = True
        if step.draft is not None:
            guesses = np.array(step.draft)[:end].tolist()
            found["draft"] = "".join(
                NOT_DRAFTED if guess < 0 else STANDS if guess == token else REPAIRED
                for guess, token in zip(guesses, ids, strict=True)
            )
        return found

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of each token.  Joined, they are the decoded text, with control tokens shown.

        Tokens are decoded one by one, except tokens that are bytes or hold a part of a character.
        A run of these is decoded as a whole.  Each character is put at the token that completes it.
        """
        found: list[str] = []
        run: list[int] = []
        for token in ids:
            if token not in self._known:
                alone = self._decode([token])
                self._known[token] = (
                    None
                    if REPLACEMENT in alone or BYTE.fullmatch(self._spelled(token) or "")
                    else alone
                )
            text = self._known[token]
            if text is None:
                run.append(token)
                continue
            found += [*self._split(run), text]
            run = []
        return found + self._split(run)

    def _split(self, run: Sequence[int]) -> list[str]:
        text, borders = self._decode(run) if run else "", [0]
        for stop in range(1, len(run) + 1):
            agreed = os.path.commonprefix((self._decode(run[:stop]), text))
            borders.append(max(borders[-1], len(agreed)))
        return [text[start:stop] for start, stop in itertools.pairwise(borders)]


class Recorder:
    """Writes a trace into ``path``; a context manager.

    Every line is in the file once its step is over, so the file of a killed run can be read.  The
    ``header`` says what was asked.  If the file can no longer be written, recording ends and
    ``failure`` says why; the answer continues.

    Raises:
        UserError: As ``check_path``, or the header cannot be written.
    """

    def __init__(
        self,
        path: Path,
        tracer: Tracer,
        header: dict[str, Any],
        clock: Callable[[], float] = time.monotonic,
    ):
        check_path(path)
        self._path, self._tracer, self._clock, self._steps = path, tracer, clock, 0
        self._header = {
            "format": FORMAT,
            **header,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        self._before, self._after = replay_page() if path.suffix == ".html" else ("", "")
        self._file: TextIO | None = None
        self.failure: UserError | None = None
        self._began = 0.0

    def __enter__(self) -> Recorder:
        try:
            # A lone surrogate, which a prompt of the command line may hold, becomes JSON's own
            # escape for it.
            self._file = self._path.open(
                "w", encoding="utf-8", errors="backslashreplace", newline="\n"
            )
        except OSError as error:
            raise UserError(
                f"The trace {self._path} cannot be written ({error.strerror})."
            ) from None
        self._began = self._clock()
        self._write(self._before)
        self._line(self._header)
        if self.failure:
            self._close()
            raise self.failure
        return self

    def step(self, step: CanvasStep) -> None:
        """Record ``step``.  The method can be passed as ``on_step``."""
        seconds = self._clock() - self._began  # the model's time, before the trace is decoded
        self._steps += step.step >= 0
        self._line(self._tracer.frame(step) | {"seconds": round(seconds, 4)})

    def finish(self, text: str, finish_reason: str, **figures: Any) -> None:
        """Write the footer: the final answer and its figures.

        Args:
            text: The text of the answer.
            finish_reason: Why it ended.
            **figures: Further fields of the footer.
        """
        numbers = {
            name: _finite(value, 6) if isinstance(value, float) else value
            for name, value in figures.items()
        }
        self._line(
            {
                "text": text,
                "finish_reason": finish_reason,
                **numbers,
                "steps": self._steps,
                "seconds": round(self._clock() - self._began, 4),
            }
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._write(self._after)
        self._close()

    def _close(self) -> None:
        assert self._file is not None
        with contextlib.suppress(OSError):  # a failed write has already been reported
            self._file.close()

    def _line(self, record: dict[str, Any]) -> None:
        text = json.dumps(record, ensure_ascii=False, allow_nan=False)
        self._write((text.translate(ESCAPES) if self._after else text) + "\n")

    def _write(self, text: str) -> None:
        assert self._file is not None
        if self.failure:
            return
        try:
            self._file.write(text)
            self._file.flush()
        except OSError as error:
            self.failure = UserError(
                f"The trace {self._path} cannot be written ({error.strerror})."
            )


def check_path(path: Path) -> None:
    """Raise UserError if ``path`` cannot hold a trace.  Call it before anything is computed."""
    if path.suffix not in (".html", ".jsonl"):
        raise UserError(f"A trace is a page or lines of JSON: {path} must end in .html or .jsonl.")
    if not path.parent.is_dir():
        raise UserError(f"The trace {path} cannot be written, there is no folder {path.parent}.")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"The trace {path} cannot be written; take another place for it.")
    if path.is_file() and not _is_trace(path):
        raise UserError(f"{path} is no trace and stays as it is; take another place for it.")


def _is_trace(path: Path) -> bool:
    """Whether a file is empty or a trace.  In a page, the header comes after style and scripts."""
    with open_binary(path) as file:
        beginning = file.read(2**20)
    return not beginning or b'"format": "mlx-diffgemma trace' in beginning


def replay_page() -> tuple[str, str]:
    """The parts of a replay page before and after the lines of its trace.

    The page includes style and scripts and allows no others.  So even a text that escaped from its
    element would not run.
    """
    style, script = _asset("style.css"), _asset("canvas.js") + _asset("replay.js")
    page = _asset("replay.html")
    for name, text in (
        ("style-hash", _hash(style)),
        ("script-hash", _hash(script)),
        ("style", style),
        ("script", script),
    ):
        page = page.replace("{{" + name + "}}", text)
    before, after = page.split("{{trace}}")
    return before, after


def _asset(name: str) -> str:
    return (PAGE / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _finite(value: float, digits: int = 3) -> float | None:
    """``value`` rounded to ``digits``, or None if it is not finite, since JSON cannot hold it."""
    return round(value, digits) + 0.0 if math.isfinite(value) else None  # + 0.0: no -0.0
