"""DiffusionGemma on Apple silicon with MLX.

>>> from mlx_diffgemma import chat_ids, generate, load
>>> model, tokenizer = load("nano")
>>> generate(model, tokenizer, chat_ids(tokenizer, [{"role": "user", "content": "Add 12 and 30."}]))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mlx_diffgemma.machine import import_mlx

import_mlx()  # before the imports that need MLX, so that its error message comes first

if TYPE_CHECKING:
    from mlx_diffgemma.checkpoint.convert import convert
    from mlx_diffgemma.decoding.prompt_cache import PromptCache
    from mlx_diffgemma.decoding.records import CanvasStep
    from mlx_diffgemma.errors import (
        CheckpointWarning,
        GenerationWarning,
        NonFiniteLogitsError,
        UserError,
        VideoWarning,
    )
    from mlx_diffgemma.generation.decide import decide
    from mlx_diffgemma.generation.generate import batch_generate, generate, stream_generate
    from mlx_diffgemma.generation.holes import Fill, Hole, Infilled
    from mlx_diffgemma.generation.infill import batch_infill, edit, infill, stream_infill
    from mlx_diffgemma.generation.load import load
    from mlx_diffgemma.generation.options import GenerationOptions
    from mlx_diffgemma.generation.questions import Decision, Question
    from mlx_diffgemma.generation.response import GenerationResponse
    from mlx_diffgemma.media.video import Video
    from mlx_diffgemma.text.tokenizer import chat_ids, user_message

__version__ = "0.1.0"

# The module of each public name.  It is imported when the name is first used, so that
# `import mlx_diffgemma` takes no time.
_DEFINED_IN = {
    "CanvasStep": "mlx_diffgemma.decoding.records",
    "CheckpointWarning": "mlx_diffgemma.errors",
    "Decision": "mlx_diffgemma.generation.questions",
    "Fill": "mlx_diffgemma.generation.holes",
    "GenerationOptions": "mlx_diffgemma.generation.options",
    "GenerationResponse": "mlx_diffgemma.generation.response",
    "GenerationWarning": "mlx_diffgemma.errors",
    "Hole": "mlx_diffgemma.generation.holes",
    "Infilled": "mlx_diffgemma.generation.holes",
    "NonFiniteLogitsError": "mlx_diffgemma.errors",
    "PromptCache": "mlx_diffgemma.decoding.prompt_cache",
    "Question": "mlx_diffgemma.generation.questions",
    "UserError": "mlx_diffgemma.errors",
    "Video": "mlx_diffgemma.media.video",
    "VideoWarning": "mlx_diffgemma.errors",
    "batch_generate": "mlx_diffgemma.generation.generate",
    "batch_infill": "mlx_diffgemma.generation.infill",
    "chat_ids": "mlx_diffgemma.text.tokenizer",
    "convert": "mlx_diffgemma.checkpoint.convert",
    "decide": "mlx_diffgemma.generation.decide",
    "edit": "mlx_diffgemma.generation.infill",
    "generate": "mlx_diffgemma.generation.generate",
    "infill": "mlx_diffgemma.generation.infill",
    "load": "mlx_diffgemma.generation.load",
    "stream_generate": "mlx_diffgemma.generation.generate",
    "stream_infill": "mlx_diffgemma.generation.infill",
    "user_message": "mlx_diffgemma.text.tokenizer",
}

__all__ = [
    "CanvasStep",
    "CheckpointWarning",
    "Decision",
    "Fill",
    "GenerationOptions",
    "GenerationResponse",
    "GenerationWarning",
    "Hole",
    "Infilled",
    "NonFiniteLogitsError",
    "PromptCache",
    "Question",
    "UserError",
    "Video",
    "VideoWarning",
    "batch_generate",
    "batch_infill",
    "chat_ids",
    "convert",
    "decide",
    "edit",
    "generate",
    "infill",
    "load",
    "stream_generate",
    "stream_infill",
    "user_message",
]


def __getattr__(name: str) -> Any:
    if name not in _DEFINED_IN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_DEFINED_IN[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
