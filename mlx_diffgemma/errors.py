"""The one exception for what a user can put right, and what else goes wrong with a name."""

from collections.abc import Sequence
from typing import Any


class UserError(ValueError):
    """A mistake in the input: one sentence that says what was wrong, what was given, what is allowed and what to do.

    The command line prints it without a traceback and leaves with exit code 2.
    """


class ContextError(UserError):
    """A prompt, or an answer behind it, that the context does not hold."""


class CheckpointWarning(UserWarning):
    """A checkpoint that runs, but not as well as its user would expect."""


class NonFiniteLogitsError(RuntimeError):
    """The model returned NaN or infinity: a damaged checkpoint or a numerical bug, never something to sample from.

    ``sessions`` are those of a loop whose logits they were; without them the loop can go on.
    """

    def __init__(self, message: str, sessions: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.sessions = tuple(sessions)
