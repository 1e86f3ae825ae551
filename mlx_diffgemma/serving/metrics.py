"""Metrics of a server in Prometheus's text format."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from mlx_diffgemma.serving.engine import Engine
from mlx_diffgemma.serving.jobs.events import Usage

PREFIX = "diffgemma"
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The metrics of a server in front of ``engine``."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(engine))

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"{PREFIX}_{name}", text, labels, registry=self.registry)

        def seconds(name: str, text: str) -> Histogram:
            return Histogram(
                f"{PREFIX}_{name}_seconds", text, buckets=SECONDS, registry=self.registry
            )

        self.requests = counter("requests", "Requests by route and status.", "route", "status")
        self.prompt = counter(
            "prompt_tokens", "Tokens of prompts, with those that were in the cache."
        )
        self.cached = counter("prompt_tokens_cached", "Tokens of prompts that were in the cache.")
        self.completion = counter("completion_tokens", "Tokens of answers.")
        self.steps = counter("denoising_steps", "Denoising steps of finished answers.")
        self.first = seconds("first_canvas", "From a request to its first canvas.")
        self.seconds = seconds("request", "From a request to the end of its answer.")

    def count_request(self, route: str, status: int) -> None:
        """Count an answer by its route and status."""
        self.requests.labels(route, str(status)).inc()

    def count(self, usage: Usage, seconds: float) -> None:
        """Count a finished answer that took ``seconds``."""
        self.seconds.observe(seconds)
        self.prompt.inc(usage.prompt)
        self.cached.inc(usage.reused)
        self.completion.inc(usage.completion)
        self.steps.inc(usage.steps)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _EngineCollector:
    """Reads the state of the engine when the metrics are requested."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self.engine.stats
        prefixes = self.engine.scheduler.prefix_cache
        for name, text, value in (
            ("rows", "Rows of the batch that are taken.", stats.rows),
            ("waiting", "Requests in the queue.", stats.waiting),
            ("prefix_bytes", "Bytes of caches kept for prompts to come.", prefixes.nbytes),
            ("prefixes", "Caches kept for prompts to come.", len(prefixes)),
            ("active_memory_bytes", "Bytes that MLX's arrays take.", mx.get_active_memory()),
        ):
            yield GaugeMetricFamily(f"{PREFIX}_{name}", text, value)
        for name, text, value in (
            ("turns", "Turns of the engine.", stats.scheduler_steps),
            ("steps", "Denoising steps of all rows.", stats.steps),
            ("encoded_tokens", "Tokens of prompts that were encoded.", stats.encoded),
        ):
            yield CounterMetricFamily(f"{PREFIX}_engine_{name}", text, value)
        jobs = CounterMetricFamily(
            f"{PREFIX}_jobs", "Jobs of the engine by their end.", labels=("end",)
        )
        for end in ("finished", "cancelled", "failed"):
            jobs.add_metric((end,), getattr(stats, end))
        yield jobs
