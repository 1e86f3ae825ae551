"""Compares the throughput of our server with mlx-vlm's, on the same weights.

It is measured with one client and with several.

    python bench/serving.py                              # nano in float32, clients 1, 2, 4, 8
    python bench/serving.py --profile                    # what a step costs by rows and part, which bounds the gain

Both servers run as their users run them, in separate processes on this machine.  They get requests
in turn, round after round, and the other one is idle meanwhile.  Every client sends its next
request when it has its answer.  All requests are greedy, with the checkpoint's rules and whole
canvases on both sides, so that both take about the same steps; the canvases they start with differ.
A figure is the fastest of the rounds, because other work on the machine only ever adds to it.  CPU
seconds are those of the server's process.  The last line is one JSON record.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import mlx.core as mx
from documents import put_table

from mlx_diffgemma import chat_ids, nano
from mlx_diffgemma.checkpoint.convert import convert
from mlx_diffgemma.decoding import loop as decoding_loop
from mlx_diffgemma.decoding.loop import Loop
from mlx_diffgemma.decoding.session import Session
from mlx_diffgemma.device import describe
from mlx_diffgemma.evaluation.tasks import Question, tasks_named
from mlx_diffgemma.generation.load import load
from mlx_diffgemma.generation.options import GenerationOptions
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.sampling import self_conditioning
from mlx_diffgemma.sampling.draws import Draws

RESULTS = Path(__file__).parent / "results" / "serving.json"
OURS, THEIRS = "mlx-diffgemma", "mlx-vlm"
COMMANDS = {
    OURS: [
        sys.executable,
        "-c",
        "from mlx_diffgemma.cli import main; main()",
        "serve",
        "--log-level",
        "warning",
    ],
    THEIRS: [sys.executable, "-m", "mlx_vlm.server", "--host", "127.0.0.1", "--log-level", "ERROR"],
}
OPTIONS = {OURS: {}, THEIRS: {"diffusion_sampler": "entropy-bound", "diffusion_full_canvas": True}}
ROWS = (1, 2, 4, 8)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder that both can load; default: nano in float32")
    parser.add_argument("--clients", default="1,2,4,8")
    parser.add_argument(
        "--questions", type=int, default=12, help="of each of nano's tasks, in a round"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-batch", type=int, default=8)
    parser.add_argument("--profile", action="store_true", help="only the profile")
    parser.add_argument(
        "--table",
        action="store_true",
        help="only make the tables in docs/server.md from the record",
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    record: dict[str, Any] = (
        json.loads(arguments.output.read_text("utf-8")) if arguments.output.exists() else {}
    )
    if not arguments.table:
        with tempfile.TemporaryDirectory() as made:
            folder = Path(arguments.model) if arguments.model else for_both(Path(made) / "nano")
            if not arguments.profile:
                record["rows"] = throughput(folder, arguments)
            record["profile"] = profile(folder)
        record |= {
            "command": "python bench/serving.py",
            "rounds": arguments.rounds,
            "max_batch": arguments.max_batch,
            "cores": os.cpu_count(),
            "machine": describe(mx.float32),
        }
        arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if arguments.output == RESULTS:
        put_table("server.md", "serving.py", table(record))
    print(json.dumps(record))


def for_both(folder: Path) -> Path:
    """nano in float32; mlx-vlm reads the sampler's numbers from the config alone."""
    convert(nano.NAME, folder, dtype="float32")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["generation_config"] = json.loads((folder / "generation_config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


# Servers and clients


@dataclass
class Server:
    name: str
    url: str
    model: str
    process: subprocess.Popen[bytes]

    @property
    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def ask(self, client: httpx.Client, question: Question, seed: int) -> dict[str, Any]:
        body = {
            "model": self.model,
            "messages": list(question.messages),
            "temperature": 0,
            "max_tokens": 512,
            "seed": seed,
        }
        began = time.perf_counter()
        response = client.post(f"{self.url}/v1/chat/completions", json=body | OPTIONS[self.name])
        response.raise_for_status()
        answer = response.json()
        text = answer["choices"][0]["message"]["content"] or ""
        return {
            "seconds": time.perf_counter() - began,
            "tokens": answer["usage"]["completion_tokens"],
            "text": text,
            "steps": answer["usage"].get("denoising_steps"),
            "right": question.mark(text).score,
        }


@contextmanager
def serving(name: str, folder: Path, port: int, options: Sequence[str] = ()) -> Iterator[Server]:
    command = [*COMMANDS[name], "--model", str(folder), "--port", str(port), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    server = Server(name, f"http://127.0.0.1:{port}", str(folder), process)
    try:
        while True:
            try:
                httpx.get(f"{server.url}/health", timeout=60)
                break
            except httpx.ConnectError:
                if process.poll() is not None:
                    raise SystemExit(
                        f"{' '.join(command)} has ended with {process.returncode}."
                    ) from None
                time.sleep(0.2)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def ask_all(server: Server, questions: Sequence[Question], clients: int) -> dict[str, Any]:
    """Every question once, by so many clients at a time."""
    waiting, found, failed = (
        iter(list(enumerate(questions))),
        dict[int, dict[str, Any]](),
        list[Exception](),
    )
    lock = threading.Lock()

    def work() -> None:
        with httpx.Client(timeout=600) as client:
            while not failed:
                with lock:
                    place, question = next(waiting, (0, None))
                if question is None:
                    return
                try:
                    found[place] = server.ask(client, question, place)
                except (httpx.HTTPError, KeyError, ValueError) as error:
                    failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(clients)]
    began, cpu = time.perf_counter(), server.cpu_seconds
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise SystemExit(f"{server.name}: {failed[0]}")
    seconds, cpu = time.perf_counter() - began, server.cpu_seconds - cpu
    answers = [found[place] for place in range(len(questions))]
    tokens, latencies = (
        sum(own["tokens"] for own in answers),
        sorted(own["seconds"] for own in answers),
    )
    return {
        "seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "cpu_seconds": cpu,
        "latency_median": statistics.median(latencies),
        "latency_95": latencies[int(0.95 * len(latencies))],
        "steps": None if answers[0]["steps"] is None else sum(own["steps"] for own in answers),
        "right": statistics.mean(own["right"] for own in answers),
        "texts": [own["text"] for own in answers],
    }


def throughput(folder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    by_task = [task.questions(arguments.questions) for task in tasks_named("nano")]
    questions = [
        question for own in zip(*by_task, strict=True) for question in own
    ]  # long and short answers in turn
    counts = [int(count) for count in arguments.clients.split(",")]
    rounds: dict[tuple[str, int], list[dict[str, Any]]] = {}
    with ExitStack() as stack:
        servers = [
            stack.enter_context(
                serving(OURS, folder, 8391, ["--max-batch", str(arguments.max_batch)])
            ),
            stack.enter_context(serving(THEIRS, folder, 8392)),
        ]
        for server in servers:
            ask_all(server, questions[: 2 * max(counts)], max(counts))  # to warm up
        for _ in range(arguments.rounds):
            for count in counts:
                for server in servers:
                    one = ask_all(server, questions, count)
                    rounds.setdefault((server.name, count), []).append(one)
                    print(
                        f"{server.name:14} {count} clients: {one['tokens_per_second']:7.1f} tokens/s, latency "
                        f"{one['latency_median']:.2f} s (95 %: {one['latency_95']:.2f}), "
                        f"{one['cpu_seconds'] / one['seconds']:.2f} cores, {one['steps']} steps, right {one['right']:.1%}",
                        flush=True,
                    )
    rows = []
    for (name, count), own in rounds.items():
        best = max(own, key=lambda one: one["tokens_per_second"])
        alone = rounds[name, counts[0]]
        texts = {
            one["texts"][place] == alone[0]["texts"][place]
            for one in own
            for place in range(len(questions))
        }
        rows.append(
            {key: value for key, value in best.items() if key != "texts"}
            | {
                "server": name,
                "clients": count,
                "questions": len(questions),
                "median": statistics.median(one["tokens_per_second"] for one in own),
                "same_texts_as_alone": texts == {True},
                "gain": best["tokens_per_second"] / max(one["tokens_per_second"] for one in alone),
            }
        )
    return rows


# What bounds them


def profile(folder: Path) -> dict[str, Any]:
    """Milliseconds of a denoising step of 1, 2, 4, 8 rows, and of its parts, each evaluated by
    itself; the smallest of some.
    """
    model, tokenizer = load(str(folder))
    questions = [question for task in tasks_named("nano") for question in task.questions(4)]
    policy = GenerationOptions(temperature=0.0).policy(model)
    found = {}
    for rows in ROWS:
        whole, parts = list[float](), list[dict[str, float]]()
        for turn in range(6):
            sessions = [
                Session(
                    model,
                    chat_ids(tokenizer, question.messages),
                    policy,
                    Draws(seed, model.config.text.vocab_size),
                    model.config.generation.eos_token_ids,
                    512,
                )
                for seed, question in enumerate(questions[:rows])
            ]
            loop = Loop(model, sessions)
            loop.advance()
            began = time.perf_counter()
            if turn % 2:
                with measured() as own:
                    loop.advance()
                parts.append(own)
            else:
                loop.advance()
                whole.append(1000 * (time.perf_counter() - began))
        found[rows] = {"step": min(whole)} | {
            part: min(own[part] for own in parts) for part in parts[0]
        }
        print(
            f"{rows} rows: "
            + ", ".join(f"{part} {own:.1f} ms" for part, own in found[rows].items()),
            flush=True,
        )
    first, last = found[ROWS[0]]["step"], found[ROWS[-1]]["step"]
    each = (last - first) / (ROWS[-1] - ROWS[0])
    return {"rows": found, "per_row": each, "fixed": first - each, "most": first / each}


@contextmanager
def measured() -> Iterator[dict[str, float]]:
    """Of one step: the forward, self-conditioning and the sampler, in milliseconds."""
    found: dict[str, float] = {}

    def timed(
        part: str, real: Callable[..., Any], arrays: Callable[[Any], Any]
    ) -> Callable[..., Any]:
        def run(*given: Any, **named: Any) -> Any:
            began = time.perf_counter()
            made = real(*given, **named)
            mx.eval(arrays(made))
            found[part] = found.get(part, 0.0) + 1000 * (time.perf_counter() - began)
            return made

        return run

    parts = (
        (DiffusionGemma, "denoise", "forward", lambda made: made.logits),
        (self_conditioning, "soft_embedding", "self-conditioning", lambda made: made),
        (
            decoding_loop,
            "sample_group",
            "sampler",
            lambda made: [array for array in made[0] if array is not None],
        ),
    )
    with ExitStack() as stack:
        for owner, name, part, arrays in parts:
            stack.enter_context(
                mock.patch.object(owner, name, timed(part, getattr(owner, name), arrays))
            )
        yield found


def table(record: dict[str, Any]) -> str:
    lines = [
        "| server | clients | tokens/s | against one client | latency, s (95 %) | cores busy | right |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['server']} | {row['clients']} | {row['tokens_per_second']:,.0f} | {row['gain']:.2f} | "
        f"{row['latency_median']:.2f} ({row['latency_95']:.2f}) | {row['cpu_seconds'] / row['seconds']:.2f} | "
        f"{row['right']:.1%} |"
        for row in sorted(record["rows"], key=lambda row: (row["server"], row["clients"]))
    ]
    rows = record["profile"]["rows"]
    parts = list(next(iter(rows.values())))
    lines += [
        "",
        f"| rows in a step | {' | '.join(f'{part}, ms' for part in parts)} |",
        f"|---|{'---|' * len(parts)}",
    ]
    lines += [
        f"| {count} | {' | '.join(f'{own[part]:.1f}' for part in parts)} |"
        for count, own in rows.items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
