"""Figures of a server in Prometheus's text format."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from mlx_diffgemma.serving.engine import Engine
from mlx_diffgemma.serving.jobs import Usage

PREFIX = "diffgemma"
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_OfEngine(engine))
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"{PREFIX}_{name}", text, labels, registry=self.registry)

        def seconds(name: str, text: str) -> Histogram:
            return Histogram(f"{PREFIX}_{name}_seconds", text, buckets=SECONDS, registry=self.registry)

        self.requests = counter("requests", "Requests by route and status.", "route", "status")
        self.prompt = counter("prompt_tokens", "Tokens of prompts, those that were in the cache included.")
        self.cached = counter("prompt_tokens_cached", "Tokens of prompts that were in the cache.")
        self.completion = counter("completion_tokens", "Tokens of answers.")
        self.steps = counter("denoising_steps", "Denoising steps of finished answers.")
        self.first = seconds("first_canvas", "From a request to its first canvas.")
        self.seconds = seconds("request", "From a request to the end of its answer.")

    def count(self, usage: Usage) -> None:
        """An answer is finished."""
        self.prompt.inc(usage.prompt)
        self.cached.inc(usage.reused)
        self.completion.inc(usage.completion)
        self.steps.inc(usage.steps)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _OfEngine:
    """What is read off the engine when somebody asks."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        figures, prefixes = self.engine.figures, self.engine.prefixes
        for name, text, value in (
                ("rows", "Rows of the batch that are taken.", figures.rows), ("waiting", "Requests in the queue.", figures.waiting),
                ("prefix_bytes", "Bytes of caches kept for prompts to come.", prefixes.nbytes),
                ("prefixes", "Caches kept for prompts to come.", len(prefixes)),
                ("active_memory_bytes", "Bytes that MLX's arrays take.", mx.get_active_memory())):
            yield GaugeMetricFamily(f"{PREFIX}_{name}", text, value)
        for name, text, value in (
                ("turns", "Turns of the engine.", figures.turns), ("steps", "Denoising steps of all rows.", figures.steps),
                ("encoded_tokens", "Tokens of prompts that were encoded.", figures.encoded)):
            yield CounterMetricFamily(f"{PREFIX}_engine_{name}", text, value)
        jobs = CounterMetricFamily(f"{PREFIX}_jobs", "Jobs of the engine by their end.", labels=("end",))
        for end in ("finished", "cancelled", "failed"):
            jobs.add_metric((end,), getattr(figures, end))
        yield jobs
