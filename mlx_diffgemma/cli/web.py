"""The HTTP side of ``mlx-diffgemma serve``: a thread in addition to that of the engine."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

import uvicorn

from mlx_diffgemma.cli.serve_options import (
    AccessOptions,
    LimitOptions,
    ListenOptions,
    host_names,
    proxies,
)
from mlx_diffgemma.sampling.protocols import DraftModel
from mlx_diffgemma.serving.app import Settings, create_app
from mlx_diffgemma.serving.connections import allowed_connections, protocol
from mlx_diffgemma.serving.engine import Engine
from mlx_diffgemma.serving.settings import LOCAL

LAST_WORDS = 2  # seconds in which answers are sent after the last job has ended


class Web:
    """Runs the HTTP server in front of the engine."""

    def __init__(
        self,
        model: str,
        listen: ListenOptions,
        access: AccessOptions,
        limits: LimitOptions,
        defaults: dict[str, Any],
        listening: socket.socket,
    ) -> None:
        self.model = model
        self.listen = listen
        self.access = access
        self.limits = limits
        self.defaults = defaults
        self.listening = listening
        self._connections = allowed_connections()
        self._servers: list[uvicorn.Server] = []
        self._closing: list[Callable[[], None]] = []

    def run(self, engine: Engine, drafter: list[DraftModel | None]) -> None:
        """Serve until a signal ends it.

        MLX runs on this thread.  At the end of a thread MLX frees what it holds for the thread, and
        needs Python for that.  Another thread may end after Python has shut down.

        Args:
            engine: computes the answers.
            drafter: holds the drafter, or None, once the engine has loaded the model.
        """
        http = threading.Thread(
            target=self._serve, args=(engine, drafter), name="http", daemon=True
        )
        told = list[int]()

        def stop(number: int, _: object) -> None:
            # After a second signal it waits for nothing.  Some of the given seconds are kept for
            # sending answers.
            engine.close(0 if told else max(0.0, self.listen.grace - LAST_WORDS))
            for close in self._closing:
                close()
            told.append(number)

        def ready() -> None:
            http.start()
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, stop)

        engine.run(ready)
        # The HTTP server ends only after the last job.  Until then, clients get the results of
        # their requests, and new requests get the error that the server is closing.
        for server in self._servers:
            server.should_exit = True
        http.join()

    def _serve(self, engine: Engine, drafter: list[DraftModel | None]) -> None:
        try:
            app = create_app(engine, self._settings(drafter[0]))
            config = uvicorn.Config(
                app,
                log_level=self.listen.log_level,
                server_header=False,
                http=protocol(self._connections),
                **proxies(self.access.forwarded_allow_ips),
                timeout_graceful_shutdown=LAST_WORDS,
            )
            server = uvicorn.Server(config)
            self._servers.append(server)
            self._closing.append(app.state.close)
            app.state.warm()
            host = f"[{self.listen.host}]" if ":" in self.listen.host else self.listen.host
            print(
                f"{self.model} is at http://{host}:{self.listening.getsockname()[1]}: "
                "a page to watch it, and OpenAI's protocol under /v1",
                flush=True,
            )
            server.run(sockets=[self.listening])
        finally:
            engine.close()

    def _settings(self, drafter: DraftModel | None) -> Settings:
        access = self.access
        hosts = host_names(
            [*LOCAL, self.listen.host], self.listening.getsockname()[0], access.allowed_hosts
        )
        return Settings(
            self.model,
            self.defaults,
            access.api_keys,
            access.allowed_origins,
            hosts,
            self.limits.max_body,
            self.limits.max_prompt_tokens,
            access.allow_image_files,
            access.allow_image_urls,
            drafter,
            self.limits.max_compile_seconds,
            access.allow_control_tokens,
            access.strict,
            access.aliases,
            access.any_model,
        )
