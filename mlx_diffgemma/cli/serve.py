"""The command ``mlx-diffgemma serve``."""

from __future__ import annotations

import logging
import socket
import sys
from typing import TYPE_CHECKING, Annotated, Any

from mlx_diffgemma.cli.options import DraftOptions, ModelOptions
from mlx_diffgemma.cli.serve_options import LEVELS, AccessOptions, LimitOptions, ListenOptions
from mlx_diffgemma.cli.signature import command, generation
from mlx_diffgemma.device import set_wiring
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.generation.load import load
from mlx_diffgemma.heap import map_large_blocks

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma

MISSING = "The server needs further packages: pip install 'mlx-diffgemma[server]'."
# for which one thread holds Python's lock while another wants it; Python's own 0.005 delays each
# step
SWITCH_SECONDS = 0.001
OPTIONS = generation(
    "max_tokens",
    "temperature",
    "top_k",
    "top_p",
    "preset",
    "diffusion_sampler",
    "threshold",
    "max_denoising_steps",
    unset=True,
    help={
        "max_tokens": "Cut answers whose request does not say after this many tokens. Default: "
        "until they end, at most 4,096 or the context.",
        "temperature": "Default temperature for requests that omit it: 1 is the checkpoint's "
        "schedule, T multiplies it, 0 takes the most probable token. Default: 1.",
        "top_k": "Default top_k for requests that omit it: draw among the k most probable tokens; "
        "0 is off. Default: 0.",
        "top_p": "Default top_p for requests that omit it: draw among the most probable tokens "
        "that together have this probability. Default: 1, off.",
    },
)


@command
def serve_command(
    *,
    source: ModelOptions,
    listen: ListenOptions,
    access: AccessOptions,
    limits: LimitOptions,
    defaults: Annotated[dict[str, Any], OPTIONS],
    drafting: DraftOptions,
) -> None:
    """Serve a model over OpenAI's protocol.

    A page at / shows the canvas.
    """
    try:
        from mlx_diffgemma.cli.web import Web
        from mlx_diffgemma.serving.engine import Engine
    except ImportError:
        raise UserError(MISSING) from None
    if listen.log_level not in LEVELS:
        raise UserError(f"Unknown log level {listen.log_level!r}; use one of {', '.join(LEVELS)}.")
    set_wiring(listen.wired)
    map_large_blocks()
    access.check()
    drafter: list[Any] = []

    def loaded() -> tuple[DiffusionGemma, TokenizerWrapper]:
        network, tokenizer = load(source.model, **source.loading)
        drafter.append(drafting.load(network, tokenizer))
        return network, tokenizer

    listening = _listen(listen.host, listen.port)
    engine = Engine(
        loaded,
        limits.max_batch,
        limits.max_queue,
        limits.prefill_step_size,
        limits.prompt_cache_bytes,
    )
    web = Web(source.model, listen, access, limits, defaults, listening)
    logging.getLogger("mlx_diffgemma").setLevel(listen.log_level.upper())
    sys.setswitchinterval(SWITCH_SECONDS)
    web.run(engine, drafter)


def _listen(host: str, port: int) -> socket.socket:
    """Open the socket.  Call it before the model is loaded, which takes longer.

    Raises:
        UserError: the server cannot listen on this address.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise UserError(
            f"The server cannot listen on {host} port {port} ({error.strerror}); choose another --port or "
            "--host."
        ) from None
    return listening
