"""The names under which the model is served."""

from __future__ import annotations

import time
from typing import Any

from mlx_diffgemma.model.config import ModelConfig
from mlx_diffgemma.serving.errors import UnknownModelError
from mlx_diffgemma.serving.settings import Settings


class ServedModels:
    """The bodies that describe the model.

    ``first`` is the body for the model's own name.  ``all`` holds the bodies for all names.
    """

    def __init__(self, settings: Settings, config: ModelConfig) -> None:
        self._settings = settings
        self.first: dict[str, Any] = {
            "id": settings.model,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "mlx-diffgemma",
            "context_length": config.text.max_position_embeddings,
            "canvas_length": config.canvas_length,
            "vision": config.vision is not None,
        }
        self.all = [self.first, *(self.first | {"id": name} for name in settings.aliases)]
        last_part = settings.model.rstrip("/").rsplit("/", 1)[-1]
        names = (settings.model, last_part, "default", *settings.aliases)
        self._names = {_plain(name) for name in names}

    def check(self, name: str) -> None:
        """Check that a request may call the model ``name``.

        Raises:
            UnknownModelError: it may not.
        """
        if not self._settings.any_model and _plain(name) not in self._names:
            raise UnknownModelError(
                f"The model {name!r} is not served here; {self._settings.model!r} is. Call it so, "
                "or start the server with --alias and this name, or with --any-model."
            )


def _plain(name: str) -> str:
    """A model name in lower case and without the tag ``latest`` that Ollama's clients add."""
    return name.casefold().removesuffix(":latest")
