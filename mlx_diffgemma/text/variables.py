"""Variables of a chat template that a user or a request sets."""

from __future__ import annotations

import functools
from collections.abc import Iterable

from jinja2 import meta
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_diffgemma.errors import UserError
from mlx_diffgemma.text.templates import syntax

# Variables of templates and arguments of apply_chat_template that a request must not set.
RESERVED = (
    "messages",
    "tools",
    "tokenize",
    "add_generation_prompt",
    "chat_template",
    "return_dict",
    "return_tensors",
    "documents",
    "think",
    "tokenizer",
    "conversation",
    "continue_final_message",
    "padding",
    "truncation",
    "max_length",
    "self",
    "return_assistant_tokens_mask",
    "sanitize_control_tokens",
    "tokenizer_kwargs",
    "enable_thinking",
    "raise_exception",
    "strftime_now",
)


def check_variables(
    tokenizer: TokenizerWrapper, names: Iterable[str], where: str = "chat_template_kwargs"
) -> None:
    """Check the variables of the chat template that a user or a request sets.

    Args:
        tokenizer: The tokenizer with the chat template.
        names: The variables.
        where: The field or option that sets them.

    Raises:
        UserError: The chat template does not read a name, or it sets the name itself.
    """
    reserved = {*RESERVED, *tokenizer.special_tokens_map}
    # If this is false, the template is a function, or there are several.
    inspected = tokenizer._chat_template is None and isinstance(tokenizer.chat_template, str)
    read = _variables(tokenizer.chat_template) if inspected else None
    for name in names:
        if name in reserved:
            raise UserError(f"{where}: {name} is set by the program itself; leave it out.")
        if read is not None and name not in read:
            names_read = ", ".join(sorted(read - reserved | {"enable_thinking"}))
            raise UserError(
                f"{where}: the model's chat template does not read {name!r:.100}, "
                f"only {names_read}; leave it out."
            )


@functools.lru_cache(maxsize=4)
def _variables(template: str) -> frozenset[str] | None:
    """The variables that a template reads; None where it cannot be read."""
    try:
        return frozenset(meta.find_undeclared_variables(syntax(template)))
    except UserError:  # rendering will report this
        return None
