"""DiffusionGemma on Apple silicon with MLX.

    >>> from mlx_diffgemma import chat_ids, generate, load
    >>> model, tokenizer = load("nano")
    >>> generate(model, tokenizer, chat_ids(tokenizer, [{"role": "user", "content": "Add 12 and 30."}]))
"""

from mlx_diffgemma.failures import quiet_until_main

quiet_until_main()  # the imports that follow take seconds

from mlx_diffgemma.convert import convert
from mlx_diffgemma.decide import Decision, Question, decide
from mlx_diffgemma.errors import CheckpointWarning, NonFiniteLogitsError, UserError
from mlx_diffgemma.generate import batch_generate, generate, load, stream_generate
from mlx_diffgemma.infill import Fill, Hole, Infilled, batch_infill, edit, infill, stream_infill
from mlx_diffgemma.options import GenerationOptions
from mlx_diffgemma.prompt_cache import PromptCache
from mlx_diffgemma.request import GenerationResponse, GenerationWarning
from mlx_diffgemma.session import CanvasStep
from mlx_diffgemma.tokenizer import chat_ids, user_message
from mlx_diffgemma.video import Video, VideoWarning

__version__ = "0.1.0"

__all__ = [
    "CanvasStep", "CheckpointWarning", "Decision", "Fill", "GenerationOptions", "GenerationResponse", "GenerationWarning", "Hole",
    "Infilled", "NonFiniteLogitsError", "PromptCache", "Question", "UserError", "Video", "VideoWarning",
    "batch_generate", "batch_infill", "chat_ids", "convert", "decide", "edit", "generate", "infill", "load", "stream_generate",
    "stream_infill", "user_message",
]
