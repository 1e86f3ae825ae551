"""Options of ``mlx-diffgemma serve``."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Any

from mlx_diffgemma.cli.signature import part_option
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.grammar.budget import MAX_SECONDS

HOST = re.compile(
    r"[*]|[A-Za-z0-9_.-]+|\[?[0-9A-Fa-f.]*(:[0-9A-Fa-f.]*){2,}\]?"
)  # a name or an address
LEVELS = ("critical", "error", "warning", "info", "debug")


@dataclass(frozen=True)
class ListenOptions:
    """The options that say where the server listens, and how it ends."""

    PANEL = "Server"

    host: str = part_option(
        "127.0.0.1", help="Address to listen on; 0.0.0.0 is every one this machine has."
    )
    port: int = part_option(8080, min=0, max=65535, help="Port to listen on; 0 takes a free one.")
    grace: int = part_option(
        10,
        min=0,
        help="Seconds that running answers have to finish when the server is stopped.",
    )
    wired: str = part_option(
        "auto",
        help="On a Mac: 'auto' keeps a model that takes more than half of the memory within the "
        "GPU's reach; 'off' leaves that to macOS. See docs/metal.md.",
    )
    log_level: str = part_option(
        "info", help=f"Least severe messages that are logged: {', '.join(LEVELS)}."
    )


@dataclass(frozen=True)
class AccessOptions:
    """The options that say who may send requests, and for what."""

    PANEL = "Access"

    api_keys: list[str] = part_option(
        [],
        "--api-key",
        envvar="MLX_DIFFGEMMA_API_KEY",
        show_envvar=True,
        help="A key that requests must bring as Authorization: Bearer. May be given again, in the "
        "variable with blanks between; each key is then a client of its own.",
    )
    allowed_origins: list[str] = part_option(
        [],
        "--allowed-origin",
        help="A web page's origin that may ask from a browser; may be given again. Default: none "
        "but the page served here.",
    )
    allowed_hosts: list[str] = part_option(
        [],
        "--allowed-host",
        help="A further name under which the server may be called, such as that of a proxy; may "
        "be given again; * is any. Default: those of this machine, and any with a --host that "
        "others reach.",
    )
    forwarded_allow_ips: str | None = part_option(
        None,
        help="Addresses of proxies, with commas between them, whose X-Forwarded-For names the "
        "client; * trusts everybody. Default: none, so that no client chooses its address.",
    )
    allow_image_files: bool = part_option(
        False,
        "--allow-image-files",
        help="Requests may name images by their path on this machine.",
    )
    allow_image_urls: bool = part_option(
        False,
        "--allow-image-urls",
        help="Requests may name images by a URL, which the server then fetches.",
    )
    allow_control_tokens: bool = part_option(
        False,
        "--allow-control-tokens",
        help="Read what looks like a control token in messages and prompts as one. Default: it is "
        "plain text.",
    )
    strict: bool = part_option(
        False,
        "--strict",
        help="Refuse a request whose fields are not known here, or have no effect. Default: the "
        "answer names them in its warnings.",
    )
    aliases: list[str] = part_option(
        [], "--alias", help="A further name of the model in requests; may be given again."
    )
    any_model: bool = part_option(
        False, "--any-model", help="Answer requests for a model of any name."
    )

    def check(self) -> None:
        """Raise UserError if a key cannot be sent in a header, or a host is not a name."""
        for key in self.api_keys:
            if not (key and key.isascii() and key.isprintable() and " " not in key):
                raise UserError(
                    "An API key goes into a header: it must be ASCII, not empty, and have no blanks in it."
                )
        for name in self.allowed_hosts:
            if not HOST.fullmatch(name):
                raise UserError(
                    f"--allowed-host takes a name or an address without scheme and port, and got {name!r}."
                )


@dataclass(frozen=True)
class LimitOptions:
    """The options that limit what the server does at once, and for one request."""

    PANEL = "Limits"

    max_batch: int = part_option(8, min=1, help="Answers that are written side by side.")
    max_queue: int = part_option(
        64, min=1, help="Requests that wait for a place; more are refused with 429."
    )
    prefill_step_size: int = part_option(
        512, min=2, help="Positions of prompts that are read between two steps."
    )
    prompt_cache_bytes: int = part_option(
        2 * 2**30,
        min=0,
        help="Bytes that encoded prompts may take for later ones that start alike; 0 keeps nothing.",
    )
    max_prompt_tokens: int | None = part_option(
        None, min=1, help="Refuse prompts of more tokens. Default: the context."
    )
    max_compile_seconds: float = part_option(
        MAX_SECONDS,
        min=0.1,
        help="Seconds that the schema or expression of one request may take to compile.",
    )
    max_body: int = part_option(32 * 2**20, min=1, help="Bytes of a request's body.")


def proxies(trusted: str | None) -> dict[str, Any]:
    """The uvicorn options that say whose X-Forwarded-For is trusted.

    By default no one's is, since otherwise every client of this machine could choose its address.
    """
    return {"proxy_headers": trusted is not None, "forwarded_allow_ips": trusted or ""}


def host_names(own: list[str], address: str, further: list[str]) -> list[str]:
    """The host names by which the server may be called.  An empty list allows any name.

    If ``address`` is not a loopback address, other machines may use names that are not known here.
    Then any name is allowed, unless ``further`` ones were given.

    Args:
        own: the names of this machine.
        address: the address on which the server listens.
        further: names that the user gave.
    """
    return own + further if further or ipaddress.ip_address(address).is_loopback else []
