"""The command ``mlx-diffgemma serve``."""

from __future__ import annotations

import ipaddress
import re
import signal
import socket
import sys
import threading
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_diffgemma import nano
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.flags import Adapter, Draft, DraftRules, Dtype, Model, Preset, Revision, Sampler, Steps, Threshold, drafter_of
from mlx_diffgemma.generate import load
from mlx_diffgemma.grammar.budget import MAX_SECONDS
from mlx_diffgemma.options import GenerationOptions

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from mlx_diffgemma.model import DiffusionGemma

MISSING = "The server needs further packages: pip install 'mlx-diffgemma[server]'."
SWITCH_SECONDS = 0.001  # for which one thread holds Python's lock while another wants it; Python's own 0.005 delays each step
LAST_WORDS = 2  # seconds that answers have to be sent once nothing runs any longer
HOST = re.compile(r"[*]|[A-Za-z0-9_.-]+|\[?[0-9A-Fa-f.]*(:[0-9A-Fa-f.]*){2,}\]?")  # a name or an address
LEVELS = ("critical", "error", "warning", "info", "debug")


def serve_command(
    model: Model = nano.NAME,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every one this machine has.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8080,
    revision: Revision = None,
    adapter_path: Adapter = None,
    dtype: Dtype = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Answers that are written side by side.")] = 8,
    max_queue: Annotated[int, typer.Option(min=1, help="Requests that wait for a place; more are refused with 429.")] = 64,
    api_key: Annotated[str | None, typer.Option(envvar="MLX_DIFFGEMMA_API_KEY", show_envvar=True,
                                                help="What requests must bring as Authorization: Bearer.")] = None,
    allowed_origins: Annotated[list[str], typer.Option("--allowed-origin", help="A web page's origin that may ask from a browser; "
                                                       "may be given again. Default: none but the page served here.")] = [],  # noqa: B006
    allowed_hosts: Annotated[list[str], typer.Option("--allowed-host", help="A further name under which the server may be called, "
                                                     "such as host.docker.internal; may be given again; * is any. Default: those "
                                                     "of this machine, and any with a --host that others reach.")] = [],  # noqa: B006
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", "-m", help="Of an answer whose request does not say. Default: "
                                                   "until it ends, at most 4,096 or the context.")] = None,
    temp: Annotated[float | None, typer.Option(help="Of requests that do not say, as in generate.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Of requests that do not say.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Of requests that do not say.")] = None,
    preset: Preset = None,
    diffusion_sampler: Sampler = None,
    threshold: Threshold = None,
    max_denoising_steps: Steps = None,
    draft_model: Draft = None,
    draft_rules: DraftRules = None,
    prefill_step_size: Annotated[int, typer.Option(min=2, help="Positions of prompts that are read between two steps.")] = 512,
    prompt_cache_bytes: Annotated[int, typer.Option(min=0, help="Of what prompts leave for later ones that begin alike; 0 keeps "
                                                    "nothing.")] = 2 * 2**30,
    max_prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Longer prompts are refused. Default: the context.")] = None,
    max_compile_seconds: Annotated[float, typer.Option(min=0.1, help="Seconds that the schema or expression of one request may "
                                                       "take to compile.")] = MAX_SECONDS,
    max_body: Annotated[int, typer.Option(min=1, help="Bytes of a request's body.")] = 32 * 2**20,
    allow_image_files: Annotated[bool, typer.Option("--allow-image-files", help="Requests may name images by their path on this "
                                                    "machine.")] = False,
    allow_control_tokens: Annotated[bool, typer.Option("--allow-control-tokens", help="Read what looks like a control token in "
                                                       "messages and prompts as one; without it, it is plain text.")] = False,
    allow_image_urls: Annotated[bool, typer.Option("--allow-image-urls", help="Requests may name images elsewhere, which are then "
                                                   "fetched.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse a request whose fields are not known here, or have no effect. "
                                         "Default: the answer names them in its warnings.")] = False,
    aliases: Annotated[list[str], typer.Option("--alias", help="A further name of the model in requests; may be given "
                                               "again.")] = [],  # noqa: B006
    any_model: Annotated[bool, typer.Option("--any-model", help="Answer requests for a model of any name.")] = False,
    grace: Annotated[int, typer.Option(min=0, help="Seconds that running answers have to finish when the server is told to "
                                       "stop.")] = 10,
    log_level: Annotated[str, typer.Option(help=f"{', '.join(LEVELS)}.")] = "info",
) -> None:
    """Serve the model over OpenAI's protocol, with a page to watch it at /."""
    try:
        import uvicorn

        from mlx_diffgemma.serving.app import LOCAL, Settings, create_app
        from mlx_diffgemma.serving.engine import Engine
    except ImportError:
        raise UserError(MISSING) from None
    if log_level not in LEVELS:
        raise UserError(f"Unknown log level {log_level!r}; use one of {', '.join(LEVELS)}.")
    if api_key is not None and not (api_key and api_key.isascii() and api_key.isprintable() and api_key == api_key.strip()):
        raise UserError("An API key goes into a header: it must be ASCII, not empty, and have no blanks at its ends.")
    for wrong in (name for name in allowed_hosts if not HOST.fullmatch(name)):
        raise UserError(f"--allowed-host takes a name or an address without scheme and port, and got {wrong!r}.")
    given = {"max_tokens": max_tokens, "temperature": temp, "top_k": top_k, "top_p": top_p, "preset": preset,
             "diffusion_sampler": diffusion_sampler, "threshold": threshold, "max_denoising_steps": max_denoising_steps}
    defaults = {name: value for name, value in given.items() if value is not None}
    GenerationOptions.from_keywords(defaults)  # refused before anything is loaded
    drafter: list[Any] = []

    def loaded() -> tuple[DiffusionGemma, TokenizerWrapper]:
        network, tokenizer = load(model, revision=revision, dtype=dtype, adapter_path=adapter_path)
        drafter.append(drafter_of(draft_model, draft_rules, network, tokenizer))
        return network, tokenizer

    listening = _listen(host, port)
    engine = Engine(loaded, max_batch, max_queue, prefill_step_size, prompt_cache_bytes)
    hosts = _names([*LOCAL, host], listening.getsockname()[0], allowed_hosts)
    shown = f"[{host}]" if ":" in host else host

    def serve() -> None:
        try:
            settings = Settings(model, defaults, api_key, allowed_origins, hosts, max_body, max_prompt_tokens, allow_image_files,
                                allow_image_urls, drafter[0], max_compile_seconds, allow_control_tokens, strict, aliases,
                                any_model)
            server = uvicorn.Server(uvicorn.Config(create_app(engine, settings), log_level=log_level, server_header=False,
                                                   timeout_graceful_shutdown=LAST_WORDS))
            servers.append(server)
            print(f"{model} is at http://{shown}:{listening.getsockname()[1]}: a page to watch it, and OpenAI's protocol under /v1",
                  flush=True)
            server.run(sockets=[listening])
        finally:
            engine.close()

    servers: list[uvicorn.Server] = []
    # MLX works on this thread: what it keeps for a thread it gives back when that ends, with Python's help, which may be over then.
    http = threading.Thread(target=serve, name="http", daemon=True)
    told = list[int]()

    def stop(number: int, _: object) -> None:
        engine.close(0 if told else grace)  # told twice, it waits for nothing
        told.append(number)

    def ready() -> None:
        http.start()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)

    sys.setswitchinterval(SWITCH_SECONDS)
    engine.run(ready)
    # Only now that nothing runs any longer: until here clients were told what became of their requests, new ones that it closes.
    for server in servers:
        server.should_exit = True
    http.join()


def _listen(host: str, port: int) -> socket.socket:
    """Before the model is loaded, which takes longer.  Errors: UserError for an address that cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise UserError(f"The server cannot listen on {host} port {port} ({error.strerror}); choose another --port or "
                        "--host.") from None
    return listening


def _names(own: list[str], address: str, further: list[str]) -> list[str]:
    """Under which the server may be called; none for any.  Others than this machine reach it only where ``address`` is no loopback,
    and then under names that are not known here, unless they were given."""
    return own + further if further or ipaddress.ip_address(address).is_loopback else []
