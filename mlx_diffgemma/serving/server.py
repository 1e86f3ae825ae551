"""The parts of the server that all handlers share."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol

from starlette.requests import Request as HTTPRequest

from mlx_diffgemma.decoding.job import Job
from mlx_diffgemma.serving.engine import Engine
from mlx_diffgemma.serving.intake import Intake
from mlx_diffgemma.serving.keys import asker, key_of
from mlx_diffgemma.serving.metrics import Metrics
from mlx_diffgemma.serving.preparation import Preparation
from mlx_diffgemma.serving.served_models import ServedModels
from mlx_diffgemma.serving.settings import Settings


class Salted(Protocol):
    """A body with ``salts`` that keep its cached prompts apart from others."""

    @property
    def salts(self) -> Sequence[str]: ...


class Server:
    """The parts of a server in front of an ``engine`` that has been started."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine = engine
        self.settings = settings
        self.metrics = Metrics(engine)
        self.models = ServedModels(settings, engine.model.config)
        self.preparation = Preparation(settings.compile_seconds)
        self.intake = Intake(engine, settings, self.preparation)

    def sign(self, job: Job, body: Salted, http: HTTPRequest) -> None:
        """Set on ``job`` who asks, and which cached prompts it may use.

        Requests with the same API key and the same salts share cached prompts.

        Args:
            job: the job of the request.
            body: its body, with the salts.
            http: the request.
        """
        job.client = asker(http.scope)
        parts = repr((key_of(http.scope), *body.salts))
        job.scope = hashlib.sha256(parts.encode("utf-8", "surrogatepass")).digest()

    def warm(self) -> None:
        """Start what the first request would otherwise wait for."""
        self.preparation.warm()

    def close(self) -> None:
        """Cancel what is being prepared.  Thread-safe."""
        self.preparation.close()
