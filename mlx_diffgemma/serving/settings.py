"""The settings of a server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_diffgemma.errors import ContextError
from mlx_diffgemma.grammar.budget import MAX_SECONDS
from mlx_diffgemma.sampling.protocols import DraftModel

# The names of this machine.  The last one is its name in containers that it runs.
LOCAL = ("127.0.0.1", "localhost", "::1", "host.docker.internal")


@dataclass(frozen=True)
class Settings:
    """What ``serve`` was started with.

    Attributes:
        model: the name under which the model is served.
        defaults: options of generations that a request may override.
        api_keys: keys of which a request must send one; empty for open access.
        allowed_origins: origins of web pages that may send requests, in addition to our own page.
        allowed_hosts: names by which the server may be called; any if empty or ``*`` is in it.
        max_body: the most bytes of a request body.
        max_prompt_tokens: the most tokens of a prompt; None for the context.
        allow_files: whether images may be paths on this machine.
        allow_urls: whether images may be fetched from elsewhere.
        draft: the draft model, if any.
        compile_seconds: seconds that one constraint may take to compile.
        allow_control_tokens: read control tokens in users' texts as control tokens, not as text.
        strict: refuse fields that are unknown or have no effect.
        aliases: further names of the model.
        any_model: answer to every model name.
    """

    model: str
    defaults: dict[str, Any] = field(default_factory=dict)
    api_keys: Sequence[str] = ()
    allowed_origins: Sequence[str] = ()
    allowed_hosts: Sequence[str] = ()
    max_body: int = 32 * 2**20
    max_prompt_tokens: int | None = None
    allow_files: bool = False
    allow_urls: bool = False
    draft: DraftModel | None = None
    compile_seconds: float = MAX_SECONDS
    allow_control_tokens: bool = False
    strict: bool = False
    aliases: Sequence[str] = ()
    any_model: bool = False

    def check_prompt(self, length: int) -> None:
        """Check the number of tokens of a prompt.

        Raises:
            ContextError: the prompt has more than this server accepts.
        """
        most = self.max_prompt_tokens
        if most is not None and length > most:
            raise ContextError(
                f"The prompt has {length:,} tokens, and this server takes {most:,}; shorten it."
            )
